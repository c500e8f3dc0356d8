# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""Running the standard tools as a user would, with short progress on the terminal."""
import argparse
import contextlib
import importlib.util
import io
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Dict, Optional

from mmgcp.errors import UserError

TRAIN_LINE = re.compile(
    r'Epoch\(train\)\s+\[(\d+)\]\[\s*(\d+)/(\d+)\].*?eta: (.+?)  .*? loss: (\S+)')
TEST_LINE = re.compile(r'Epoch\((val|test)\).*?(\[\s*\d+/\d+\])\s+(.*mAP.*?)(?:data_time|$)')


class ToolRunner:
    """Runs tools in processes of their own.

    Args:
        tools_dir (Path): Where the tools are.
        folder (Path): Gets a folder for each stage with the whole output, log.txt.
    """

    def __init__(self, tools_dir: Path, folder: Path):
        self.tools_dir = tools_dir
        self.folder = folder

    def run(self, stage: str, tool: str, *arguments: str) -> None:
        """Run a tool.

        Args:
            stage (str): Name of the stage, for the terminal.
            tool (str): File name of the tool.
            *arguments (str): Its arguments.

        Raises:
            UserError: It failed; says its last line.
        """
        log = self.folder / stage / 'log.txt'
        log.parent.mkdir(exist_ok=True)
        print(f'[{stage}] {tool} {" ".join(arguments)}', flush=True)
        command = [sys.executable, '-u', str(self.tools_dir / tool), *arguments]
        last = ''
        with log.open('a', buffering=1) as file:
            process = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                env=dict(os.environ, PYTHONWARNINGS='ignore'))
            try:
                for line in process.stdout:
                    file.write(line)
                    last = line.strip() or last
                    shown = _shorten(line) if tool in ('train.py', 'test.py') else line.rstrip()
                    if shown:
                        print(f'[{stage}] {shown}', flush=True)
                status = process.wait()
            except KeyboardInterrupt:
                process.wait()
                raise
        if status:
            raise UserError(f'{tool} failed in stage {stage}: {last} (whole output: {log})')

    def parse(self, tool: str, *arguments: str) -> argparse.Namespace:
        """Let a tool read arguments without running it.

        Args:
            tool (str): File name of the tool, which must have ``parse_args()``.
            *arguments (str): The arguments.

        Returns:
            argparse.Namespace: What the tool understands.

        Raises:
            UserError: It does not take them; says why.
        """
        spec = importlib.util.spec_from_file_location('_tool', str(self.tools_dir / tool))
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        before, output = sys.argv, io.StringIO()
        try:
            sys.argv = [tool, *arguments]
            with contextlib.redirect_stderr(output), contextlib.redirect_stdout(output):
                return module.parse_args()
        except SystemExit:
            reason = output.getvalue().strip().splitlines()[-1]
            raise UserError(f'{tool} does not take {shlex.join(arguments)}: {reason}') from None
        finally:
            sys.argv = before

    def test(self, stage: str, config: Path, checkpoint: str) -> Dict[str, float]:
        """Run test.py.

        Args:
            stage (str): Name of the stage.
            config (Path): The config.
            checkpoint (str): The checkpoint, a file or a URL.

        Returns:
            dict[str, float]: The metrics.
        """
        folder = self.folder / stage / 'test'
        before = set(folder.glob('*/*.json'))
        self.run(stage, 'test.py', str(config), str(checkpoint), '--work-dir', str(folder))
        files = sorted(set(folder.glob('*/*.json')) - before)
        if not files:
            raise UserError(f'test.py wrote no metrics in stage {stage}')
        return json.loads(files[-1].read_text())


def _shorten(line: str) -> Optional[str]:
    """The gist of a log line, or None for lines without progress."""
    match = TRAIN_LINE.search(line)
    if match:
        epoch, iteration, iterations, eta, loss = match.groups()
        return f'epoch {epoch} iteration {iteration}/{iterations} loss {loss} eta {eta}'
    match = TEST_LINE.search(line)
    return f'{match.group(1)} {" ".join(match.group(3).split())}' if match else None
