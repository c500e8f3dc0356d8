# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""What the command-line tools share."""
import os
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import Callable, Iterator, List, Union

from mmgcp.errors import UserError


def run_tool(main: Callable[[], None]) -> None:
    """Run a tool and end it with one sentence and status 1 if it cannot do its work.

    Args:
        main (Callable): The tool's main function.
    """
    try:
        main()
    except (UserError, OSError) as error:
        sys.exit(f'{Path(sys.argv[0]).name}: {error}')
    except KeyboardInterrupt:
        print('\ninterrupted', file=sys.stderr)
        sys.exit(130)


@contextmanager
def replacing(*paths: Union[str, Path]) -> Iterator[List[Path]]:
    """Write files all or none: yield temporary paths and rename them at the end.

    Args:
        *paths (str | Path): The files to be written.

    Yields:
        list[Path]: Where to write them, in the same folders and with the same endings.
    """
    paths = [Path(path) for path in paths]
    temporaries = [path.with_name(f'.{os.getpid()}-{path.name}') for path in paths]
    try:
        yield temporaries
        for temporary, path in zip(temporaries, paths):
            os.replace(temporary, path)
    finally:
        for temporary in temporaries:
            if temporary.exists():
                temporary.unlink()
