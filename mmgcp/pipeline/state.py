# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""A record of finished steps, so that an interrupted run can be continued."""
import hashlib
import json
from pathlib import Path
from typing import Callable, Dict, Iterable

from mmgcp.utils.cli import replacing


class State:
    """Runs steps one after another, except those that an earlier run has finished.

    A step counts as finished if it and all steps before it were run with the same inputs.

    Args:
        path (Path): The JSON file with the record.
    """

    def __init__(self, path: Path):
        self.path = path
        self.earlier: Dict[str, dict] = json.loads(path.read_text()) if path.exists() else {}
        self.current: Dict[str, dict] = {}
        self.history = hashlib.sha256()

    def run(self, step: str, inputs: object, work: Callable[[bool], dict],
            files: Iterable[Path] = ()) -> dict:
        """Run a step unless it is finished and its files are still there.

        If it is not finished, the later steps no longer count as finished, either.

        Args:
            step (str): Name of the step.
            inputs (object): Everything its result depends on; compared by ``repr``.
            work (Callable): Does the step and returns its result for the record. Its argument
                says whether an earlier run began the step with the same inputs.
            files (Iterable[Path]): Files that the step leaves.

        Returns:
            dict: The result, of this run or an earlier one.
        """
        self.history.update(repr((step, inputs)).encode())
        digest = self.history.hexdigest()
        record = self.earlier.get(step, {})
        same = record.get('inputs') == digest
        if same and 'result' in record and all(path.exists() for path in files):
            self.current[step] = record
            return record['result']
        self.earlier = {}
        self._write(step, dict(inputs=digest))
        result = work(same)
        self._write(step, dict(inputs=digest, result=result))
        return result

    def _write(self, step: str, record: dict) -> None:
        self.current[step] = record
        with replacing(self.path) as (temporary, ):
            temporary.write_text(json.dumps(self.current, indent=2))
