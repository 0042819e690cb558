"""Every algorithm of conf/algo, as its yaml has it or with other settings."""

from __future__ import annotations

import yaml

from otcrl.construct import construct
from otcrl.presets import conf_dir
from otcrl.protocols import Algorithm

NAMES = sorted(path.stem for path in (conf_dir() / "algo").glob("*.yaml"))
WITH_GROUPS = [name for name in NAMES if name not in ("ppo", "reinforce_pp")]


def algorithm(name: str, **settings: object) -> Algorithm:
    return construct(yaml.safe_load((conf_dir() / f"algo/{name}.yaml").read_text()) | settings, "algo")
