"""`otcrl plan`: what a run would take, printed; or why it cannot run, and what would have to change."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from otcrl.errors import ConfigError
from otcrl.plan import memory
from otcrl.plan.changes import obstacle, proposal
from otcrl.plan.gpus import GIB
from otcrl.plan.read import Settings, read_job, read_settings
from otcrl.plan.show import numbers, show, write
from otcrl.plan.speed import estimate

OWN = (*(field.name for field in fields(Settings)), "json")  # settings of the command; all others are the config's


def plan(config: Mapping[str, Any], named: Mapping[str, str]) -> None:
    """Prints tables, writes `json=FILE`. Raises ConfigError, with the least change that helps, for what cannot fit."""
    settings = read_settings({name: text for name, text in named.items() if name != "json"})
    job = read_job(config, settings)
    usages, times = memory.phases(job), estimate(job)
    why = obstacle(job, settings.host_gib)
    found = proposal(job, settings.host_gib) if why else None
    show(job, usages, None if why else times, settings.price)
    if "json" in named:
        write(Path(named["json"]), numbers(job, usages, times, settings.price, why, found))
    if why:
        if found is None:
            raise ConfigError(f"{why}. No change known here makes it fit")
        peak = max(memory.phases(found.job), key=lambda usage: usage.total)
        raise ConfigError(
            f"{why}. Least change that fits: {' '.join(found.settings)} "
            f"({peak.phase} then needs {peak.total / GIB:.1f} GiB)"
        )
