"""Every published form of a question is read as what it says, by the reader that fits it; anything else is named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from otcrl.errors import DataError
from otcrl.tasks.fields import Wrong
from otcrl.tasks.readers import READERS, choose, fitting
from otcrl.tasks.records import read_problems
from tests.published import DAPO, FUNCTION, GOLD, MESSAGE, OTHER, ROWS, TURN, VARIANTS, verl
from tests.test_records import write

COLUMNAR = ("search_r1", "torl", "dapo", "toolrl", "gsm8k", "musique")  # whose columns are of one type each
ALL = [*((name, row, answers) for name, (row, _, answers) in ROWS.items()), *VARIANTS]


def test_there_is_a_row_for_every_reader():
    assert ROWS.keys() == READERS.keys()


@pytest.mark.parametrize("name", ROWS)
def test_a_row_is_read_as_its_question_and_its_answers(name: str):
    row, question, answers = ROWS[name]
    record = READERS[name].read(row)
    assert (record.question, record.answers) == (question, answers)


@pytest.mark.parametrize(("name", "row", "answers"), ALL)
def test_the_reader_is_chosen_by_the_columns(name: str, row: dict, answers: tuple[str, ...]):
    assert choose("auto", row) is READERS[name]
    assert READERS[name].read(row).answers == answers
    assert fitting(row)[0] == name


@pytest.mark.parametrize(
    ("reader", "name"),
    [*((reader, name) for reader in ROWS for name in ("a.jsonl", "a.json")), *((r, "a.parquet") for r in COLUMNAR)],
)
def test_a_file_of_any_form_becomes_problems(tmp_path: Path, reader: str, name: str):
    row, question, answers = ROWS[reader]
    (tmp_path / "set").mkdir()
    (problem,) = read_problems(str(write(tmp_path / "set" / name, [row])))
    assert (problem.question, problem.answers) == (question, answers)
    (same,) = read_problems(str(tmp_path / "set" / name), reader=reader)
    assert same == problem


@pytest.mark.parametrize(
    ("reader", "id"),
    [
        ("search_r1", "made/train/3"),
        ("torl", "made/train/3"),
        ("toolrl", "rlla/train/3"),
        ("hotpotqa", "set/test/h1"),
        ("popqa", "set/test/9"),
        ("gsm8k", "set/test/0"),
        ("math", "set/test/test/a/1.json"),
        ("triviaqa", "set/test/t1"),
        ("bfcl", "set/test/simple_python_7"),
    ],
)
def test_a_problem_has_the_id_of_its_row_and_the_source_that_the_row_names(tmp_path: Path, reader: str, id: str):
    (tmp_path / "set").mkdir()
    (problem,) = read_problems(str(write(tmp_path / "set" / "test.jsonl", [ROWS[reader][0]])))
    assert problem.id == id


@pytest.mark.parametrize("reader", ["hotpotqa", "musique"])
def test_the_paragraphs_of_a_question_come_with_it(reader: str):
    rows = [ROWS[reader][0], *(row for name, row, _ in VARIANTS if name == reader)]
    for row in rows:
        paragraphs = READERS[reader].read(row).paragraphs
        assert [(p.title, p.text, p.is_gold) for p in paragraphs] == [("Tin", OTHER, False), ("Polonium", GOLD, True)]


def test_rows_that_published_files_repeat_count_once(tmp_path: Path):
    one, other = verl(DAPO.format("6 * 7?"), "42", index="a"), verl(DAPO.format("6 * 8?"), "48", index="b")
    problems = read_problems(str(write(tmp_path / "train.jsonl", [one, other, one, one, other])))
    assert [p.question for p in problems] == ["6 * 7?", "6 * 8?"]
    with pytest.raises(DataError, match="two problems have the id"):
        read_problems(str(write(tmp_path / "train.jsonl", [one, {**other, "extra_info": one["extra_info"]}])))


# -- tool calls ---------------------------------------------------------------------------------------------


def test_functions_of_bfcl_are_shown_as_json_schema():
    record = READERS["bfcl"].read(ROWS["bfcl"][0])
    assert record.meta["messages"] == [MESSAGE]
    (function,) = record.meta["functions"]  # pyright: ignore[reportGeneralTypeIssues]
    assert function["name"] == FUNCTION["name"]
    assert function["parameters"] == {
        "type": "object",
        "properties": {
            "city": {"type": "string"},
            "days": {"type": "integer"},
            "limits": {"type": "array", "items": {"type": "number"}},
            "extra": {},
        },
        "required": ["city"],
    }


@pytest.mark.parametrize(
    ("id", "accepted"), [("irrelevance_3", []), ("live_irrelevance_1-0-1", []), ("live_relevance_0-0-0", "some")]
)
def test_rows_of_bfcl_without_a_call_to_make_say_so(id: str, accepted: object):
    row = {key: value for key, value in ROWS["bfcl"][0].items() if key != "ground_truth"} | {"id": id}
    assert READERS["bfcl"].read(row).meta["accepted"] == accepted


def test_bfcls_answers_are_joined_in_from_the_file_beside_its_questions(tmp_path: Path):
    row = ROWS["bfcl"][0]
    questions = [{k: v for k, v in row.items() if k != "ground_truth"} | {"id": f"simple_python_{i}"} for i in range(2)]
    (tmp_path / "possible_answer").mkdir()
    for folder, rows in (
        (tmp_path, questions),
        (tmp_path / "possible_answer", [{"id": q["id"], "ground_truth": row["ground_truth"]} for q in questions]),
    ):
        (folder / "BFCL_v4_simple_python.json").write_text(
            "".join(json.dumps(each) + "\n" for each in rows)
        )  # as it is
    problems = read_problems(str(tmp_path / "BFCL_v4_simple_python.json"))
    assert [p.meta["accepted"] for p in problems] == [row["ground_truth"]] * 2


def test_toolrls_prompt_is_kept_as_it_is():
    for name, row, _ in [("toolrl", ROWS["toolrl"][0], ()), *VARIANTS]:
        if name == "toolrl":
            system, user = READERS[name].read(row).meta["messages"]  # pyright: ignore[reportGeneralTypeIssues]
            assert (system["role"], system["content"], user["role"]) == ("system", "You have tools.", "user")


# -- files of other shapes ------------------------------------------------------------------------------------


def test_triviaqas_own_file_is_an_object_with_the_rows_in_it(tmp_path: Path):
    row = next(row for name, row, _ in VARIANTS if name == "triviaqa")
    (tmp_path / "web-dev.json").write_text(json.dumps({"Data": [row], "Version": 1.0}))
    assert read_problems(str(tmp_path / "web-dev.json"))[0].answers == ("Curie", "C")


def test_popqas_own_file_has_tabs_between_its_columns(tmp_path: Path):
    (tmp_path / "popQA.tsv").write_text('id\tquestion\tpossible_answers\n7\tWho?\t"[""Curie"", ""M. Curie""]"\n')
    (problem,) = read_problems(str(tmp_path / "popQA.tsv"))
    assert problem.id.endswith("/popQA/7")
    assert problem.answers == ("Curie", "M. Curie")


@pytest.mark.parametrize("between", ["", " "], ids=["2WikiMultihopQA", "HotpotQA"])
def test_the_sentences_of_a_paragraph_are_one_text(between: str):
    """HotpotQA's begin with the space between them, 2WikiMultihopQA's do not."""
    row = ROWS["hotpotqa"][0] | {"context": [["Tin", ["Tin is a metal.", f"{between}It is soft.", ""]]]}
    assert READERS["hotpotqa"].read(row).paragraphs[0].text == "Tin is a metal. It is soft."


def test_a_number_is_an_answer_as_a_person_would_write_it(tmp_path: Path):
    """A column of whole numbers with a gap comes out of pandas as floats."""
    rows = [{"id": i, "question": "How many?", "answer": a} for i, a in enumerate([3.0, 2.5, 7])]
    path = write(tmp_path / "a.jsonl", rows)
    assert [p.answers for p in read_problems(str(path))] == [("3",), ("2.5",), ("7",)]
    write(path, [{"id": 9, "question": "How many?", "answer": float("nan")}])
    with pytest.raises(DataError, match=r"row 1: answer must be a text or a number, got nan"):
        read_problems(str(path))
    musique = ROWS["musique"][0] | {"answer": 5, "answer_aliases": ["five"]}
    assert READERS["musique"].read(musique).answers == ("5", "five")


def test_a_box_without_braces_holds_one_answer():
    row = {"problem": "1 + 1?", "solution": r"So we have $\boxed 2$ and are done."}
    assert READERS["math"].read(row).answers == ("2",)


def test_the_first_row_may_be_a_bad_one_too(tmp_path: Path):
    path = write(tmp_path / "a.jsonl", [{"question": "Who?"}, {"question": "Who?", "answer": "Ann"}])
    with pytest.raises(DataError, match="row 1: there is no column 'answers'"):
        read_problems(str(path))
    assert [p.answers for p in read_problems(str(path), skip_bad_rows=True)] == [("Ann",)]
    write(path, [{"question": "Who?"}] * 2)
    with pytest.raises(DataError, match="row 1: there is no column 'answers'"):
        read_problems(str(path), skip_bad_rows=True)


def test_a_solution_is_not_taken_for_an_answer(tmp_path: Path):
    rows = [{"question": "1 + 1?", "answer": "2"}, {"question": "5 + 5?", "answer": "so 5 + 5 = 10\n#### 10"}]
    path = write(tmp_path / "a.jsonl", rows)
    with pytest.raises(DataError, match=r"row 2: answer must be an answer alone.* Reader 'gsm8k' would fit"):
        read_problems(str(path))


def test_files_that_begin_with_a_mark_of_their_encoding_are_read(tmp_path: Path):
    for name, text in (("a.tsv", "id\tquestion\tanswer\n7\tWho?\tAnn\n"), ("b.json", json.dumps([ROWS["popqa"][0]]))):
        (tmp_path / name).write_text(text, encoding="utf-8-sig")
        assert read_problems(str(tmp_path / name))[0].answers
    assert read_problems(str(tmp_path / "a.tsv"))[0].id.endswith("/a/7")


def test_a_line_of_a_table_with_too_many_columns_is_named(tmp_path: Path):
    (tmp_path / "a.tsv").write_text("question\tanswer\nWhat is\tx?\ta\n")
    with pytest.raises(DataError, match=r"a\.tsv, row 1: more columns than the first line names: \['a'\]"):
        read_problems(str(tmp_path / "a.tsv"))


@pytest.mark.parametrize(
    ("rows", "row"),
    [('a?\tx\n"b?\ty\nc?\tz\n', 2), ('"Heroes", by whom?\tBowie\n', 1), ('"Heroes" by whom?\tBowie\n', 1)],
    ids=["never closed", "comma", "text after"],
)
def test_a_stray_quote_in_a_tsv_file_is_an_error_and_joins_no_rows(tmp_path: Path, rows: str, row: int):
    (tmp_path / "a.tsv").write_text("question\tanswer\n" + rows)
    with pytest.raises(DataError, match=rf"a\.tsv, row {row}: not readable as columns with tabs between them: "):
        read_problems(str(tmp_path / "a.tsv"))


# -- what wrong data says ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reader", "change", "why"),
    [
        ("gsm8k", {"answer": "1200"}, "answer must be a solution that ends with '#### NUMBER', got '1200'. Reader"),
        ("strategyqa", {"answer": "yes"}, "answer must be true or false, got 'yes'. Reader 'plain' would fit"),
        ("popqa", {"possible_answers": "Curie"}, "possible_answers must be JSON, got 'Curie'"),
        (
            "popqa",
            {"possible_answers": "[]"},
            "possible_answers must be one text or a list of at least one text, got []",
        ),
        ("triviaqa", {"answer": {"aliases": []}}, "answer.value must be a text, got None"),
        ("triviaqa", {"answer": "Curie"}, "answer must be an object, got 'Curie'. Reader 'plain' would fit"),
        ("hotpotqa", {"context": {"title": ["a"]}}, "context.sentences must be a list, got None"),
        ("hotpotqa", {"context": [["a"]]}, "context must be pairs of a title and its sentences, got ['a']"),
        ("hotpotqa", {"supporting_facts": 7}, "supporting_facts must be a list, got 7"),
        ("musique", {"answerable": False}, "answerable must be true: this is MuSiQue-Full, and musique_ans"),
        ("musique", {"paragraphs": ["a"]}, "paragraphs[0] must be an object, got 'a'"),
        (
            "math",
            {"answer": None},
            "solution must be a text with a \\boxed{answer}, where there is no answer, got None",
        ),
        (
            "hotpotqa",
            {"context": {"title": ["a", "b"], "sentences": [["c"]]}},
            "context.sentences must be of 2 paragraphs, as context.title, got [['c']]",
        ),
        (
            "search_r1",
            {"prompt": [{"role": "user", "content": "Answer the question."}]},
            "prompt must be instructions with a question behind 'Question:', or a column 'question', "
            "got 'Answer the question.'",
        ),
        (
            "search_r1",
            {"prompt": [{"role": "user", "content": "Answer. Question: a? Question: b?"}]},
            "prompt must be instructions that hold 'Question:' once, where there is no column 'question', got 'Answer.",
        ),
        (
            "search_r1",
            {"reward_model": {"ground_truth": {"targets": ["x"]}}},
            "reward_model.ground_truth.target must be one text or a list of at least one text, got None",
        ),
        (
            "search_r1",
            {"prompt": [{"role": "user", "content": "6 * 7?"}], "reward_model": {"ground_truth": "42"}},
            "reward_model.ground_truth must be an object, got '42'. Reader 'torl' would fit",
        ),
        ("bfcl", {"function": [{"parameters": {}}]}, "function must be objects with a name, got {'parameters': {}}"),
        ("search_r1", {"prompt": "who?"}, "prompt must be a list of messages {role, content}, got 'who?'"),
        ("torl", {"reward_model": {"ground_truth": None}}, "reward_model.ground_truth must be one text or a list of"),
        ("torl", {"reward_model": 3}, "reward_model must be an object, got 3"),
        ("toolrl", {"reward_model": {"ground_truth": ""}}, "output must be a text, got ''"),
        (
            "bfcl",
            {"question": [[MESSAGE], [MESSAGE]]},
            "question must be one turn: multi-turn rows are judged by running",
        ),
        ("bfcl", {"question": [[]]}, "question[0] must be messages, the last of them the user's, got []"),
        ("bfcl", {"ground_truth": None}, "ground_truth must be a list of calls, joined in from possible_answer/ by id"),
        ("bfcl", {"ground_truth": ["f()"]}, "ground_truth must be an object, got 'f()'"),
        ("bfcl", {"ground_truth": [{"f": {"a": 1}}]}, "ground_truth must be calls {name: {argument: [accepted va"),
        ("bfcl", {"id": "simple_java_1"}, "category must be of Python's types: Java's and JavaScript's literals"),
    ],
)
def test_a_wrong_field_is_named_with_file_row_and_what_was_found(tmp_path: Path, reader: str, change: dict, why: str):
    good = ROWS[reader][0]
    rows = [good, good | {"id": "other", "extra_info": {"index": 4}} | change]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(DataError) as caught:
        read_problems(str(path), reader=reader)
    assert str(caught.value).startswith(f"{path}, row 2: {why}")
    assert "([task.]skip_bad_rows=true goes on without such rows)" in str(caught.value)
    assert len(read_problems(str(path), reader=reader, skip_bad_rows=True)) == 1


@pytest.mark.parametrize(
    ("reader", "row", "why"),
    [
        ("gsm8k", ROWS["math"][0], "Reader 'gsm8k' needs question and an answer with ####. Its columns are: answer, l"),
        ("hotpotqa", ROWS["musique"][0], "Reader 'musique' would fit."),
        ("search_r1", ROWS["dapo"][0], "Reader 'dapo' would fit."),
        ("auto", {"text": "a"}, "there is no column 'question'. Its columns are: text. No reader fits: docs/data.md"),
        ("auto", {"question": "a", "answr": "b"}, "there is no column 'answers'. Did you mean 'answr'?"),
        ("gsm8K", ROWS["gsm8k"][0], "there is no reader 'gsm8K'. Did you mean 'gsm8k'?"),
    ],
)
def test_a_file_in_another_form_says_which_reader_would_fit(tmp_path: Path, reader: str, row: dict, why: str):
    path = write(tmp_path / "a.jsonl", [row])
    with pytest.raises(DataError) as caught:
        read_problems(str(path), reader=reader)
    assert str(caught.value).startswith(f"{path}, row 1: ")
    assert why in str(caught.value)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=4) | st.sampled_from(["####", "[]", "[1]", TURN]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from("title value aliases".split()), inner),
    max_leaves=6,
)


@given(st.data())
def test_whatever_a_row_holds_it_is_read_or_named(data: st.DataObject):
    """Any column of any row may hold anything."""
    name = data.draw(st.sampled_from(sorted(ROWS)))
    row = dict(ROWS[name][0])
    for column in data.draw(st.lists(st.sampled_from(sorted(row)), min_size=1, max_size=2)):
        row[column] = data.draw(json_values)
    for reader in READERS.values():
        if reader.fits(row):
            try:
                record = reader.read(row)
            except (Wrong, KeyError):
                continue
            assert record.question.strip()
            assert record.answers


# -- real data --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "reader", "rows"),
    [
        ("toolrl/sft", "toolrl", 400),
        ("toolrl/test", "toolrl", 64),
        ("strategyqa/test", "plain", 183),
        ("nq_open/test", "plain", 2888),
        ("bfcl/simple_python", "bfcl", 303),
        ("bfcl/multiple", "bfcl", 134),
        ("bfcl/parallel", "bfcl", 160),
        ("bfcl/parallel_multiple", "bfcl", 160),
        ("bfcl/irrelevance", "bfcl", 190),
        ("bfcl/live_simple", "bfcl", 204),
        ("bfcl/live_multiple", "bfcl", 834),
        ("bfcl/live_parallel", "bfcl", 12),
        ("bfcl/live_parallel_multiple", "bfcl", 19),
        ("bfcl/live_irrelevance", "bfcl", 653),
        ("bfcl/live_relevance", "bfcl", 13),
    ],
)
def test_published_files_are_read_whole(shared: Path, name: str, reader: str, rows: int):
    path = str(shared / "data" / f"{name}.jsonl.gz")
    problems = read_problems(path, reader=reader)
    assert len(problems) == rows
    assert read_problems(path) == problems


@pytest.mark.parametrize("name", ["multi_turn_base", "simple_java", "simple_javascript", "memory", "web_search"])
def test_categories_of_bfcl_that_cannot_be_judged_here_say_why(shared: Path, name: str):
    with pytest.raises(DataError, match="row 1: "):
        read_problems(str(shared / "data" / "bfcl" / f"{name}.jsonl.gz"), reader="bfcl")
