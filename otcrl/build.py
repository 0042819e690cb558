"""The composition root: the only place where configuration becomes objects.

Sections with a `_target_` name their class; anything shared between parts is wired by hand here.
"""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from otcrl import checkpoint
from otcrl.construct import construct, construct_as
from otcrl.errors import ConfigError
from otcrl.experiment import Evaluate, Experiment, cold_start, evaluate, run_experiment
from otcrl.learner.learner import Learner
from otcrl.loggers import Loggers
from otcrl.loggers.jsonl import JsonlLogger
from otcrl.loggers.progress import Bars
from otcrl.models.critic import Critic
from otcrl.models.pretrained import Pretrained
from otcrl.protocols import Algorithm, Dialect, Engine, Logger, Task, Tool
from otcrl.rollout.collect import Collector
from otcrl.rollout.loop import Limits, Player
from otcrl.sft import Sft
from otcrl.tools.retrieval.corpus import Passage
from otcrl.train import Loop, Run

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from otcrl.models.tokenizer import HFTokenizer

Config = Mapping[str, Any]  # plain nested values, as `compose` hands them on


def run_train(cfg: Config) -> None:
    """`otcrl train`: cold start if the config has one, evaluation, training, evaluation, summary."""
    resumed = checkpoint.latest(Path(cfg["resume"]) / "checkpoints") if cfg["resume"] else None
    folder = Path(cfg["resume"]) if cfg["resume"] else new_folder(cfg)
    world = build_world(cfg)
    with Bars() as bars:
        sft_seconds = 0.0
        if resumed is None:
            sft_seconds = cold_start(world.model, world.tokenizer, world.task, world.dialect, world.sft, folder, bars)
        learner, algo = build_learner(cfg, world)
        first_step = resumed.step if resumed is not None else 0
        run = build_run(cfg, world, learner, algo, folder, bars, first_step)
        if resumed is not None:
            checkpoint.restore(resumed, learner)
            run.reward.load_state_dict(resumed.reward_state)
        config = construct_as(Evaluate, cfg["evaluate"], "evaluate")
        experiment = Experiment(run=run, evaluate=config, first_step=first_step, sft_seconds=sft_seconds)
        asyncio.run(closing(run_experiment(experiment), world, run.engine))
    run.logger.close()


def run_sft(cfg: Config) -> None:
    """`otcrl sft`: the cold start alone; the model is written to run_dir/model."""
    world = build_world(cfg)
    if world.sft.steps < 1:
        raise ConfigError("sft.steps is 0: there is nothing to do")
    folder = new_folder(cfg)
    with Bars() as bars:
        cold_start(world.model, world.tokenizer, world.task, world.dialect, world.sft, folder, bars, name="model")
    asyncio.run(close(world.tools))


def run_eval(cfg: Config) -> None:
    """`otcrl eval`: measure the model of `run=`, `model=` or `conf=` on held-out problems, or on `data=`."""
    path = cfg["checkpoint"] or (f"{cfg['run']}/model" if cfg["run"] else None)
    if path is not None:
        own = cfg["model"] if "Pretrained" in cfg["model"].get("_target_", "") else {}
        settings = {"dtype": "float32", "chat": False, "device": "auto", "gradient_checkpointing": False}
        settings |= {key: own[key] for key in settings if key in own}
        model = {"_target_": f"{Pretrained.__module__}.Pretrained", **settings, "path": path}
        cfg = {**cfg, "model": model}
    if cfg["data"]:
        target = "otcrl.tasks.question_answering.QuestionAnswering"
        match = {"match": "math"} if "arithmetic" in cfg["task"]["_target_"] else {}
        cfg = {**cfg, "task": {"_target_": target, "test": cfg["data"], **match}}
    world = build_world(cfg)
    folder = Path(cfg["run"] or cfg["run_dir"]) / "eval"
    folder.mkdir(parents=True, exist_ok=True)
    engine = construct(cfg["engine"], "engine", model=world.model.eval(), tokenizer=world.tokenizer)
    config = construct_as(Evaluate, cfg["evaluate"], "evaluate")
    with Bars() as bars:
        collector = build_collector(cfg, world, engine)
        asyncio.run(closing(evaluate(collector, world.task, config, folder, bars), world, engine))


# -- parts ------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class World:
    """What exists before any training: the questions, the tools, the language and the model."""

    task: Task
    tools: Mapping[str, Tool]
    dialect: Dialect
    model: PreTrainedModel
    tokenizer: HFTokenizer
    sft: Sft


def build_world(cfg: Config) -> World:
    from transformers.utils import logging

    logging.disable_progress_bar()  # its bars for loading and saving tear those of the run
    tools: dict[str, Tool] = {}  # filled below: the task shows the tools in prompts, and may bring their corpus
    task = construct(cfg["task"], "task", tools=tools)
    own = [Passage(*row) for row in task.own_corpus()] if hasattr(task, "own_corpus") else []
    for name, section in (cfg["tools"] or {}).items():
        tool = construct(section, f"tools.{name}", passages=own)
        tools[tool.name] = tool
    words = task.words() if hasattr(task, "words") else ()
    model, tokenizer = construct(cfg["model"], "model").load(words, cfg["seed"])
    dialect = construct(cfg["dialect"], "dialect")
    sft = construct_as(Sft, cfg["sft"], "sft")
    return World(task=task, tools=tools, dialect=dialect, model=model, tokenizer=tokenizer, sft=sft)


def build_learner(cfg: Config, world: World) -> tuple[Learner, Algorithm]:
    algo = construct(cfg["algo"], "algo")
    if not algo.needs_critic and cfg["rollout"]["group_size"] < 2:
        raise ConfigError(
            f"rollout.group_size is {cfg['rollout']['group_size']}, and {type(algo).__name__} compares trajectories "
            "of one problem: use 2 or more"
        )
    learner = construct_as(
        Learner,
        cfg["learner"],
        "learner",
        policy=world.model,
        reference=copy.deepcopy(world.model).requires_grad_(False).eval() if algo.needs_reference else None,
        critic=Critic(world.model) if algo.needs_critic else None,
        steps=cfg["loop"]["steps"],
        seed=cfg["seed"],
        temperature=cfg["rollout"]["temperature"],
    )
    return learner, algo


def build_collector(cfg: Config, world: World, engine: Engine) -> Collector:
    settings = dict(cfg["rollout"])
    limits = construct_as(Limits, settings.pop("limits"), "rollout.limits")
    player = Player(engine=engine, tokenizer=world.tokenizer, dialect=world.dialect, tools=world.tools, limits=limits)
    return construct_as(Collector, settings, "rollout", player=player, seed=cfg["seed"])


def build_run(
    cfg: Config, world: World, learner: Learner, algo: Algorithm, folder: Path, bars: Bars, first_step: int
) -> Run:
    sampler = copy.deepcopy(world.model).requires_grad_(False).eval()
    engine = construct(cfg["engine"], "engine", model=sampler, tokenizer=world.tokenizer)
    wired = {"name": cfg["name"], "folder": folder, "config": cfg}
    extra = [construct(section, f"logger.{key}", **wired) for key, section in cfg["logger"].items()]
    loggers: list[Logger] = [JsonlLogger(folder / "metrics.jsonl", resume_step=first_step), *extra]
    return Run(
        task=world.task,
        collector=build_collector(cfg, world, engine),
        reward=construct(cfg["reward"], "reward", correct=world.task.correct),
        algo=algo,
        learner=learner,
        engine=engine,
        tokenizer=world.tokenizer,
        logger=Loggers(loggers),
        loop=construct_as(Loop, cfg["loop"], "loop"),
        folder=folder,
        bars=bars,
    )


def new_folder(cfg: Config) -> Path:
    """An empty run directory with the config in it. What an earlier run left there is renamed, never lost."""
    from otcrl.compose import to_yaml

    folder = Path(cfg["run_dir"])
    if folder.exists() and any(folder.iterdir()):
        number = 1
        while (old := folder.with_name(f"{folder.name}.{number}")).exists():
            number += 1
        folder.rename(old)
        print(f"otcrl: {folder} held an earlier run, now {old}")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(to_yaml(dict(cfg)))
    return folder


async def closing(work: Any, world: World, engine: Engine) -> None:
    """Await `work`; whatever happens, close the engine and the tools."""
    try:
        await work
    finally:
        await engine.close()
        await close(world.tools)


async def close(tools: Mapping[str, Tool]) -> None:
    for tool in tools.values():
        await tool.close()
