"""Systems of the OTC paper on SmolLM2-135M from one start: the runs behind docs/results.md.

    otcrl models smollm2 out=models/smollm2
    python benchmarks/systems.py python                        # ToRL-GRPO and OTC-GRPO, seeds 0 and 1
    OTCRL_DATA=DIR python benchmarks/systems.py search         # Search-R1 and OTC, by PPO and by GRPO
    OTCRL_DATA=DIR python benchmarks/systems.py untrained      # the model as it is: direct, CoT, RAG, IRCoT, TIR
    python benchmarks/systems.py python --jobs 2 --only otc_grpo-0 torl_grpo-0

Every run is an ordinary `otcrl train` of one thread. What is there is not repeated, what was cut off goes on. A cold
start and its evaluation come first, and all runs take its weights. `--dry` prints the commands. results/systems.json
has the figures of every world that has been run; its ratios are calls of OTC's runs over those of their twins, greedy.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from common import RESULTS, Row, publish

OTCRL = [sys.executable, "-m", "otcrl"]
FILES = "${{oc.env:OTCRL_DATA}}/{}/train.jsonl.gz"
TEST = ",".join(f"${{oc.env:OTCRL_DATA}}/{name}/test.jsonl.gz" for name in ("hotpotqa", "2wikimultihopqa", "musique"))
PPO = ["algo=ppo", "algo.kl_reward_coef=0.0", "rollout.group_size=1"]  # with a body of its own for the critic
HOTPOTQA = [f"task.train=[{FILES.format('hotpotqa')}]", "task.in_domain=[hotpotqa]"]  # guessing seldom pays there

MULTI_HOP = (
    *("conf=smollm2_search", "task.seed=0", "task.max_test=100"),
    f"task.train=[{FILES.format('hotpotqa')},{FILES.format('2wikimultihopqa')}]",
    "task.in_domain=[hotpotqa,2wikimultihopqa]",  # MuSiQue is held out
)
SEARCH = (
    *MULTI_HOP,
    *("tools.search.topk=1", "task.demo_passages=1"),  # one passage of 40 words: half the tokens of two of 30
    *("tools.search.max_passage_words=40", "task.demo_max_words=40"),
)
NO_SEARCH = (
    "tools=none",
    "task.corpus=[]",
    "task.template=none",
    "rollout.limits.max_calls=0",
    "rollout.limits.max_turns=1",
)
RL_SEARCH = ("loop.steps=32", "model.dtype=bfloat16", "learner.policy_optimizer.lr=3e-5")


@dataclass(frozen=True, kw_only=True)
class World:
    """What the systems of one comparison have in common, and where they differ."""

    settings: tuple[str, ...]  # of the start and of every run
    start: tuple[str, ...]  # of the cold start alone
    training: tuple[str, ...]
    systems: dict[str, list[str]]
    seeds: dict[str, tuple[int, ...]]

    def runs(self) -> list[tuple[str, int]]:
        """All systems of one seed before the next, so that there is something to compare early."""
        pairs = [(system, seed) for system, seeds in self.seeds.items() for seed in seeds]
        return sorted(pairs, key=lambda pair: pair[1])


def single_hop(extra: str, data: str = "runs/single_hop", seeds: tuple[int, ...] = (0, 1)) -> World:
    """Questions of NQ-open that one passage answers; of the start's demonstrations, `extra` search a second time."""
    return World(
        settings=(
            *("conf=smollm2_search", "task.seed=0", "task.max_test=150", "task.in_domain=[nq]"),
            f"task.train=[{data}/nq/train.jsonl.gz]",  # EfficientQA is held out
            f"task.test=[{data}/nq/test.jsonl.gz,{data}/efficientqa/test.jsonl.gz]",
            *("tools.search.topk=1", "task.demo_passages=1", "task.demo_query=question"),
            *("tools.search.max_passage_words=40", "task.demo_max_words=40", "evaluate.sampled=true"),
        ),
        start=(
            *("model.path=runs/systems/search/start/model", "sft.steps=32"),
            *("task.demo_direct=0", f"task.demo_extra={extra}"),
        ),
        training=("loop.steps=24", *RL_SEARCH[1:], "rollout.group_size=8"),
        systems={"search_r1_grpo": ["reward=outcome"], "otc_grpo": ["reward=otc_grpo", "reward.c=4.0"]},
        seeds={"search_r1_grpo": seeds, "otc_grpo": seeds},
    )


WORLDS = {
    "python": World(
        settings=(
            *("conf=smollm2_python", "task.seed=0", "task.test_share=0.2", "task.test_size=120"),
            "evaluate.sampled=true",
        ),
        start=(
            *("sft.steps=96", "sft.optimizer.lr=3e-4", "task.demo_overcall=0.4"),
            *("task.kinds.small_sum.weight=2", "task.kinds.small_product.weight=1"),  # so that they are known by heart
        ),
        training=("loop.steps=40", "loop.problems_per_step=6"),
        systems={
            "torl_grpo": ["reward=torl"],
            "otc_grpo": ["reward=otc_grpo", "reward.c=3.0"],
            "otc_grpo_c10": ["reward=otc_grpo", "reward.c=10.0"],  # a milder price
        },
        seeds={"torl_grpo": (0, 1), "otc_grpo": (0, 1), "otc_grpo_c10": (0,)},
    ),
    "sums": World(  # python without small products; drills make certain that small sums are known by heart
        settings=(
            *("conf=smollm2_python", "task.seed=0", "task.test_share=0.3", "task.test_size=120"),
            *("~task.kinds.small_product", "task.kinds.small_sum.weight=1.5", "evaluate.sampled=true"),
        ),
        start=(
            *("sft.steps=80", "sft.batch_size=36", "sft.optimizer.lr=3e-4", "task.drill_share=0.5"),
            *("task.demo_overcall=0.7", "task.kinds.small_sum.weight=4.5"),
        ),
        training=("loop.steps=40", "loop.problems_per_step=6", "model.dtype=bfloat16"),
        systems={"torl_grpo": ["reward=torl"], "otc_grpo": ["reward=otc_grpo", "reward.c=3.0"]},
        seeds={"torl_grpo": (0, 1), "otc_grpo": (0, 1)},
    ),
    "search": World(
        settings=SEARCH,
        start=("sft.steps=80",),
        training=RL_SEARCH,
        systems={
            "search_r1_grpo": ["reward=outcome"],
            "otc_grpo": ["reward=otc_grpo", "reward.c=4.0"],
            "search_r1_ppo": [*PPO, "reward=outcome", "loop.problems_per_step=16"],
            "otc_ppo": [*PPO, "reward=otc_ppo", "reward.c=4.0", "loop.problems_per_step=16"],
            "otc_grpo_c10": ["reward=otc_grpo", "reward.c=10.0"],  # a milder price
            "search_r1_grpo_hotpotqa": [*HOTPOTQA, "reward=outcome"],
            "otc_grpo_hotpotqa": [*HOTPOTQA, "reward=otc_grpo", "reward.c=4.0"],
        },
        seeds={
            "search_r1_grpo": (0, 1),
            "otc_grpo": (0, 1),
            "search_r1_ppo": (0,),
            "otc_ppo": (0,),
            "otc_grpo_c10": (1,),  # the seed in which c = 4 gave searching up
            "search_r1_grpo_hotpotqa": (0, 1),
            "otc_grpo_hotpotqa": (0, 1),
        },
    ),
    "no_search": World(  # the rows SFT (the start) and R1-Base: the same questions, answered without a search
        settings=(*MULTI_HOP, *NO_SEARCH),
        start=("sft.steps=80", "task.demo_direct=1", "task.demo_extra=0"),
        training=RL_SEARCH,
        systems={"r1_base": ["reward=outcome"]},
        seeds={"r1_base": (0,)},
    ),
    "overcalling": World(  # search from a start that over-calls: 0.75 of its demonstrations search once too often
        settings=SEARCH,
        start=("sft.steps=80", "task.demo_direct=0.15", "task.demo_extra=0.75"),
        training=RL_SEARCH,
        systems={"search_r1_grpo": ["reward=outcome"], "otc_grpo": ["reward=otc_grpo", "reward.c=10.0"]},
        seeds={"search_r1_grpo": (0, 1), "otc_grpo": (0, 1)},
    ),
    "single_hop": single_hop("0.85"),
    "single_hop_70": single_hop("0.7"),
    # Questions whose second search shows the same passage again (answerable.py --again): it neither helps nor harms.
    "single_hop_same": single_hop("0.85", "runs/single_hop_same", (0, 1, 2)),
}

INDEX = (
    *("tools.search.corpus=[]", "tools.search.index=indexes/multihop", "tools.search.encoder=null"),
    *("tools.search.max_passage_words=40", "rollout.limits.max_observation_tokens=512"),
)
UNTRAINED: dict[str, Sequence[str]] = {  # SmolLM2 as it is, on the held-out questions of `search`, by these presets
    "direct": (),
    "cot": ("rollout.limits.max_turn_tokens=256",),
    "rag": INDEX,
    "ircot": (*INDEX, "rollout.limits.max_tokens=1536", "task.max_test=20"),  # up to ten searches for each
    "tir": INDEX,
}
ASKED = (
    *(f"task.test=[{TEST}]", "task.max_test=100", "task.seed=0", "task.in_domain=[hotpotqa,2wikimultihopqa]"),
    *("model=models/smollm2", "scale=small", "threads=1"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("world", choices=[*WORLDS, "untrained"])
    parser.add_argument("--runs", type=Path, default=Path("runs/systems"), help="the directory of all runs")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, one thread each")
    parser.add_argument("--only", nargs="*", default=[], help="of the runs, e.g. otc_grpo-0; all")
    parser.add_argument("--dry", action="store_true", help="print the commands")
    options = parser.parse_args()

    if options.world == "untrained":
        for name, settings in UNTRAINED.items():
            if not options.only or name in options.only:
                ask(name, settings, options.runs / "untrained" / name, options.dry)
        record(options.runs, options.world)
        return
    world, folder = WORLDS[options.world], options.runs / options.world
    start = folder / "start"
    own = ["name=start", f"run_dir={start}", "threads=1"]
    once(start, "model", [*OTCRL, "sft", *world.settings, *world.start, *own], options.dry)
    measured = [*OTCRL, "eval", *world.settings, f"model={start}/model", *own]
    last = "sampled" if "evaluate.sampled=true" in world.settings else "greedy"
    once(start, f"eval/{last}/report.json", measured, options.dry)
    chosen = [(system, seed) for system, seed in world.runs() if not options.only or f"{system}-{seed}" in options.only]
    with ThreadPoolExecutor(options.jobs) as pool:
        list(pool.map(lambda run: train(world, *run, start=start, runs=folder, dry=options.dry), chosen))
    record(options.runs, options.world)
    record_curves(options.runs, options.world)


def train(world: World, system: str, seed: int, *, start: Path, runs: Path, dry: bool) -> None:
    folder = runs / f"{system}-{seed}"
    own = [f"seed={seed}", f"name={folder.name}", f"run_dir={folder}", "threads=1"]
    weights = [f"model.path={start}/model", "sft.steps=0", "evaluate.before=false"]
    command = [*OTCRL, "train", *world.settings, *world.training, *world.systems[system], *own, *weights]
    once(folder, "summary.json", command, dry)


def ask(system: str, settings: Sequence[str], folder: Path, dry: bool) -> None:
    command = [*OTCRL, "eval", f"conf={system}", *ASKED, *settings, f"name={system}", f"run_dir={folder}"]
    once(folder, "eval/greedy/report.json", command, dry)


def record(runs: Path, world: str) -> None:
    """Figures of the world's runs go into results/systems.json; those of the others stay there."""
    rows: list[Row] = []
    for path in sorted((runs / world).glob("*/eval/*/report.json")):
        report = json.loads(path.read_text())
        run, how = path.parts[-4], "greedy" if report["temperature"] == 0 else f"temperature {report['temperature']:g}"
        for name, found in {**report["sources"], "all": report["overall"]}.items():
            figures = {figure: found[figure]["value"] for figure in ("em", "f1", "tc", "tp")}
            rows.append({"world": world, "run": run, "how": how, "set": name, "n": found["questions"], **figures})
    if not rows:
        return
    known = json.loads(path.read_text())["rows"] if (path := RESULTS / "systems.json").exists() else []
    rows = [row for row in known if row["world"] != world] + rows
    calls: dict[tuple[str, str], float] = {}
    for row in rows:
        if row["set"] == "all" and row["how"] == "greedy":
            calls[str(row["world"]), str(row["run"])] = float(row["tc"] or 0)
    ratios: dict[str, float] = {}
    for (where, run), own in calls.items():
        twins = [calls.get((where, run.replace("otc", twin).replace("_c10", ""))) for twin in ("torl", "search_r1")]
        if run.startswith("otc") and (twin := next(filter(None, twins), None)):
            ratios[f"{where}/{run}: calls"] = own / twin
    publish("systems", rows, ratios)


def record_curves(runs: Path, world: str) -> None:
    """Calls and right answers of each training step go into results/systems_curves.json, for docs/plots.py."""
    path, curves = RESULTS / "systems_curves.json", dict[str, dict[str, list[float]]]()
    for file in sorted((runs / world).glob("*/metrics.jsonl")):
        rows = [row for row in map(json.loads, file.read_text().splitlines()) if "reward/correct" in row]
        names = {"calls": "calls/well_formed", "right": "reward/correct"}
        curves[file.parent.name] = {name: [round(row[key], 4) for row in rows] for name, key in names.items()}
    if curves:
        known = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps(known | {world: curves}, sort_keys=True) + "\n")


def once(folder: Path, result: str, command: Sequence[str], dry: bool) -> None:
    """Runs `command`, unless what it ends with is there. What it says goes to a file beside the run."""
    if (folder / result).exists():
        return
    print(shlex.join(command[2:]), flush=True)
    if dry:
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    log = folder.parent / f"{folder.name}.log"
    with log.open("a") as file:
        code = subprocess.call(command, stdout=file, stderr=file)
    if code:
        sys.exit(f"exit code {code}: {log}")


if __name__ == "__main__":
    main()
