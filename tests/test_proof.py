"""The engine answers as the learner does, or the run stops."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Iterable, Sequence

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from otcrl.errors import TrainingError
from otcrl.learner.proof import Proof
from otcrl.models.lora import Lora
from otcrl.models.policy import token_logprobs
from otcrl.models.published import Layers, published
from otcrl.rollout.hf_engine import HFEngine
from tests.tiny import tiny_llama, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
PROBES = [TOKENIZER.encode("what is the capital of france?"), TOKENIZER.encode("12 * 7 = 84")]


def proof(**settings) -> Proof:
    return Proof(**{"every": 1, "probes": 2, "tokens": 64, "tolerance": None} | settings)


def saying(model: PreTrainedModel):
    async def says(ids: Sequence[int]) -> list[float]:
        ids_1T = torch.tensor([list(ids)])
        mask_1T = torch.arange(len(ids))[None] > 0
        with torch.no_grad():
            return token_logprobs(model, ids_1T, mask_1T)[0][0].tolist()

    return says


def run(
    check: Proof,
    learner: PreTrainedModel,
    given: PreTrainedModel | Iterable[tuple[str, Tensor]],
    version: int = 1,
    probes: Sequence[Sequence[int]] = PROBES,
) -> dict[str, float]:
    """The learner's weights are `learner`'s, and what reached the engine are those that were `given`."""
    weights = given.named_parameters() if isinstance(given, PreTrainedModel) else given

    async def go() -> dict[str, float]:
        engine = HFEngine(
            model=tiny_llama(TOKENIZER.vocab_size, seed=7), tokenizer=TOKENIZER, max_sequences=4, context=128,
            batch_tokens=256,
        )  # fmt: skip
        await engine.load_weights(weights, version)
        try:
            return await check(engine, saying(learner), probes, version)
        finally:
            await engine.close()

    return asyncio.run(go())


def updated(model: PreTrainedModel, by: float) -> PreTrainedModel:
    """The model after an update that moved every parameter by about `by`."""
    after = tiny_llama(TOKENIZER.vocab_size)
    after.load_state_dict(model.state_dict())
    with torch.no_grad():
        for parameter in after.parameters():
            parameter += by * torch.randn_like(parameter).sign()
    return after


@pytest.fixture
def learner() -> PreTrainedModel:
    return tiny_llama(TOKENIZER.vocab_size)


def test_the_same_weights_agree_to_rounding(learner):
    found = run(proof(), learner, learner)
    assert found["sync/logprob_gap_mean"] <= found["sync/logprob_gap_max"] < 1e-4


def test_weights_of_the_step_before_stop_the_run(learner):
    check = proof()
    run(check, learner, learner, version=1)
    with pytest.raises(TrainingError, match=r"version 2 .* differ .* nats on average .* over 3\d tokens"):
        run(check, updated(learner, 1e-3), learner, version=2)


def test_merged_adapters_are_proven_as_any_weights_are(learner):
    plain = updated(learner, 0.0)
    Lora(rank=4, alpha=8, targets="all-linear").adapt(learner, seed=0)
    with torch.no_grad():
        for name, parameter in learner.named_parameters():
            if ".lora_B." in name:
                torch.nn.init.normal_(parameter, std=0.1)
    merged = Layers(list(published(learner)))
    assert run(proof(tolerance=1e-4), learner, merged)["sync/logprob_gap_max"] < 1e-4
    with pytest.raises(TrainingError, match="computes with other weights"):
        run(proof(tolerance=1e-4), learner, plain.named_parameters())


@pytest.mark.parametrize("name", ["model.layers.1.self_attn.k_proj.weight", "model.norm.weight", "lm_head.weight"])
def test_one_parameter_that_is_not_the_learners_stops_the_run(learner, name):
    check, wrong = proof(), updated(learner, 0.0)
    run(check, learner, learner)
    with torch.no_grad():
        wrong.get_parameter(name).mul_(1.1)
    with pytest.raises(TrainingError, match="computes with other weights"):
        run(check, learner, wrong)


def test_the_first_publication_is_held_to_what_no_rounding_reaches(learner):
    with pytest.raises(TrainingError, match=r"0\.3 is allowed"):
        run(proof(), learner, tiny_llama(TOKENIZER.vocab_size, seed=1))


def test_later_ones_may_differ_by_ten_times_what_the_first_did():
    check = proof()
    assert check.allowed() == 0.3
    check._found = 0.004
    assert check.allowed() == pytest.approx(0.04)
    check._found = 1e-6
    assert check.allowed() == 1e-4
    assert proof(tolerance=0.2).allowed() == 0.2


def test_in_16_bits_a_first_agreement_to_the_last_bit_is_no_measure():
    check = proof(rounds=True)
    check._found = 0.0
    assert check.allowed() == 0.03
    check._found = 0.02
    assert check.allowed() == pytest.approx(0.2)


def test_nan_is_no_agreement(learner):
    with torch.no_grad():
        broken = updated(learner, 0.0)
        broken.get_parameter("model.norm.weight").fill_(math.nan)
    with pytest.raises(TrainingError, match="by nan nats"):
        run(proof(), learner, broken)


def test_probes_are_the_shortest_sequences_cut_to_length():
    assert proof(probes=2, tokens=3).chosen([[1] * 9, [2], [3, 3], [4] * 5]) == [[3, 3], [4, 4, 4]]


def test_a_probe_leaves_the_engine_the_token_that_it_samples_to_score_it(learner):
    """Of a step whose trajectories all fill the context."""
    full = [TOKENIZER.encode("12 * 7 = 84 ")[:1] * 128]
    assert run(proof(tokens=512), learner, learner, probes=full)["sync/logprob_gap_max"] < 1e-4


def test_proofs_may_be_made_less_often():
    assert [proof(every=3).is_due(v) for v in range(4)] == [True, False, False, True]
    assert not proof(every=0).is_due(0)


@pytest.mark.parametrize(("setting", "value"), [("every", -1), ("probes", 0), ("tokens", 1), ("tolerance", 0.0)])
def test_settings_that_make_no_sense_are_refused(setting, value):
    with pytest.raises(ValueError, match=f"{setting} must be"):
        proof(**{setting: value})
