"""The sandbox against starting a Python for each program: latency, calls per second, memory.

    python benchmarks/sandbox.py [--calls 300]

Rows of one kind are measured in rounds, one after the other, so that a busy minute hits all of them.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from statistics import median, quantiles

from common import publish

from otcrl.tools.sandbox.execution import Program
from otcrl.tools.sandbox.pool import Pool

PRELOAD = ("numpy", "scipy", "sympy")
CONCURRENCY = 64
ROUNDS = 4


def program(code: str) -> Program:
    return Program(code=code, timeout_s=10.0, memory_mb=256, max_bytes=4000)


def python(*arguments: str, folder: str | None = None) -> None:
    environment = {"PATH": os.environ["PATH"], "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, check=True)


def fresh_process(code: str) -> None:
    """As SandboxFusion runs a program: a new directory, a file in it, a new interpreter."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "main.py").write_text(code)
        python("main.py", folder=folder)


async def seconds_of(call: Callable[[], Awaitable[object]], count: int) -> list[float]:
    found = []
    for _ in range(count):
        begun = time.perf_counter()
        await call()
        found.append(time.perf_counter() - begun)
    return found


async def latencies(pool: Pool, calls: int) -> dict[str, list[float]]:
    kinds: dict[str, tuple[Callable[[], Awaitable[object]], int]] = {
        "sandbox, print(1)": (lambda: pool.run(program("print(1)")), calls),
        "sandbox, numpy and sympy": (
            lambda: pool.run(program("import numpy, sympy\nprint(sympy.factorint(int(numpy.arange(9).sum())))")),
            calls,
        ),
        "python -c 'print(1)'": (lambda: asyncio.to_thread(python, "-c", "print(1)"), calls // 10),
        "python -c 'import numpy, sympy'": (
            lambda: asyncio.to_thread(python, "-c", "import numpy, sympy\nprint(1)"),
            max(3, calls // 60),
        ),
        "fresh process and directory": (lambda: asyncio.to_thread(fresh_process, "print(1)"), calls // 10),
    }
    found: dict[str, list[float]] = {name: [] for name in kinds}
    for _ in range(ROUNDS):
        for name, (call, count) in kinds.items():
            found[name] += await seconds_of(call, max(1, count // ROUNDS))
    return found


async def throughput(pool: Pool, calls: int) -> float:
    """Calls per second with 64 of them in flight."""
    gate = asyncio.Semaphore(CONCURRENCY)

    async def one(number: int) -> str:
        async with gate:
            return (await pool.run(program(f"print({number})"))).stdout

    begun = time.perf_counter()
    printed = await asyncio.gather(*map(one, range(calls)))
    assert printed == [f"{number}\n" for number in range(calls)]
    return calls / (time.perf_counter() - begun)


def proportional_set_size(pid: int) -> float:
    """MiB of a process and of all below it; a shared page counts for its share."""
    own = next(
        int(line.split()[1]) for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines() if "Pss:" in line
    )
    below = [int(child) for task in Path(f"/proc/{pid}/task").glob("*/children") for child in task.read_text().split()]
    return own / 1024 + sum(map(proportional_set_size, below))


def sandboxes() -> list[int]:
    return [int(pid) for file in Path("/proc/self/task").glob("*/children") for pid in file.read_text().split()]


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--calls", type=int, default=300)
    calls = parser.parse_args().calls
    workers = len(os.sched_getaffinity(0))
    pool = Pool(workers, PRELOAD, "bubblewrap")
    try:
        await pool.start()
        await throughput(pool, 2 * CONCURRENCY)  # warm
        found = await latencies(pool, calls)
        rate = await throughput(pool, 10 * calls)
        await asyncio.sleep(0.5)
        memory = sum(map(proportional_set_size, sandboxes())) / workers
    finally:
        await pool.close()
    rows: list[dict[str, str | int | float | None]] = [
        {"kind": kind, "calls": len(s), "p50_ms": 1e3 * median(s), "p90_ms": 1e3 * quantiles(s, n=10)[-1]}
        for kind, s in found.items()
    ]
    p50 = {kind: median(seconds) for kind, seconds in found.items()}
    ours = p50["sandbox, print(1)"]
    ratios = {
        "p50_ms": 1e3 * ours,
        "p50_speedup_vs_python_c": p50["python -c 'print(1)'"] / ours,
        "p50_speedup_vs_python_numpy_sympy": p50["python -c 'import numpy, sympy'"] / ours,
        "calls_per_s": rate,
        "speedup_vs_fresh_process": p50["fresh process and directory"] / ours,
        "idle_worker_pss_mb": memory,
    }
    publish("sandbox", rows, ratios)


if __name__ == "__main__":
    asyncio.run(main())
