"""Who waits while new weights are published goes on when they are there, or ends when it is told to."""

from __future__ import annotations

import asyncio

import pytest

from otcrl.rollout.gate import Gate


@pytest.mark.parametrize("turns", range(5), ids=lambda turns: f"{turns} turns after")
def test_a_trajectory_that_is_given_up_as_the_gate_opens_ends(turns):
    async def main() -> bool:
        gate = Gate()

        async def trajectory() -> None:
            await gate.passed()
            await asyncio.sleep(60)

        waiting = asyncio.create_task(trajectory())
        await asyncio.sleep(0.01)
        gate.open()
        for _ in range(turns):
            await asyncio.sleep(0)
        waiting.cancel()
        await asyncio.wait([waiting], timeout=5)
        return waiting.cancelled()

    assert asyncio.run(main())
