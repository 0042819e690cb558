"""docker/slurm/train.sbatch. Slurm's commands are played by a few lines of shell; the rest is real, on two ranks."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.test_bad_input import ATLAS, ROOT, checkpoints, steps

SRUN = """#!/bin/bash
# the job step on one machine: a process for each task, and SIGTERM is handed on to all of them, and said once more
while [[ $1 == --* ]]; do shift; done
for ((i = 0; i < SLURM_NTASKS; i++)); do
    SLURM_PROCID=$i SLURM_LOCALID=$i "$@" & tasks+=($!)
done
trap 'kill -TERM "${tasks[@]}"; sleep 0.3; kill -TERM "${tasks[@]}"' TERM
code=0
for task in "${tasks[@]}"; do
    while kill -0 "$task" 2>/dev/null; do wait "$task"; done
    wait "$task"; last=$?
    ((last == 0)) || code=$last
done
echo "srun ends with $code" >> "$FAKE_LOG"
exit $code
"""
SCONTROL = """#!/bin/bash
case $1 in
    show) echo 127.0.0.1 ;;
    requeue) echo "requeue $2" >> "$FAKE_LOG" ;;
esac
"""


class Slurm:
    """`sbatch docker/slurm/train.sbatch WORDS`, on this machine."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.run = folder / "run"
        python = f'#!/bin/sh\nexec {sys.executable} "$@"\n'
        for name, script in (("srun", SRUN), ("scontrol", SCONTROL), ("python", python)):
            (folder / name).write_text(script)
            (folder / name).chmod(0o755)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self._port = free.getsockname()[1]

    def sbatch(self, *words: str) -> subprocess.Popen[bytes]:
        own = {"SLURM_NTASKS": "2", "SLURM_JOB_ID": "77", "SLURM_JOB_NODELIST": "here", "MASTER_PORT": str(self._port)}
        paths = {"PATH": f"{self._folder}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
        own |= {**paths, "FAKE_LOG": str(self._folder / "log"), "OMP_NUM_THREADS": "1"}
        with (self._folder / "err").open("ab") as err:
            return subprocess.Popen(
                ["bash", ROOT / "docker/slurm/train.sbatch", *ATLAS, *words, f"run_dir={self.run}"],
                cwd=ROOT, env=os.environ | own, stdout=subprocess.DEVNULL, stderr=err,
            )  # fmt: skip

    @property
    def said(self) -> list[str]:
        log = self._folder / "log"
        return log.read_text().splitlines() if log.exists() else []

    @property
    def err(self) -> str:
        return (self._folder / "err").read_text()


def until(happened: Callable[[], bool], job: subprocess.Popen[bytes], slurm: Slurm) -> None:
    begun = time.monotonic()
    while not happened():
        assert job.poll() is None, slurm.err
        assert time.monotonic() < begun + 120, slurm.err
        time.sleep(0.02)


@pytest.mark.slow
def test_a_preempted_job_saves_on_all_ranks_is_queued_again_and_goes_on(tmp_path):
    """Slurm says it more than once, to the script and to the processes; the step that plays would take minutes."""
    slurm = Slurm(tmp_path)
    long = ("loop.steps=1000", "loop.checkpoint_every=0", "loop.problems_per_step=300", "rollout.group_size=16")
    job = slurm.sbatch(*long)
    until(lambda: (slurm.run / "metrics.jsonl").exists() and steps(slurm.run) != [], job, slurm)
    begun = time.monotonic()
    for _ in range(3):
        job.send_signal(signal.SIGTERM)
        time.sleep(0.2)
    assert job.wait(timeout=60) == 0, slurm.err
    assert time.monotonic() - begun < 20
    assert slurm.said == ["srun ends with 0", "requeue 77"]
    assert slurm.err.count("SIGTERM: the run is saved and ends") == 1
    made = len(steps(slurm.run))
    assert checkpoints(slurm.run) == [f"step-{made:06d}"]

    again = slurm.sbatch(*long, f"loop.steps={made + 1}", "resume_changed=true")
    assert again.wait(timeout=120) == 0, slurm.err
    assert f"goes on from step {made}" in slurm.err
    assert (slurm.run / "summary.json").is_file()
    assert slurm.said == ["srun ends with 0", "requeue 77", "srun ends with 0"]


@pytest.mark.slow
def test_a_job_that_fails_is_not_queued_again(tmp_path):
    slurm = Slurm(tmp_path)
    assert slurm.sbatch("rollout.temperature=0").wait(timeout=120) == 2
    assert slurm.said == ["srun ends with 2"]


@pytest.mark.slow
def test_a_job_whose_time_ends_when_its_run_is_finished_is_not_queued_again(tmp_path):
    """It would move the run aside and begin anew."""
    slurm = Slurm(tmp_path)
    job = slurm.sbatch()
    until((slurm.run / "summary.json").exists, job, slurm)
    job.send_signal(signal.SIGTERM)
    assert job.wait(timeout=60) == 0, slurm.err
    assert "requeue 77" not in slurm.said
