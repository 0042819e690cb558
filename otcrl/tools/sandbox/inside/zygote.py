"""The warmed interpreter that forks a child for each call, and reaps it. It runs inside, as pid 1.

It runs no program and never sees a caller's data, so no child, each a copy of it, finds any: it only forks and kills as
the supervisor says, which has a process of its own. The children of the next calls are forked and locked up while
nobody waits for them.
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
import shutil
import signal
import site
import socket
import struct
import sys
import tempfile
import threading
import traceback
from dataclasses import dataclass, field
from typing import Any

from otcrl.tools.sandbox.inside import channel, confine, heap, program, supervisor
from otcrl.tools.sandbox.inside.child import COMMAND, END, END_ANSWER, FORK, Pipes
from otcrl.tools.sandbox.inside.proc import Proc

FIRST_FREE = 5  # a child's descriptors: 0 to 2, programs, reports
SESSION_CPU_S = 86400  # of all its calls; each has its own time limit


@dataclass
class Zygote:
    isolated: bool
    scratch: dict[str, int]  # directory -> bytes
    seccomp: confine.Filter
    landlock: confine.Landlock | None  # None: the kernel has none
    max_threads: int
    max_sessions: int
    proc: Proc
    supervisor: int = 0  # its pid
    children: dict[int, str] = field(default_factory=dict)  # pid -> working directory
    mapped_bytes: int = 0  # of the address space, when the last child was forked

    def __post_init__(self) -> None:
        self.pid = os.getpid()
        self.null = os.open(os.devnull, os.O_RDWR)
        while os.dup(self.null) < FIRST_FREE:
            pass  # so that no pipe has a number that a child gives to another
        self.own_pids = os.open("self/ns/pid", os.O_RDONLY | os.O_CLOEXEC, dir_fd=self.proc.fd)

    def serve(self, asks: socket.socket) -> None:
        """Do as the supervisor asks until it is gone."""
        with contextlib.suppress(ConnectionError):  # it went without reading an answer
            while message := asks.recv(COMMAND.size):
                command, number = COMMAND.unpack(message)
                if command == FORK:
                    pids, fds = self.fork(number)
                    socket.send_fds(asks, [struct.pack(f"={number}i", *pids)], fds)
                    for fd in fds:
                        os.close(fd)
                else:
                    outcome = self.end(number)
                    if command == END:
                        asks.send(END_ANSWER.pack(*outcome))

    def fork(self, count: int) -> tuple[list[int], list[int]]:
        """Children that are locked up and wait for a program: their pids, and the descriptors of each `Child`.

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
        self.children.update(zip(pids, directories, strict=True))
        ends = [(os.pidfd_open(pid), *pipes.kept()) for pid, pipes in zip(pids, prepared, strict=True)]
        return pids, [fd for each in ends for fd in each]

    def become_child(self, pipes: Pipes, directory: str) -> None:
        """Never returns."""
        try:
            if not self.isolated:  # where the kernel does not end it with its namespace
                confine.die_with(self.pid)
            os.setsid()
            for number, fd in enumerate((self.null, *pipes.given())):
                os.dup2(fd, number)
            if self.isolated:
                confine.private_namespaces(self.scratch)
                confine.drop_capabilities()
                if self.landlock:
                    confine.restrict_files(self.landlock)
            os.chdir(directory)
            os.closerange(FIRST_FREE, 65536)  # the zygote's own socket too
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
            threads=self.max_threads + 3 + self.max_sessions,  # the kernel counts all children together
        )

    def end(self, pid: int) -> tuple[int, bool]:
        """Kill it; its wait status, and whether it had used its CPU time up."""
        directory = self.children.pop(pid)
        os.kill(pid, signal.SIGKILL)
        _, cpu_s = resource.prlimit(pid, resource.RLIMIT_CPU)  # it may have lowered it
        if self.isolated:  # it was pid 1 of its namespace: with it the kernel ends everything there
            _, status, usage = os.wait4(pid, 0)
        else:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(pid, signal.SIGKILL)
            _, status, usage = os.wait4(pid, 0)
            others = {self.supervisor, *self.children}
            while strays := set(self.proc.children()) - others:  # an orphan comes to us when its parent is gone
                for stray in strays:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(stray, signal.SIGKILL)
                    with contextlib.suppress(ChildProcessError):
                        os.waitpid(stray, 0)
            os.chmod(directory, 0o700)
            shutil.rmtree(directory, ignore_errors=True)
        return status, cpu_s != resource.RLIM_INFINITY and usage.ru_utime + usage.ru_stime > cpu_s - 0.1


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
    confine.hide_memory()
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
    asks, zygotes = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    zygote.supervisor = confine.fork()
    if zygote.supervisor == 0:
        asks.close()
        supervisor.live(config, zygote.proc, zygote=zygotes, parent=zygote.pid, requests=requests, replies=replies)
    zygotes.close()
    for fd in (0, requests, replies):  # no caller's data comes here; the numbers stay taken
        os.dup2(zygote.null, fd)
    zygote.serve(asks)
