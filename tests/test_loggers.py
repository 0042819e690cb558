"""A logger writes metrics down: readable on the console, valid JSON in the file, nothing lost to a kill."""

import io
import json
import sys
from pathlib import Path

import pytest
from rich.console import Console

from otcrl.errors import ConfigError
from otcrl.loggers import Loggers
from otcrl.loggers.console import ConsoleLogger
from otcrl.loggers.jsonl import JsonlLogger
from otcrl.loggers.wandb import WandbLogger, run_id
from otcrl.types import Metrics


def console_lines(every: int, *steps: tuple[Metrics, int]) -> list[str]:
    screen = io.StringIO()
    logger = ConsoleLogger(every=every, console=Console(file=screen, width=40))
    for metrics, step in steps:
        logger.log(metrics, step)
    return [" ".join(line.split()) for line in screen.getvalue().splitlines()]


def rows(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_step_is_one_line_however_narrow_the_terminal():
    metrics = {"reward/value": 0.5, "reward/correct": 0.75, "calls/well_formed": 1.25, "rollout/tokens": 131.6}
    metrics |= {"update/kl": 0.001, "update/entropy": 0.5, "time/step_s": 3.21}
    assert console_lines(1, (metrics, 7)) == [
        "step 7 reward 0.500 correct 0.750 calls 1.25 tokens 132 kl 0.0010 entropy 0.500 s 3.2"
    ]


def test_metrics_that_the_console_does_not_know_are_left_to_the_file():
    assert console_lines(1, ({"reward/value": 1.0, "my/own": 3.0}, 0), ({"my/own": 3.0}, 1)) == ["step 0 reward 1.000"]


def test_every_thins_steps_but_not_evaluations():
    steps = [({"reward/value": 1.0}, 0), ({"reward/value": 1.0}, 1), ({"eval/nq/accuracy": 0.25}, 1)]
    assert console_lines(2, *steps) == ["step 0 reward 1.000", "step 1 eval/nq/accuracy 0.25"]


def test_every_must_be_a_step_or_more():
    with pytest.raises(ValueError, match="every must be at least 1 step, got 0"):
        ConsoleLogger(every=0)


def test_a_line_is_on_disk_before_the_next_step(tmp_path: Path):
    logger = JsonlLogger(tmp_path / "deep" / "metrics.jsonl")
    logger.log({"reward/value": 0.5}, 0)
    assert rows(tmp_path / "deep" / "metrics.jsonl") == [{"step": 0, "reward/value": 0.5}]


def test_what_is_not_finite_is_null(tmp_path: Path):
    logger = JsonlLogger(tmp_path / "metrics.jsonl")
    logger.log({"a": float("nan"), "b": float("inf"), "c": -1.0}, 3)
    logger.close()
    assert rows(tmp_path / "metrics.jsonl") == [{"step": 3, "a": None, "b": None, "c": -1.0}]


def test_half_a_line_is_dropped(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 0, "a": 1.0}\n{"step": 1, "a"')
    logger = JsonlLogger(path)
    logger.log({"a": 2.0}, 1)
    logger.close()
    assert rows(path) == [{"step": 0, "a": 1.0}, {"step": 1, "a": 2.0}]


def test_a_resumed_run_leaves_no_step_twice(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(f'{{"step": {step}}}\n' for step in range(5)))
    logger = JsonlLogger(path, resume_step=3)
    logger.log({}, 3)
    logger.close()
    assert [row["step"] for row in rows(path)] == [0, 1, 2, 3]


def test_several_loggers_are_one(tmp_path: Path):
    paths = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    logger = Loggers([JsonlLogger(path) for path in paths])
    logger.log({"x": 1.0}, 2)
    logger.close()
    assert rows(paths[0]) == rows(paths[1]) == [{"step": 2, "x": 1.0}]


def test_without_wandb_the_logger_says_how_to_install_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match=r"pip install 'otcrl\[wandb\]'"):
        WandbLogger(project="p", entity=None, mode="offline", name="n", folder=tmp_path, config={})


def test_wandb_records_offline(tmp_path: Path):
    logger = WandbLogger(project="p", entity=None, mode="offline", name="n", folder=tmp_path, config={"a": 1})
    logger.log({"x": 1.0}, 0)
    logger.close()
    assert list(tmp_path.glob("wandb/offline-run-*"))


def test_a_run_directory_keeps_its_wandb_id(tmp_path: Path):
    assert run_id(tmp_path) == run_id(tmp_path) != ""
