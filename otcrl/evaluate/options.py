"""The words of a command that reads runs: `RUN ... key=value ...`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml

from otcrl.construct import construct_as
from otcrl.errors import ConfigError
from otcrl.evaluate.metrics import check_counter
from otcrl.evaluate.training import WINDOW


@dataclass(frozen=True, kw_only=True)
class Common:
    """What `otcrl compare` and `otcrl table` both take."""

    eval: str | None = None  # evaluation of each run; None: the usual one
    common: bool = False  # compare on the questions that both runs answered, where they did not answer the same
    counter: str | None = None  # calls that count; None: those that the baseline's report counts
    seed: int = 0  # of the bootstrap
    em: float | None = None  # EM of training whose time is asked for; None: the highest that each run has reached
    window: int = WINDOW  # steps that an EM of training is averaged over

    def __post_init__(self) -> None:
        if self.counter is not None:
            check_counter(self.counter)
        if self.seed < 0:
            raise ConfigError(f"seed must be at least 0, got {self.seed}")
        if self.window < 1:
            raise ConfigError(f"window must be at least 1 step, got {self.window}")
        if self.em is not None and not 0 <= self.em <= 1:
            raise ConfigError(f"em must be a share between 0 and 1, got {self.em}")


@dataclass(frozen=True, kw_only=True)
class CompareOptions(Common):
    json: Path | None = None  # where to write all figures


@dataclass(frozen=True, kw_only=True)
class TableOptions(Common):
    of: Literal["results", "difficulty", "behaviour", "training", "offloading"] = "results"
    format: Literal["markdown", "latex", "csv"] = "markdown"
    baseline: Path | None = None  # run that changes are told against
    intervals: bool = False  # show the 95 % intervals
    out: Path | None = None  # file to write; None: the terminal


T = TypeVar("T", bound=Common)


def parsed(command: str, kind: type[T], words: Sequence[str]) -> tuple[list[Path], T]:
    """The runs, and the settings. Raises ConfigError naming what is wrong and the nearest setting."""
    texts = {field.name for field in fields(kind) if "Path" in str(field.type) or "str" in str(field.type)}
    runs, settings = list[Path](), dict[str, Any]()
    for word in words:
        name, is_setting, text = word.partition("=")
        if not (is_setting and name.isidentifier()):
            runs.append(Path(word))
        elif name in settings:
            raise ConfigError(f"{name} is given twice")
        else:
            settings[name] = text if name in texts else _value(name, text)
    return runs, construct_as(kind, settings, command)


def _value(name: str, text: str) -> object:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"cannot read {name}={text}") from error


def write(name: str, path: Path, text: str) -> None:
    """Raises ConfigError, with the setting's name, where the file cannot be written."""
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{name}={path}: {error.strerror or error}") from error
