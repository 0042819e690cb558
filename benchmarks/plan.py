"""What `otcrl plan` says an update holds, against what it held: a real step of a small Llama, in a process of its own.

Measured is the peak of all bytes that torch's CPU allocator has handed out (the profiler's memory events), temporaries
inside kernels included. The first update, of two rows, makes the optimizer's state; the second one is measured. Beside
the error of the whole, the table has that of what comes and goes: activations, logits and temporaries.

    python benchmarks/plan.py
    python benchmarks/plan.py --only bfloat16
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from dataclasses import dataclass
from typing import Any

from otcrl.models.token_logprobs import TILE
from otcrl.plan import memory
from otcrl.plan.gpus import this_cpu
from otcrl.plan.job import Ceilings, Job, Sampling, Training, Work
from otcrl.plan.shapes import Shape, llama, qwen2

ROW = 128  # tokens; the second half of each is sampled


@dataclass(frozen=True, kw_only=True)
class Case:
    name: str
    shape: Shape
    precision: str = "float32"
    checkpointing: bool = False
    algo: str = "grpo"
    micro_tokens: int = 2048
    shared: bool = False  # the four rows of a group begin with the same half


SMALL = llama("20M", 8, 384, 6, 2, 1024, 16_384, tied=True)
DEEP = llama("26M", 16, 384, 6, 6, 1024, 4096, tied=False)
WIDE = llama("52M", 12, 512, 8, 4, 1408, 32_000, tied=True)
QWEN = qwen2("50M, Qwen2", 6, 448, 7, 1, 2432, 65_536, tied=True)
CASES = (
    Case(name="20M float32", shape=SMALL),
    Case(name="20M autocast", shape=SMALL, precision="autocast"),
    Case(name="20M bfloat16", shape=SMALL, precision="bfloat16"),
    Case(name="20M float32 checkpointing", shape=SMALL, checkpointing=True),
    Case(name="20M autocast checkpointing", shape=SMALL, precision="autocast", checkpointing=True),
    Case(name="20M float32 shared prompts", shape=SMALL, shared=True),
    Case(name="26M deep float32", shape=DEEP),
    Case(name="26M deep float32 checkpointing", shape=DEEP, checkpointing=True),
    Case(name="26M deep float32 PPO", shape=DEEP, algo="ppo"),
    Case(name="52M float32", shape=WIDE, micro_tokens=1024),
    Case(name="52M autocast checkpointing", shape=WIDE, precision="autocast", checkpointing=True, micro_tokens=1024),
    Case(name="50M Qwen2 float32", shape=QWEN, micro_tokens=1024),
    Case(name="26M deep bfloat16 PPO", shape=DEEP, precision="bfloat16", algo="ppo", micro_tokens=1024),
    Case(name="50M Qwen2 autocast", shape=QWEN, precision="autocast", micro_tokens=1024),
    Case(name="52M bfloat16 checkpointing shared", shape=WIDE, precision="bfloat16", checkpointing=True, shared=True),
)


def job(case: Case) -> Job:
    half = ROW // 2
    return Job(
        shape=case.shape,
        gpu=this_cpu(),
        nodes=1,
        gpus=1,
        training=Training(
            backend="torch",
            precision=case.precision,
            zero=0,
            offload="none",
            offload_params="none",
            lora=0,
            checkpointing=case.checkpointing,
            micro_tokens=case.micro_tokens,
            logit_tile=TILE["cpu"],
            reference=False,
            critic="own" if case.algo == "ppo" else None,
            recompute=False,
            epochs=1,
            minibatches=1,
            shared_prefix=case.shared,
            bucket=0,
        ),
        sampling=Sampling(
            kind="embedded",
            servers=0,
            tp=1,
            weight_bytes=4,
            context=ROW,
            max_sequences=1,
            batch_tokens=ROW,
            gpu_memory=0,
            sleep_level=0,
            transport="ipc",
        ),
        work=Work(
            problems=(4 if case.shared else 2) * case.micro_tokens // ROW // 4,
            group=4,
            concurrency=1,
            prompt=half,
            sampled=half,
            observed=0,
            calls=0,
            tool_s=0,
            max_tokens=half,
            max_calls=0,
            ahead=False,
        ),
        ceilings=Ceilings(),
    )


# -- the measured process --------------------------------------------------------------------------------


def measure(case: Case) -> dict[str, Any]:
    """Bytes: `states` before the update (weights, optimizer, critic) and the `peak` within it."""
    import torch

    from otcrl.compose import compose
    from otcrl.construct import construct, construct_as
    from otcrl.learner.learner import Learner
    from otcrl.models.critic import Critic
    from otcrl.presets import find_preset
    from otcrl.types import Batch, Scores, rows

    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = compose([f"algo={case.algo}"], preset=find_preset("quickstart"))
    settings = {
        **config["learner"],
        "micro_tokens": case.micro_tokens,
        "packing": "shared" if case.shared else "packed",
        "old_logprobs": "sampler",
        "autocast": "bfloat16" if case.precision == "autocast" else None,
    }
    algo_settings = {name: 0.0 for name in ("kl_coef", "kl_reward_coef") if name in config["algo"]}
    algo = construct(config["algo"] | algo_settings, "algo")
    policy = model(case)
    learner = construct_as(
        Learner,
        settings,
        "learner",
        policy=policy,
        reference=None,
        critic=Critic(policy).train() if algo.needs_critic else None,
        steps=10,
        seed=0,
        temperature=1.0,
    )
    count = (4 if case.shared else 2) * case.micro_tokens // ROW  # two forward passes or more
    actions = torch.arange(ROW).expand(count, ROW) >= ROW // 2
    ids = torch.randint(0, case.shape.vocab, (count, ROW))
    if case.shared:
        ids[:, : ROW // 2] = ids[::4, : ROW // 2].repeat_interleave(4, 0)
    batch = Batch(
        token_ids=ids,
        attention_mask=torch.ones(count, ROW, dtype=torch.bool),
        action_mask=actions,
        sampler_logprobs=-9.0 * actions,
        rewards=torch.arange(count) % 2.0,
        group_ids=torch.arange(count) // 4,
    )
    zeros = torch.zeros(count, ROW)
    scores = Scores(batch.sampler_logprobs, batch.sampler_logprobs, zeros)
    targets = algo.targets(batch, scores)
    few = slice(0, 2)
    learner.update(0, rows(batch, few), rows(scores, few), rows(targets, few), algo)
    modules = [learner.policy, *([learner.critic] if learner.critic is not None else [])]
    kept = [p for module in modules for p in module.parameters()]
    kept += [value for _, value in learner.state()]
    states = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in kept}
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        learner.update(1, batch, scores, targets, algo)
    return {"states": sum(states.values()), "peak": sum(states.values()) + highest(profile)}


def model(case: Case) -> Any:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

    config, cls = (Qwen2Config, Qwen2ForCausalLM) if case.shape.bias else (LlamaConfig, LlamaForCausalLM)
    policy: Any = cls(
        config(
            vocab_size=case.shape.vocab,
            hidden_size=case.shape.width,
            intermediate_size=case.shape.ff_width,
            num_hidden_layers=case.shape.layers,
            num_attention_heads=case.shape.heads,
            num_key_value_heads=case.shape.kv_heads,
            tie_word_embeddings=case.shape.tied,
        )
    )
    assert sum(p.numel() for p in policy.parameters()) == case.shape.parameters
    if case.precision == "bfloat16":
        policy.to(torch.bfloat16)
    if case.checkpointing:
        policy.gradient_checkpointing_enable()
    return policy.train()


def highest(profile: Any) -> int:
    """Bytes handed out at most beyond what there was when the profile began."""
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


# -- the table -----------------------------------------------------------------------------------------------


def row(case: Case) -> dict[str, Any]:
    command = [sys.executable, __file__, "--case", case.name]
    measured = json.loads(
        subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1]
    )
    planned = memory.learner_parts("update", job(case))
    total = sum(planned.values())
    coming = measured["peak"] - measured["states"]
    lasting = sum(memory.resident(job(case), updating=False).values())
    return {
        "case": case.name,
        "planned MB": total / 1e6,
        "measured MB": measured["peak"] / 1e6,
        "error": total / measured["peak"] - 1,
        "beyond states: planned": (total - lasting) / 1e6,
        "measured": coming / 1e6,
        "its error": (total - lasting) / coming - 1,
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--case", help="measure one case, in this process")
    parser.add_argument("--only", default="", help="cases whose name has this in it")
    arguments = parser.parse_args()
    if arguments.case:
        print(json.dumps(measure(next(case for case in CASES if case.name == arguments.case))))
        return
    from common import publish

    table = [row(case) for case in CASES if arguments.only in case.name]
    publish(
        "plan",
        table,
        {
            "plan_error": max(abs(line["error"]) for line in table),
            "plan_error_beyond_states": max(abs(line["its error"]) for line in table),
        },
    )


if __name__ == "__main__":
    main()
