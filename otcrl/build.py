"""The composition root: the only place where configuration becomes objects.

Sections with a `_target_` name their class; anything shared between parts is wired by hand here.
"""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryFile
from typing import TYPE_CHECKING, Any

from otcrl import checkpoint, dist
from otcrl.algos.mismatch import Correction
from otcrl.checkpoint import Checkpoint
from otcrl.compose import OF_FILES, load, to_yaml
from otcrl.construct import Constructor, check_part, check_section, construct, construct_as, locate, wired_parts
from otcrl.errors import ConfigError
from otcrl.experiment import Evaluate, Experiment, cold_start, evaluate, run_experiment, start_tools
from otcrl.health import Health
from otcrl.learner.deepspeed_backend import DeepSpeed, made_split
from otcrl.learner.learner import Learner
from otcrl.learner.optimizer import check_trained
from otcrl.learner.proof import Proof, is_16_bit
from otcrl.learner.thread import LearnerThread
from otcrl.loggers import Loggers
from otcrl.loggers.jsonl import JsonlLogger
from otcrl.loggers.progress import Bars
from otcrl.models.critic import Critic, SharedCritic
from otcrl.models.lora import Lora
from otcrl.models.published import is_split
from otcrl.models.twin import twin
from otcrl.preflight import (
    check_correction,
    check_deadlines,
    check_demonstrations,
    check_dialect,
    check_evaluation,
    check_group_size,
    check_names,
    check_questions,
    check_reward,
    tell_unread,
)
from otcrl.presets import conf_dir
from otcrl.protocols import Algorithm, Dialect, Engine, RewardFn, Task, Tool
from otcrl.resume import Start, alone, earlier_steps, find_start, identities, is_done, unwritable
from otcrl.rollout.collect import Collector
from otcrl.rollout.loop import Limits, Player
from otcrl.rollout.schedule import Rollouts, Schedule
from otcrl.rollout.stream import Stream
from otcrl.rollout.transcripts import Transcripts
from otcrl.saver import Saver
from otcrl.secrets import public
from otcrl.sft import Sft
from otcrl.tell import tell
from otcrl.termination import Termination
from otcrl.tools.retrieval.corpus import Passage
from otcrl.train import Loop, Run

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from otcrl.models.tokenizer import HFTokenizer

Config = Mapping[str, Any]  # plain nested values, as `compose` hands them on


def run_train(cfg: Config) -> None:
    """`otcrl train`: cold start if the config has one, evaluation, training, evaluation, summary."""
    start_process(cfg)
    with alone(cfg):
        if is_done(cfg):
            tell(f"the run in {cfg['run_dir']} is finished, and it was restarted after its end: nothing is left to do")
        else:
            train_in(cfg, find_start(cfg))
    dist.stop()


def train_in(cfg: Config, start: Start) -> None:
    config = construct_as(Evaluate, cfg["evaluate"], "evaluate")
    world = build_world(cfg, trains=True)
    check_evaluation(config, world.task, world.dialect)
    # one event loop to the end: tools that have started live in it
    with Bars(quiet=not dist.is_first()) as bars, asyncio.Runner() as runner, ExitStack() as stack:
        stack.callback(lambda: runner.run(close(world.tools)))
        run = build_run(cfg, world, bars, start, runner)
        for part in (run.logger, run.saver, run.thread):
            stack.callback(part.close)
        stack.callback(lambda: runner.run(run.engine.close()))
        sft_seconds = take_up(run, world, start, bars)
        start.settle(cfg)
        experiment = Experiment(
            run=run,
            evaluate=config,
            resumed=start.checkpoint,
            may_change=cfg["resume_changed"],
            sft_seconds=sft_seconds,
        )
        runner.run(run_experiment(experiment))


def start_process(cfg: Config) -> None:
    """Joins the run's ranks and sets the threads: a run that goes on says if its checkpoint had others."""
    import torch

    dist.start(construct_as(dist.Ranks, cfg["ranks"], "ranks"))
    check_names(cfg)
    if cfg.get("threads") is not None:
        torch.set_num_threads(cfg["threads"])


def take_up(run: Run, world: World, start: Start, bars: Bars) -> float:
    """The run stands where it begins: after its cold start, or at a checkpoint. Returns the seconds of a cold start."""
    if start.checkpoint is not None:
        run.saver.saved = start.step
        return 0.0  # see `restore`
    seconds = 0.0
    if start.cold is not None:
        run.learner.load_weights(checkpoint.read_weights(start.cold, run.learner))
    else:
        seconds = cold_start(run.learner, world.tokenizer, world.task, world.dialect, world.sft, run.folder, bars)
    run.learner.begin()
    return seconds


def restore(saved: Checkpoint, cold: Path | None, learner: Learner, reward: RewardFn, rollouts: Rollouts) -> None:
    """They stand at a checkpoint. Raises DataError where it is another model's, or another algorithm's."""
    if cold is not None:
        learner.refer_to(checkpoint.read_weights(cold, learner))
    checkpoint.restore(saved, learner)
    reward.load_state_dict(saved.standing.reward_state)
    rollouts.restore(saved.standing.frontier)


def run_sft(cfg: Config) -> None:
    """`otcrl sft`: the cold start alone; the model is written to run_dir/model."""
    start_process(cfg)
    world = build_world(cfg, trains=True)
    if world.sft.steps < 1:
        raise ConfigError("sft.steps is 0: there is nothing to do")
    check_demonstrations(world.sft, world.task, world.dialect, world.tokenizer, world.tools)
    plain = {"reference": None, "critic": None, "steps": 0, "seed": cfg["seed"], "temperature": 1.0}
    learner = construct_as(Learner, cfg["learner"], "learner", policy=world.model, **plain)
    folder = Path(cfg["run_dir"])
    with alone(cfg):
        with Start(folder=folder).prepared(cfg):
            pass
        with Bars(quiet=not dist.is_first()) as bars:
            cold_start(learner, world.tokenizer, world.task, world.dialect, world.sft, folder, bars, name="model")
    asyncio.run(close(world.tools))
    dist.stop()


def run_eval(cfg: Config) -> None:
    """`otcrl eval`: measure the model of `run=`, `model=` or `conf=` on held-out problems, or on `data=`."""
    start_process(cfg)
    config = construct_as(Evaluate, cfg["evaluate"], "evaluate")
    run, path = cfg["run"], cfg["checkpoint"]
    if run is not None:
        path = str(trained_model(Path(run), cfg.get("step")))
    if path is not None:
        model = load(conf_dir() / "model/pretrained.yaml")
        if cfg["model"].get("_target_") == model["_target_"]:
            model |= cfg["model"]
        cfg = {**cfg, "model": {**model, "path": path}}
    if cfg["data"]:
        cfg = {**cfg, "task": asking(cfg["task"], cfg["data"])}
    needs_model = "model" in wired_parts(engine_class(cfg))  # an endpoint elsewhere has its own
    world = build_world(cfg, weights=needs_model)
    if not world.task.held_out():
        raise ConfigError("the task has no evaluation problems: name a file, data=FILE")
    check_evaluation(config, world.task, world.dialect)
    tell_unread(world.task.held_out(), world.tokenizer)
    parts = {"model": world.model.eval()} if needs_model else {}
    engine = construct(cfg["engine"], "engine", tokenizer=world.tokenizer, **parts)
    collector = build_collector(cfg, world, engine)
    folder = Path(cfg["run_dir"]) / "eval" / (cfg.get("as") or "")
    with unwritable(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=folder):  # found out now, not after the evaluation
            pass
    with Bars(quiet=not dist.is_first()) as bars:
        work = evaluate(collector, world.task, config, folder, bars, to_yaml(dict(cfg)))
        asyncio.run(closing(work, world, engine))
    dist.stop()


def asking(task: Config, data: Sequence[str]) -> Config:
    """The task that asks the questions of the files `data` instead of its own; one that reads files stays as it is."""
    from otcrl.tasks.question_answering import QuestionAnswering
    from otcrl.tasks.tool_calls import ToolCalls

    own: Any = locate(task.get("_target_"), "task._target_")
    if isinstance(own, type) and issubclass(own, (QuestionAnswering, ToolCalls)):  # it reads files itself
        return {**task, "train": [], "test": data}
    match = {"match": "math"} if "arithmetic" in task["_target_"] else {}
    kept = {key: task[key] for key in ("in_domain", "match", *OF_FILES) if key in task}
    return {"_target_": "otcrl.tasks.question_answering.QuestionAnswering", "test": data, **match, **kept}


def trained_model(run: Path, step: str | None) -> Path:
    """The model that training ended with, or the one in the checkpoint of a step. Raises ConfigError without it."""
    if step is None:
        if not (run / "model").is_dir():
            saved = [str(checkpoint.step_of(folder)) for folder in checkpoint.complete(run / "checkpoints")]
            its = f"evaluate a checkpoint, step={saved[-1]} (of {', '.join(saved)}), or " if saved else ""
            raise ConfigError(f"run={run} has not come to its end: {its}go on with it, `otcrl train resume={run}`")
        return run / "model"
    found = {str(checkpoint.step_of(folder)): folder for folder in checkpoint.complete(run / "checkpoints")}
    if step.lstrip("0") not in found:
        kept = f" It has: {', '.join(found)}." if found else " It has none."
        raise ConfigError(f"run={run} has no checkpoint of step {step!r}.{kept} loop.keep_checkpoints says how many")
    return found[step.lstrip("0")] / "model"


# -- parts ------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class World:
    """What exists before any training: the questions, the tools, the language and the model."""

    task: Task
    tools: Mapping[str, Tool]
    dialect: Dialect
    weights: PreTrainedModel | None  # None: only its tokenizer was asked for
    tokenizer: HFTokenizer
    sft: Sft
    split: Callable[[], AbstractContextManager[object]]  # inside, other models are made as this one was
    again: Callable[[], PreTrainedModel]  # the model once more, whole

    @property
    def model(self) -> PreTrainedModel:
        assert self.weights is not None, "whoever needs a model builds the world with weights"
        return self.weights


def build_world(cfg: Config, *, weights: bool = True, trains: bool = False) -> World:
    """`trains`: a learner is built of the model, which may be split over the ranks from the beginning."""
    from transformers.utils import logging

    logging.disable_progress_bar()  # its bars for loading and saving tear those of the run
    tools: dict[str, Tool] = {}  # filled below: the task shows the tools in prompts, and may bring their corpus
    task = construct(cfg["task"], "task", tools=tools)
    check_part(task, Task, "task")
    own = [Passage(*row) for row in task.own_corpus()] if hasattr(task, "own_corpus") else []
    for name, section in (cfg["tools"] or {}).items():
        for tool in tools_of(construct(section, f"tools.{name}", passages=own), f"tools.{name}"):
            if tool.name in tools:
                raise ConfigError(f"tools.{name}: there is a tool called {tool.name!r} already")
            tools[tool.name] = tool
    words = task.words() if hasattr(task, "words") else ()
    dialect = construct(cfg["dialect"], "dialect", tools=tools)
    check_part(dialect, Dialect, "dialect")
    sft = construct_as(Sft, cfg["sft"], "sft")
    source = construct(cfg["model"], "model")
    dtype = getattr(source, "dtype", "float32")
    if trains:
        check_trained(dtype)  # the learner looks too, after minutes of loading
    split = splitting(cfg, dtype) if trains else nullcontext
    with split():
        model, tokenizer = source.load(words, cfg["seed"]) if weights else (None, source.load_tokenizer(words))
    check_dialect(dialect, task, tokenizer, tools)
    return World(
        task=task,
        tools=tools,
        dialect=dialect,
        weights=model,
        tokenizer=tokenizer,
        sft=sft,
        split=split,
        again=lambda: source.load(words, cfg["seed"])[0],
    )


def splitting(cfg: Config, dtype: str) -> Callable[[], AbstractContextManager[object]]:
    """What the models to train are made in: with ZeRO-3 and several ranks, each has a part from the beginning."""
    import torch

    check_section(cfg["learner"], "learner")
    settings = construct_as(DeepSpeed, cfg["learner"].get("deepspeed"), "learner.deepspeed")
    if dist.size() == 1 or cfg["learner"].get("backend") != "deepspeed" or settings.zero_stage < 3:
        return nullcontext
    return partial(made_split, settings, getattr(torch, dtype))


def tools_of(built: Any, where: str) -> list[Tool]:
    """The tools that a section describes: itself, or those that a server lists."""
    if not hasattr(built, "tools"):
        check_part(built, Tool, where)
        return [built]
    try:
        return built.tools()
    except ConfigError as error:
        raise type(error)(f"{where}: {error}") from error


def build_learner(cfg: Config, world: World, algo: Algorithm, collector: Collector, loop: Loop) -> Learner:
    if collector.temperature == 0:
        raise ConfigError("rollout.temperature is 0, and training needs trajectories that differ: use 1.0")
    settings, reference, critic = cfg["learner"], None, None
    with world.split():
        if algo.needs_reference:
            adapters = construct_as(Lora, settings.get("lora"), "learner.lora").rank
            # without its adapters the policy is the reference
            reference = world.model if adapters else twin(world.model).requires_grad_(False).eval()
        if algo.needs_critic:
            critic = (SharedCritic if settings.get("critic_trunk") == "shared" else Critic)(world.model)
    return construct_as(
        Learner,
        settings,
        "learner",
        policy=world.model,
        reference=reference,
        critic=critic,
        steps=loop.steps,
        seed=cfg["seed"],
        temperature=collector.temperature,
    )


def build_engine(cfg: Config, world: World) -> Engine:
    """An engine to train with: one that holds its weights in this process needs a model of its own."""
    kind = engine_class(cfg)
    if not getattr(kind, "trains", True):
        raise ConfigError(f"engine is {kind.__name__}, which only evaluates: train with hf, vllm or vllm_servers")
    model = world.model
    if not getattr(kind, "shares_weights", False):
        model = world.again() if is_split(model) else copy.deepcopy(model)
        model = model.requires_grad_(False).eval()
    return construct(cfg["engine"], "engine", model=model, tokenizer=world.tokenizer)


def engine_class(cfg: Config) -> Constructor[Engine]:
    check_section(cfg["engine"], "engine")
    return locate(cfg["engine"].get("_target_"), "engine._target_")


def build_collector(cfg: Config, world: World, engine: Engine) -> Collector:
    check_section(cfg["rollout"], "rollout")
    settings = {**cfg["rollout"]}
    settings.pop("schedule", None)  # of training
    limits = construct_as(Limits, settings.pop("limits", None), "rollout.limits")
    check_deadlines(world.tools, limits.tool_timeout_s)
    given = {"first": settings.pop("first")} if "first" in settings else {}
    parts = {"tokenizer": world.tokenizer, "dialect": world.dialect, "tools": world.tools, "limits": limits}
    player = construct_as(Player, given, "rollout", engine=engine, **parts)
    return construct_as(Collector, settings, "rollout", player=player, seed=cfg["seed"])


def build_rollouts(cfg: Config, task: Task, collector: Collector, loop: Loop) -> Rollouts:
    schedule = construct_as(Schedule, cfg["rollout"].get("schedule"), "rollout.schedule")
    if schedule.only_signal and collector.group_size < 2:
        raise ConfigError("rollout.schedule.only_signal compares the trajectories of a group: use group_size 2 or more")
    if loop.problems_per_step % dist.size():
        raise ConfigError(
            f"loop.problems_per_step is {loop.problems_per_step}, and {dist.size()} ranks cannot play as many each: "
            f"use {max(dist.size(), loop.problems_per_step // dist.size() * dist.size())}"
        )
    stream = Stream(task.sample, loop.problems_per_step, dist.rank(), dist.size())
    own = loop.problems_per_step // dist.size()
    return Rollouts(collector=collector, stream=stream, schedule=schedule, per_step=own, steps=loop.steps)


def build_run(cfg: Config, world: World, bars: Bars, start: Start, runner: asyncio.Runner) -> Run:
    """Whatever can be refused is refused here, before the cold start and before an earlier run is moved.

    Tools start here, in `runner`'s loop, for the same reason.
    """
    loop = construct_as(Loop, cfg["loop"], "loop")
    algo = construct(cfg["algo"], "algo")
    check_part(algo, Algorithm, "algo")
    correction = construct_as(Correction, cfg["correction"], "correction")
    check_correction(correction, algo)
    wired = {"correct": world.task.correct, "tool_names": tuple(world.tools), "dialect": world.dialect}
    reward = construct(cfg["reward"], "reward", **wired)
    check_part(reward, RewardFn, "reward")
    check_reward(reward, algo, world.task, world.dialect, world.tools)
    engine = build_engine(cfg, world)
    collector = build_collector(cfg, world, engine)
    check_group_size(collector.group_size, algo, reward)
    rollouts = build_rollouts(cfg, world.task, collector, loop)
    learner = build_learner(cfg, world, algo, collector, loop)
    check_questions(collector.player, world.task, loop)
    if world.sft.steps and start.checkpoint is None and start.cold is None:
        check_demonstrations(world.sft, world.task, world.dialect, world.tokenizer, world.tools)
    types = (learner.autocast, learner.policy.dtype, getattr(engine, "dtype", None))
    proof = construct_as(Proof, cfg["sync"], "sync", rounds=any(map(is_16_bit, types)))
    health = construct_as(Health, cfg["health"], "health")
    if start.checkpoint is not None:
        restore(start.checkpoint, start.cold, learner, reward, rollouts)
    runner.run(start_tools(world.tools))
    folder = start.folder
    with start.prepared(cfg):
        earlier = earlier_steps(folder, start.step)
        health.hear(earlier)
        logger = build_logger(cfg, loop, start, earlier, bars)
    return Run(
        task=world.task,
        collector=collector,
        reward=reward,
        algo=algo,
        correction=correction,
        learner=learner,
        engine=engine,
        proof=proof,
        tokenizer=world.tokenizer,
        rollouts=rollouts,
        thread=LearnerThread(learner.policy.device),
        logger=logger,
        saver=build_saver(cfg, world.tools, loop, folder, earlier),
        termination=Termination(),
        loop=loop,
        health=health,
        transcripts=Transcripts(path=folder / "transcripts.jsonl", tokenizer=world.tokenizer),
        folder=folder,
        bars=bars,
    )


def build_logger(cfg: Config, loop: Loop, start: Start, earlier: list[dict[str, Any]], bars: Bars) -> Loggers:
    """Only the first rank says anything."""
    if not dist.is_first():
        return Loggers([])
    wired = {"name": cfg["name"], "folder": start.folder, "config": public(cfg), "steps": loop.steps, "bars": bars}
    wired |= {"resume_step": start.step if start.goes_on else None, "earlier": earlier}
    extra = [construct(section, f"logger.{key}", **wired) for key, section in cfg["logger"].items()]
    return Loggers([JsonlLogger(start.folder / "metrics.jsonl"), *extra])


def build_saver(
    cfg: Config, tools: Mapping[str, Tool], loop: Loop, folder: Path, earlier: Sequence[Mapping[str, Any]]
) -> Saver:
    """`earlier`: the steps that the run has made before."""
    versions = checkpoint.versions()  # looked up once: it takes a tenth of a second

    def about() -> dict[str, object]:
        return {"versions": versions, "tools": identities(tools), "config": dict(cfg)}

    logs = [folder / "metrics.jsonl", folder / "transcripts.jsonl"]
    saver = Saver(folder / "checkpoints", keep=loop.keep_checkpoints, keep_best=loop.keep_best, about=about, logs=logs)
    for row in earlier:
        saver.best.hear(row["step"], row)
    return saver


async def closing(work: Any, world: World, engine: Engine) -> None:
    """Await `work`; whatever happens, close the engine and the tools."""
    try:
        await work
    finally:
        with suppress(asyncio.CancelledError):
            await asyncio.sleep(0)  # takes a cancellation that is still on its way, which would cut the rest short
        await engine.close()
        await close(world.tools)


async def close(tools: Mapping[str, Tool]) -> None:
    for tool in tools.values():
        await tool.close()
