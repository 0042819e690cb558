"""SIGTERM on several ranks: all drop the step that plays, save, and end well, however often they are told."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time

import pytest

from tests.test_bad_input import ATLAS, ROOT, checkpoints, steps


@pytest.mark.slow
def test_two_ranks_drop_the_step_that_plays_and_save(tmp_path):
    """The step would take minutes. Told twice, as Slurm does: the second time while they end."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    run, long = tmp_path / "run", ("loop.steps=1000", "loop.checkpoint_every=0", "loop.problems_per_step=300")
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    words = [sys.executable, "-m", "otcrl", "train", *ATLAS, *long, "rollout.group_size=16", f"run_dir={run}"]
    with (tmp_path / "err").open("w") as err:
        ranks = [
            subprocess.Popen(
                words, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=err,
                env=os.environ | common | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            )
            for rank in range(2)
        ]  # fmt: skip
    begun = time.monotonic()
    while not ((run / "metrics.jsonl").exists() and steps(run)):
        assert all(rank.poll() is None for rank in ranks), (tmp_path / "err").read_text()
        assert time.monotonic() < begun + 120
        time.sleep(0.02)
    begun = time.monotonic()
    for _ in range(2):
        for rank in ranks:
            rank.send_signal(signal.SIGTERM)
        time.sleep(0.5)
    assert [rank.wait(timeout=60) for rank in ranks] == [0, 0], (tmp_path / "err").read_text()
    assert time.monotonic() - begun < 20
    assert (tmp_path / "err").read_text().count("SIGTERM: the run is saved and ends") == 1
    assert checkpoints(run) == [f"step-{len(steps(run)):06d}"]
