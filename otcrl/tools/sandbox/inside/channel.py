"""Messages over a pipe: a 4-byte big-endian length and JSON. Standard library only: it runs on both sides."""

from __future__ import annotations

import json
import os
import struct
from typing import Any

HEADER = struct.Struct(">I")


def packed(message: dict[str, Any]) -> bytes:
    body = json.dumps(message).encode()
    return HEADER.pack(len(body)) + body


def write_all(fd: int, content: bytes) -> None:
    view = memoryview(content)
    while view:
        view = view[os.write(fd, view) :]


def send(fd: int, message: dict[str, Any]) -> None:
    write_all(fd, packed(message))


def receive(fd: int) -> dict[str, Any] | None:
    """The next message, or None at the end of the stream."""
    header = read_exactly(fd, HEADER.size)
    body = header and read_exactly(fd, HEADER.unpack(header)[0])
    return json.loads(body) if body else None


def read_exactly(fd: int, count: int) -> bytes | None:
    parts: list[bytes] = []
    while count:
        part = os.read(fd, min(count, 1 << 20))
        if not part:
            return None
        parts.append(part)
        count -= len(part)
    return b"".join(parts)


def encodable(text: str) -> str:
    """`text` with a question mark for what UTF-8 has no bytes for, half a surrogate pair."""
    return text.encode(errors="replace").decode()
