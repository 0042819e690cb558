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
from otcrl.plan.job import Training
from otcrl.plan.read import Settings, read_job, read_settings
from otcrl.plan.show import numbers, show, write
from otcrl.plan.speed import estimate

DEEPSPEED = {"zero_stage": "zero", "offload": "offload", "offload_params": "offload_params"}  # as a plan calls them
OWN = (*(field.name for field in fields(Settings)), "json")  # settings of the command; all others are the config's


def plan(config: Mapping[str, Any], named: Mapping[str, str]) -> None:
    """Prints tables, writes `json=FILE`. Raises ConfigError, with the least change that helps, for what cannot fit."""
    settings = read_settings({name: text for name, text in named.items() if name != "json"})
    job = read_job(config, settings)
    usages, times = memory.phases(job), estimate(job)
    why = obstacle(job, settings.host_gib)
    found = proposal(job, settings.host_gib) if why else None
    show(job, usages, None if why else times, settings.price)
    if missing := as_planned(config, job.training):
        print(f"to train as it is planned here, add: {' '.join(missing)}")
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


def as_planned(config: Mapping[str, Any], training: Training) -> list[str]:
    """Settings of `otcrl train` that the plan is made with and the config has not."""
    learner, found = config["learner"], list[str]()
    if training.backend != learner.get("backend", "torch"):
        found.append(f"learner.backend={training.backend}")
    if training.backend == "deepspeed":
        wanted = {name: getattr(training, own) for name, own in DEEPSPEED.items()}
        found += [f"learner.deepspeed.{k}={value}" for k, value in wanted.items() if value != learner["deepspeed"][k]]
    if training.lora != (learner.get("lora") or {}).get("rank", 0):
        found.append(f"learner.lora.rank={training.lora}")
    return found
