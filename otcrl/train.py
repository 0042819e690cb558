"""The training loop.

Read `train_step` first: it is the whole method, one line per arrow of the data flow.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

from otcrl import checkpoint
from otcrl.errors import TrainingError
from otcrl.evaluate.metrics import by_source
from otcrl.protocols import Algorithm, Engine, Logger, RewardFn, Task
from otcrl.rollout.collect import Collector, Progress
from otcrl.rollout.transcripts import write_transcripts
from otcrl.types import (
    COUNTERS,
    Batch,
    Metrics,
    Outcome,
    Reward,
    Stop,
    Targets,
    Trajectory,
    count_calls,
    pack,
)

if TYPE_CHECKING:
    from otcrl.learner.learner import Learner
    from otcrl.models.tokenizer import HFTokenizer

Groups = list[list[Trajectory]]
Bars = Callable[[str], Progress]  # a named progress bar


@dataclass(frozen=True, kw_only=True)
class Loop:
    """How long, how much, how often."""

    steps: int
    problems_per_step: int
    checkpoint_every: int  # steps; 0: only at the end
    keep_checkpoints: int
    transcripts_every: int  # steps; 0: never
    max_void_share: float  # of one step's trajectories, lost to infrastructure; more stops the run

    def __post_init__(self) -> None:
        for name, least in (
            ("steps", 0),
            ("problems_per_step", 1),
            ("checkpoint_every", 0),
            ("keep_checkpoints", 1),
            ("transcripts_every", 0),
        ):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if not 0 <= self.max_void_share <= 1:
            raise ValueError(f"max_void_share must be a share between 0 and 1, got {self.max_void_share}")


@dataclass(frozen=True, kw_only=True)
class Run:
    """The parts of one training run. Built from conf/, then never changed."""

    task: Task
    collector: Collector
    reward: RewardFn
    algo: Algorithm
    learner: Learner
    engine: Engine
    tokenizer: HFTokenizer
    logger: Logger
    loop: Loop
    folder: Path
    bars: Bars


async def train_step(step: int, run: Run) -> Metrics:
    """One optimisation step: problems in, new weights out."""
    clock = Stopwatch()
    problems_P = run.task.sample(step, run.loop.problems_per_step)
    trajectories_PG = await run.collector.groups(problems_P, step, run.bars(f"step {step} rollout"))
    kept_PG = kept(trajectories_PG, run.loop.max_void_share)
    clock.lap("rollout")
    rewards_PG = run.reward(kept_PG)
    clock.lap("reward")
    batch = pack(
        [list(zip(*pair, strict=True)) for pair in zip(kept_PG, rewards_PG, strict=True)], run.tokenizer.pad_id
    )
    scores = run.learner.score(batch)
    targets = run.algo.targets(batch, scores)
    clock.lap("score")
    update_metrics = run.learner.update(step, batch, scores, targets, run.algo, run.bars(f"step {step} update"))
    clock.lap("update")
    await run.engine.load_weights(run.learner.weights(), version=step + 1)
    clock.lap("sync")

    if run.loop.transcripts_every and step % run.loop.transcripts_every == 0:
        scored = [pair for ts, rs in zip(kept_PG, rewards_PG, strict=True) for pair in zip(ts, rs, strict=True)]
        write_transcripts(run.folder / "transcripts.jsonl", step, scored)
    seen = rollout_metrics(trajectories_PG, kept_PG, rewards_PG)
    tokens = sum(len(t.token_ids) for group in kept_PG for t in group)
    return seen | sign_reversals(batch, targets) | update_metrics | clock.metrics(tokens)


async def train(run: Run, first_step: int = 0) -> None:
    """Steps `first_step` up to `loop.steps`, logged, with checkpoints."""
    folder, loop = run.folder / "checkpoints", run.loop
    for step in range(first_step, loop.steps):
        run.logger.log(await train_step(step, run), step)
        done = step + 1
        if done == loop.steps or (loop.checkpoint_every and done % loop.checkpoint_every == 0):
            state = run.reward.state_dict()
            checkpoint.save(folder, done, run.learner, run.tokenizer.hf, state, loop.keep_checkpoints)


def kept(trajectories_PG: Groups, max_void_share: float) -> Groups:
    """The groups without their void trajectories. Raises TrainingError when too many are void."""
    everything = [t for group in trajectories_PG for t in group]
    void = [t for t in everything if t.stop is Stop.VOID]
    if len(void) > max_void_share * len(everything):
        broken = [c for t in void for c in t.tool_calls if c.outcome is Outcome.INFRA_ERROR]
        (tool, error), times = Counter((c.tool, c.result) for c in broken).most_common(1)[0]
        raise TrainingError(
            f"{len(void)} of {len(everything)} trajectories were lost to infrastructure, more than "
            f"loop.max_void_share={max_void_share}; tool {tool!r} failed {times} times with: {error}"
        )
    groups = [[t for t in group if t.stop is not Stop.VOID and any(t.action_mask)] for group in trajectories_PG]
    if not any(groups):
        raise TrainingError(f"none of the step's {len(everything)} trajectories is left to learn from")
    return [group for group in groups if group]


def rollout_metrics(all_PG: Groups, kept_PG: Groups, rewards_PG: Sequence[Sequence[Reward]]) -> Metrics:
    """What the policy did, over the trajectories that count."""
    trajectories = [t for group in kept_PG for t in group]
    rewards = [r for group in rewards_PG for r in group]
    metrics = {"reward/value": fmean(r.value for r in rewards)}
    metrics |= {f"reward/{name}": fmean(r.parts[name] for r in rewards) for name in rewards[0].parts}
    metrics |= {f"calls/{name}": fmean(count_calls(t, name) for t in trajectories) for name in COUNTERS}
    metrics["calls/cached"] = fmean(sum(c.cached for c in t.tool_calls) for t in trajectories)
    metrics["rollout/tokens"] = fmean(len(t.token_ids) for t in trajectories)
    metrics["rollout/sampled_tokens"] = fmean(sum(t.action_mask) for t in trajectories)
    metrics["rollout/turns"] = fmean(1 + len(t.tool_calls) for t in trajectories)
    metrics["rollout/void_share"] = sum(t.stop is Stop.VOID for g in all_PG for t in g) / sum(map(len, all_PG))
    metrics |= {f"stop/{stop}": fmean(t.stop is stop for t in trajectories) for stop in Stop if stop is not Stop.VOID}
    mixed = [len({r.value for r in group}) > 1 for group in rewards_PG]
    metrics["reward/groups_with_signal"] = fmean(mixed)
    sources = by_source(trajectories)  # where tool use collapses, it shows in one data set first
    for name, own in sources.items() if len(sources) > 1 else ():
        metrics[f"calls/source/{name}"] = fmean(count_calls(t, "well_formed") for t in own)
    return metrics


def sign_reversals(batch: Batch, targets: Targets) -> Metrics:
    """Share of the rewarded trajectories that are pushed down all the same, and the likelihood of rewarded ones."""
    rewarded_B = batch.rewards > 0
    down_B = (targets.advantages.sum(1) < 0) & rewarded_B
    lengths_B = batch.action_mask.sum(1).clamp(min=1)
    likelihood_B = batch.sampler_logprobs.sum(1) / lengths_B
    count = max(int(rewarded_B.sum()), 1)
    return {
        "reward/sign_reversals": int(down_B.sum()) / count,
        "rollout/rewarded_logprob": float(likelihood_B[rewarded_B].sum()) / count,
    }


class Stopwatch:
    """Seconds of each phase of a step."""

    def __init__(self) -> None:
        self.begun = self.last = time.monotonic()
        self.laps: dict[str, float] = {}

    def lap(self, name: str) -> None:
        now = time.monotonic()
        self.laps[name], self.last = now - self.last, now

    def metrics(self, tokens: int) -> Metrics:
        total = self.last - self.begun
        times = {f"time/{name}_s": seconds for name, seconds in self.laps.items()}
        return times | {"time/step_s": total, "perf/tokens_per_s": tokens / total}
