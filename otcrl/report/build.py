"""From runs to the data of the page: figures of everything, and the trajectories that are shown."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from otcrl.report import measure
from otcrl.report.attempts import TRAIN, Attempt, fewest_calls
from otcrl.report.files import Row, RunFiles
from otcrl.report.segments import segments
from otcrl.secrets import public
from otcrl.settings import leaves

KINDS = ("reasoning", "call", "observation", "answer")
PER_TOKEN = ("logprobs", "versions", "advantages", "ratios")
DIGITS = 6  # of a figure, significant ones


@dataclass(frozen=True, kw_only=True)
class Content:
    """What a page shows, in JSON types."""

    runs: list[dict[str, Any]]
    differences: list[list[Any]]  # [setting, its value in each run] of the settings that differ
    questions: list[list[Any]]  # [id, source, text, answers]
    columns: dict[str, list[Any]]  # of the trajectories that are shown: name -> one entry for each
    details: list[dict[str, Any]]  # of the same trajectories, in the same order
    left_out: int  # trajectories


def content(runs: Sequence[RunFiles], most: int) -> Content:
    """`most`: trajectories that are shown; the figures are of all of them."""
    shown = chosen([[*run.attempts] for run in runs], most)
    places: dict[str, int] = {}
    questions: list[list[Any]] = []
    columns: dict[str, list[Any]] = {name: [] for name in COLUMNS}
    details = []
    for number, own in enumerate(shown):
        splits = dict.fromkeys(a.split for a in runs[number].attempts)  # training, then evaluations as they were made
        for a in sorted(own, key=lambda a, splits=[*splits]: (splits.index(a.split), a.step, str(a.siblings[2]))):
            if a.id not in places:
                places[a.id] = len(questions)
                questions.append([a.id, a.source, a.question, [*a.answers]])
            for name, value in entry(a, number, places[a.id]).items():
                columns[name].append(value)
            details.append(detail(a))
    return Content(
        runs=[figures(run) for run in runs],
        differences=differences([run.config for run in runs]),
        questions=questions,
        columns=columns,
        details=details,
        left_out=sum(len(run.attempts) for run in runs) - len(details),
    )


def chosen(attempts_R: Sequence[Sequence[Attempt]], most: int) -> list[list[Attempt]]:
    """Of each run, every attempt at as many questions as `most` allows: the same questions in all runs and steps.

    So groups stay whole, and a question can be compared over runs and steps.
    """
    sizes = Counter(a.id for own in attempts_R for a in own)
    kept: set[str] = set()
    total = 0
    for name in sorted(sizes, key=lambda name: hashlib.blake2b(name.encode(errors="surrogatepass")).digest()):
        if total + sizes[name] <= most:
            kept.add(name)
            total += sizes[name]
    return [[a for a in own if a.id in kept] for own in attempts_R]


# -- trajectories ----------------------------------------------------------------------------------


def entry(a: Attempt, run: int, question: int) -> dict[str, Any]:
    """What trajectories are listed, filtered and sorted by."""
    return {
        "run": run,
        "split": a.split,
        "step": a.step,
        "group": a.siblings[2],
        "question": question,
        "right": int(a.right),
        "reward": rounded(a.reward),
        "calls": a.count,
        "sampled": a.tokens.get("sampled"),
        "stop": a.stop,
    }


COLUMNS = ("run", "split", "step", "group", "question", "right", "reward", "calls", "sampled", "stop")


def detail(a: Attempt) -> dict[str, Any]:
    """What is shown of a trajectory when it is opened."""
    found = segments(a)
    placed = {k for s in found if s.kind == "observation" for k in s.calls}
    return {
        "segments": [[KINDS.index(s.kind), [*s.calls], [*s.pieces]] for s in found],
        "calls": [told(call, is_shown=k in placed) for k, call in enumerate(a.calls)],
        "answer": a.answer,
        "violations": [*a.violations],
        "parts": {name: rounded(value) for name, value in a.parts.items()},
        "timings": {name: rounded(value) for name, value in a.timings.items()},
        "prompt": a.tokens.get("prompt"),
        "total": a.tokens.get("total"),
        **{name: a.tokens[name] for name in PER_TOKEN if name in a.tokens},
    }


def told(call: Mapping[str, Any], is_shown: bool) -> list[Any]:
    """[tool, outcome, seconds, cached, price, result]; a result that stands in the text is not told again."""
    result = "" if is_shown else call["result"]
    return [call["tool"], call["outcome"], rounded(call["seconds"]), call["cached"], call["price"], result]


# -- figures ---------------------------------------------------------------------------------------


def figures(run: RunFiles) -> dict[str, Any]:
    training = [a for a in run.attempts if a.split == TRAIN]
    n = fewest_calls(training, run.least)
    return {
        "name": run.name,
        "about": about(run.config),
        "config": yaml.safe_dump(public(run.config), sort_keys=False, allow_unicode=True) if run.config else "",
        "steps": (run.config.get("loop") or {}).get("steps"),
        "metrics": series(run.rows),
        "evaluations": [{"name": name, **report.to_json()} for name, report in run.evaluations.items()],
        "splits": dict(Counter(a.split for a in run.attempts)),
        "calls": rounded(measure.calls(training, n)),
        "questions": rounded(measure.questions(training, n)),
        "offloading": rounded(measure.offloading(training, n)),
        "tools": rounded(measure.tools(training or run.attempts)),
    }


def about(config: Mapping[str, Any]) -> dict[str, str]:
    """The choices that a run is known by, as words."""
    words = {}
    for name in ("task", "model", "algo", "reward", "dialect", "engine"):
        section = config.get(name)
        if isinstance(section, Mapping) and "_target_" in section:
            words[name] = str(section["_target_"]).rpartition(".")[2]
            if detail := section.get("path") or section.get("form") or section.get("url"):
                words[name] += f" {detail}"
    if "seed" in config:
        words["seed"] = str(config["seed"])
    return words


def differences(configs: Sequence[Mapping[str, Any]]) -> list[list[Any]]:
    settings_R = [{name: str(value) for name, value in leaves(public(config))} for config in configs]
    names = dict.fromkeys(name for settings in settings_R for name in settings)
    rows = [[name, *(settings.get(name) for settings in settings_R)] for name in names]
    return [row for row in rows if len(set(row[1:])) > 1]


def series(rows: Sequence[Row]) -> dict[str, list[Any]]:
    """Metric -> its value at each row; the step is among them."""
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: [rounded(row.get(name)) for row in rows] for name in names}


def rounded(value: Any) -> Any:
    """The same with floats cut to DIGITS significant digits, and null for what is no finite number."""
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}") if value - value == 0 else None
    if isinstance(value, Mapping):
        return {key: rounded(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [rounded(each) for each in value]
    return value
