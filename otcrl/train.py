"""The training loop.

Read `train_step` first: it is the whole method, one line per arrow of the data flow.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

from otcrl import dist
from otcrl.algos.mismatch import Correction, check_agreement, corrected
from otcrl.checkpoint import Standing
from otcrl.evaluate.metrics import by_source
from otcrl.health import Health, write_culprits
from otcrl.learner.proof import Proof
from otcrl.learner.thread import LearnerThread
from otcrl.loggers import Loggers
from otcrl.loggers.jsonl import say_unwritten
from otcrl.protocols import Algorithm, Engine, RewardFn, Task
from otcrl.rewards.given_up import GIVEN_UP
from otcrl.rollout.collect import Collector, Progress
from otcrl.rollout.pace import in_pace
from otcrl.rollout.schedule import Group, Rollouts, together
from otcrl.rollout.scoring import check_void, has_signal, score_alike
from otcrl.rollout.stream import joined
from otcrl.rollout.transcripts import Signal, Transcript, Transcripts, signals
from otcrl.saver import Saver
from otcrl.tell import tell
from otcrl.termination import Terminated, Termination
from otcrl.types import (
    COUNTERS,
    Batch,
    Metrics,
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

Bars = Callable[[str], Progress]  # a named progress bar


@dataclass(frozen=True, kw_only=True)
class Loop:
    """How long, how much, how often."""

    steps: int
    problems_per_step: int
    checkpoint_every: int  # steps; 0: only at the end
    keep_checkpoints: int  # the last ones
    keep_best: str | None  # a metric of the steps, by which the best is kept too; with a minus, the lowest
    transcripts_every: int  # steps; 0: never
    max_void_share: float  # of one step's trajectories, lost to infrastructure; more stops the run
    max_logprob_gap: float | None  # nats, mean |log pi - log mu| of a step; more stops the run; None: never

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
        if self.max_logprob_gap is not None and not self.max_logprob_gap > 0:
            raise ValueError(f"max_logprob_gap must be null or above 0, got {self.max_logprob_gap}")


@dataclass(frozen=True, kw_only=True)
class Run:
    """The parts of one training run. Built from conf/, then never changed."""

    task: Task
    collector: Collector
    reward: RewardFn
    algo: Algorithm
    correction: Correction
    learner: Learner
    engine: Engine
    proof: Proof
    tokenizer: HFTokenizer
    rollouts: Rollouts
    thread: LearnerThread
    logger: Loggers
    saver: Saver
    termination: Termination
    loop: Loop
    health: Health
    transcripts: Transcripts
    folder: Path
    bars: Bars


async def train_step(step: int, run: Run) -> Metrics:
    """One optimisation step: problems in, new weights out."""
    clock, given_up = Stopwatch(), GIVEN_UP.count

    async def signal(group: Group) -> bool:  # a judge may be slow, and others are answered by their tools meanwhile
        async with in_pace(run.engine):
            return await run.thread(has_signal, run.reward, group)

    playing = run.rollouts.collect(step, signal, run.bars(f"step {step} rollout"))
    harvest = await run.termination.all_unless(playing, run.thread)
    if dist.size() > 1:
        harvest = together(await run.thread(dist.gather, harvest.plain, f"step {step}: the other ranks' rollouts"))
    check_void(harvest.groups, run.loop.max_void_share)
    clock.lap("rollout")
    unscored = [group for group in harvest.groups if group.scored is None]
    await run.thread(score_alike, run.reward, unscored)
    seen = rollout_metrics(harvest.groups) | harvest.metrics()
    seen["reward/judge_timeouts"] = GIVEN_UP.count - given_up
    scored_PG = [group.scored for group in harvest.groups if group.scored]
    tokens = sum(len(t.token_ids) for group in scored_PG for t, _ in group)
    clock.lap("reward")
    learned_PG = [group.scored for group in harvest.groups if group.scored and group.fills]
    if not learned_PG:
        transcribe(step, run, harvest.groups)
        return seen | {"rollout/skipped": 1.0} | clock.metrics(tokens)
    batch = pack(learned_PG, run.tokenizer.pad_id)
    if run.rollouts.idle:
        await run.engine.sleep()
    scores = await run.thread(run.learner.score, batch)
    targets, weight_metrics = corrected(run.algo.targets(batch, scores), batch, scores, run.correction)
    clock.lap("score")
    learned = [t for pairs in learned_PG for t, _ in pairs]
    transcribe(step, run, harvest.groups, learned, lambda: signals(batch, scores, targets))
    clock.lap("transcripts")  # before the update: one that fails leaves what it failed on
    bar = run.bars(f"step {step} update")
    update_metrics = await run.thread(run.learner.update, step, batch, scores, targets, run.algo, bar)
    check_agreement(step, update_metrics, run.loop.max_logprob_gap)
    clock.lap("update")
    proof_metrics = await publish(run, step + 1, [t.token_ids for t in learned])
    clock.lap("sync")
    seen |= sign_reversals(batch, targets) | weight_metrics | update_metrics
    seen |= checked_health(step, run, seen, [pair for pairs in learned_PG for pair in pairs], targets)
    return seen | proof_metrics | clock.metrics(tokens)


def checked_health(
    step: int, run: Run, metrics: Metrics, learned: Sequence[tuple[Trajectory, Reward]], targets: Targets
) -> Metrics:
    """What is said of the step's metrics; the trajectories behind a gradient that stands out go to spikes.jsonl."""
    found, warnings = run.health(metrics)
    if dist.is_first():
        for warning in warnings:
            tell(f"step {step}: {warning}", sys.stdout)
        if found["health/grad_spike"]:
            path, pull_B = run.folder / "spikes.jsonl", run.learner.pull_B.tolist()
            advantages_B = targets.advantages.abs().amax(1) * targets.advantages.sum(1).sign()
            try:
                write_culprits(path, step, learned, pull_B, advantages_B.tolist())
            except OSError as error:
                say_unwritten(path, error, f"step {step} is not in it")
    return found


def transcribe(
    step: int,
    run: Run,
    groups: Sequence[Group],
    learned: Sequence[Trajectory] = (),
    told: Callable[[], Sequence[Signal]] = list,
) -> None:
    """Write down every trajectory of the groups, with what the update is `told` of those that are `learned` from."""
    if not dist.is_first() or not run.loop.transcripts_every or step % run.loop.transcripts_every:
        return
    signal = {id(t): said for t, said in zip(learned, told(), strict=True)}
    found = []
    for group in groups:
        reward = {id(t): earned for t, earned in group.scored or ()}
        for sample, t in enumerate(group.trajectories):
            earned = reward.get(id(t))
            correct = None if earned is None else earned.parts.get("correct")
            found.append(
                Transcript(
                    trajectory=t,
                    group=group.number,
                    sample=sample,
                    reward=earned,
                    correct=correct,
                    signal=signal.get(id(t)),
                )
            )
    try:
        lines = run.transcripts.write(step, found)
    except OSError as error:
        say_unwritten(run.transcripts.path, error, f"step {step} is not in it")
    else:
        run.logger.read(lines, step)


async def publish(run: Run, version: int, token_ids: Sequence[Sequence[int]]) -> Metrics:
    """The engine has the learner's weights, and proves it on some of `token_ids`. Raises TrainingError otherwise."""
    await run.engine.load_weights(run.learner.weights(), version)
    if not run.proof.is_due(version):
        return {}
    return await run.proof(run.engine, partial(run.thread, run.learner.says), run.proof.chosen(token_ids), version)


async def train(run: Run, first_step: int = 0) -> None:
    """Steps `first_step` up to `loop.steps`, logged, with checkpoints. Raises Terminated when asked to stop before."""
    loop = run.loop
    standing = stand(run, first_step)
    try:
        for step in range(first_step, loop.steps):
            metrics = await train_step(step, run)
            run.logger.log(metrics | run.saver.metrics(), step)
            run.saver.best.hear(step, metrics)
            standing = stand(run, step + 1)
            is_due = loop.checkpoint_every and standing.step % loop.checkpoint_every == 0
            if standing.step == loop.steps or is_due:
                await save(run, standing)
            await run.thread(run.termination.check)
    except Terminated:
        await run.thread(run.saver.wait)
        lost = any(await run.thread(dist.gather, bool(run.saver.lost), "the last checkpoint"))
        if lost or run.saver.saved != standing.step:
            await save(run, standing)
        raise
    finally:
        await run.rollouts.close()
        await run.thread(run.saver.wait)


def stand(run: Run, step: int) -> Standing:
    """Of this rank: its own part of the problems."""
    return Standing(
        step=step,
        reward_state=run.reward.state_dict(),
        frontier=run.rollouts.frontier(),
        version=run.engine.version,
    )


async def save(run: Run, standing: Standing) -> None:
    frontiers = await run.thread(dist.gather, standing.frontier, "checkpoint")
    standing = replace(standing, frontier=joined(frontiers))
    await run.thread(run.saver.save, standing, run.learner, run.tokenizer.hf)


def rollout_metrics(groups: Sequence[Group]) -> Metrics:
    """What the policy did, over the trajectories that count: also those that nothing is learned from."""
    everything = [t for group in groups for t in group.trajectories]
    scored_PG = [group.scored for group in groups if group.scored]
    trajectories = [t for group in scored_PG for t, _ in group]
    rewards = [r for group in scored_PG for _, r in group]
    metrics = {"reward/value": fmean(r.value for r in rewards)}
    metrics |= {f"reward/{name}": fmean(r.parts[name] for r in rewards) for name in rewards[0].parts}
    metrics |= {f"calls/{name}": fmean(count_calls(t, name) for t in trajectories) for name in COUNTERS}
    metrics["perf/cached_calls"] = fmean(sum(c.cached for c in t.tool_calls) for t in trajectories)
    metrics["rollout/tokens"] = fmean(len(t.token_ids) for t in trajectories)
    metrics["rollout/sampled_tokens"] = fmean(sum(t.action_mask) for t in trajectories)
    metrics["perf/tool_s"] = fmean(sum(c.seconds for c in t.tool_calls) for t in trajectories)
    metrics["rollout/turns"] = fmean(len(t.turns) for t in trajectories)
    metrics["rollout/void_share"] = fmean(t.stop is Stop.VOID for t in everything)
    metrics["rollout/empty_share"] = fmean(not any(t.action_mask) for t in everything)
    metrics |= {f"stop/{stop}": fmean(t.stop is stop for t in trajectories) for stop in Stop if stop is not Stop.VOID}
    mixed = [len({r.value for _, r in group}) > 1 for group in scored_PG]
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
