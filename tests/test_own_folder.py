"""What a process leaves behind is removed when it ends, or by the next one."""

from __future__ import annotations

import fcntl
import multiprocessing
import os
import signal
from pathlib import Path

from otcrl.rollout.own_folder import OwnFolder
from otcrl.rollout.snapshot import Snapshot


def killed_in_its_folder(within: Path) -> None:
    folder = OwnFolder(within)
    (folder.path / "socket").touch()
    os.kill(os.getpid(), signal.SIGKILL)


def test_the_folder_of_a_killed_process_is_removed_by_the_next_and_no_other(tmp_path):
    live, foreign = OwnFolder(tmp_path), tmp_path / f"otcrl-{os.uname().nodename}-foreign"
    foreign.mkdir()
    process = multiprocessing.get_context("fork").Process(target=killed_in_its_folder, args=(tmp_path,))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert len(list(tmp_path.iterdir())) == 3
    next_one = OwnFolder(tmp_path)
    assert set(tmp_path.iterdir()) == {live.path, foreign, next_one.path}
    live.close()
    next_one.close()
    assert list(tmp_path.iterdir()) == [foreign]


def killed_with_weights_in(folder: Path) -> None:
    held = Snapshot(folder)
    os.kill(os.getpid(), signal.SIGKILL)
    held.close()


def test_the_weights_of_a_killed_process_do_not_fill_the_disk(tmp_path):
    process = multiprocessing.get_context("fork").Process(target=killed_with_weights_in, args=(tmp_path,))
    process.start()
    process.join()
    assert len(list(tmp_path.glob("*/weights"))) == 1
    next_one = Snapshot(tmp_path)
    assert list(tmp_path.glob("*/weights")) == [next_one.path]
    next_one.close()
    assert not list(tmp_path.iterdir())


def test_another_machines_folder_stays_though_its_lock_is_not_seen_here(tmp_path):
    theirs = tmp_path / "otcrl-elsewhere-x"
    theirs.mkdir()
    (theirs / "owned").touch()
    OwnFolder(tmp_path).close()
    assert list(tmp_path.iterdir()) == [theirs]


def test_a_file_system_without_locks_will_do(tmp_path, monkeypatch):
    def no_locks(*_: object) -> None:
        raise OSError("Function not implemented")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    first, second = OwnFolder(tmp_path), OwnFolder(tmp_path)
    assert set(tmp_path.iterdir()) == {first.path, second.path}
    first.close()
    second.close()
