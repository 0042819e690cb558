"""Every metric of every step as a line of JSON. What is not a finite number is null: NaN is not JSON."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from io import FileIO
from pathlib import Path

from otcrl.tell import tell
from otcrl.types import Metrics


class JsonlLogger:
    """Appends to `path`; a line is in the file before the next step begins.

    A run that was killed may have left half a line, which is dropped. A resumed run gives the step that it
    goes on from: lines of that step and later ones are dropped too, since they will be written again.
    """

    def __init__(self, path: Path, resume_step: int | None = None) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        drop_from(path, resume_step)
        self._lines = Lines(path)

    def log(self, metrics: Metrics, step: int) -> None:
        finite = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        self._lines.write(json.dumps({"step": step, **finite}, allow_nan=False) + "\n")

    def close(self) -> None:
        self._lines.close()


class Lines:
    """A file that grows by whole lines. While the disk is full they are kept, and written when there is room."""

    def __init__(self, path: Path) -> None:
        self._path, self._file, self._pending = path, path.open("ab", buffering=0), b""

    def write(self, lines: str) -> None:
        self._pending += lines.encode()
        try:
            append(self._file, self._pending)
        except OSError as error:
            say_unwritten(self._path, error, "its lines are kept until there is room")
        else:
            self._pending = b""

    def close(self) -> None:
        """Raises OSError for lines that could not be written in the end."""
        with self._file:
            append(self._file, self._pending)


def append(file: FileIO, data: bytes) -> None:
    """All of `data` or, where that raises OSError, none of it."""
    end, rest = os.fstat(file.fileno()).st_size, memoryview(data)
    try:
        while rest:
            rest = rest[file.write(rest) :]
    except OSError:
        file.truncate(end)
        raise


def say_unwritten(path: Path, error: OSError, so: str) -> None:
    tell(f"FAILED: {path} could not be written: {error.strerror}; {so}")


def drop_from(path: Path, step: int | None) -> None:
    """Leaves the whole lines of the steps before `step` (None: of all), which are the first ones. Needs no room."""
    if not path.exists():
        return
    end = 0
    with path.open("rb") as file:
        for line in file:
            if not line.endswith(b"\n") or (step is not None and json.loads(line)["step"] >= step):
                break
            end += len(line)
    os.truncate(path, end)


def whole_lines(path: Path) -> Iterator[str]:
    """What is not UTF-8 shows as such; half a line may end within a character."""
    with path.open("rb") as file:
        yield from (line.decode(errors="replace") for line in file if line.endswith(b"\n"))
