"""A clock of decode steps for tool calls, so that a run repeats itself to the last bit.

What a forward pass computes for a trajectory changes by 1e-7 with the company it has. Who meets whom would depend on
how long tools take; so a call of a tool that answers from this machine takes a fixed number of decode steps, whatever
the wall clock says: an answer that comes sooner is held back, and for one that comes later the engine waits.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, nullcontext
from dataclasses import dataclass

from otcrl.protocols import Engine, Tool


@dataclass(slots=True, eq=False)
class Held:
    """A call under way, or answered before its time."""

    due: int  # decode step before which it comes back
    go: asyncio.Future[None]
    is_over: bool = False


class Pace:
    """An engine's decode steps, counted; `call` holds what is inside to them.

    A call that is late is waited for, for `patience_s`; after that, when it comes is left to chance.
    """

    def __init__(self, steps: int, patience_s: float) -> None:
        self._steps, self._patience_s = steps, patience_s
        self._now = 0
        self._held: list[Held] = []
        self._changed = asyncio.Event()

    @property
    def is_holding(self) -> bool:
        return bool(self._held)

    @asynccontextmanager
    async def call(self) -> AsyncIterator[None]:
        """Left `steps` decode steps after it was entered."""
        held = Held(self._now + self._steps, asyncio.get_running_loop().create_future())
        self._held.append(held)
        try:
            yield
            held.is_over = True
            self._changed.set()
            await held.go
        finally:
            held.is_over = True  # also if it was cancelled
            self._changed.set()
            if held in self._held:
                self._held.remove(held)

    async def tick(self, *, idle: bool) -> bool:
        """Before a decode step: waits for the calls that are due and lets them go. Whether there were any.

        With nothing else to do (`idle`), the next calls are due at once.
        """
        self._now += 1
        if idle and self._held:
            self._now = max(self._now, min(held.due for held in self._held))
        due = [held for held in self._held if held.due <= self._now]
        deadline = asyncio.get_running_loop().time() + self._patience_s
        while not all(held.is_over for held in due):
            self._changed.clear()
            try:
                async with asyncio.timeout_at(deadline):
                    await self._changed.wait()
            except TimeoutError:
                break
        self._let_go(due)
        return bool(due)

    def let_go(self) -> None:
        """All of them: the engine has stopped."""
        self._let_go(list(self._held))

    def _let_go(self, due: list[Held]) -> None:
        for held in due:
            if not held.go.done():
                held.go.set_result(None)
            if held in self._held:
                self._held.remove(held)


def paced(engine: Engine, tool: Tool) -> AbstractAsyncContextManager[None]:
    """What a call of `tool` runs in: the engine's pace, if it has one and the tool answers from this machine."""
    return in_pace(engine) if getattr(tool, "is_local", False) else nullcontext()


def in_pace(engine: Engine) -> AbstractAsyncContextManager[None]:
    """For whatever trajectories to come wait for, beside tools."""
    begin = getattr(engine, "pace", None)
    return begin() if begin is not None else nullcontext()
