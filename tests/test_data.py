"""`otcrl data`: published files become files that every task reads as the same problems."""

from __future__ import annotations

import gzip
import json
import shutil
from collections import Counter
from pathlib import Path

import pytest

from otcrl import cli
from otcrl.construct import construct
from otcrl.data import downloaded, drawn, split_of, write
from otcrl.tasks.catalogue import CATALOGUE, Published
from otcrl.tasks.question_answering import QuestionAnswering
from otcrl.tasks.readers import READERS
from otcrl.tasks.records import read_problems
from otcrl.tasks.tool_calls import ToolCalls
from tests.published import GOLD, ROWS
from tests.test_bad_input import refusal
from tests.test_records import write as write_rows

READ_BY = {name: known.reader for name, known in CATALOGUE.items()}


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in gzip.decompress(path.read_bytes()).splitlines()]


def test_every_data_set_is_read_by_a_reader_and_can_be_had_somewhere():
    for name, known in CATALOGUE.items():
        assert known.reader in READERS, name
        assert bool(known.hub) == bool(known.splits), name
        assert bool(known.hub) != bool(known.home), name
        assert set(known.splits.values()) <= {"train", "test"}


@pytest.mark.parametrize("name", CATALOGUE)
def test_what_is_written_is_read_as_the_same_problems(name: str, tmp_path: Path):
    (tmp_path / name).mkdir()
    source = write_rows(tmp_path / name / "a_test.jsonl", [ROWS[READ_BY[name]][0]])
    assert cli.main(["data", name, f"from={source}", f"out={tmp_path / 'out'}"]) == 0
    written = tmp_path / "out" / name / "test.jsonl.gz"
    split = "train" if "prompt" in ROWS[READ_BY[name]][0] else "test"  # the row names its own
    expected = read_problems(str(shutil.copy(source, tmp_path / name / f"{split}.jsonl")))
    for one, other in zip(read_problems(str(written)), expected, strict=True):
        assert one.id.replace("/test/", "/train/") == other.id.replace("/test/", "/train/")
        assert (one.question, one.answers, one.source) == (other.question, other.answers, other.source)
        assert {k: v for k, v in one.meta.items() if k != "gold_ids"} == other.meta


def test_files_of_a_folder_are_splits_by_their_names(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    published, out = tmp_path / "published", tmp_path / "out"
    published.mkdir()
    for name in ("musique_ans_v1.0_dev.jsonl", "musique_ans_v1.0_train.jsonl"):
        write_rows(published / name, [ROWS["musique"][0] | {"id": name}])
    assert cli.main(["data", "musique", f"from={published}", f"out={out}"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"otcrl: wrote {out}/musique/test.jsonl.gz: 1 questions",
        f"otcrl: wrote {out}/musique/train.jsonl.gz: 1 questions",
        f"otcrl: wrote {out}/musique/corpus.jsonl.gz: 2 passages",
    ]


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("hotpot_dev_distractor_v1.json", "test"), ("wikipedia-train.json", "train"), ("validation.parquet", "test"),
        ("BFCL_v4_live_simple.json", "BFCL_v4_live_simple"), ("training_notes.json", "training_notes"),
        ("devices.json", "devices"), ("musique_ans_v1.0_dev.jsonl", "test"), ("test.jsonl.gz", "test"),
    ],
)  # fmt: skip
def test_a_split_is_what_the_file_is_called(name: str, split: str):
    assert split_of(name) == split


def test_paragraphs_become_a_corpus_that_demonstrations_can_search(tmp_path: Path):
    row = ROWS["hotpotqa"][0]
    source = write_rows(tmp_path / "train.json", [row, row | {"_id": "h2", "question": "Who else?"}])
    assert cli.main(["data", "hotpotqa", f"from={source}", f"out={tmp_path}"]) == 0
    folder = tmp_path / "hotpotqa"
    corpus = rows(folder / "corpus.jsonl.gz")
    assert [passage["title"] for passage in corpus] == ["Tin", "Polonium"]  # once each
    assert [row["gold_ids"] for row in rows(folder / "train.jsonl.gz")] == [[corpus[1]["id"]]] * 2
    task = QuestionAnswering(train=[str(folder / "train.jsonl.gz")], corpus=[str(folder / "corpus.jsonl.gz")])
    assert task.passages[corpus[1]["id"]].text == GOLD


def test_gold_paragraphs_that_a_question_comes_without_are_named_and_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    """HotpotQA's fullwiki files: the paragraphs are those that a search engine has found."""
    whole = ROWS["hotpotqa"][0]
    (title, *_), *_ = whole["supporting_facts"]
    lacking = [
        whole | {"_id": "half", "supporting_facts": [["Radium", 0], [title, 0], ["Radium", 1]]},
        whole | {"_id": "none", "supporting_facts": [["Radium", 0]]},
    ]
    source = write_rows(tmp_path / "hotpot_train_fullwiki.json", [whole, *lacking])
    assert cli.main(["data", "hotpotqa", f"from={source}", f"out={tmp_path}"]) == 0
    assert [each.getMessage() for each in caplog.records] == [
        f"{source}: 2 of 3 questions come without all of their gold paragraphs, whose titles are their `gold_missing`; "
        f"searching is not demonstrated on them. The first: {source}, row 2: ['Radium']"
    ]
    folder = tmp_path / "hotpotqa"
    written = rows(folder / "train.jsonl.gz")
    assert [row.get("gold_missing") for row in written] == [None, ["Radium"], ["Radium"]]
    assert [len(row.get("gold_ids", [])) for row in written] == [1, 1, 0]
    task = QuestionAnswering(train=[str(folder / "train.jsonl.gz")], corpus=[str(folder / "corpus.jsonl.gz")])
    assert len(task.sample(0, 3)) == 3
    assert [problem.id for problem in task._demonstrable] == ["hotpotqa/train/h1"]


def test_splits_that_are_written_one_after_the_other_share_a_corpus(tmp_path: Path):
    """HotpotQA, 2WikiMultihopQA and MuSiQue come as a file for each split: each is a call of its own."""
    context = [["Ann", ["Ann is a person."]], ["Bob", ["Bob is a person."]]]
    for split, title, order in (("train", "Ann", 1), ("test", "Bob", -1)):
        row = ROWS["hotpotqa"][0] | {"supporting_facts": [[title, 0]], "context": context[::order]}
        source = write_rows(tmp_path / f"{split}.json", [row])
        assert cli.main(["data", "hotpotqa", f"from={source}", f"out={tmp_path}"]) == 0
    folder = tmp_path / "hotpotqa"
    titles = {passage["id"]: passage["title"] for passage in rows(folder / "corpus.jsonl.gz")}
    assert sorted(titles.values()) == ["Ann", "Bob"]
    for split, title in (("train", "Ann"), ("test", "Bob")):
        (found,) = rows(folder / f"{split}.jsonl.gz")
        assert [titles[key] for key in found["gold_ids"]] == [title]


def test_of_a_folder_a_file_of_bad_rows_alone_is_left_out_if_such_are_skipped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
):
    """BFCL's folder has files of another kind beside those with single turns."""
    published, out = tmp_path / "published", tmp_path / "out"
    published.mkdir()
    write_rows(published / "BFCL_v4_simple.jsonl", [ROWS["bfcl"][0]])
    write_rows(published / "BFCL_v4_memory.jsonl", [{"id": "memory_0", "question": [[{"role": "user"}]]}])
    (published / "BFCL_v4_format_sensitivity.json").write_text('{"simple": ["simple_0"]}')
    assert "expected a JSON list of objects" in refusal(capsys, "data", "bfcl", f"from={published}", f"out={out}")
    assert cli.main(["data", "bfcl", f"from={published}", f"out={out}", "skip_bad_rows=true"]) == 0
    assert [path.name for path in (out / "bfcl").iterdir()] == ["BFCL_v4_simple.jsonl.gz"]
    assert "left out: " in caplog.text
    (published / "BFCL_v4_simple.jsonl").unlink()
    assert "format_sensitivity" in refusal(
        capsys, "data", "bfcl", f"from={published}", f"out={out}", "skip_bad_rows=true"
    )


def test_what_is_known_of_a_question_survives_and_what_json_cannot_hold_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    row = {"id": 1, "question": "Who?", "answer": "Ann", "optimal_calls": 2}
    source = write_rows(tmp_path / "test.jsonl", [row])
    assert cli.main(["data", "nq", f"from={source}", f"out={tmp_path}"]) == 0
    assert read_problems(str(tmp_path / "nq" / "test.jsonl.gz"))[0].optimal_calls == 2
    write_rows(tmp_path / "test.jsonl", [row | {"question": "Who? \ud800"}])
    assert "row 1: cannot be written as JSON: " in refusal(capsys, "data", "nq", f"from={source}", f"out={tmp_path}")
    write_rows(tmp_path / "test.jsonl", [row, row])
    assert "two problems have the id 'nq/test/1'" in refusal(capsys, "data", "nq", f"from={source}", f"out={tmp_path}")
    assert len(rows(tmp_path / "nq" / "test.jsonl.gz")) == 1, "what was there stays"


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    source = write_rows(tmp_path / "test.jsonl", [{"question": "Who?", "answer": "Ann"}])
    assert f"out: the folder {source}/nq cannot be made: " in refusal(
        capsys, "data", "nq", f"from={source}", f"out={source}"
    )


def test_another_reader_can_be_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    source = write_rows(tmp_path / "test.jsonl", [{"question": "Who?", "answer": "Ann"}])
    assert "Reader 'plain' would fit" in refusal(capsys, "data", "gsm8k", f"from={source}", f"out={tmp_path}")
    assert cli.main(["data", "gsm8k", f"from={source}", f"out={tmp_path}", "reader=plain"]) == 0


def test_a_hub_data_set_is_read_with_its_variant_and_its_splits_get_our_names(tmp_path: Path):
    """A folder with a card stands in for the hub: the client reads both, and this needs no network."""
    pytest.importorskip("datasets")
    hub = tmp_path / "hub"
    hub.mkdir()
    write_rows(hub / "one.jsonl", [ROWS["gsm8k"][0]])
    write_rows(hub / "two.jsonl", [{"question": "of the other variant", "answer": "#### 1"}])
    files = "  data_files:\n  - split: validation\n    path: {}\n"
    (hub / "README.md").write_text(
        f"---\nconfigs:\n- config_name: main\n{files.format('one.jsonl')}"
        f"- config_name: b\n{files.format('two.jsonl')}---\n"
    )
    known = Published("gsm8k", str(hub), "main", {"validation": "test"})
    written = write("made", known.reader, downloaded("made", known), tmp_path / "made")
    assert written == {tmp_path / "made" / "test.jsonl.gz": 1}
    assert rows(tmp_path / "made" / "test.jsonl.gz")[0]["question"] == ROWS["gsm8k"][1]


def test_sources_of_one_file_keep_their_names_so_that_ids_do_not_collide(tmp_path: Path):
    nq = ROWS["search_r1"][0] | {"data_source": "nq"}
    others = [nq | {"data_source": name} for name in ("hotpotqa", "openai/gsm8k")]
    source = write_rows(tmp_path / "train.jsonl", [nq, *others])
    assert cli.main(["data", "search_r1", f"from={source}", f"out={tmp_path}"]) == 0
    problems = read_problems(str(tmp_path / "search_r1" / "train.jsonl.gz"))
    names = ("nq", "hotpotqa", "openai/gsm8k")
    assert [(p.id, p.source) for p in problems] == [(f"{name}/train/3", name) for name in names]


def test_the_same_rows_are_the_same_bytes_and_max_takes_the_first(tmp_path: Path):
    source = write_rows(tmp_path / "test.jsonl", [ROWS["popqa"][0] | {"id": i} for i in range(5)])
    for out in ("a", "b"):
        assert cli.main(["data", "popqa", f"from={source}", f"out={tmp_path / out}", "max=3"]) == 0
    one, other = (tmp_path / out / "popqa" / "test.jsonl.gz" for out in ("a", "b"))
    assert one.read_bytes() == other.read_bytes()
    assert [row["id"] for row in rows(one)] == ["0", "1", "2"]


def test_a_seed_draws_max_rows_from_all_of_a_split_and_their_passages_alone(tmp_path: Path):
    """Some published files are sorted by kind: their first rows are no sample of them."""
    published = tmp_path / "published"
    published.mkdir()
    for split in ("train", "dev"):
        context = [[[f"{split} {i}", [f"{i} is a number."]]] for i in range(40)]
        found = [{"_id": f"{i}", "context": context[i], "supporting_facts": [[f"{split} {i}", 0]]} for i in range(40)]
        write_rows(published / f"hotpot_{split}.json", [ROWS["hotpotqa"][0] | row for row in found])
    for out, seed in (("a", 0), ("b", 0), ("c", 1)):
        words = ["data", "hotpotqa", f"from={published}", f"out={tmp_path / out}", "max=10", f"seed={seed}"]
        assert cli.main(words) == 0
    one, again, other = (tmp_path / out / "hotpotqa" for out in "abc")
    for name in ("train.jsonl.gz", "test.jsonl.gz", "corpus.jsonl.gz"):
        assert (one / name).read_bytes() == (again / name).read_bytes()
        assert (one / name).read_bytes() != (other / name).read_bytes()
    places = {split: [int(row["id"]) for row in rows(one / f"{split}.jsonl.gz")] for split in ("train", "test")}
    assert places["train"] != places["test"]
    for own in places.values():
        assert len(own) == 10
        assert own == sorted(set(own))
        assert own[-1] >= 20
    titles = [row["title"] for row in rows(one / "corpus.jsonl.gz")]
    assert sorted(titles) == sorted([f"train {i}" for i in places["train"]] + [f"dev {i}" for i in places["test"]])


def test_every_row_is_drawn_as_often_as_any_other():
    times = Counter(item for seed in range(2000) for item in drawn(range(10), 3, str(seed)))
    assert times.keys() == set(range(10))
    assert all(600 - 5 * 21 < number < 600 + 5 * 21 for number in times.values())  # five standard deviations
    assert drawn(range(3), 5, "") == [0, 1, 2]


def test_a_sample_of_the_sets_with_passages_is_what_the_search_preset_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    names = ("hotpotqa", "2wikimultihopqa", "musique")
    for name in names:
        (tmp_path / name).mkdir()
        for split in ("train", "dev"):
            write_rows(tmp_path / name / f"{name}_{split}.jsonl", [ROWS[READ_BY[name]][0]])
        words = [f"from={tmp_path / name}", f"out={tmp_path / 'sample'}", "max=500", "seed=0"]
        assert cli.main(["data", name, *words]) == 0
    monkeypatch.setenv("OTCRL_DATA", str(tmp_path / "sample"))
    config = cli.run_config(["conf=smollm2_search"])
    task = construct(config["task"], "task", tools={})
    assert {problem.source for problem in [*task.sample(0, 3), *task.held_out()]} == set(names)
    assert [Path(corpus).is_file() for corpus in config["tools"]["search"]["corpus"]] == [True] * 3


def test_to_skip_bad_rows_is_not_to_leave_out_a_file_that_is_damaged(tmp_path: Path, capsys):
    write_rows(tmp_path / "test.jsonl", ROWS["gsm8k"][:1])
    whole = gzip.compress("".join(json.dumps(row) + "\n" for row in ROWS["gsm8k"][:1] * 50).encode())
    (tmp_path / "train.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    why = refusal(capsys, "data", "gsm8k", f"from={tmp_path}", f"out={tmp_path / 'out'}", "skip_bad_rows=true")
    assert "train.jsonl.gz is not a whole gzip file" in why


def test_a_file_that_is_not_there_leaves_no_folder_behind(tmp_path: Path, capsys):
    why = refusal(capsys, "data", "gsm8k", f"from={tmp_path / 'away/test.jsonl'}", f"out={tmp_path / 'out'}")
    assert f"There is no directory {tmp_path / 'away'} either; {tmp_path} exists (otcrl data NAME out=DIR" in why
    assert not (tmp_path / "out/gsm8k").exists()


def test_bad_rows_are_told_also_where_the_first_good_ones_are_enough(tmp_path: Path, caplog):
    bad = {"question": "Who?", "answer": "nobody"}
    source = write_rows(tmp_path / "test.jsonl", [ROWS["gsm8k"][0], bad, ROWS["gsm8k"][0], bad])
    words = ["data", "gsm8k", f"from={source}", f"out={tmp_path}", "skip_bad_rows=true", "max=2"]
    with caplog.at_level("WARNING"):
        assert cli.main(words) == 0
    assert "1 of 3 rows left out" in caplog.text


def test_a_file_that_breaks_off_leaves_no_half_of_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    source = write_rows(tmp_path / "test.jsonl", [ROWS["gsm8k"][0], {"question": "Who?", "answer": "nobody"}])
    assert "row 2: answer must be a solution" in refusal(capsys, "data", "gsm8k", f"from={source}", f"out={tmp_path}")
    assert not (tmp_path / "gsm8k").exists()
    assert cli.main(["data", "gsm8k", f"from={source}", f"out={tmp_path}", "skip_bad_rows=true"]) == 0
    assert len(rows(tmp_path / "gsm8k" / "test.jsonl.gz")) == 1


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["hotpot", "out=x"], "otcrl data knows no data set 'hotpot'. Did you mean 'hotpotqa'?"),
        (["out=x"], "otcrl data knows no data set ''. Choose from: 2wikimultihopqa, aime24"),
        (["nq"], "otcrl data needs out=DIR"),
        (["nq", "out=x", "form=a"], "otcrl data has no setting 'form'. Did you mean 'from'?"),
        (["nq,popqa", "out=x", "from=a.jsonl"], "from=a.jsonl holds one data set, and 2 are named"),
        (["bfcl", "out=x"], "bfcl is not on the hub: get its files from https://github.com/ShishirPatil/gorilla"),
        (["nq", "out=x", "max=0"], "max must be a whole number of at least 1, got '0'"),
        (
            ["nq", "out=x", "seed=1"],
            "seed must be a whole number, and draws max=N rows of each split, got seed=1, max=",
        ),
        (["nq", "out=x", "skip_bad_rows=1"], "skip_bad_rows must be true or false, got '1'"),
        (["nq", "out=x", "from=none.jsonl"], "there is no file none.jsonl."),
    ],
)
def test_a_command_that_cannot_be_followed_is_one_line(
    words: list[str], why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(tmp_path)
    assert refusal(capsys, "data", *words).startswith(why)


def test_two_files_of_one_split_are_not_mixed(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    for name in ("a_dev.jsonl", "a_test.jsonl"):
        write_rows(tmp_path / name, [ROWS["popqa"][0]])
    why = refusal(capsys, "data", "popqa", f"from={tmp_path}", f"out={tmp_path / 'out'}")
    assert why.endswith("are both of the split 'test': name one of them, from=FILE")


def test_tool_calls_that_were_written_are_a_task(tmp_path: Path):
    for name in ("toolrl", "bfcl"):
        source = write_rows(tmp_path / f"{name}_test.jsonl", [ROWS[name][0]])
        assert cli.main(["data", name, f"from={source}", f"out={tmp_path}"]) == 0
        (problem,) = ToolCalls(test=[str(tmp_path / name / "test.jsonl.gz")]).held_out()
        (same,) = ToolCalls(test=[str(source)]).held_out()
        assert problem.meta == same.meta
        assert problem.answers == same.answers
