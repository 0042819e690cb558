"""Every metric of every step as a line of JSON. What is not a finite number is null: NaN is not JSON."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from pathlib import Path

from otcrl.types import Metrics


class JsonlLogger:
    """Appends to `path`; a line is in the file before the next step begins.

    A run that was killed may have left half a line, which is dropped. A resumed run gives the step that it
    goes on from: lines of that step and later ones are dropped too, since they will be written again.
    """

    def __init__(self, path: Path, resume_step: int | None = None) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        drop_from(path, resume_step)
        self.file = path.open("a", encoding="utf-8")

    def log(self, metrics: Metrics, step: int) -> None:
        finite = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        self.file.write(json.dumps({"step": step, **finite}, allow_nan=False) + "\n")
        self.file.flush()

    def close(self) -> None:
        self.file.close()


def drop_from(path: Path, step: int | None) -> None:
    """Leaves the whole lines of the steps before `step` (None: of all). A kill in between leaves the old file."""
    if not path.exists():
        return
    beside = path.with_name(f"{path.name}.tmp")
    with beside.open("w", encoding="utf-8") as kept:
        kept.writelines(line for line in whole_lines(path) if step is None or json.loads(line)["step"] < step)
    os.replace(beside, path)


def whole_lines(path: Path) -> Iterator[str]:
    with path.open(encoding="utf-8") as file:
        yield from (line for line in file if line.endswith("\n"))
