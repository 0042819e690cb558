"""One line per step on the terminal: the few numbers that tell whether a run is well. metrics.jsonl has the rest.

On a terminal the panel of `otcrl watch` stands beneath the progress bars: curves of EM, TC and TP, phases, tools.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import suppress

from rich import get_console
from rich.console import Console, Group
from rich.markup import escape

from otcrl.loggers.panel import SHOWN, Row, averages, clock, curves, error_rate, left_s, productivity
from otcrl.loggers.progress import Bars
from otcrl.types import Metrics

COLUMNS = (  # label, metric, format; a step shows those that it has
    ("reward", "reward/value", ".3f"),
    ("correct", "reward/correct", ".3f"),
    ("calls", "calls/well_formed", ".2f"),
    ("tokens", "rollout/tokens", ".0f"),
    ("loss", "sft/loss", ".4f"),
    ("kl", "update/kl", ".4f"),
    ("entropy", "update/entropy", ".3f"),
    ("s", "time/step_s", ".1f"),
)


class ConsoleLogger:
    wired = frozenset({"bars", "steps", "earlier", "console"})

    def __init__(
        self,
        *,
        every: int,  # steps; evaluations are always shown
        panel: bool,
        bars: Bars | None = None,  # beneath which the panel stands
        steps: int = 0,  # that the run is to make
        earlier: Sequence[Row] = (),  # that it has made
        console: Console | None = None,  # the one that the bars share
    ) -> None:
        if every < 1:
            raise ValueError(f"every must be at least 1 step, got {every}")
        self._every, self._steps = every, steps
        self._console = console or get_console()
        self._bars = bars if panel and bars is not None and self._console.is_terminal else None
        self._rows: list[Row] = []
        for row in earlier:
            self._keep(row)

    def log(self, metrics: Metrics, step: int) -> None:
        self._keep(metrics)
        if step % self._every == 0:
            self._print(step, list(self._cells(metrics, step)))
        evaluation = {name: value for name, value in metrics.items() if name.startswith("eval/")}
        self._print(step, [cell(name, format(value, ".4g")) for name, value in evaluation.items()])
        if self._bars is not None and self._rows:
            self._bars.show(self._panel(step))

    def close(self) -> None:
        pass

    def _keep(self, row: Row) -> None:
        """What the panel needs of a training step."""
        if "time/step_s" in row:
            finite = {name: value for name in SHOWN & row.keys() if (value := row[name]) is not None}
            self._rows.append({name: value for name, value in finite.items() if math.isfinite(value)})

    def _cells(self, metrics: Metrics, step: int) -> Iterator[str]:
        shown = {label: format(metrics[name], form) for label, name, form in COLUMNS if name in metrics}
        if (found := productivity(metrics)) is not None:
            shown["TP"] = f"{found:.3f}"
        if wrong := error_rate([metrics]):
            shown["errors"] = f"{wrong:.1%}"
        if "s" in shown and self._steps > step + 1:
            shown["left"] = self._left(step)
        yield from (cell(label, value) for label, value in shown.items())

    def _left(self, step: int) -> str:
        return clock(left_s(self._rows, self._steps - step - 1) or 0.0)

    def _panel(self, step: int) -> Group:
        left = f", {self._left(step)} left" if self._steps > step + 1 else ""
        title = f"[bold]step {step + 1}[/] of {self._steps}{left}" if self._steps else f"[bold]step {step + 1}[/]"
        return Group("", title, curves(self._rows), averages(self._rows))

    def _print(self, step: int, cells: list[str]) -> None:
        if not cells:
            return
        with suppress(OSError):  # the disk that it goes to is full
            self._console.print(f"[bold]step {step:>5}[/]  {'  '.join(cells)}", highlight=False, soft_wrap=True)


def cell(label: str, value: str) -> str:
    return f"[dim]{escape(label)}[/] {value}"
