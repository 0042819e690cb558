"""Training steps of TRL's GRPOTrainer on fixed work, timed by phase. Run by rollout_trl.py, beside an installed TRL.

    python rollout_trl_peer.py SPEC.json RESULT.json

TRL is given its best settings for this machine: no gradient checkpointing, no reference model, no evaluation or saving,
the tool as a coroutine. Two of its functions are replaced so that random completions make work of a known size: the
parser of tool calls says that the first turns are calls, and a completion has as many tokens as it may have.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import transformers
import trl  # pyright: ignore[reportMissingImports]
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl.trainer import grpo_trainer  # pyright: ignore[reportMissingImports]


class Timed(grpo_trainer.GRPOTrainer):
    """Counts tokens and calls, and adds up seconds, of the step that is under way."""

    spent: dict[str, float]

    def _add(self, name: str, value: float) -> None:
        self.spent[name] = self.spent.get(name, 0.0) + value

    def _generate_single_turn(self, *args: Any, **kwargs: Any) -> Any:
        begun = time.perf_counter()
        out = super()._generate_single_turn(*args, **kwargs)
        self._add("generate_s", time.perf_counter() - begun)
        self._add("sampled_tokens", sum(map(len, out[0])))
        return out

    def _tool_call_loop(self, *args: Any, **kwargs: Any) -> Any:
        begun, generated = time.perf_counter(), self.spent["generate_s"]
        out = super()._tool_call_loop(*args, **kwargs)
        self._add("tools_s", time.perf_counter() - begun - (self.spent["generate_s"] - generated))
        self._add("calls", out[4])
        self._add("observation_tokens", sum(mask.count(0) for mask in out[0]))
        return out

    def _generate_and_score_completions(self, inputs: Any) -> Any:
        begun = time.perf_counter()
        out = super()._generate_and_score_completions(inputs)
        self._add("rollout_s", time.perf_counter() - begun)
        self._add("prompt_tokens", int(out["prompt_mask"].sum()))
        return out


class Clock(TrainerCallback):
    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []
        self.trainer: Timed | None = None

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        assert self.trainer is not None
        self.trainer.spent, self.begun, self.cpu = {}, time.perf_counter(), time.process_time()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        assert self.trainer is not None
        step_s = time.perf_counter() - self.begun
        spent = {"step_s": step_s, "step_cpu_s": time.process_time() - self.cpu, **self.trainer.spent}
        self.steps.append(spent | {"update_s": step_s - spent["rollout_s"]})


def run(spec: dict[str, Any]) -> dict[str, Any]:
    torch.set_num_threads(spec["threads"])
    tokenizer = AutoTokenizer.from_pretrained(spec["model"])
    tokenizer.chat_template = spec["chat_template"]
    tokenizer.response_template = {}  # only asked whether it is there: the parser is replaced
    turns, rows = spec["calls"] + 1, spec["problems"] * spec["group"]
    parsed = itertools.count()

    def parse_response(tokenizer: Any, ids: list[int], prefix: Any = None, tools: Any = None) -> dict[str, Any]:
        text = tokenizer.decode(ids)
        if next(parsed) // rows % turns == turns - 1:
            return {"role": "assistant", "content": text}
        call = {"type": "function", "function": {"name": "search", "arguments": {"query": text}}}
        return {"role": "assistant", "content": "", "tool_calls": [call]}

    grpo_trainer.parse_response = parse_response

    async def search(query: str) -> str:
        """Finds passages.

        Args:
            query: What to look for.
        """
        await asyncio.sleep(spec["latency_s"])
        return spec["observation"]

    def place_in_group(completions: list[Any], **_: Any) -> list[float]:
        return [float(number % spec["group"]) for number in range(len(completions))]

    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        settings = trl.GRPOConfig(
            output_dir=folder,
            max_steps=spec["steps"],
            per_device_train_batch_size=spec["micro_rows"],
            gradient_accumulation_steps=rows // spec["micro_rows"],
            num_generations=spec["group"],
            max_completion_length=spec["completion_tokens"],
            max_tool_calling_iterations=spec["calls"] or None,
            generation_kwargs={"max_new_tokens": spec["turn_tokens"], "min_new_tokens": spec["turn_tokens"]},
            temperature=1.0,
            top_p=1.0,
            top_k=0,
            beta=0.0,
            learning_rate=1e-6,
            lr_scheduler_type="constant",
            adam_beta1=0.9,
            adam_beta2=0.95,
            weight_decay=0.0,
            max_grad_norm=1.0,
            optim="adamw_torch",
            bf16=False,
            gradient_checkpointing=False,
            shuffle_dataset=False,
            use_cpu=True,
            report_to="none",
            save_strategy="no",
            logging_steps=1,
            disable_tqdm=True,
        )
        prompts = [{"prompt": [{"role": "user", "content": text}]} for text in spec["questions"]]
        trainer = Timed(
            model=AutoModelForCausalLM.from_pretrained(spec["model"], dtype=torch.float32),
            reward_funcs=place_in_group,
            args=settings,
            train_dataset=Dataset.from_list(prompts),
            processing_class=tokenizer,
            tools=[search] if spec["calls"] else None,
            callbacks=[clock],
        )
        clock.trainer = trainer
        trainer.train()
    return {"version": trl.__version__, "transformers": transformers.__version__, "steps": clock.steps}


if __name__ == "__main__":
    source, target = map(Path, sys.argv[1:])
    target.write_text(json.dumps(run(json.loads(source.read_text()))))
