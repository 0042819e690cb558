"""Corpora and indexes: what is read, what is found, what is refused."""

import gzip
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from otcrl.errors import ConfigError, DataError
from otcrl.tools.retrieval.build import build_index, build_or_open, memory_index
from otcrl.tools.retrieval.corpus import Corpus, Passage
from otcrl.tools.retrieval.encode import HashingEncoder, Vectors
from otcrl.tools.retrieval.index import open_index

CAPITALS = [
    Passage("1", "Paris", "Paris is the capital of France."),
    Passage("2", "Rome", "Rome is the capital of Italy, on the river Tiber."),
    Passage("3", "Tiber", "The Tiber rises at Mount Fumaiolo."),
]


# -- corpora ------------------------------------------------------------------------------------------


def write(path: Path, *lines: str) -> str:
    path.write_text("".join(f"{line}\n" for line in lines))
    return str(path)


def test_both_kinds_of_row_are_read(tmp_path: Path):
    ours = write(tmp_path / "a.jsonl", '{"id": "1", "title": "Rome", "text": "A city."}', "")
    search_r1 = write(tmp_path / "b.jsonl", json.dumps({"id": 7, "contents": '"Rome"\nA city.'}))
    assert list(Corpus([ours, search_r1])) == [Passage("1", "Rome", "A city."), Passage("7", "Rome", "A city.")]


@pytest.mark.parametrize(
    ("row", "title", "text"),
    [
        ({"title": "Rome", "contents": "A city in Italy."}, "Rome", "A city in Italy."),
        ({"contents": "A city in Italy, all in one line."}, "", "A city in Italy, all in one line."),
        ({"contents": '""Weird Al" Yankovic"\nA singer.'}, '"Weird Al" Yankovic', "A singer."),
        ({"contents": '"Weird Al" Yankovic\nA singer.'}, '"Weird Al" Yankovic', "A singer."),
    ],
)
def test_nothing_of_a_row_with_contents_is_lost(tmp_path: Path, row: dict, title: str, text: str):
    path = write(tmp_path / "a.jsonl", json.dumps({"id": 1} | row))
    assert list(Corpus([path])) == [Passage("1", title, text)]


@pytest.mark.parametrize(("path", "missing"), [("a.parquet", "pyarrow"), ("owner/name", "datasets")])
def test_what_reads_a_corpus_is_asked_for_where_it_is_missing(path: str, missing: str, monkeypatch):
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ConfigError, match=r"pip install 'otcrl\[data\]'"):
        list(Corpus([path]))


def test_gzip_is_read(tmp_path: Path):
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"id": "1", "title": "", "text": "A city."}\n'))
    assert list(Corpus([str(path)])) == [Passage("1", "", "A city.")]


GOOD = '{"id": "1", "title": "Rome", "text": "A city."}'


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("{nonsense", r"a\.jsonl, line 2: expected one JSON object per line, got b'\{nonsense"),
        ("[1]", r"line 2: expected a JSON object"),
        ('{"title": "Rome", "text": "A city."}', r"line 2: .*`id` is missing; the row has \['text', 'title'\]"),
        ('{"id": "1", "text": "A city."}', r"line 2: .*`title` is missing"),
        ('{"id": "1", "title": "Rome", "body": "A city."}', r"line 2: .*`text` is missing; the row has \['body'"),
    ],
    ids=["not JSON", "not an object", "no id", "no title", "no text"],
)
def test_a_bad_line_is_named(tmp_path: Path, line: str, complaint: str):
    with pytest.raises(DataError, match=complaint):
        list(Corpus([write(tmp_path / "a.jsonl", GOOD, line)]))


def test_a_corpus_without_passages_is_refused(tmp_path: Path):
    with pytest.raises(DataError, match="holds no passage"):
        list(Corpus([write(tmp_path / "a.jsonl", "")]))


def test_a_file_cut_short_is_refused(tmp_path: Path):
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress("\n".join([GOOD] * 1000).encode())[:60])
    with pytest.raises(DataError, match="not a whole gzip file"):
        list(Corpus([str(path)]))


# -- indexes ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("query", "title"),
    [("capital of France", "Paris"), ("What is the capital of Italy?", "Rome"), ("where does the Tiber rise", "Tiber")],
)
def test_the_passage_that_shares_the_words_is_first(query: str, title: str):
    [hits] = memory_index(CAPITALS, HashingEncoder()).search([query], topk=3)
    assert hits[0].passage.title == title
    assert [hit.score for hit in hits] == sorted((hit.score for hit in hits), reverse=True)


def test_topk_is_at_most_the_corpus():
    assert len(memory_index(CAPITALS, HashingEncoder()).search(["Rome"], topk=10)[0]) == 3


class Table:
    """An encoder whose texts are the numbers of rows in a table."""

    name = "table"

    def __init__(self, vectors: Vectors) -> None:
        self.vectors, self.dimension = vectors, vectors.shape[1]

    def encode(self, texts: list[str], is_query: bool) -> Vectors:
        return self.vectors[[int(text) for text in texts]]


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), rows=st.integers(1, 50), dimension=st.integers(2, 16), topk=st.integers(1, 10))
def test_search_is_the_sorted_inner_product(seed: int, rows: int, dimension: int, topk: int):
    vectors = np.random.default_rng(seed).standard_normal((rows, dimension)).astype(np.float32)
    index = memory_index([Passage(str(i), "", str(i)) for i in range(rows)], Table(vectors))  # type: ignore[arg-type]
    found = [[int(hit.passage.id) for hit in hits] for hits in index.search([str(i) for i in range(rows)], topk)]
    np.testing.assert_array_equal(found, np.argsort(-(vectors @ vectors.T), axis=1)[:, :topk])


def test_an_index_is_built_once_and_opened_after(tmp_path: Path):
    built = build_or_open(CAPITALS, HashingEncoder(), tmp_path / "index")
    written = (tmp_path / "index" / "index.faiss").stat().st_mtime_ns
    opened = build_or_open(CAPITALS, HashingEncoder(), tmp_path / "index")
    assert (tmp_path / "index" / "index.faiss").stat().st_mtime_ns == written
    assert opened.search(["capital of Italy"], 3) == built.search(["capital of Italy"], 3)
    assert [passage.name for passage in tmp_path.iterdir()] == ["index"]


def test_an_index_of_another_encoder_is_refused(tmp_path: Path):
    build_index(CAPITALS, HashingEncoder(), tmp_path / "index")
    with pytest.raises(DataError, match="built with encoder 'hashing-4096', but this run has 'hashing-64'"):
        open_index(tmp_path / "index", HashingEncoder(dimension=64))


def test_an_index_of_another_corpus_is_neither_used_nor_overwritten(tmp_path: Path):
    build_index(CAPITALS, HashingEncoder(), tmp_path / "index")
    with pytest.raises(DataError, match="corpus sha256"):
        build_or_open(CAPITALS[:2], HashingEncoder(), tmp_path / "index")
    with pytest.raises(DataError, match="there already"):
        build_index(CAPITALS[:2], HashingEncoder(), tmp_path / "index")
    assert len(open_index(tmp_path / "index", HashingEncoder()).passages) == 3


@pytest.mark.parametrize(
    ("file", "content", "complaint"),
    [
        ("index.faiss", b"nonsense", "damaged"),
        ("manifest.json", b"{}", "expected the fields format, kind, encoder"),
        ("manifest.json", None, "no index directory"),
        ("offsets.npy", None, "damaged"),
    ],
)
def test_a_damaged_index_is_refused(tmp_path: Path, file: str, content: bytes | None, complaint: str):
    build_index(CAPITALS, HashingEncoder(), tmp_path / "index")
    path = tmp_path / "index" / file
    path.unlink() if content is None else path.write_bytes(content)
    with pytest.raises(DataError, match=complaint):
        open_index(tmp_path / "index", HashingEncoder())


class Broken(HashingEncoder):
    """Fails as a model out of memory would."""

    def encode(self, texts: object, is_query: bool) -> Vectors:
        raise RuntimeError("out of memory")


def test_a_build_that_fails_leaves_no_index_and_the_next_one_succeeds(tmp_path: Path):
    with pytest.raises(RuntimeError, match="out of memory"):
        build_index(CAPITALS, Broken(), tmp_path / "index")
    assert not (tmp_path / "index").exists()
    assert build_index(CAPITALS, HashingEncoder(), tmp_path / "index").rows == 3
    assert [path.name for path in tmp_path.iterdir()] == ["index"]
