# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""A record of finished steps, so that an interrupted run can be continued."""
import hashlib
import json
from pathlib import Path
from typing import Callable, Dict, Iterable

from mmgcp.errors import UserError
from mmgcp.utils.cli import replacing


class State:
    """Runs steps one after another, except those that an earlier run has finished.

    A step counts as finished if it and all steps before it were run with the same inputs.

    Args:
        path (Path): The JSON file with the record.

    Raises:
        UserError: The file is no such record.
    """

    def __init__(self, path: Path):
        self.path = path
        self.earlier = _read(path) if path.exists() else {}
        self.current: Dict[str, dict] = {}
        self.history = hashlib.sha256()

    def run(self, step: str, inputs: object, work: Callable[[], dict],
            files: Iterable[Path] = (), clear: Callable[[], None] = lambda: None) -> dict:
        """Run a step unless it is finished and its files are still there.

        If it is not finished, the later steps no longer count as finished, either.

        Args:
            step (str): Name of the step.
            inputs (object): Everything its result depends on; compared by ``repr``.
            work (Callable): Does the step, or goes on with it if a run with the same inputs has
                begun it, and returns its result for the record.
            files (Iterable[Path]): Files that the step leaves.
            clear (Callable): Deletes what a run with other inputs has left, from which the step
                must not go on. Defaults to nothing.

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
        if not same:
            clear()  # before the step counts as begun
        self._write(step, dict(inputs=digest))
        result = work()
        self._write(step, dict(inputs=digest, result=result))
        return result

    def _write(self, step: str, record: dict) -> None:
        self.current[step] = record
        with replacing(self.path) as (temporary, ):
            temporary.write_text(json.dumps(self.current, indent=2))


def _read(path: Path) -> Dict[str, dict]:
    """Read a record, all of whose steps must have inputs, and results that are dicts."""
    try:
        content = json.loads(path.read_bytes().decode())
        steps = list(content.values())
        whole = all(isinstance(step['inputs'], str) and isinstance(step.get('result', {}), dict)
                    for step in steps)
        reason = 'it has other contents'
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        whole, reason = False, str(error) or type(error).__name__
    if not whole:
        raise UserError(f'{path} does not say which stages are finished ({reason}); delete it to '
                        'begin with the first one')
    return content
