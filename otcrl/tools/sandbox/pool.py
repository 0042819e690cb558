"""A pool of warmed interpreters in bubblewrap: one program at a time in each, no network, no host files.

A thread waits on each interpreter rather than the event loop, so a pool outlives any one loop and a call that
nobody awaits any more still ends within its limits.

Not covered: there is no system call filter and no cgroup. A process's memory is limited by the kernel; the sum
over a call's processes and their number are sampled every 20 ms.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import json
import os
import queue
import select
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from otcrl.errors import ConfigError, ToolUnavailable, nearest
from otcrl.tools.sandbox.jail import (
    ENVIRONMENT,
    HOW_TO_FIX,
    SCRATCH_MB,
    WORKER,
    bwrap_command,
    find_bwrap,
    package_paths,
)

START_S = 60.0  # importing sympy on a loaded machine takes seconds
GRACE_S = 5.0  # past the time limit, for killing and wiping
ATTEMPTS = 3


class State(StrEnum):
    """How a program ended."""

    OK = "ok"
    ERROR = "error"  # an exception, a syntax error or a non-zero exit
    TIMEOUT = "timeout"
    MEMORY = "memory"  # its processes together; one alone gets a MemoryError
    PROCESSES = "processes"
    SIGNAL = "signal"  # it crashed its interpreter
    KILLED = "killed"  # it took the whole sandbox with it


@dataclass(frozen=True, slots=True)
class Execution:
    """What one program did. `stdout`, `stderr`, `value`: their first and last bytes, up to the limit."""

    state: State
    code: int = 0  # exit code; the signal's number for SIGNAL
    stdout: str = ""
    stderr: str = ""  # with the traceback, if it raised
    value: str = ""  # repr of the last expression, "" if None
    dropped: int = 0  # bytes cut from the middle of the longest of the three
    seconds: float = 0.0
    clean: bool = True  # False: something may be left of it, the interpreter was replaced


class ZygoteDied(Exception):
    """The interpreter is gone or silent; never leaves this file."""


@dataclass(frozen=True, slots=True)
class Launch:
    """How to start one interpreter."""

    command: list[str]
    environment: dict[str, str]  # all of it: nothing is inherited
    scratch: tempfile.TemporaryDirectory[str] | None = None  # its /tmp where there is no isolation


# -- one interpreter --------------------------------------------------------------------------------


class Zygote:
    """One warmed interpreter and the pipe to it. Mutable; used by one thread at a time."""

    def __init__(self, launch: Callable[[], Launch]) -> None:
        self._launch = launch
        self._scratch: tempfile.TemporaryDirectory[str] | None = None
        self._process: subprocess.Popen[bytes] | None = None

    def ensure(self) -> None:
        """Alive and tried out, started anew where it is not.

        Raises ToolUnavailable, or ConfigError for a bad preload.
        """
        if self._process is not None and self._process.poll() is None:
            return
        why = ""
        for attempt in range(ATTEMPTS):
            time.sleep(0.2 * attempt)
            try:
                return self._start()
            except (ZygoteDied, OSError) as error:
                why = f"{error} {self._last_words()}".strip()
                self.kill()
        raise ToolUnavailable(f"the Python sandbox does not start: {why}. {HOW_TO_FIX}")

    def _start(self) -> None:
        self.kill()
        launch, pipe = self._launch(), subprocess.PIPE
        self._scratch = launch.scratch
        self._process = subprocess.Popen(
            launch.command, stdin=pipe, stdout=pipe, stderr=pipe, bufsize=0, env=launch.environment
        )
        hello = self._receive(START_S)
        if not hello["ready"]:
            self.kill()
            raise ConfigError(f"preload: the sandbox {hello['why']}")
        trial = self.call({"code": "6 * 7", "timeout_s": START_S, "memory_mb": 64, "max_bytes": 1000})
        if trial.value != "42":
            raise ZygoteDied(f"it answered 6 * 7 with {trial}")

    def call(self, request: dict[str, object]) -> Execution:
        """Raises ZygoteDied when no answer comes, TimeoutError when it comes too late."""
        body = json.dumps(request | {"scratch_mb": SCRATCH_MB}).encode()
        try:
            assert self._process is not None
            assert self._process.stdin is not None
            view = memoryview(struct.pack(">I", len(body)) + body)
            while view:
                view = view[self._process.stdin.write(view) :]
        except (BrokenPipeError, ValueError) as error:
            raise ZygoteDied(str(error)) from error
        timeout_s = request["timeout_s"]
        assert isinstance(timeout_s, int | float)
        reply = self._receive(timeout_s + GRACE_S)
        return Execution(State(reply.pop("state")), **reply)

    def _receive(self, timeout_s: float) -> dict:
        deadline = time.monotonic() + timeout_s
        return json.loads(self._read(struct.unpack(">I", self._read(4, deadline))[0], deadline))

    def _read(self, count: int, deadline: float) -> bytes:
        assert self._process is not None
        assert self._process.stdout is not None
        fd, parts = self._process.stdout.fileno(), b""
        poller = select.poll()
        poller.register(fd, select.POLLIN)
        while len(parts) < count:
            if not poller.poll(max(0.0, deadline - time.monotonic()) * 1000):
                raise TimeoutError("the sandbox does not answer")
            part = os.read(fd, count - len(parts))
            if not part:
                raise ZygoteDied("the sandbox ended")
            parts += part
        return parts

    def _last_words(self) -> str:
        """What a start that failed wrote to stderr."""
        if self._process is None or self._process.stderr is None:
            return ""
        self._process.kill()
        return self._process.stderr.read().decode(errors="replace").strip()[-500:]

    def signal(self) -> None:
        """Ask the kernel to end it; safe while another thread waits for it."""
        if (process := self._process) is not None:
            process.kill()

    def kill(self) -> None:
        """End it and all that runs in it; nothing is left to reap."""
        if self._process is None:
            return
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout, self._process.stderr):
            if pipe is not None:
                pipe.close()
        self._process = None
        if self._scratch is not None:
            self._scratch.cleanup()


# -- many -------------------------------------------------------------------------------------------


class Pool:
    """`workers` interpreters, started when first needed. Mutable; may be used from any event loop."""

    def __init__(self, workers: int, preload: Sequence[str], isolation: str, bwrap: str | None = None) -> None:
        """Raises ConfigError where `isolation` cannot be had; nothing is started yet."""
        if isolation not in ("bubblewrap", "none"):
            choices = ["bubblewrap", "none"]
            raise ConfigError(f"isolation must be bubblewrap or none, got {isolation!r}.{nearest(isolation, choices)}")
        for name in preload:
            if importlib.util.find_spec(name.partition(".")[0]) is None:
                raise ConfigError(f"preload: no module {name!r} is installed here")
        self._isolation, self._preload = isolation, tuple(preload)
        self._bwrap = find_bwrap(bwrap) if isolation == "bubblewrap" else ""
        self._packages: list[Path] | None = None
        self._packages_lock = threading.Lock()
        self._zygotes = [Zygote(self._launch) for _ in range(workers)]
        self._idle: queue.LifoQueue[Zygote] = queue.LifoQueue()  # the one used last is the warmest
        for zygote in self._zygotes:
            self._idle.put(zygote)
        self._threads = ThreadPoolExecutor(workers, thread_name_prefix="sandbox")
        self._closed = False

    async def start(self) -> None:
        """Every idle interpreter warmed. Raises ToolUnavailable or ConfigError as the first `run` would."""
        loop = asyncio.get_running_loop()
        zygotes: list[Zygote] = []
        with contextlib.suppress(queue.Empty):
            while True:
                zygotes.append(self._idle.get_nowait())
        await asyncio.gather(*(loop.run_in_executor(self._threads, self._warm, zygote) for zygote in zygotes))

    async def run(self, code: str, *, timeout_s: float, memory_mb: int, max_bytes: int) -> Execution:
        """What `code` did; streams longer than twice `max_bytes` lose their middle.

        Raises ToolUnavailable when no interpreter can be had.
        """
        if self._closed:
            raise ToolUnavailable("the Python sandbox is closed")
        request = {"code": code, "timeout_s": timeout_s, "memory_mb": memory_mb, "max_bytes": max_bytes}
        return await asyncio.get_running_loop().run_in_executor(self._threads, self._run, request)

    async def close(self) -> None:
        """Every interpreter killed and reaped, calls in flight included."""
        self._closed = True
        for zygote in self._zygotes:
            zygote.signal()
        await asyncio.to_thread(self._threads.shutdown, wait=True, cancel_futures=True)
        for zygote in self._zygotes:
            zygote.kill()

    def _warm(self, zygote: Zygote) -> None:
        try:
            self._ensure(zygote)
        finally:
            self._idle.put(zygote)

    def _ensure(self, zygote: Zygote) -> None:
        if self._closed:
            raise ToolUnavailable("the Python sandbox is closed")
        zygote.ensure()

    def _replaced(self, zygote: Zygote, state: State) -> Execution:
        zygote.kill()
        self._ensure(zygote)
        return Execution(state)

    def _run(self, request: dict[str, object]) -> Execution:
        zygote = self._idle.get()
        try:
            self._ensure(zygote)
            for _ in range(2):  # a sandbox that dies twice of the same program was killed by it
                try:
                    execution = zygote.call(request)
                    if not execution.clean:
                        zygote.kill()
                    return execution
                except TimeoutError:
                    return self._replaced(zygote, State.TIMEOUT)
                except ZygoteDied:
                    self._replaced(zygote, State.KILLED)
            return Execution(State.KILLED)
        finally:
            self._idle.put(zygote)

    def _launch(self) -> Launch:
        """How to start one interpreter; found out at the first start, as constructing must be cheap."""
        config = {"preload": self._preload, "paths": ["/packages"], "scratch": ["/tmp", "/dev/shm"]}
        if self._isolation == "none":
            scratch = tempfile.TemporaryDirectory(prefix="otcrl-sandbox-")
            config |= {"paths": [], "scratch": [scratch.name]}
            command = [sys.executable, "-s", "-P", "-X", "utf8", str(WORKER), json.dumps(config)]
            return Launch(command, ENVIRONMENT | {"HOME": scratch.name}, scratch)
        with self._packages_lock:
            if self._packages is None:
                self._packages = package_paths(self._preload)
        return Launch([*bwrap_command(self._bwrap, self._packages), json.dumps(config)], {})
