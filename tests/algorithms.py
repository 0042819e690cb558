"""Every algorithm of conf/algo, as its yaml has it or with other settings."""

from __future__ import annotations

import yaml

from otcrl.construct import construct
from otcrl.presets import conf_dir
from otcrl.protocols import Algorithm

NAMES = sorted(path.stem for path in (conf_dir() / "algo").glob("*.yaml"))
WITH_GROUPS = [name for name in NAMES if name not in ("ppo", "reinforce_pp")]


def section(name: str) -> dict[str, object]:
    """Its yaml, where the most tokens that a trajectory may hold are 2048."""
    content = yaml.safe_load((conf_dir() / f"algo/{name}.yaml").read_text())
    return content | ({"max_tokens": 2048} if "max_tokens" in content else {})


def algorithm(name: str, **settings: object) -> Algorithm:
    return construct(section(name) | settings, "algo")
