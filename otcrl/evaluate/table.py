"""`otcrl table`: runs side by side, as the papers print them, from what the runs left on disk."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from otcrl.errors import ConfigError, DataError
from otcrl.evaluate.compare import OVERALL, behaviour_grid, change, compared, training_grid
from otcrl.evaluate.grid import FORMS, NOTHING, Cell, Content, Grid, estimate, share
from otcrl.evaluate.metrics import Average, Summary
from otcrl.evaluate.options import TableOptions, parsed, write
from otcrl.evaluate.report import ALL, OFFLOADING, domains
from otcrl.evaluate.runs import Evaluated, evaluations, find, labels, parameters, steps

FIGURES = {"em": "EM", "tc": "TC", "tp": "TP"}
FALLS_OR_RISES = ("tc", "tp")  # told with their change against the baseline, as the paper does
EVERY = "all"

Runs = Mapping[str, Evaluated]  # label -> evaluation


def run(words: Sequence[str]) -> int:
    """The exit code of `otcrl table WORDS`."""
    paths, options = parsed("table", TableOptions, words)
    if not paths:
        raise ConfigError("otcrl table needs at least one run")
    found = [each for path in paths for each in chosen(path, options.eval)]
    baseline = None if options.baseline is None else find(options.baseline, _one(options.eval))
    named = dict(zip(labels(found), found, strict=True))
    text = FORMS[options.format](grid_of(named, baseline, options))
    if options.out is None:
        print(text, end="")
    else:
        write("out", options.out, text)
    return 0


def chosen(path: Path, name: str | None) -> list[Evaluated]:
    if name != EVERY:
        return [find(path, name)]
    return [find(path, each) for each in evaluations(path)] or [find(path)]


def _one(name: str | None) -> str | None:
    """The baseline is one evaluation, also where every one of the others is asked for."""
    return None if name == EVERY else name


def grid_of(found: Runs, baseline: Evaluated | None, options: TableOptions) -> Grid:
    if options.of == "results":
        return results(found, baseline, options.intervals)
    if options.of == "difficulty":
        return by_difficulty(found, options.intervals)
    if options.of == "offloading":
        return offloading(found, options.intervals)
    if options.of == "training":
        return costs(found, baseline, options)
    return behaviours(found, baseline, options)


# -- results ----------------------------------------------------------------------------------------------


def results(found: Runs, baseline: Evaluated | None, intervals: bool) -> Grid:
    """EM, TC and TP of each data set; their means over the sets in and out of domain, and over all of them."""
    counter = same_counter(found, baseline)
    sources = list(dict.fromkeys(name for each in found.values() for name in each.report.sources))
    inside = [name for name in sources if any(name in each.report.in_domain for each in found.values())]
    disputed = [
        name
        for name in inside
        if any(name in each.report.sources and name not in each.report.in_domain for each in found.values())
    ]
    groups = domains(sources, () if disputed else inside)
    alike = all(each.report.sources.keys() == set(sources) for each in found.values())
    blocks = [(name, name) for name in sources]  # (what it is called, what a report calls it)
    if alike:
        blocks = [(n, n) for members in groups.values() for n in members]
        blocks += [(f"{name}, mean", name) for name in dict.fromkeys([*groups, ALL]) if _has_average(found, name)]
        blocks += [(OVERALL, OVERALL)] if len(sources) > 1 else []
    is_alike = baseline is None or baseline.report.sources.keys() == set(sources)
    against = {name: baseline if is_alike or name in sources else None for _, name in blocks}  # means: of the same sets
    rows = [
        [label, *(cell for _, name in blocks for cell in _figures(each, against[name], name, intervals))]
        for label, each in found.items()
    ]
    said = [f"TC counts {counter} calls; TP is right answers / calls. Means give each data set the same weight"]
    said += [] if alike else ["No means: the runs were not evaluated on the same data sets"]
    said += [f"Not in-domain in all of the runs: {', '.join(disputed)}"] if disputed else []
    said += _sizes(found if baseline is None else {**found, baseline.label: baseline}, sources)
    said += [f"▼ ▲: against {baseline.label}"] if baseline else []
    said += ["No changes of means: the baseline was evaluated on other data sets"] if not is_alike else []
    return Grid(
        title="Results",
        columns=[("", "run"), *((title, name) for title, _ in blocks for name in FIGURES.values())],
        rows=rows,
        notes=said,
    )


def _has_average(found: Runs, name: str) -> bool:
    return any(name in each.report.averages for each in found.values())


def _block(each: Evaluated, name: str) -> Summary | Average | None:
    return each.report.overall if name == OVERALL else each.report.sources.get(name) or each.report.averages.get(name)


def _figures(each: Evaluated, baseline: Evaluated | None, name: str, intervals: bool) -> list[Content]:
    block = _block(each, name)
    before = _block(baseline, name) if baseline is not None and baseline.folder != each.folder else None
    if block is None:
        return [NOTHING] * len(FIGURES)
    cells: list[Content] = []
    for figure in FIGURES:
        value = getattr(block, figure)
        shown = before is not None and figure in FALLS_OR_RISES
        changed = change(getattr(before, figure).value, value.value) if shown else None
        cells.append(estimate(value, intervals, changed, missing="no calls" if figure == "tp" else NOTHING))
    return cells


def _sizes(found: Runs, sources: Sequence[str]) -> list[str]:
    """A note for each data set of which the runs were asked different numbers of questions."""
    said = []
    for name in sources:
        counts = {
            label: each.report.sources[name].questions for label, each in found.items() if name in each.report.sources
        }
        if len(set(counts.values())) > 1:
            said.append(f"Questions of {name} differ: {', '.join(f'{n} ({label})' for label, n in counts.items())}")
    return said


def same_counter(found: Runs, baseline: Evaluated | None = None) -> str:
    """Which calls all of the reports count. Raises DataError when they do not agree."""
    counters = {each.report.counter: label for label, each in found.items()}
    if baseline is not None:
        counters.setdefault(baseline.report.counter, baseline.label)
    if len(counters) > 1:
        told = ", ".join(f"{counter!r} ({label})" for counter, label in counters.items())
        raise DataError(f"the reports count different calls: {told}")
    return next(iter(counters))


def by_difficulty(found: Runs, intervals: bool) -> Grid:
    """EM and TC by data set and by how hard a question is."""
    counter = same_counter(found)
    levels = dict.fromkeys(
        (source, level) for each in found.values() for source, own in each.report.difficulty.items() for level in own
    )
    if not levels:
        raise DataError(
            "no report says how hard a question is: evaluate with evaluate.difficulty=COLUMN, one of the data's rows"
        )
    rows: list[list[Content]] = []
    for source, level in levels:
        own = [each.report.difficulty.get(source, {}).get(level) for each in found.values()]
        counts = dict.fromkeys(str(summary.questions) for summary in own if summary)
        cells = [
            estimate(getattr(summary, name), intervals) if summary else NOTHING
            for summary in own
            for name in ("em", "tc")
        ]
        rows.append([source, level, "/".join(counts), *cells])
    heads = [("", "data set"), ("", "difficulty"), ("", "n")]
    return Grid(
        title="By difficulty",
        columns=[*heads, *((label, name) for label in found for name in ("EM", "TC"))],
        rows=rows,
        notes=[f"TC counts {counter} calls"],
    )


# -- offloading -------------------------------------------------------------------------------------------


def offloading(found: Runs, intervals: bool) -> Grid:
    """Cognitive offloading by model size and training step: smallest model first, then in the order of training."""
    measured = {label: each for label, each in found.items() if each.report.offloading is not None}
    if not measured:
        raise DataError("none of the evaluations was made with evaluate.offloading=true: make some with otcrl eval")
    counter = same_counter(measured)
    sizes = {label: parameters(each) for label, each in measured.items()}
    after = {label: each.step for label, each in measured.items()}
    order = sorted(measured, key=lambda label: (sizes[label] or 0, str(measured[label].run), after[label] or 0))
    return Grid(
        title="Cognitive offloading, % of questions",
        columns=[("", name) for name in ("run", "parameters", "steps", "EM", "TC", *OFFLOADING.values())],
        rows=[_offloading_row(label, measured[label], sizes[label], after[label], intervals) for label in order],
        notes=[
            f"TC counts {counter} calls",
            f"{len(found) - len(measured)} evaluations without these passes are left out",
        ]
        if len(measured) < len(found)
        else [f"TC counts {counter} calls"],
    )


def _offloading_row(label: str, each: Evaluated, size: int | None, step: int | None, intervals: bool) -> list[Content]:
    passes = each.report.offloading
    assert passes is not None, "those without are left out"
    return [
        label,
        Cell(size, digits=0),
        Cell(step, digits=0),
        *(estimate(getattr(each.report.overall, name), intervals) for name in ("em", "tc")),
        *(share(getattr(passes, name), intervals) for name in OFFLOADING),
    ]


# -- against a baseline -------------------------------------------------------------------------------------


def costs(found: Runs, baseline: Evaluated | None, options: TableOptions) -> Grid:
    """What training cost, one row a run, the baseline (or the first run) first."""
    everything = [*([baseline] if baseline is not None else []), *found.values()]
    once = list({each.run: each for each in everything}.values())
    rows = {label: steps(each.run) for label, each in zip(labels(once), once, strict=True)}
    for label, own in rows.items():
        if not own:
            raise DataError(f"{label} was not trained: there are no steps in its metrics.jsonl")
    return training_grid(rows, options)


def behaviours(found: Runs, baseline: Evaluated | None, options: TableOptions) -> Grid:
    if baseline is None:
        raise ConfigError("of=behaviour is told against a baseline: add baseline=RUN")
    others = {label: each for label, each in found.items() if each.folder != baseline.folder}
    if not others:
        raise ConfigError("of=behaviour: there is no run beside the baseline")
    told = {label: compared(baseline, each, options) for label, each in others.items()}
    return behaviour_grid(told, baseline.label, options.intervals)
