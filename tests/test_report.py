"""The report before a browser sees it: what is read, what is measured, and what is never lost on the way."""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
import random
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from otcrl import cli
from otcrl.errors import ConfigError, DataError
from otcrl.report import measure
from otcrl.report.attempts import TRAIN, Attempt, fewest_calls, read_attempt
from otcrl.report.build import chosen, content, differences, rounded
from otcrl.report.files import keeps_counts, last_writing, names, read_metrics, read_runs
from otcrl.report.page import as_json, page, read
from otcrl.report.segments import segments, text_of
from otcrl.rollout.transcripts import Transcript
from otcrl.secrets import public
from otcrl.secrets import told as told_secret
from otcrl.types import Outcome, ToolCall
from otcrl.watch import read_progress
from tests.runs import World, write_run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("runs") / "one")


def attempt(
    question: str = "a", made: int = 0, *, right: bool = True, step: int = 0, n: int | None = None, **others: Any
) -> Attempt:
    row = {
        "step": step, "id": question, "question": question, "answers": ["x"], "response": "", "answer": "x",
        "stop": "answered", "correct": float(right), "optimal_calls": n,
        "calls": [{"tool": "search", "outcome": "ok", "seconds": 0.5, "cached": False, "result": "r"}] * made,
    }  # fmt: skip
    return read_attempt(row | others, TRAIN, "well_formed")


# -- reading a run ---------------------------------------------------------------------------------


def test_a_run_is_read_whole(run):
    (found,) = read_runs([run])
    assert found.name == "one"
    assert [row["step"] for row in found.rows] == list(range(12))
    assert list(found.evaluations) == ["before", "after"]
    assert {a.split for a in found.attempts} == {TRAIN, "before", "after"}
    assert sum(a.split == TRAIN for a in found.attempts) == 4 * 4 * 4


def test_a_run_that_has_only_begun_is_read_as_far_as_it_is(tmp_path):
    (tmp_path / "config.yaml").write_text("seed: 1\n")
    (found,) = read_runs([tmp_path])
    assert (list(found.rows), list(found.attempts), dict(found.evaluations)) == ([], [], {})
    assert page(content([found], 10), "t", "now").startswith("<!doctype html>")


def test_half_a_line_is_not_there_yet(run, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(run, folder)
    for name in ("metrics.jsonl", "transcripts.jsonl"):
        whole = (folder / name).read_text()
        (folder / name).write_text(whole + whole[:50])
    (found,), (before,) = read_runs([folder]), read_runs([run])
    assert (len(found.rows), len(found.attempts)) == (len(before.rows), len(before.attempts))


def test_half_a_line_may_end_within_a_character(run, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(run, folder)
    with (folder / "transcripts.jsonl").open("ab") as file:
        file.write('{"step": 99, "question": "é'.encode()[:-1])
    assert len(read_runs([folder])[0].attempts) == len(read_runs([run])[0].attempts)


def test_an_evaluation_of_a_step_or_by_a_name_is_one_too(run, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(run, folder)
    shutil.copytree(folder / "eval/after", folder / "eval/step-000020/greedy")
    assert {"before", "after", "step-000020/greedy"} <= set(read_runs([folder])[0].evaluations)
    assert "step-000020/greedy" in read_progress(folder).evaluations


@pytest.mark.parametrize(
    ("reward", "counts"),
    [
        ({}, True),
        ({"price": {"tools": {}, "per_second": 0.0}}, True),
        ({"price": {"tools": {"search": 2}}}, False),
        ({"price": {"per_token": 0.1}}, False),
        ({"counter": "emitted"}, False),
    ],
)
def test_what_a_reward_keeps_as_n_is_numbers_of_calls_or_costs(reward, counts):
    assert keeps_counts({"reward": reward}, "well_formed") is counts


def test_a_line_that_cannot_be_read_is_named(run, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(run, folder)
    (folder / "metrics.jsonl").write_text('{"step": 0}\n{"step": 1, oops}\n')
    with pytest.raises(DataError, match=r"metrics\.jsonl, line 2: expected one JSON object"):
        read_runs([folder])


def test_what_is_no_run_is_refused_and_the_nearest_is_named(run, tmp_path):
    with pytest.raises(ConfigError, match="Did you mean 'one'"):
        read_runs([run.parent / "onee"])
    with pytest.raises(ConfigError, match="is not a run directory"):
        read_runs([tmp_path])
    with pytest.raises(ConfigError, match="named twice"):
        read_runs([run, run])


def test_runs_have_names_that_tell_them_apart():
    assert names([Path("a/x/one"), Path("a/y/two")]) == ["one", "two"]
    assert names([Path("a/x/one"), Path("a/y/one")]) == ["x/one", "y/one"]


def test_an_evaluation_after_a_step_is_part_of_its_row(tmp_path):
    (tmp_path / "m.jsonl").write_text('{"step": 0, "a": 1}\n{"step": 1, "a": 2}\n{"step": 1, "eval/em": 3}\n')
    assert read_metrics(tmp_path / "m.jsonl") == [{"step": 0, "a": 1}, {"step": 1, "a": 2, "eval/em": 3}]


def test_of_steps_that_a_resumed_run_made_twice_the_last_writing_counts():
    rows = [{"step": step, "n": n} for n, step in enumerate([0, 0, 10, 20, 10, 20])]
    assert [row["n"] for row in last_writing(iter(rows))] == [0, 1, 4, 5]


# -- transcripts of an earlier otcrl ---------------------------------------------------------------


def test_an_evaluation_that_does_not_say_what_was_right_is_judged_by_exact_match():
    old = {"step": 0, "id": "nq/test/1", "question": "?", "answers": ["The Seine"], "response": "", "stop": "answered"}
    assert read_attempt(old | {"answer": "seine"}, "after", "well_formed").right
    assert not read_attempt(old | {"answer": None}, "after", "well_formed").right
    assert read_attempt(old | {"answer": "seine", "parts": {"correct": 0.0}}, TRAIN, "well_formed").right is False
    assert read_attempt(old | {"answer": None}, "after", "well_formed").source == "nq"


def earlier(line: dict) -> dict:
    """The line as an earlier otcrl wrote it."""
    kept = {name: line["tokens"][name] for name in ("total", "sampled")}
    return {k: v for k, v in line.items() if k not in ("group", "sample", "source", "optimal_calls")} | {"tokens": kept}


# -- text into segments ----------------------------------------------------------------------------


def line(seed: int, eager: float = 0.6) -> dict:
    world, draw = World(), random.Random(seed)
    t = world.play(world.problem(seed), eager, draw)
    return json.loads(json.dumps(Transcript(trajectory=t, group=0).line(0, world.tokenizer, {})))


@given(st.integers(0, 10_000))
def test_segments_lose_no_character_and_no_token(seed: int):
    row = line(seed)
    found = segments(read_attempt(row, TRAIN, "well_formed"))
    assert "".join(text_of(s.pieces) for s in found) == row["response"]
    sampled = [piece for s in found if s.kind != "observation" for piece in s.pieces]
    assert len(sampled) == row["tokens"]["sampled"]
    assert sum(len(s.pieces) for s in found) == len(row["tokens"]["lengths"])


@given(st.integers(0, 10_000))
def test_a_turn_is_reasoning_then_a_call_or_the_answer(seed: int):
    found = segments(read_attempt(line(seed), TRAIN, "well_formed"))
    calls = [s for s in found if s.kind == "call"]
    assert [[*s.calls] for s in calls] == [[k] for k in range(len(calls))]
    for s in calls:
        assert re.fullmatch(r" <search> .* </search>", text_of(s.pieces), re.DOTALL)
    for s in found:
        if s.kind == "reasoning":
            assert "<" not in text_of(s.pieces)
    assert found[-1].kind == "answer"
    assert text_of(found[-1].pieces).startswith(" <answer>")


@given(st.integers(0, 10_000))
def test_without_the_tokens_the_same_segments_are_found(seed: int):
    row = line(seed)
    known = segments(read_attempt(row, TRAIN, "well_formed"))
    guessed = segments(read_attempt(earlier(row), TRAIN, "well_formed"))
    said, expected = ([(s.kind, s.calls, text_of(s.pieces).strip()) for s in each] for each in (guessed, known))
    assert said == expected
    assert "".join(text_of(s.pieces) for s in guessed) == row["response"]


def told(response: str, calls: Sequence[ToolCall], answer: str | None = None, **others: Any) -> list[tuple[str, str]]:
    row = {
        "step": 0, "id": "a", "question": "?", "answers": ["x"], "response": response, "answer": answer,
        "stop": "answered", "calls": [vars_of(call) for call in calls], "tokens": {"total": 9, "sampled": 5},
    }  # fmt: skip
    return [(s.kind, text_of(s.pieces)) for s in segments(read_attempt(row | others, TRAIN, "well_formed"))]


def vars_of(call: ToolCall) -> dict[str, Any]:
    return {name: getattr(call, name) for name in call.__slots__}


def test_code_fences_are_calls_and_their_output_is_observed():
    text = "Let me compute.\n```python\nprint(6*7)\n```\n```output\n42\n```\nSo \\boxed{42}"
    assert told(text, [ToolCall("python", "print(6*7)", "42", Outcome.OK)], "42") == [
        ("reasoning", "Let me compute.\n"),
        ("call", "```python\nprint(6*7)\n```\n```output"),
        ("observation", "\n42\n```\n"),
        ("reasoning", "So "),
        ("answer", "\\boxed{42}"),
    ]


def test_a_call_that_was_never_answered_is_a_call_all_the_same():
    lost = ToolCall("search", "q", "connection refused", Outcome.INFRA_ERROR)
    assert told("Hm. <search> q </search>", [lost]) == [("reasoning", "Hm. "), ("call", "<search> q </search>")]


def test_a_malformed_turn_is_all_call():
    text = "<serch> q </serch>"
    bad = ToolCall("", text, "Error: There is no tool named 'serch'.", Outcome.INVALID)
    assert told(f"{text}<observation>{bad.result}</observation>", [bad])[0] == ("call", text)


def in_spans(*texts: str) -> dict[str, Any]:
    """What is known of turns and observations, each of them one token."""
    return {"response": "".join(texts), "tokens": {"spans": [1] * len(texts), "lengths": [len(t) for t in texts]}}


def pieced(turns: dict[str, Any]) -> dict[str, Any]:
    """The same with every character a token, so that a turn can be cut anywhere."""
    lengths = turns["tokens"]["lengths"]
    return turns | {"tokens": {"spans": lengths, "lengths": [1] * sum(lengths)}}


def test_several_calls_of_a_turn_are_one_call_and_their_results_one_observation():
    turn = (
        "<think> both </think>\n"
        '<tool_call>\n{"name": "python", "arguments": {"code": "print(1)\\nprint(2)"}}\n</tool_call>'
        '\n<tool_call>\n{"name": "search", "arguments": {"query": "x"}}\n</tool_call>'
    )
    seen, last = "<tool_response>1 2</tool_response><tool_response>found</tool_response>", "<answer> 3 </answer>"
    made = [ToolCall("python", "print(1)\nprint(2)", "1\n2", Outcome.OK), ToolCall("search", "x", "found", Outcome.OK)]
    row = pieced(in_spans(turn, seen, last))
    found = segments(
        read_attempt(line(0) | row | {"answer": "3", "calls": [vars_of(c) for c in made]}, TRAIN, "emitted")
    )
    assert [(s.kind, [*s.calls]) for s in found] == [
        ("reasoning", []), ("call", [0, 1]), ("observation", [0, 1]), ("answer", []),
    ]  # fmt: skip
    assert text_of(found[0].pieces) == "<think> both </think>\n"


def test_a_call_before_the_first_word_has_no_place_in_the_text():
    made = [
        ToolCall("search", "q", "what the prompt holds", Outcome.OK),
        ToolCall("search", "A line.", "more", Outcome.OK),
    ]
    row = pieced(in_spans("A line.\n", "<information>more</information>", "<answer> x </answer>"))
    found = segments(
        read_attempt(line(0) | row | {"answer": "x", "calls": [vars_of(c) for c in made]}, TRAIN, "emitted")
    )
    assert [(s.kind, [*s.calls]) for s in found] == [("call", [1]), ("observation", [1]), ("answer", [])]
    assert told("<answer> x </answer>", made[:1], "x") == [("answer", "<answer> x </answer>")]


def test_code_tags_and_fences_are_part_of_the_call():
    text = "Hm. <code>\n```python\nprint(6)\n```\n</code>\n<interpreter>\n6\n</interpreter>\n"
    text += "<answer>\n\\boxed{6}\n</answer>"
    kinds = told(text, [ToolCall("python", "print(6)", "6", Outcome.OK)], "6")
    assert [kind for kind, _ in kinds] == ["reasoning", "call", "observation", "answer"]
    assert kinds[1][1].startswith("<code>")
    assert kinds[3][1].startswith("<answer>")


def test_text_with_neither_call_nor_answer_is_reasoning():
    assert told("I give up.", []) == [("reasoning", "I give up.")]
    assert told("", []) == []


# -- figures, by hand ------------------------------------------------------------------------------


def test_n_is_the_optimum_or_the_fewest_calls_of_a_right_answer():
    found = fewest_calls(
        [attempt("a", 2), attempt("a", 1), attempt("a", 0, right=False), attempt("b", 1, n=0), attempt("c", 3)],
        {"c": 2, "d": 4},
    )
    assert found == {"a": 1, "b": 0, "c": 2, "d": 4}


def test_calls_are_counted_against_n_by_step():
    own = [attempt("a", 0), attempt("a", 1), attempt("a", 4), attempt("b", 1, right=False), attempt("a", 2, step=5)]
    found = measure.calls(own, {"a": 1})
    assert found["steps"] == [0, 5]
    assert found["shares"] == [[0.25, 0.25, 0, 0, 0.25, 0.25], [0, 0, 1, 0, 0, 0]]
    assert found["tables"] == [[[1, 0, 1], [1, 1, 1], [1, 4, 1]], [[1, 2, 1]]]


def test_questions_say_how_their_calls_changed():
    own = [attempt("a", 3), attempt("a", 1, right=False), attempt("a", 1, step=9), attempt("a", 0, stop="void")]
    assert measure.questions(own, {"a": 1}) == [["a", "a", 1, 3, 2 / 3, 5 / 3, 2, 1]]


def test_offloading_is_told_by_siblings():
    knows = [attempt("a", 0), attempt("a", 2), attempt("a", 1)]  # n = 0: two of three called all the same
    guesses = [attempt("b", 0, right=False), attempt("b", 1)]  # a sibling that called was right
    lost = [attempt("c", 0, right=False), attempt("c", 0, right=False)]
    found = measure.offloading([*knows, *guesses, *lost], {"a": 0, "b": 1})
    assert found == {
        "steps": [0], "known": [3 / 7], "over_call": [2 / 3], "wrong_without_call": [3 / 7], "under_call": [1 / 3],
    }  # fmt: skip
    assert measure.offloading([attempt("b", 1)], {"b": 1})["over_call"] == [None]


def call(tool: str, outcome: str, seconds: float, *, cached: bool = False, result: str = "r") -> dict[str, Any]:
    return {"tool": tool, "outcome": outcome, "seconds": seconds, "cached": cached, "result": result}


def test_tools_say_what_became_of_calls_and_how_long_they_took():
    made = [call("s", "ok", 0.1), call("s", "ok", 0.0, cached=True), call("s", "model_error", 0.3, result="bad"),
            call("s", "infra_error", 30.0, result="down"), call("", "invalid", 0.0, result="bad tag")]  # fmt: skip
    found = measure.tools([attempt("a", calls=made), attempt("b", calls=[], step=3)])
    search = found["tools"]["s"]
    assert (search["calls"], search["cached"], search["outcomes"]) == (4, 1, [2, 1, 1, 0, 0])
    assert search["latency"]["p50"] == pytest.approx(0.3)
    assert search["latency"]["max"] == 30.0
    assert sum(count for _, _, count in search["histogram"]) == 3
    assert found["tools"][""]["latency"]["p50"] is None
    assert found["shares"] == [[0.4, 0.2, 0.2, 0.2, 0.0], [None] * 5]
    assert found["seconds"] == [pytest.approx(30.4), 0.0]
    assert sorted(found["errors"]) == [
        ["", "invalid", "bad tag", 1], ["s", "infra_error", "down", 1], ["s", "model_error", "bad", 1],
    ]  # fmt: skip


@given(st.lists(st.floats(0, 1000), min_size=1, max_size=30))
def test_every_latency_is_in_its_bin(seconds: list[float]):
    bins = measure.histogram(seconds)
    assert sum(count for _, _, count in bins) == len(seconds)
    for low, high, count in bins:
        assert count == sum(low * (1 - 1e-9) <= max(s, 1e-6) < high * (1 - 1e-9) for s in seconds)


# -- what is shown ---------------------------------------------------------------------------------


def test_the_same_questions_are_shown_of_every_run_and_their_groups_are_whole():
    first = [attempt(f"q{k}", step=step) for step in (0, 5) for k in range(20) for _ in range(4)]
    second = [attempt(f"q{k}") for k in range(20)]
    shown = chosen([first, second], most=100)
    asked = [{a.id for a in own} for own in shown]
    assert asked[0] == asked[1]
    assert [len(own) for own in shown] == [8 * len(asked[0]), len(asked[0])]
    assert 90 < sum(len(own) for own in shown) <= 100
    assert chosen([first, second], most=10**6) == [first, second]


def test_figures_are_of_all_trajectories_also_of_those_that_are_left_out(run):
    few, all_of_them = content(read_runs([run]), 20), content(read_runs([run]), 10**6)
    assert few.runs == all_of_them.runs
    assert 0 < len(few.details) <= 20
    assert few.left_out == len(all_of_them.details) - len(few.details)
    assert {len(column) for column in few.columns.values()} == {len(few.details)}


def test_settings_that_differ_are_named():
    first = {"seed": 0, "algo": {"lr": 1, "clip": 0.2}, "tools": {"search": {"token": "a"}}}
    second = {"seed": 0, "algo": {"lr": 2, "clip": 0.2, "kl": 0.1}, "tools": {"search": {"token": "b"}}}
    assert differences([first, second]) == [["algo.lr", "1", "2"], ["algo.kl", None, "0.1"]]


def test_a_secret_of_the_config_is_not_passed_on(run):
    assert "t0p-s3cret" in (run / "config.yaml").read_text()
    assert "t0p-s3cret" not in page(content(read_runs([run]), 100), "t", "now")


@pytest.mark.parametrize(
    ("key", "value", "shown"),
    [
        ("GITHUB_TOKEN", "S", "..."),
        ("api-key", "S", "..."),
        ("accessToken", "S", "..."),
        ("env", {"HOME": "S", "EMPTY": ""}, {"HOME": "...", "EMPTY": ""}),
        ("command", ["srv", "--api-key", "S", "--token=S", "-v"], ["srv", "--api-key", "...", "--token=...", "-v"]),
        ("token_env", "NAME", "NAME"),
        ("max_tokens", 5, 5),
        ("weighting", "token", "token"),
        ("token", None, None),
    ],
)
def test_keys_environments_and_options_tell_what_is_secret(key, value, shown):
    assert public({"tools": {key: value}}) == {"tools": {key: shown}}


@pytest.mark.parametrize(
    ("word", "is_told"),
    [
        ("tools.mcp.env.GITHUB_TOKEN=S", True),
        ("+tools.mcp.env={HOME:S}", True),
        ("tools.mcp.command=[srv,--api-key,S]", True),
        ("tools.mcp.command=[srv,--token=S]", True),
        ("algo.weighting=token", False),
        ("tools.mcp.token_env=NAME", False),
        ("rollout.limits.max_tokens=5", False),
    ],
)
def test_a_command_line_with_a_secret_is_known(word, is_told):
    assert told_secret([word]) is is_told


def test_numbers_are_short_and_finite():
    assert rounded({"a": [0.1234567, float("nan"), 3], "b": (float("inf"),)}) == {"a": [0.123457, None, 3], "b": [None]}


# -- the page --------------------------------------------------------------------------------------


@given(
    st.text(st.characters(codec=None), max_size=40) | st.sampled_from(["</script>", "<!--<script>", "]]>", "\u2028"])
)
def test_data_in_the_page_cannot_end_their_element_and_come_back_as_they_were(text: str):
    written = as_json([text])
    assert not set("<>&") & set(written)
    assert written.isascii()
    assert json.loads(written) == [text]


def test_the_page_allows_exactly_its_own_scripts_and_styles(run):
    text = page(content(read_runs([run]), 100), "t", "now")
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', text)
    assert policy is not None
    assert "default-src 'none'" in policy[1]
    assert "unsafe" not in policy[1]
    assert "require-trusted-types-for 'script'" in policy[1]
    assert len(re.findall(r"<script>", text)) == policy[1].split("style-src")[0].count("sha256-")
    assert not re.search(r"""(src|href)=["']?(https?:)?//""", text)


def test_the_page_holds_every_trajectory_with_its_tokens(run):
    found = content(read_runs([run]), 1000)
    text = page(found, "t", "now")
    blocks = re.findall(r'<script type="text/plain" class="block">([^<]*)</script>', text)
    held = [t for block in blocks for t in json.loads(gzip.decompress(base64.b64decode(block)))]
    assert len(held) == len(found.details) == len(found.columns["run"])
    assert held == json.loads(json.dumps(found.details))


def test_the_plot_library_is_the_file_that_its_authors_published():
    """uPlot 1.6.32 of the npm registry. Whoever brings it up to date changes this too."""
    digest = hashlib.sha256(read("vendor/uPlot.iife.min.js").encode()).hexdigest()
    assert digest == "19c8d4c6ad88929a79f4ae49d6f7161566dfd0ba3d15cc495e974f787eb78f1f"


# -- the command -----------------------------------------------------------------------------------


def test_the_command_writes_one_file_and_says_what_is_in_it(run, tmp_path, capsys):
    assert cli.main(["report", str(run), f"out={tmp_path / 'deep' / 'r.html'}", "trajectories=50"]) == 0
    assert re.search(r"trajectories \(\d+ left out: trajectories=N\), \d+\.\d MB", capsys.readouterr().out)
    assert (tmp_path / "deep" / "r.html").stat().st_size > 50_000


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "otcrl report needs a run directory"),
        (["nowhere"], "there is no run nowhere"),
        (["nowhere", "outt=x"], "otcrl report has no setting 'outt'. Did you mean 'out'?"),
        (["nowhere", "trajectories=many"], "trajectories must be a whole number of at least 0, got 'many'"),
    ],
)
def test_a_wrong_word_is_one_line(words, message, capsys):
    assert cli.main(["report", *words]) == 2
    assert capsys.readouterr().err.startswith(f"otcrl: error: {message}")


def test_a_file_that_cannot_be_written_is_one_line(run, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert cli.main(["report", str(run), f"out={tmp_path / 'file' / 'r.html'}"]) == 2
    assert "out=" in capsys.readouterr().err
