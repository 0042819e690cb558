"""SIGTERM, as clusters send it before they take a machine away: the run saves where it stands, and ends well."""

from __future__ import annotations

import asyncio
import signal
import sys
import threading
from collections.abc import Coroutine
from typing import Any, TypeVar

from otcrl import dist

T = TypeVar("T")


class Terminated(Exception):
    """The run was asked to end."""


class Termination:
    """Whether the run was asked to end. The second signal ends the process at once."""

    def __init__(self) -> None:
        self._asked = asyncio.Event()

    def listen(self) -> None:
        """From now on, in the running event loop; only a process's main thread may."""
        if threading.current_thread() is threading.main_thread():
            asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, self._hear)

    def _hear(self) -> None:
        self._asked.set()
        asyncio.get_running_loop().remove_signal_handler(signal.SIGTERM)
        print("otcrl: SIGTERM: the run is saved and ends; a second one ends it at once", file=sys.stderr, flush=True)

    def check(self) -> None:
        """Raises Terminated, on all ranks or none."""
        if dist.largest(int(self._asked.is_set()), "whether to end"):
            raise Terminated

    async def unless(self, work: Coroutine[Any, Any, T]) -> T:
        """Its result, unless the run is asked to end: then it is cancelled. Raises Terminated.

        With several ranks it is not cancelled, since the others would wait for this one: they agree in `check`.
        """
        if dist.size() > 1:
            return await work
        working, asked = asyncio.ensure_future(work), asyncio.ensure_future(self._asked.wait())
        try:
            await asyncio.wait([working, asked], return_when=asyncio.FIRST_COMPLETED)
            if working.done():
                return working.result()
            raise Terminated
        finally:
            for task in (working, asked):
                task.cancel()
            await asyncio.gather(working, asked, return_exceptions=True)  # what cancelling did not stop is in `working`
