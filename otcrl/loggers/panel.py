"""The figures that tell how a run is doing, drawn for a terminal: curves, phases, tools, health, time left.

`otcrl watch` shows them of any run, and the console logger beneath the progress bars of the run itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table

Row = Mapping[str, float | None]  # of metrics.jsonl

RECENT = 20  # steps that figures are averaged over
SPARKS = "▁▂▃▄▅▆▇█"
WIDTH = 40  # of a sparkline
PHASES = ("rollout", "reward", "score", "transcripts", "update", "sync")
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
TOOLS = ("calls/emitted", "calls/failed", "calls/invalid", "rollout/void_share", "perf/tool_s")
SHOWN = frozenset(  # what a row needs to have for all of this
    {name for name, _ in (*CURVES.values(), *HEALTH.values())}
    | {"time/step_s", *(f"time/{name}_s" for name in PHASES), *TOOLS}
)


# -- figures -------------------------------------------------------------------------------------------


def productivity(row: Row) -> float | None:
    right, calls = row.get("reward/correct"), row.get("calls/well_formed")
    return None if right is None or not calls else right / calls


def error_rate(rows: Sequence[Row]) -> float | None:
    """Of the calls of the last steps, those that failed or were malformed; None without a call."""
    emitted = recent(rows, "calls/emitted")
    return sum(recent(rows, f"calls/{name}") or 0.0 for name in ("failed", "invalid")) / emitted if emitted else None


def left_s(rows: Sequence[Row], to_go: int) -> float | None:
    """Until `to_go` more steps are made, at the pace of the last ones; the evaluation after them not included."""
    pace = recent(rows, "time/step_s")
    return None if pace is None else max(to_go, 0) * pace


def recent(rows: Sequence[Row], name: str) -> float | None:
    """Mean over the last steps that logged it; None when none did."""
    values = [value for row in rows[-RECENT:] if (value := row.get(name)) is not None]
    return sum(values) / len(values) if values else None


# -- what is shown ---------------------------------------------------------------------------------


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
    wrong = error_rate(rows)
    if wrong is not None:
        yield f"{wrong:.1%} of calls failed or malformed"
    void, tool_s = recent(rows, "rollout/void_share"), recent(rows, "perf/tool_s")
    if void is not None:
        yield f"[{'red' if void > 0.05 else 'default'}]{void:.1%} of trajectories lost to infrastructure[/]"
    if tool_s is not None:
        yield f"{tool_s:.2g} s per trajectory"


def clock(duration_s: float) -> str:
    """1:05 min, 2:03:00 h."""
    whole = round(duration_s)
    minutes, s = divmod(whole, 60)
    h, m = divmod(minutes, 60)
    return f"{h}:{m:02}:{s:02} h" if h else f"{m}:{s:02} min"
