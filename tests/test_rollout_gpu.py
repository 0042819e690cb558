"""The benchmark that needs a GPU, as far as it goes without one."""

from __future__ import annotations

import importlib
import multiprocessing
from pathlib import Path
from typing import Any, cast


def starts_a_child(*_: object) -> float:
    """As vLLM does, for its engine."""
    child = multiprocessing.get_context("spawn").Process(target=int)
    child.start()
    child.join()
    return float(child.exitcode or 0)


def test_plain_vllm_runs_in_a_process_that_may_have_children(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    rollout_gpu = importlib.import_module("rollout_gpu")

    monkeypatch.setattr(rollout_gpu, "plain", starts_a_child)
    assert rollout_gpu.in_process(cast(Any, None), [], False) == 0
