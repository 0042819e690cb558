"""What a rollout costs in Python when the engine and the tools answer at once.

Everything else is real: SmolLM2's tokenizer, Search-R1's dialect, the schedule, the reward, packing. A trajectory has a
prompt of 200 tokens, 4 turns of 100 and 3 observations of 250. Seconds are those of the process, on all its threads.
"""

from __future__ import annotations

import asyncio
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle, pairwise
from pathlib import Path

from common import Row
from rollout_parts import part, row
from rollout_work import Questions, limits
from transformers import AutoTokenizer

from otcrl.models.tokenizer import HFTokenizer
from otcrl.protocols import Completion, ToolResult
from otcrl.rewards.matching import exact_match
from otcrl.rollout.collect import Collector
from otcrl.rollout.loop import Player
from otcrl.rollout.schedule import Group, Rollouts, Schedule
from otcrl.rollout.scoring import check_void, score
from otcrl.rollout.stream import Stream
from otcrl.train import rollout_metrics
from otcrl.types import Problem, pack

TURN, OBSERVATION, CALLS, GROUP = 100, 250, 3, 8  # tokens, tokens, calls, trajectories
PASSAGES = Path(__file__).parents[1] / "otcrl/small/tiny_qa/corpus.jsonl"
PLAN = (  # the same step of the paper's smallest search model on one H100, all its trajectories in flight
    *("conf=smollm2_search", "engine=vllm", "model=Qwen/Qwen2.5-3B-Instruct", "model.dtype=bfloat16", "gpu=h100-80gb"),
    *("loop.problems_per_step=64", f"rollout.group_size={GROUP}", "rollout.concurrency=512", "calls=3", "tool_s=0"),
    *("prompt_tokens=205", "sampled_tokens=400", "observed_tokens=750", "rollout.limits.max_tokens=2048"),
    *("engine.max_sequences=512", "engine.context=4096", "engine.gpu_memory=0.7", "learner.micro_tokens=8192"),
    "offload=cpu",
)
WORDS = "the capital of a country that lies between two rivers was named after its founder and a hill nearby".split()


class NullEngine:
    """Returns what was prepared for a turn."""

    version, context = 0, 8192

    def __init__(self, turns: Sequence[Sequence[int]]) -> None:
        self._turns = turns

    async def generate(self, token_ids: Sequence[int], *, priority: int = 0, **_: object) -> Completion:
        await asyncio.sleep(0)
        ids = self._turns[-priority]
        return Completion(list(ids), [-0.5] * len(ids), [0] * len(ids), True)

    def release(self, session: str) -> None: ...


@dataclass(frozen=True, kw_only=True)
class InstantSearch:
    """Returns another of `results` each time."""

    results: Iterator[str]
    name: str = "search"
    description: str = "finds passages"

    async def run(self, arguments: str, session: str) -> ToolResult:
        await asyncio.sleep(0)
        return ToolResult(next(self.results))

    async def release(self, session: str) -> None: ...

    async def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Cost:
    """Seconds of the process for one step of `count` trajectories."""

    count: int
    rollout: float
    reward: float
    pack: float

    @property
    def each(self) -> float:
        return (self.rollout + self.reward + self.pack) / self.count


def turn(tokenizer: HFTokenizer, number: int, ending: str) -> list[int]:
    """Exactly TURN tokens of text that end with `ending`."""
    rng = random.Random(number)
    end = tokenizer.encode(ending)
    return tokenizer.encode(" ".join(rng.choice(WORDS) for _ in range(TURN)))[: TURN - len(end)] + end


def observations(tokenizer: HFTokenizer, count: int) -> list[str]:
    """Texts of about OBSERVATION tokens, sentences of real passages in ever another order."""
    rows = [json.loads(line) for line in PASSAGES.read_text().splitlines()]
    sentences = [f"{sentence}." for row in rows for sentence in row["text"].rstrip(".").split(". ")]
    each = len(tokenizer.encode(" ".join(sentences))) / len(sentences)
    rng = random.Random(0)
    return [" ".join(rng.sample(sentences, round(OBSERVATION / each))) for _ in range(count)]


def make_player(tokenizer: HFTokenizer, texts: Sequence[str]) -> Player:
    call = "<search> who founded the capital that lies between two rivers </search>"
    turns = [turn(tokenizer, i, call) for i in range(CALLS)] + [turn(tokenizer, CALLS, "<answer> Paris </answer>")]
    tool = InstantSearch(results=cycle(texts))
    return Player(
        engine=NullEngine(turns),  # pyright: ignore[reportArgumentType]  # has what a Player asks for
        tokenizer=tokenizer,
        dialect=part("dialect/search_r1", {}),
        tools={tool.name: tool},
        limits=limits(CALLS, TURN),
    )


async def one_step(player: Player, count: int, step: int) -> Cost:
    """A step of `count` trajectories, all of them in flight at a time."""
    problems = Questions(length=70)
    reward = part("reward/otc_grpo", {"correct": lambda answer, problem: exact_match(answer, problem.answers)})
    collector = Collector(player=player, group_size=GROUP, temperature=1.0, concurrency=count, seed=0)
    schedule = Schedule(ahead=0, oversample=1.0, stragglers="wait", max_age=4, only_signal=False, max_draws=3)

    def sample(step: int, count: int) -> list[Problem]:
        return problems.sample(step, count)

    async def fills(group: Group) -> bool:
        return True

    rollouts = Rollouts(
        collector=collector,
        stream=Stream(sample, count // GROUP),
        schedule=schedule,
        per_step=count // GROUP,
        steps=100,
    )
    times = [time.process_time()]
    harvest = await rollouts.collect(step, fills, lambda done, total: None)
    times.append(time.process_time())
    check_void(harvest.groups, 0.0)
    score(reward, harvest.groups)
    rollout_metrics(harvest.groups)
    harvest.metrics()
    times.append(time.process_time())
    batch = pack([group.scored or [] for group in harvest.groups], 0)
    times.append(time.process_time())
    await rollouts.close()
    assert len(batch.rewards) == count
    assert int(batch.action_mask.sum()) == count * TURN * (CALLS + 1)
    return Cost(count, *(after - before for before, after in pairwise(times)))


def planned_step_s() -> float:
    """What `otcrl plan` estimates: 60 % of memory bandwidth in decoding, 50 and 40 % of FLOP/s elsewhere."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "plan.json"
        command = [sys.executable, "-m", "otcrl", "plan", *PLAN, f"json={path}"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        return json.loads(path.read_text())["seconds"]["step"]


def measure(model: str, counts: Sequence[int], rounds: int, cpu_s_per_token: float | None) -> tuple[list[Row], float]:
    """Rows, and the share of a step on a GPU at 512 trajectories. `cpu_s_per_token`: of a whole step on this CPU."""
    tokenizer = HFTokenizer(hf=AutoTokenizer.from_pretrained(model), chat=False)
    player = make_player(tokenizer, observations(tokenizer, CALLS * max(counts)))
    asyncio.run(one_step(player, 64, 0))  # warm
    costs: dict[int, Cost] = {}
    for count in counts:
        found = [asyncio.run(one_step(player, count, step)) for step in range(rounds)]
        costs[count] = sorted(found, key=lambda cost: cost.each)[len(found) // 2]
    sampled = TURN * (CALLS + 1)
    rows = [row("overhead", f"{n} trajectories", 1 / cost.each, "trajectories per second") for n, cost in costs.items()]
    at = costs[512]
    for name in ("rollout", "reward", "pack"):
        rows.append(row("overhead", f"512 trajectories, {name}", 1e3 * getattr(at, name) / at.count, "ms a trajectory"))
    rows.append(row("overhead", "512 trajectories", at.each * at.count, "s a step"))
    planned_s = planned_step_s()
    rows.append(row("overhead", "a step of Qwen2.5-3B on one H100, as `otcrl plan` estimates it", planned_s, "s"))
    rows.append(row("overhead", "share of that step", at.each * at.count / planned_s, "share"))
    if cpu_s_per_token is not None:
        here_s = at.count * sampled * cpu_s_per_token
        rows.append(row("overhead", "a step on this CPU, from the one measured (part trl)", here_s, "s"))
        rows.append(row("overhead", "share of a step on this CPU", at.each * at.count / here_s, "share"))
    return rows, at.each * at.count / planned_s
