"""A pool of warmed interpreters: each runs one program at a time, in a fresh fork with namespaces of its own.

A thread waits on each interpreter rather than the event loop, so a pool outlives any one loop and a call that
nobody awaits any more still ends within its limits. docs/sandbox.md says what the isolation covers and what not.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import importlib.util
import json
import os
import select
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from otcrl.errors import ConfigError, ToolUnavailable, nearest
from otcrl.tools.sandbox import seccomp
from otcrl.tools.sandbox.execution import Execution, Program, State
from otcrl.tools.sandbox.inside import channel
from otcrl.tools.sandbox.jail import ENVIRONMENT, HOW_TO_FIX, START, bwrap_command, find_bwrap, package_paths

START_S = 60.0  # importing sympy on a loaded machine takes seconds
GRACE_S = 5.0  # past the time limit, for killing and collecting
ATTEMPTS = 3
SCRATCH_BYTES = 64 << 20  # of /tmp
MAX_THREADS = 128  # of one call
MAX_OUTPUT_BYTES = 64 << 20  # of one call: what prints more is stopped
MAX_SESSIONS = 64  # of one interpreter; the one that was idle the longest ends
SELF_TEST = """
import ctypes, os, socket
c = ctypes.CDLL(None)
found = {"pid": os.getpid(), "proc": os.listdir("/proc")}
found |= {"seccomp": c.prctl(21, 0, 0, 0, 0), "no_new_privs": c.prctl(39, 0, 0, 0, 0)}
for name, attempt in {
    "socket": socket.socket,
    "write": lambda: open("/x", "w"),
    "mount": lambda: 1 / (1 + c.mount(b"x", b"/tmp", b"tmpfs", 0, None)),
}.items():
    try:
        attempt()
        found[name] = "allowed"
    except (OSError, ZeroDivisionError):
        found[name] = "refused"
list(found.values())
"""
LOCKED = "[1, [], 2, 1, 'refused', 'refused', 'refused']"  # pid, /proc, seccomp, no_new_privs, then the attempts


class ZygoteDied(Exception):
    """The interpreter is gone or silent; never leaves this file."""


@dataclass(frozen=True, slots=True)
class Launch:
    """How to start one interpreter."""

    command: list[str]
    environment: dict[str, str]  # all of it: nothing is inherited
    isolated: bool
    scratch: tempfile.TemporaryDirectory[str] | None = None  # its /tmp where there is no isolation


# -- one interpreter --------------------------------------------------------------------------------


class Zygote:
    """One warmed interpreter and the pipe to it. Mutable; used by one thread at a time."""

    def __init__(self, launch: Callable[[], Launch]) -> None:
        self._launch = launch
        self._scratch: tempfile.TemporaryDirectory[str] | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self.sessions: dict[str, float] = {}  # that are here, or will be; name -> when it was last used, that one last

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
        self._stop()
        launch, pipe = self._launch(), subprocess.PIPE
        self._scratch = launch.scratch
        self._process = subprocess.Popen(
            launch.command, stdin=pipe, stdout=pipe, stderr=pipe, bufsize=0, env=launch.environment
        )
        assert self._process.stdin is not None
        os.set_blocking(self._process.stdin.fileno(), False)  # one that takes nothing must not hold us up
        hello = self._receive(START_S)
        if not hello["ready"]:
            self.kill()
            raise ConfigError(f"preload: the sandbox {hello['why']}")
        code, expected = (SELF_TEST, LOCKED) if launch.isolated else ("6 * 7", "42")
        trial = self.call(Program(code=code, timeout_s=START_S, memory_mb=64, max_bytes=2000))
        if trial.value != expected:
            raise ZygoteDied(f"it is not locked: {trial.value or trial.stderr or trial.state}, expected {expected}")

    def call(self, program: Program) -> Execution:
        """Raises ZygoteDied when no answer comes, TimeoutError when it comes too late."""
        self.use(program.session)
        while len(self.sessions) > MAX_SESSIONS:
            self.end(next(iter(self.sessions)))
        self._send(asdict(program))
        reply = self._receive(program.timeout_s + GRACE_S)
        state, alive = State(reply.pop("state")), reply.pop("alive")
        if not alive:
            self.sessions.pop(program.session, None)
        return Execution(state, **reply)

    def use(self, session: str) -> None:
        """It is here from now on, and the last one used."""
        if session:
            self.sessions.pop(session, None)
            self.sessions[session] = time.monotonic()

    def end(self, session: str) -> None:
        self.sessions.pop(session, None)
        self._send({"close": session})
        self._receive(GRACE_S)

    def _send(self, message: dict[str, Any]) -> None:
        if self._process is None or self._process.stdin is None:
            raise ZygoteDied("it is not running")
        fd, left = self._process.stdin.fileno(), memoryview(channel.packed(message))
        poller = select.poll()
        poller.register(fd, select.POLLOUT)
        try:
            while left:
                if not poller.poll(GRACE_S * 1000):
                    raise TimeoutError("the sandbox takes no program")
                left = left[os.write(fd, left) :]
        except BrokenPipeError as error:
            raise ZygoteDied(str(error)) from error

    def _receive(self, timeout_s: float) -> dict[str, Any]:
        deadline = time.monotonic() + timeout_s
        (length,) = channel.HEADER.unpack(self._read(channel.HEADER.size, deadline))
        return json.loads(self._read(length, deadline))

    def _read(self, count: int, deadline: float) -> bytes:
        assert self._process is not None
        assert self._process.stdout is not None
        fd, parts = self._process.stdout.fileno(), []
        poller = select.poll()
        poller.register(fd, select.POLLIN)
        while count:
            if not poller.poll(max(0.0, deadline - time.monotonic()) * 1000):
                raise TimeoutError("the sandbox does not answer")
            part = os.read(fd, min(count, 1 << 20))
            if not part:
                raise ZygoteDied("the sandbox ended")
            parts.append(part)
            count -= len(part)
        return b"".join(parts)

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
        self.sessions.clear()
        self._stop()

    def _stop(self) -> None:
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

    def __init__(
        self,
        workers: int,
        preload: Sequence[str],
        isolation: str,
        bwrap: str | None = None,
        session_idle_s: float = 600.0,
    ) -> None:
        """Raises ConfigError where `isolation` cannot be had; nothing is started yet."""
        if isolation not in ("bubblewrap", "none"):
            choices = ["bubblewrap", "none"]
            raise ConfigError(f"isolation must be bubblewrap or none, got {isolation!r}.{nearest(isolation, choices)}")
        for name in preload:
            if importlib.util.find_spec(name.partition(".")[0]) is None:
                raise ConfigError(f"preload: no module {name!r} is installed here")
        self._isolation, self._preload, self._session_idle_s = isolation, tuple(preload), session_idle_s
        self._bwrap = find_bwrap(bwrap) if isolation == "bubblewrap" else ""
        self._seccomp = base64.b64encode(seccomp.program()).decode() if isolation == "bubblewrap" else ""
        self._packages: list[Path] | None = None
        self._packages_lock = threading.Lock()
        self._zygotes = [Zygote(self._launch) for _ in range(workers)]
        self._idle = list(self._zygotes)  # the one used last is last: it may still be tidying up
        self._lock = threading.Lock()
        self._waiting: list[tuple[threading.Condition, Callable[[], Zygote | None]]] = []  # the first is first
        # more threads than interpreters: a call may have to wait for the very one that holds its session
        self._threads = ThreadPoolExecutor(4 * workers, thread_name_prefix="sandbox")
        self._closed = False

    async def start(self) -> None:
        """Every interpreter warmed. Raises ToolUnavailable or ConfigError as the first `run` would."""
        loop = asyncio.get_running_loop()
        await asyncio.gather(*(loop.run_in_executor(self._threads, self._warm, zygote) for zygote in self._zygotes))

    async def run(self, program: Program) -> Execution:
        """What the program did; streams longer than twice `max_bytes` lose their middle.

        One that nobody waits for any more is not begun. Raises ToolUnavailable when no interpreter can be had.
        """
        self._check_open()
        given_up = threading.Event()
        try:
            return await asyncio.get_running_loop().run_in_executor(self._threads, self._run, program, given_up)
        finally:
            given_up.set()

    async def end(self, session: str) -> None:
        """Free a session; nothing happens where there is none."""
        if not self._closed and any(session in zygote.sessions for zygote in self._zygotes):
            await asyncio.get_running_loop().run_in_executor(self._threads, self._end, session)

    async def close(self) -> None:
        """Every interpreter killed and reaped, calls in flight included."""
        self._closed = True
        with self._lock:
            for turn, _ in self._waiting:
                turn.notify()
        for zygote in self._zygotes:
            zygote.signal()
        await asyncio.to_thread(self._threads.shutdown, wait=True, cancel_futures=True)
        for zygote in self._zygotes:
            zygote.kill()

    def _check_open(self) -> None:
        if self._closed:
            raise ToolUnavailable("the Python sandbox is closed")

    @contextlib.contextmanager
    def _held(self, wanted: Zygote | None = None, session: str = "") -> Iterator[Zygote]:
        """An interpreter for this thread alone: `wanted`, else the one that holds the session, else any."""

        def found() -> Zygote | None:
            holders = [wanted] if wanted else [other for other in self._zygotes if session in other.sessions]
            return next((zygote for zygote in self._idle if not holders or zygote in holders), None)

        turn = threading.Condition(self._lock)
        with self._lock:
            if (zygote := found()) is None:
                self._waiting.append((turn, found))
                while (zygote := found()) is None and not self._closed:
                    turn.wait()
                self._waiting.remove((turn, found))
            self._check_open()
            assert zygote is not None
            self._idle.remove(zygote)
            zygote.use(session)  # so that a second call of a new session finds it
            self._wake_one()  # if another one came free meanwhile: this thread may have been woken for both
        try:
            yield zygote
        finally:
            with self._lock:
                self._idle.append(zygote)
                self._wake_one()

    def _wake_one(self) -> None:
        """The first of those who wait for what is idle now; the others would only look and wait again."""
        for turn, found in self._waiting:
            if found() is not None:
                return turn.notify()

    def _warm(self, wanted: Zygote) -> None:
        with self._held(wanted) as zygote:
            zygote.ensure()

    def _end(self, session: str) -> None:
        with self._held(session=session) as zygote:
            try:
                zygote.end(session)
            except (ZygoteDied, TimeoutError):
                zygote.kill()  # a late reply would be taken for that of the next call

    def _run(self, program: Program, given_up: threading.Event) -> Execution:
        silence: TimeoutError | None = None
        with self._held(session=program.session) as zygote:
            for _ in range(2):
                self._check_open()
                if given_up.is_set():
                    return Execution(State.KILLED)  # which nobody will read
                zygote.ensure()
                try:
                    self._end_idle(zygote)
                    execution = zygote.call(program)
                except TimeoutError as error:  # it stops programs in time itself: silence is no program's fault
                    silence = error
                    zygote.kill()
                except ZygoteDied:
                    zygote.kill()
                else:
                    if execution.state is not State.KILLED:
                        return execution
            self._check_open()
        if silence is not None:
            raise ToolUnavailable(f"the Python sandbox fell silent: {silence}") from silence
        return Execution(State.KILLED)

    def _end_idle(self, zygote: Zygote) -> None:
        now = time.monotonic()
        for session in [name for name, used in zygote.sessions.items() if now - used > self._session_idle_s]:
            zygote.end(session)

    def _launch(self) -> Launch:
        """How to start one interpreter; found out at the first start, as constructing must be cheap."""
        isolated = self._isolation != "none"
        config: dict[str, Any] = {
            "isolated": isolated,
            "preload": self._preload,
            "seccomp": self._seccomp,
            "max_threads": MAX_THREADS,
            "max_sessions": MAX_SESSIONS,
            "max_output_bytes": MAX_OUTPUT_BYTES,
        }
        if not isolated:
            scratch = tempfile.TemporaryDirectory(prefix="otcrl-sandbox-")
            config |= {"paths": [], "scratch": {scratch.name: SCRATCH_BYTES}}
            root = str(Path(__file__).parents[3])
            start = f"import sys; sys.path.append({root!r}); {START}"
            command = [sys.executable, "-s", "-P", "-X", "utf8", "-c", start, json.dumps(config)]
            return Launch(command, ENVIRONMENT | {"HOME": scratch.name}, isolated, scratch)
        config |= {"paths": ["/packages"], "scratch": {"/tmp": SCRATCH_BYTES}}
        with self._packages_lock:
            if self._packages is None:
                self._packages = package_paths(self._preload)
        return Launch([*bwrap_command(self._bwrap, self._packages), json.dumps(config)], {}, isolated)
