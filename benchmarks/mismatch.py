"""How far a sampler is from the learner, by what is wrong with it: the scale for `loop.max_logprob_gap`.

SmolLM2-135M-Instruct in float32 is the learner, at temperature 1. Another copy of it samples, sound or spoilt in one
way, and reports the log-probs of what it sampled from, as vLLM's `processed_logprobs` do. docs/mismatch.md reads the
table. KL is the k3 estimate.

    otcrl models smollm2 out=models/smollm2
    python benchmarks/mismatch.py
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable

import torch
from common import Row, publish
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from otcrl.algos.mismatch import mismatch
from otcrl.models.policy import token_logprobs

QUESTIONS = (
    "Which of the rivers that rise in the Alps is the longest?",
    "A train leaves at 9:40 and arrives at 13:05. How long does it take? Explain.",
    "Write a short story about a lighthouse keeper.",
    "Who wrote Middlemarch, and what else did she write?",
)
Spoil = Callable[[PreTrainedModel], PreTrainedModel]


def bfloat16(model: PreTrainedModel) -> PreTrainedModel:
    torch.nn.Module.to(model, torch.bfloat16)
    return model


def moved(size: float) -> Spoil:
    """Every weight `size` away, in a random direction: about what an AdamW step of that learning rate does."""

    def spoil(model: PreTrainedModel) -> PreTrainedModel:
        for weight in model.parameters():
            weight.add_(size * torch.randn_like(weight).sign())
        return model

    return spoil


def without_layer(model: PreTrainedModel) -> PreTrainedModel:
    model.get_parameter("model.layers.15.mlp.down_proj.weight").zero_()
    model.get_parameter("model.layers.15.self_attn.o_proj.weight").zero_()
    return model


def shuffled_tensor(model: PreTrainedModel) -> PreTrainedModel:
    weight = model.get_parameter("model.layers.15.mlp.down_proj.weight")
    weight.copy_(weight[torch.randperm(len(weight))])
    return model


def never_loaded(model: PreTrainedModel) -> PreTrainedModel:
    for weight in model.parameters():
        if weight.dim() > 1:
            weight.normal_(std=0.02)
    return model


CASES: dict[str, tuple[Spoil, float, float]] = {  # what spoils the model, temperature, top_p
    "float32": (lambda model: model, 1.0, 1.0),
    "bfloat16": (bfloat16, 1.0, 1.0),
    "weights a step of lr 1e-6 old": (moved(1e-6), 1.0, 1.0),
    "weights a step of lr 1e-5 old": (moved(1e-5), 1.0, 1.0),
    "weights ten steps of lr 1e-5 old": (moved(1e-4), 1.0, 1.0),
    "top_p 0.9": (lambda model: model, 1.0, 0.9),
    "temperature 0.7": (lambda model: model, 0.7, 1.0),
    "temperature 0.5": (lambda model: model, 0.5, 1.0),
    "one layer of 30 left out": (without_layer, 1.0, 1.0),
    "one tensor of 272 shuffled": (shuffled_tensor, 1.0, 1.0),
    "weights never loaded": (never_loaded, 1.0, 1.0),
}


def sample(
    model: PreTrainedModel, ids: Tensor, count: int, tokens: int, temperature: float, top_p: float, end: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Token ids, log-probs under what was sampled from, and which tokens were sampled; each [count, T]."""
    settings = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}
    out = model.generate(  # pyright: ignore[reportCallIssue]
        ids.expand(count, -1), attention_mask=torch.ones(count, ids.shape[1]), max_new_tokens=tokens,
        return_dict_in_generate=True, output_scores=True, pad_token_id=end, **settings,
    )  # fmt: skip
    scores = torch.stack(out.scores, 1).float().log_softmax(-1)
    sampled = out.sequences[:, ids.shape[1] :]
    logprobs = torch.zeros(out.sequences.shape)
    logprobs[:, ids.shape[1] :] = scores.gather(-1, sampled.unsqueeze(-1)).squeeze(-1)
    mask = torch.zeros(out.sequences.shape, dtype=torch.bool)
    mask[:, ids.shape[1] :] = (sampled == end).long().cumsum(1) - (sampled == end).long() == 0
    return out.sequences, logprobs, mask


@torch.no_grad()
def measure(name: str, learner: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, count: int, tokens: int) -> Row:
    torch.manual_seed(0)
    spoil, temperature, top_p = CASES[name]
    sampler = spoil(copy.deepcopy(learner))
    end = tokenizer.eos_token_id
    assert isinstance(end, int)
    rows: list[tuple[Tensor, Tensor, Tensor]] = []  # learner's log-probs, sampler's, mask: each [count, tokens]
    for question in QUESTIONS:
        text = str(tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, tokenize=False
        ))  # fmt: skip
        ids = torch.tensor([tokenizer.encode(text, add_special_tokens=False)])
        drawn, mu, mask = sample(sampler, ids, count, tokens, temperature, top_p, end)
        pi = token_logprobs(learner, drawn, mask)[0]
        rows += [(pi[:, -tokens:], mu[:, -tokens:], mask[:, -tokens:])]  # prompts are longer than is cut off
    found = mismatch(*(torch.cat(parts) for parts in zip(*rows, strict=True)))
    return {
        "sampler": name,
        "gap mean": found["logprob_gap_mean"],
        "gap max": found["logprob_gap_max"],
        "KL": found["mismatch_kl_k3"],
        "ESS token": found["ess_token"],
        "ESS sequence": found["ess_sequence"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="models/smollm2")
    parser.add_argument("--count", type=int, default=8, help="trajectories for each of the four questions")
    parser.add_argument("--tokens", type=int, default=48)
    options = parser.parse_args()
    learner = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    found = [measure(name, learner, tokenizer, options.count, options.tokens) for name in CASES]
    gaps = {str(row["sampler"]): float(row["gap mean"] or 0) for row in found}
    publish("mismatch", found, {"wrong_temperature_vs_bfloat16": gaps["temperature 0.7"] / gaps["bfloat16"]})


if __name__ == "__main__":
    main()
