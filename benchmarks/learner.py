"""The learner in numbers: one GRPO update against TRL's and a plain loop's, and what its cost grows with.

    otcrl models smollm2 out=models/smollm2
    python -m pip install --no-deps --target build/trl 'trl==1.16.*'    # needs datasets and accelerate beside it
    python benchmarks/learner.py              # all parts, on an idle machine
    python benchmarks/learner.py cost ranks   # some of them; the others keep their last results

    update   tokens/s and peak memory of an update of 64 trajectories: TRL's trainer, ours, ours with shared prefixes
    plain    the same of a part of the batch, and a plain loop over padded rows
    memory   peaks with the smallest passes and with gradient checkpointing, on a part of the batch
    cost     time and memory against the tokens of a batch, the length of a trajectory, the vocabulary (learner_cost.py)
    ranks    two ranks of one thread against one process of one thread and of two, on a part of the batch
    plan     the error of `otcrl plan`, from results/plan.json

With a GPU the same parts run on it, with `--precision bfloat16` for autocast; FLOP utilisation is then in the table.
Numbers: docs/learner.md.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import learner_cost
import torch
from common import RESULTS, Row, publish
from learner_work import Case, Lengths, line, load, write_batch

from otcrl.plan.gpus import GPUS
from otcrl.plan.shapes import find_shape
from otcrl.plan.speed import forward_flops
from otcrl.types import Batch

HERE = Path(__file__).parent
INSTALL = "python -m pip install --no-deps --target {} 'trl==1.16.*'"
LOSS_CLOSE = 1e-4  # of losses of two ways, absolute
GRADIENT_CLOSE = 1e-3  # of gradients, relative to their length

Costs = dict[Case, dict[str, float]]  # seconds, gigabytes and so on of each way
Found = tuple[list[Row], dict[str, float]]  # rows and ratios


@dataclass(frozen=True, kw_only=True)
class Options:
    model: str
    trl: Path
    lengths: Lengths
    part: int  # groups where a part of the batch will do
    rows: int
    micro_tokens: int
    precision: str | None
    threads: int

    @property
    def some(self) -> Options:
        """With a part of the batch."""
        return replace(self, lengths=replace(self.lengths, groups=min(self.part, self.lengths.groups)))

    def ours(self, packing: str = "shared", *, ranks: int = 1, threads: int | None = None) -> Case:
        return Case(way=packing, micro_tokens=self.micro_tokens, ranks=ranks, threads=threads or self.threads)

    def peer(self, way: str) -> Case:
        return Case(way=way, rows=self.rows, threads=self.threads)


# -- one way, one process --------------------------------------------------------------------------------


def measure(cases: Sequence[Case], options: Options) -> Costs:
    """What an update cost in each way; all of them had the same loss and gradient."""
    found: Costs = {}
    with tempfile.TemporaryDirectory() as folder:
        batch = Path(folder, "batch.pt")
        write_batch(batch, options.lengths, load(options.model), options.precision)
        gradients = {}
        for case in cases:
            spec = {
                "case": asdict(case), "model": options.model, "batch": str(batch),
                "lengths": asdict(options.lengths), "precision": options.precision,
            }  # fmt: skip
            found[case], gradients[case] = run(case, spec, Path(folder), options.trl)
            compare(found[cases[0]], found[case], gradients[cases[0]], gradients[case], case, options.precision)
            print(case.name, {name: round(value, 7) for name, value in found[case].items()}, flush=True)
    return found


def run(case: Case, spec: Mapping[str, object], folder: Path, trl: Path) -> tuple[dict[str, float], torch.Tensor]:
    source, target = folder / "spec.json", folder / "result.json"
    source.write_text(json.dumps(spec))
    environment = {**os.environ, "OMP_NUM_THREADS": str(case.threads), "TOKENIZERS_PARALLELISM": "false"}
    script = "learner_work.py"
    if case.way == "trl":
        if not (trl / "trl").is_dir():
            sys.exit(f"TRL is not in {trl}: {INSTALL.format(trl)}")
        script, environment["PYTHONPATH"] = "learner_trl.py", f"{trl}:{environment.get('PYTHONPATH', '')}"
    launcher = [] if case.ranks == 1 else ["-m", "torch.distributed.run", f"--nproc_per_node={case.ranks}"]
    done = subprocess.run(
        [sys.executable, *launcher, str(HERE / script), str(source), str(target)],
        env=environment, text=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, check=False,
    )  # fmt: skip
    if done.returncode:
        sys.exit(f"{script} failed:\n{done.stderr[-3000:]}")
    return json.loads(target.read_text()), torch.load(target.with_suffix(".gradient"))


def compare(
    first: dict[str, float], found: dict[str, float], expected: torch.Tensor, gradient: torch.Tensor, case: Case,
    precision: str | None,
) -> None:  # fmt: skip
    """The objective is the same. Adds to `found` how far the gradient is from the first way's."""
    found["gradient_gap"] = ((gradient - expected).norm() / expected.norm()).item()
    if precision is None:
        assert abs(found["loss"] - first["loss"]) < LOSS_CLOSE, (
            f"{case.name}: loss {found['loss']}, not {first['loss']}"
        )
        assert found["gradient_gap"] < GRADIENT_CLOSE, f"{case.name}: another gradient, by {found['gradient_gap']:.2g}"


# -- parts -------------------------------------------------------------------------------------------------


def update(options: Options) -> Found:
    """Without gradient checkpointing on either side."""
    return against("trl", "update", options)


def plain(options: Options) -> Found:
    return against("plain", "plain", options.some)


def against(way: str, part: str, options: Options) -> Found:
    peer, packed, shared = options.peer(way), options.ours("packed"), options.ours("shared")
    found = measure([peer, packed, shared], options)
    ratios = {}
    for suffix, case in {"": packed, "_shared_prefix": shared}.items():
        mine, other = found[case], found[peer]
        ratios[f"tokens_vs_{way}{suffix}"] = other["wall_s"] / mine["wall_s"]
        ratios[f"peak_memory_vs_{way}{suffix}"] = mine["peak_gb"] / other["peak_gb"]
    return table(part, found, options), ratios


def memory(options: Options) -> Found:
    """The least that either side can do, a trajectory at a time, and what it can do with gradient checkpointing."""
    longest = options.lengths.prompt + options.lengths.longest
    least = Case(way="trl", rows=1, threads=options.threads), replace(options.ours(), micro_tokens=longest)
    again = [replace(case, checkpointing=True) for case in (options.peer("trl"), options.ours())]
    found = measure([*least, *again], options.some)

    def ratio(peer: Case, own: Case) -> float:
        return found[own]["peak_gb"] / found[peer]["peak_gb"]

    ratios = {"peak_memory_vs_trl_smallest": ratio(*least), "peak_memory_vs_trl_checkpointing": ratio(*again)}
    return table("memory", found, options.some), ratios


def ranks(options: Options) -> Found:
    """Two ranks of one thread have the cores that one process of two threads has."""
    one, two, split = options.ours(threads=1), options.ours(threads=2), options.ours(threads=1, ranks=2)
    found = measure([one, two, split], options.some)
    ratios = {
        "efficiency_2_ranks": found[one]["wall_s"] / found[split]["wall_s"] / 2,
        "efficiency_2_threads": found[one]["wall_s"] / found[two]["wall_s"] / 2,
    }
    return table("ranks", found, options.some), ratios


def cost(options: Options) -> Found:
    return learner_cost.measure()


def plan(options: Options) -> Found:
    """Measured by plan.py."""
    ratios = json.loads((RESULTS / "plan.json").read_text())["ratios"]
    return [], {"plan_error": ratios["plan_error"]}


PARTS: dict[str, Callable[[Options], Found]] = {
    "update": update, "plain": plain, "memory": memory, "cost": cost, "ranks": ranks, "plan": plan,
}  # fmt: skip


def table(part: str, found: Costs, options: Options) -> list[Row]:
    """`tokens_per_s`: of the trajectories, each with its prompt; padding does not count."""
    batch = options.lengths.batch(1000)
    tokens = int(batch.attention_mask.sum())
    return [
        line(
            part, case.name, **cost, trajectories=len(batch.rewards), tokens_per_s=tokens / cost["wall_s"],
            mfu=utilisation(batch, case, cost["wall_s"], options.model),
        )
        for case, cost in found.items()
    ]  # fmt: skip


def utilisation(batch: Batch, case: Case, seconds: float, model: str) -> float | None:
    """Share of the GPU's bfloat16 peak that went into tokens, padding left out; None where the GPU is not known."""
    name = torch.cuda.get_device_name().lower() if torch.cuda.is_available() else ""
    gpu = next((gpu for gpu in GPUS.values() if gpu.name.partition("-")[0] in name), None)
    if gpu is None:
        return None
    lengths_B, actions_B = batch.attention_mask.sum(1), batch.action_mask.sum(1)
    prompts_B = lengths_B - actions_B
    tokens, pairs = lengths_B.sum(), (lengths_B**2).sum() / 2
    if case.way == "shared":  # a group's prompt once
        repeated_B = torch.arange(len(prompts_B)) % int((batch.group_ids == 0).sum()) > 0
        tokens, pairs = tokens - prompts_B[repeated_B].sum(), pairs - (prompts_B[repeated_B] ** 2).sum() / 2
    forward = forward_flops(find_shape(model), float(tokens), float(actions_B.sum()), float(pairs / tokens))
    return 3 * forward / seconds / gpu.flops


def earlier() -> Found:
    """What learner.json holds."""
    path = RESULTS / "learner.json"
    if not path.is_file():
        return [], {}
    found = json.loads(path.read_text())
    return found["rows"], found["ratios"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}; all if none is named")
    parser.add_argument("--model", default="models/smollm2")
    parser.add_argument("--trl", type=Path, default=Path("build/trl"), help="where TRL is installed")
    parser.add_argument("--groups", type=int, default=8, help="of 8 trajectories")
    parser.add_argument("--part", type=int, default=2, help="of them, where a part of the batch will do")
    parser.add_argument(
        "--rows", type=int, default=4, help="in a pass of TRL and of the plain loop; 8, its default, hold 21 GB"
    )
    parser.add_argument(
        "--micro-tokens", type=int, default=2048, help="in a pass of otcrl, as its SmolLM2 presets have"
    )
    parser.add_argument("--precision", choices=("bfloat16",), help="of autocast, on all sides; float32 if not given")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of torch, on all sides")
    given = vars(parser.parse_args())
    parts = given.pop("parts") or list(PARTS)
    if unknown := [name for name in parts if name not in PARTS]:
        parser.error(f"there is no part {unknown[0]!r}: choose from {', '.join(PARTS)}")
    options = Options(lengths=Lengths(groups=given.pop("groups")), **given)
    torch.set_num_threads(options.threads)
    for name in parts:
        rows, ratios = PARTS[name](options)
        kept, old = earlier()
        others = [row for row in kept if row["part"] != name]
        rounded = {what: round(ratio, 4) for what, ratio in ratios.items()}
        publish("learner", [*others, *rows], old | rounded)  # after each part: they take a while


if __name__ == "__main__":
    main()
