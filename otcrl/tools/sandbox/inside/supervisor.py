"""What deals with the callers: reads their requests, has a child run each, watches it, answers. It runs inside.

One call at a time. The supervisor is a process of its own beside the children, as a child is a copy of the one that
forked it: what was read or collected here is in no child's memory. It trusts nothing that a child says but its exit
status and its bytes.
"""

from __future__ import annotations

import os
import select
import signal
import socket
import time
import traceback
from dataclasses import dataclass, field
from typing import Any

from otcrl.tools.sandbox.inside import channel, confine, program
from otcrl.tools.sandbox.inside.child import Child, Nursery
from otcrl.tools.sandbox.inside.proc import Proc
from otcrl.tools.sandbox.inside.streams import Capture, Report

SAMPLE_S = 0.02  # how often a running call's threads and memory are counted
SPARES = 4  # children that wait for a program
# the two ways in which CPython says so
OUT_OF_MEMORY = ("MemoryError", "SystemError: <built-in function compile> returned NULL")
PAUSE_S = 1.0  # for a session to come to rest
GONE, STOPPED = {"Z", "X"}, {"T", "t"}


@dataclass
class Supervisor:
    isolated: bool
    max_threads: int
    max_output_bytes: int
    proc: Proc
    nursery: Nursery
    spares: list[Child] = field(default_factory=list)  # of the next calls
    ended: list[Child] = field(default_factory=list)  # killed and not yet reaped
    sessions: dict[str, Child] = field(default_factory=dict)

    def serve(self, requests: int, replies: int) -> None:
        """Answer what comes until nothing does."""
        channel.send(replies, {"ready": True})
        while True:
            self.tidy()
            request = channel.receive(requests)
            if request is None:
                return
            if (name := request.get("close")) is not None:
                if (child := self.sessions.pop(name, None)) is not None:
                    self.discard(child)
                channel.send(replies, {"closed": name})
            else:
                channel.send(replies, self.call(request))

    def tidy(self) -> None:
        """What can be done while nobody waits: have the next children forked, then the last ones reaped."""
        if not self.spares:
            self.spares = self.nursery.fork(SPARES)
        while self.ended:
            child = self.ended.pop()
            self.nursery.reap(child)
            child.close()

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
            status, had_no_time = self.nursery.end(child)
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
        child = self.spares.pop() if self.spares else self.nursery.fork(1)[0]
        child.resident_bytes = self.proc.resident(child.pid)
        return child, True

    def discard(self, child: Child) -> None:
        self.nursery.end(child)
        child.close()

    def pause(self, child: Child) -> bool:
        """Stop its threads, as nothing of a session runs between its calls. False if it did not come to rest."""
        os.kill(child.pid, signal.SIGSTOP)
        deadline = time.monotonic() + PAUSE_S
        while set(self.proc.states(child.pid)) - GONE - STOPPED:
            if time.monotonic() > deadline:
                return False
            time.sleep(0.0005)
        return True

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


def live(
    config: dict[str, Any], proc: Proc, *, zygote: socket.socket, parent: int, requests: int, replies: int
) -> None:
    """In a process just forked from the zygote, whose pid is `parent`. Never returns."""
    code = 70
    try:
        confine.die_with(parent)
        if config["isolated"]:
            confine.drop_capabilities()
        confine.hide_memory()
        supervisor = Supervisor(
            isolated=config["isolated"],
            max_threads=config["max_threads"],
            max_output_bytes=config["max_output_bytes"],
            proc=proc,
            nursery=Nursery(zygote),
        )
        supervisor.serve(requests, replies)
        code = 0
    except BaseException:  # it must end here, not go on as a second zygote
        traceback.print_exc()
    finally:
        os._exit(code)
