"""What `otcrl train` does around the loop: cold start, evaluation, training, evaluation, summary.json."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rich import get_console

from otcrl import checkpoint, dist, sealed
from otcrl.checkpoint import Checkpoint
from otcrl.errors import TrainingError, nearest
from otcrl.evaluate.attempts import TRANSCRIPTS, is_right
from otcrl.evaluate.offloading import Offloading, offloading
from otcrl.evaluate.report import FILE, Report, before_after_table, make_report
from otcrl.loggers import Loggers
from otcrl.loggers.jsonl import JsonlLogger
from otcrl.protocols import Dialect, Task, Tokenizer, Tool
from otcrl.resume import check_tools
from otcrl.rollout.collect import Collector
from otcrl.rollout.transcripts import Transcript, Transcripts
from otcrl.saver import reason
from otcrl.sft import Sft, train_sft
from otcrl.tell import tell
from otcrl.termination import Terminated
from otcrl.train import Bars, Run, publish, train
from otcrl.types import COUNTERS, Metrics, Problem, Trajectory

if TYPE_CHECKING:
    from otcrl.learner.learner import Learner
    from otcrl.models.tokenizer import HFTokenizer


@dataclass(frozen=True, kw_only=True)
class Evaluate:
    counter: str  # calls that count in TC and TP
    sampled: bool  # also at the rollout's temperature, not only greedy
    offloading: bool  # also with tools off and with a call forced
    before: bool  # also before the first step
    samples: int = 1  # attempts at each question of the sampled evaluation
    difficulty: str | None = None  # column of the rows that says how hard a question is; None: its least calls

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise ValueError(f"samples must be at least 1, got {self.samples}")
        if self.samples > 1 and not self.sampled:
            raise ValueError(f"samples is {self.samples}, and greedy attempts are all the same: set sampled=true")
        if self.counter not in COUNTERS:
            raise ValueError(f"there is no counter {self.counter!r}.{nearest(self.counter, COUNTERS)}")


@dataclass(frozen=True, kw_only=True)
class Experiment:
    run: Run
    evaluate: Evaluate
    resumed: Checkpoint | None
    may_change: bool  # when resumed, what the tools answer from
    sft_seconds: float

    @property
    def first_step(self) -> int:
        return self.resumed.standing.step if self.resumed is not None else 0


def cold_start(
    learner: Learner,
    tokenizer: HFTokenizer,
    task: Task,
    dialect: Dialect,
    config: Sft,
    folder: Path,
    bars: Bars,
    name: str = "sft",
) -> float:
    """Train the policy in place on demonstrations and save it as folder/name. Returns the seconds it took."""
    if config.steps < 1:
        return 0.0
    begun = time.monotonic()
    bar = bars("cold start (SFT)")
    logger = JsonlLogger(folder / "sft.jsonl", resume_step=0) if dist.is_first() else Loggers([])

    def on_step(step: int, metrics: Metrics) -> None:
        bar(step + 1, config.steps)
        logger.log(metrics, step)

    train_sft(learner.backends["policy"], learner.reader, tokenizer, task, dialect, config, on_step)
    logger.close()
    checkpoint.save_model(folder / name, learner, tokenizer.hf)
    return time.monotonic() - begun


async def run_experiment(experiment: Experiment) -> None:
    """Evaluate, train, evaluate, and write summary.json and the before/after table; or as far as it may go."""
    run = experiment.run
    run.termination.listen()
    try:
        await whole_experiment(experiment)
    except Terminated:
        if run.saver.lost:
            raise TrainingError(f"the run ends, and {run.saver.lost}") from None
        if dist.is_first():
            tell(f"{run.folder} is saved, and the same command goes on with it")


async def whole_experiment(experiment: Experiment) -> None:
    run, config, unless_terminated = experiment.run, experiment.evaluate, experiment.run.termination.unless
    if experiment.resumed is not None:
        await check_tools(experiment.resumed, run.collector.player.tools, experiment.may_change)
    await publish(run, 0 if experiment.resumed is None else experiment.resumed.standing.version, probes(run))
    begun = time.monotonic()
    before = await unless_terminated(report_before(experiment)) if config.before else None
    before_s = time.monotonic() - begun
    begun = time.monotonic()
    await train(run, experiment.first_step)
    train_s = time.monotonic() - begun
    lost = run.saver.lost = await run.thread(save_final, run) or run.saver.lost
    begun = time.monotonic()
    after = await unless_terminated(report(run, config, "after"))
    sampled = None
    if config.sampled:
        sampled = await unless_terminated(report(run, config, "sampled_after", run.collector.temperature))
    seconds = {"sft": experiment.sft_seconds, "train": train_s, "eval": before_s + time.monotonic() - begun}
    run.logger.log(after.metrics() | run.saver.metrics(), run.loop.steps)
    summary = {
        "before": figures(before),
        "after": figures(after),
        "sampled_after": figures(sampled),
        "optimal_tc": after.overall.optimum.value,
        "seconds": {name: round(value, 2) for name, value in seconds.items()},
    }
    if dist.is_first():
        show(after, before)
    if lost:  # without a summary the same command makes up for it
        raise TrainingError(f"the run is finished, but not everything is on disk: {lost}")
    if dist.is_first():
        sealed.write_whole(run.folder / "summary.json", json.dumps(summary, indent=2) + "\n")


async def start_tools(tools: Mapping[str, Tool]) -> None:
    """An index opened, an interpreter warmed: it takes as long as it takes, and on no trajectory's account."""
    starts = [getattr(tool, "start", None) for tool in tools.values()]
    await asyncio.gather(*(start() for start in starts if start is not None))


def save_final(run: Run) -> str:
    """The trained model, as run.folder/model. Says why it could not be written, if so."""
    try:
        checkpoint.save_model(run.folder / "model", run.learner, run.tokenizer.hf)
    except OSError as error:
        lost = f"{run.folder / 'model'} could not be written: {reason(error)}"
        tell(f"FAILED: {lost}")
        return lost
    return ""


def probes(run: Run) -> list[list[int]]:
    """Prompts, for the proof of the first publication: there are no trajectories yet."""
    return [run.collector.player.open(problem) for problem in run.task.held_out()[:8]]


def figures(report: Report | None) -> dict[str, float | None] | None:
    """EM, TC and TP; null where the evaluation was not made, and for TP where no call was."""
    if report is None:
        return None
    return {name: getattr(report.overall, name).value for name in ("em", "tc", "tp")}


def show(after: Report, before: Report | None) -> None:
    console = get_console()
    for table in after.tables():
        console.print(table)
    if before is not None:
        console.print(before_after_table(before, after))


async def report(run: Run, config: Evaluate, name: str, temperature: float = 0.0) -> Report:
    return await measure(run.collector, run.task, config, run.folder / "eval" / name, run.bars, temperature)


async def report_before(experiment: Experiment) -> Report:
    """The report on the untrained policy; a resumed run made it when it began."""
    made = experiment.run.folder / "eval" / "before"
    if dist.from_first(experiment.first_step > 0 and (made / FILE).is_file(), "the first evaluation"):
        return Report.load(made)
    return await report(experiment.run, experiment.evaluate, "before")


async def evaluate(collector: Collector, task: Task, config: Evaluate, folder: Path, bars: Bars, settings: str) -> None:
    """`otcrl eval`: the greedy report and, when asked for, the sampled one; `settings` are left beside each."""
    console = get_console()
    await start_tools(collector.player.tools)
    modes = {"greedy": 0.0, "sampled": collector.temperature} if config.sampled else {"greedy": 0.0}
    for name, temperature in modes.items():
        found = await measure(collector, task, config, folder / name, bars, temperature)
        if dist.is_first():
            sealed.write_whole(folder / name / "config.yaml", settings)
            console.print(f"[bold]{name}[/] (temperature {temperature:g}), saved in {folder / name}")
            show(found, None)


async def measure(
    collector: Collector, task: Task, config: Evaluate, folder: Path, bars: Bars, temperature: float
) -> Report:
    """The report on the held-out problems, saved with its transcripts in `folder`."""
    problems = task.held_out()
    samples = config.samples if temperature > 0 else 1

    async def collect(chosen: Sequence[Problem], opening: str, times: int = 1) -> list[Trajectory]:
        own = dist.share([(problem, k) for problem in chosen for k in range(times)])
        names = [f"{k or ''}evaluation/{folder.name}/{opening}/{p.id}" for p, k in own]  # a name is a seed
        bar = bars(f"evaluating, {opening.strip()} forced" if opening else "evaluating")
        played = await collector.play([p for p, _ in own], names, temperature, opening, bar)
        return await asyncio.to_thread(dist.together, played, "evaluation")

    trajectories = await collect(problems, "", samples)
    offloaded: Offloading | None = None
    if config.offloading:
        dialect, tools = collector.player.dialect, collector.player.tools
        offloaded = await offloading(
            problems,
            collect,
            task.correct,
            answer_opening=dialect.open_answer(),
            call_openings=[dialect.open_call(tool) for tool in tools],
            counter=config.counter,
            normal=trajectories[::samples],
        )
    found = make_report(
        trajectories,
        task.correct,
        config.counter,
        offloaded,
        temperature=temperature,
        in_domain=getattr(task, "in_domain", ()),
        difficulty_column=config.difficulty,
    )
    if dist.is_first():
        told = [
            Transcript(trajectory=t, group=n // samples, sample=n % samples, correct=is_right(t, task.correct))
            for n, t in enumerate(trajectories)
        ]
        try:
            save(found, told, folder, collector.player.tokenizer)
        except OSError:  # what was found is not lost with it
            show(found, None)
            raise
    return found


def save(found: Report, told: Sequence[Transcript], folder: Path, tokenizer: Tokenizer) -> None:
    """Both in place of an earlier evaluation's, or, where that raises OSError, neither."""
    folder.mkdir(parents=True, exist_ok=True)
    written = folder / f".writing-{TRANSCRIPTS}"
    written.unlink(missing_ok=True)
    try:
        Transcripts(path=written, tokenizer=tokenizer).write(0, told)
        found.save(folder)
        written.replace(folder / TRANSCRIPTS)
    finally:
        written.unlink(missing_ok=True)
