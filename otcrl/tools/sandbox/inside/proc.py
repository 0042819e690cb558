"""What /proc tells of processes: see proc(5). It runs inside, in the zygote and the supervisor: no child sees /proc."""

from __future__ import annotations

import os
import resource
import threading
from dataclasses import dataclass


@dataclass(frozen=True)
class Proc:
    fd: int  # a descriptor of /proc, which may be covered

    def read(self, path: str) -> str:
        """A file of /proc; "" if its process is gone."""
        try:
            fd = os.open(path, os.O_RDONLY, dir_fd=self.fd)
        except OSError:
            return ""
        try:
            return os.read(fd, 1 << 16).decode(errors="replace")
        except ProcessLookupError:
            return ""
        finally:
            os.close(fd)

    def mapped(self, pid: int | str) -> int:
        """Bytes of its address space; 0 if it is gone."""
        return self._memory(pid)[0]

    def resident(self, pid: int | str) -> int:
        """Bytes; 0 if it is gone."""
        return self._memory(pid)[1]

    def _memory(self, pid: int | str) -> tuple[int, int]:
        mapped, resident, *_ = map(int, self.read(f"{pid}/statm").split() or ("0", "0"))
        return mapped * resource.getpagesize(), resident * resource.getpagesize()

    def states(self, pid: int) -> list[str]:
        """Of each thread; none if it is gone."""
        try:
            tasks = os.open(f"{pid}/task", os.O_RDONLY | os.O_DIRECTORY, dir_fd=self.fd)
        except OSError:
            return []
        try:
            stats = [self.read(f"{pid}/task/{thread}/stat") for thread in os.listdir(tasks)]
        finally:
            os.close(tasks)
        return [stat.rpartition(")")[2].split()[0] for stat in stats if stat]

    def children(self) -> list[int]:
        """Of the thread that asks."""
        return [int(pid) for pid in self.read(f"self/task/{threading.get_native_id()}/children").split()]
