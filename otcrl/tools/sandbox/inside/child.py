"""The processes that the zygote forks for the supervisor, and how the one asks the other. It runs inside.

What travels between the two is a number or a descriptor, never a caller's data: the next children are copies of the
zygote, and would find it there.
"""

from __future__ import annotations

import os
import select
import socket
import struct
from dataclasses import dataclass

COMMAND = struct.Struct("=ci")  # FORK and how many; END or REAP and which process
FORK, END, REAP = b"f", b"e", b"r"  # REAP is END without an answer
END_ANSWER = struct.Struct("=i?")  # wait status, whether its CPU time was used up
FDS = 5  # of each child, in the order of `Child`


class Pipes:
    """To one child: programs go in, output and reports come out."""

    def __init__(self) -> None:
        (self.there, self.requests), (self.stdout, self.out) = os.pipe(), os.pipe()
        (self.stderr, self.err), (self.reports, self.says) = os.pipe(), os.pipe()

    def given(self) -> tuple[int, int, int, int]:
        """The child's ends, as it numbers them from 1 on."""
        return self.out, self.err, self.there, self.says

    def kept(self) -> tuple[int, int, int, int]:
        """The supervisor's ends, in the order of `Child`; the others are closed."""
        for fd in self.given():
            os.close(fd)
        for fd in (mine := (self.requests, self.stdout, self.stderr, self.reports)):
            os.set_blocking(fd, False)
        return mine


@dataclass
class Child:
    """One forked process and the pipes to it, as the supervisor holds it."""

    pid: int
    pidfd: int
    requests: int
    stdout: int
    stderr: int
    reports: int
    resident_bytes: int = 0  # before its first program

    def is_dead(self) -> bool:
        poller = select.poll()
        poller.register(self.pidfd, select.POLLIN)
        return bool(poller.poll(0))

    def close(self) -> None:
        for fd in (self.pidfd, self.requests, self.stdout, self.stderr, self.reports):
            os.close(fd)


@dataclass(frozen=True)
class Nursery:
    """The zygote, as the supervisor sees it. A pid stays the child's until `end` or `reap`."""

    zygote: socket.socket

    def fork(self, count: int) -> list[Child]:
        """Children that are locked up and wait for a program."""
        self.zygote.send(COMMAND.pack(FORK, count))
        pids = struct.Struct(f"={count}i")
        answer, fds, *_ = socket.recv_fds(self.zygote, pids.size, FDS * count)
        each = [fds[first : first + FDS] for first in range(0, len(fds), FDS)]
        return [Child(pid, *own) for pid, own in zip(pids.unpack(answer), each, strict=True)]

    def end(self, child: Child) -> tuple[int, bool]:
        """Kill it; its wait status, and whether it had used its CPU time up."""
        self.zygote.send(COMMAND.pack(END, child.pid))
        status, had_no_time = END_ANSWER.unpack(self.zygote.recv(END_ANSWER.size))
        return status, had_no_time

    def reap(self, child: Child) -> None:
        """The same without waiting for it."""
        self.zygote.send(COMMAND.pack(REAP, child.pid))
