"""A logger writes metrics down: readable on the console, valid JSON in the file, nothing lost to a kill.

Weights & Biases, TensorBoard and Prometheus are the real ones: their files are read back, and the endpoint is scraped.
"""

from __future__ import annotations

import io
import json
import os
import pty
import socket
import struct
import subprocess
import sys
import threading
import time
import urllib.request
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console

from otcrl import cli
from otcrl.errors import ConfigError
from otcrl.loggers import Loggers, progress
from otcrl.loggers.console import ConsoleLogger
from otcrl.loggers.jsonl import JsonlLogger
from otcrl.loggers.progress import Bars
from otcrl.loggers.prometheus import PrometheusLogger, exposed
from otcrl.loggers.tensorboard import TensorBoardLogger
from otcrl.loggers.wandb import WandbLogger, run_id
from otcrl.tell import tell
from otcrl.types import Metrics
from tests.test_bad_input import ATLAS, ROOT

STEP = {"reward/value": 0.5, "reward/correct": 0.75, "calls/well_formed": 1.25, "rollout/tokens": 131.6}
STEP |= {"calls/emitted": 1.5, "calls/failed": 0.15, "calls/invalid": 0.15}
STEP |= {"update/kl": 0.001, "update/entropy": 0.5, "time/step_s": 3.21, "time/rollout_s": 2.0, "time/update_s": 1.21}


def console_lines(every: int, *steps: tuple[Metrics, int], of: int = 0) -> list[str]:
    screen = io.StringIO()
    logger = ConsoleLogger(every=every, panel=True, steps=of, console=Console(file=screen, width=40))
    for metrics, step in steps:
        logger.log(metrics, step)
    return [" ".join(line.split()) for line in screen.getvalue().splitlines()]


def rows(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_step_is_one_line_however_narrow_the_terminal():
    assert console_lines(1, (STEP, 7)) == [
        "step 7 reward 0.500 correct 0.750 calls 1.25 tokens 132 kl 0.0010 entropy 0.500 s 3.2 TP 0.600 errors 20.0%"
    ]


def test_a_line_says_how_long_the_run_will_take():
    """At the pace of its last steps: (3.21 + 9.21) / 2 s, four more."""
    lines = console_lines(1, (STEP, 4), (STEP | {"time/step_s": 9.21}, 5), of=10)
    assert lines[-1].endswith("left 0:25 min")
    assert "left" not in console_lines(1, (STEP, 9), of=10)[0]


def test_without_a_terminal_there_is_no_panel():
    screen = io.StringIO()
    console = Console(file=screen, width=100)
    with Bars(console) as bars:
        logger = ConsoleLogger(every=1, panel=True, bars=bars, steps=3, console=console)
        logger.log(STEP, 0)
    assert len(screen.getvalue().splitlines()) == 1


def test_a_file_is_told_now_and_then_how_far_a_long_phase_is(monkeypatch):
    screen = io.StringIO()
    console = Console(file=screen, width=100)
    with Bars(console) as bars, Bars(console, quiet=True) as others:  # of another rank
        bars("rollout")(1, 8)  # too soon
        monkeypatch.setattr(progress, "SILENCE_S", 0.0)
        bars("cold start")(60, 600)
        others("cold start")(60, 600)
    assert screen.getvalue().splitlines() == ["cold start: 60 of 600"]


def test_the_panel_shows_curves_phases_tool_errors_and_the_time_left_beneath_the_bars():
    screen = io.StringIO()
    console = Console(file=screen, width=100, height=40, force_terminal=True, color_system=None)
    earlier = [STEP | {"reward/correct": 0.1 * step} for step in range(8)]
    with Bars(console) as bars:
        logger = ConsoleLogger(every=1, panel=True, bars=bars, steps=10, earlier=earlier, console=console)
        bars("step 9 rollout")(3, 10)
        logger.log(STEP | {"reward/value": float("nan")}, 8)
    shown = screen.getvalue()
    for words in ("step 9 of 10, 0:03 min left", "step 9 rollout", "EM", "TC", "TP", "rollout 2 s (62%)"):
        assert words in shown, words
    assert "20.0% of calls failed or malformed" in shown
    assert "▁" in shown
    assert "█" in shown


def test_the_panel_can_be_left_out():
    screen = io.StringIO()
    console = Console(file=screen, width=100, force_terminal=True, color_system=None)
    with Bars(console) as bars:
        ConsoleLogger(every=1, panel=False, bars=bars, steps=10, console=console).log(STEP, 8)
    assert "means of the last" not in screen.getvalue()


def test_metrics_that_the_console_does_not_know_are_left_to_the_file():
    assert console_lines(1, ({"reward/value": 1.0, "my/own": 3.0}, 0), ({"my/own": 3.0}, 1)) == ["step 0 reward 1.000"]


def test_every_thins_steps_but_not_evaluations():
    steps = [({"reward/value": 1.0}, 0), ({"reward/value": 1.0}, 1), ({"eval/nq/accuracy": 0.25}, 1)]
    assert console_lines(2, *steps) == ["step 0 reward 1.000", "step 1 eval/nq/accuracy 0.25"]


def test_every_must_be_a_step_or_more():
    with pytest.raises(ValueError, match="every must be at least 1 step, got 0"):
        ConsoleLogger(every=0, panel=True)


def test_a_full_disk_under_the_terminals_file_ends_nothing(monkeypatch: pytest.MonkeyPatch):
    """`nohup otcrl train ... > run.log`, or Slurm's --output, on the disk that is full."""
    full = os.fdopen(os.open("/dev/full", os.O_WRONLY), "w", buffering=1)
    monkeypatch.setattr(sys, "stderr", full)
    tell("FAILED: there is no room")
    ConsoleLogger(every=1, panel=True, console=Console(file=full)).log(STEP, 0)
    with suppress(OSError):
        full.close()


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


# -- Weights & Biases -----------------------------------------------------------------------------------


def wandb_logger(folder: Path, **settings: Any) -> WandbLogger:
    known: dict[str, Any] = {"project": "p", "entity": None, "mode": "offline", "trajectories": 2, "name": "n"}
    return WandbLogger(**known | {"folder": folder, "config": {"algo": {"kl_coef": 0.5}}} | settings)


def wandb_records(folder: Path) -> list[Any]:
    """What `wandb sync` would send of an offline run; its last record is written when `finish` has returned already."""
    begun = time.monotonic()
    while not (found := records_so_far(folder)) or found[-1].WhichOneof("record_type") != "exit":
        assert time.monotonic() < begun + 30
        time.sleep(0.1)
    return found


def records_so_far(folder: Path) -> list[Any]:
    """Protocol buffers in a LevelDB log.

    github.com/google/leveldb/blob/main/doc/log_format.md: blocks of 32 KiB, records in one or several parts.
    """
    from wandb.proto import wandb_internal_pb2

    block, head = 32768, struct.Struct("<IHB")  # check sum, bytes, kind: 1 whole, 2 first, 3 middle, 4 last
    (file,) = folder.glob("run-*.wandb")
    data, found, parts = file.read_bytes(), [], b""
    assert data[:4] in (b":W&B", b"")
    position = 7  # after W&B's own head
    while position + head.size <= len(data):
        if block - position % block < head.size:  # no head fits: zeros up to the next block
            position += block - position % block
            continue
        _, size, kind = head.unpack_from(data, position)
        position += head.size + size
        if position > len(data):  # the rest is yet to be written
            break
        parts += data[position - size : position]
        if kind in (1, 4):
            found.append(wandb_internal_pb2.Record.FromString(parts))  # pyright: ignore[reportAttributeAccessIssue]
            parts = b""
    return found


def history(records: list[Any]) -> list[dict[str, Any]]:
    """Each logged row, by metric."""
    rows = [record.history.item for record in records if record.WhichOneof("record_type") == "history"]
    return [{item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in row} for row in rows]


def transcript(**changes: Any) -> dict[str, Any]:
    row: dict[str, Any] = {"id": "nq/1", "question": "Who?", "response": "<answer>me</answer>", "answer": "me"}
    row |= {"correct": 1.0, "reward": 0.5, "calls": [{"tool": "search"}], "optimal_calls": None, "stop": "answered"}
    return row | {"tokens": {"sampled": 7}} | changes


def test_without_wandb_the_logger_says_how_to_install_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match=r"pip install 'otcrl\[wandb\]'"):
        wandb_logger(tmp_path)


def test_wandb_without_a_login_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setattr("sys.stdin", io.StringIO())
    with pytest.raises(ConfigError, match=r"wandb cannot begin a run: .*logger\.wandb\.mode=offline"):
        WandbLogger(
            project="p", entity=None, mode="online", trajectories=0, name="n", folder=tmp_path / "run", config={}
        )


def test_wandb_has_config_metrics_and_trajectories_offline(tmp_path: Path):
    logger = wandb_logger(tmp_path)
    logger.read([transcript(), transcript(reward=None), transcript(id="too many")], 0)
    logger.log({"reward/value": 1.0, "stop/answered": 0.25}, 0)
    logger.close()
    (folder,) = tmp_path.glob("wandb/offline-run-*")
    records = wandb_records(folder)
    (run,) = [record.run for record in records if record.WhichOneof("record_type") == "run"]
    assert (run.run_id, run.project, run.display_name) == (run_id(tmp_path), "p", "n")
    config = {item.key: json.loads(item.value_json) for item in run.config.update}
    assert config["algo"] == {"kl_coef": 0.5}
    table, row = history(records)
    assert row.items() >= {"step": 0, "reward/value": 1.0, "stop/answered": 0.25}.items()
    assert table["step"] == 0
    (file,) = folder.glob("files/media/table/*.json")
    kept = json.loads(file.read_text())
    assert [row[kept["columns"].index("reward")] for row in kept["data"]] == [0.5, None]
    assert kept["data"][0][:5] == ["nq/1", "Who?", "<answer>me</answer>", "me", 1.0]


def test_a_resumed_run_goes_on_in_the_same_wandb_run_and_no_step_is_dropped(tmp_path: Path):
    """The steps after the last checkpoint are made again, which W&B's own count would refuse."""
    for steps in ((0, 1, 2), (1, 2, 3)):
        logger = wandb_logger(tmp_path, trajectories=0)
        for step in steps:
            logger.log({"reward/value": float(step)}, step)
        logger.close()
    folders = sorted(tmp_path.glob("wandb/offline-run-*"))
    found = [wandb_records(folder) for folder in folders]
    ids = {record.run.run_id for records in found for record in records if record.WhichOneof("record_type") == "run"}
    assert ids == {run_id(tmp_path)}
    assert sorted(row["step"] for records in found for row in history(records)) == [0, 1, 1, 2, 2, 3]


def test_wandb_sync_finds_what_was_logged_offline(tmp_path: Path):
    logger = wandb_logger(tmp_path)
    logger.log({"reward/value": 1.0}, 0)
    logger.close()
    wandb_records(next(tmp_path.glob("wandb/offline-run-*")))
    own = os.environ | {"WANDB_API_KEY": "0" * 40, "WANDB_BASE_URL": "http://127.0.0.1:9", "COLUMNS": "300"}
    command = [sys.executable, "-m", "wandb", "sync", "--dry-run"]
    done = subprocess.run(command, cwd=tmp_path, env=own, capture_output=True, text=True, timeout=120)
    assert "Would sync 1 run(s)" in done.stderr
    assert f"run-{run_id(tmp_path)}.wandb" in done.stderr


def test_a_run_directory_keeps_its_wandb_id(tmp_path: Path):
    assert run_id(tmp_path) == run_id(tmp_path) != ""


# -- TensorBoard ----------------------------------------------------------------------------------------


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Read back by TensorBoard itself."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(folder / "tensorboard"))
    found.Reload()
    return {tag: [(event.step, event.value) for event in found.Scalars(tag)] for tag in found.Tags()["scalars"]}


def test_tensorboard_reads_the_metrics_by_their_names(tmp_path: Path):
    logger = TensorBoardLogger(flush_s=30, folder=tmp_path, config={"seed": 3})
    logger.log({"reward/value": 0.5, "calls/source/nq": 2.0}, 0)
    logger.log({"reward/value": 0.25, "calls/source/nq": 1.0}, 1)
    logger.close()
    assert scalars(tmp_path) == {"reward/value": [(0, 0.5), (1, 0.25)], "calls/source/nq": [(0, 2.0), (1, 1.0)]}
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(tmp_path / "tensorboard"))
    found.Reload()
    (text,) = found.Tensors("config/text_summary")
    assert b"seed: 3" in text.tensor_proto.string_val[0]


def test_in_tensorboard_a_resumed_run_has_no_step_twice(tmp_path: Path):
    for start, steps in ((None, (0, 1, 2)), (1, (1, 2, 3))):
        logger = TensorBoardLogger(flush_s=30, folder=tmp_path, config={}, resume_step=start)
        for step in steps:
            logger.log({"reward/value": 10.0 * step + (start or 0)}, step)
        logger.close()
    assert scalars(tmp_path) == {"reward/value": [(0, 0.0), (1, 11.0), (2, 21.0), (3, 31.0)]}


def test_without_tensorboard_the_logger_says_how_to_install_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    with pytest.raises(ConfigError, match=r"pip install 'otcrl\[tensorboard\]'"):
        TensorBoardLogger(flush_s=30, folder=tmp_path, config={})


def test_tensorboard_is_flushed_at_least_every_second(tmp_path: Path):
    with pytest.raises(ValueError, match="flush_s must be at least 1 second, got 0"):
        TensorBoardLogger(flush_s=0, folder=tmp_path, config={})


# -- Prometheus -----------------------------------------------------------------------------------------


def scraped(port: int) -> dict[str, float]:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as reply:
        families = list(text_string_to_metric_families(reply.read().decode()))
    assert all(sample.labels == {"run": "mine"} for f in families for sample in f.samples if f.name[:6] == "otcrl_")
    return {sample.name: sample.value for family in families for sample in family.samples}


def test_prometheus_scrapes_the_last_value_of_every_metric():
    logger = PrometheusLogger(host="127.0.0.1", port=0, name="mine", steps=50)
    logger.log({"reward/value": 0.5, "calls/source/nq-open": 2.0}, 0)
    logger.log({"reward/value": float("nan")}, 1)
    logger.log({"reward/value": 0.25}, 2)
    found = scraped(logger.port)
    logger.close()
    assert found["otcrl_reward_value"] == 0.25
    assert found["otcrl_calls_source_nq_open"] == 2.0
    assert (found["otcrl_step"], found["otcrl_steps"]) == (2, 50)
    assert found["otcrl_step_timestamp_seconds"] > 1e9
    assert found["process_resident_memory_bytes"] > 0
    with pytest.raises(OSError, match="refused"):
        scraped(logger.port)


def test_metrics_that_prometheus_cannot_tell_apart_by_their_letters_get_a_digest():
    logger = PrometheusLogger(host="127.0.0.1", port=0, name="mine", steps=50)
    logger.log(
        {"calls/source/nq-open": 1.0, "calls/source/nq_open": 2.0, "calls/源": 3.0, "calls/類": 4.0, "steps": 5.0}, 0
    )
    found = scraped(logger.port)
    logger.close()
    assert {value for name, value in found.items() if "calls" in name} == {1.0, 2.0, 3.0, 4.0}
    assert found["otcrl_calls_source_nq_open"] == 1.0
    assert found["otcrl_steps"] == 50


def test_a_port_that_is_taken_is_one_line():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"nothing can be served at 127.0.0.1:{port}: Address already in use"):
            PrometheusLogger(host="127.0.0.1", port=port, name="mine", steps=1)
    with pytest.raises(ValueError, match="port must be between 0 "):
        PrometheusLogger(host="127.0.0.1", port=70000, name="mine", steps=1)


def test_a_name_has_letters_digits_and_underscores_only():
    assert exposed("eval/2wiki (dev)/tool_calls") == "otcrl_eval_2wiki_dev_tool_calls"


# -- several at once ------------------------------------------------------------------------------------


def test_loggers_are_chosen_by_name_one_or_several(capsys: pytest.CaptureFixture[str]):
    def chosen(*words: str) -> set[str]:
        return set(cli.run_config(["conf=quickstart", *words])["logger"])

    assert chosen() == {"console"}
    assert chosen("logger=wandb") == {"wandb"}
    assert chosen("logger=[console,tensorboard,prometheus]") == {"console", "tensorboard", "prometheus"}
    one = cli.run_config(["conf=quickstart", "logger=[console,prometheus]", "logger.prometheus.port=0"])
    assert one["logger"]["prometheus"]["port"] == 0
    for wrong, why in (("logger=[console,wandbb]", "Did you mean 'wandb'?"), ("algo=[grpo]", "is chosen by name")):
        with pytest.raises(ConfigError) as caught:
            cli.run_config(["conf=quickstart", wrong])
        assert why in str(caught.value)


@pytest.mark.slow
def test_a_run_logs_the_same_names_everywhere_and_is_scraped_while_it_trains(tmp_path: Path):
    """Of a real run with all loggers, on a terminal; the config is told without its secret."""
    terminal, its_side = pty.openpty()
    words = ["logger=[console,wandb,tensorboard,prometheus]", "logger.wandb.mode=offline", "logger.prometheus.port=0"]
    words += ["loop.transcripts_every=1", "tools.python.token=s3cret", "name=mine", f"run_dir={tmp_path / 'run'}"]
    words += ["algo.kl_coef=0.01"]  # so that an update looks at every row, and all its statistics are there
    process = subprocess.Popen(
        [sys.executable, "-m", "otcrl", "train", *ATLAS, *words, "loop.steps=4"], cwd=ROOT,
        stdout=its_side, stderr=its_side, env=os.environ | {"COLUMNS": "120", "LINES": "50", "TERM": "xterm"},
    )  # fmt: skip
    os.close(its_side)
    seen, found = Screen(terminal), {}
    metrics = tmp_path / "run/metrics.jsonl"
    while process.poll() is None:
        if metrics.is_file() and len(metrics.read_text().splitlines()) in (2, 3) and not found:
            found = scraped(int(seen.text.partition("http://127.0.0.1:")[2].partition("/")[0]))
    seen.thread.join(timeout=10)
    assert process.returncode == 0, seen.text
    assert found["otcrl_step"] in (0, 1, 2)
    assert "otcrl_update_entropy" in found
    for words in ("EM", "TP", "of calls failed or malformed", "means of the last"):
        assert words in seen.text

    logged = {name: None for row in rows(metrics) for name in row if name != "step"}
    (folder,) = (tmp_path / "run").glob("wandb/offline-run-*")
    records = wandb_records(folder)
    on_wandb = {name for row in history(records) for name in row if not name.startswith(("_", "trajectories"))}
    assert on_wandb - {"step"} == set(logged)
    assert set(scalars(tmp_path / "run")) == set(logged)
    assert {exposed(name) for name in logged if name.startswith("reward/")} <= set(found)
    assert len(list(folder.glob("files/media/table/*.json"))) == 4
    config = [i.value_json for r in records if r.WhichOneof("record_type") == "run" for i in r.run.config.update]
    assert config
    assert not any("s3cret" in value for value in config)
    # W&B would keep the command line
    files = [path for path in (tmp_path / "run/wandb").rglob("*") if path.is_file() and not path.is_symlink()]
    assert not [path for path in files if b"s3cret" in path.read_bytes()]


class Screen:
    """Reads what is written to a terminal."""

    def __init__(self, terminal: int) -> None:
        self.text = ""
        self._terminal = terminal
        self.thread = threading.Thread(target=self._read, daemon=True)
        self.thread.start()

    def _read(self) -> None:
        try:
            while data := os.read(self._terminal, 65536):
                self.text += data.decode(errors="replace")
        except OSError:  # nobody has the other side any more
            return
