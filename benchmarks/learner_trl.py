"""One GRPO update of TRL's GRPOTrainer on the batch of learner_work.py. Run by learner.py, beside an installed TRL.

    python learner_trl.py SPEC.json RESULT.json

`trainer.train()` runs as it is, with one function replaced: instead of generating and scoring completions it hands out
the given ones, padded as TRL pads them. All that follows is TRL's: splitting, log-probs and entropies in chunks, loss,
accumulation, clipping, AdamW. The first of two steps is a small one that makes the optimizer's state.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from typing import Any

import torch
from datasets import Dataset
from learner_work import ADAMW, ALGO, MAX_NORM, Case, Meter, group_targets, load, main, read_batches, watch_gradients
from torch import Tensor
from transformers import AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer  # pyright: ignore[reportMissingImports]

from otcrl.types import Batch


class Fed(GRPOTrainer):
    """Learns from batches that it is given."""

    batches: Iterator[Batch]
    loss: float

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
        batch = next(self.batches)
        prompt = int(batch.action_mask[0].nonzero()[0])  # all prompts are equally long: nothing is padded on the left
        columns = {
            "prompt_ids": batch.token_ids[:, :prompt],
            "prompt_mask": batch.attention_mask[:, :prompt].long(),
            "completion_ids": batch.token_ids[:, prompt:],
            "completion_mask": batch.action_mask[:, prompt:].long(),
            "advantages": group_targets(batch).advantages.sum(1) / batch.action_mask.sum(1),
            "num_items_in_batch": batch.action_mask.sum(),
            "old_per_token_logps": batch.sampler_logprobs[:, prompt:],
        }
        self.loss = 0.0
        return {name: value.to(self.accelerator.device) for name, value in columns.items()}

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        loss = super().training_step(*args, **kwargs)
        self.loss += loss.item()
        return loss


class Stopwatch(TrainerCallback):
    """Measures each step; the last one counts. Watches the optimizer, which exists from the first one on."""

    def __init__(self, meter: Meter) -> None:
        self.meter = meter
        self.found: dict[str, float] = {}
        self.gradients: list[Tensor] | None = None

    def on_step_begin(self, *args: Any, model: Any, optimizer: Any, **kwargs: Any) -> None:
        if self.gradients is None:
            self.gradients = watch_gradients(model, optimizer.optimizer)
        self.meter.start()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.found = self.meter.stop()


def run(spec: dict[str, Any]) -> tuple[dict[str, float], Tensor]:
    meter, case = Meter(), Case(**spec["case"])
    batches = read_batches(spec)
    count = len(batches[0].rewards)
    tokenizer = AutoTokenizer.from_pretrained(spec["model"])
    stopwatch = Stopwatch(meter)
    with tempfile.TemporaryDirectory() as folder:
        settings = GRPOConfig(
            output_dir=folder,
            max_steps=2,
            per_device_train_batch_size=case.rows,
            gradient_accumulation_steps=count // case.rows,
            num_generations=spec["lengths"]["group"],
            loss_type="grpo",
            epsilon=ALGO.clip_low,
            epsilon_high=ALGO.clip_high,
            beta=0.0,
            learning_rate=ADAMW.lr,
            lr_scheduler_type="constant",
            adam_beta1=ADAMW.betas[0],
            adam_beta2=ADAMW.betas[1],
            weight_decay=ADAMW.weight_decay,
            max_grad_norm=MAX_NORM,
            optim="adamw_torch",
            bf16=spec["precision"] == "bfloat16",
            gradient_checkpointing=case.checkpointing,
            use_cpu=not torch.cuda.is_available(),
            report_to="none",
            save_strategy="no",
            logging_steps=1,
            disable_tqdm=True,
        )
        trainer = Fed(
            model=load(spec["model"]),
            reward_funcs=lambda completions, **_: [0.0] * len(completions),
            args=settings,
            train_dataset=Dataset.from_list([{"prompt": "never read"}] * 2 * count),
            processing_class=tokenizer,
            callbacks=[stopwatch],
        )
        trainer.batches = iter(batches)
        trainer.train()
    norm = next(entry["grad_norm"] for entry in reversed(trainer.state.log_history) if "grad_norm" in entry)
    assert stopwatch.gradients is not None
    return stopwatch.found | {"loss": trainer.loss, "grad_norm": norm}, stopwatch.gradients[-1]


if __name__ == "__main__":
    main(run)
