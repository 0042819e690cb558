"""A table of figures, and its forms: Markdown, LaTeX (booktabs), CSV, and rich's for a terminal."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import TYPE_CHECKING

from otcrl.evaluate.metrics import Estimate

if TYPE_CHECKING:
    from rich.table import Table

DIGITS = 3
NOTHING = "-"


@dataclass(frozen=True, slots=True)
class Cell:
    """A figure. CSV gives it in full, beside its interval and its change; the other forms give it rounded."""

    value: float | None  # None: undefined, or not measured
    low: float | None = None
    high: float | None = None
    change: float | None = None  # against the same figure of a baseline, as a share of it
    digits: int = DIGITS
    least: float | None = None  # whatever is below is shown as that: <0.001
    missing: str = NOTHING  # shown for None

    def text(self) -> str:
        if self.value is None:
            return self.missing
        if self.least is not None and self.value < self.least:
            return f"<{self.least}"
        shown = _number(self.value, self.digits)
        if self.change is not None:
            shown += f" ({'▼' if self.change < 0 else '▲'}{abs(self.change):.1%})"
        if self.low is not None and self.high is not None:
            shown += f" [{_number(self.low, self.digits)}, {_number(self.high, self.digits)}]"
        return shown


Content = Cell | str


@dataclass(frozen=True, kw_only=True)
class Grid:
    title: str
    columns: Sequence[tuple[str, str]]  # (group, name); columns of one group lie together, "" groups nothing
    rows: Sequence[Sequence[Content]]
    notes: Sequence[str] = field(default=())  # what a reader must know

    def __post_init__(self) -> None:
        assert all(len(row) == len(self.columns) for row in self.rows), "a row has a cell for each column"


def estimate(found: Estimate, intervals: bool = False, change: float | None = None, missing: str = NOTHING) -> Cell:
    """The cell of a figure, with its interval or without."""
    low, high = (found.low, found.high) if intervals else (None, None)
    return Cell(found.value, low, high, change, missing=missing)


def share(found: Estimate, intervals: bool = False) -> Cell:
    """The same in per cent."""
    value, low, high = (None if x is None else 100 * x for x in (found.value, found.low, found.high))
    return Cell(value, low if intervals else None, high if intervals else None, digits=1)


def _number(value: float, digits: int) -> str:
    if float(value).is_integer() and digits == 0:
        return f"{value:,.0f}"
    return f"{value:,.{1 if abs(value) >= 100 else digits}f}"


def _text(content: Content) -> str:
    return content if isinstance(content, str) else content.text()


def _names(grid: Grid) -> list[str]:
    return [f"{group} {name}".strip() for group, name in grid.columns]


# -- forms ----------------------------------------------------------------------------------------------


def markdown(grid: Grid) -> str:
    def line(cells: Sequence[str]) -> str:
        return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"

    rule = [":---" if _is_text(grid, k) else "---:" for k in range(len(grid.columns))]
    rows = [line([_text(content) for content in row]) for row in grid.rows]
    table = [line(_names(grid)), line(rule), *rows]
    return "\n".join([f"**{grid.title}**", "", *table, *(f"\n{note}" for note in grid.notes), ""])


_LATEX = {"\\": r"\textbackslash{}", "▼": r"$\downarrow$", "▲": r"$\uparrow$", "~": r"\textasciitilde{}",
          "^": r"\textasciicircum{}", "≤": r"$\leq$", **{sign: f"${sign}$" for sign in "<>|"},
          **{sign: f"\\{sign}" for sign in "&%$#_{}"}}  # fmt: skip


def latex(grid: Grid) -> str:
    """A table environment; it needs \\usepackage{booktabs}."""
    heads, rules, at = [], [], 1
    for group, members in groupby(grid.columns, key=lambda column: column[0]):
        width = len(list(members))
        heads.append(rf"\multicolumn{{{width}}}{{c}}{{{_escaped(group)}}}" if group else " & ".join([""] * width))
        rules += [rf"\cmidrule(lr){{{at}-{at + width - 1}}}"] if group else []
        at += width
    names = " & ".join(_escaped(name) for _, name in grid.columns)
    body = [f"{' & '.join(_escaped(_text(content)) for content in row)} \\\\" for row in grid.rows]
    return "\n".join(
        [
            r"\begin{table}[t]",
            r"\centering",
            rf"\begin{{tabular}}{{{''.join('l' if _is_text(grid, k) else 'r' for k in range(len(grid.columns)))}}}",
            r"\toprule",
            *([f"{' & '.join(heads)} \\\\", " ".join(rules)] if rules else []),
            f"{names} \\\\",
            r"\midrule",
            *body,
            r"\bottomrule",
            r"\end{tabular}",
            rf"\caption{{{_escaped('. '.join([grid.title, *(note.rstrip('.') for note in grid.notes)]))}.}}",
            r"\end{table}",
            "",
        ]
    )


def _escaped(text: str) -> str:
    guard = "{}" if text[:1] in ("[", "*") else ""  # or it would be an argument of the line's end before it
    return guard + re.sub("|".join(map(re.escape, _LATEX)), lambda found: _LATEX[found[0]], text)


def comma_separated(grid: Grid) -> str:
    """One line a row; a figure with an interval or a change has columns of its own for them. No notes."""
    parts = [[name for name in PARTS if name == "" or _has(grid, k, name)] for k in range(len(grid.columns))]
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow([f"{name} {part}".strip() for k, name in enumerate(_names(grid)) for part in parts[k]])
    for row in grid.rows:
        writer.writerow([cell for k, content in enumerate(row) for cell in _values(content, parts[k])])
    return out.getvalue()


PARTS = {"": "value", "low": "low", "high": "high", "change": "change"}  # column's suffix -> field of Cell


def _has(grid: Grid, k: int, part: str) -> bool:
    return any(isinstance(cell := row[k], Cell) and getattr(cell, PARTS[part]) is not None for row in grid.rows)


def _values(content: Content, parts: Sequence[str]) -> Iterator[object]:
    for part in parts:
        value = (content if part == "" else None) if isinstance(content, str) else getattr(content, PARTS[part])
        yield "" if value is None else value


def terminal(grid: Grid) -> Table:
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=grid.title, caption=escape("\n".join(grid.notes)) or None, box=box.SIMPLE_HEAD, pad_edge=False)
    for k, (group, name) in enumerate(grid.columns):
        table.add_column(
            escape(f"{group}\n{name}" if group else name), justify="left" if _is_text(grid, k) else "right"
        )
    for row in grid.rows:
        table.add_row(*(escape(_text(content)) for content in row))
    return table


def _is_text(grid: Grid, k: int) -> bool:
    return bool(grid.rows) and all(isinstance(row[k], str) for row in grid.rows)


FORMS: dict[str, Callable[[Grid], str]] = {"markdown": markdown, "latex": latex, "csv": comma_separated}
