"""What the zygote holds of each process that it forks."""

from __future__ import annotations

import os
import select
from dataclasses import dataclass


class Pipes:
    """Between the zygote and one child: programs go in, output and reports come out."""

    def __init__(self) -> None:
        (self.there, self.requests), (self.stdout, self.out) = os.pipe(), os.pipe()
        (self.stderr, self.err), (self.reports, self.says) = os.pipe(), os.pipe()

    def given(self) -> tuple[int, int, int, int]:
        """The child's ends, as it numbers them from 1 on."""
        return self.out, self.err, self.there, self.says

    def kept(self) -> tuple[int, int, int, int]:
        """The zygote's ends, in the order of `Child`; the others are closed."""
        for fd in self.given():
            os.close(fd)
        for fd in (mine := (self.requests, self.stdout, self.stderr, self.reports)):
            os.set_blocking(fd, False)
        return mine


@dataclass
class Child:
    """One forked process and the pipes to it; `directory` is its own where there is no isolation."""

    pid: int
    pidfd: int
    requests: int
    stdout: int
    stderr: int
    reports: int
    directory: str | None
    resident_bytes: int = 0  # before its first program

    def is_dead(self) -> bool:
        poller = select.poll()
        poller.register(self.pidfd, select.POLLIN)
        return bool(poller.poll(0))

    def close(self) -> None:
        for fd in (self.pidfd, self.requests, self.stdout, self.stderr, self.reports):
            os.close(fd)
