# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""What MMEngine's local backend has logged of a training, which may have been resumed."""
from pathlib import Path
from typing import Any, Callable, List

from mmgcp.errors import UserError
from mmgcp.utils.json_files import parse_json, read_text


def log_files(work_dir: Path) -> List[Path]:
    """Find the logs in a work_dir, one for each time that the training was started.

    Args:
        work_dir (Path): The work_dir, or the folder of one training in it.

    Returns:
        list[Path]: The files, oldest first; empty if there are none.
    """
    return sorted(work_dir.glob('*/vis_data/scalars.json')) or sorted(
        work_dir.glob('vis_data/scalars.json'))


def read_log(work_dir: Path, wanted: Callable[[Any], bool], what: str) -> List[dict]:
    """Read the wanted lines of a training, in the order of its iterations.

    A resumed training continues what was before; one that was begun again replaces it.

    Args:
        work_dir (Path): See :func:`log_files`.
        wanted (Callable): Says of a line, which may be anything, whether it is wanted; raises a
            UserError without a text if no such training logs it. A wanted one has a ``step``.
        what (str): What the log is of, for messages: 'a training with ...'.

    Returns:
        list[dict]: The lines.

    Raises:
        UserError: A file cannot be read or is damaged.
    """
    rows: List[dict] = []
    for file in log_files(work_dir):
        new = _read_lines(file, wanted, what)
        if new:
            rows = [row for row in rows if row['step'] < new[0]['step']] + new
    return rows


def _read_lines(file: Path, wanted: Callable[[Any], bool], what: str) -> List[dict]:
    lines = read_text(file, 'the log').splitlines()
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            row = parse_json(line, 'the line')
        except UserError as error:
            if number < len(lines):  # the last one may be of a training that was killed
                raise UserError(f'{file} is damaged in line {number}: {error}') from None
            continue
        try:
            if wanted(row):
                rows.append(row)
        except UserError:
            raise UserError(f'{file} is not the log of {what}: line {number} is '
                            f'{line[:60]!r}') from None
    return rows
