"""The benchmark that trains the systems of the paper side by side: every command of every world is one of otcrl's."""

from __future__ import annotations

import importlib
import json
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


def test_figures_are_recorded_and_set_beside_the_twins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.setattr(sys, "argv", ["systems.py", "sums"])
    for module in ("systems", "common"):
        monkeypatch.setattr(importlib.import_module(module), "RESULTS", tmp_path)
    for run, calls in (("torl_grpo-0", 1.0), ("otc_grpo-0", 0.6)):
        found = {name: {"value": value} for name, value in (("em", 1.0), ("f1", 1.0), ("tc", calls), ("tp", 1 / calls))}
        report = {"temperature": 0.0, "sources": {}, "overall": {"questions": 9, **found}}
        folder = tmp_path / "sums" / run / "eval/after"
        folder.mkdir(parents=True)
        (folder / "report.json").write_text(json.dumps(report))
    for _ in range(2):  # what is recorded again replaces what was
        importlib.import_module("systems").record(tmp_path, "sums")
    written = json.loads((tmp_path / "systems.json").read_text())
    assert [(row["run"], row["set"], row["tc"]) for row in written["rows"]] == [
        ("otc_grpo-0", "all", 0.6),
        ("torl_grpo-0", "all", 1.0),
    ]
    assert written["ratios"] == {"sums/otc_grpo-0: calls": 0.6}
