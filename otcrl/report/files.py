"""What a run directory holds, read as far as it goes: the run may still be going on, or be an earlier otcrl's."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from otcrl.errors import ConfigError, DataError, nearest
from otcrl.evaluate.report import FILE, Report
from otcrl.loggers.jsonl import whole_lines
from otcrl.report.attempts import TRAIN, Attempt, read_attempt

MADE = ("config.yaml", "metrics.jsonl", "transcripts.jsonl", "sft.jsonl", "eval")  # any of these makes a run
Row = dict[str, float | None]  # metric -> value


@dataclass(frozen=True, kw_only=True)
class RunFiles:
    """One run. Whatever is not there is empty."""

    name: str  # unlike those of the other runs
    path: Path
    config: Mapping[str, Any] = field(default_factory=dict)
    rows: Sequence[Row] = ()  # of metrics.jsonl, one for each step, ascending
    evaluations: Mapping[str, Report] = field(default_factory=dict)  # in the order in which they were made
    attempts: Sequence[Attempt] = ()  # of training and of evaluations
    least: Mapping[str, int] = field(default_factory=dict)  # problem -> n of the last checkpoint


def read_runs(folders: Sequence[Path]) -> list[RunFiles]:
    """Raises ConfigError for what is no run directory, and DataError naming the line that cannot be read."""
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise ConfigError("a run is named twice")
    for folder in folders:
        check_run(folder)
    return [read_run(folder, name) for folder, name in zip(folders, names(folders), strict=True)]


def check_run(folder: Path) -> None:
    if not folder.is_dir():
        beside = [path.name for path in folder.parent.iterdir()] if folder.parent.is_dir() else []
        raise ConfigError(f"there is no run {folder}.{nearest(folder.name, beside) if beside else ''}")
    if not any((folder / name).exists() for name in MADE):
        raise ConfigError(f"{folder} is not a run directory: it has none of {', '.join(MADE)}")


def names(folders: Sequence[Path]) -> list[str]:
    """As much of the end of each path as tells them apart."""
    parts = [folder.resolve().parts for folder in folders]
    count = 1
    while len({each[-count:] for each in parts}) < len(parts):
        count += 1
    return ["/".join(each[-count:]) for each in parts]


def read_run(folder: Path, name: str) -> RunFiles:
    config = read_config(folder)
    counter = (config.get("evaluate") or {}).get("counter", "well_formed")
    attempts = [read_attempt(row, TRAIN, counter) for row in last_writing(read_rows(folder / "transcripts.jsonl"))]
    evaluated = evaluations(folder)
    for split, path in evaluated.items():
        attempts += [read_attempt(row, split, counter) for row in read_rows(path / "transcripts.jsonl")]
    return RunFiles(
        name=name,
        path=folder,
        config=config,
        rows=read_metrics(folder / "metrics.jsonl"),
        evaluations={split: Report.load(path) for split, path in evaluated.items()},
        attempts=attempts,
        least=read_least(folder / "checkpoints") if keeps_counts(config, counter) else {},
    )


def evaluations(folder: Path) -> dict[str, Path]:
    """Those of a run by name, the oldest first: `before`, `after`, and what `otcrl eval` made of a step, or as=NAME."""
    root = folder / "eval"
    return {path.parent.relative_to(root).as_posix(): path.parent for path in by_age(root.glob(f"**/{FILE}"))}


def keeps_counts(config: Mapping[str, Any], counter: str) -> bool:
    """Whether the reward's n are numbers of those calls that are counted here; with prices they are costs."""
    reward = config.get("reward") or {}
    return reward.get("counter", counter) == counter and not any((reward.get("price") or {}).values())


def by_age(paths: Iterable[Path]) -> list[Path]:
    return sorted(paths, key=lambda path: (path.stat().st_mtime, path))


def read_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.yaml"
    if not path.is_file():
        return {}
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise DataError(f"{path} must hold settings (key: value), got a {type(content).__name__}")
    return content


def read_rows(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of a file of JSON lines that may still be written to: half a line at the end is not there yet."""
    if not path.is_file():
        return
    for number, line in enumerate(whole_lines(path), start=1):
        try:
            row = json.loads(line)
        except ValueError as error:
            raise DataError(f"{path}, line {number}: expected one JSON object, got {line[:60]!r}: {error}") from error
        if not isinstance(row, dict) or not isinstance(row.get("step"), int):
            raise DataError(f"{path}, line {number}: expected an object with a step, got {line[:60]!r}")
        yield row


def read_metrics(path: Path) -> list[Row]:
    """One row for each step; an evaluation after a step has a line of its own."""
    steps: dict[int, Row] = {}
    for row in read_rows(path):
        steps.setdefault(row["step"], {}).update(row)
    return [steps[step] for step in sorted(steps)]


def last_writing(rows: Iterator[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each step as it was written last: an earlier otcrl left what a resumed run made a second time."""
    kept: list[dict[str, Any]] = []
    for row in rows:
        if kept and row["step"] < kept[-1]["step"]:
            kept = [earlier for earlier in kept if earlier["step"] < row["step"]]
        kept.append(row)
    return kept


def read_least(checkpoints: Path) -> dict[str, int]:
    """The table of n of the last checkpoint; {} where the reward keeps none."""
    found = sorted(checkpoints.glob("step-*/run.json"))
    if not found:
        return {}
    try:
        return dict(json.loads(found[-1].read_text())["reward_state"])
    except (ValueError, KeyError) as error:
        raise DataError(f"{found[-1]} is no checkpoint: {error!r}") from error
