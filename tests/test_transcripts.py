"""A transcript holds a trajectory as it was: every character has its token, and every sampled token its numbers."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import accumulate
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, trainers

from otcrl.protocols import Tokenizer
from otcrl.rollout.token_texts import token_texts
from otcrl.rollout.transcripts import Signal, Transcript, Transcripts, short, signals
from otcrl.types import Outcome, Reward, Scores, Stop, Targets, ToolCall, Trajectory, pack
from tests.make import problem, trajectory
from tests.tiny import tiny_tokenizer

TINY = tiny_tokenizer("</search>")


def played(tokenizer: Tokenizer = TINY) -> Trajectory:
    """prompt "Q:", sampled "<a></search>", injected " ok\n", sampled "b"."""
    parts = [("Q:", False), ("<a></search>", True), (" ok\n", False), ("b", True)]
    ids = [tokenizer.encode(text) for text, _ in parts]
    mask = [is_action for part, (_, is_action) in zip(ids, parts, strict=True) for _ in part]
    flat = [token for part in ids for token in part]
    return Trajectory(
        problem=problem(optimal_calls=1),
        token_ids=flat,
        action_mask=mask,
        logprobs=[-0.25 * is_action for is_action in mask],
        versions=[3 if is_action else -1 for is_action in mask],
        tool_calls=(ToolCall("search", "a", "ok", Outcome.OK, 0.5),),
        answer="b",
        violations=(),
        stop=Stop.ANSWERED,
        response="<a></search> ok\nb",
    )


def written(path: Path, *transcripts: Transcript) -> list[dict]:
    Transcripts(path=path / "t.jsonl", tokenizer=TINY).write(7, transcripts)
    return [json.loads(line) for line in (path / "t.jsonl").read_text().splitlines()]


def test_a_line_says_what_was_asked_what_was_done_and_what_it_earned(tmp_path):
    reward = Reward(0.5, {"correct": 1.0, "tool": 0.5})
    (row,) = written(tmp_path, Transcript(trajectory=played(), group=4, sample=2, reward=reward, correct=1.0))
    assert (row["step"], row["group"], row["sample"], row["id"], row["source"]) == (7, 4, 2, "nq/train/0", "nq")
    assert (row["reward"], row["parts"], row["correct"], row["optimal_calls"]) == (0.5, reward.parts, 1.0, 1)
    assert row["calls"][0]["seconds"] == 0.5
    assert row["response"] == played().response


def test_every_token_after_the_prompt_has_its_characters_and_its_side(tmp_path):
    (row,) = written(tmp_path, Transcript(trajectory=played(), group=0))
    tokens = row["tokens"]
    assert (tokens["prompt"], tokens["total"], tokens["sampled"]) == (2, 11, 5)
    assert tokens["spans"] == [4, 4, 1]
    assert sum(tokens["spans"]) == len(tokens["lengths"]) == tokens["total"] - tokens["prompt"]
    ends = list(accumulate(tokens["lengths"]))
    pieces = [row["response"][start:end] for start, end in zip([0, *ends], ends, strict=False)]
    assert "".join(pieces) == row["response"]
    sampled = pieces[: tokens["spans"][0]]
    assert "".join(sampled) == "<a></search>"
    assert sampled[-1] == "</search>"


def test_what_was_written_before_the_first_sampled_token_is_part_of_the_response(tmp_path):
    mask = [False] * 3 + [True] * 3 + played().action_mask[6:]
    opened = replace(played(), action_mask=mask, versions=[3 if m else -1 for m in mask])  # "<" was written for it
    (row,) = written(tmp_path, Transcript(trajectory=opened, group=0))
    assert row["tokens"]["prompt"] == 2
    assert row["tokens"]["spans"] == [0, 1, 3, 4, 1]
    assert sum(row["tokens"]["lengths"]) == len(row["response"])


def test_numbers_are_of_the_sampled_tokens_and_one_stands_for_all_when_they_are_equal(tmp_path):
    sampled = sum(played().action_mask)
    signal = Signal(advantages=[0.125] * sampled, ratios=[1.0 + i / 8 for i in range(sampled)])
    (row,) = written(tmp_path, Transcript(trajectory=played(), group=0, signal=signal))
    tokens = row["tokens"]
    assert (tokens["logprobs"], tokens["versions"], tokens["advantages"]) == (-0.25, 3, 0.125)
    assert tokens["ratios"] == signal.ratios
    (plain,) = written(tmp_path, Transcript(trajectory=played(), group=0))[1:]
    assert "advantages" not in plain["tokens"], "nothing is learned from it"


def test_what_is_not_a_finite_number_is_null():
    assert short([0.5, float("nan"), float("inf")]) == [0.5, None, None]
    assert short([0.00004, 0.00001]) == 0.0
    assert short([]) == []


def test_a_trajectory_that_was_lost_is_written_too(tmp_path):
    lost = replace(trajectory(stop=Stop.VOID), action_mask=[False, False], versions=[-1, -1])
    (row,) = written(tmp_path, Transcript(trajectory=lost, group=0))
    assert (row["stop"], row["reward"], row["correct"]) == ("void", None, None)
    assert (row["tokens"]["spans"], row["tokens"]["lengths"], row["tokens"]["logprobs"]) == ([], [], [])


def test_half_a_surrogate_pair_in_a_tools_result_does_not_stop_a_run(tmp_path):
    strange = replace(played(), tool_calls=(ToolCall("search", "a", "x\ud800y", Outcome.OK),))
    (row,) = written(tmp_path, Transcript(trajectory=strange, group=0))
    assert row["calls"][0]["result"] == "x\ud800y"


def test_the_signal_of_a_row_is_what_the_loss_sees_of_its_sampled_tokens():
    groups = [[(played(), Reward(1.0)), (trajectory(), Reward(0.0))]]
    batch = pack(groups, pad_id=0)
    advantages = torch.arange(22.0).reshape(2, 11)
    scores = Scores(batch.sampler_logprobs + 0.5, batch.sampler_logprobs, torch.zeros(2, 11))
    first, second = signals(batch, scores, Targets(advantages, advantages))
    at = [i for i, is_action in enumerate(played().action_mask) if is_action]
    assert first.advantages == [float(i) for i in at]
    assert first.ratios == pytest.approx([2.718281828**0.5] * len(at), rel=1e-6)
    assert second.advantages == [12.0]


# -- which characters came from which token --------------------------------------------------------


def byte_tokenizer() -> Backend:
    """One token for each byte, and some for more: a character may be spread over four of them, as in GPT-2's."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=290, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(["the cost of the € sign, 東京 and 😀 😁"] * 9, trainer)
    return backend


def sentence_tokenizer() -> Backend:
    """Words that carry the space before them, which decoding drops at the beginning of a text, as in Llama 2's."""
    words = ["<unk>", *(f"▁{word}" for word in ("the", "cost", "of")), "▁", *"thecosf.", "<0xE2>", "<0x82>", "<0xAC>"]
    backend = Backend(models.Unigram([(word, -float(i)) for i, word in enumerate(words)], unk_id=0, byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    return backend


def word_tokenizer() -> Backend:
    """Whole words, joined with spaces, as Atlas has it."""
    return Backend(models.WordLevel({"<unk>": 0, "the": 1, "cost": 2, "of": 3}, unk_token="<unk>"))


TOKENIZERS = {"bytes": byte_tokenizer(), "sentences": sentence_tokenizer(), "words": word_tokenizer()}


@pytest.mark.parametrize("kind", TOKENIZERS)
@given(data=st.data())
def test_the_pieces_of_any_tokens_are_the_text(kind: str, data: st.DataObject):
    tokenizer = TOKENIZERS[kind]
    ids = data.draw(st.lists(st.integers(0, tokenizer.get_vocab_size() - 1), max_size=40))
    text = tokenizer.decode(ids)
    pieces = token_texts(ids, text, tokenizer.decode, {})
    assert len(pieces) == len(ids)
    assert "".join(pieces) == text


@given(st.text(max_size=40))
def test_a_character_of_several_tokens_is_with_the_last_of_them(text: str):
    backend = TOKENIZERS["bytes"]
    ids = backend.encode(text).ids
    pieces = token_texts(ids, text, backend.decode, {})
    assert "".join(pieces) == text
    for end in range(len(ids)):
        whole = backend.decode(ids[: end + 1])
        if "\ufffd" not in whole:
            assert "".join(pieces[: end + 1]) == whole


@pytest.mark.parametrize(
    ("kind", "ids", "expected"),
    [
        ("sentences", [1, 2, 3], ["the", " cost", " of"]),
        ("sentences", [1, 13, 14, 15, 2], ["the", "", "", "\u20ac", " cost"]),
        ("words", [1, 2, 3], ["the", " cost", " of"]),
    ],
)
def test_a_space_that_decoding_drops_belongs_to_the_token_after_it(kind: str, ids: list[int], expected: list[str]):
    backend = TOKENIZERS[kind]
    assert token_texts(ids, backend.decode(ids), backend.decode, {}) == expected
