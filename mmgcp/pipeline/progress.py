# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""How far a tool is, shown on the terminal."""
from contextlib import contextmanager
from typing import Callable, Iterator

from mmengine.dist import is_main_process
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

RESUMED = {'resuming': 'channel units have been pruned', 'resuming steps': 'steps have been taken'}


@contextmanager
def progress_bar() -> Iterator[Callable[[str, int, int], None]]:
    """Yield a function that shows a stage, the steps done in it, and all its steps.

    Of several processes, only the first one shows anything.
    """
    columns = (TextColumn('{task.description:<20}'), BarColumn(), MofNCompleteColumn(),
               TimeElapsedColumn())
    console = Console(stderr=True, quiet=not is_main_process())
    with Progress(*columns, console=console) as bar:
        stages = {}

        def show(stage: str, done: int, steps: int) -> None:
            if stage in RESUMED:
                bar.console.print(f'resuming: {done} of {steps} {RESUMED[stage]} before')
                return
            if stage not in stages:
                stages[stage] = bar.add_task(stage, total=steps)
            bar.update(stages[stage], completed=done, total=steps)

        yield show
