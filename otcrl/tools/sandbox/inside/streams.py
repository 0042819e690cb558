"""What comes out of a child: its output, kept at both ends, and what it says about itself. It runs inside."""

from __future__ import annotations

import json
import os
from typing import Any

from otcrl.tools.sandbox.inside.channel import HEADER, encodable


class Capture:
    """The first and the last `limit` bytes of a stream; what lies between is only counted."""

    def __init__(self, limit: int) -> None:
        self.limit, self.head, self.tail, self.dropped = limit, b"", b"", 0

    def take(self, fd: int) -> bool:
        """Read once what is there; False at the end of the stream, or when nothing is."""
        try:
            part = os.read(fd, 1 << 16)
        except BlockingIOError:
            return False
        room = self.limit - len(self.head)
        self.head += part[:room]
        self.tail += part[room:]
        if len(self.tail) > self.limit:
            self.dropped += len(self.tail) - self.limit
            self.tail = self.tail[-self.limit :]
        return bool(part)

    def total(self) -> int:
        return len(self.head) + len(self.tail) + self.dropped

    def text(self) -> str:
        return (self.head + self.tail).decode(errors="replace")


class Report:
    """What a child says about itself, as far as it can be understood."""

    def __init__(self, limit: int) -> None:
        self.limit, self.content = limit, b""

    def take(self, fd: int) -> bool:
        try:
            part = os.read(fd, 1 << 16)
        except BlockingIOError:
            return False
        if len(self.content) < self.limit:
            self.content += part
        return bool(part)

    def total(self) -> int:
        return 0

    def is_whole(self) -> bool:
        size = HEADER.size
        return len(self.content) >= size and len(self.content) - size >= HEADER.unpack(self.content[:size])[0]

    def message(self, request: dict[str, Any]) -> dict[str, Any] | None:
        """As much of it as was asked for; None for what is no report, or not all of one."""
        if not self.is_whole():
            return None
        (length,) = HEADER.unpack(self.content[: HEADER.size])
        try:
            said = json.loads(self.content[HEADER.size :][:length])
            files = dict(said["files"])
            return {
                "code": int(said["code"]) & 0xFF,
                "value": encodable(said["value"][: 2 * request["max_bytes"]]),
                "cut": max(0, int(said["cut"])),
                "files": {name: encodable(files[name]) for name in request["fetch"] if name in files},
            }
        except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError):
            return None
