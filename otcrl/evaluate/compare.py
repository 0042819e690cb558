"""`otcrl compare`: what a run does otherwise than a baseline run, with tests; and what its training cost beside it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

from otcrl.errors import ConfigError, DataError
from otcrl.evaluate.attempts import read_attempts
from otcrl.evaluate.grid import Cell, Content, Grid, share, terminal
from otcrl.evaluate.options import Common, CompareOptions, parsed, write
from otcrl.evaluate.paired import Comparison, Difference, Pair, compare, pairs
from otcrl.evaluate.runs import Evaluated, changed_settings, find, labels, steps
from otcrl.evaluate.training import FIGURES, PER_STEP, Reached, em_curve, time_to, training
from otcrl.types import Metrics

OVERALL = "overall"
NAMES = {"em": "EM", "tc": "TC", "tp": "TP", "sampled_tokens": "tokens"}  # of those that are COMPARED
SHARES = {  # as arXiv:2504.14870 v2 abbreviates them
    "more_efficient": "ME",
    "less_efficient": "LE",
    "more_accurate": "MA",
    "less_accurate": "LA",
    "accurate_fewer": "AE",
    "unchanged": "same",
}
LEGEND = (
    "ME, LE: the same result with fewer, with more calls. MA: right where the baseline is wrong, LA: the reverse. "
    "AE: right with fewer calls where the baseline is wrong"
)


@dataclass(frozen=True, kw_only=True)
class Compared:
    """A run against a baseline run."""

    sets: Mapping[str, Comparison]  # data set, and OVERALL where there are several
    counter: str
    left_out: int  # questions that only one of the runs answered


def run(words: Sequence[str]) -> int:
    """The exit code of `otcrl compare WORDS`."""
    from rich import get_console

    paths, options = parsed("compare", CompareOptions, words)
    if len(paths) != 2:
        raise ConfigError(f"otcrl compare needs two runs, the baseline first; got {len(paths)}")
    baseline, other = (find(path, options.eval) for path in paths)
    first, second = labels([baseline, other])
    found = compared(baseline, other, options)
    console = get_console()
    console.print(f"[bold]{second}[/] against [bold]{first}[/], the baseline", highlight=False)
    for what, each in (("baseline", baseline), ("run", other)):
        console.print(f"  {what}: {each.folder}", highlight=False, soft_wrap=True)
    temperatures = [each.report.temperature for each in (baseline, other)]
    if len(set(temperatures)) > 1:
        console.print(f"  [red]temperatures differ:[/] {temperatures[0]} and {temperatures[1]}", highlight=False)
    console.print(terminal(figures_grid(found, second)))
    console.print(terminal(behaviour_grid({second: found}, first)))
    rows = {first: steps(baseline.run), second: steps(other.run)}
    if baseline.run != other.run and all(rows.values()):
        console.print(terminal(training_grid(rows, options)))
    changed = changed_settings(baseline.config, other.config)
    console.print("Settings that differ, baseline | run:" if changed else "No settings differ.", highlight=False)
    for key, one, another in changed:
        console.print(f"  {key}: {one} | {another}", highlight=False, markup=False, soft_wrap=True)
    if options.json is not None:
        write("json", options.json, numbers(baseline, other, found, rows, options))
    return 0


def compared(baseline: Evaluated, other: Evaluated, options: Common) -> Compared:
    """Raises DataError when the runs did not answer the same questions, or do not count the same calls."""
    counters = {each.report.counter for each in (baseline, other)}
    if options.counter is None and len(counters) > 1:
        raise DataError(f"the reports count different calls, {' and '.join(sorted(counters))}: add counter=...")
    counter = options.counter or baseline.report.counter
    first, second = read_attempts(baseline.folder), read_attempts(other.folder)
    chosen = pairs(first, second, options.common)
    by_source: dict[str, list[Pair]] = {}
    for pair in chosen:
        by_source.setdefault(pair[0][0].source, []).append(pair)
    sets = {name: compare(own, counter, options.seed) for name, own in by_source.items()}
    overall = {OVERALL: compare(chosen, counter, options.seed)} if len(sets) > 1 else {}
    left_out = len(first) + len(second) - sum(len(a) + len(b) for a, b in chosen)
    return Compared(sets=sets | overall, counter=counter, left_out=left_out)


def notes(found: Mapping[str, Compared]) -> list[str]:
    """What was left out of a comparison, and which calls count."""
    said = [f"Calls that count: {', '.join(dict.fromkeys(each.counter for each in found.values()))}"]
    for name, each in found.items():
        whole = each.sets.get(OVERALL) or next(iter(each.sets.values()))
        of = f" of {name}" if len(found) > 1 else ""
        if whole.attempts > 2 * whole.questions:
            said.append(f"{whole.attempts} attempts at {whole.questions} questions{of}: figures are means over a "
                        "question's attempts, shares are of their pairs, tests are of questions")  # fmt: skip
        if each.left_out:
            said.append(f"Only on the {whole.questions + whole.void} questions{of} that both runs answered; "
                        f"{each.left_out} answers to others are left out")  # fmt: skip
        if whole.void:
            said.append(f"{whole.void} questions{of} are left out: infrastructure spoilt an answer")
    return said


# -- grids ------------------------------------------------------------------------------------------------


def figures_grid(found: Compared, label: str) -> Grid:
    rows: list[list[Content]] = [
        [name, title, *_difference(comparison.figures[figure])]
        for name, comparison in found.sets.items()
        for figure, title in NAMES.items()
    ]
    columns = ("data set", "figure", "baseline", "run", "change", "from", "to", "p")
    return Grid(
        title="Figures",
        columns=[("", name) for name in columns],
        rows=rows,
        notes=[
            *notes({label: found}),
            "Tokens: of the response. From, to: 95 % interval of the change. p: paired bootstrap over questions",
        ],
    )


def _difference(found: Difference) -> list[Content]:
    figures = (found.baseline, found.run, found.change.value, found.change.low, found.change.high)
    return [*(Cell(value) for value in figures), _p(found.p)]


def _p(value: float | None) -> Cell:
    return Cell(value, least=0.001)


def behaviour_grid(found: Mapping[str, Compared], baseline: str, intervals: bool = False) -> Grid:
    """arXiv:2504.14870 v2, Table 3: per cent of the questions."""
    rows: list[list[Content]] = []
    for label, each in found.items():
        for name, comparison in each.sets.items():
            behaviour = comparison.behaviour
            shares = [share(getattr(behaviour, key), intervals) for key in SHARES]
            tests = [_p(behaviour.p_efficient), _p(behaviour.p_accurate)]
            rows.append([label, name, Cell(comparison.questions, digits=0), *shares, *tests])
    columns = ["run", "data set", "n", *SHARES.values(), "p of ME, LE", "p of MA, LA"]
    return _without_one_run(
        Grid(
            title=f"Behaviour against {baseline}, % of questions",
            columns=[("", name) for name in columns],
            rows=rows,
            notes=[*notes(found), LEGEND, "p: exact sign test of ME against LE, McNemar's exact test of MA against LA"],
        )
    )


def _without_one_run(grid: Grid) -> Grid:
    """The column that says which run is meant, gone where there is but one."""
    if len({row[0] for row in grid.rows}) > 1:
        return grid
    return Grid(title=grid.title, columns=grid.columns[1:], rows=[row[1:] for row in grid.rows], notes=grid.notes)


def training_grid(rows: Mapping[str, Sequence[Metrics]], options: Common) -> Grid:
    """What training cost each run, the first being the one that the others are compared with."""
    found = {label: training(own, options.window) for label, own in rows.items()}
    em = target(list(rows.values()), options)
    reached = [None if em is None else time_to(own, em, options.window) for own in rows.values()]
    never = "not reached" if em is not None else "not logged"
    to = f"to EM {em:.3f}" if em is not None else "to an EM"
    lines: list[list[Content]] = [
        ["steps", *(Cell(each.steps, digits=0) for each in found.values())],
        ["EM at the end", *(Cell(each.em) for each in found.values())],
    ]
    costs = [(what, [each.per_step[name] for each in found.values()]) for name, what in PER_STEP.items()]
    costs += [(what, [each.means[name] for each in found.values()]) for name, what in FIGURES.items()]
    costs.append(("seconds of all steps", [each.seconds for each in found.values()]))
    for what, (first, *rest) in costs:
        lines.append([what, Cell(first), *(Cell(value, change=change(first, value)) for value in rest)])
    lines.append([f"steps {to}", *(_when(at, Cell(at.step, digits=0)) if at else never for at in reached)])
    lines.append([f"seconds {to}", *(_when(at, Cell(at.seconds)) if at else never for at in reached)])
    return Grid(
        title="Training",
        columns=[("", "figure"), *(("", label) for label in found)],
        rows=lines,
        notes=[
            f"Means over all steps. EM: right answers among the samples of {options.window} steps; ≤: the first had it."
            " Seconds: of the steps alone, on the machine that each run had",
        ],
    )


def _when(at: Reached, cell: Cell) -> Content:
    return f"≤{cell.text()}" if at.at_most else cell


def target(runs: Sequence[Sequence[Metrics]], options: Common) -> float | None:
    """The EM whose time is asked for: `em=`, or the highest that each of the runs has reached."""
    if options.em is not None:
        return options.em
    curves = [em_curve(rows, options.window) for rows in runs]
    return min(max(curve) for curve in curves) if curves and all(curves) else None


def change(baseline: float | None, value: float | None) -> float | None:
    """What has changed, as a share of the baseline's figure; None where that is no number."""
    return (value - baseline) / baseline if value is not None and baseline else None


# -- JSON -------------------------------------------------------------------------------------------------


def numbers(
    baseline: Evaluated,
    other: Evaluated,
    found: Compared,
    rows: Mapping[str, Sequence[Metrics]],
    options: CompareOptions,
) -> str:
    """Every figure of the comparison as JSON; undefined ones are null."""
    em = target([own for own in rows.values() if own], options)
    costs = {
        label: asdict(training(own, options.window))
        | {"to_em": None if em is None or (at := time_to(own, em, options.window)) is None else asdict(at)}
        for label, own in rows.items()
        if own
    }
    said = {
        "baseline": str(baseline.folder),
        "run": str(other.folder),
        "counter": found.counter,
        "left_out": found.left_out,
        "sets": {name: asdict(each) for name, each in found.sets.items()},
        "training": {"em": em, "window": options.window, "runs": costs},
        "settings": [list(each) for each in changed_settings(baseline.config, other.config)],
    }
    return json.dumps(said, indent=2, allow_nan=False, default=str) + "\n"
