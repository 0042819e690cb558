"""What every benchmark writes: a table for people, and results/NAME.json for programs."""

from __future__ import annotations

import json
import os
import platform
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import transformers
from rich import print
from rich.table import Table

RESULTS = Path(__file__).parent / "results"
Row = Mapping[str, str | int | float | None]


def machine() -> dict[str, str | int]:
    info = Path("/proc/cpuinfo")
    names = [line.split(":")[1].strip() for line in info.read_text().splitlines() if "model name" in line]
    return {
        "cpu": names[0] if names else platform.processor(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "cores": os.cpu_count() or 0,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def publish(name: str, rows: Sequence[Row], ratios: Mapping[str, float]) -> None:
    """Print the rows and the ratios, and write results/NAME.json."""
    table = Table(*rows[0], title=name)
    for row in rows:
        table.add_row(*(f"{v:.3f}" if isinstance(v, float) else "" if v is None else str(v) for v in row.values()))
    print(table)
    print(dict(ratios))
    command = " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]])
    result = {"machine": machine(), "command": command, "rows": list(rows), "ratios": dict(ratios)}
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(result, indent=2) + "\n")
