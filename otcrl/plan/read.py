"""A composed config, and what only a plan knows (which GPUs, how long trajectories are), as a `Job`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from otcrl.construct import check_section, construct, locate
from otcrl.errors import ConfigError, nearest
from otcrl.plan.gpus import find_gpu
from otcrl.plan.job import OFFLOADS, Ceilings, Job, Sampling, Training, Work
from otcrl.plan.shapes import Shape, find_shape, llama

Config = Mapping[str, Any]
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
KINDS = {
    "otcrl.rollout.hf_engine.HFEngine": "embedded",
    "otcrl.rollout.vllm_engine.VLLMEngine": "vllm",
    "otcrl.rollout.vllm_servers.VLLMServers": "servers",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What `otcrl plan` takes beside the config. None: from the config, else as said."""

    nodes: int = 1
    gpus: int = 1  # per node
    gpu: str = "h100-80gb"
    zero: int | None = None  # 0 | 1 | 2 | 3; else 2 for several GPUs
    offload: str | None = None  # of the optimizer: none | cpu | nvme
    offload_params: str | None = None  # of weights, with zero=3: none | cpu
    tp: int | None = None  # tensor parallelism of the engine
    lora: int | None = None  # rank; else 0, all weights
    prompt_tokens: float = 300
    sampled_tokens: float | None = None  # mean of a trajectory; else what is left of half the limit
    observed_tokens: float | None = None  # mean; else as many results as calls, at most a quarter of the limit
    calls: float | None = None  # mean; else half the limit
    tool_s: float = 0.5  # mean seconds of a call
    mfu: float | None = None  # ceiling of training; else 0.40
    price: float | None = None  # per GPU and hour; null: no cost is shown
    host_gib: float | None = None  # main memory of a node; null: not checked


def read_settings(named: Mapping[str, str]) -> Settings:
    """Raises ConfigError for a value that is none."""
    values: dict[str, Any] = {}
    for name, text in named.items():
        hint = next(str(field.type) for field in fields(Settings) if field.name == name)
        try:
            values[name] = text if "str" in hint else int(text) if "int" in hint else float(text)
        except ValueError:
            raise ConfigError(f"{name} must be a number, got {text!r}") from None
    settings = Settings(**values)
    check(settings)
    return settings


def check(settings: Settings) -> None:
    for name, least in (("nodes", 1), ("gpus", 1), ("tp", 1), ("lora", 0), ("zero", 0), ("prompt_tokens", 1)):
        value = getattr(settings, name)
        if value is not None and not least <= value < math.inf:
            raise ConfigError(f"{name} must be at least {least}, got {value}")
    for name in ("sampled_tokens", "observed_tokens", "calls", "tool_s", "price"):
        value = getattr(settings, name)
        if value is not None and not value >= 0:
            raise ConfigError(f"{name} must be 0 or more, got {value}")
    if settings.zero is not None and settings.zero > 3:
        raise ConfigError(f"zero must be 0, 1, 2 or 3, got {settings.zero}")
    if settings.mfu is not None and not 0 < settings.mfu <= 1:
        raise ConfigError(f"mfu must be a share above 0 and at most 1, got {settings.mfu}")
    for name, places in OFFLOADS.items():
        value = getattr(settings, name)
        if value not in (None, *places):
            raise ConfigError(f"{name} must be {', '.join(places)}, got {value!r}.{nearest(value, places)}")


def read_job(config: Config, settings: Settings) -> Job:
    """Raises ConfigError for what cannot be planned."""
    check_sections(config)
    shape = read_model(config)
    gpu = find_gpu(settings.gpu)
    if gpu.name == "cpu" and settings.nodes * settings.gpus > 1:
        raise ConfigError("gpu=cpu is one machine: leave nodes and gpus at 1")
    work = read_work(config, settings)
    training = read_training(config, settings, work)
    job = Job(
        shape=shape,
        gpu=gpu,
        nodes=settings.nodes,
        gpus=settings.gpus,
        training=training,
        sampling=read_sampling(config, settings, training),
        work=work,
        ceilings=Ceilings() if settings.mfu is None else replace(Ceilings(), training=settings.mfu),
    )
    check_parallel(job)
    return job


def check_sections(config: Config) -> None:
    """Raises ConfigError for a section that is none, or a number that nothing can be divided by."""
    for name in ("model", "engine", "loop", "rollout", "rollout.limits", "learner", "learner.deepspeed"):
        node: Any = config
        for key in name.split("."):
            node = node.get(key)
        check_section(node, name)
    for section, key in (("loop", "problems_per_step"), ("rollout", "group_size"), ("rollout", "concurrency")):
        if not (isinstance(value := config[section][key], int) and value >= 1):
            raise ConfigError(f"{section}.{key} must be at least 1, got {value!r}")


def check_parallel(job: Job) -> None:
    tp = job.sampling.tp
    if job.shape.heads % tp:
        raise ConfigError(f"tp={tp} does not divide the {job.shape.heads} attention heads of {job.shape.name}")
    if job.gpu.name == "cpu" and job.sampling.kind != "embedded":
        raise ConfigError("gpu=cpu is planned with the embedded engine: choose engine=hf")
    if job.sampling.kind == "vllm" and job.gpus % tp:
        raise ConfigError(f"tp={tp} does not divide the {job.gpus} GPUs of a node")
    if job.sampling.kind == "embedded" and tp > 1:
        raise ConfigError(f"tp={tp}: the embedded engine runs on one GPU; choose engine=vllm")
    if job.training.offload_params != "none" and job.training.zero < 3:
        raise ConfigError(f"offload_params={job.training.offload_params} needs zero=3, got {job.training.zero}")
    if job.training.offload == "nvme" and job.training.zero < 3:
        raise ConfigError(f"offload=nvme needs zero=3, got {job.training.zero}")


# -- sections ------------------------------------------------------------------------------------------


def read_model(config: Config) -> Shape:
    section = config["model"]
    if "path" in section:
        return find_shape(section["path"])
    if section.get("_target_") != "otcrl.models.tiny.TinyLlama":
        raise ConfigError("the model's size is not known: plan with model=NAME_OR_DIRECTORY")
    width, layers, heads, ff = (section[name] for name in ("width", "layers", "heads", "ff_width"))
    return llama("tiny", layers, width, heads, heads, ff, vocabulary(config), tied=True)


def vocabulary(config: Config) -> int:
    """Tokens of a tiny model: the words of its task."""
    task = construct(config["task"], "task", tools={})
    words = task.words() if hasattr(task, "words") else ()
    return construct(config["model"], "model").load_tokenizer(words).vocab_size


def read_training(config: Config, settings: Settings, work: Work) -> Training:
    model, learner = config["model"], config["learner"]
    deepspeed = learner["deepspeed"] if learner.get("backend") == "deepspeed" else {}
    several = settings.nodes * settings.gpus > 1
    offload = first(settings.offload, deepspeed.get("offload"), "none")
    zero = first(settings.zero, deepspeed.get("zero_stage"), 2 if several or offload != "none" else 0)
    offload_params = first(settings.offload_params, deepspeed.get("offload_params"), "none")
    asked = several or zero > 0 or offload != "none" or offload_params != "none"
    from otcrl.models.token_logprobs import TILE

    algo = construct(config["algo"], "algo")
    half = model.get("dtype", "float32") != "float32"
    rows = learner["minibatch_size"] or work.trajectories
    return Training(
        backend="deepspeed" if asked else learner.get("backend", "torch"),
        precision="bfloat16" if half else "autocast" if learner["autocast"] else "float32",
        zero=zero,
        offload=offload,
        offload_params=offload_params,
        lora=first(settings.lora, (learner.get("lora") or {}).get("rank"), 0),
        checkpointing=model.get("gradient_checkpointing", False),
        micro_tokens=learner["micro_tokens"],
        logit_tile=TILE["cpu" if settings.gpu.lower() == "cpu" else "cuda"],
        reference=algo.needs_reference,
        critic=learner.get("critic_trunk", "own") if algo.needs_critic else None,
        recompute=learner["old_logprobs"] == "recompute",
        epochs=learner["epochs"],
        minibatches=-(-work.trajectories // rows),
        shared_prefix=learner["packing"] == "shared",
        bucket=float(learner["deepspeed"]["bucket"]),
    )


def read_sampling(config: Config, settings: Settings, training: Training) -> Sampling:
    engine = config["engine"]
    target = engine.get("_target_")
    if target not in KINDS:
        kind = locate(target, "engine._target_")
        raise ConfigError(f"engine is {kind.__name__}, and plans are made for hf, vllm and vllm_servers")
    weights = BYTES[engine.get("dtype") or ("bfloat16" if training.precision == "bfloat16" else "float32")]
    transport = engine.get("transport", "ipc")
    on_gpu = settings.gpu.lower() != "cpu"
    return Sampling(
        kind=KINDS[target],
        servers=len(engine.get("urls", ())),
        tp=first(settings.tp, engine.get("tensor_parallel"), 1),
        weight_bytes=weights,
        context=engine["context"],
        max_sequences=engine["max_sequences"],
        batch_tokens=engine["batch_tokens"],
        gpu_memory=engine.get("gpu_memory", 0.0),
        sleep_level=engine.get("sleep_level", 0),
        transport=transport if transport != "auto" else "ipc" if on_gpu else "file",
    )


def read_work(config: Config, settings: Settings) -> Work:
    rollout, loop = config["rollout"], config["loop"]
    limits, schedule = rollout["limits"], rollout.get("schedule") or {}
    context = config["engine"]["context"]  # which ends a trajectory too
    prompt = min(settings.prompt_tokens, max(context - limits["max_tokens"], context / 2))
    most = min(limits["max_tokens"], int(context - prompt))
    calls = first(settings.calls, limits["max_calls"] / 2)
    results = min(calls * limits["max_observation_tokens"], most / 4)
    observed = first(settings.observed_tokens, results)
    sampled = first(settings.sampled_tokens, max(most / 2 - observed, 1.0))
    return Work(
        problems=round(loop["problems_per_step"] * schedule.get("oversample", 1.0)),
        group=rollout["group_size"],
        concurrency=rollout["concurrency"],
        prompt=prompt,
        sampled=sampled,
        observed=observed,
        calls=calls,
        tool_s=settings.tool_s,
        max_tokens=most,
        max_calls=limits["max_calls"],
        ahead=schedule.get("ahead", 0) > 0,
    )


def first(*values: Any) -> Any:
    """The first that is not None."""
    return next(value for value in values if value is not None)
