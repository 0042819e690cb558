"""One line per step on the terminal: the few numbers that tell whether a run is well. metrics.jsonl has the rest."""

from __future__ import annotations

from dataclasses import dataclass, field

from rich import get_console
from rich.console import Console
from rich.markup import escape

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


@dataclass(frozen=True, kw_only=True)
class ConsoleLogger:
    every: int  # steps; evaluations are always shown
    console: Console = field(default_factory=get_console)  # the one that progress bars share

    wired = frozenset({"console"})

    def __post_init__(self) -> None:
        if self.every < 1:
            raise ValueError(f"every must be at least 1 step, got {self.every}")

    def log(self, metrics: Metrics, step: int) -> None:
        evaluation = {name: value for name, value in metrics.items() if name.startswith("eval/")}
        cells = [cell(label, format(metrics[name], form)) for label, name, form in COLUMNS if name in metrics]
        if cells and step % self.every == 0:
            self.show(step, cells)
        if evaluation:
            self.show(step, [cell(name, format(value, ".4g")) for name, value in evaluation.items()])

    def show(self, step: int, cells: list[str]) -> None:
        self.console.print(f"[bold]step {step:>5}[/]  {'  '.join(cells)}", highlight=False, soft_wrap=True)

    def close(self) -> None:
        pass


def cell(label: str, value: str) -> str:
    return f"[dim]{escape(label)}[/] {value}"
