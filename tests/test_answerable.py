"""The benchmark's choice of questions that a corpus answers."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

from otcrl.tasks.records import read_rows
from otcrl.tools.retrieval.build import build_index
from otcrl.tools.retrieval.corpus import Passage
from otcrl.tools.retrieval.encode import HashingEncoder

ROWS = [
    {"id": "a", "question": "what is the capital of Norway", "answers": ["Oslo"]},
    {"id": "b", "question": "what is the capital of Italy", "answers": ["Milan"]},  # not what the passage says
    {"id": "c", "question": "what is the capital of Norway", "answers": ["Oslo"]},  # again: the later one is kept
    {"id": "d", "question": "who was born in the capital of Italy", "answers": ["Nero"]},  # beyond what is shown
]


def test_a_question_is_kept_if_the_shown_part_of_its_best_passage_holds_an_answer(tmp_path: Path, monkeypatch):
    italy = "The capital of Italy is Rome, in which was born the emperor Nero"
    passages = [Passage("no", "Norway", "The capital of Norway is Oslo"), Passage("it", "Italy", italy)]
    build_index(passages, HashingEncoder(dimension=256), tmp_path / "index")
    (tmp_path / "test.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in ROWS))
    out = tmp_path / "nq/test.jsonl.gz"
    words = [str(tmp_path / "test.jsonl"), "--index", str(tmp_path / "index"), "--words", "8", "--out", str(out)]
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    monkeypatch.setattr(sys, "argv", ["answerable.py", *words])
    importlib.import_module("answerable").main()
    (row,) = read_rows(str(out))
    assert row == ROWS[2] | {"id": row["id"], "gold_ids": ["no"]}
    assert str(row["id"]).endswith("-c"), "with the name of its file, as another may have the same"


def test_again_keeps_those_whose_title_finds_their_passage_alone(tmp_path: Path, monkeypatch):
    """What is searched for next shows the same passage: nothing new."""
    passages = [
        Passage("no", "Norway", "The capital of Norway is Oslo"),
        Passage("it", "Rome", "In the year 753 Italy began"),
        Passage("ro", "Rome", "Rome"),  # best for the title of the one before
    ]
    build_index(passages, HashingEncoder(dimension=256), tmp_path / "index")
    rows = [
        {"id": "a", "question": "The capital of Norway", "answers": ["Oslo"]},
        {"id": "b", "question": "in the year 753 Italy began", "answers": ["753"]},
    ]
    (tmp_path / "test.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    for again, kept in (([], ["a", "b"]), (["--again"], ["a"])):
        out = tmp_path / f"kept{len(again)}.jsonl.gz"
        words = [str(tmp_path / "test.jsonl"), "--index", str(tmp_path / "index"), "--out", str(out), *again]
        monkeypatch.setattr(sys, "argv", ["answerable.py", *words])
        importlib.import_module("answerable").main()
        assert [str(row["id"])[-1] for row in read_rows(str(out))] == kept
