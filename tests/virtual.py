"""An event loop whose clock is a number: whoever sleeps costs nothing, and a test of hours takes milliseconds."""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


class Clock(selectors.SelectSelector):
    """Where a loop would block until its next timer, the time is that of the timer at once."""

    now = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        ready = super().select(0)
        if not ready:
            assert timeout is not None, "everybody waits, and nothing will ever happen"
            self.now += timeout
        return ready


class VirtualLoop(asyncio.SelectorEventLoop):
    def __init__(self) -> None:
        self._clock = Clock()
        super().__init__(self._clock)

    def time(self) -> float:
        return self._clock.now


def run(main: Coroutine[Any, Any, T]) -> T:
    """As `asyncio.run`. Fails when a task is left pending, or an exception was never looked at."""
    wrong: list[str] = []
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        runner.get_loop().set_exception_handler(lambda loop, context: wrong.append(context["message"]))

        async def watched() -> T:
            try:
                return await main
            finally:
                wrong.extend(f"left pending: {task}" for task in asyncio.all_tasks() - {asyncio.current_task()})

        result = runner.run(watched())
    assert not wrong, wrong
    return result
