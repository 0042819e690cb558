"""The benchmark that trains the systems of the paper side by side: every command of every world is one of otcrl's."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest

from otcrl.cli import run_config

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
WORLDS = ("python", "sums", "search", "no_search", "overcalling", "single_hop", "single_hop_70", "untrained")


def commands_of(world: str, runs: Path, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.setenv("OTCRL_DATA", "data")
    commands: list[list[str]] = []

    def recorded(command: list[str], **_: object) -> int:
        commands.append(command[3:])  # without python -m otcrl
        return 0

    monkeypatch.setattr("subprocess.call", recorded)
    monkeypatch.setattr(sys, "argv", ["systems.py", world, "--runs", str(runs)])
    importlib.import_module("systems").main()
    return commands


@pytest.mark.parametrize(
    "world", ["python", "sums", "search", "no_search", "overcalling", "single_hop", "single_hop_70", "untrained"]
)
def test_all_settings_of_a_world_are_known(world: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for command, *settings in commands_of(world, tmp_path, monkeypatch):
        config = run_config([setting for setting in settings if not setting.startswith("model=")])
        assert config["run_dir"].startswith(str(tmp_path)), command


def test_systems_of_a_pair_differ_in_their_reward_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    trained = [settings for command, *settings in commands_of("sums", tmp_path, monkeypatch) if command == "train"]
    configs = {config["name"]: config for config in map(run_config, trained)}
    for seed in (0, 1):
        pair = [configs[f"torl_grpo-{seed}"], configs[f"otc_grpo-{seed}"]]
        assert pair[0]["reward"] != pair[1]["reward"]
        first, second = ({k: v for k, v in config.items() if k not in ("reward", "name", "run_dir")} for config in pair)
        assert first == second
