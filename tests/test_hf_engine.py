"""The embedded engine against transformers itself: plain forwards, and `model.generate`."""

from __future__ import annotations

import asyncio
import copy
import functools
from collections.abc import Coroutine
from typing import TypeVar

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from otcrl.errors import ConfigError, EngineError
from otcrl.models.tokenizer import HFTokenizer
from otcrl.protocols import Completion
from otcrl.rollout.hf_engine import HFEngine
from otcrl.rollout.sampling import sample, uniforms
from tests.tiny import tiny_llama, tiny_tokenizer

TOKENIZER = tiny_tokenizer(">.", "></", "</search>")
VOCAB = TOKENIZER.vocab_size
OBSERVATION = TOKENIZER.encode(" [result: 42] ")  # 14 tokens
T = TypeVar("T")


def engine(model: PreTrainedModel | None = None, *, slots: int = 64, context: int = 512, prefill: int = 64) -> HFEngine:
    """Small prefills and a pool that grows, so that ordinary tests cross their edges."""
    model = copy.deepcopy(model if model is not None else tiny_llama(VOCAB))
    return HFEngine(model=model, tokenizer=TOKENIZER, max_sequences=slots, context=context, batch_tokens=prefill)


def run(work: Coroutine[object, object, T]) -> T:
    """A hang is a failure."""
    return asyncio.run(asyncio.wait_for(work, timeout=60))


async def ask(
    engine: HFEngine,
    ids: list[int],
    *,
    stop: tuple[str, ...] = (),
    max_tokens: int = 24,
    temperature: float = 1.0,
    seed: int = 0,
    session: str = "s",
) -> Completion:
    return await engine.generate(
        ids, stop=stop, max_tokens=max_tokens, temperature=temperature, seed=seed, session=session
    )


def prompt(i: int) -> list[int]:
    return TOKENIZER.encode(f"question {i}: " + "why? " * (i % 7))


async def play(engine: HFEngine, i: int, *, turns: int = 3, temperature: float = 1.0) -> tuple[list[int], list[float]]:
    """Ids and log-probs (0.0 where not sampled) of a trajectory with `turns - 1` tool calls."""
    ids = prompt(i)
    logprobs = [0.0] * len(ids)
    for turn in range(turns):
        completion = await ask(
            engine, ids, stop=(">",), max_tokens=5 + 3 * (i % 11), temperature=temperature, seed=i, session=str(i)
        )
        ids, logprobs = ids + completion.token_ids, logprobs + completion.logprobs
        if turn + 1 < turns:
            await asyncio.sleep(0.001 * (i % 3))  # the tool
            ids, logprobs = ids + OBSERVATION, logprobs + [0.0] * len(OBSERVATION)
    engine.release(str(i))
    return ids, logprobs


@torch.no_grad()
def full_forward(model: PreTrainedModel, ids: list[int], temperature: float = 1.0) -> list[float]:
    """[L] log-probs by one plain forward; 0.0 for the first token."""
    logprobs = (model(torch.tensor([ids])).logits[0] / temperature).log_softmax(-1)
    return [0.0, *logprobs[:-1].gather(-1, torch.tensor(ids[1:])[:, None])[:, 0].tolist()]


def close(logprobs: list[float], expected: list[float]) -> bool:
    return max(abs(a - b) for a, b in zip(logprobs, expected, strict=True) if a) < 1e-5


def family(name: str) -> PreTrainedModel:
    torch.manual_seed(0)
    if name == "gpt2":
        config = GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=512, initializer_range=0.3)
        return GPT2LMHeadModel(config).eval()
    if name == "gpt_neox":
        config = GPTNeoXConfig(
            vocab_size=VOCAB,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=512,
            initializer_range=0.3,
        )
        return GPTNeoXForCausalLM(config).eval()
    if name == "qwen3":
        config = Qwen3Config(
            vocab_size=VOCAB,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=1,
            head_dim=16,
            max_position_embeddings=512,
            initializer_range=0.3,
            tie_word_embeddings=True,
        )
        return Qwen3ForCausalLM(config).eval()
    model = tiny_llama(VOCAB)
    if name == "llama_eager":
        model.set_attn_implementation("eager")
    return model


# -- exactness ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "llama_eager", "qwen3", "gpt_neox", "gpt2"])
def test_logprobs_equal_a_full_forward_across_tool_calls(name: str) -> None:
    model = family(name)

    async def play_all() -> list[tuple[list[int], list[float]]]:
        target = engine(model)
        played = await asyncio.gather(*(play(target, i) for i in range(16)))
        assert target.stats.reused > target.stats.prefilled  # their caches outlived the tool calls, and rows moved
        await target.close()
        return played

    for ids, logprobs in run(play_all()):
        assert close(logprobs, full_forward(model, ids))


def test_logprobs_are_those_of_the_temperature_that_was_sampled_at() -> None:
    ids, logprobs = run(play(engine(), 3, temperature=0.5))
    assert close(logprobs, full_forward(tiny_llama(VOCAB), ids, temperature=0.5))


def test_the_model_still_respects_padding_elsewhere() -> None:
    model = tiny_llama(VOCAB)
    ids = torch.tensor([[0, 0, *prompt(0)]])
    padded = {"attention_mask": (ids > 0).long(), "position_ids": (torch.arange(ids.shape[1]) - 2).clamp_min(0)[None]}
    before = model(ids, **padded).logits
    HFEngine(model=model, tokenizer=TOKENIZER, max_sequences=1, context=512, batch_tokens=64)
    assert torch.allclose(model(ids, **padded).logits, before, atol=1e-5)


def test_temperature_0_is_greedy_generate_and_reports_temperature_1() -> None:
    model = tiny_llama(VOCAB)
    ids = prompt(2)
    completion = run(ask(engine(model), ids, temperature=0.0))
    expected = model.generate(  # pyright: ignore[reportAttributeAccessIssue]  # its `self` is a protocol no model meets
        torch.tensor([ids]), max_new_tokens=24, do_sample=False, pad_token_id=TOKENIZER.pad_id
    )
    got = ids + completion.token_ids
    assert got == expected[0, : len(got)].tolist()
    assert close([0.0] * len(ids) + completion.logprobs, full_forward(model, got))


@functools.cache
def played_alone() -> list[list[int]]:
    async def one_by_one() -> list[list[int]]:
        target = engine()
        return [(await play(target, i))[0] for i in range(12)]

    return run(one_by_one())


@pytest.mark.parametrize("slots", [1, 4, 64])
@pytest.mark.parametrize("order", [1, -1], ids=["in_order", "reversed"])
def test_sampling_does_not_depend_on_concurrency_or_arrival(slots: int, order: int) -> None:
    async def together() -> list[list[int]]:
        target = engine(slots=slots)
        played = await asyncio.gather(*(play(target, i) for i in range(12)[::order]))
        assert (target.stats.evicted > 0) == (slots < 12)  # an evicted cache is computed again, nothing else changes
        return [ids for ids, _ in played[::order]]

    assert run(together()) == played_alone()


def test_one_engine_serves_one_event_loop_after_another() -> None:
    target = engine()
    assert run(play(target, 1)) == run(play(target, 1))


# -- the cache ------------------------------------------------------------------------------------------


def test_only_the_observation_is_computed_after_a_tool_call() -> None:
    async def two_turns() -> None:
        target = engine()
        ids = prompt(0)
        ids += (await ask(target, ids)).token_ids
        before = target.stats.prefilled
        assert before == len(prompt(0)) - 1  # the last token of a prefill goes through a decode step
        await ask(target, ids + OBSERVATION)
        # the last sampled token had no K/V yet, the last token of the observation is again left to decode
        assert target.stats.prefilled - before == 1 + len(OBSERVATION) - 1
        assert target.stats.reused == len(ids) - 1

    run(two_turns())


def test_a_session_that_rewrites_its_past_is_computed_anew() -> None:
    async def rewrite() -> None:
        target = engine()
        await ask(target, prompt(0))
        rewritten = await ask(target, prompt(5), seed=3)
        assert rewritten.token_ids == (await ask(engine(), prompt(5), seed=3)).token_ids
        assert target.stats.reused == 0

    run(rewrite())


def test_a_group_shares_one_prefill() -> None:
    async def group() -> None:
        target = engine()
        completions = await asyncio.gather(*(ask(target, prompt(6), seed=i, session=str(i)) for i in range(8)))
        assert target.stats.prefilled == len(prompt(6)) - 1
        assert target.stats.shared == 7 * (len(prompt(6)) - 1)
        assert len({tuple(c.token_ids) for c in completions}) == 8
        assert completions[5].token_ids == (await ask(engine(), prompt(6), seed=5)).token_ids

    run(group())


def test_a_prompt_longer_than_a_prefill_is_computed_in_pieces() -> None:
    long = [7 + i % 50 for i in range(300)]
    completion = run(ask(engine(prefill=64), long))
    assert close([0.0] * 300 + completion.logprobs, full_forward(tiny_llama(VOCAB), long + completion.token_ids))


def test_the_least_recently_used_paused_session_is_evicted() -> None:
    async def three_sessions_in_two_slots() -> None:
        target = engine(slots=2)
        turns = {name: prompt(0) + (await ask(target, prompt(0), session=name)).token_ids for name in "ab"}
        await ask(target, prompt(1), session="c")  # takes the slot of a
        assert target.stats.evicted == 1
        await ask(target, turns["b"] + OBSERVATION, session="b")
        assert target.stats.reused == len(turns["b"]) - 1

    run(three_sessions_in_two_slots())


def test_release_frees_the_slot() -> None:
    async def one_after_another() -> None:
        target = engine(slots=1)
        for i in range(3):
            await ask(target, prompt(i), session=str(i))
            target.release(str(i))
        target.release("never seen")
        assert target.stats.evicted == 0

    run(one_after_another())


def test_cancelling_the_caller_frees_the_slot() -> None:
    async def cancel() -> None:
        target = engine(slots=1)
        first = asyncio.create_task(ask(target, prompt(0), max_tokens=400, session="a"))
        queued = asyncio.create_task(ask(target, prompt(1), session="b"))
        again = asyncio.create_task(ask(target, prompt(2), session="c"))
        await asyncio.sleep(0.02)
        first.cancel()
        queued.cancel()
        assert await again == await ask(engine(), prompt(2))
        assert await ask(target, prompt(0), session="a") == await ask(engine(), prompt(0))

    run(cancel())


# -- how a completion ends ------------------------------------------------------------------------------


def test_a_stop_string_that_ends_inside_a_token_keeps_the_whole_token() -> None:
    async def stop() -> None:
        target = engine()
        for piece in (">.", "></"):
            token = TOKENIZER.encode(piece)
            assert len(token) == 1
            seed, free = 0, await ask(target, prompt(0), max_tokens=100)
            while token[0] not in free.token_ids[1:]:  # a random model writes anything, sooner or later
                seed += 1
                free = await ask(target, prompt(0), max_tokens=100, seed=seed)
            end = free.token_ids.index(token[0], 1)
            tag = TOKENIZER.decode(free.token_ids[:end])[-3:] + ">"
            stopped = await ask(target, prompt(0), stop=(tag,), max_tokens=100, seed=seed)
            assert stopped.token_ids == free.token_ids[: end + 1]
            assert TOKENIZER.decode(stopped.token_ids).endswith(tag + piece[1:])
            assert stopped.finished

    run(stop())


def test_a_stop_string_may_end_in_a_character_of_several_tokens() -> None:
    alphabet = {character: i for i, character in enumerate([*sorted(ByteLevel.alphabet()), "<eos>"])}
    backend = Tokenizer(BPE(alphabet, []))
    backend.decoder = decoders.ByteLevel()
    single_bytes = HFTokenizer(hf=PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>"), chat=False)

    async def stop() -> None:
        target = HFEngine(model=tiny_llama(257), tokenizer=single_bytes, max_sequences=1, context=512, batch_tokens=64)
        free = await ask(target, [1, 2, 3], max_tokens=300)
        text = single_bytes.decode(free.token_ids)
        accented = next(c for c in text if c.isalpha() and not c.isascii())
        stopped = await ask(target, [1, 2, 3], stop=(accented,), max_tokens=300)
        assert stopped.finished
        assert single_bytes.decode(stopped.token_ids) == text[: text.index(accented) + 1]

    run(stop())


def test_a_stop_token_ends_a_completion_and_is_part_of_it() -> None:
    model = tiny_llama(VOCAB)
    with torch.no_grad():
        model.lm_head.weight.zero_()  # all tokens are alike, so the end comes soon
    (eos,) = TOKENIZER.stop_ids
    completion = run(ask(engine(model), prompt(0), max_tokens=480))
    assert completion.finished
    assert completion.token_ids.index(eos) == len(completion.token_ids) - 1
    assert completion.logprobs == pytest.approx([-np.log(VOCAB)] * len(completion.token_ids), abs=1e-5)


def test_max_tokens_and_the_context_leave_a_completion_unfinished() -> None:
    short = run(ask(engine(), prompt(0), max_tokens=3))
    assert (len(short.token_ids), short.finished) == (3, False)
    full = run(ask(engine(context=len(prompt(0)) + 4), prompt(0), max_tokens=100))
    assert (len(full.token_ids), full.finished) == (4, False)


# -- new weights ----------------------------------------------------------------------------------------


def test_new_weights_change_output_and_versions_and_outdate_the_cache() -> None:
    new = tiny_llama(VOCAB, seed=1)

    async def reload() -> None:
        target = engine()
        old = await ask(target, prompt(0))
        await target.load_weights(new.named_parameters(), version=7)
        assert target.version == 7
        ids = prompt(0) + old.token_ids + OBSERVATION
        completion = await ask(target, ids)
        assert target.stats.reused == 0
        assert (set(old.versions), set(completion.versions)) == ({0}, {7})
        ids, logprobs = ids + completion.token_ids, [0.0] * len(ids) + completion.logprobs
        assert close(logprobs, full_forward(new, ids))

    run(reload())


def test_a_trajectory_under_way_goes_on_with_the_new_weights() -> None:
    models = tiny_llama(VOCAB), tiny_llama(VOCAB, seed=1)

    async def reload_midway() -> Completion:
        target = engine(models[0])
        completion = asyncio.create_task(ask(target, prompt(0), max_tokens=200))
        while target.stats.sampled < 20 and not completion.done():
            await asyncio.sleep(0)
        await target.load_weights(models[1].named_parameters(), version=1)
        return await completion

    completion = run(reload_midway())
    assert set(completion.versions) == {0, 1}
    ids = prompt(0) + completion.token_ids
    for version, model in enumerate(models):
        expected = full_forward(model, ids)[len(prompt(0)) :]
        mine = [p if v == version else 0.0 for p, v in zip(completion.logprobs, completion.versions, strict=True)]
        assert close(mine, expected)


def test_either_name_of_a_tied_weight_will_do() -> None:
    tied = family("qwen3")

    async def reload() -> None:
        target = engine(family("qwen3"))
        parameters = dict(tied.named_parameters())
        await target.load_weights(parameters.items(), version=1)
        parameters["lm_head.weight"] = parameters.pop("model.embed_tokens.weight")
        await target.load_weights(parameters.items(), version=2)
        await target.load_weights(tied.state_dict().items(), version=3)

    run(reload())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model.norm.weight": None}, "1 parameters were not among the new weights: model.norm.weight"),
        ({"model.norm.wieght": torch.ones(32)}, "no parameter 'model.norm.wieght'. Did you mean 'model.norm.weight'?"),
        ({"model.norm.weight": torch.ones(1)}, "'model.norm.weight' has shape [1], and the engine's is [32]"),
    ],
    ids=["missing", "unknown", "shape"],
)
def test_wrong_weights_are_named_and_nothing_is_generated_until_they_are_whole(
    change: dict[str, torch.Tensor | None], message: str
) -> None:
    model = tiny_llama(VOCAB)
    wrong = {k: v for k, v in (dict(model.named_parameters()) | change).items() if v is not None}

    async def reload() -> None:
        target = engine()
        with pytest.raises(EngineError) as error:
            await target.load_weights(wrong.items(), version=1)
        assert message in str(error.value)
        with pytest.raises(EngineError, match="incomplete"):
            await ask(target, prompt(0))
        await target.load_weights(model.named_parameters(), version=1)
        await ask(target, prompt(0))

    run(reload())


# -- errors -----------------------------------------------------------------------------------------------


def test_a_prompt_that_fills_the_context_is_refused_with_both_numbers() -> None:
    with pytest.raises(EngineError, match=r"1 to 15 tokens .* got 16"):
        run(ask(engine(context=16), [5] * 16))


def test_a_failing_forward_reaches_everyone_who_waits() -> None:
    model = tiny_llama(VOCAB)
    broken = {name: weight * float("nan") for name, weight in model.named_parameters()}

    async def fail() -> None:
        target = engine(slots=2)
        await target.load_weights(broken.items(), version=1)
        asks = [ask(target, prompt(i), session=str(i)) for i in range(4)]
        results = await asyncio.gather(*asks, return_exceptions=True)
        assert all(isinstance(r, EngineError) and "not finite" in str(r) and r.__cause__ for r in results)
        await target.load_weights(model.named_parameters(), version=2)
        assert (await ask(target, prompt(0))).token_ids == (await ask(engine(), prompt(0))).token_ids

    run(fail())


def test_closing_the_engine_or_releasing_a_session_fails_its_callers() -> None:
    async def shut() -> None:
        target = engine()
        asks = [asyncio.create_task(ask(target, prompt(0), max_tokens=400, session=name)) for name in "ab"]
        await asyncio.sleep(0.01)
        target.release("a")
        with pytest.raises(EngineError, match="'a' was released"):
            await asks[0]
        with pytest.raises(EngineError, match="'b' is already generating"):
            await ask(target, prompt(0), session="b")
        await target.close()
        with pytest.raises(EngineError, match="closed"):
            await asks[1]
        with pytest.raises(EngineError, match="closed"):
            await ask(target, prompt(0))

    run(shut())


def test_a_model_that_cannot_remember_the_whole_context_is_refused() -> None:
    with pytest.raises(ConfigError, match="context is 1024, and the model's max_position_embeddings is 512"):
        engine(context=1024)
    mistral = MistralForCausalLM(
        MistralConfig(vocab_size=VOCAB, hidden_size=32, intermediate_size=64, num_hidden_layers=1, sliding_window=64)
    )
    with pytest.raises(ConfigError, match="sliding_window is 64"):
        engine(mistral)


# -- the draw ---------------------------------------------------------------------------------------------

seeds_and_positions = st.lists(st.tuples(st.integers(-(2**63), 2**64), st.integers(0, 10**6)), min_size=1)


@given(rows=seeds_and_positions, data=st.data())
def test_a_draw_depends_on_seed_and_position_alone(rows: list[tuple[int, int]], data: st.DataObject) -> None:
    shuffled = data.draw(st.permutations(rows))
    alone = {row: uniforms([row[0]], [row[1]])[0] for row in rows}
    together = uniforms(*map(list, zip(*shuffled, strict=True)))
    assert together.tolist() == [alone[row] for row in shuffled]
    assert (together >= 0).all()
    assert (together < 1).all()


def test_draws_are_uniform_over_positions_and_over_seeds() -> None:
    grid = np.array([uniforms([seed] * 200, range(200)) for seed in range(200)])
    assert np.abs(grid.mean(0) - 0.5).max() < 0.1  # five standard deviations of a mean of 200
    assert np.abs(grid.mean(1) - 0.5).max() < 0.1
    assert abs(np.corrcoef(grid[:, :-1].ravel(), grid[:, 1:].ravel())[0, 1]) < 0.03


@given(
    logits=st.lists(st.sampled_from([-float("inf"), -40.0, -1.0, 0.0, 3.0]), min_size=2, max_size=40),
    uniform=st.one_of(st.sampled_from([0.0, 1 - 2**-53]), st.floats(0, 1, exclude_max=True)),
)
def test_a_token_of_probability_0_is_never_drawn(logits: list[float], uniform: float) -> None:
    logits[len(logits) // 2] = 0.0
    ids, logprobs = sample(torch.tensor([logits]), torch.ones(1), torch.tensor([uniform], dtype=torch.float64))
    assert logits[ids[0]] > -float("inf")
    assert logprobs[0] == torch.tensor(logits).log_softmax(-1)[ids[0]]


def test_drawn_tokens_have_the_frequencies_of_the_distribution() -> None:
    draws = torch.from_numpy(uniforms(range(20_000), [3] * 20_000))
    logits = torch.tensor([0.1, 0.2, 0.0, 0.7]).log().expand(20_000, 4)
    ids, _ = sample(logits, torch.ones(20_000), draws)
    assert (torch.bincount(ids, minlength=4) / 20_000).tolist() == pytest.approx([0.1, 0.2, 0.0, 0.7], abs=0.015)
