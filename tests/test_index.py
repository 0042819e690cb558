"""Index directories: built in every kind, killed and resumed, checked, imported, measured."""

import fcntl
import hashlib
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import faiss
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import feather, parquet

from otcrl.cli import main
from otcrl.errors import ConfigError, DataError
from otcrl.indexing import encoder_of
from otcrl.presets import shipped
from otcrl.tools.retrieval import build, quality
from otcrl.tools.retrieval import index as index_module
from otcrl.tools.retrieval.build import Bm25, Recipe, adopt, build_index, build_or_open, derive
from otcrl.tools.retrieval.corpus import Corpus, Passage
from otcrl.tools.retrieval.dense import Dense, exact, overlap
from otcrl.tools.retrieval.encode import HashingEncoder, normalised, stable_hash
from otcrl.tools.retrieval.index import (
    check,
    fused,
    held_bytes,
    memory_bytes,
    memory_limit,
    memory_plan,
    open_index,
    read_manifest,
)
from otcrl.tools.retrieval.store import AT_A_TIME, PassageFile, write_passages

CITIES = ["Rome", "Paris", "Oslo", "Cairo", "Lima", "Quito", "Delhi", "Kyiv", "Accra", "Hanoi", "Tunis", "Minsk"]
TRADES = ["baker", "miner", "judge", "nurse", "pilot", "actor", "poet", "smith", "tailor", "sailor", "potter"]
PASSAGES = [
    Passage(f"p{i}", f"{TRADES[i % 11]} {i}", f"In {CITIES[i % 12]} the {TRADES[i // 12 % 11]} number {i} lives.")
    for i in range(700)
]
ENCODER = HashingEncoder(dimension=64)


class Scattered(HashingEncoder):
    """No two texts are equally near to a third."""

    def encode(self, texts, is_query):
        seeds = [stable_hash(text) % 2**32 for text in texts]
        noise = np.stack([np.random.default_rng(seed).standard_normal(self.dimension) for seed in seeds])
        return normalised(super().encode(texts, is_query) + 0.05 * noise)


HYBRID = Recipe(dense=Dense(), bm25=Bm25())
WORDS = Recipe(dense=None, bm25=Bm25())
KINDS = [
    Dense(),
    Dense(storage="float16"),
    Dense(storage="int8"),
    Dense(metric="l2"),
    Dense(kind="ivf"),
    Dense(kind="ivf", storage="int8", lists=5),
    Dense(kind="ivfpq", code_bytes=8, target_recall=0.5),
    Dense(kind="hnsw"),
    Dense(kind="hnsw", storage="float16", metric="l2"),
]


def name_of(dense: Dense) -> str:
    return f"{dense.kind}-{dense.storage}-{dense.metric}"


def digests(directory: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(directory.iterdir())}


def ids(index, query: str, topk: int = 3) -> list[str]:
    return [hit.passage.id for hit in index.search([query], topk)[0]]


# -- kinds --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dense", KINDS, ids=name_of)
def test_every_kind_finds_the_true_neighbours_as_often_as_it_was_asked_to(tmp_path: Path, dense: Dense):
    encoder = Scattered(dimension=64)
    index = build_index(PASSAGES, encoder, tmp_path / "index", Recipe(dense=dense))
    queries = [passage.text for passage in PASSAGES[::20]]
    vectors = encoder.encode([passage.contents for passage in PASSAGES], is_query=False)
    true = exact(vectors, encoder.encode(queries, is_query=True), dense.metric)
    found = np.array([[int(hit.passage.id[1:]) for hit in hits] for hits in index.search(queries, 10)])
    assert overlap(found, true) >= dense.target_recall - 0.05  # it was tuned with other queries
    reported = read_manifest(tmp_path / "index").parameters.get("recall_at_10", 1.0)
    assert reported >= dense.target_recall


@pytest.mark.parametrize("dense", KINDS, ids=name_of)
def test_the_same_corpus_gives_the_same_bytes(tmp_path: Path, dense: Dense):
    for name in "ab":
        build_index(PASSAGES, ENCODER, tmp_path / name, Recipe(dense=dense))
    assert digests(tmp_path / "a") == digests(tmp_path / "b")


@pytest.mark.parametrize("recipe", [*(Recipe(dense=dense) for dense in KINDS), WORDS, HYBRID], ids=str)
def test_an_opened_index_answers_as_the_built_one_did_mapped_or_not(tmp_path: Path, recipe: Recipe):
    built = build_index(PASSAGES, ENCODER, tmp_path / "index", recipe)
    queries = ["the baker of Rome", "number 77", "nurse"]
    for mmap in (False, True):
        opened = (
            open_index(tmp_path / "index", mmap=mmap)
            if recipe is WORDS
            else open_index(tmp_path / "index", ENCODER, mmap)
        )
        assert opened.search(queries, 5) == built.search(queries, 5)
        assert opened.identity == built.identity


@pytest.mark.parametrize(
    ("dense", "factory"),
    [
        (Dense(), "Flat"),
        (Dense(storage="int8"), "SQ8"),
        (Dense(kind="ivf"), "IVF4000,Flat"),
        (Dense(kind="ivf", lists=64, storage="float16"), "IVF64,SQfp16"),
        (Dense(kind="ivfpq"), "IVF4000,PQ96"),
        (Dense(kind="ivfpq", lists=10, code_bytes=100), "IVF10,PQ96"),
        (Dense(kind="hnsw"), "HNSW32"),
        (Dense(kind="hnsw", links=16, storage="int8"), "HNSW16_SQ8"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_not_chosen_follows_from_a_million_rows_of_768_numbers(dense: Dense, factory: str):
    assert dense.factory(1_000_000, 768) == factory


def test_twenty_one_million_passages_in_eight_bits_need_16_gb_of_memory():
    assert Dense().ram_bytes(21_015_324, 768) == pytest.approx(64.6e9, rel=0.01)
    assert Dense(storage="int8").ram_bytes(21_015_324, 768) == pytest.approx(16.1e9, rel=0.01)
    assert Dense(kind="ivfpq").ram_bytes(21_015_324, 768) == pytest.approx(2.2e9, rel=0.05)


def test_the_estimate_of_memory_is_the_size_of_the_index_without_its_passages(tmp_path: Path):
    index = build_index(PASSAGES, ENCODER, tmp_path / "index")
    assert index.manifest is not None
    assert memory_bytes(index.manifest)["index.faiss"] == pytest.approx(Dense().ram_bytes(700, 64), rel=0.01)
    assert sum(memory_bytes(index.manifest, mmap=True).values()) == 0
    assert memory_plan(index.manifest, mmap=True) == "700 passages on disk; in memory nothing but what is asked for"


def test_an_index_that_does_not_fit_into_memory_is_refused_before_it_is_loaded(tmp_path: Path):
    build_index(PASSAGES, ENCODER, tmp_path / "index")
    path, size = tmp_path / "index" / "manifest.json", 10**12
    manifest = json.loads(path.read_text())
    manifest["files"]["index.faiss"][0] = size
    path.write_text(json.dumps(manifest))
    os.truncate(tmp_path / "index" / "index.faiss", size)  # a sparse file
    with pytest.raises(DataError, match=r"needs 1000\.0 GB of memory beside .* it may have .*: open it with mmap=true"):
        open_index(tmp_path / "index")


@pytest.mark.parametrize(
    ("setting", "complaint"),
    [
        ({"kind": "hnws"}, r"kind must be one of flat, ivf, ivfpq, hnsw, got 'hnws'. Did you mean 'hnsw'\?"),
        ({"metric": "cosine"}, "metric must be one of ip, l2"),
        ({"lists": 0}, "lists must be 1 or more, got 0"),
        ({"links": 1}, "links must be 2 or more, got 1"),
        ({"target_recall": 1.5}, "target_recall must be above 0 and at most 1, got 1.5"),
        ({"kind": "ivfpq", "storage": "int8"}, "ivfpq keeps code_bytes"),
    ],
)
def test_a_bad_setting_is_named(setting: dict, complaint: str):
    with pytest.raises(ConfigError, match=complaint):
        Dense(**setting)


def test_too_few_passages_to_learn_codes_from_are_refused(tmp_path: Path):
    with pytest.raises(DataError, match="learns its codes from 256 passages or more, the corpus has 100: use flat"):
        build_index(PASSAGES[:100], ENCODER, tmp_path / "index", Recipe(dense=Dense(kind="ivfpq")))


def test_more_lists_than_passages_are_refused_before_anything_is_encoded(tmp_path: Path):
    class Never(HashingEncoder):
        def encode(self, texts, is_query):
            raise AssertionError

    with pytest.raises(DataError, match="lists=100 is more than the 5 passages of the corpus"):
        build_index(PASSAGES[:5], Never(dimension=64), tmp_path / "index", Recipe(dense=Dense(kind="ivf", lists=100)))


@pytest.mark.parametrize("kind", ["hnsw", "ivf"])
def test_of_fewer_than_ten_neighbours_no_more_are_found_than_there_are(tmp_path: Path, kind: str):
    index = build_index(PASSAGES[:5], ENCODER, tmp_path / "index", Recipe(dense=Dense(kind=kind)))
    assert index.manifest
    assert index.manifest.parameters["recall_at_10"] == 1.0


# -- words, and both ----------------------------------------------------------------------------------


def test_bm25_finds_the_passage_with_the_rare_word_and_needs_no_encoder(tmp_path: Path):
    index = build_index(PASSAGES, None, tmp_path / "index", WORDS)
    assert ids(index, "who is number 345?")[0] == "p345"
    assert ids(index, "zzz") == []  # rather than passages that share no word


def test_passages_of_stop_words_have_nothing_to_be_found_by(tmp_path: Path):
    with pytest.raises(DataError, match="no passage has a word of two letters or more that is no stop word"):
        build_index([Passage("1", "", "the and of a")], None, tmp_path / "index", WORDS)


def test_words_alone_need_no_faiss(tmp_path: Path):
    code = "import sys; import tests.test_index as t; sys.modules['faiss'] = None; "
    code += "t.build_index(t.PASSAGES, None, sys.argv[1], t.WORDS); print(t.open_index(sys.argv[1]).rows)"
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "index")], capture_output=True, text=True)
    assert done.stdout == "700\n", done.stderr


def test_vectors_need_an_encoder(tmp_path: Path):
    with pytest.raises(ConfigError, match="encoder is missing: kind=hybrid compares vectors"):
        build_index(PASSAGES, None, tmp_path / "index", HYBRID)


def test_hybrid_ranks_by_the_sum_of_inverse_ranks():
    scores, rows = fused([np.array([[7, 3, 5]]), np.array([[3, 9, -1]])], count=3)
    assert rows == [[3, 7, 9]]
    assert scores[0] == pytest.approx([1 / 62 + 1 / 61, 1 / 61, 1 / 62])


def test_hybrid_has_what_either_finds(tmp_path: Path):
    index = build_index(PASSAGES, ENCODER, tmp_path / "index", HYBRID)
    assert ids(index, "number 345")[0] == "p345"
    assert index.describe() == {"kind": "hybrid", "encoder": "hashing-64", "rows": 700}


# -- passages on disk ---------------------------------------------------------------------------------


@settings(max_examples=50, deadline=None)
@given(names=st.lists(st.text(max_size=20), min_size=1, max_size=30, unique=True))
def test_any_passage_is_found_by_its_id(tmp_path_factory: pytest.TempPathFactory, names: list[str]):
    directory = tmp_path_factory.mktemp("store")
    write_passages([Passage(name, "", f"text {i}") for i, name in enumerate(names)], directory)
    kept = PassageFile(directory)
    assert [kept.find(name) for name in names] == [kept[i] for i in range(len(names))]
    assert kept.find("none of them has this id") is None


def test_two_passages_with_one_id_are_refused(tmp_path: Path):
    with pytest.raises(DataError, match=r"the passages 2 and 701 of the corpus share the id 'p1'"):
        build_index([*PASSAGES, PASSAGES[1]], ENCODER, tmp_path / "index")


def table() -> pa.Table:
    return pa.table({"id": ["1", "2"], "contents": ['"Rome"\nA city.', '"Tiber"\nA river.']})


def write_stream(rows: pa.Table, path: Path) -> None:
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, rows.schema) as writer:
        writer.write_table(rows)


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("c.parquet", parquet.write_table),
        ("c.feather", feather.write_feather),
        ("c.arrow", feather.write_feather),
        ("stream.arrow", write_stream),
    ],
)
def test_tables_are_read_like_lines(tmp_path: Path, name: str, write):
    write(table(), tmp_path / name)
    assert list(Corpus([str(tmp_path / name)])) == [Passage("1", "Rome", "A city."), Passage("2", "Tiber", "A river.")]


def test_a_bad_row_of_a_table_is_named(tmp_path: Path):
    parquet.write_table(pa.table({"id": ["1", None], "title": ["a", "b"], "text": ["c", "d"]}), tmp_path / "c.parquet")
    with pytest.raises(DataError, match=r"c\.parquet, row 2: .*`id` is missing"):
        list(Corpus([str(tmp_path / "c.parquet")]))


def test_a_table_cut_short_is_refused(tmp_path: Path):
    parquet.write_table(table(), tmp_path / "c.parquet")
    (tmp_path / "c.parquet").write_bytes((tmp_path / "c.parquet").read_bytes()[:-30])
    with pytest.raises(DataError, match=r"c\.parquet is no whole parquet file"):
        list(Corpus([str(tmp_path / "c.parquet")]))


# -- builds that end early ----------------------------------------------------------------------------

MANY = 5 * AT_A_TIME + 100
SLOWLY = """
import sys, time
from pathlib import Path
from otcrl.tools.retrieval.build import build_index
from otcrl.tools.retrieval.corpus import Passage
from otcrl.tools.retrieval.encode import HashingEncoder, normalised, stable_hash
from otcrl.tools.retrieval.store import AT_A_TIME

class Slow(HashingEncoder):
    def encode(self, texts, is_query):
        if not is_query:
            print(texts[0], flush=True)
            time.sleep(0.1)
        return super().encode(texts, is_query)

build_index((Passage(str(i), "", f"number {i}") for i in range(int(sys.argv[2]))), Slow(dimension=16), sys.argv[1])
"""


def build_slowly(directory: Path, rows: int = MANY) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", SLOWLY, str(directory), str(rows)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_a_build_that_is_killed_goes_on_with_the_next_chunk_and_ends_in_the_same_bytes(tmp_path: Path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert build_slowly(whole).wait() == 0
    encoded = []
    for chunks_seen in (1, 3, 2):
        process = build_slowly(killed)
        assert process.stdout is not None
        encoded.append([process.stdout.readline().strip() for _ in range(chunks_seen)])
        time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert not killed.exists()
    last = build_slowly(killed)
    encoded.append(last.communicate()[0].split("\n"))
    first = [int(chunk[0].removeprefix("number ")) for chunk in encoded]
    assert first == [0, 0, 2 * AT_A_TIME, 3 * AT_A_TIME]  # each begins where the one before it had got to
    assert digests(killed) == digests(whole)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["killed", "whole"]


def test_vectors_cut_in_the_middle_of_a_chunk_are_encoded_again(tmp_path: Path):
    passages = [Passage(str(i), "", f"number {i}") for i in range(2 * AT_A_TIME)]
    build_index(passages, ENCODER, tmp_path / "whole")
    process = build_slowly(tmp_path / "index", 2 * AT_A_TIME)
    process.wait()
    work = tmp_path / ".again.building"
    work.mkdir()
    vectors = HashingEncoder(dimension=64).encode([passage.contents for passage in passages], is_query=False)
    corpus = read_manifest(tmp_path / "whole").corpus_sha256
    (work / "encoding.json").write_text(json.dumps({"encoder": ENCODER.name, "corpus_sha256": corpus}))
    (work / "vectors.bin").write_bytes(vectors.tobytes()[: AT_A_TIME * 256 + 999])
    build_index(passages, ENCODER, tmp_path / "again")
    assert digests(tmp_path / "again") == digests(tmp_path / "whole")


class Broken(HashingEncoder):
    """Fails at its second chunk, as a model out of memory would."""

    def encode(self, texts, is_query):
        if texts[0].endswith(f"number {AT_A_TIME}"):
            raise RuntimeError("out of memory")
        return super().encode(texts, is_query)


def test_vectors_of_another_encoder_or_corpus_are_neither_used_nor_thrown_away(tmp_path: Path):
    passages = [Passage(str(i), "", f"number {i}") for i in range(AT_A_TIME + 1)]
    with pytest.raises(RuntimeError, match="out of memory"):
        build_index(passages, Broken(dimension=64), tmp_path / "index")
    kept = tmp_path / ".index.building" / "vectors.bin"
    assert kept.stat().st_size == AT_A_TIME * 64 * 4
    with pytest.raises(
        DataError, match="holds an unfinished build with encoder 'hashing-64', but this one has 'hashing-8'"
    ):
        build_index(passages, HashingEncoder(dimension=8), tmp_path / "index")
    with pytest.raises(DataError, match="holds an unfinished build with corpus_sha256"):
        build_index(passages[1:], ENCODER, tmp_path / "index")
    with pytest.raises(DataError, match="holds the vectors of an unfinished build: finish it with the same settings"):
        build_index(passages, None, tmp_path / "index", WORDS)
    with pytest.raises(DataError, match="holds the vectors of an unfinished build"):
        adopt(*foreign_corpus(tmp_path), ENCODER, tmp_path / "index")
    assert kept.stat().st_size == AT_A_TIME * 64 * 4
    assert build_index(passages, ENCODER, tmp_path / "index").rows == AT_A_TIME + 1
    assert not kept.exists()


KILLED = """
import os, signal, sys

def die(event, arguments):
    if event == sys.argv[3] and str(arguments[0]).endswith(sys.argv[4]):
        os.kill(os.getpid(), signal.SIGKILL)

sys.addaudithook(die)
"""


@pytest.mark.parametrize(
    ("event", "path"),
    [("os.rename", "/.index.building"), ("os.remove", "/index/vectors.bin"), ("os.remove", "/index/encoding.json")],
)
def test_a_build_killed_at_its_very_end_has_lost_nothing(tmp_path: Path, event: str, path: str):
    place = tmp_path / "index"
    command = [sys.executable, "-c", KILLED + SLOWLY, str(place), "10", event, path]
    assert subprocess.run(command, capture_output=True, check=False).returncode == -signal.SIGKILL
    if not place.exists():
        assert build_slowly(place, 10).communicate()[0] == "", "passages are not encoded again"
    assert check(place) == []
    assert main(["index", "info", str(place)]) == 0
    assert open_index(place, HashingEncoder(dimension=16)).rows == 10


def test_what_an_earlier_attempt_left_is_no_part_of_the_next_one_but_for_the_encoding(tmp_path: Path):
    build_index(PASSAGES, ENCODER, tmp_path / "flat")
    for finish in (
        lambda: build_index(PASSAGES, ENCODER, tmp_path / "next"),
        lambda: derive(tmp_path / "flat", tmp_path / "next", Recipe()),
    ):
        build_index(PASSAGES, ENCODER, tmp_path / "attempt", HYBRID)
        (tmp_path / "attempt").rename(tmp_path / ".next.building")  # as if killed before it was renamed
        finish()
        assert digests(tmp_path / "next") == digests(tmp_path / "flat")
        shutil.rmtree(tmp_path / "next")


def test_a_full_disk_is_named_and_what_is_encoded_is_kept(tmp_path: Path):
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))\n"
    code = limit + SLOWLY.replace("dimension=16", "dimension=32")
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "index"), str(2 * AT_A_TIME)], capture_output=True, text=True
    )
    assert "DataError: index" in done.stderr
    assert "File too large" in done.stderr
    assert f"What is encoded is kept in {tmp_path / '.index.building'}" in done.stderr


def test_two_processes_do_not_build_the_same_index(tmp_path: Path):
    work = tmp_path / ".index.building"
    work.mkdir()
    held = os.open(work, os.O_RDONLY)
    fcntl.flock(held, fcntl.LOCK_EX)
    with pytest.raises(DataError, match="another process is building it"):
        build_index(PASSAGES, ENCODER, tmp_path / "index")
    os.close(held)
    assert build_index(PASSAGES, ENCODER, tmp_path / "index").rows == 700


@pytest.mark.parametrize("fails", [False, True])
def test_runs_wait_for_the_index_that_another_builds_and_one_builds_it_if_that_one_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, fails: bool
):
    begun, go, waiting = threading.Event(), threading.Event(), threading.Semaphore(0)
    place, wait_for_builder = tmp_path / "index", build.wait_for_builder

    class Held(HashingEncoder):
        def encode(self, texts, is_query):
            begun.set()
            assert go.wait(60)
            if fails:
                raise RuntimeError("out of memory")
            return super().encode(texts, is_query)

    def counted(directory: Path) -> None:
        waiting.release()
        wait_for_builder(directory)

    monkeypatch.setattr(build, "wait_for_builder", counted)
    with ThreadPoolExecutor(3) as threads:
        builder = threads.submit(build_index, PASSAGES, Held(dimension=64), place)
        assert begun.wait(60)
        opened = [threads.submit(build_or_open, PASSAGES, ENCODER, place) for _ in range(2)]
        are_waiting = all(waiting.acquire(timeout=60) for _ in opened)
        go.set()
        assert are_waiting
        assert [index.result().rows for index in opened] == [700, 700]
    assert (builder.exception() is not None) == fails
    told = f"otcrl: index {place}: another process is building it, which this one waits for"
    assert capsys.readouterr().err.count(told) == 2  # once each
    assert [path.name for path in tmp_path.iterdir()] == ["index"]


def test_an_index_that_is_finished_just_when_a_run_begins_is_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    there, real = tmp_path / "index", build.unfinished

    def late(directory: Path, *, encodes: bool):
        monkeypatch.setattr(build, "unfinished", real)
        build_index(PASSAGES, ENCODER, directory)
        return real(directory, encodes=encodes)

    monkeypatch.setattr(build, "unfinished", late)
    assert build_or_open(PASSAGES, ENCODER, there).rows == 700


@pytest.mark.parametrize(("owner", "name"), [(Path, "mkdir"), (fcntl, "flock")], ids=["folder", "lock"])
def test_an_index_that_is_finished_before_the_lock_is_taken_is_not_built_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, owner: object, name: str
):
    there, real = tmp_path / "index", getattr(owner, name)

    def late(*args: object, **settings: object) -> object:
        monkeypatch.undo()
        build_index(PASSAGES, ENCODER, there)
        return real(*args, **settings)

    monkeypatch.setattr(owner, name, late)
    with pytest.raises(DataError, match="is there already"):
        build_index(PASSAGES, ENCODER, there)
    assert [path.name for path in tmp_path.iterdir()] == ["index"]


def test_a_vector_that_is_not_finite_is_named(tmp_path: Path):
    class Overflowing(HashingEncoder):
        def encode(self, texts, is_query):
            vectors = super().encode(texts, is_query)
            vectors[5] = math.inf
            return vectors

    with pytest.raises(DataError, match="no vector of 64 finite numbers of passage 6"):
        build_index(PASSAGES, Overflowing(dimension=64), tmp_path / "index")


# -- from another index -------------------------------------------------------------------------------


def test_another_kind_is_built_from_a_flat_index_without_encoding(tmp_path: Path):
    class Once(HashingEncoder):
        def encode(self, texts, is_query):
            assert is_query or len(texts) < 10, "passages are not encoded again"
            return super().encode(texts, is_query)

    build_index(PASSAGES, ENCODER, tmp_path / "flat")
    derived = derive(tmp_path / "flat", tmp_path / "hnsw", Recipe(dense=Dense(kind="hnsw")))
    build_index(PASSAGES, ENCODER, tmp_path / "direct", Recipe(dense=Dense(kind="hnsw")))
    assert derived.rows == 700
    assert digests(tmp_path / "hnsw") == digests(tmp_path / "direct")
    with pytest.raises(DataError, match="is hnsw: exact vectors are only in kind=flat"):
        derive(tmp_path / "hnsw", tmp_path / "no", Recipe())


def test_another_kind_compares_as_the_flat_index_did(tmp_path: Path, capsys: pytest.CaptureFixture):
    build_index(PASSAGES, ENCODER, tmp_path / "flat", Recipe(dense=Dense(metric="l2")))
    words = ["index", "build", f"base={tmp_path / 'flat'}", f"out={tmp_path / 'hnsw'}", "kind=hnsw"]
    assert main(words) == 0
    assert read_manifest(tmp_path / "hnsw").metric == "l2"


def foreign_corpus(tmp_path: Path) -> tuple[Path, Corpus]:
    vectors, corpus = foreign(tmp_path)
    return vectors, Corpus([str(corpus)])


def foreign(tmp_path: Path, dimension: int = 64, rows: int = 700) -> tuple[Path, Path]:
    """What Search-R1 ships: a faiss file, and the corpus in its own form."""
    corpus, vectors = tmp_path / "wiki-18.jsonl", tmp_path / "e5_Flat.index"
    lines = [{"id": passage.id, "contents": f'"{passage.title}"\n{passage.text}'} for passage in PASSAGES]
    corpus.write_text("".join(json.dumps(line) + "\n" for line in lines))
    index = faiss.IndexFlatIP(dimension)
    encoder = HashingEncoder(dimension=dimension)
    index.add(encoder.encode([passage.contents for passage in PASSAGES[:rows]], is_query=False))
    faiss.write_index(index, str(vectors))
    return vectors, corpus


def test_an_index_of_search_r1_is_imported_and_answers(tmp_path: Path):
    vectors, corpus = foreign(tmp_path)
    index = adopt(vectors, Corpus([str(corpus)]), ENCODER, tmp_path / "index")
    assert ids(index, PASSAGES[33].contents)[0] == "p33"
    assert check(tmp_path / "index") == []


@pytest.mark.parametrize(
    ("made", "encoder", "complaint"),
    [
        ({}, HashingEncoder(dimension=32), "has vectors of 64 numbers, hashing-32 makes 32"),
        ({"rows": 699}, ENCODER, "has 699 vectors, the corpus 700 passages"),
    ],
)
def test_what_does_not_fit_together_is_not_imported(
    tmp_path: Path, made: dict, encoder: HashingEncoder, complaint: str
):
    vectors, corpus = foreign(tmp_path, **made)
    with pytest.raises(DataError, match=complaint):
        adopt(vectors, Corpus([str(corpus)]), encoder, tmp_path / "index")


def test_vectors_of_another_encoder_are_not_imported(tmp_path: Path):
    class Reversed(HashingEncoder):
        def encode(self, texts, is_query):
            return super().encode(texts, is_query)[:, ::-1].copy()

    vectors, corpus = foreign(tmp_path)
    with pytest.raises(DataError, match="was made by another encoder, or of another corpus: the vector of passage"):
        adopt(vectors, Corpus([str(corpus)]), Reversed(dimension=64), tmp_path / "index")


def test_vectors_with_numbers_of_their_own_are_not_imported(tmp_path: Path):
    vectors, corpus = foreign(tmp_path)
    found = faiss.read_index(str(vectors))
    numbered = faiss.IndexIDMap2(faiss.IndexFlatIP(found.d))
    numbered.add_with_ids(found.reconstruct_n(0, found.ntotal), np.arange(found.ntotal)[::-1].copy())
    faiss.write_index(numbered, str(vectors))
    with pytest.raises(DataError, match="numbers of its own for its vectors: expected them in the order of the corpus"):
        adopt(vectors, Corpus([str(corpus)]), ENCODER, tmp_path / "index")


def test_an_encoder_by_its_hub_name_is_its_preset():
    """With its prefixes and its pooling: without them hours of encoding give a worse index."""
    named = encoder_of({"encoder": "intfloat/e5-base-v2"})
    assert str(named) == str(encoder_of({"encoder": "e5-base-v2"}))
    assert "query: " in str(named)


def test_a_file_that_is_no_index_is_not_imported(tmp_path: Path):
    (tmp_path / "x.index").write_bytes(b"nonsense")
    with pytest.raises(DataError, match=r"x\.index is no faiss index"):
        adopt(tmp_path / "x.index", PASSAGES, ENCODER, tmp_path / "index")


# -- check --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", [Recipe(), Recipe(dense=Dense(kind="ivfpq")), WORDS], ids=lambda r: r.kind)
def test_a_whole_index_passes_the_check(tmp_path: Path, recipe: Recipe):
    build_index(PASSAGES, ENCODER, tmp_path / "index", recipe)
    assert check(tmp_path / "index") == []


@pytest.mark.parametrize("name", ["passages.jsonl", "index.faiss", "offsets.npy", "ids.npy"])
def test_one_changed_byte_anywhere_is_found(tmp_path: Path, name: str):
    build_index(PASSAGES, ENCODER, tmp_path / "index")
    path = tmp_path / "index" / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    assert check(tmp_path / "index") == [f"{name} has changed since it was built"]


def test_a_file_of_another_size_is_refused_when_the_index_is_opened(tmp_path: Path):
    build_index(PASSAGES, ENCODER, tmp_path / "index")
    with open(tmp_path / "index" / "index.faiss", "ab") as file:
        file.write(b"x")
    with pytest.raises(DataError, match=r"index\.faiss has \d+ bytes, manifest\.json says"):
        open_index(tmp_path / "index")


def test_an_index_that_is_replaced_while_it_is_opened_is_not_taken_for_the_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    live, following, read = tmp_path / "live", tmp_path / "next", faiss.read_index
    build_index(PASSAGES, ENCODER, live)
    build_index(PASSAGES[:-2] + PASSAGES[:-3:-1], ENCODER, following)  # as many bytes and rows, in another order

    def slowly(*arguments):
        if following.exists():
            live.rename(tmp_path / "old")
            following.rename(live)
        return read(*arguments)

    new = open_index(following, ENCODER).identity
    monkeypatch.setattr(faiss, "read_index", slowly)
    with pytest.raises(DataError, match=r"live was replaced while it was opened: open it again"):
        open_index(live, ENCODER)
    assert open_index(live, ENCODER).identity == new


def test_an_index_says_which_encoder_it_needs(tmp_path: Path):
    build_index(PASSAGES, ENCODER, tmp_path / "index")
    assert open_index(tmp_path / "index").encoder == ENCODER
    with pytest.raises(DataError, match="built with encoder 'hashing-64', but this run has 'hashing-32'"):
        open_index(tmp_path / "index", HashingEncoder(dimension=32))


# -- quality ------------------------------------------------------------------------------------------


def test_the_measures_are_those_of_the_textbook():
    found, gold = ["a", "b", "c", "d"], {"b", "d", "x"}
    assert quality.recall_at(2, found, gold) == pytest.approx(1 / 3)
    assert quality.recall_at(4, found, gold) == pytest.approx(2 / 3)
    assert quality.reciprocal_rank(found, gold) == 0.5
    best = 1 + 1 / math.log2(3) + 1 / 2
    assert quality.ndcg_at(4, found, gold) == pytest.approx((1 / math.log2(3) + 1 / math.log2(5)) / best)
    assert quality.ndcg_at(2, ["b", "d"], {"b", "d", "x"}) == pytest.approx(1.0)
    assert (quality.reciprocal_rank(found, {"x"}), quality.ndcg_at(4, found, {"x"})) == (0, 0)


@given(st.permutations(list("abcdef")), st.sets(st.sampled_from("abcdef"), min_size=1), st.integers(1, 6))
def test_a_perfect_ranking_has_full_marks_and_no_ranking_more(found: list[str], gold: set[str], k: int):
    best = sorted(found, key=lambda id: id not in gold)
    assert quality.ndcg_at(k, best, gold) == pytest.approx(1.0)
    assert quality.ndcg_at(k, found, gold) <= 1 + 1e-9
    assert quality.reciprocal_rank(best, gold) == 1


def test_a_gold_passage_that_is_not_there_is_named(tmp_path: Path):
    index = build_index(PASSAGES, ENCODER, tmp_path / "index")
    with pytest.raises(DataError, match="the gold passage 'p9999' of 'who' is not in the index"):
        quality.measure(index, [quality.Question("who", frozenset(["p9999"]))])


SHIPPED = shipped("tiny_qa")


@pytest.mark.parametrize(
    ("recipe", "least"),
    [(Recipe(), 0.5), (Recipe(dense=Dense(kind="hnsw")), 0.5), (WORDS, 0.5), (HYBRID, 0.55)],
    ids=lambda value: value.kind if isinstance(value, Recipe) else "",
)
def test_real_questions_find_their_gold_passages_in_the_corpus_that_is_shipped(
    tmp_path: Path, recipe: Recipe, least: float
):
    corpus, questions = Corpus([str(SHIPPED / "corpus.jsonl")]), quality.read_questions(str(SHIPPED / "test.jsonl"))
    index = build_index(corpus, HashingEncoder(), tmp_path / "index", recipe)
    found = quality.measure(index, questions, ks=(1, 3))
    assert found["recall@3"] >= least, found
    assert found["recall@1"] <= found["recall@3"]


# -- the command --------------------------------------------------------------------------------------


def write_corpus(path: Path) -> Path:
    path.write_text("".join(json.dumps({"id": p.id, "title": p.title, "text": p.text}) + "\n" for p in PASSAGES))
    return path


def write_questions(path: Path) -> Path:
    rows = [{"question": passage.text, "gold_ids": [passage.id]} for passage in PASSAGES[:50]]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_an_index_is_built_looked_into_checked_and_measured(tmp_path: Path, capsys: pytest.CaptureFixture):
    corpus, questions = write_corpus(tmp_path / "c.jsonl"), write_questions(tmp_path / "q.jsonl")
    flat, words = tmp_path / "flat", tmp_path / "words"
    assert main(["index", "build", f"corpus={corpus}", f"out={flat}", "encoder=hashing", "encoder.dimension=128"]) == 0
    assert main(["index", "build", f"corpus={corpus}", f"out={words}", "kind=bm25", "k1=1.2"]) == 0
    assert main(["index", "build", f"base={flat}", f"out={tmp_path / 'hnsw'}", "kind=hnsw", "links=8"]) == 0
    assert "true 10 nearest found" in capsys.readouterr().out
    assert main(["index", "info", str(flat)]) == 0
    assert "hashing-128" in capsys.readouterr().out
    assert main(["index", "check", str(flat)]) == 0
    assert main(["index", "eval", f"index={flat},{words}", f"questions={questions}", "k=[1,5]"]) == 0
    printed = capsys.readouterr().out
    assert "recall@5" in printed
    assert "1.000" in printed


def test_shards_together_are_the_corpus(tmp_path: Path):
    corpus = write_corpus(tmp_path / "c.jsonl")
    for number in range(3):
        words = [f"corpus={corpus}", f"out={tmp_path / str(number)}", "encoder=hashing", f"shard={number}/3"]
        assert main(["index", "build", *words]) == 0
    opened = [open_index(tmp_path / str(number)) for number in range(3)]
    assert sorted(p.id for index in opened for p in map(index.passages.__getitem__, range(index.rows))) == sorted(
        passage.id for passage in PASSAGES
    )


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["bild"], "otcrl index has no command 'bild'. Did you mean 'build'?"),
        (["build", "out=x"], "otcrl index build needs corpus=..."),
        (["build", "corpus=nowhere.jsonl", "out=x"], "corpus: there is no file nowhere.jsonl"),
        (
            ["build", "corpus=CORPUS", "out=x", "kind=hsnw"],
            "kind must be one of flat, ivf, ivfpq, hnsw, bm25, hybrid, got 'hsnw'. Did you mean 'hnsw'?",
        ),
        (
            ["build", "corpus=CORPUS", "out=x", "encoder=minilmm"],
            "encoder=minilmm is neither a preset nor a model's path or hub name. Did you mean 'minilm'?",
        ),
        (
            ["build", "corpus=CORPUS", "out=x", "encoder=hashing", "link=8"],
            "index build.link is not a setting of Dense. Did you mean 'links'?",
        ),
        (["build", "corpus=CORPUS", "out=x", "kind=bm25", "links=8"], "otcrl index build has no setting 'links'."),
        (["build", "corpus=CORPUS", "out=x", "encoder=hashing", "shard=4/4"], "shard must be NUMBER/COUNT"),
        (["build", "corpus=CORPUS", "out=x", "encoder=hashing", "threads=abc"], "threads must be a number, 1 or more"),
        (
            ["build", "corpus=CORPUS", "out=x", "encoder=hashing", "encoder.dimension=0"],
            "encoder: dimension must be 1 or more, got 0",
        ),
        (["info", "nowhere"], "index: nowhere is no index directory"),
        (
            ["eval", "index=nowhere", "questions=QUESTIONS", "k=[0]"],
            "k must be a list of ranks such as [1,3,10], got [0]",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_on_the_command_line_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture, words: list[str], complaint: str
):
    files = {"CORPUS": write_corpus(tmp_path / "c.jsonl"), "QUESTIONS": write_questions(tmp_path / "q.jsonl")}
    for name, path in files.items():
        words = [word.replace(name, str(path)) for word in words]
    assert main(["index", *words]) in (1, 2)
    assert complaint in capsys.readouterr().err


def test_a_container_may_have_less_than_its_machine_and_an_index_that_is_loaded_anew_counts_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    build_index(PASSAGES, ENCODER, tmp_path / "index")
    needed, held = sum(memory_bytes(read_manifest(tmp_path / "index")).values()), 10**6
    monkeypatch.setattr(index_module, "held_bytes", lambda: held)
    for name, text in {"unlimited": "max", "enough": held + needed, "little": held + needed - 1}.items():
        (tmp_path / name).write_text(f"{text}\n")
    for names in (("unlimited", "none"), ("enough",)):
        monkeypatch.setattr(index_module, "LIMITS", [str(tmp_path / name) for name in names])
        open_index(tmp_path / "index")
    monkeypatch.setattr(index_module, "LIMITS", [str(tmp_path / "little")])
    assert memory_limit() == held + needed - 1
    with pytest.raises(DataError, match=r"beside the .* that this process has, and it may have "):
        open_index(tmp_path / "index")


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux says it")
def test_what_a_process_holds_grows_by_what_it_takes():
    before, taken = held_bytes(), np.ones(10**7, dtype=np.float64)
    assert held_bytes() > before + taken.nbytes // 2
