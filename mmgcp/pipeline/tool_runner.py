# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""Running the command-line tools as a user would."""
import argparse
import contextlib
import io
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Dict

from mmgcp.errors import UserError
from mmgcp.utils.checkpoint_files import newest_checkpoint
from mmgcp.utils.mmyolo_tools import load_script
from mmgcp.utils.processes import start_child, stop

# Seconds that a tool gets to end by itself after an interrupt, which usually reaches it as well
PATIENCE = 2.
BEGUN = 'begun.txt'  # as old as the training of a stage


class ToolRunner:
    """Runs each tool in a process of its own, which ends with this one.

    Args:
        tools_dir (Path): Folder of the tools.
        folder (Path): Gets a folder for each stage, with the output of its tools in log.txt.
    """

    def __init__(self, tools_dir: Path, folder: Path):
        self.tools_dir = tools_dir
        self.folder = folder

    def run(self, stage: str, tool: str, *arguments: str) -> None:
        """Run a tool and pass its output on, to the terminal and to ``STAGE/log.txt``.

        Args:
            stage (str): Name of the stage, which is put before each line on the terminal.
            tool (str): File name of the tool.
            *arguments (str): Its arguments.

        Raises:
            UserError: The tool failed; quotes the last line of its output.
        """
        log = self.folder / stage / 'log.txt'
        log.parent.mkdir(exist_ok=True)
        print(f'[{stage}] {tool} {shlex.join(arguments)}', flush=True)
        process = start_child(
            [sys.executable, '-u', str(self.tools_dir / tool), *arguments],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            env=dict(os.environ, PYTHONWARNINGS='ignore'))
        last, status = '', None
        try:
            with log.open('a', buffering=1) as file:
                for line in process.stdout:
                    file.write(line)
                    print(f'[{stage}] {line}', end='', flush=True)
                    last = line.strip() or last
            status = process.wait()
        except KeyboardInterrupt:
            status = stop(process, PATIENCE)
            raise
        finally:
            if status is None:
                stop(process)
        if status:
            raise UserError(f'{tool} failed in stage {stage}: {last} (whole output: {log})')

    def load(self, tool: str) -> ModuleType:
        """Load a tool as a module."""
        return load_script(self.tools_dir / tool)

    def train(self, stage: str, config: Path, *options: str) -> None:
        """Run train.py, from the last checkpoint in the stage's folder on if one is whole.

        Args:
            stage (str): Name of the stage.
            config (Path): The config.
            *options (str): Settings to override, as for ``--cfg-options``.

        Raises:
            UserError: The training failed.
        """
        folder, begun = self.folder / stage, self.folder / stage / BEGUN
        try:
            checkpoint = newest_checkpoint(
                folder, since=begun.stat().st_mtime_ns if begun.exists() else 0)
        except UserError as error:
            print(f'[{stage}] starts from the beginning: {error}', flush=True)
            checkpoint = None
        self.run(stage, 'train.py', str(config), '--work-dir', str(folder),
                 *(['--resume', checkpoint] if checkpoint else []), '--cfg-options', *options)

    def begin(self, stage: str) -> None:
        """Let the checkpoints that a stage has stay, but not be resumed from."""
        begun = self.folder / stage / BEGUN
        begun.parent.mkdir(exist_ok=True)
        begun.write_text('checkpoints that are older are of a training with other settings\n')

    def parse(self, tool: str, *arguments: str) -> argparse.Namespace:
        """Let a tool parse arguments without running it.

        Args:
            tool (str): File name of the tool, which must have ``parse_args(arguments)``.
            *arguments (str): The arguments.

        Returns:
            argparse.Namespace: The parsed arguments.

        Raises:
            UserError: The tool does not accept them; says why.
        """
        parse_args = self.load(tool).parse_args
        output = io.StringIO()
        try:
            with contextlib.redirect_stderr(output), contextlib.redirect_stdout(output):
                return parse_args(list(arguments))
        except SystemExit:
            reason = output.getvalue().strip().splitlines()[-1]
            raise UserError(f'{tool} does not take {shlex.join(arguments)}: {reason}') from None

    def test(self, stage: str, config: Path, checkpoint: str) -> Dict[str, float]:
        """Run test.py.

        Args:
            stage (str): Name of the stage.
            config (Path): The config.
            checkpoint (str): The checkpoint, a file or a URL.

        Returns:
            dict[str, float]: The metrics.

        Raises:
            UserError: The test failed.
        """
        folder = self.folder / stage / 'test'
        metrics = folder / 'metrics.json'
        if metrics.exists():
            metrics.unlink()  # of an earlier test
        self.run(stage, 'test.py', str(config), str(checkpoint), '--work-dir', str(folder))
        if not metrics.exists():
            raise UserError(f'test.py wrote no metrics in stage {stage}')
        return json.loads(metrics.read_text())
