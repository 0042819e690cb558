"""Tools that take a second and an engine that is always busy: what overlapping the two is worth.

64 trajectories of 3 tool calls each, 8 of each prompt, on a real engine, four ways:

    ours         the Collector: a trajectory goes on as soon as its own tool has answered
    synchronous  all trajectories generate, then all tools run at once, then all generate: the same engine and tokens
    engine only  ours, with tools that take no time
    longest      the trajectory whose tools take longest, alone on the engine

No way of scheduling is faster than engine only, nor than longest; `wall_vs_bound` is ours over the larger of the two.
Every round draws other latencies, the same for all ways; the ratios are medians of the rounds' own.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean, median

from common import Row
from rollout_parts import part, row
from rollout_work import Endless, EndlessModel, Finishes, Questions, SlowSearch, make_player, passage
from transformers import PreTrainedModel

from otcrl.rollout.collect import Collector, stable_seed
from otcrl.rollout.loop import Player
from otcrl.types import Problem

SEED = 0


@dataclass(frozen=True, kw_only=True)
class Overlap:
    """What is played."""

    model: str
    engine: str  # vllm | hf
    trajectories: int
    group: int = 8  # trajectories of each prompt
    decoding: int = 16  # at a time: what is computed is bound by arithmetic here, and each is done the sooner
    calls: int = 3
    turn_tokens: int = 16
    question_words: int = 40
    observation_tokens: int = 32
    median_s: float = 1.0  # of a tool call
    sigma: float = 1.0


def make_engine(work: Overlap) -> tuple[Finishes, PreTrainedModel, Endless]:
    model, tokenizer = EndlessModel(path=work.model).load()
    more = {"dtype": "bfloat16"} if work.engine == "vllm" else {}  # as on GPUs
    size = {"context": 1024, "max_sequences": work.decoding, "batch_tokens": 1024}
    engine = part(f"engine/{work.engine}", {"model": model, "tokenizer": tokenizer}, **size, **more)
    return Finishes(engine=engine), model, tokenizer


async def ours(player: Player, problems: Sequence[Problem], names: Sequence[str]) -> int:
    """Tokens of all trajectories, played as in training."""
    collector = Collector(player=player, group_size=1, temperature=1.0, concurrency=len(names), seed=SEED)
    return sum(len(t.token_ids) for t in await collector.play(problems, names, 1.0))


async def synchronous(player: Player, problems: Sequence[Problem], names: Sequence[str]) -> int:
    """The same, turn by turn: the slowest of all holds up everybody."""
    texts = [player.open(problem) for problem in problems]
    tool = player.tools["search"]
    for turn in range(player.limits.max_calls + 1):
        settings = {"stop": (), "max_tokens": player.limits.max_turn_tokens, "temperature": 1.0}
        sampled = await asyncio.gather(*(
            player.engine.generate(ids, **settings, seed=stable_seed(SEED, name), session=name)
            for ids, name in zip(texts, names, strict=True)
        ))  # fmt: skip
        texts = [ids + done.token_ids for ids, done in zip(texts, sampled, strict=True)]
        if turn < player.limits.max_calls:
            results = await asyncio.gather(*(tool.run("", name) for name in names))
            shown = [player.tokenizer.encode(player.dialect.observation(result.text)) for result in results]
            texts = [ids + more for ids, more in zip(texts, shown, strict=True)]
    for name in names:
        player.engine.release(name)
    return sum(map(len, texts))


async def seconds(work: Awaitable[int]) -> tuple[float, int]:
    begun = time.perf_counter()
    tokens = await work
    return time.perf_counter() - begun, tokens


async def measure(work: Overlap, rounds: int) -> tuple[list[Row], dict[str, float]]:
    engine, model, tokenizer = make_engine(work)
    tool = SlowSearch(median_s=work.median_s, sigma=work.sigma, result=passage(work.observation_tokens, tokenizer))
    prompts = Questions(length=work.question_words).sample(0, work.trajectories // work.group)
    problems = [problem for problem in prompts for _ in range(work.group)]
    found: dict[str, list[float]] = {"ours": [], "synchronous": [], "engine only": [], "longest": []}
    tokens: dict[str, int] = {}
    spans: list[float] = []  # seconds that the tools of each trajectory take

    def make(tool: SlowSearch) -> Player:
        player = make_player(engine, tokenizer, tool, work.calls, work.turn_tokens)
        return replace(player, first="least_done")  # all are waited for

    try:
        await ours(make(replace(tool, median_s=0.0)), problems, list(map(str, range(work.trajectories))))  # warm
        for number in range(rounds):
            names = [f"trajectory {i} of round {number}" for i in range(work.trajectories)]
            own = {name: sum(tool.latency(name, call) for call in range(work.calls)) for name in names}
            slowest = max(names, key=own.__getitem__)
            alone = [problems[names.index(slowest)]], [slowest]
            spans += own.values()
            for way in found:
                await engine.load_weights(model.named_parameters(), engine.version + 1)  # nobody finds a warm cache
                fresh = replace(tool, median_s=0.0 if way == "engine only" else work.median_s)
                play = synchronous if way == "synchronous" else ours
                whom = alone if way == "longest" else (problems, names)
                spent, tokens[way] = await seconds(play(make(fresh), *whom))
                found[way].append(spent)
                print(f"overlap, {work.engine}, round {number}: {way} {spent:.1f} s", flush=True)
    finally:
        await engine.close()
    assert len({tokens[way] for way in ("ours", "synchronous", "engine only")}) == 1, f"different work: {tokens}"
    wall = {way: median(times) for way, times in found.items()}
    rounds_ratios = [
        {"wall_vs_bound": one / max(engine_only, longest), "speedup_vs_turn_synchronous": other / one}
        for one, other, engine_only, longest in zip(*found.values(), strict=True)
    ]
    ratios = {name: median(each[name] for each in rounds_ratios) for name in rounds_ratios[0]}
    each = [
        row("overlap", f"round {i}: {name}", value, "")
        for i, own in enumerate(rounds_ratios)
        for name, value in own.items()
    ]
    return [*described(work, wall, sorted(spans), tokens["ours"]), *each], ratios


def described(work: Overlap, wall: Mapping[str, float], spans: Sequence[float], tokens: int) -> list[Row]:
    """`spans`: seconds that each trajectory's tools take, ascending."""
    return [
        *(row("overlap", f"{work.engine}: {way}", spent, "s") for way, spent in wall.items()),
        row("overlap", "tool calls of a trajectory, mean", fmean(spans), "s"),
        row("overlap", "tool calls of a trajectory, most", spans[-1], "s"),
        row("overlap", "trajectories", work.trajectories, ""),
        row("overlap", "sampled tokens", work.trajectories * (work.calls + 1) * work.turn_tokens, "tokens"),
        row("overlap", "all tokens", tokens, "tokens"),
    ]
