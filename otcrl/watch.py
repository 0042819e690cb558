"""`otcrl watch`: how a run is doing, from the files it writes. It may run elsewhere, be finished, or have died."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from otcrl.errors import ConfigError
from otcrl.evaluate.report import FILE, Report
from otcrl.report.build import about
from otcrl.report.files import Row, by_age, check_run, read_config, read_metrics

if TYPE_CHECKING:
    from rich.console import Group, RenderableType
    from rich.table import Table

OWN = ("every",)
RECENT = 20  # steps that figures are averaged over
SPARKS = "▁▂▃▄▅▆▇█"
WIDTH = 40  # of a sparkline
PHASES = ("rollout", "reward", "score", "transcripts", "update", "sync")
FILES = ("metrics.jsonl", "sft.jsonl", "summary.json")  # whose change is news
CURVES = {  # label -> (metric, what it is)
    "EM": ("reward/correct", "right answers"),
    "TC": ("calls/well_formed", "calls per trajectory"),
    "TP": ("", "right answers per call"),
    "reward": ("reward/value", ""),
    "tokens": ("rollout/sampled_tokens", "sampled per trajectory"),
}
HEALTH = {  # label -> (metric, format)
    "KL": ("update/kl", ".2g"),
    "entropy": ("update/entropy", ".3g"),
    "mismatch": ("rollout/logprob_gap_mean", ".1e"),
    "sign reversals": ("reward/sign_reversals", ".1%"),
    "clipped": ("update/clip_fraction", ".1%"),
    "groups with a signal": ("reward/groups_with_signal", ".0%"),
}


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
        if self.steps is None or self.step_s is None:
            return None
        return max(self.steps - len(self.rows), 0) * self.step_s


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
        evaluations={path.parent.name: Report.load(path.parent) for path in by_age(folder.glob(f"eval/*/{FILE}"))},
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
        parts += ["", evaluations(progress.evaluations)]
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


def curves(rows: Sequence[Row]) -> Table:
    from rich.table import Table

    grid = Table.grid(padding=(0, 2))
    grid.add_column()
    grid.add_column(justify="right")
    for label, (name, what) in CURVES.items():
        values = [productivity(row) if label == "TP" else row.get(name) for row in rows]
        if any(value is not None for value in values):
            grid.add_row(f"[bold]{label}[/]", latest(label, values[-1]), sparkline(values), f"[dim]{what}[/]")
    return grid


def latest(label: str, value: float | None) -> str:
    if value is None:
        return "no calls" if label == "TP" else ""
    return f"{value:.3f}" if value < 100 else f"{value:.0f}"


def productivity(row: Row) -> float | None:
    right, calls = row.get("reward/correct"), row.get("calls/well_formed")
    return None if right is None or not calls else right / calls


def sparkline(values: Sequence[float | None], width: int = WIDTH) -> str:
    """Means over as many equal parts as there is room for, drawn between the lowest and the highest."""
    count = min(width, len(values))
    cuts = [round(k * len(values) / count) for k in range(count + 1)]
    parts = [[v for v in values[start:end] if v is not None] for start, end in pairwise(cuts)]
    means = [sum(part) / len(part) if part else None for part in parts]
    known = [mean for mean in means if mean is not None]
    low, room = min(known), max(known) - min(known)
    level = lambda mean: round((len(SPARKS) - 1) * (mean - low) / room) if room else 3  # noqa: E731
    return "".join(" " if mean is None else SPARKS[level(mean)] for mean in means)


def averages(rows: Sequence[Row]) -> Table:
    """Phases, tools and health of the last steps."""
    from rich.table import Table

    health = {label: (recent(rows, name), form) for label, (name, form) in HEALTH.items()}
    said = [f"{label} {value:{form}}" for label, (value, form) in health.items() if value is not None]
    grid = Table.grid(padding=(0, 2))
    grid.add_row("[bold]step[/]", ", ".join(phase_words(rows)))
    grid.add_row("[bold]tools[/]", ", ".join(tool_words(rows)))
    grid.add_row("[bold]update[/]", ", ".join(said))
    grid.add_row("", f"[dim]means of the last {min(RECENT, len(rows))} steps[/]")
    return grid


def phase_words(rows: Sequence[Row]) -> Iterator[str]:
    total = recent(rows, "time/step_s") or 0.0
    yield f"{total:.3g} s"
    for name in PHASES:
        value = recent(rows, f"time/{name}_s")
        if value and value >= 0.005 * total:  # what is next to nothing is not named
            yield f"{name} {value:.2g} s ({value / total:.0%})"


def tool_words(rows: Sequence[Row]) -> Iterator[str]:
    emitted = recent(rows, "calls/emitted")
    wrong = [recent(rows, f"calls/{name}") or 0.0 for name in ("failed", "invalid")]
    if emitted:
        yield f"{sum(wrong) / emitted:.1%} of calls failed or malformed"
    void, tool_s = recent(rows, "rollout/void_share"), recent(rows, "perf/tool_s")
    if void is not None:
        yield f"[{'red' if void > 0.05 else 'default'}]{void:.1%} of trajectories lost to infrastructure[/]"
    if tool_s is not None:
        yield f"{tool_s:.2g} s per trajectory"


def evaluations(reports: dict[str, Report]) -> Table:
    from rich import box
    from rich.table import Table

    table = Table("evaluation", "EM", "TC", "TP", "n", box=box.SIMPLE_HEAD, pad_edge=False)
    for name, report in reports.items():
        figures = [getattr(report.overall, figure) for figure in ("em", "tc", "tp")]
        shown = ["no calls" if e.value is None else f"{e.value:.3f} [dim]{e.low:.2f}-{e.high:.2f}[/]" for e in figures]
        table.add_row(name, *shown, str(report.overall.questions))
    return table


def recent(rows: Sequence[Row], name: str) -> float | None:
    """Mean over the last steps that logged it; None when none did."""
    values = [value for row in rows[-RECENT:] if (value := row.get(name)) is not None]
    return sum(values) / len(values) if values else None


def clock(duration_s: float) -> str:
    """1:05 min, 2:03:00 h."""
    whole = round(duration_s)
    minutes, s = divmod(whole, 60)
    h, m = divmod(minutes, 60)
    return f"{h}:{m:02}:{s:02} h" if h else f"{m}:{s:02} min"
