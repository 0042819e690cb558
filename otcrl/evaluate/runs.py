"""What a run left on disk, for those who compare runs: its evaluations, its settings, its steps, its size.

    RUN/config.yaml  metrics.jsonl  model/
    RUN/eval/NAME/report.json  transcripts.jsonl  (config.yaml, where `otcrl eval` made it)

A NAME is before, after and sampled_after of training; greedy and sampled of `otcrl eval`; and those inside another
folder (step-000020/greedy) when it was given `step=` or `as=`.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from otcrl.errors import DataError, nearest
from otcrl.evaluate.report import FILE, Report
from otcrl.loggers.jsonl import whole_lines
from otcrl.settings import leaves
from otcrl.types import Metrics

EVAL = "eval"
USUAL = ("after", "greedy")  # of several evaluations, the one that is meant: the trained model, temperature 0
STEP = re.compile(r"step-(\d+)")


@dataclass(frozen=True, kw_only=True)
class Evaluated:
    """One evaluation of one run."""

    run: Path
    name: str  # under RUN/eval; "" for an evaluation that lies elsewhere
    folder: Path
    report: Report

    @property
    def config(self) -> Mapping[str, Any]:
        """What was evaluated, as far as it was written down."""
        return read_config(self.folder) or read_config(self.run)

    @property
    def label(self) -> str:
        return str(self.config.get("name") or self.run.name)

    @property
    def step(self) -> int | None:
        """Training steps that the model had behind it; None where nothing says it."""
        if found := STEP.search(self.name):
            return int(found[1])
        if (asked := read_config(self.folder).get("step")) is not None:  # of `otcrl eval step=N as=NAME`
            return int(asked)
        if self.name.endswith("before"):
            return 0
        rows = steps(self.run)
        return len(rows) or None


def find(path: Path | str, name: str | None = None) -> Evaluated:
    """The evaluation `name` of a run; without a name the usual one, or the only one. `path` may be its own folder.

    Raises DataError where there is none, or several and nothing says which.
    """
    path = Path(path)
    if (path / FILE).is_file():
        return _of_folder(path)
    names = evaluations(path)
    if not names:
        raise DataError(f"{path} holds no evaluation (eval/NAME/{FILE}): make one with otcrl eval run={path}")
    if name is None:
        name = next((usual for usual in USUAL if usual in names), names[0] if len(names) == 1 else None)
    if name is None:
        raise DataError(f"{path} holds several evaluations: add eval=NAME.{nearest('', names)}")
    if name not in names:
        raise DataError(f"{path} holds no evaluation {name!r}.{nearest(name, names)}")
    return Evaluated(run=path, name=name, folder=path / EVAL / name, report=Report.load(path / EVAL / name))


def evaluations(run: Path) -> list[str]:
    """The names of a run's evaluations, in the order of training."""
    root = run / EVAL
    return sorted((str(file.parent.relative_to(root)) for file in root.rglob(FILE)), key=_place)


def labels(found: Sequence[Evaluated]) -> list[str]:
    """What to call each of them: the run's name, with as much beside it as it takes to tell them apart."""
    names = [each.label for each in found]
    for more in (lambda each: f"{each.label}, {each.name or each.folder}", lambda each: str(each.folder)):
        if len(set(names)) == len(names):
            break
        times = Counter(names)
        names = [name if times[name] == 1 else more(each) for name, each in zip(names, found, strict=True)]
    return names


def _place(name: str) -> tuple[float, str]:
    step = STEP.search(name)
    return (-1 if name == "before" else int(step[1]) if step else math.inf), name


def _of_folder(folder: Path) -> Evaluated:
    inside = [parent for parent in folder.parents if parent.name == EVAL]
    run, name = (inside[0].parent, str(folder.relative_to(inside[0]))) if inside else (folder, "")
    return Evaluated(run=run, name=name, folder=folder, report=Report.load(folder))


def read_config(folder: Path) -> dict[str, Any]:
    """config.yaml as plain values; {} where there is none."""
    path = folder / "config.yaml"
    if not path.is_file():
        return {}
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise DataError(f"{path} is not a config: {error}") from error
    return found if isinstance(found, dict) else {}


NAMES = ("name", "run_dir", "resume", "run", "checkpoint")  # settings that say where, not what


def changed_settings(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[tuple[str, object, object]]:
    """(setting, in the first, in the second) where two configs differ; None where a config has no such setting."""
    one, other = (dict(leaves({k: v for k, v in config.items() if k not in NAMES})) for config in (first, second))
    return [(key, one.get(key), other.get(key)) for key in {**one, **other} if one.get(key) != other.get(key)]


def steps(run: Path) -> list[Metrics]:
    """What each step of training logged, in order; [] where nothing was trained. What was no number is absent."""
    path = run / "metrics.jsonl"
    if not path.is_file():
        return []
    rows = [json.loads(line) for line in whole_lines(path)]
    return [{name: value for name, value in row.items() if value is not None} for row in rows if "time/step_s" in row]


def parameters(evaluated: Evaluated) -> int | None:
    """Parameters of the model, counted in its files; None where they are not on this machine."""
    config = evaluated.config
    named = [config.get("checkpoint"), evaluated.run / "model", config.get("model", {}).get("path")]
    for folder in (Path(path) for path in named if path):
        if files := sorted(folder.glob("*.safetensors")):
            return sum(math.prod(shape) for file in files for shape in _shapes(file))
    return None


def _shapes(file: Path) -> Sequence[list[int]]:
    from safetensors import safe_open

    with safe_open(file, framework="numpy") as tensors:
        names = tensors.keys()
        return [tensors.get_slice(name).get_shape() for name in names]
