"""The learner computes in a thread of its own: the same numbers, an event loop that lives, and Ctrl-C that works."""

from __future__ import annotations

import asyncio
import threading
import time

import pytest
import torch

from otcrl.errors import TrainingError
from otcrl.learner.thread import LearnerThread, stop_if_cancelled
from tests.test_learner import grpo, make_learner, random_batch

CPU = torch.device("cpu")


def test_an_update_in_the_thread_is_bit_for_bit_the_update_outside():
    async def update(aside: bool) -> list[torch.Tensor]:
        learner, algo, batch, thread = make_learner(grpo()), grpo(), random_batch(), LearnerThread(CPU)
        if aside:
            scores = await thread(learner.score, batch)
            await thread(learner.update, 0, batch, scores, algo.targets(batch, scores), algo)
        else:
            scores = learner.score(batch)
            learner.update(0, batch, scores, algo.targets(batch, scores), algo)
        thread.close()
        return list(learner.policy.parameters())

    inside, outside = asyncio.run(update(True)), asyncio.run(update(False))
    assert all(torch.equal(a, b) for a, b in zip(inside, outside, strict=True))


def test_it_is_always_the_same_thread_and_not_that_of_the_event_loop():
    async def main() -> set[int]:
        thread = LearnerThread(CPU)
        found = {await thread(threading.get_ident) for _ in range(5)}
        thread.close()
        return found

    found = asyncio.run(main())
    assert len(found) == 1
    assert found != {threading.get_ident()}


def test_its_gpu_is_the_learners(monkeypatch):
    """Threads do not share the current GPU: without this, ranks above 0 would allocate on the first one."""
    chosen: list[tuple[int, torch.device]] = []
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: chosen.append((threading.get_ident(), device)))

    async def main() -> int:
        thread = LearnerThread(torch.device("cuda", 3))
        identity = await thread(threading.get_ident)
        thread.close()
        return identity

    assert chosen == [(asyncio.run(main()), torch.device("cuda", 3))]


def test_the_event_loop_goes_on_meanwhile():
    async def main() -> int:
        thread, done, turns = LearnerThread(CPU), threading.Event(), 0
        task = asyncio.ensure_future(thread(done.wait, 10))
        while turns < 100:
            await asyncio.sleep(0)
            turns += 1
        done.set()
        assert await task
        thread.close()
        return turns

    assert asyncio.run(main()) == 100


def test_what_the_function_raises_is_raised():
    def broken() -> None:
        raise TrainingError("loss is nan")

    with pytest.raises(TrainingError, match="loss is nan"):
        asyncio.run(LearnerThread(CPU)(broken))


def test_a_cancellation_ends_a_long_computation_at_the_next_place_where_it_can_stop():
    passes = 0

    def long() -> None:
        nonlocal passes
        while True:
            stop_if_cancelled()
            time.sleep(0.001)
            passes += 1

    async def main() -> None:
        thread = LearnerThread(CPU)
        task = asyncio.ensure_future(thread(long))
        await asyncio.sleep(0.02)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        before = passes
        await asyncio.sleep(0.02)
        assert passes == before  # it is over when the cancellation is
        assert await thread(lambda: "fit for work") == "fit for work"
        thread.close()

    asyncio.run(main())
    assert passes > 0


def test_outside_of_the_thread_nobody_cancels():
    stop_if_cancelled()
