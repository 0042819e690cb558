"""Progress bars that share the terminal with the lines of metrics."""

from __future__ import annotations

from collections.abc import Callable

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)


class Bars:
    """`bars("rollout")` is a function to be called with (done, total): a bar that goes when it is full."""

    def __init__(self, console: Console | None = None, *, quiet: bool = False) -> None:
        columns = (TextColumn("{task.description:<20}"), BarColumn(), MofNCompleteColumn())
        ends = (TimeElapsedColumn(), TimeRemainingColumn())
        self._progress = Progress(*columns, *ends, console=console, transient=True, disable=quiet)

    def __call__(self, name: str) -> Callable[[int, int], None]:
        task: TaskID | None = None

        def update(done: int, total: int) -> None:
            nonlocal task
            if task is None:
                task = self._progress.add_task(name)
            self._progress.update(task, completed=done, total=total)
            if done == total:
                self._progress.remove_task(task)
                task = None

        return update

    def __enter__(self) -> Bars:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()
