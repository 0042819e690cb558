"""A thread for the learner's long computations, so that the event loop goes on serving rollouts and Ctrl-C."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar, copy_context
from functools import partial
from typing import ParamSpec, TypeVar

import torch

from otcrl.models.devices import make_current

P = ParamSpec("P")
R = TypeVar("R")

_STOP: ContextVar[threading.Event] = ContextVar("stop")


class LearnerThread:
    """`await thread(function, *arguments)`: its result, computed in one thread, always the same."""

    def __init__(self, device: torch.device) -> None:
        """`device`: the learner's, which is the current one in the thread."""
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="learner", initializer=make_current, initargs=(device,))

    async def __call__(self, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """A cancellation is passed on to `stop_if_cancelled` in the thread, and takes effect when that has ended."""
        stop, context = threading.Event(), copy_context()
        context.run(_STOP.set, stop)
        call = partial(context.run, partial(function, *args, **kwargs))
        future = asyncio.get_running_loop().run_in_executor(self._pool, call)
        try:
            return await asyncio.shield(future)
        except asyncio.CancelledError:
            stop.set()
            await asyncio.wait([future])
            if not future.cancelled():
                future.exception()  # looked at, so that asyncio does not report it as overlooked
            raise

    def close(self) -> None:
        self._pool.shutdown()


def stop_if_cancelled() -> None:
    """For long computations, between two forward passes: an update may take minutes. Raises CancelledError."""
    stop = _STOP.get(None)
    if stop is not None and stop.is_set():
        raise asyncio.CancelledError
