"""Reading data sets: what is accepted, and what every wrong file says."""

from __future__ import annotations

import gzip
import json
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from otcrl.errors import ConfigError, DataError
from otcrl.presets import shipped
from otcrl.tasks.records import check_unique, given_name, read_problems, read_rows, shuffled_epochs, source_and_split

TINY = shipped("tiny_qa")
ROWS = [{"id": "a", "question": "1 + 1?", "answers": ["2", "two"]}, {"id": "b", "question": "2 + 2?", "answers": ["4"]}]
SEARCH_R1_PROMPT = "Answer the given question. For example, <answer> Beijing </answer>. Question: who wrote hamlet?\n"
SEARCH_R1_ROW = {
    "data_source": "nq",
    "prompt": [{"role": "user", "content": SEARCH_R1_PROMPT}],
    "ability": "fact-reasoning",
    "reward_model": {"style": "rule", "ground_truth": {"target": ["Shakespeare", "William Shakespeare"]}},
    "extra_info": {"split": "test", "index": 7},
}


def write(path: Path, rows: Sequence[object]) -> Path:
    """The rows as a file of the kind that the name asks for."""
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    if path.name.endswith(".gz"):
        path.write_bytes(gzip.compress(lines.encode()))
    elif path.suffix == ".jsonl":
        path.write_text(lines)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    else:
        pa = pytest.importorskip("pyarrow")
        pytest.importorskip("pyarrow.parquet").write_table(pa.Table.from_pylist(rows), path)
    return path


@pytest.mark.parametrize("name", ["qa.jsonl", "qa.jsonl.gz", "qa.json", "qa.parquet"])
def test_every_format_gives_the_same_rows(tmp_path: Path, name: str) -> None:
    assert list(read_rows(str(write(tmp_path / name, ROWS)), ("id", "question"))) == ROWS


def test_rows_become_problems_with_ids_unique_over_sources(tmp_path: Path) -> None:
    (tmp_path / "sums").mkdir()
    first, second = read_problems(str(write(tmp_path / "sums" / "train.jsonl", ROWS)))
    assert (first.id, first.question, first.answers, first.source) == ("sums/train/a", "1 + 1?", ("2", "two"), "sums")
    assert second.id == "sums/train/b"


def test_a_row_without_an_id_is_known_by_its_place_and_one_answer_may_be_a_number(tmp_path: Path) -> None:
    (problem,) = read_problems(str(write(tmp_path / "test.jsonl", [{"question": "6 * 7?", "answer": 42}])))
    assert problem.id == f"{tmp_path.name}/test/0"
    assert problem.answers == ("42",)


@pytest.mark.parametrize("name", ["train.parquet", "train.jsonl"])
def test_search_r1s_own_rows_are_read(tmp_path: Path, name: str) -> None:
    other = {**SEARCH_R1_ROW, "data_source": "hotpotqa"}  # index restarts for each source: the ids must not collide
    nq, hotpotqa = read_problems(str(write(tmp_path / name, [SEARCH_R1_ROW, other])))
    assert (nq.id, nq.source, nq.question) == ("nq/test/7", "nq", "who wrote hamlet?")
    assert nq.answers == ("Shakespeare", "William Shakespeare")
    assert hotpotqa.id == "hotpotqa/test/7"


def test_a_question_that_says_question_itself_is_cut_only_at_the_instruction(tmp_path: Path) -> None:
    question = "Who said 'Question: is it?' on air?"
    prompt = [{"role": "user", "content": SEARCH_R1_PROMPT.replace("who wrote hamlet?", question)}]
    for row in ({**SEARCH_R1_ROW, "prompt": prompt}, {**SEARCH_R1_ROW, "question": question}):
        (problem,) = read_problems(str(write(tmp_path / "train.jsonl", [row])))
        assert problem.question == question  # the column goes before the prompt


def test_other_columns_are_kept_for_the_task(tmp_path: Path) -> None:
    row = {**ROWS[0], "gold_ids": ["p1"], "optimal_calls": 2}
    (problem,) = read_problems(str(write(tmp_path / "train.jsonl", [row])))
    assert problem.meta == {"gold_ids": ["p1"]}
    assert problem.optimal_calls == 2


def test_a_limit_takes_a_seeded_subset_in_order(tmp_path: Path) -> None:
    path = str(write(tmp_path / "train.jsonl", [{**ROWS[0], "id": i} for i in range(50)]))
    everything = [p.id for p in read_problems(path)]
    chosen = [p.id for p in read_problems(path, limit=10, seed=1)]
    assert chosen == [p.id for p in read_problems(path, limit=10, seed=1)]
    assert chosen == [i for i in everything if i in set(chosen)]
    assert len(set(chosen)) == 10
    assert chosen != [p.id for p in read_problems(path, limit=10, seed=2)]
    assert everything == [p.id for p in read_problems(path, limit=1000)]
    with pytest.raises(ConfigError, match="at least 1, got 0"):
        read_problems(path, limit=0)


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("data/nq/train.jsonl.gz", ("nq", "train")),
        ("owner/nq_hotpotqa:test", ("nq_hotpotqa", "test")),
        ("owner/nq_hotpotqa", ("nq_hotpotqa", "train")),
    ],
)
def test_the_source_and_split_are_read_off_the_name(source: str, expected: tuple[str, str]) -> None:
    assert source_and_split(source) == expected


def test_a_name_given_to_a_file_is_the_source_of_all_its_rows(tmp_path: Path) -> None:
    path = str(write(tmp_path / "test.jsonl", [ROWS[0], {**ROWS[0], "id": "other", "data_source": "its own"}]))
    assert {p.source for p in read_problems(path)} == {tmp_path.name, "its own"}
    named = read_problems(f"nq.open={path}")
    assert {(p.source, p.id.rpartition("/")[0]) for p in named} == {("nq.open", "nq.open/test")}
    odd = str(write(tmp_path / "a=b.jsonl", [ROWS[0]]))
    assert [p.source for p in read_problems(odd)] == [tmp_path.name]  # a file may be called so
    assert given_name("a=b.jsonl") == ("a", "b.jsonl")
    assert given_name("owner/set:test") == (None, "owner/set:test")
    with pytest.raises(DataError, match="'nq=' must be NAME=FILE"):
        given_name("nq=")


# -- what wrong data says ------------------------------------------------------------------------


def test_a_missing_file_names_the_nearest_one_beside_it(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl.gz", ROWS)
    with pytest.raises(DataError, match=r"no file .*trian\.jsonl\.gz\. Did you mean 'train\.jsonl\.gz'\?"):
        list(read_rows(str(tmp_path / "trian.jsonl.gz")))


def test_a_missing_directory_names_the_last_one_that_exists(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=rf"no directory .*; {tmp_path} exists"):
        list(read_rows(str(tmp_path / "nq" / "deep" / "train.jsonl")))


def test_a_bad_json_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    path.write_text('{"id": 1}\n\n{"id": 2,}\n')
    with pytest.raises(DataError, match=r"train\.jsonl, line 3: expected one JSON object per line"):
        list(read_rows(str(path)))


@pytest.mark.parametrize(("row", "what"), [(5, "int"), (["a"], "list"), (None, "NoneType")])
def test_a_row_that_is_no_object_is_named(tmp_path: Path, row: object, what: str) -> None:
    with pytest.raises(DataError, match=rf"row 2: expected an object with named columns, got {what}"):
        list(read_rows(str(write(tmp_path / "train.jsonl", [ROWS[0], row]))))


def test_a_missing_column_names_the_nearest_and_all_there_are(tmp_path: Path) -> None:
    path = str(write(tmp_path / "train.jsonl", [{"qestion": "?", "answers": ["x"]}]))
    with pytest.raises(
        DataError, match=r"row 1: there is no column 'question'\. Did you mean 'qestion'\?.*answers, qe"
    ):
        list(read_rows(path, ("question",)))
    with pytest.raises(DataError, match="no column 'question'"):
        read_problems(path)


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.json"])
def test_an_empty_data_set_is_an_error(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError, match="holds no rows"):
        list(read_rows(str(write(tmp_path / name, []))))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"answers": []}, "at least one text"),
        ({"answers": [None]}, "at least one text"),
        ({"answers": list("['a']")}, "not one that was split into characters, got \"\\['a'\\]\""),
        ({"answers": None}, "answers must be one text or a list of at least one text, got None"),
        ({"question": 3}, "question must be a text"),
        ({"question": " "}, "question must be a text"),
        ({"optimal_calls": "1"}, "optimal_calls must be a whole number"),
    ],
)
def test_a_column_of_the_wrong_type_is_named_with_its_row(tmp_path: Path, change: dict, message: str) -> None:
    with pytest.raises(DataError, match=f"row 2.*{message}"):
        read_problems(str(write(tmp_path / "train.jsonl", [ROWS[0], {**ROWS[1], **change}])))


def test_a_prompt_without_messages_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="prompt must be a list of messages"):
        read_problems(str(write(tmp_path / "train.jsonl", [{**SEARCH_R1_ROW, "prompt": "who?"}])))


def test_two_rows_with_one_id_are_an_error(tmp_path: Path) -> None:
    path = str(write(tmp_path / "train.jsonl", [ROWS[0], ROWS[1], ROWS[0]]))
    with pytest.raises(DataError) as caught:
        read_problems(path)
    id = f"{tmp_path.name}/train/a"
    assert str(caught.value) == (
        f"{path}: two problems have the id {id!r}, {path}, row 1 and {path}, row 3; "
        "ids must be unique over all sources."
    )


def test_a_damaged_gzip_file_is_an_error(tmp_path: Path) -> None:
    whole = write(tmp_path / "train.jsonl.gz", ROWS * 100).read_bytes()
    for damaged in (whole[: len(whole) // 2], b"no gzip at all"):
        (tmp_path / "train.jsonl.gz").write_bytes(damaged)
        with pytest.raises(DataError, match="not a whole gzip file"):
            list(read_rows(str(tmp_path / "train.jsonl.gz")))


def test_a_parquet_file_that_is_none_is_an_error(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    (tmp_path / "train.parquet").write_text("no parquet")
    with pytest.raises(DataError, match="not readable as parquet"):
        list(read_rows(str(tmp_path / "train.parquet")))


def test_a_file_of_another_kind_says_what_can_be_read(tmp_path: Path) -> None:
    (tmp_path / "train.csv").write_text("id,question\n")
    with pytest.raises(DataError, match=r"must end in one of \.jsonl, .*got '\.csv'"):
        list(read_rows(str(tmp_path / "train.csv")))


def test_a_data_set_is_read_through_the_hub_client(tmp_path: Path) -> None:
    """A folder stands in for the hub: the client reads both, and this needs no network."""
    pytest.importorskip("datasets")
    for split in ("train", "test"):
        write(tmp_path / f"{split}.jsonl", ROWS)
    assert [row["id"] for row in read_rows(str(tmp_path))] == ["a", "b"]


def test_a_data_set_that_cannot_be_had_says_so(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="could not be downloaded"):
        list(read_rows(str(tmp_path / "empty")))


# -- epochs --------------------------------------------------------------------------------------


@given(length=st.integers(1, 20), count=st.integers(1, 45), step=st.integers(0, 5))
def test_epochs_are_whole_and_any_stretch_can_be_had_alone(length: int, count: int, step: int) -> None:
    walk = shuffled_epochs(length, 0, (step + 1) * count + length, "seed")
    for start in range(0, len(walk) - length, length):
        assert sorted(walk[start : start + length]) == list(range(length))
    assert shuffled_epochs(length, step * count, count, "seed") == walk[step * count : (step + 1) * count]


def test_every_epoch_has_its_own_order() -> None:
    walk = shuffled_epochs(20, 0, 40, "seed")
    assert walk[:20] != walk[20:]
    assert walk != shuffled_epochs(20, 0, 40, "another seed")


# -- real data -----------------------------------------------------------------------------------


def test_the_shipped_data_are_whole() -> None:
    passages = {str(row["id"]) for row in read_rows(str(TINY / "corpus.jsonl"), ("id", "title", "text"))}
    problems = [*read_problems(str(TINY / "train.jsonl")), *read_problems(str(TINY / "test.jsonl"))]
    check_unique(problems, "tiny_qa")
    assert (len(problems), len(passages)) == (30, 40)
    for problem in problems:
        gold = problem.meta["gold_ids"]
        assert isinstance(gold, list)
        assert passages.issuperset(gold)


@pytest.mark.parametrize(
    ("name", "rows"),
    [
        ("hotpotqa/train", 700),
        ("hotpotqa/test", 861),
        ("musique/train", 100),
        ("2wikimultihopqa/train", 500),
        ("nq_open/test", 2888),
        ("bamboogle/test", 100),
        ("gsm8k/train", 7473),
        ("math500/test", 400),
        ("svamp/test", 800),
        ("asdiv/test", 1771),
        ("deepmath/train", 4994),
        ("strategyqa/test", 183),
    ],
)
def test_published_data_sets_are_read_whole(shared: Path, name: str, rows: int) -> None:
    problems = read_problems(str(shared / "data" / f"{name}.jsonl.gz"))
    assert len(problems) == rows
    assert {p.source for p in problems} == {name.split("/")[0]}


@pytest.mark.parametrize(("name", "good", "bad"), [("nq_open/train", 8603, 153), ("tool_star_10k/train_math", 4998, 1)])
def test_broken_rows_of_published_data_stop_the_run_unless_they_may_be_skipped(
    shared: Path, caplog: pytest.LogCaptureFixture, name: str, good: int, bad: int
) -> None:
    """Some answers of nq_open/train are a text split into characters: the answer "e" would score 1."""
    path = str(shared / "data" / f"{name}.jsonl.gz")
    with pytest.raises(DataError, match="skip_bad_rows=true"):
        read_problems(path)
    assert len(read_problems(path, skip_bad_rows=True)) == good
    assert f"{bad} of {good + bad} rows left out" in caplog.text
