"""Parts of the benchmark that come from conf/, so that they are built as `otcrl train` builds them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from common import Row

from otcrl.compose import load
from otcrl.construct import construct
from otcrl.presets import conf_dir


def section(name: str, **settings: Any) -> dict[str, Any]:
    """conf/NAME.yaml with some settings changed."""
    return load(conf_dir() / f"{name}.yaml") | settings


def part(name: str, wired: Mapping[str, Any], **settings: Any) -> Any:
    """The object that conf/NAME.yaml describes."""
    return construct(section(name, **settings), name, **wired)


def row(part: str, what: str, value: float, unit: str) -> Row:
    return {"part": part, "what": what, "value": value, "unit": unit}
