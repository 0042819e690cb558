"""A tool call takes a fixed number of decode steps, so that no clock decides who shares a forward pass."""

from __future__ import annotations

import asyncio
import random

import pytest
import torch

from otcrl.errors import ConfigError
from otcrl.rollout.hf_engine import HFEngine
from otcrl.rollout.pace import Pace, paced
from tests.test_hf_engine import OBSERVATION, TOKENIZER, VOCAB, ask, prompt
from tests.tiny import tiny_llama
from tests.virtual import run

PATIENCE_S = 1.0


class Ticker:
    """An engine that only counts: a step takes a second."""

    def __init__(self, steps: int) -> None:
        self.pace, self.log, self.step = Pace(steps, PATIENCE_S), [], 0

    async def call(self, name: str, seconds: float) -> None:
        async with self.pace.call():
            await asyncio.sleep(seconds)
        self.log.append((name, self.step))

    async def go_on(self, steps: int, *, idle: bool = False) -> None:
        for _ in range(steps):
            self.step += 1
            await self.pace.tick(idle=idle)
            await asyncio.sleep(1.0)


@pytest.mark.parametrize("seconds", [0.0, 0.9, 2.5, 3.9], ids="{}s".format)
def test_an_answer_comes_back_in_its_step_however_soon_it_is_there(seconds):
    async def scene() -> list[tuple[str, int]]:
        engine = Ticker(steps=4)
        call = asyncio.create_task(engine.call("a", seconds))
        await asyncio.sleep(0)
        await engine.go_on(8)
        await call
        return engine.log

    assert run(scene()) == [("a", 4)]


def test_the_engine_waits_for_an_answer_that_is_late_and_not_for_ever():
    async def scene(seconds: float) -> tuple[list[tuple[str, int]], float]:
        engine = Ticker(steps=2)
        calls = [asyncio.create_task(engine.call(*each)) for each in (("late", seconds), ("in time", 0.1))]
        await asyncio.sleep(0)
        begun = asyncio.get_running_loop().time()
        await engine.go_on(6)
        took = asyncio.get_running_loop().time() - begun
        await asyncio.gather(*calls)
        return engine.log, took

    assert run(scene(1.0 + PATIENCE_S / 2)) == ([("late", 2), ("in time", 2)], 6 + PATIENCE_S / 2)
    log, took = run(scene(4.5))  # the engine gives up after PATIENCE_S, and it comes back when it is there
    assert log == [("in time", 2), ("late", 4)]
    assert took == 6 + PATIENCE_S


def test_with_nothing_else_to_do_the_next_answers_are_awaited_at_once():
    async def scene() -> tuple[list[tuple[str, int]], float]:
        engine = Ticker(steps=100)
        calls = [asyncio.create_task(engine.call(*each)) for each in (("a", 0.5), ("b", 0.2))]
        await asyncio.sleep(0)
        await engine.go_on(1, idle=True)
        await asyncio.gather(*calls)
        return engine.log, asyncio.get_running_loop().time()

    assert run(scene()) == ([("a", 1), ("b", 1)], 1.5)


def test_a_call_that_is_cancelled_or_fails_holds_nobody_up():
    async def scene() -> float:
        engine = Ticker(steps=2)
        hangs = asyncio.create_task(engine.call("hangs", 1000))

        async def fails() -> None:
            async with engine.pace.call():
                raise ConnectionError

        failed = asyncio.create_task(fails())
        asyncio.get_running_loop().call_later(1.1, hangs.cancel)
        await asyncio.sleep(0)
        await engine.go_on(4)
        await asyncio.gather(hangs, failed, return_exceptions=True)
        assert not engine.pace.is_holding
        return asyncio.get_running_loop().time()

    assert run(scene()) == pytest.approx(4.1)


class Local:
    name = "python"
    is_local = True


def test_only_tools_on_this_machine_are_waited_for():
    class Far(Local):
        is_local = False

    class Engine:
        asked = 0

        def pace(self) -> None:
            self.asked += 1

    engine = Engine()
    for tool in (Local(), Far(), object()):
        paced(engine, tool)  # pyright: ignore  # the parts that matter
        paced(object(), tool)  # pyright: ignore
    assert engine.asked == 1


# -- the embedded engine ----------------------------------------------------------------------------------


def engine(tool_steps: int, slots: int = 64) -> HFEngine:
    return HFEngine(
        model=tiny_llama(VOCAB), tokenizer=TOKENIZER, max_sequences=slots, context=512, batch_tokens=64,
        tool_steps=tool_steps,
    )  # fmt: skip


async def play(target: HFEngine, i: int, clock: random.Random) -> tuple[list[int], list[float]]:
    """A trajectory with two tool calls that take as long as `clock` says."""
    ids, logprobs = prompt(i), []
    for turn in range(3):
        completion = await ask(target, ids, stop=(">",), max_tokens=5 + 3 * (i % 5), seed=i, session=str(i))
        ids, logprobs = ids + completion.token_ids, logprobs + completion.logprobs
        if turn < 2:
            async with target.pace():
                await asyncio.sleep(clock.choice((0, 0, 0.002, 0.02)))
            ids = ids + OBSERVATION
    target.release(str(i))
    return ids, logprobs


def played(tool_steps: int, seed: int, slots: int = 64) -> tuple[list[tuple[list[int], list[float]]], int]:
    """16 trajectories, at most 8 at a time; and the engine's steps."""

    async def all_of_them() -> tuple[list[tuple[list[int], list[float]]], int]:
        target, clock, places = engine(tool_steps, slots), random.Random(seed), asyncio.Semaphore(8)

        async def one(i: int) -> tuple[list[int], list[float]]:
            async with places:
                return await play(target, i, clock)

        found = await asyncio.gather(*(one(i) for i in range(16)))
        await target.close()
        return list(found), target.stats.steps

    return asyncio.run(asyncio.wait_for(all_of_them(), 60))


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("slots", [64, 5], ids=["room-for-all", "caches-are-evicted"])
def test_logprobs_are_the_same_to_the_last_bit_however_long_tools_take(slots):
    runs = [played(4, seed, slots) for seed in range(4)]
    assert all(run == runs[0] for run in runs)


def test_without_it_they_are_the_same_to_1e_5_only():
    runs = [played(0, seed)[0] for seed in range(4)]
    assert any(run != runs[0] for run in runs), "who meets whom has not changed, so the test above shows nothing"
    for found in runs:
        for (ids, logprobs), (expected_ids, expected) in zip(found, runs[0], strict=True):
            assert ids == expected_ids
            assert logprobs == pytest.approx(expected, abs=1e-5, rel=1e-5)  # float32: of -5, 2e-6 are 1.05e-5


def test_an_engine_that_closes_or_fails_lets_its_callers_go():
    async def scene() -> None:
        target = engine(1000)
        await ask(target, prompt(0))
        waiting = asyncio.create_task(play(target, 1, random.Random(0)))
        await asyncio.sleep(0.05)
        await target.close()
        await asyncio.gather(waiting, return_exceptions=True)
        async with target.pace():  # and whoever calls a tool after that is not held
            pass

    asyncio.run(asyncio.wait_for(scene(), 20))


def test_fewer_than_no_steps_are_refused():
    with pytest.raises(ConfigError, match="tool_steps must be 0 or more, got -1"):
        engine(-1)
