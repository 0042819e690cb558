"""Progress bars that share the terminal with the lines of metrics, and with a panel beneath them.

In a file there are no bars. There whatever takes long says now and then how far it is.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from rich import get_console
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.segment import Segments

REFRESHES = 4  # a second; the learner computes in the same process
SILENCE_S = 30.0  # between two lines of progress in a file


class Bars:
    """`bars("rollout")` is a function to be called with (done, total): a bar that goes when it is full."""

    def __init__(self, console: Console | None = None, *, quiet: bool = False) -> None:
        columns = (TextColumn("{task.description:<20}"), BarColumn(), MofNCompleteColumn())
        ends = (TimeElapsedColumn(), TimeRemainingColumn())
        self._console, self._quiet = console or get_console(), quiet
        self._progress = Progress(*columns, *ends, console=self._console, disable=quiet)  # `_live` draws it
        self._said = time.monotonic()
        self._panel: RenderableType | None = None
        self._live = Live(
            console=self._console, transient=True, refresh_per_second=REFRESHES, get_renderable=self._everything
        )

    def __call__(self, name: str) -> Callable[[int, int], None]:
        task: TaskID | None = None

        def update(done: int, total: int) -> None:
            nonlocal task
            self._say(name, done, total)
            if task is None:
                task = self._progress.add_task(name)
            self._progress.update(task, completed=done, total=total)
            if done == total:
                self._progress.remove_task(task)
                task = None

        return update

    def show(self, panel: RenderableType) -> None:
        """Beneath the bars, until another is shown. It is drawn now, and as it is again and again."""
        lines = self._console.render_lines(panel, pad=False, new_lines=True)
        self._panel = Segments([segment for line in lines for segment in line])

    def _say(self, name: str, done: int, total: int) -> None:
        if self._quiet or self._console.is_terminal or time.monotonic() - self._said < SILENCE_S:
            return
        self._said = time.monotonic()
        self._console.print(f"{name}: {done} of {total}", highlight=False)

    def _everything(self) -> RenderableType:
        return self._progress if self._panel is None else Group(self._progress, self._panel)

    def __enter__(self) -> Bars:
        if not self._quiet:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()
