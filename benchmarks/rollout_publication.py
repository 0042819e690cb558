"""Seconds from the learner's weights to an engine that samples from them, by the way they take.

vLLM on CPU by a file in memory and by one in a folder, and the embedded engine's copy inside this process; float32.
Our side of a file is copying and digesting; the worker's is checking the digests, loading, and digesting again.
"""

from __future__ import annotations

import copy
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

from common import Row
from rollout_parts import part, row
from rollout_work import EndlessModel
from torch import nn

from otcrl.protocols import Engine
from otcrl.rollout.snapshot import Snapshot, damaged

IN_MEMORY = "vllm, file in memory"


async def publications(engine: Engine, model: nn.Module, rounds: int) -> list[float]:
    """Seconds of each; the engine has started before."""
    found = []
    for _ in range(rounds + 1):
        begun = time.perf_counter()
        await engine.load_weights(model.named_parameters(), engine.version + 1)
        found.append(time.perf_counter() - begun)
    return found[1:]  # the first one started the engine


def halves(model: nn.Module, folder: Path | None, rounds: int) -> tuple[float, float]:
    """Median seconds of writing with digests, and of checking them, both done here and alone."""
    snapshot = Snapshot(folder)
    written, checked = [], []
    for version in range(rounds + 1):
        begun = time.perf_counter()
        manifest = snapshot.write(model.named_parameters(), version)
        middle = time.perf_counter()
        assert not damaged(manifest)
        written.append(middle - begun)
        checked.append(time.perf_counter() - middle)
    snapshot.close()
    return median(written[1:]), median(checked[1:])  # the first one claims memory


async def measure(path: str, rounds: int, with_vllm: bool) -> tuple[list[Row], float | None]:
    """Rows, and the seconds of the way that is taken where there is no GPU."""
    model, tokenizer = EndlessModel(path=path).load()
    size = sum(parameter.nbytes for parameter in model.parameters())
    wired = {"tokenizer": tokenizer}
    with tempfile.TemporaryDirectory() as folder:
        ways: dict[str, tuple[Callable[[], Any], Path | None]] = {
            IN_MEMORY: (lambda: part("engine/vllm", wired | {"model": model}, context=1024, **VLLM), None),
            "vllm, file on disk": (
                lambda: part("engine/vllm", wired | {"model": model}, context=1024, weights_dir=folder, **VLLM),
                Path(folder),
            ),
            "hf, copied in this process": (
                lambda: part("engine/hf", wired | {"model": copy.deepcopy(model)}, context=1024),
                None,
            ),
        }
        rows: list[Row] = [row("publication", "weights, float32", size / 1e9, "GB")]
        in_memory = None
        for name, (make, place) in ways.items():
            if name.startswith("vllm") and not with_vllm:
                continue
            engine: Engine = make()
            try:
                spent = median(await publications(engine, model, rounds))
            finally:
                await engine.close()
            rows += [row("publication", name, spent, "s"), row("publication", name, size / 1e9 / spent, "GB/s")]
            print(f"publication: {name} {spent:.2f} s", flush=True)
            if name.startswith("vllm"):
                wrote, checked = halves(model, place, rounds)
                rows += [
                    row("publication", f"{name}: written and digested by the trainer", wrote, "s"),
                    row("publication", f"{name}: checked, as the worker does", checked, "s"),
                    row("publication", f"{name}: the rest, loading above all", spent - wrote - checked, "s"),
                ]
            in_memory = spent if name == IN_MEMORY else in_memory
    return rows, in_memory


VLLM: dict[str, Any] = {"max_sequences": 8, "options": {"enforce_eager": True}}
