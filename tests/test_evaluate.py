"""Evaluation: figures that can be checked by hand, and what their intervals promise."""

from __future__ import annotations

import asyncio
import errno
import io
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from otcrl import sealed
from otcrl.errors import ConfigError, DataError
from otcrl.evaluate.metrics import Estimate, by_source, ratios, summarize
from otcrl.evaluate.offloading import Offloading, compare_passes, offloading
from otcrl.evaluate.report import Report, before_after_table, make_report
from otcrl.experiment import save
from otcrl.models.tiny import word_tokenizer
from otcrl.rewards.matching import exact_match
from otcrl.rollout.transcripts import Transcript
from otcrl.types import Outcome, Problem, Stop, ToolCall, Trajectory

OK, FAILED, INVALID, OVER = Outcome.OK, Outcome.MODEL_ERROR, Outcome.INVALID, Outcome.OVER_BUDGET


def correct(answer: str, problem: Problem) -> float:
    return exact_match(answer, problem.answers)


def attempt(
    question: str,
    answer: str | None,
    *outcomes: Outcome,
    source: str = "nq",
    optimum: int | None = None,
    stop: Stop = Stop.ANSWERED,
) -> Trajectory:
    """An attempt at a question whose right answer is "yes", with one call for each outcome.

    One prompt token, then a sampled token and an observation token for each call, then a sampled one.
    """
    mask = [False, *[True, False] * len(outcomes), True]
    return Trajectory(
        problem=Problem(f"{source}/test/{question}", f"{question}?", ("yes",), source, optimum),
        token_ids=[1] * len(mask),
        action_mask=mask,
        logprobs=[0.0] * len(mask),
        versions=[0 if action else -1 for action in mask],
        tool_calls=tuple(ToolCall("search", "q", "r", outcome) for outcome in outcomes),
        answer=answer,
        violations=(),
        stop=stop,
        response="",
    )


FOUR = [
    attempt("a", "yes", OK, OK, optimum=1),  # right, one call too many
    attempt("b", "yes", optimum=0),  # right, as good as can be
    attempt("c", "no yes", FAILED, INVALID, OVER, optimum=2),  # wrong, one call too few
    attempt("d", None, optimum=1),  # no answer
]
SPOILT = attempt("e", "yes", OK, OK, OK, stop=Stop.VOID)


def shown(*tables: object) -> str:
    console = Console(width=200, record=True, file=io.StringIO())
    for table in tables:
        console.print(table)
    return console.export_text()


# -- figures -----------------------------------------------------------------------------------------


def test_the_figures_of_four_attempts_by_hand() -> None:
    summary = summarize(FOUR, correct, "well_formed")
    values = {name: getattr(summary, name).value for name in ("em", "f1", "tc", "tp", "optimum")}
    assert values == {
        "em": 2 / 4,
        "f1": pytest.approx((1 + 1 + 2 / 3 + 0) / 4),  # "no yes" shares one of 2 + 1 words
        "tc": (2 + 0 + 1 + 0) / 4,
        "tp": 2 / 3,  # two right answers for three calls, not the mean of ratios
        "optimum": (1 + 0 + 2 + 1) / 4,
    }
    assert (summary.over_call.value, summary.under_call.value) == (1 / 4, 2 / 4)
    kinds = [getattr(summary, name).value for name in ("emitted", "executed", "failed", "invalid")]
    assert kinds == [5 / 4, 2 / 4, 1 / 4, 1 / 4]
    assert summary.sampled_tokens.value == (3 + 1 + 4 + 1) / 4
    assert summary.total_tokens.value == (6 + 2 + 8 + 2) / 4
    assert (summary.questions, summary.attempts, summary.void) == (4, 4, 0)


@pytest.mark.parametrize(
    ("counter", "calls"), [("emitted", 5), ("executed", 2), ("failed", 1), ("invalid", 1), ("well_formed", 3)]
)
def test_tc_and_tp_count_the_calls_that_the_config_names(counter: str, calls: int) -> None:
    summary = summarize(FOUR, correct, counter)
    assert (summary.tc.value, summary.tp.value) == (calls / 4, 2 / calls)


def test_an_unknown_counter_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="Did you mean 'executed'"):
        summarize(FOUR, correct, "execute")


def test_void_trajectories_are_counted_and_change_nothing_else() -> None:
    assert summarize([*FOUR, SPOILT], correct, "executed") == replace(summarize(FOUR, correct, "executed"), void=1)


def test_tool_productivity_without_a_call_is_undefined_not_zero() -> None:
    summary = summarize([attempt("a", "yes"), attempt("b", "no")], correct, "well_formed")
    assert summary.tp == Estimate(None)
    assert summary.tc == Estimate(0.0, 0.0, 0.0)


def test_nothing_but_void_gives_figures_that_are_undefined() -> None:
    summary = summarize([SPOILT], correct, "well_formed")
    assert (summary.questions, summary.void) == (0, 1)
    assert summary.em == summary.tc == summary.optimum == Estimate(None)


def test_the_optimum_is_told_only_where_every_question_has_one() -> None:
    mixed = [attempt("a", "yes", OK, OK, optimum=1), attempt("b", "yes", OK, OK, OK)]
    summary = summarize(mixed, correct, "well_formed")
    assert summary.optimum == Estimate(None)
    assert summary.over_call.value == 1.0  # of the one question whose optimum is known


def test_several_attempts_at_a_question_are_one_question() -> None:
    summary = summarize([attempt("a", "yes"), attempt("a", "no")], correct, "well_formed")
    assert (summary.questions, summary.attempts) == (1, 2)
    assert summary.em == Estimate(0.5, 0.5, 0.5)  # one question leaves nothing to resample


# -- intervals ---------------------------------------------------------------------------------------

SUMS = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=12)


def ratio(pairs: Sequence[tuple[int, int]], seed: int = 0, scale: float = 1.0) -> Estimate:
    top, bottom = (np.array(column, dtype=float) for column in zip(*pairs, strict=True))
    return ratios({"it": (scale * top, bottom)}, seed, resamples=200)["it"]


@given(SUMS, st.integers(0, 3))
def test_an_interval_stays_within_what_was_seen_and_one_seed_gives_one_interval(
    pairs: list[tuple[int, int]], seed: int
) -> None:
    estimate = ratio(pairs, seed)
    assert estimate == ratio(pairs, seed)
    if sum(bottom for _, bottom in pairs) == 0:
        assert estimate == Estimate(None)
    elif all(bottom for _, bottom in pairs):
        assert estimate.low is not None
        assert estimate.high is not None
        each = [top / bottom for top, bottom in pairs]
        assert min(each) - 1e-9 <= estimate.low <= estimate.high <= max(each) + 1e-9


@given(SUMS, st.sampled_from([2.0, 0.25, 100.0]))
def test_an_interval_scales_with_its_figure(pairs: list[tuple[int, int]], scale: float) -> None:
    one, scaled = ratio(pairs), ratio(pairs, scale=scale)
    for a, b in zip((one.value, one.low, one.high), (scaled.value, scaled.low, scaled.high), strict=True):
        assert (a is None and b is None) or b == pytest.approx(scale * (a or 0.0))


def test_equal_questions_leave_no_doubt() -> None:
    assert ratio([(2, 4)] * 10) == Estimate(0.5, 0.5, 0.5)


def test_the_interval_of_a_mean_agrees_with_the_normal_one() -> None:
    values = np.random.default_rng(1).integers(0, 2, 400).astype(float)
    estimate = ratios({"em": (values, np.ones(400))})["em"]
    assert estimate.value is not None
    assert estimate.low is not None
    assert estimate.high is not None
    half_width = 1.96 * values.std() / np.sqrt(400)  # 0.049
    assert estimate.low == pytest.approx(estimate.value - half_width, abs=0.005)
    assert estimate.high == pytest.approx(estimate.value + half_width, abs=0.005)


# -- cognitive offloading ------------------------------------------------------------------------------

NORMAL = [
    attempt("known, called", "yes", OK),
    attempt("known, not called", "yes"),
    attempt("unknown, called", "yes", OK),
    attempt("unknown, guessed", "no"),
    attempt("beyond help", "no"),
]
CLOSED = [attempt("known, called", "yes"), attempt("known, not called", "yes"), attempt("unknown, called", "no"),
          attempt("unknown, guessed", "no"), attempt("beyond help", None)]  # fmt: skip
FORCED = [attempt("unknown, guessed", "yes", OK), attempt("beyond help", "no", OK)]


def values(figures: Offloading) -> dict[str, float | None]:
    names = ("right_closed", "over_call", "wrong_without_call", "under_call", "under_call_of_all")
    return {name: getattr(figures, name).value for name in names}


def test_offloading_by_hand() -> None:
    assert values(compare_passes(NORMAL, CLOSED, FORCED, correct)) == {
        "right_closed": 2 / 5,
        "over_call": 1 / 2,  # one of the two it knows
        "wrong_without_call": 2 / 5,
        "under_call": 1 / 2,  # one of the two it guessed
        "under_call_of_all": 1 / 5,
    }


def test_who_calls_with_an_answer_opened_for_it_does_not_know() -> None:
    """ "<answer> I am not sure. <search> ..." is no answer from the weights, however it ends."""
    looked_up = [attempt("known, called", "yes", OK), *CLOSED[1:]]
    assert values(compare_passes(NORMAL, looked_up, FORCED, correct))["right_closed"] == 1 / 5


def test_a_pass_that_was_not_run_leaves_its_figures_undefined() -> None:
    figures = values(compare_passes(NORMAL, None, None, correct))
    assert figures == dict.fromkeys(figures, None) | {"wrong_without_call": 2 / 5}


def test_an_agent_that_never_guesses_has_no_under_call() -> None:
    figures = values(compare_passes(NORMAL[:3], CLOSED[:3], [], correct))
    assert (figures["wrong_without_call"], figures["under_call"], figures["under_call_of_all"]) == (0.0, None, 0.0)


def test_one_tool_that_helps_is_enough() -> None:
    forced = [*(replace(t, answer="no") for t in FORCED), *FORCED]
    assert values(compare_passes(NORMAL, CLOSED, forced, correct))["under_call"] == 1 / 2


def test_a_tool_that_was_down_settles_nothing_unless_another_helped() -> None:
    down = [replace(t, stop=Stop.VOID, answer=None) for t in FORCED]
    wrong = [replace(t, answer="no") for t in FORCED]
    assert values(compare_passes(NORMAL, CLOSED, [*wrong, *down], correct))["under_call"] is None
    assert values(compare_passes(NORMAL, CLOSED, [FORCED[0], *down], correct))["under_call"] == 1.0


def test_a_void_pass_leaves_its_question_out() -> None:
    void = replace(FORCED[1], stop=Stop.VOID)
    figures = compare_passes(NORMAL, [replace(CLOSED[0], stop=Stop.VOID), *CLOSED[1:]], [FORCED[0], void], correct)
    assert values(figures) == {
        "right_closed": 1 / 4,
        "over_call": 0.0,
        "wrong_without_call": 2 / 5,
        "under_call": 1.0,
        "under_call_of_all": 1 / 4,
    }
    assert figures.void == 2


def test_the_passes_open_an_answer_and_every_tools_call_where_the_agent_guessed() -> None:
    asked: list[tuple[str, list[str]]] = []
    answers = {
        "": NORMAL,
        "<answer>": CLOSED,
        "<search>": FORCED,
        "<python>": [replace(t, answer="no") for t in FORCED],
    }

    async def collect(problems: Sequence[Problem], opening: str) -> list[Trajectory]:
        asked.append((opening, [p.id.removeprefix("nq/test/") for p in problems]))
        return [t for t in answers[opening] if t.problem in problems]

    problems = [t.problem for t in NORMAL]
    openings = ["<search>", "<python>"]
    figures = asyncio.run(offloading(problems, collect, correct, answer_opening="<answer>", call_openings=openings))
    assert values(figures) == values(compare_passes(NORMAL, CLOSED, FORCED, correct))
    guessed = ["unknown, guessed", "beyond help"]
    assert [opening for opening, _ in asked] == ["", "<answer>", "<search>", "<python>"]
    assert [questions for _, questions in asked[2:]] == [guessed, guessed]


# -- reports -------------------------------------------------------------------------------------------


def two_sources() -> list[Trajectory]:
    return [*FOUR, SPOILT, attempt("x", "yes", source="hotpotqa"), attempt("y", "no", source="hotpotqa")]


def test_data_sets_are_told_apart_and_together() -> None:
    assert list(by_source(two_sources())) == ["nq", "hotpotqa"]
    report = make_report(two_sources(), correct)
    assert report.sources["nq"] == replace(summarize(FOUR, correct, "well_formed"), void=1)
    assert report.sources["hotpotqa"].em.value == 1 / 2
    assert report.overall.em.value == 3 / 6


def test_a_report_survives_saving(tmp_path: Path) -> None:
    report = make_report(two_sources(), correct, offloading=compare_passes(NORMAL, CLOSED, FORCED, correct))
    path = report.save(tmp_path / "eval")
    assert Report.load(tmp_path / "eval") == report
    assert "NaN" not in path.read_text()
    assert json.loads(path.read_text())["sources"]["hotpotqa"]["tp"] == {"value": None, "low": None, "high": None}


def test_what_cannot_be_saved_leaves_the_evaluation_that_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full disk once left half a report, and the run could be neither shown nor compared any more."""

    def full(path: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    report, told = make_report(two_sources(), correct), [Transcript(trajectory=t, group=0) for t in two_sources()]
    tokenizer = word_tokenizer(["a"])
    save(report, told, tmp_path, tokenizer)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert before.keys() == {"report.json", "transcripts.jsonl"}
    monkeypatch.setattr(sealed, "sync", full)
    with pytest.raises(OSError, match="No space left"):
        save(make_report(two_sources()[:1], correct), told[:1], tmp_path, tokenizer)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_folder_without_a_report_says_so(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"holds no report\.json"):
        Report.load(tmp_path)
    for content in ("{", '{"overall": {}}', "[]"):
        (tmp_path / "report.json").write_text(content)
        with pytest.raises(DataError, match=r"report\.json cannot be read: .* Evaluate again, or remove it"):
            Report.load(tmp_path)


def test_loggers_get_defined_figures_only() -> None:
    metrics = make_report(two_sources(), correct).metrics()
    assert metrics["eval/accuracy"] == 3 / 6
    assert metrics["eval/nq/tool_productivity"] == 2 / 3
    assert "eval/hotpotqa/tool_productivity" not in metrics
    assert all(isinstance(value, float) for value in metrics.values())


def test_the_table_shows_every_data_set_with_intervals_and_missing_calls() -> None:
    text = shown(make_report(two_sources(), correct).tables()[0])
    assert "0.750" in text  # TC of nq
    assert "0.00-1.50" in text  # and its interval
    assert "no calls" in text  # TP of hotpotqa
    assert text.index("nq") < text.index("hotpotqa") < text.index("overall")


def test_the_tables_print_every_figure_of_the_json() -> None:
    report = make_report(two_sources(), correct, offloading=compare_passes(NORMAL, CLOSED, FORCED, correct))
    text = " ".join(shown(*report.tables()).split())
    for name in (
        "EM F1 TC TP best too many few emitted executed failed invalid sampled all tokens right with tools off".split()
    ):
        assert name in text
    assert "nq 4 1.25 0.50 0.25 0.25 2.25 4.50" in text


def test_before_and_after_are_compared_where_both_were_measured() -> None:
    before = make_report(FOUR, correct)
    fewer = [attempt("a", "yes", OK, optimum=1), *FOUR[1:3], attempt("d", "yes", OK, optimum=1)]
    text = shown(before_after_table(before, make_report(fewer, correct)))
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in text.splitlines() if line.startswith("│")]
    assert rows[:3] == [
        ["nq", "EM", "0.500", "0.750", "+0.250", "+50.0%", ""],
        ["", "TC", "0.750", "0.750", "+0.000", "+0.0%", "1.000"],
        ["", "TP", "0.667", "1.000", "+0.333", "+50.0%", ""],
    ]
    assert rows[3][0] == "overall"


def test_reports_that_count_different_things_are_not_compared() -> None:
    report = make_report(FOUR, correct)
    with pytest.raises(DataError, match="count different calls"):
        before_after_table(report, make_report(FOUR, correct, "emitted"))
    with pytest.raises(DataError, match="share no data set"):
        before_after_table(report, make_report([attempt("x", "yes", source="hotpotqa")], correct))
