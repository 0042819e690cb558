"""Whole runs in each new dialect: cold start, rollouts, updates and evaluation on a tiny model with a chat template."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from otcrl import cli
from tests.published import ROWS
from tests.templates import APPENDS, FORGETS, HIDES, chat_tokenizer
from tests.test_bad_input import refusal
from tests.test_records import write
from tests.tiny import tiny_llama


def saved(folder: Path, template: str) -> Path:
    tokenizer = chat_tokenizer(template)
    tiny_llama(tokenizer.vocab_size, context=4096).save_pretrained(folder)
    tokenizer.hf.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("models") / "chat", APPENDS)


def settings(model: Path, folder: Path) -> list[str]:
    return [
        "conf=quickstart", "threads=1", "model=pretrained", f"model.path={model}", "model.chat=true", "sft.steps=1",
        "engine.context=4096", "engine.max_sequences=8", "sft.batch_size=2", "sft.max_tokens=4096",
        "loop.steps=1", "loop.problems_per_step=2", "rollout.group_size=2", "evaluate.sampled=false",
        "rollout.limits={max_calls: 2, max_turns: 3, max_tokens: 60, max_turn_tokens: 20, max_observation_tokens: 200}",
        f"run_dir={folder / 'run'}",
    ]  # fmt: skip


def searching(folder: Path) -> list[str]:
    """Questions with gold passages, and a search tool that has them."""
    corpus = write(folder / "corpus.jsonl", [{"id": "p", "title": "Polonium", "text": "Marie Curie found it."}])
    row = {"question": "Who found polonium?", "answers": ["Curie"], "gold_ids": ["p"]}
    train, test = (write(folder / f"{name}.jsonl", [row | {"id": i} for i in range(3)]) for name in ("train", "test"))
    return [
        "task=qa", f"task.train=[{train}]", f"task.test=[{test}]", f"task.corpus=[{corpus}]",
        f"tools.search.corpus=[{corpus}]", "~tools.python",
    ]  # fmt: skip


def transcripts(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "run" / "transcripts.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_hermes_trains_with_the_models_own_template(model: Path, tmp_path: Path):
    words = [*settings(model, tmp_path), *searching(tmp_path), "dialect=hermes", "loop.transcripts_every=1"]
    assert cli.main(["train", *words]) == 0
    assert len(transcripts(tmp_path)) == 4
    assert (tmp_path / "run" / "summary.json").is_file()


@pytest.mark.slow
def test_calls_are_imitated_without_any_tool(model: Path, tmp_path: Path):
    rows = [ROWS["toolrl"][0] | {"extra_info": {"index": i}} for i in range(4)]
    train, test = (write(tmp_path / f"{name}.jsonl", rows[at:]) for name, at in (("train", 0), ("other", 3)))
    rows[3]["data_source"] = "another"
    write(tmp_path / "other.jsonl", rows[3:])
    words = [
        *settings(model, tmp_path), "task=tool_calls", f"task.train=[{train}]", f"task.test=[{test}]", "tools=none",
        "dialect=toolrl", "reward=outcome", "loop.transcripts_every=1",
    ]  # fmt: skip
    assert cli.main(["train", *words]) == 0
    assert all(line["calls"] == [] for line in transcripts(tmp_path))


def test_a_dialect_that_does_not_fit_is_refused_before_anything_is_written(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    common = [*settings(model, tmp_path), *searching(tmp_path)]
    for words, why in (
        (
            ["dialect=hermes", f"model.path={saved(tmp_path / 'hides', HIDES)}"],
            "dialect: the chat template does not show",
        ),
        (["dialect=hermes", f"model.path={saved(tmp_path / 'forgets', FORGETS)}"], "drops the <think> part of a turn"),
        (["dialect=hermes", "model.chat=false"], "shows functions by its chat template only: set model.chat=true"),
        (["dialect=retool"], "dialect: dialect.tool: <code> runs 'python', which is no tool."),
        (["dialect=toolrl"], "the task is not about calls to imitate: use dialect.calls=run"),
        (["dialect=hermes", "dialect.answer=tags"], "dialect.answer must be 'tag' or 'boxed' or 'text', got 'tags'."),
        (["task.reader=gsm8k"], "Reader 'plain' would fit."),
    ):
        assert why in refusal(capsys, "train", *common, *words)
        assert not (tmp_path / "run").exists()
