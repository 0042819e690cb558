"""The program inside the sandbox: a warmed interpreter, the zygote, that forks one child per call.

Standard library only, run as a script: `worker.py CONFIG_JSON`, requests on stdin, replies on stdout, each a
4-byte big-endian length and JSON. It is pid 1 of its pid namespace, so the program it runs cannot signal it,
every orphan comes to it, and one kill reaches everything a call started. It trusts nothing a child says but
its exit status and bytes.
"""

from __future__ import annotations

import ast
import contextlib
import ctypes
import gc
import importlib
import io
import json
import linecache
import math
import os
import random
import resource
import select
import shutil
import signal
import site
import stat
import struct
import sys
import threading
import time
import traceback
import types

FILE = "<code>"  # the program's file name in its tracebacks
SAMPLE_S = 0.02  # how often a running call's processes and memory are counted
MAX_PROCESSES = 32
MAX_OPEN_FILES = 256
LAST_WORDS_BYTES = 64 << 20  # a program out of memory still needs some to say so
PR_SET_DUMPABLE, PR_SET_CHILD_SUBREAPER = 4, 36

libc = ctypes.CDLL(None, use_errno=True)


# -- the channel ------------------------------------------------------------------------------------


def read_exactly(fd: int, count: int) -> bytes | None:
    """`count` bytes, or None at the end of the stream."""
    parts = b""
    while len(parts) < count:
        part = os.read(fd, count - len(parts))
        if not part:
            return None
        parts += part
    return parts


def receive(fd: int) -> dict | None:
    header = read_exactly(fd, 4)
    body = header and read_exactly(fd, struct.unpack(">I", header)[0])
    return json.loads(body) if body else None


def write_all(fd: int, content: bytes) -> None:
    while content:
        content = content[os.write(fd, content) :]


def send(fd: int, message: dict) -> None:
    body = json.dumps(message).encode()
    write_all(fd, struct.pack(">I", len(body)) + body)


# -- the child: one program -------------------------------------------------------------------------


def limit_self(request: dict, baseline_bytes: int) -> None:
    """Lower this process's limits; memory counts on top of what the warmed interpreter already maps."""
    memory = baseline_bytes + (request["memory_mb"] << 20)
    cpu_s = math.ceil(request["timeout_s"]) + 1
    file_bytes = request["scratch_mb"] << 20
    limits: dict[int, tuple[int, int]] = {
        resource.RLIMIT_AS: (memory, memory + LAST_WORDS_BYTES),
        resource.RLIMIT_CPU: (cpu_s, cpu_s + 1),
        resource.RLIMIT_FSIZE: (file_bytes, file_bytes),
        resource.RLIMIT_NPROC: (MAX_PROCESSES, MAX_PROCESSES),  # the kernel exempts root, hence also `overuse`
        resource.RLIMIT_NOFILE: (MAX_OPEN_FILES, MAX_OPEN_FILES),
        resource.RLIMIT_CORE: (0, 0),
    }
    for which, (soft, hard) in limits.items():
        ceiling = resource.getrlimit(which)[1]
        if ceiling != resource.RLIM_INFINITY:
            soft, hard = min(soft, ceiling), min(hard, ceiling)
        resource.setrlimit(which, (soft, hard))
    libc.prctl(PR_SET_DUMPABLE, 1, 0, 0, 0)  # the zygote is not; only so is the next line allowed
    with contextlib.suppress(OSError):
        fd = os.open("/proc/self/oom_score_adj", os.O_WRONLY)
        os.write(fd, b"1000")
        os.close(fd)


def users_traceback(error: BaseException) -> str:
    """The traceback with the program's own frames only: no worker, no library, no chained exceptions."""
    report = traceback.TracebackException(type(error), error, error.__traceback__)
    own = [frame for frame in report.stack if frame.filename == FILE]
    for frame in own:
        frame.colno = frame.end_colno = None  # no carets
    report.stack = traceback.StackSummary.from_list(own)
    report.__cause__ = report.__context__ = None
    lines = list(report.format())
    return "".join(lines if own else lines[1:] if lines[0].startswith("Traceback") else lines)


def run_program(source: str, value_fd: int) -> int:
    """The exit code; the last expression's repr goes to `value_fd`, as a notebook would show it."""
    main = types.ModuleType("__main__")
    sys.modules["__main__"] = main
    sys.argv = [""]
    linecache.cache[FILE] = (len(source), None, source.splitlines(keepends=True), FILE)
    try:
        tree = ast.parse(source, FILE)
        last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
        exec(compile(tree, FILE, "exec"), vars(main))
        if isinstance(last, ast.Expr):
            value = eval(compile(ast.Expression(last.value), FILE, "eval"), vars(main))
            if value is not None:
                write_all(value_fd, repr(value).encode(errors="replace"))
        for thread in threading.enumerate():
            if thread is not threading.main_thread() and not thread.daemon:
                thread.join()
        return 0
    except SystemExit as end:
        if end.code is not None and not isinstance(end.code, int):
            print(end.code, file=sys.stderr)
        return (end.code & 0xFF) if isinstance(end.code, int) else int(end.code is not None)
    except BaseException as error:  # whatever the program raised is its result
        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (hard, hard))
        write_all(2, users_traceback(error).encode(errors="replace"))
        return 1
    finally:
        for stream in {sys.stdout, sys.__stdout__, sys.stderr}:
            with contextlib.suppress(Exception):  # the program may have put anything there
                stream.flush()


def child(request: dict, scratch: str, baseline_bytes: int, pipes: list[int], null: int) -> None:
    """Become the program. Never returns."""
    code = 70
    try:
        os.setsid()
        os.chdir(scratch)
        stdout, stderr, value = pipes
        os.dup2(null, 0)
        os.dup2(stdout, 1)
        os.dup2(stderr, 2)
        value_fd = os.dup2(value, 3)
        os.closerange(4, MAX_OPEN_FILES)  # the control channel too
        random.seed(0)  # same program, same output
        limit_self(request, baseline_bytes)
        gc.enable()
        code = run_program(request["code"], value_fd)
    except BaseException:  # a copy of the zygote must end here, not go on in the zygote's loop
        traceback.print_exc()
    finally:
        os._exit(code)


# -- the zygote: watch, kill, wipe ------------------------------------------------------------------


class Capture:
    """The first and the last `limit` bytes of a stream; what lies between is only counted."""

    def __init__(self, limit: int) -> None:
        self.limit, self.head, self.tail, self.dropped = limit, b"", b"", 0

    def take(self, fd: int) -> bool:
        """Read once; False at the end of the stream."""
        part = os.read(fd, 1 << 16)
        room = self.limit - len(self.head)
        self.head += part[:room]
        self.tail += part[room:]
        if len(self.tail) > self.limit:
            self.dropped += len(self.tail) - self.limit
            self.tail = self.tail[-self.limit :]
        return bool(part)

    def text(self) -> str:
        return (self.head + self.tail).decode(errors="replace")


def usage(pid: str) -> int:
    """Resident bytes of a process; 0 if it is gone."""
    try:
        with open(f"/proc/{pid}/statm") as f:
            return int(f.read().split()[1]) * resource.getpagesize()
    except (OSError, IndexError):
        return 0


def overuse(request: dict, resident_bytes: int) -> str | None:
    """The limit that a call's processes break together; pages shared with the zygote count for none."""
    pids = [name for name in os.listdir("/proc") if name.isdigit() and name != "1"]
    if len(pids) > MAX_PROCESSES:
        return "processes"
    memory = sum(max(0, usage(pid) - resident_bytes) for pid in pids)
    return "memory" if memory > request["memory_mb"] << 20 else None


def watch(pid: int, captures: dict[int, Capture], request: dict, resident_bytes: int) -> str | None:
    """Collect output until the child ends (None) or has to be ended (why)."""
    deadline = time.monotonic() + request["timeout_s"]
    sample = time.monotonic() + SAMPLE_S
    poller, pidfd = select.poll(), os.pidfd_open(pid)
    for fd in (pidfd, *captures):
        poller.register(fd, select.POLLIN)
    try:
        while (left := deadline - time.monotonic()) > 0:
            ready = [fd for fd, _ in poller.poll(min(left, SAMPLE_S) * 1000)]
            for fd in ready:
                if fd != pidfd and not captures[fd].take(fd):
                    poller.unregister(fd)
            if pidfd in ready:
                return None
            if isolated() and time.monotonic() >= sample:
                sample = time.monotonic() + SAMPLE_S
                if why := overuse(request, resident_bytes):
                    return why
        return "timeout"
    finally:
        os.close(pidfd)


def isolated() -> bool:
    """True where every other process in sight belongs to the call: kill(-1) is right here, and only here."""
    return os.getpid() == 1


def kill_rest(pid: int) -> None:
    if isolated():
        targets = [-1]
    else:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(pid, signal.SIGKILL)
        with open(f"/proc/self/task/{threading.get_native_id()}/children") as f:
            targets = [int(child_pid) for child_pid in f.read().split()]
    for target in targets:
        with contextlib.suppress(ProcessLookupError):
            os.kill(target, signal.SIGKILL)


def reap(pid: int) -> int:
    """End every process of the call; the wait status of the child itself."""
    child_status = 0
    while True:
        kill_rest(pid)  # again each time: an orphan comes to us only when its parent is gone
        try:
            done, status = os.waitpid(-1, 0)
        except ChildProcessError:
            return child_status
        if done == pid:
            child_status = status


def wipe(directory: str) -> None:
    os.chmod(directory, 0o700)
    with os.scandir(directory) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                shutil.rmtree(entry.path)
            else:
                os.unlink(entry.path)


def leaves_nothing(scratch: list[str]) -> bool:
    """True when no file and no System V object of the call is left; False: this zygote must be replaced."""
    try:
        for directory in scratch:
            wipe(directory)
        for kind in ("shm", "sem", "msg") if isolated() else ():
            with open(f"/proc/sysvipc/{kind}") as f:
                if len(f.readlines()) > 1:  # a header is always there
                    return False
    except (OSError, RecursionError):
        return False
    return True


def verdict(stopped: str | None, status: int) -> tuple[str, int]:
    """(`ok`, `error`, `timeout`, `memory`, `processes` or `signal`, exit code or signal number)."""
    code = os.waitstatus_to_exitcode(status)
    if stopped:
        return stopped, code
    if code == -signal.SIGXCPU:
        return "timeout", code
    return ("signal", -code) if code < 0 else ("error" if code else "ok", code)


class Zygote:
    """Everything a call needs that is the same for all calls."""

    def __init__(self, scratch: list[str]) -> None:
        self.scratch = scratch
        self.null = os.open(os.devnull, os.O_RDWR)
        with open("/proc/self/statm") as f:
            mapped, resident = (int(pages) * resource.getpagesize() for pages in f.read().split()[:2])
        self.mapped_bytes, self.resident_bytes = mapped, resident

    def call(self, request: dict) -> dict:
        start = time.monotonic()
        pipes = [os.pipe() for _ in ("stdout", "stderr", "value")]
        pid = os.fork()
        if pid == 0:
            child(request, self.scratch[0], self.mapped_bytes, [write for _, write in pipes], self.null)
        for _, write in pipes:
            os.close(write)
        captures = {read: Capture(request["max_bytes"]) for read, _ in pipes}
        stopped = watch(pid, captures, request, self.resident_bytes)
        status = reap(pid)
        for fd, capture in captures.items():  # every writer is dead, so each stream ends
            while capture.take(fd):
                pass
            os.close(fd)
        stdout, stderr, value = captures.values()
        state, code = verdict(stopped, status)
        return {
            "state": state,
            "code": code,
            "stdout": stdout.text(),
            "stderr": stderr.text(),
            "value": value.text(),
            "dropped": max(stdout.dropped, stderr.dropped, value.dropped),
            "seconds": time.monotonic() - start,
            "clean": leaves_nothing(self.scratch),
        }


def main() -> None:
    config = json.loads(sys.argv[1])
    requests, replies = os.dup(0), os.dup(1)
    os.dup2(2, 1)  # what a preloaded module prints is no reply
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # pid 1 without a handler cannot be interrupted from inside
    sys.path.extend(config["paths"])
    assert isinstance(sys.stdout, io.TextIOWrapper)
    sys.stdout.reconfigure(line_buffering=True)  # what was printed before the time limit is shown
    site.setquit()  # `exit()` and `quit()`
    for name in config["preload"]:
        try:
            importlib.import_module(name)
        except ImportError as error:
            send(replies, {"ready": False, "why": f"cannot import {name!r}: {error}"})
            return
    if "numpy" in sys.modules:
        importlib.import_module("numpy.random").seed(0)  # same program, same output
    libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    libc.prctl(PR_SET_DUMPABLE, 0, 0, 0, 0)  # a child may not trace us, nor open our files through /proc
    sys.stdout.flush()
    gc.collect()
    gc.freeze()  # a child that collects would copy every page
    gc.disable()
    zygote = Zygote(config["scratch"])
    send(replies, {"ready": True, "pid": os.getpid()})
    while (request := receive(requests)) is not None:
        send(replies, zygote.call(request))


if __name__ == "__main__":
    assert stat.S_ISFIFO(os.fstat(0).st_mode), "worker.py is started by pool.py"
    main()
