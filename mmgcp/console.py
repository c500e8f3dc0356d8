# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""The tools as commands: ``mmgcp-prune`` is ``python tools/prune.py``, from any folder."""
import runpy
import sys
from pathlib import Path

from mmgcp.compatibility.packages import carried_folder
from mmgcp.errors import UserError


def tools_folder() -> Path:
    """Return the folder with the tools: of a checkout, or the copy that is installed.

    Raises:
        UserError: There is neither.
    """
    folder = carried_folder() / 'tools'
    if not (folder / 'prune.py').is_file():
        raise UserError(f'there are no tools of mmgcp in {folder}: install it again')
    return folder


def main() -> None:
    """Run the tool that the command is called after, with its arguments."""
    name = Path(sys.argv[0]).stem.partition('mmgcp-')[2]
    sys.argv[0] = str(tools_folder() / f'{name}.py')
    sys.path.insert(0, str(tools_folder()))  # as for a script
    runpy.run_path(sys.argv[0], run_name='__main__')
