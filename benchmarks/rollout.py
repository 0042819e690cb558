"""The rollout in numbers: overlap with slow tools, a step against TRL's, what Python costs, publishing weights.

    otcrl models smollm2 out=models/smollm2
    python -m pip install --no-deps --target build/trl 'trl==1.16.*'    # needs datasets and accelerate beside it
    python benchmarks/rollout.py                       # all parts but gpu, on an idle machine
    python benchmarks/rollout.py overhead publication  # some of them; the others keep their last results

Every part is a file of its own, rollout_PART.py, whose first lines say what is measured. Numbers: docs/rollout.md.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import rollout_gpu
import rollout_overhead
import rollout_overlap
import rollout_publication
import rollout_trl
import torch
from common import RESULTS, Row, publish

Found = tuple[list[Row], dict[str, float]]  # rows and ratios
COUNTS = (64, 256, 512, 1024, 2048, 4096)  # trajectories in flight


@dataclass(frozen=True, kw_only=True)
class Options:
    model: str
    engine: str
    trl: Path
    trajectories: int
    rounds: int
    steps: int
    threads: int


def overlap(options: Options) -> Found:
    work = rollout_overlap.Overlap(model=options.model, engine=options.engine, trajectories=options.trajectories)
    return asyncio.run(rollout_overlap.measure(work, options.rounds))


def trl(options: Options) -> Found:
    rows: list[Row] = []
    ratios: dict[str, float] = {}
    ways = {
        "step_speedup_vs_trl_tools": ("tools", rollout_trl.Step(model=options.model, calls=2, turn_tokens=24)),
        "step_speedup_vs_trl": ("no tools", rollout_trl.Step(model=options.model, calls=0, turn_tokens=72)),
    }
    for ratio, (name, step) in ways.items():
        found, ratios[ratio] = rollout_trl.measure(name, step, options.steps, options.threads, options.trl)
        rows += found
    return rows, ratios


def overhead(options: Options) -> Found:
    rows, share = rollout_overhead.measure(options.model, COUNTS, options.rounds, seconds_per_token())
    return rows, {"orchestration_share": share}


def publication(options: Options) -> Found:
    rows, spent = asyncio.run(rollout_publication.measure(options.model, 5, options.engine == "vllm"))
    return rows, {} if spent is None else {"publication_s": spent}


def gpu(options: Options) -> Found:
    return rollout_gpu.run(rollout_gpu.Gpu(model=options.model), 5)


PARTS: dict[str, Callable[[Options], Found]] = {
    "overlap": overlap, "trl": trl, "overhead": overhead, "publication": publication, "gpu": gpu,
}  # fmt: skip


def earlier() -> tuple[list[Row], dict[str, float]]:
    """What rollout.json holds."""
    path = RESULTS / "rollout.json"
    if not path.is_file():
        return [], {}
    found: Mapping[str, object] = json.loads(path.read_text())
    rows, ratios = found["rows"], found["ratios"]
    assert isinstance(rows, list)
    assert isinstance(ratios, dict)
    return rows, ratios


def seconds_per_token() -> float | None:
    """Of a whole step on this machine, for each token sampled in it; None before part trl has run."""
    values = {row["what"]: float(row["value"] or 0) for row in earlier()[0] if row["part"] == "trl"}
    if "tools, otcrl: step" not in values:
        return None
    return values["tools, otcrl: step"] / values["tools, otcrl: sampled tokens"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}; all but gpu if none is named")
    parser.add_argument("--model", default="models/smollm2")
    parser.add_argument("--engine", choices=("vllm", "hf"), default="vllm", help="of overlap and publication")
    parser.add_argument("--trl", type=Path, default=Path("build/trl"), help="where TRL is installed")
    parser.add_argument("--trajectories", type=int, default=64, help="of part overlap")
    parser.add_argument("--rounds", type=int, default=3, help="of parts overlap and overhead; the median counts")
    parser.add_argument("--steps", type=int, default=1, help="of part trl; the last one counts")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of torch, on every side")
    given = vars(parser.parse_args())
    parts = given.pop("parts") or [name for name in PARTS if name != "gpu"]
    if unknown := [name for name in parts if name not in PARTS]:
        parser.error(f"there is no part {unknown[0]!r}: choose from {', '.join(PARTS)}")
    options = Options(**given)
    torch.set_num_threads(options.threads)
    for name in parts:
        rows, ratios = PARTS[name](options)
        kept, old = earlier()
        others = [row for row in kept if row["part"] != name]
        publish("rollout", [*others, *rows], old | ratios)  # after each part: they take a while


if __name__ == "__main__":
    main()
