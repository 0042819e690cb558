"""The warmed interpreter that forks a child for each call, watches it and kills it. It runs inside, as pid 1.

One call at a time; the child of the next call is forked and locked up while nobody waits for it. A session's child
lives on between its calls, stopped. The zygote itself runs no program, and trusts nothing that a child says but its
exit status and its bytes.
"""

from __future__ import annotations

import atexit
import base64
import contextlib
import gc
import importlib
import io
import json
import math
import os
import random
import resource
import select
import shutil
import signal
import site
import sys
import tempfile
import threading
import time
import traceback
from dataclasses import dataclass, field
from typing import Any

from otcrl.tools.sandbox.inside import channel, confine, heap, program
from otcrl.tools.sandbox.inside.child import Child, Pipes
from otcrl.tools.sandbox.inside.proc import Proc
from otcrl.tools.sandbox.inside.streams import Capture, Report

SAMPLE_S = 0.02  # how often a running call's threads and memory are counted
SPARES = 4  # children that wait for a program
# the two ways in which CPython says so
OUT_OF_MEMORY = ("MemoryError", "SystemError: <built-in function compile> returned NULL")
FIRST_FREE = 5  # a child's descriptors: 0 to 2, programs, reports
SESSION_CPU_S = 86400  # of all its calls; each has its own time limit
PAUSE_S = 1.0  # for a session to come to rest
GONE, STOPPED = {"Z", "X"}, {"T", "t"}


@dataclass
class Zygote:
    isolated: bool
    scratch: dict[str, int]  # directory -> bytes
    seccomp: confine.Filter
    landlock: confine.Landlock | None  # None: the kernel has none
    max_threads: int
    max_sessions: int
    max_output_bytes: int
    proc: Proc
    spares: list[Child] = field(default_factory=list)  # of the next calls
    ended: list[Child] = field(default_factory=list)  # killed and not yet reaped
    sessions: dict[str, Child] = field(default_factory=dict)
    mapped_bytes: int = 0  # of the address space, when the last child was forked

    def __post_init__(self) -> None:
        self.null = os.open(os.devnull, os.O_RDWR)
        while os.dup(self.null) < FIRST_FREE:
            pass  # so that no pipe has a number that a child gives to another
        self.own_pids = os.open("self/ns/pid", os.O_RDONLY | os.O_CLOEXEC, dir_fd=self.proc.fd)

    # -- children ------------------------------------------------------------------------------------

    def fork(self, count: int) -> list[Child]:
        """Children that are locked up and wait for a program.

        After a fork this process pays for every page that it writes, hence all forks come one upon the other.
        """
        self.mapped_bytes = self.proc.mapped("self")
        prepared = [Pipes() for _ in range(count)]
        directories = [
            next(iter(self.scratch)) if self.isolated else tempfile.mkdtemp(dir=next(iter(self.scratch)))
            for _ in range(count)
        ]
        pids = []
        for pipes, directory in zip(prepared, directories, strict=True):
            pid = confine.fork_alone(self.own_pids) if self.isolated else confine.fork()
            if pid == 0:
                self.become_child(pipes, directory)
            pids.append(pid)
        return [
            Child(pid, os.pidfd_open(pid), *pipes.kept(), None if self.isolated else directory)
            for pid, pipes, directory in zip(pids, prepared, directories, strict=True)
        ]

    def become_child(self, pipes: Pipes, directory: str) -> None:
        """Never returns."""
        try:
            os.setsid()
            for number, fd in enumerate((self.null, *pipes.given())):
                os.dup2(fd, number)
            if self.isolated:
                confine.private_namespaces(self.scratch)
                confine.drop_capabilities()
                if self.landlock:
                    confine.restrict_files(self.landlock)
            os.chdir(directory)
            os.closerange(FIRST_FREE, 65536)  # the zygote's own channel too
            gc.enable()
            if self.isolated:
                confine.restrict_syscalls(self.seccomp)
        except BaseException:  # whatever it is: a child that is only half locked up must end here
            traceback.print_exc()
            os._exit(71)
        program.live(3, 4, self.limit)

    def limit(self, request: dict[str, Any]) -> None:
        confine.limit_resources(
            baseline_bytes=self.mapped_bytes,
            memory_mb=request["memory_mb"],
            cpu_s=SESSION_CPU_S if request["session"] else math.ceil(request["timeout_s"]) + 1,
            threads=self.max_threads + 2 + self.max_sessions,  # the kernel counts all children together
        )

    def end(self, child: Child) -> tuple[int, bool]:
        """Kill it; its wait status, and whether it had used its CPU time up."""
        os.kill(child.pid, signal.SIGKILL)
        _, cpu_s = resource.prlimit(child.pid, resource.RLIMIT_CPU)  # it may have lowered it
        if self.isolated:  # it was pid 1 of its namespace: with it the kernel ends everything there
            _, status, usage = os.wait4(child.pid, 0)
        else:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(child.pid, signal.SIGKILL)
            _, status, usage = os.wait4(child.pid, 0)
            others = {other.pid for other in (*self.sessions.values(), *self.spares)}
            while strays := set(self.proc.children()) - others:  # an orphan comes to us when its parent is gone
                for pid in strays:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
                    with contextlib.suppress(ChildProcessError):
                        os.waitpid(pid, 0)
        if child.directory is not None:
            os.chmod(child.directory, 0o700)
            shutil.rmtree(child.directory, ignore_errors=True)
        return status, cpu_s != resource.RLIM_INFINITY and usage.ru_utime + usage.ru_stime > cpu_s - 0.1

    def pause(self, child: Child) -> bool:
        """Stop its threads, as nothing of a session runs between its calls. False if it did not come to rest."""
        os.kill(child.pid, signal.SIGSTOP)
        deadline = time.monotonic() + PAUSE_S
        while set(self.proc.states(child.pid)) - GONE - STOPPED:
            if time.monotonic() > deadline:
                return False
            time.sleep(0.0005)
        return True

    # -- calls ---------------------------------------------------------------------------------------

    def call(self, request: dict[str, Any]) -> dict[str, Any]:
        """What the program did. A child that reported is killed here and reaped by `tidy`, which nobody waits for."""
        start = time.monotonic()
        name = request["session"]
        child, is_new = self.child_for(name)
        out, err = Capture(request["max_bytes"]), Capture(request["max_bytes"])
        report = Report(12 * request["max_bytes"] + 4096 + (2 * program.MOST_FETCHED if request["fetch"] else 0))
        streams: dict[int, Capture | Report] = {child.stdout: out, child.stderr: err, child.reports: report}
        ended = self.watch(child, request, streams)
        status, had_no_time = 0, False
        goes_on = ended == "reported" and bool(name) and self.pause(child)
        if goes_on:
            self.sessions[name] = child
        elif ended == "reported" and self.isolated:
            os.kill(child.pid, signal.SIGKILL)
            self.ended.append(child)
        else:
            status, had_no_time = self.end(child)
        for fd, stream in streams.items():
            while stream.take(fd):
                pass
        said = report.message(request) or {"code": 1, "value": "", "cut": 0, "files": {}}
        state, code = verdict(ended, said["code"] if ended == "reported" else os.waitstatus_to_exitcode(status))
        if state == "killed" and had_no_time:
            state = "timeout"
        elif state == "error" and last_line(err.text()).startswith(OUT_OF_MEMORY):
            state = "memory"
        if not (goes_on or child in self.ended):
            child.close()
        return {
            "state": state,
            "code": code,
            "stdout": out.text(),
            "stderr": err.text(),
            "value": said["value"],
            "files": said["files"],
            "dropped": max(out.dropped, err.dropped, said["cut"]),
            "seconds": time.monotonic() - start,
            "fresh": is_new,
            "alive": goes_on,
        }

    def child_for(self, session: str) -> tuple[Child, bool]:
        """The session's, or one that has run nothing yet; and whether it is new."""
        child = self.sessions.pop(session, None)
        if child is not None and not child.is_dead():
            os.kill(child.pid, signal.SIGCONT)
            return child, False
        if child is not None:
            self.discard(child)
        while self.spares and self.spares[-1].is_dead():
            self.discard(self.spares.pop())
        child = self.spares.pop() if self.spares else self.fork(1)[0]
        child.resident_bytes = self.proc.resident(child.pid)
        return child, True

    def discard(self, child: Child) -> None:
        self.end(child)
        child.close()

    def wait(self, requests: int) -> set[int]:
        """The descriptors among which something happened: a request, or the end of a child that was killed."""
        poller = select.poll()
        for fd in (requests, *(child.pidfd for child in self.ended)):
            poller.register(fd, select.POLLIN)
        return {fd for fd, _ in poller.poll()}

    def tidy(self) -> None:
        """What can be done while nobody waits: reap the last children, fork the next ones."""
        while self.ended and (self.ended[0].is_dead() or len(self.ended) > SPARES):
            self.discard(self.ended.pop(0))
        if not self.spares:
            self.spares = self.fork(SPARES)

    def watch(self, child: Child, request: dict[str, Any], streams: dict[int, Capture | Report]) -> str:
        """Hand the program over and collect output until the child `reported` or, without a word, `exited`;
        or until it has to be ended: `timeout`, `memory`, `threads` or `output`."""
        body = memoryview(channel.packed(request))
        deadline, sample = time.monotonic() + request["timeout_s"], time.monotonic() + SAMPLE_S
        poller = select.poll()
        for fd in (child.pidfd, *streams):
            poller.register(fd, select.POLLIN)
        poller.register(child.requests, select.POLLOUT)
        while (left := deadline - time.monotonic()) > 0:
            ready = [fd for fd, _ in poller.poll(min(left, SAMPLE_S) * 1000)]
            for fd in ready:
                if fd in streams:
                    if not streams[fd].take(fd):
                        poller.unregister(fd)
                elif fd == child.requests:
                    body = body[written(fd, body) :]
                    if not body:
                        poller.unregister(fd)
            if any(isinstance(stream, Report) and stream.is_whole() for stream in streams.values()):
                return "reported"
            if child.pidfd in ready:
                return "exited"
            if sum(stream.total() for stream in streams.values()) > self.max_output_bytes:
                return "output"
            if (now := time.monotonic()) >= sample:
                if why := self.overuse(child, request):
                    return why
                sample = now + SAMPLE_S
        return "timeout"

    def overuse(self, child: Child, request: dict[str, Any]) -> str | None:
        """A limit that the kernel does not watch for root, or not in every form that memory has."""
        if len(self.proc.states(child.pid)) > self.max_threads:
            return "threads"
        used = self.proc.resident(child.pid) - child.resident_bytes
        return "memory" if used > (request["memory_mb"] << 20) + confine.LAST_WORDS_BYTES else None


def written(fd: int, content: memoryview) -> int:
    try:
        return os.write(fd, content)
    except BlockingIOError:
        return 0
    except BrokenPipeError:  # it is gone, which its pidfd will tell
        return len(content)


def verdict(ended: str, code: int) -> tuple[str, int]:
    """(`ok`, `error`, `timeout`, `memory`, `threads`, `output`, `signal` or `killed`, exit code or signal)."""
    if ended not in ("exited", "reported"):
        return ended, abs(code)
    if code == -signal.SIGXCPU:
        return "timeout", -code
    if code == -signal.SIGKILL:  # pid 1 cannot send it to itself: the CPU limit, or someone outside
        return "killed", -code
    return ("signal", -code) if code < 0 else ("error" if code else "ok", code)


def last_line(text: str) -> str:
    return text.rstrip().rpartition("\n")[2]


def warm(config: dict[str, Any]) -> Zygote:
    """The zygote, with everything loaded that its children are to share. Raises ImportError, RuntimeError."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # pid 1 without a handler cannot be interrupted from inside
    sys.path.extend(config["paths"])
    assert isinstance(sys.stdout, io.TextIOWrapper)
    sys.stdout.reconfigure(line_buffering=True)  # what was printed before the time limit is shown
    site.setquit()  # `exit()` and `quit()`
    for name in config["preload"]:
        importlib.import_module(name)
        if threading.active_count() > 1:
            raise RuntimeError(f"cannot fork once {name!r} is loaded: it leaves a thread running")
    random.seed(0)  # same program, same output
    if "numpy" in sys.modules:
        importlib.import_module("numpy.random").seed(0)
    if "sympy" in sys.modules:
        importlib.import_module("sympy").simplify("x + 1")  # fills the caches that every program needs
    atexit._clear()
    program.become_main()
    confine.limit_for_good(max(config["scratch"].values()))
    confine.first_to_go()
    confine.prctl(confine.PR_SET_CHILD_SUBREAPER, 1)
    confine.prctl(confine.PR_SET_DUMPABLE, 0)  # a child may not trace us, nor open our files through /proc
    gc.collect()
    gc.freeze()  # a child that collects would copy every page
    gc.disable()
    heap.settle()
    if config["isolated"]:
        confine.protect_devices()
    proc = confine.cover_proc() if config["isolated"] else os.open("/proc", os.O_PATH | os.O_DIRECTORY)
    if config["isolated"]:
        confine.forgo_capabilities()
    return Zygote(
        proc=Proc(proc),
        isolated=config["isolated"],
        scratch=config["scratch"],
        seccomp=confine.syscall_filter(base64.b64decode(config["seccomp"])),
        landlock=confine.landlock(abi, config["scratch"]) if (abi := confine.landlock_abi()) else None,
        max_threads=config["max_threads"],
        max_sessions=config["max_sessions"],
        max_output_bytes=config["max_output_bytes"],
    )


def main() -> None:
    config = json.loads(sys.argv[1])
    requests, replies = os.dup(0), os.dup(1)
    os.dup2(2, 1)  # what a preloaded module prints is no reply
    try:
        zygote = warm(config)
    except (ImportError, RuntimeError) as error:
        why = f"cannot import {error.name!r}: {error}" if isinstance(error, ImportError) else str(error)
        channel.send(replies, {"ready": False, "why": why})
        return
    channel.send(replies, {"ready": True})
    while True:
        zygote.tidy()
        if requests not in zygote.wait(requests):
            continue  # to reap
        request = channel.receive(requests)
        if request is None:
            return
        if (name := request.get("close")) is not None:
            if (child := zygote.sessions.pop(name, None)) is not None:
                zygote.discard(child)
            channel.send(replies, {"closed": name})
        else:
            channel.send(replies, zygote.call(request))
