# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""What the command-line tools share."""
import argparse
import glob
import logging
import os
import signal
import sys
import traceback
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Callable, Iterator, List, Optional, Union

from mmengine.config import DictAction

from mmgcp.errors import UserError

from .processes import (
    Terminated,
    end_with_parent,
    end_workers_with_this,
    ending_in_order,
    is_running,
)

TRACEBACK_OPTION = '--traceback'
TRACEBACK_VARIABLE = 'MMGCP_TRACEBACK'
TRACEBACK_HELP = f"""
every tool of mmgcp:
  {TRACEBACK_OPTION}           show the whole traceback of an error before its message; also with
                        the environment variable {TRACEBACK_VARIABLE}=1"""
HELP_OPTIONS = {'-h', '--help'}


class CfgOptions(DictAction):
    """The argparse action of ``--cfg-options``: MMEngine's, with an error that argparse reports."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: argparse.Namespace,
                 values: List[str], option_string: Optional[str] = None) -> None:
        """Parse ``key=value`` pairs into a dict.

        Raises:
            argparse.ArgumentError: A pair has no ``=`` or an empty name, or its brackets are not
                balanced.
        """
        try:
            if not all(all(pair.split('=', 1)[0].split('.')) for pair in values):
                raise ValueError(f'an empty name in {values}')
            super().__call__(parser, namespace, values, option_string)
        except (ValueError, AssertionError, RecursionError):
            raise argparse.ArgumentError(
                self, f'expected key=value pairs, but got {" ".join(values)}') from None


def run_tool(main: Callable[[], Any]) -> None:
    """Run a tool; an error that the user can mend ends it with one sentence and status 1.

    An interrupt, SIGTERM and SIGHUP end it in order, with the status that shells give them. As a
    process of torchrun, it does not outlive it.

    ``--traceback``, which is removed from ``sys.argv`` before the tool parses it, or the
    environment variable ``MMGCP_TRACEBACK=1`` prints the whole traceback before the sentence,
    including the errors that led to it. Tools that this one starts do so as well. ``--help`` of
    every tool describes it. Where nobody reads the output any more, as behind ``| head``, the
    next that is printed ends the tool without a word.

    Args:
        main (Callable): The tool's main function.
    """
    _read_traceback_option()
    wants_help = bool(HELP_OPTIONS.intersection(sys.argv[1:]))
    if 'TORCHELASTIC_RUN_ID' in os.environ:
        end_with_parent()
    end_workers_with_this()
    try:
        with ending_in_order(), _logging_that_nobody_reads():
            _undisguised(main)
        sys.stdout.flush()
    except (UserError, OSError) as error:
        _end_if_nobody_reads(error)
        if os.environ.get(TRACEBACK_VARIABLE, '0') not in ('', '0'):
            _print_traceback(error)
        sys.exit(f'{Path(sys.argv[0]).name}: {error}')
    except KeyboardInterrupt:
        print('\ninterrupted', file=sys.stderr)
        sys.exit(130)
    except Terminated as end:
        print(f'\nended by {end.signal_name}', file=sys.stderr)
        raise
    except SystemExit as exit_:
        if wants_help and not exit_.code:
            _print_help()
        raise


def _print_help() -> None:
    """Print what help says of all tools."""
    try:
        print(TRACEBACK_HELP, flush=True)
    except OSError as error:
        _end_if_nobody_reads(error)
        raise


@contextmanager
def _logging_that_nobody_reads() -> Iterator[None]:
    """Let loggers raise that their output is closed, instead of printing a traceback a line."""
    before = logging.Handler.handleError

    def handle(handler: logging.Handler, record: logging.LogRecord) -> None:
        if isinstance(sys.exc_info()[1], BrokenPipeError):
            raise  # which logging is handling
        before(handler, record)

    logging.Handler.handleError = handle
    try:
        yield
    finally:
        logging.Handler.handleError = before


def _end_if_nobody_reads(error: Exception) -> None:
    """End this process, with the status that shells give for SIGPIPE, if its output is closed."""
    if not isinstance(error, BrokenPipeError):
        return
    try:
        print(flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + signal.SIGPIPE)


def _undisguised(main: Callable[[], Any]) -> None:
    """Run a tool; an interrupt or a signal ends it also where an error has taken its place.

    MMEngine turns whatever is raised while it formats a config into a SyntaxError.
    """
    try:
        main()
    except Exception as error:
        for link in _chain(error):
            if isinstance(link, (KeyboardInterrupt, Terminated)):
                raise link from None
        raise


def _chain(error: BaseException) -> Iterator[BaseException]:
    """Yield an error and those that led to it, also contexts hidden by ``raise ... from None``."""
    link: Optional[BaseException] = error
    while link is not None:
        yield link
        link = link.__cause__ or link.__context__


def _read_traceback_option() -> None:
    """Replace the option by the environment variable, which processes of this one inherit."""
    if TRACEBACK_OPTION in sys.argv[1:]:
        sys.argv[1:] = [item for item in sys.argv[1:] if item != TRACEBACK_OPTION]
        os.environ[TRACEBACK_VARIABLE] = '1'


def _print_traceback(error: BaseException) -> None:
    """Print a traceback that includes contexts hidden by ``raise ... from None``."""
    for link in _chain(error):
        link.__suppress_context__ = False
    traceback.print_exception(type(error), error, error.__traceback__)


@contextmanager
def replacing(*paths: Union[str, Path]) -> Iterator[List[Path]]:
    """Write several files or none: yield temporary paths, which are renamed at the end.

    If the block raises, the temporary files are deleted and nothing is replaced. If the process
    is killed while several are renamed, some may be missing, but no old one is beside a new one.
    Temporary files of processes that were killed are deleted.

    Args:
        *paths (str | Path): The files to write.

    Yields:
        list[Path]: Where to write them, in the same folders and with the same suffixes.
    """
    targets = [Path(path) for path in paths]
    for target in targets:
        _clear_temporaries(target)
    temporaries = [target.with_name(f'.{os.getpid()}-{target.name}') for target in targets]
    try:
        yield temporaries
        for temporary in temporaries:
            with temporary.open('rb') as file:
                os.fsync(file.fileno())
        for target in targets[1:]:
            if target.is_file():
                target.unlink()
        for temporary, target in zip(temporaries, targets):
            os.replace(temporary, target)
    finally:
        for temporary in temporaries:
            if temporary.exists():
                temporary.unlink()


def _clear_temporaries(path: Path) -> None:
    """Delete what processes that are no longer running wrote in place of a file."""
    for temporary in path.parent.glob(f'.[0-9]*-{glob.escape(path.name)}'):
        number = temporary.name[1:].split('-')[0]
        if number.isdigit() and not is_running(int(number)):
            temporary.unlink()
