"""`otcrl watch`: how a run is doing, from the files it writes. It may run elsewhere, be finished, or have died."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from otcrl.errors import ConfigError
from otcrl.evaluate.report import Report
from otcrl.loggers.panel import WIDTH, averages, clock, curves, left_s, recent
from otcrl.report.build import about
from otcrl.report.files import Row, check_run, evaluations, read_config, read_metrics

if TYPE_CHECKING:
    from rich.console import Group, RenderableType
    from rich.table import Table

OWN = ("every",)
FILES = ("metrics.jsonl", "sft.jsonl", "summary.json")  # whose change is news


@dataclass(frozen=True, kw_only=True)
class Progress:
    """What the files of a run say."""

    folder: Path
    known_by: str  # its choices in words
    steps: int | None  # that it is to make; None: its config does not say
    sft_steps: int
    sft: Sequence[Row]
    rows: Sequence[Row]  # of training steps
    evaluations: dict[str, Report]
    is_finished: bool
    changed: float  # seconds since the epoch, of the last news; 0: none

    @property
    def step_s(self) -> float | None:
        return recent(self.rows, "time/step_s")

    @property
    def left_s(self) -> float | None:
        """Until the last training step, at the pace of the last steps; the evaluation after it not included."""
        return None if self.steps is None else left_s(self.rows, self.steps - len(self.rows))


def read_progress(folder: Path) -> Progress:
    """Raises ConfigError for what is no run directory, and DataError for a file that cannot be read."""
    check_run(folder)
    config = read_config(folder)
    stamps = [(folder / name).stat().st_mtime for name in FILES if (folder / name).is_file()]
    return Progress(
        folder=folder,
        known_by=" · ".join(text for name, text in about(config).items() if name != "seed"),
        steps=(config.get("loop") or {}).get("steps"),
        sft_steps=(config.get("sft") or {}).get("steps") or 0,
        sft=read_metrics(folder / "sft.jsonl"),
        rows=[row for row in read_metrics(folder / "metrics.jsonl") if "time/step_s" in row],
        evaluations={name: Report.load(path) for name, path in evaluations(folder).items()},
        is_finished=(folder / "summary.json").is_file(),
        changed=max(stamps, default=0.0),
    )


def watch(folders: Sequence[str], every: str = "2", once: bool = False) -> None:
    """Shows it until it is finished, or once where there is no terminal to draw on."""
    from rich.console import Console
    from rich.live import Live

    if len(folders) != 1:
        raise ConfigError(f"otcrl watch follows one run directory, got {len(folders)}: otcrl watch runs/NAME")
    folder, pause = Path(folders[0]), seconds(every)
    console = Console(highlight=False)
    progress = read_progress(folder)
    if once or progress.is_finished or not console.is_terminal:
        console.print(view(progress, time.time()))
        return
    with suppress(KeyboardInterrupt), Live(console=console, auto_refresh=False) as live:
        while True:
            live.update(view(progress, time.time()), refresh=True)
            if progress.is_finished:
                return
            time.sleep(pause)
            if newest(folder) != progress.changed:
                progress = read_progress(folder)


def newest(folder: Path) -> float:
    return max(((folder / name).stat().st_mtime for name in FILES if (folder / name).is_file()), default=0.0)


def seconds(text: str) -> float:
    with suppress(ValueError):
        if 0 < (value := float(text)) < float("inf"):
            return value
    raise ConfigError(f"every must be a number of seconds above 0, got {text!r}")


# -- what is shown ---------------------------------------------------------------------------------


def view(progress: Progress, now: float) -> Group:
    from rich.console import Group
    from rich.text import Text

    parts: list[RenderableType] = [Text.assemble((str(progress.folder), "bold"), "  ", (progress.known_by, "dim"))]
    parts.append(bar(progress))
    parts.append(Text(state(progress, now), style="dim"))
    if progress.rows:
        parts += ["", curves(progress.rows), "", averages(progress.rows)]
    if progress.evaluations:
        parts += ["", figures(progress.evaluations)]
    return Group(*parts)


def bar(progress: Progress) -> RenderableType:
    from rich.progress_bar import ProgressBar
    from rich.table import Table

    what, done, total = "step", len(progress.rows), progress.steps
    if not progress.rows and progress.sft:
        what, done, total = "cold start, step", len(progress.sft), progress.sft_steps
    grid = Table.grid(padding=(0, 2))
    grid.add_row(f"{what} {done}" + (f" of {total}" if total else ""), ProgressBar(total or None, done, width=WIDTH))
    return grid


def state(progress: Progress, now: float) -> str:
    """Where it stands, in words."""
    spent = sum(row["time/step_s"] or 0.0 for row in progress.rows)
    if progress.is_finished:
        return f"finished; {clock(spent)} in training steps"
    said = []
    if progress.rows:
        said.append(f"{clock(spent)} in training steps")
        if progress.left_s:
            said.append(f"{clock(progress.left_s)} to go")
        elif progress.left_s == 0:
            said.append("all steps made, evaluating")
    elif not progress.sft:
        said.append("starting")
    quiet = now - progress.changed
    if progress.changed and quiet > 60 + 3 * (progress.step_s or 0.0):
        said.append(f"no news for {clock(quiet)}")
    return "; ".join(said) or "the cold start"


def figures(reports: dict[str, Report]) -> Table:
    from rich import box
    from rich.table import Table

    table = Table("evaluation", "EM", "TC", "TP", "n", box=box.SIMPLE_HEAD, pad_edge=False)
    for name, report in reports.items():
        figures = [getattr(report.overall, figure) for figure in ("em", "tc", "tp")]
        shown = ["no calls" if e.value is None else f"{e.value:.3f} [dim]{e.low:.2f}-{e.high:.2f}[/]" for e in figures]
        table.add_row(name, *shown, str(report.overall.questions))
    return table
