"""A run goes on where it was, whatever ended it, and its results are those of a run that nothing has ended."""

from __future__ import annotations

import errno
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from otcrl import checkpoint, cli, sealed
from otcrl.compose import load
from otcrl.resume import FREE, changes
from otcrl.tools.search import SearchTool
from tests.test_bad_input import ATLAS, ROOT, checkpoints, descendants, refusal, steps

LONG = pytest.mark.skipif("OTCRL_LONG" not in os.environ, reason="minutes on two cores: OTCRL_LONG=1")
TIMES = ("time/", "perf/", "checkpoint/")  # what a clock measures


SMALL = [*ATLAS, "reward._target_=tests.ranks.ByLength"]  # every group has a signal, so weights change in every step


def train(folder: Path, *overrides: str) -> int:
    return cli.main(["train", *SMALL, f"run_dir={folder}", *overrides])


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def results(folder: Path) -> list[dict]:
    """metrics.jsonl but for the clock; floats are compared to the last bit."""
    return [{k: v for k, v in row.items() if not k.startswith(TIMES)} for row in lines(folder / "metrics.jsonl")]


def transcripts(folder: Path) -> list[dict]:
    rows = lines(folder / "transcripts.jsonl")
    for row in rows:
        del row["timings"]
        for call in row["calls"]:
            del call["seconds"], call["cached"]
    return rows


def summary(folder: Path) -> dict:
    found = json.loads((folder / "summary.json").read_text())
    del found["seconds"]
    return found


def said(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return [line.removeprefix("otcrl: ") for line in capsys.readouterr().err.splitlines()]


def unfinish(folder: Path, step: int) -> None:
    """As if it had been killed in the step after the checkpoint `step`."""
    (folder / "summary.json").unlink()
    shutil.rmtree(folder / "model")
    for path in (folder / "checkpoints").glob("step-*"):
        if int(path.name[-6:]) > step:
            shutil.rmtree(path)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished") / "run"
    assert train(folder, "loop.steps=3", "loop.keep_checkpoints=9", "loop.transcripts_every=1") == 0
    return folder


@pytest.fixture
def stopped(finished: Path, tmp_path: Path) -> Path:
    """A run that was killed after its second checkpoint."""
    folder = shutil.copytree(finished, tmp_path / "run")
    unfinish(folder, 2)
    return folder


SAME = ("loop.steps=3", "loop.keep_checkpoints=9", "loop.transcripts_every=1")


def test_every_tool_is_ready_before_the_first_call(tmp_path, monkeypatch):
    """A call's time limit is for the call, not for an index that is opened or built first."""
    started, real = [], SearchTool.start

    async def start(self: SearchTool) -> None:
        started.append(self.name)
        await real(self)

    monkeypatch.setattr(SearchTool, "start", start)
    assert train(tmp_path / "run", "loop.steps=1") == 0
    assert started[:1] == ["search"]


# -- which run goes on ----------------------------------------------------------------------------------


def test_the_same_command_goes_on_with_a_run_that_is_unfinished(stopped, finished, capsys):
    assert train(stopped, *SAME) == 0
    assert said(capsys) == [f"the run in {stopped} goes on from step 2"]
    assert results(stopped) == results(finished)
    assert transcripts(stopped) == transcripts(finished)
    assert summary(stopped) == summary(finished)


def test_a_finished_run_is_moved_aside(tmp_path):
    assert train(tmp_path / "run") == 0
    assert train(tmp_path / "run") == 0
    assert (tmp_path / "run/summary.json").is_file()
    assert (tmp_path / "run.1/summary.json").is_file()


def test_a_finished_run_stays_where_it_is_when_the_next_cannot_begin(tmp_path, monkeypatch, capsys):
    assert train(tmp_path / "run") == 0
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    monkeypatch.setitem(sys.modules, "wandb", None)  # as if it were not installed
    assert train(tmp_path / "run", "logger=wandb") == 2
    assert "wandb is not installed" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    assert train(tmp_path / "new", "logger=wandb") == 2
    assert not (tmp_path / "new").exists()


def test_resume_never_begins_anew_and_loses_nothing(stopped, capsys):
    assert train(stopped, *SAME, "resume=never") == 0
    assert checkpoints(stopped.with_name("run.1")) == ["step-000001", "step-000002"]
    assert [row["step"] for row in lines(stopped / "metrics.jsonl")] == [0, 1, 2, 3]
    assert load(stopped / "config.yaml")["resume"] == "auto"


def test_a_run_is_named_wherever_it_lies_and_brings_its_config(stopped, finished, tmp_path):
    moved = stopped.rename(tmp_path / "elsewhere")
    assert cli.main(["train", f"resume={moved}"]) == 0
    assert results(moved) == results(finished)


def test_a_finished_run_that_is_named_goes_on_for_more_steps(finished, tmp_path):
    folder = shutil.copytree(finished, tmp_path / "run")
    assert cli.main(["train", f"resume={folder}", "loop.steps=4"]) == 2  # its learning rate would decay otherwise
    constant = ["learner.policy_optimizer.final_lr_share=1.0", "learner.critic_optimizer.final_lr_share=1.0"]
    short, whole = tmp_path / "short", tmp_path / "whole"
    assert train(short, *constant, "loop.steps=2") == 0
    assert train(whole, *constant, "loop.steps=4") == 0
    assert cli.main(["train", f"resume={short}", "loop.steps=4"]) == 0
    assert results(short) == results(whole)


def test_before_its_first_checkpoint_a_run_begins_again_in_its_place(stopped, finished, capsys):
    shutil.rmtree(stopped / "checkpoints")
    shutil.rmtree(stopped / "sft")
    assert train(stopped, *SAME) == 0
    assert said(capsys) == [f"the run in {stopped} goes on from its beginning"]
    assert results(stopped) == results(finished)
    assert transcripts(stopped) == transcripts(finished)
    assert len(lines(stopped / "sft.jsonl")) == 2
    assert not stopped.with_name("run.1").exists()


def test_a_cold_start_that_is_done_is_not_made_again(stopped, finished, capsys):
    shutil.rmtree(stopped / "checkpoints")
    (stopped / "sft.jsonl").write_text("untouched")
    assert train(stopped, *SAME) == 0
    assert said(capsys) == [f"the run in {stopped} goes on after its cold start"]
    assert results(stopped) == results(finished)
    assert (stopped / "sft.jsonl").read_text() == "untouched"


@pytest.mark.parametrize("step", [None, 1], ids=["after-the-cold-start", "from-step-1"])
def test_adapters_go_on_beside_the_weights_that_the_cold_start_left(step, tmp_path):
    words = ("learner.lora.rank=4", "algo.kl_coef=0.1", *SAME)
    run = tmp_path / "run"
    assert train(run, *words) == 0
    whole = shutil.copytree(run, tmp_path / "whole")
    unfinish(run, step or 0)
    assert train(run, *words) == 0
    assert results(run) == results(whole)
    assert (run / "model/model.safetensors").read_bytes() == (whole / "model/model.safetensors").read_bytes()
    assert any(row["update/kl"] > 0 for row in results(run) if "update/kl" in row)


def test_a_run_without_anything_to_go_on_from_makes_room_for_one_of_another_config(stopped):
    shutil.rmtree(stopped / "checkpoints")
    shutil.rmtree(stopped / "sft")
    assert train(stopped, *SAME, "seed=1") == 0
    assert stopped.with_name("run.1").is_dir()


def test_a_run_that_is_past_its_end_is_refused(stopped, capsys):
    assert cli.main(["train", f"resume={stopped}", "loop.steps=1", "resume_changed=true"]) == 2
    assert said(capsys)[-1].endswith("is at step 2 already, and loop.steps=1")


# -- a changed config -------------------------------------------------------------------------------------


def test_a_changed_config_is_shown_key_by_key_and_refused(stopped, capsys):
    before = {path: path.stat().st_mtime_ns for path in stopped.rglob("*")}
    assert cli.main(["train", f"resume={stopped}", "seed=1", "algo.kl_coef=0.5", "reward=outcome"]) == 2
    shown = said(capsys)
    assert "  seed: 0 -> 1" in shown
    assert "  algo.kl_coef: 0.0 -> 0.5" in shown
    assert "  reward._target_: 'tests.ranks.ByLength' -> 'otcrl.rewards.outcome.OutcomeReward'" in shown
    assert "  reward.alpha: 1.0 -> (not there)" in shown
    assert shown[-1].startswith(f"error: the run in {stopped} has another config, as shown above.")
    assert "resume_changed=true" in shown[-1]
    assert "resume=never" in shown[-1]
    assert {path: path.stat().st_mtime_ns for path in stopped.rglob("*")} == before


def test_it_goes_on_with_the_new_config_when_asked_and_remembers_both(stopped, capsys):
    assert train(stopped, *SAME, "algo.kl_coef=0.5", "resume_changed=true") == 0
    assert "  algo.kl_coef: 0.0 -> 0.5" in said(capsys)
    assert load(stopped / "config.yaml")["algo"]["kl_coef"] == 0.5
    assert load(stopped / "config.yaml")["resume_changed"] is False
    assert load(stopped / "config.before-step-000002.yaml")["algo"]["kl_coef"] == 0.0
    assert "update/kl" in lines(stopped / "metrics.jsonl")[2]


def test_a_change_that_cannot_be_leaves_the_run_as_it_was(stopped, finished, capsys):
    """Its config was written over before anybody saw that the checkpoint is another algorithm's."""
    before, rows = (stopped / "config.yaml").read_text(), (stopped / "metrics.jsonl").read_text()
    assert train(stopped, *SAME, "algo=ppo", "reward.form=ppo", "resume_changed=true") != 0
    assert (stopped / "config.yaml").read_text() == before
    assert (stopped / "metrics.jsonl").read_text() == rows, "also what came after the checkpoint"
    assert not [*stopped.glob("config.before-*")]
    assert train(stopped, *SAME) == 0


def test_what_changes_no_weight_may_change_unasked(stopped, finished):
    free = ["loop.checkpoint_every=3", "loop.keep_checkpoints=1", "loop.keep_best=reward/value", "sync.every=0"]
    free += ["loop.max_void_share=0.5", "loop.max_logprob_gap=null", "logger.console.every=2", "name=other"]
    assert train(stopped, *SAME, *free) == 0
    kept = [{k: v for k, v in row.items() if not k.startswith("sync/")} for row in results(stopped)]
    assert kept == [{k: v for k, v in row.items() if not k.startswith("sync/")} for row in results(finished)]


def test_every_other_setting_is_compared():
    config = cli.run_config(["conf=quickstart"])
    assert changes(config, config) == []
    assert changes(config, config | {"threads": 2}) == ["threads: 1 -> 2"]
    longer = changes(config, config | {"loop": config["loop"] | {"steps": 99}})
    assert longer == ["loop.steps: 50 -> 99, over which learning rates decay"]
    assert changes(config, {**config, "tools": {"search": config["tools"]["search"]}})
    for key in FREE:
        assert key.split(".")[0] in config or key.startswith("ranks"), f"{key} is no setting"


def test_other_libraries_are_said(stopped, capsys):
    folder = stopped / "checkpoints/step-000002"
    about = sealed.check(folder)
    about["versions"]["torch"], about["ranks"] = "1.0", 8
    (folder / sealed.MANIFEST).unlink()
    sealed.seal(folder, about)
    torch.set_num_threads(torch.get_num_threads() + 1)  # as a new process may have more than the config's
    assert train(stopped, *SAME) == 0
    (line,) = [line for line in said(capsys) if line.startswith("from here on the same up to rounding: ")]
    assert "torch 1.0 -> 2." in line
    assert line.endswith("ranks 8 -> 1")
    assert "threads" not in line


def test_two_runs_in_one_directory_are_one_too_many(stopped, capsys):
    code = "import sys, time; from pathlib import Path; from otcrl.resume import locked\n"
    code += f"with locked(Path({str(stopped)!r})): print(1, flush=True); time.sleep(60)"
    other = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE)
    assert other.stdout is not None
    assert other.stdout.readline() == b"1\n"
    before = sorted(stopped.rglob("*"))
    for words in ([f"run_dir={stopped}", *SAME], [f"run_dir={stopped}", "resume=never"], [f"resume={stopped}"]):
        why = refusal(capsys, "train", *([] if words[0].startswith("resume") else SMALL), *words)
        assert f"run_dir: {stopped} is being written by process {other.pid} on " in why
    assert sorted(stopped.rglob("*")) == before
    other.kill()
    other.wait()
    assert train(stopped, *SAME) == 0  # the lock went with the process
    assert not list(stopped.parent.glob(".*.lock"))


def test_a_finished_run_that_torchrun_restarts_has_nothing_left_to_do(finished, tmp_path, monkeypatch, capsys):
    folder = shutil.copytree(finished, tmp_path / "run")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert train(folder, *SAME) == 0
    (line,) = said(capsys)
    assert line == f"the run in {folder} is finished, and it was restarted after its end: nothing is left to do"
    assert not (tmp_path / "run.1").exists()


# -- damage -----------------------------------------------------------------------------------------------


def test_a_corrupt_checkpoint_costs_its_steps_and_nothing_else(stopped, finished, capsys):
    weights = stopped / "checkpoints/step-000002/model/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    assert train(stopped, *SAME) == 0
    loud, where = said(capsys)
    assert loud.startswith(f"CORRUPT CHECKPOINT: {weights} has 1000 bytes, and ")
    assert where == f"the run in {stopped} goes on from step 1"
    assert "corrupt-step-000002" in checkpoints(stopped)
    assert results(stopped) == results(finished)
    assert transcripts(stopped) == transcripts(finished)


def test_when_all_checkpoints_are_corrupt_no_restart_begins_anew(stopped, capsys):
    """Supervisors restart what fails: the second start must not take the run for one without checkpoints."""
    for path in (stopped / "checkpoints").glob("step-*"):
        (path / "run.json").write_text("{}")
    assert train(stopped, *SAME) == 2
    assert "all of them are corrupt" in said(capsys)[-1]
    metrics = (stopped / "metrics.jsonl").read_bytes()
    for _ in range(2):
        why = refusal(capsys, "train", *SMALL, f"run_dir={stopped}", *SAME)
        assert f"the checkpoints of {stopped} are corrupt, corrupt-step-000002 the last" in why
    assert (stopped / "metrics.jsonl").read_bytes() == metrics


def test_a_corrupt_cold_start_is_not_taken_for_the_reference(stopped, capsys):
    weights = stopped / "sft/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    assert "/sft/model.safetensors has sha256 " in refusal(capsys, "train", f"resume={stopped}")


# -- kill -9 ----------------------------------------------------------------------------------------------

TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
PATIENCE_S = (
    3600.0 if "OTCRL_LONG" in os.environ else 120.0
)  # for a run of several processes, on a machine that is busy


class Process:
    """`otcrl train` as somebody else starts it; on two ranks with `launcher=TORCHRUN`."""

    def __init__(self, folder: Path, words: Sequence[str], launcher: Sequence[str] = ()) -> None:
        self.err = (folder.parent / f"{folder.name}.err").open("ab")
        self._process = subprocess.Popen(
            [sys.executable, *launcher, "-m", "otcrl", "train", *words, f"run_dir={folder}"],
            cwd=ROOT, stdout=subprocess.DEVNULL, stderr=self.err, env=os.environ | {"OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        self.begun = time.monotonic()

    @property
    def log(self) -> str:
        return Path(self.err.name).read_text()

    def until(self, is_there: Callable[[], bool], pause: float) -> bool:
        """False when the process has ended before."""
        while not is_there():
            if self._process.poll() is not None:
                return False
            assert time.monotonic() < self.begun + PATIENCE_S, self.log
            time.sleep(pause)
        return True

    def kill(self) -> bool:
        """Without a word of warning, with all ranks. False when it had ended before."""
        for pid in (self._process.pid, *descendants(self._process.pid)):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return self.wait() == -signal.SIGKILL

    def terminate(self) -> None:
        self._process.terminate()

    def wait(self) -> int:
        return self._process.wait(timeout=PATIENCE_S)


def size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def killed(process: Process, folder: Path, moment: str, chance: float) -> bool:
    """Kills the run once it has made a step: in the next one's rollout or update, or while a checkpoint is written.

    `chance`: how far into it, from 0 to 1, going by how long it took in the last step.
    """
    log, told, writing = folder / "metrics.jsonl", folder / "transcripts.jsonl", folder / "checkpoints"
    began = size(log)
    process.until(lambda: size(log) > began, 0.005)
    before, last = size(told), lines(log)[-1]
    if moment == "update":  # what was played is written down before it is learned from
        process.until(lambda: size(told) > before, 0.0005)
    if moment == "saving":
        process.until(lambda: any(writing.glob(".writing-*")), 0.0002)
    time.sleep(chance * {"rollout": last["time/rollout_s"], "update": last["time/update_s"], "saving": 0.02}[moment])
    return process.kill()


KILLED = [
    *SMALL, "task.held_out_per_kind=5", "model.width=32", "sft.steps=60", "sft.batch_size=60", "evaluate.before=true",
    "loop.problems_per_step=6", "rollout.group_size=8", "loop.transcripts_every=1", "algo.kl_coef=0.01",
    "rollout.schedule.ahead=0",
]  # fmt: skip


def is_as_if_nothing_had_happened(run: Path, whole: Path) -> None:
    assert results(run) == results(whole)
    assert transcripts(run) == transcripts(whole)
    assert summary(run) == summary(whole)
    assert any(row["calls"] for row in transcripts(whole)), "no tool was called, so nothing is shown"
    weights = [(folder / "model/model.safetensors").read_bytes() for folder in (run, whole)]
    assert weights[0] == weights[1]
    assert not list(run.parent.glob("run.*/")), "it was not moved aside"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "kills"),
    [
        pytest.param((), 3, id="3-kills"),
        pytest.param(TORCHRUN, 2, id="two-ranks-2-kills"),
        pytest.param((), 20, id="20-kills", marks=LONG),
        pytest.param(TORCHRUN, 20, id="two-ranks-20-kills", marks=LONG),
    ],
)
def test_whatever_moment_it_is_killed_at_a_run_ends_as_if_nothing_had_happened(launcher, kills, tmp_path):
    chance = random.Random(0)
    words = [*KILLED, f"loop.steps={4 * kills}"]
    whole, run = tmp_path / "whole", tmp_path / "run"
    first = Process(whole, words, launcher)
    assert first.wait() == 0, first.log
    for number in range(kills):
        moment = ("update", "saving", "rollout")[number % 3]
        process = Process(run, words, launcher)
        assert killed(process, run, moment, chance.random()), f"it was over before kill {number + 1}\n{process.log}"
        print(f"kill {number + 1} in {moment}, after step {steps(run)[-1]}")
    last = Process(run, words, launcher)
    assert last.wait() == 0, last.log
    is_as_if_nothing_had_happened(run, whole)


def test_a_kill_in_the_cold_start_costs_no_more_than_the_cold_start(tmp_path, finished):
    words = [*SMALL, *SAME, "sft.steps=2000"]
    process = Process(tmp_path / "run", words)
    assert process.until(lambda: size(tmp_path / "run/sft.jsonl") > 0, 0.01), process.log
    assert process.kill()
    assert not (tmp_path / "run/sft").exists()
    (tmp_path / "run/config.yaml").write_text((finished / "config.yaml").read_text())  # a short one, to go on with
    assert train(tmp_path / "run", *SAME) == 0
    assert results(tmp_path / "run") == results(finished)
    assert len(lines(tmp_path / "run/sft.jsonl")) == 2


# -- SIGTERM ----------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "is_there", "done"),
    [
        (["loop.problems_per_step=300", "rollout.group_size=16"], lambda run: size(run / "metrics.jsonl") > 0, None),
        (["learner.minibatch_size=1", "learner.epochs=40"], lambda run: (run / "sft/config.json").exists(), 1),
    ],
    ids=["rollout", "update"],
)
def test_sigterm_saves_where_the_run_stands_and_is_a_good_end(settings, is_there, done, tmp_path):
    words = [*SMALL, "loop.steps=1000", "loop.checkpoint_every=0", *settings]
    process = Process(tmp_path / "run", words)
    assert process.until(lambda: is_there(tmp_path / "run"), 0.01), process.log
    time.sleep(0.5)
    process.terminate()
    began = time.monotonic()
    assert process.wait() == 0, process.log
    assert time.monotonic() - began < 20
    assert "SIGTERM: the run is saved and ends" in process.log
    made = len(steps(tmp_path / "run"))
    assert made >= (done or 1)
    assert checkpoints(tmp_path / "run") == [f"step-{made:06d}"]
    assert not (tmp_path / "run/summary.json").exists()


def test_what_sigterm_interrupted_is_as_if_it_had_not_been(stopped, finished, monkeypatch, capsys):
    """The signal comes while the third step plays, and the step is dropped."""
    from otcrl.rollout.collect import Collector

    real, calls = Collector.group, []

    async def group(*args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return await real(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Collector, "group", group)
        assert train(stopped, *SAME) == 0
    assert f"{stopped} is saved, and the same command goes on with it" in said(capsys)
    assert steps(stopped) == [0, 1]
    assert train(stopped, *SAME) == 0
    assert results(stopped) == results(finished)
    assert transcripts(stopped) == transcripts(finished)


def test_sigterm_on_a_full_disk_is_no_good_end(tmp_path, monkeypatch, capsys):
    """A cluster's script would take exit code 0 for good, and nothing is there to go on with."""
    from otcrl.saver import Saver

    real = Saver.save

    def save(*args: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        real(*args)

    def write(path: Path, tensors: Mapping[str, Tensor]) -> str:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(Saver, "save", save)
        patch.setattr(checkpoint, "write_tensors", write)
        assert train(tmp_path / "run", "loop.steps=9", "sft.steps=0") == 1
    assert said(capsys)[-1].startswith("error: the run ends, and checkpoint step-000001 could not be written: No space")


# -- a full disk ------------------------------------------------------------------------------------------


def test_what_could_not_be_written_in_the_end_is_an_error_after_everything_else_was(tmp_path, monkeypatch, capsys):
    real = checkpoint.write_tensors

    def write(path: Path, tensors: Mapping[str, Tensor]) -> str:
        if "step-000002" in str(path) or path.parent.name == ".writing-model":
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        return real(path, tensors)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "write_tensors", write)
        assert train(tmp_path / "run") == 1
    shown = said(capsys)
    assert any(line.startswith("FAILED: checkpoint step-000002 could not be written: No space left") for line in shown)
    assert "Training goes on; step-000001 still holds" in "".join(shown)
    assert shown[-1].startswith("error: the run is finished, but not everything is on disk: ")
    assert checkpoints(tmp_path / "run") == ["step-000001"]
    assert lines(tmp_path / "run/metrics.jsonl")[-1]["checkpoint/failed"] == 1
    assert not (tmp_path / "run/summary.json").exists()
    assert train(tmp_path / "run") == 0  # once there is room the same command makes up for it
    assert (tmp_path / "run/model/model.safetensors").is_file()
    assert not (tmp_path / "run.1").exists()


def can_mount() -> bool:
    if shutil.which("unshare") is None:
        return False
    return subprocess.run(["unshare", "-rm", "mount", "-t", "tmpfs", "x", "/mnt"], capture_output=True).returncode == 0


ON_A_SMALL_DISK = """
import pathlib, shutil, subprocess, sys, time
disk, left, *command = sys.argv[1:]
disk, left = pathlib.Path(disk), pathlib.Path(left)
said = left.with_suffix(".err")
run = subprocess.Popen(command, stderr=said.open("w"))
def until(is_there):
    while not is_there() and run.poll() is None:
        time.sleep(0.002)
until(lambda: (disk / "run/checkpoints/step-000001").exists())
with open(disk / "filler", "wb", buffering=0) as filler:
    try:
        while True:
            filler.write(bytes(4096))
    except OSError:
        pass
until(lambda: said.read_text().count("FAILED: checkpoint") > 1)
(disk / "filler").unlink()
code = run.wait()
shutil.copytree(disk / "run", left)
sys.exit(code)
"""


@pytest.mark.slow
@pytest.mark.skipif(not can_mount(), reason="needs user namespaces to mount a small disk")
def test_a_full_disk_costs_checkpoints_and_not_the_run(tmp_path):
    """The disk is filled after the first checkpoint; there is room again once two could not be written."""
    disk, left = tmp_path / "disk", tmp_path / "left"
    disk.mkdir()
    words = [*SMALL, "loop.steps=30", "loop.transcripts_every=1", f"run_dir={disk}/run"]
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", f'mount -t tmpfs -o size=4m x {disk} && exec "$@"', "sh",
         sys.executable, "-c", ON_A_SMALL_DISK, disk, left, sys.executable, "-m", "otcrl", "train", *words],
        cwd=ROOT, capture_output=True, text=True, timeout=120, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    err = left.with_suffix(".err").read_text()
    assert done.returncode == 0, err + done.stderr
    assert re.search("FAILED: checkpoint step-.* could not be written: No space left on device", err)
    assert "Training goes on; step-000001 still holds" in err
    assert steps(left) == list(range(31))
    assert max(row.get("checkpoint/failed", 0) for row in lines(left / "metrics.jsonl")) >= 2
    assert checkpoints(left) == ["step-000029", "step-000030"]
