"""The cold start trains on actions only, however its batch is split."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch

from otcrl.dialects.search_r1 import SearchR1
from otcrl.errors import DataError, TrainingError
from otcrl.learner.optimizer import Optimizer
from otcrl.learner.torch_backend import TorchBackend
from otcrl.models.reader import Reader
from otcrl.models.tiny import TinyLlama
from otcrl.protocols import Demo, Dialect, Segment
from otcrl.sft import Sft, encode, train_sft
from otcrl.types import Problem

WORDS = "q ? <search> </search> <answer> </answer> <information> </information> a b c d".split()
MODEL, TOKENIZER = TinyLlama(width=16, layers=1, heads=2, ff_width=24, context=64).load(WORDS, seed=0)
DIALECT = SearchR1(instructions="{question}", observation_template=" {result} ", require_think=False)
ADAMW = Optimizer(lr=1e-2, betas=(0.9, 0.95), weight_decay=0.0, warmup_steps=0, decay="linear", final_lr_share=1.0)
CONFIG = Sft(
    steps=1, batch_size=3, micro_tokens=1000, max_tokens=64, optimizer=ADAMW, max_grad_norm=1e9,
    autocast=None,
)  # fmt: skip


class Fixed:
    """A task that always demonstrates the same."""

    def __init__(self, *observations: str, answer: str = " b </answer>") -> None:
        self.demos: list[Demo] = [
            [Segment("q ?", False), Segment("<search> a </search>", True), Segment(text, False), Segment(answer, True)]
            for text in observations
        ]

    def sample(self, step: int, count: int) -> list[Problem]:
        return []

    def held_out(self) -> list[Problem]:
        return []

    def correct(self, answer: str, problem: Problem) -> float:
        return 0.0

    def demonstrations(self, step: int, count: int, dialect: Dialect) -> list[Demo]:
        return self.demos


def trained(task: Fixed, config: Sft = CONFIG) -> tuple[torch.Tensor, list[float]]:
    model, losses = copy.deepcopy(MODEL), []
    reader = Reader.of(model, "shared")
    policy = TorchBackend(model, reader.logprobs, config.optimizer, config.max_grad_norm)
    train_sft(policy, reader, TOKENIZER, task, DIALECT, config, lambda _, metrics: losses.append(metrics["sft/loss"]))
    return torch.cat([p.detach().flatten() for p in model.parameters()]), losses


def test_only_action_segments_are_learned():
    ids, mask = encode(Fixed("c").demos[0], TOKENIZER, ends=False)
    shown = [TOKENIZER.decode([i]) for i, acts in zip(ids, mask, strict=True) if acts]
    assert shown == "<search> a </search> b </answer>".split()


def test_the_end_token_is_an_action_where_the_dialect_needs_it():
    ids, mask = encode(Fixed("c").demos[0], TOKENIZER, ends=True)
    assert (ids[-1], mask[-1]) == (TOKENIZER.hf.eos_token_id, True)


@pytest.mark.parametrize("micro_tokens", [1, 20], ids=["one-by-one", "pairs"])
def test_any_split_gives_the_same_update(micro_tokens):
    task = Fixed("c", "c d c d", "d")
    whole, losses = trained(task)
    split, split_losses = trained(task, replace(CONFIG, micro_tokens=micro_tokens))
    assert torch.allclose(whole, split, atol=1e-4)
    assert losses == pytest.approx(split_losses, abs=1e-5)


def test_the_loss_is_the_mean_over_all_actions_of_the_batch():
    task = Fixed("c", "c d c d")
    total, count = 0.0, 0
    for demo in task.demos:
        ids, mask = encode(demo, TOKENIZER, ends=False)
        log_softmax = MODEL(torch.tensor([ids])).logits[0].log_softmax(-1)
        for t, acts in enumerate(mask):
            if acts:
                total, count = total - log_softmax[t - 1, ids[t]].item(), count + 1
    assert trained(task)[1] == pytest.approx([total / count], abs=1e-5)


def test_what_stands_in_an_observation_after_the_last_action_is_not_learned():
    plain = Fixed("c")
    for demo in plain.demos:
        demo.append(Segment("c c", False))  # pyright: ignore[reportAttributeAccessIssue]
    other = Fixed("c")
    for demo in other.demos:
        demo.append(Segment("d a", False))  # pyright: ignore[reportAttributeAccessIssue]
    assert torch.allclose(trained(plain)[0], trained(other)[0])


def test_the_loss_falls():
    losses = trained(Fixed("c", "d"), replace(CONFIG, steps=30))[1]
    assert losses[-1] < 0.3 * losses[0]


def test_a_demonstration_that_is_too_long_is_refused_with_both_numbers():
    with pytest.raises(DataError, match=r"has 9 tokens, more than sft\.max_tokens=8"):
        trained(Fixed("c"), replace(CONFIG, max_tokens=8))


def test_a_loss_that_is_not_finite_stops_and_names_the_step():
    with pytest.raises(TrainingError, match="SFT loss is nan at step 1"):
        trained(Fixed("c"), replace(CONFIG, steps=3, optimizer=replace(ADAMW, lr=float("inf"))))
