"""Training steps of otcrl on fixed work, timed by phase: `train_step` itself, built from conf/. Run by rollout_trl.py.

python rollout_trl_ours.py SPEC.json RESULT.json
"""

from __future__ import annotations

import asyncio
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from rollout_parts import section
from rollout_work import Finishes

import otcrl
from otcrl.build import build_run, build_world, close, start_process
from otcrl.compose import compose
from otcrl.loggers.progress import Bars
from otcrl.resume import Start
from otcrl.train import Run, train_step

CHOICES = "task=qa dialect=plain tools=search model=pretrained engine=hf reward=outcome algo=grpo".split()


def config(spec: dict[str, Any], folder: str) -> dict[str, Any]:
    """A training run with the real engine, learner and algorithm; the parts of the work are rollout_work.py's."""
    limits = {
        "max_calls": spec["calls"], "max_turns": spec["calls"] + 1, "max_tokens": spec["completion_tokens"],
        "max_turn_tokens": spec["turn_tokens"], "max_observation_tokens": spec["completion_tokens"],
    }  # fmt: skip
    cfg = compose([
        *CHOICES, f"model.path={spec['model']}", "algo.kl_coef=0", "correction.level=none",
        "learner.old_logprobs=sampler", "learner.policy_optimizer.warmup_steps=0",
        f"learner.micro_tokens={spec['micro_rows'] * spec['longest']}",
        f"loop.steps={spec['steps']}", f"loop.problems_per_step={spec['problems']}", "loop.transcripts_every=0",
        f"rollout.group_size={spec['group']}", *(f"rollout.limits.{name}={value}" for name, value in limits.items()),
    ])  # fmt: skip
    tool = {"_target_": "rollout_work.SlowSearch", "median_s": spec["latency_s"], "result": spec["observation"]}
    size = {"context": 2 * spec["longest"], "max_sequences": spec["problems"] * spec["group"], "batch_tokens": 4096}
    return cfg | {
        "run_dir": folder,
        "threads": spec["threads"],
        "logger": {},
        "task": {"_target_": "rollout_work.Questions", "length": spec["question_words"]},
        "dialect": {"_target_": "rollout_work.EveryTurnCalls"},
        "tools": {"search": tool} if spec["calls"] else {},
        "model": {
            "_target_": "rollout_work.EndlessModel", "path": spec["model"], "chat_template": spec["chat_template"],
        },
        "engine": {"_target_": "rollout_work.Finishes", "engine": section("engine/hf", **size)},
        "reward": {"_target_": "rollout_work.PlaceInGroup"},
    }  # fmt: skip


async def steps(run: Run, spec: dict[str, Any]) -> list[dict[str, float]]:
    found, rows = [], spec["problems"] * spec["group"]
    for step in range(spec["steps"]):
        assert isinstance(run.engine, Finishes)
        before, begun, cpu = run.engine.sampled, time.perf_counter(), time.process_time()
        metrics = await train_step(step, run)
        step_s, cpu_s = time.perf_counter() - begun, time.process_time() - cpu
        calls = round(metrics["calls/executed"] * rows)
        sampled = run.engine.sampled - before
        tokens = round(metrics["rollout/tokens"] * rows)
        asked = [run.collector.player.open(problem) for problem in run.task.sample(step, spec["problems"])]
        prompt_tokens = spec["group"] * sum(map(len, asked))
        phases = {f"{name}_s": metrics[f"time/{name}_s"] for name in ("rollout", "score", "update", "sync")}
        counts = {"sampled_tokens": sampled, "calls": calls, "prompt_tokens": prompt_tokens}
        counts["observation_tokens"] = tokens - prompt_tokens - sampled
        found.append({"step_s": step_s, "step_cpu_s": cpu_s, **phases, **counts})
    await run.rollouts.close()
    await run.engine.close()
    return found


def main(spec: dict[str, Any]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        cfg = config(spec, folder)
        start_process(cfg)
        world = build_world(cfg)
        with asyncio.Runner() as runner:
            run = build_run(cfg, world, Bars(), Start(folder=Path(folder) / "run"), runner)
            try:
                return {"version": getattr(otcrl, "__version__", "checkout"), "steps": runner.run(steps(run, spec))}
            finally:
                run.thread.close()
                run.logger.close()
                runner.run(close(world.tools))


if __name__ == "__main__":
    source, target = map(Path, sys.argv[1:])
    target.write_text(json.dumps(main(json.loads(source.read_text()))))
