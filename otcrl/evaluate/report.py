"""An evaluation as a table for people and as JSON for programs."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from otcrl import sealed
from otcrl.errors import DataError
from otcrl.evaluate.attempts import Attempt, Correct, attempt, difficulty
from otcrl.evaluate.metrics import Average, Estimate, Summary, average, figures
from otcrl.evaluate.offloading import Offloading
from otcrl.types import Metrics, Trajectory

if TYPE_CHECKING:
    from rich.table import Table

FILE = "report.json"
TABLES = {  # title -> its columns, as many as fit a terminal
    "Evaluation": {"em": "EM", "f1": "F1", "tc": "TC", "tp": "TP"},
    "Against the fewest calls that suffice": {"optimum": "best TC", "over_call": "too many", "under_call": "too few"},
    "Calls and tokens per attempt": {
        "emitted": "emitted", "executed": "executed", "failed": "failed", "invalid": "invalid",
        "sampled_tokens": "sampled", "total_tokens": "all tokens",
    },
}  # fmt: skip
OFFLOADING = {
    "right_closed": "right with tools off",
    "over_call": "called all the same, of those",
    "wrong_without_call": "wrong, and no call made",
    "under_call": "a call would have helped, of those",
    "under_call_of_all": "a call would have helped, of all",
}
WITH_INTERVAL = ("em", "f1", "tc", "tp")
AVERAGED = {"em": "EM", "f1": "F1", "tc": "TC", "tp": "TP"}
IN_DOMAIN, OUT_OF_DOMAIN, ALL = "in-domain", "out-of-domain", "all sets"
COMPARED = {"em": "EM", "tc": "TC", "tp": "TP"}
LOGGED = {"em": "accuracy", "f1": "f1", "tc": "tool_calls", "tp": "tool_productivity", "over_call": "over_call",
          "under_call": "under_call", "sampled_tokens": "sampled_tokens"}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Report:
    overall: Summary
    sources: Mapping[str, Summary] = field(default_factory=dict)  # data set -> its figures
    counter: str  # which calls TC and TP count: a key of types.COUNTERS
    offloading: Offloading | None = None  # None: the passes were not run
    temperature: float | None = None  # of sampling; 0: greedy. None: not told
    in_domain: tuple[str, ...] = ()  # data sets; the others are out of domain. (): no such distinction is made
    averages: Mapping[str, Average] = field(default_factory=dict)  # IN_DOMAIN, OUT_OF_DOMAIN, ALL -> over their sets
    difficulty: Mapping[str, Mapping[str, Summary]] = field(default_factory=dict)  # data set -> how hard -> figures

    def tables(self) -> list[Table]:
        """Every figure by data set and overall, for a terminal; a table of which nothing is known is left out."""
        tables = [
            self._by_data_set(title, columns)
            for title, columns in TABLES.items()
            if any(_estimate(self.overall, name).value is not None for name in columns)
        ]
        if tables:
            tables[0].caption = (
                f"95 % bootstrap intervals over n questions (report.json has them all)\n"
                f"calls: {self.counter}; attempts: {self.overall.attempts}; void trajectories: {self.overall.void}"
            )
        if any(len(levels) > 1 for levels in self.difficulty.values()):
            tables.append(self._by_difficulty())
        return tables + ([self._offloading()] if self.offloading is not None else [])

    def _by_data_set(self, title: str, columns: Mapping[str, str]) -> Table:
        from rich import box
        from rich.table import Table

        table = Table(title=title, box=box.SIMPLE_HEAD, pad_edge=False)
        table.add_column("data set", no_wrap=True)
        table.add_column("n", justify="right")
        for name, label in columns.items():
            table.add_column(label, justify="right", no_wrap=name in WITH_INTERVAL)
        averages = self.averages if columns.keys() <= AVERAGED.keys() else {}
        for domain, members in self.domains().items():
            for source in members:
                summary = self.sources[source]
                cells = (_cell(name, _estimate(summary, name)) for name in columns)
                table.add_row(source, str(summary.questions), *cells)
            if found := averages.get(domain):
                table.add_row(f"[i]{domain}, mean[/]", "", *(_cell(name, getattr(found, name)) for name in columns))
        if self.in_domain and (found := averages.get(ALL)):
            table.add_row(f"[i]{ALL}, mean[/]", "", *(_cell(name, getattr(found, name)) for name in columns))
        cells = (_cell(name, _estimate(self.overall, name)) for name in columns)
        table.add_row("overall", str(self.overall.questions), *cells)
        return table

    def domains(self) -> dict[str, list[str]]:
        """IN_DOMAIN and OUT_OF_DOMAIN -> data sets; ALL -> all of them where no such distinction is made."""
        return domains(list(self.sources), self.in_domain)

    def _by_difficulty(self) -> Table:
        from rich import box
        from rich.table import Table

        table = Table("data set", "difficulty", title="By difficulty", box=box.SIMPLE_HEAD, pad_edge=False)
        for name in ("n", *COMPARED.values()):
            table.add_column(name, justify="right")
        for source, levels in self.difficulty.items():
            for level, summary in levels.items():
                cells = (_figure(name, _estimate(summary, name).value) for name in COMPARED)
                table.add_row(source, level, str(summary.questions), *cells)
        return table

    def _offloading(self) -> Table:
        from rich.table import Table

        assert self.offloading is not None
        table = Table("questions", title="Cognitive offloading", caption=f"void trajectories: {self.offloading.void}")
        table.add_column("share", justify="right")
        for name, label in OFFLOADING.items():
            table.add_row(label, _with_interval(getattr(self.offloading, name)))
        return table

    def metrics(self) -> Metrics:
        """`eval/nq/accuracy` and so on, for loggers; a figure that is undefined is absent."""
        rows = [("", self.overall), *((f"{source}/", summary) for source, summary in self.sources.items())]
        named = {
            f"eval/{source}{label}": _estimate(summary, name).value
            for source, summary in rows
            for name, label in LOGGED.items()
        }
        for domain, found in self.averages.items():
            for name in AVERAGED:
                named[f"eval/{re.sub(r'[- ]', '_', domain)}/{LOGGED[name]}"] = getattr(found, name).value
        return {name: value for name, value in named.items() if value is not None}

    def to_json(self) -> dict[str, object]:
        """The whole report in JSON types; undefined figures are null, and nothing is nan or infinite."""
        return asdict(self)

    @staticmethod
    def from_json(data: Mapping[str, object]) -> Report:
        """The report that `to_json` wrote. Raises DataError when the data are not one."""
        try:
            return _report(data)
        except (TypeError, KeyError, AttributeError) as error:
            raise DataError(f"not an evaluation report of this version of otcrl: {error}") from error

    def save(self, folder: Path | str) -> Path:
        """Write `report.json` in the folder, which is made if need be; the file's path.

        An earlier one is there until this one is whole.
        """
        path = Path(folder) / FILE
        path.parent.mkdir(parents=True, exist_ok=True)
        sealed.write_whole(path, json.dumps(self.to_json(), indent=2, allow_nan=False) + "\n")
        return path

    @staticmethod
    def load(folder: Path | str) -> Report:
        """The report saved in a folder. Raises DataError when there is none."""
        path = Path(folder) / FILE
        if not path.is_file():
            raise DataError(f"there is no evaluation in {folder}: it holds no {FILE}")
        try:
            return Report.from_json(json.loads(path.read_text(encoding="utf-8")))
        except ValueError as error:  # bad JSON, or JSON that is no report
            raise DataError(f"{path} cannot be read: {error}. Evaluate again, or remove it") from error


def make_report(
    trajectories: Sequence[Trajectory],
    correct: Correct,
    counter: str = "well_formed",
    offloading: Offloading | None = None,
    seed: int = 0,
    *,
    temperature: float | None = None,
    in_domain: Sequence[str] = (),
    difficulty_column: str | None = None,
) -> Report:
    """The report of one evaluation's trajectories; `difficulty_column`: see `attempts.difficulty`."""
    sources: dict[str, list[Attempt]] = {}
    levels: dict[str, dict[str, list[Attempt]]] = {}
    for t in trajectories:
        made, source, level = attempt(t, correct), t.problem.source, difficulty(t.problem, difficulty_column)
        sources.setdefault(source, []).append(made)
        if level is not None:
            levels.setdefault(source, {}).setdefault(level, []).append(made)
    groups = domains(list(sources), in_domain) | {ALL: list(sources)}
    return Report(
        overall=figures([a for own in sources.values() for a in own], counter, seed),
        sources={name: figures(own, counter, seed) for name, own in sources.items()},
        counter=counter,
        offloading=offloading,
        temperature=temperature,
        in_domain=tuple(name for name in sources if name in in_domain),
        averages={
            domain: average([sources[name] for name in members], counter, seed)
            for domain, members in groups.items()
            if len(members) > 1
        },
        difficulty={
            name: {level: figures(own[level], counter, seed) for level in sorted(own, key=_place)}
            for name, own in levels.items()
        },
    )


def domains(sources: Sequence[str], in_domain: Sequence[str]) -> dict[str, list[str]]:
    """See `Report.domains`."""
    if not any(name in in_domain for name in sources):
        return {ALL: list(sources)}
    inside, outside = (
        [name for name in sources if name in in_domain],
        [name for name in sources if name not in in_domain],
    )
    return {IN_DOMAIN: inside} | ({OUT_OF_DOMAIN: outside} if outside else {})


def _place(level: str) -> tuple[bool, float, str]:
    """Levels that are numbers in their order, then the others."""
    head = level.split()[0] if level.split() else ""
    is_number = head.replace(".", "", 1).isdigit()
    return not is_number, float(head) if is_number else 0.0, level


def before_after_table(before: Report, after: Report) -> Table:
    """EM, TC and TP of both reports with what changed, and the optimum TC where it is known.

    Raises DataError when the reports cannot be compared: other calls counted, or no data set in common.
    """
    from rich.table import Table

    if before.counter != after.counter:
        raise DataError(f"the reports count different calls: {before.counter!r} before, {after.counter!r} after")
    if not before.sources.keys() & after.sources.keys():
        raise DataError(f"the reports share no data set: {list(before.sources)} before, {list(after.sources)} after")
    table = Table("data set", "figure", title="Before and after", caption=f"calls that count: {after.counter}")
    for column in ("before", "after", "change", "change %", "best TC"):
        table.add_column(column, justify="right")
    for source, old, new in _pairs(before, after):
        for name, label in COMPARED.items():
            first, then = _estimate(old, name).value, _estimate(new, name).value
            optimum = _figure(name, new.optimum.value) if name == "tc" else ""
            table.add_row(
                source if name == "em" else "", label, _figure(name, first), _figure(name, then),
                *_change(first, then), optimum, end_section=name == "tp",
            )  # fmt: skip
    return table


def _pairs(before: Report, after: Report) -> Iterator[tuple[str, Summary, Summary]]:
    """Data sets that are in both reports, then overall when they hold the same data sets."""
    for source, new in after.sources.items():
        if source in before.sources:
            yield source, before.sources[source], new
    if set(before.sources) == set(after.sources):
        yield "overall", before.overall, after.overall


def _change(before: float | None, after: float | None) -> tuple[str, str]:
    if before is None or after is None:
        return "", ""
    return f"{after - before:+.3f}", f"{(after - before) / before:+.1%}" if before else ""


def _estimate(summary: Summary, name: str) -> Estimate:
    return getattr(summary, name)


def _figure(name: str, value: float | None) -> str:
    return ("no calls" if name == "tp" else "") if value is None else _text(value)


def _text(value: float, digits: int = 3) -> str:
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.{digits}f}"


def _cell(name: str, estimate: Estimate) -> str:
    if estimate.value is None:
        return _figure(name, None)
    return _with_interval(estimate) if name in WITH_INTERVAL else _text(estimate.value, 2)


def _with_interval(estimate: Estimate) -> str:
    """The figure, and its interval on a line of its own."""
    if estimate.value is None or estimate.low is None or estimate.high is None:
        return ""
    return f"{_text(estimate.value)}\n[dim]{_text(estimate.low, 2)}-{_text(estimate.high, 2)}[/]"


# -- from JSON ---------------------------------------------------------------------------------------


def _report(data: Mapping) -> Report:
    offloading = data["offloading"]
    return Report(
        overall=Summary(**_estimates(data["overall"])),
        sources={name: Summary(**_estimates(summary)) for name, summary in data["sources"].items()},
        counter=data["counter"],
        offloading=None if offloading is None else Offloading(**_estimates(offloading)),
        temperature=data.get("temperature"),
        in_domain=tuple(data.get("in_domain", ())),
        averages={domain: Average(**_estimates(found)) for domain, found in data.get("averages", {}).items()},
        difficulty={
            name: {level: Summary(**_estimates(summary)) for level, summary in levels.items()}
            for name, levels in data.get("difficulty", {}).items()
        },
    )


def _estimates(data: Mapping) -> dict:
    return {name: Estimate(**value) if isinstance(value, Mapping) else value for name, value in data.items()}
