"""SIGTERM, as clusters send it before they take a machine away: the run saves where it stands, and ends well."""

from __future__ import annotations

import asyncio
import signal
import threading
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import suppress
from typing import Any, TypeVar

from otcrl import dist
from otcrl.tell import tell

T = TypeVar("T")


class Terminated(Exception):
    """The run was asked to end."""


class Termination:
    """Whether the run was asked to end. To be asked again changes nothing: Slurm may ask by several ways at once."""

    def __init__(self) -> None:
        self._asked = asyncio.Event()

    def listen(self) -> None:
        """From now on, in the running event loop; only a process's main thread may."""
        if threading.current_thread() is threading.main_thread():
            asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, self._hear)

    def _hear(self) -> None:
        self._asked.set()
        asyncio.get_running_loop().remove_signal_handler(signal.SIGTERM)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # to the very end: Python undoes handlers of its own before that
        if dist.is_first():
            tell("SIGTERM: the run is saved and ends; Ctrl-C or kill -9 ends it at once")

    def check(self) -> None:
        """Raises Terminated, on all ranks or none."""
        if dist.largest(int(self._asked.is_set()), "whether to end"):
            raise Terminated

    async def unless(self, work: Coroutine[Any, Any, T]) -> T:
        """Its result, unless the run is asked to end: then it is cancelled. Raises Terminated.

        With several ranks it is not cancelled, since inside it they wait for each other.
        """
        return await work if dist.size() > 1 else await self._unless_asked(work)

    async def all_unless(
        self, work: Coroutine[Any, Any, T], thread: Callable[[Callable[[], None]], Awaitable[None]]
    ) -> T:
        """The same for work of this rank alone, which waits for no other: all ranks drop theirs, or none does.

        `thread` runs what waits for the other ranks.
        """
        found: list[T] = []
        with suppress(Terminated):
            found.append(await self._unless_asked(work))
        await thread(self.check)
        return found[0]

    async def _unless_asked(self, work: Coroutine[Any, Any, T]) -> T:
        working, asked = asyncio.ensure_future(work), asyncio.ensure_future(self._asked.wait())
        try:
            await asyncio.wait([working, asked], return_when=asyncio.FIRST_COMPLETED)
            if (
                self._asked.is_set()
            ):  # also where the work has failed: its tools and engines may have been asked to end too
                raise Terminated
            return working.result()
        finally:
            for task in (working, asked):
                task.cancel()
            await asyncio.gather(working, asked, return_exceptions=True)  # what cancelling did not stop is in `working`
