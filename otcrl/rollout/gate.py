"""Whether an engine takes requests: a publication of weights closes it, and opens it when they have arrived."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from typing import Any

from otcrl.errors import EngineError

LOOK_S = 1.0  # how often who waits looks whether the engine is broken


class Common:
    """Work that several wait for: it goes on when one of them is cancelled, such as a trajectory whose time is up."""

    def __init__(self) -> None:
        self._task: asyncio.Task[None] | None = None

    async def done(self, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Returns when `work` is done, or what is under way. Raises what it raises."""
        if self._task is None:
            self._task = asyncio.create_task(work())
            self._task.add_done_callback(self._over)
        await asyncio.shield(self._task)

    def _over(self, task: asyncio.Task[None]) -> None:
        self._task = None
        if not task.cancelled():
            task.exception()  # it is known to who waits; if nobody does, the gate has the reason

    async def cancel(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])


class Gate:
    """Mutable. Closed until the first publication."""

    def __init__(self) -> None:
        self.exclusive = asyncio.Lock()  # start, publication, sleep, revival: one at a time
        self.broken = ""  # why nothing can be generated any more
        self._open = asyncio.Event()

    @property
    def is_open(self) -> bool:
        return self._open.is_set()

    def open(self) -> None:
        self._open.set()

    def close(self) -> None:
        self._open.clear()

    def check(self) -> None:
        """Raises EngineError when the engine is broken, unless somebody is at it."""
        if self.broken and not self.exclusive.locked():
            raise EngineError(self.broken)

    async def passed(self) -> None:
        """Returns when requests may be submitted. Raises EngineError when that will not be."""
        while not self.is_open:
            self.check()
            with suppress(TimeoutError):
                async with asyncio.timeout(LOOK_S):  # wait_for of Python 3.11 would swallow a cancellation
                    await self._open.wait()

    @asynccontextmanager
    async def publishing(self, version: int, to: str) -> AsyncIterator[None]:
        """Open afterwards, if all went well; else broken until another publication succeeds."""
        async with self.exclusive:
            self.close()
            self.broken = f"version {version} of the weights did not reach {to}"
            with self.breaking():
                yield
            self.broken = ""
            self.open()

    @contextmanager
    def breaking(self) -> Iterator[None]:
        """An EngineError in the body breaks the engine: whoever waits is told the same."""
        try:
            yield
        except EngineError as error:
            self.broken = str(error)
            raise


@asynccontextmanager
async def deadline(seconds: float, doing: str) -> AsyncIterator[None]:
    """Raises EngineError when the body takes longer."""
    limit = asyncio.timeout(seconds)
    try:
        async with limit:
            yield
    except TimeoutError as error:
        if not limit.expired():
            raise
        raise EngineError(f"{doing} took more than engine.sync_timeout_s={seconds:g} s") from error
