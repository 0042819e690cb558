"""`otcrl compare` and `otcrl table`: two runs at the same questions, and runs side by side, from their files alone."""

from __future__ import annotations

import csv
import io
import itertools
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from fractions import Fraction
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from otcrl import cli
from otcrl.errors import DataError
from otcrl.evaluate.attempts import Attempt, attempt, is_right, read_attempts
from otcrl.evaluate.grid import Cell, Grid, comma_separated, latex, markdown
from otcrl.evaluate.metrics import RESAMPLES, Estimate, average, figures
from otcrl.evaluate.offloading import compare_passes
from otcrl.evaluate.paired import compare, differences, exact_sign_test, pairs
from otcrl.evaluate.report import ALL, IN_DOMAIN, OUT_OF_DOMAIN, Report, make_report
from otcrl.evaluate.runs import changed_settings, evaluations, find, labels, parameters, steps
from otcrl.evaluate.training import em_curve, time_to, training
from otcrl.rewards.matching import exact_match
from otcrl.rollout.transcripts import Transcript, Transcripts
from otcrl.types import Outcome, Problem, Stop, Trajectory
from tests.make import trajectory
from tests.runs import WordTokenizer

SHARES = ("more_efficient", "less_efficient", "more_accurate", "less_accurate", "unchanged")


def correct(answer: str, problem: Problem) -> float:
    return exact_match(answer, problem.answers)


def answered(name: str, right: bool, calls: int, stop: Stop = Stop.ANSWERED) -> Trajectory:
    """`name` is `data set/question`; its difficulty is the question's last letter."""
    source, _, question = name.partition("/")
    meta = {"level": question[-1]}
    problem = Problem(f"{source}/test/{question}", f"{question}?", ("yes",), source, meta=meta)
    return trajectory(right=right, calls=calls, of=problem, stop=stop)


def write(path: Path, trajectories: Sequence[Trajectory], judged: Callable[[Trajectory], float] | None = None) -> None:
    transcripts = Transcripts(path=path, tokenizer=WordTokenizer(words=["a", "b", "c"]))
    found = [
        Transcript(trajectory=t, group=i, correct=judged(t) if judged else None) for i, t in enumerate(trajectories)
    ]
    transcripts.write(0, found)


def attempts(*trajectories: Trajectory) -> list[Attempt]:
    return [attempt(t, correct) for t in trajectories]


BASELINE = [
    answered("nq/a", True, 2),
    answered("nq/b", False, 2),
    answered("nq/c", True, 1),
    answered("nq/d", False, 1),
    answered("hotpotqa/a", True, 3),
    answered("hotpotqa/b", False, 3),
]
RUN = [
    answered("nq/a", True, 1),  # more efficient
    answered("nq/b", False, 3),  # less efficient
    answered("nq/c", False, 0),  # less accurate
    answered("nq/d", True, 1),  # more accurate, with as many calls
    answered("hotpotqa/a", True, 3),  # unchanged
    answered("hotpotqa/b", True, 1),  # more accurate, with fewer calls
]


# -- pairs ----------------------------------------------------------------------------------------------


def test_the_shares_of_behaviour_by_hand() -> None:
    found = compare(pairs(attempts(*BASELINE), attempts(*RUN)), "well_formed")
    shares = {name: getattr(found.behaviour, name).value for name in (*SHARES, "accurate_fewer")}
    assert shares == pytest.approx(
        {
            "more_efficient": 1 / 6,
            "less_efficient": 1 / 6,
            "more_accurate": 2 / 6,
            "less_accurate": 1 / 6,
            "unchanged": 1 / 6,
            "accurate_fewer": 1 / 6,
        }
    )
    assert found.behaviour.p_efficient == 1.0  # one against one
    assert found.behaviour.p_accurate == 1.0  # two against one: 2 * (1 + 3) / 8
    values = {name: (d.baseline, d.run, d.change.value) for name, d in found.figures.items()}
    assert values["em"] == pytest.approx((3 / 6, 4 / 6, 1 / 6))
    assert values["tc"] == pytest.approx((12 / 6, 9 / 6, -3 / 6))
    assert values["tp"] == pytest.approx((3 / 12, 4 / 9, 4 / 9 - 3 / 12))


OUTCOMES = st.lists(
    st.tuples(st.booleans(), st.integers(0, 4), st.booleans(), st.integers(0, 4)), min_size=1, max_size=9
)


def both(outcomes: Sequence[tuple[bool, int, bool, int]]) -> tuple[list[Attempt], list[Attempt]]:
    first = [answered(f"nq/{k}", right, calls) for k, (right, calls, _, _) in enumerate(outcomes)]
    second = [answered(f"nq/{k}", right, calls) for k, (_, _, right, calls) in enumerate(outcomes)]
    return attempts(*first), attempts(*second)


@settings(deadline=None)
@given(OUTCOMES)
def test_behaviour_splits_the_questions_and_accuracy_explains_the_change_of_em(
    outcomes: list[tuple[bool, int, bool, int]],
) -> None:
    found = compare(pairs(*both(outcomes)), "well_formed")
    share = {name: getattr(found.behaviour, name).value for name in (*SHARES, "accurate_fewer")}
    assert sum(share[name] for name in SHARES) == pytest.approx(1)
    assert share["accurate_fewer"] <= share["more_accurate"]
    assert found.figures["em"].change.value == pytest.approx(share["more_accurate"] - share["less_accurate"], abs=1e-12)


@settings(deadline=None)
@given(OUTCOMES)
def test_changing_sides_changes_every_sign(outcomes: list[tuple[bool, int, bool, int]]) -> None:
    first, second = both(outcomes)
    one, other = compare(pairs(first, second), "well_formed"), compare(pairs(second, first), "well_formed")
    assert one.behaviour.more_efficient == other.behaviour.less_efficient
    assert one.behaviour.p_accurate == other.behaviour.p_accurate
    for name, there in one.figures.items():
        back = other.figures[name]
        assert there.p == back.p
        if there.change.value is not None:
            assert back.change.value is not None
            assert back.change.value == -there.change.value


@settings(deadline=None)
@given(OUTCOMES)
def test_a_run_against_itself_shows_nothing(outcomes: list[tuple[bool, int, bool, int]]) -> None:
    first, _ = both(outcomes)
    found = compare(pairs(first, first), "well_formed")
    assert found.behaviour.unchanged.value == 1
    assert {(d.change, d.p) for d in found.figures.values()} <= {(Estimate(0.0, 0.0, 0.0), 1.0), (Estimate(None), None)}


# -- tests ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("wins", "losses"), itertools.product(range(6), range(6)))
def test_the_exact_sign_test_counts_what_is_at_least_as_lopsided(wins: int, losses: int) -> None:
    count, seen = wins + losses, abs(wins - losses)
    every = [sum(signs) for signs in itertools.product((-1, 1), repeat=count)]
    assert exact_sign_test(wins, losses) == sum(abs(total) >= seen for total in every) / 2**count


def test_the_exact_sign_test_of_thousands_is_exact_too() -> None:
    tail = sum(Fraction(math.comb(9900, i), 2**9900) for i in range(4801))
    assert exact_sign_test(4800, 5100) == float(2 * tail)


def test_the_interval_of_a_paired_difference_agrees_with_the_normal_one_and_pairs_make_it_narrow() -> None:
    generator = np.random.default_rng(0)
    before = generator.random(400) < 0.5
    after = np.where(generator.random(400) < 0.1, ~before, before)  # nine in ten stay as they are
    first, second = both([(bool(a), 1, bool(b), 1) for a, b in zip(before, after, strict=True)])
    change = differences(pairs(first, second), "well_formed")["em"].change
    assert change.low is not None
    assert change.high is not None
    delta = after.astype(float) - before
    half_width = 1.96 * delta.std() / np.sqrt(400)
    assert (change.high - change.low) / 2 == pytest.approx(half_width, rel=0.1)
    unpaired = 1.96 * np.sqrt((before.var() + after.var()) / 400)
    assert half_width < 0.5 * unpaired


def test_a_difference_beyond_all_doubt_has_the_least_p_and_none_has_a_p_of_one() -> None:
    fewer = both([(True, 2, True, 1)] * 30)
    found = differences(pairs(*fewer), "well_formed")
    assert found["tc"].p == pytest.approx(2 / (RESAMPLES + 1))
    assert found["em"].p == 1.0


def test_tool_productivity_is_not_compared_where_nobody_called() -> None:
    found = differences(pairs(*both([(True, 2, True, 0)] * 3)), "well_formed")["tp"]
    assert (found.baseline, found.run, found.change, found.p) == (0.5, None, Estimate(None), None)


def test_one_seed_gives_one_comparison() -> None:
    first, second = attempts(*BASELINE), attempts(*RUN)
    assert compare(pairs(first, second), "well_formed", seed=3) == compare(pairs(first, second), "well_formed", seed=3)


# -- other questions ----------------------------------------------------------------------------------------


def test_runs_at_other_questions_are_refused_with_what_differs() -> None:
    other = attempts(*RUN[1:], answered("nq/x", True, 0), answered("nq/y", True, 0))
    with pytest.raises(DataError) as refused:
        pairs(attempts(*BASELINE), other)
    assert str(refused.value) == (
        "the runs answered different questions, 1 only in the baseline ('nq/test/a') and 2 only in the run "
        "('nq/test/x'): add common=true to compare on the 5 that both have"
    )
    assert [a.id for (a,), _ in pairs(attempts(*BASELINE), other, common=True)] == [t.problem.id for t in BASELINE[1:]]
    with pytest.raises(DataError, match="different questions"):
        pairs(attempts(*BASELINE[:2]), attempts(*RUN[2:]), common=True)


@pytest.mark.parametrize("changed", [{"question": "another?"}, {"answers": ("no",)}, {"source": "triviaqa"}])
def test_one_id_for_two_questions_is_refused(changed: dict[str, object]) -> None:
    first = attempts(*BASELINE)
    other = [replace(first[0], **changed), *first[1:]]  # pyright: ignore[reportArgumentType]
    with pytest.raises(DataError, match=rf"'nq/test/a' is not the same question everywhere: its {min(changed)}:"):
        pairs(first, other, common=True)


def test_several_attempts_at_a_question_count_by_their_mean() -> None:
    baseline = attempts(answered("nq/a", True, 2), answered("nq/a", False, 0), answered("nq/b", True, 1))
    run = attempts(answered("nq/b", True, 1), *[answered("nq/a", True, 1)] * 3, answered("nq/a", False, 4))
    found = compare(pairs(baseline, run), "well_formed")
    assert (found.questions, found.attempts) == (2, 8)
    values = {name: (d.baseline, d.run) for name, d in found.figures.items()}
    assert values["em"] == (pytest.approx((1 / 2 + 1) / 2), pytest.approx((3 / 4 + 1) / 2))
    assert values["tc"] == (pytest.approx((2 / 2 + 1) / 2), pytest.approx((7 / 4 + 1) / 2))
    assert values["tp"] == (pytest.approx(1.5 / 2), pytest.approx(1.75 / 2.75))
    shares = {name: getattr(found.behaviour, name).value for name in (*SHARES, "accurate_fewer")}
    assert shares == {  # of the eight pairs at a, and the one at b
        "more_efficient": 3 / 8 / 2,
        "less_efficient": 1 / 8 / 2,
        "more_accurate": 3 / 8 / 2,
        "less_accurate": 1 / 8 / 2,
        "unchanged": 1 / 2,
        "accurate_fewer": 0,
    }
    assert (found.behaviour.p_efficient, found.behaviour.p_accurate) == (1, 1)  # of one question


@settings(deadline=None)
@given(OUTCOMES, st.integers(1, 3), st.integers(1, 3))
def test_the_same_attempts_again_are_no_more_questions(
    outcomes: list[tuple[bool, int, bool, int]], times: int, other_times: int
) -> None:
    first, second = both(outcomes)
    once, again = (
        compare(pairs(*each), "well_formed") for each in ((first, second), (first * times, second * other_times))
    )
    assert replace(again, attempts=once.attempts) == once


def test_a_void_attempt_of_several_leaves_the_others() -> None:
    spoilt = attempts(replace(BASELINE[0], stop=Stop.VOID), *BASELINE)
    assert compare(pairs(spoilt, attempts(*RUN)), "well_formed") == compare(
        pairs(attempts(*BASELINE), attempts(*RUN)), "well_formed"
    )


def test_a_void_attempt_leaves_its_question_out_of_both_runs() -> None:
    spoilt = [replace(BASELINE[0], stop=Stop.VOID), *BASELINE[1:]]
    found = compare(pairs(attempts(*spoilt), attempts(*RUN)), "well_formed")
    assert found == replace(compare(pairs(attempts(*BASELINE[1:]), attempts(*RUN[1:])), "well_formed"), void=1)


# -- means over data sets -----------------------------------------------------------------------------------


def test_the_mean_over_data_sets_gives_each_of_them_the_same_weight() -> None:
    sets = [attempts(*BASELINE[:4]), attempts(*RUN[4:])]
    found = average(sets, "well_formed")
    assert found.sets == 2
    assert found.em.value == (2 / 4 + 2 / 2) / 2
    assert found.tc.value == (6 / 4 + 4 / 2) / 2
    assert found.tp.value == pytest.approx((2 / 4 + 2 / 2) / (6 / 4 + 4 / 2))
    alone = average(sets[:1], "well_formed")
    assert alone.em.value == figures(sets[0], "well_formed").em.value


def test_a_set_without_calls_does_not_undo_the_mean_productivity_and_no_calls_at_all_do() -> None:
    silent, calling = attempts(answered("nq/a", True, 0)), attempts(answered("hotpotqa/a", True, 1))
    found = average([silent, calling], "well_formed")
    assert (found.tp.value, found.tc.value) == (2.0, 0.5)
    assert average([silent, silent], "well_formed").tp == Estimate(None)


def test_sets_of_one_size_average_to_the_figures_of_them_all() -> None:
    sets = [attempts(*BASELINE[:2]), attempts(*BASELINE[4:])]
    whole, found = figures([a for own in sets for a in own], "well_formed"), average(sets, "well_formed")
    for name in ("em", "f1", "tc", "tp"):
        assert getattr(found, name).value == pytest.approx(getattr(whole, name).value)


def test_the_interval_of_a_mean_over_sets_agrees_with_the_normal_one() -> None:
    right = np.random.default_rng(0).random((2, 200)) < np.array([[0.3], [0.8]])
    sets = [attempts(*(answered(f"{s}/{k}", bool(r), 1) for k, r in enumerate(own))) for s, own in enumerate(right)]
    found = average(sets, "well_formed").em
    assert found.low is not None
    assert found.high is not None
    half_width = 1.96 * np.sqrt(right.var(axis=1).sum() / 200) / 2
    assert (found.high - found.low) / 2 == pytest.approx(half_width, rel=0.1)


def test_a_report_averages_the_sets_in_and_out_of_domain_apart() -> None:
    more = [*BASELINE, answered("musique/a", True, 4), answered("bamboogle/a", False, 2)]
    report = make_report(more, correct, in_domain=["nq", "hotpotqa", "not asked"])
    assert report.in_domain == ("nq", "hotpotqa")
    assert report.domains() == {IN_DOMAIN: ["nq", "hotpotqa"], OUT_OF_DOMAIN: ["musique", "bamboogle"]}
    assert {name: found.sets for name, found in report.averages.items()} == {IN_DOMAIN: 2, OUT_OF_DOMAIN: 2, ALL: 4}
    assert report.averages[OUT_OF_DOMAIN].em.value == 0.5
    assert report.metrics()["eval/out_of_domain/tool_calls"] == 3
    assert make_report(BASELINE, correct).averages.keys() == {ALL}
    assert make_report(BASELINE[:4], correct).averages == {}


def test_a_report_tells_figures_by_difficulty_in_its_order() -> None:
    report = make_report(BASELINE, correct, difficulty_column="level")
    assert {name: list(levels) for name, levels in report.difficulty.items()} == {
        "nq": ["a", "b", "c", "d"],
        "hotpotqa": ["a", "b"],
    }
    assert report.difficulty["nq"]["c"].tc.value == 1
    assert make_report(BASELINE, correct).difficulty == {}
    known = [trajectory(of=Problem(f"s/t/{n}", "?", ("yes",), "s", optimal_calls=n)) for n in (10, 0, 2)]
    assert list(make_report(known, correct).difficulty["s"]) == ["0 calls", "2 calls", "10 calls"]


def test_a_report_with_all_of_that_survives_saving_and_one_from_before_is_still_read(tmp_path: Path) -> None:
    report = make_report(BASELINE, correct, temperature=0.0, in_domain=["nq"], difficulty_column="level")
    report.save(tmp_path)
    assert Report.load(tmp_path) == report
    old = {k: v for k, v in report.to_json().items() if k in ("overall", "sources", "counter", "offloading")}
    (tmp_path / "report.json").write_text(json.dumps(old))
    assert Report.load(tmp_path).averages == {}


# -- the files of a run ---------------------------------------------------------------------------------------


def save(
    run: Path,
    evaluated: Mapping[str, Sequence[Trajectory]],
    settings: Mapping[str, object] | None = None,
    rows: Sequence[Mapping[str, object]] = (),
    change: Callable[[Report], Report] = lambda report: report,
) -> Path:
    """A run directory as training and evaluation leave it."""
    for name, trajectories in evaluated.items():
        folder = run / "eval" / name
        report = make_report(trajectories, correct, temperature=0.0, in_domain=["nq"], difficulty_column="level")
        change(report).save(folder)
        judged = partial(is_right, correct=correct)
        write(folder / "transcripts.jsonl", trajectories, judged)
    (run / "config.yaml").write_text(yaml.safe_dump({"name": run.name, "run_dir": str(run), **(settings or {})}))
    if rows:
        lines = [json.dumps({"step": step, **row}) for step, row in enumerate(rows)]
        (run / "metrics.jsonl").write_text("\n".join([*lines, json.dumps({"step": len(rows), "eval/accuracy": 1}), ""]))
    return run


TRAJECTORIES = 8  # of a step


def step(em: float, seconds: float = 10.0, calls: float = 1.0) -> dict[str, object]:
    return {
        "reward/correct": em,
        "calls/well_formed": calls,
        "rollout/sampled_tokens": 20.0,
        "rollout/tokens": 50.0,
        "perf/tokens_per_s": 50.0 * TRAJECTORIES / seconds,
        "perf/tool_s": 0.5,
        "time/rollout_s": 4.0,
        "time/step_s": seconds,
        "update/kl": None,
    }


@pytest.fixture
def runs(tmp_path: Path) -> tuple[Path, Path]:
    slow, quick = [step(0.1 * k, calls=2.0) for k in range(6)], [step(0.2 * k, seconds=5.0) for k in range(6)]
    outcome = {"reward": {"_target_": "OutcomeReward"}, "seed": 0}
    otc = {"reward": {"_target_": "OTCReward", "alpha": 1.0}, "seed": 0}
    return (
        save(tmp_path / "outcome", {"before": BASELINE, "after": BASELINE}, outcome, slow),
        save(tmp_path / "otc", {"before": BASELINE, "after": RUN}, otc, quick),
    )


def test_transcripts_give_back_the_attempts_that_the_report_was_made_of(runs: tuple[Path, Path]) -> None:
    voided = [*RUN, answered("nq/e", True, 1, stop=Stop.VOID)]
    failed = trajectory(right=False, outcomes=(Outcome.MODEL_ERROR, Outcome.INVALID), answer=None)
    folder = save(runs[0].parent / "more", {"after": [*voided, failed]}) / "eval/after"
    assert read_attempts(folder) == attempts(*voided, failed)


def test_transcripts_that_cannot_say_who_was_right_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "transcripts.jsonl", RUN[:1])
    with pytest.raises(DataError, match="line 1 does not say whether its answer is right"):
        read_attempts(tmp_path)
    row = json.loads((tmp_path / "transcripts.jsonl").read_text())
    del row["correct"]
    (tmp_path / "transcripts.jsonl").write_text(json.dumps(row))
    with pytest.raises(DataError, match="line 1 has no 'correct': an earlier otcrl wrote it; evaluate again"):
        read_attempts(tmp_path)
    (tmp_path / "transcripts.jsonl").write_text("[]")
    with pytest.raises(DataError, match="expected a transcript"):
        read_attempts(tmp_path)


def test_the_evaluation_that_is_meant_is_found(tmp_path: Path) -> None:
    run = save(tmp_path / "run", dict.fromkeys(("step-000020/greedy", "after", "before", "step-000003/greedy"), RUN))
    assert evaluations(run) == ["before", "step-000003/greedy", "step-000020/greedy", "after"]
    assert find(run).name == "after"
    assert find(run, "before").step == 0
    inside = find(run / "eval/step-000020/greedy")
    assert (inside.run, inside.name, inside.step, inside.label) == (run, "step-000020/greedy", 20, "run")
    save(run, {"nq/greedy": RUN})
    (run / "eval/nq/greedy/config.yaml").write_text("step: '3'\n")
    assert find(run, "nq/greedy").step == 3, "otcrl eval step=3 as=nq"
    with pytest.raises(DataError, match=r"holds no evaluation 'befor'\. Did you mean 'before'"):
        find(run, "befor")
    with pytest.raises(DataError, match="holds no evaluation"):
        find(tmp_path)
    other = save(tmp_path / "other", {"direct/greedy": RUN, "rag/greedy": RUN})
    with pytest.raises(DataError, match=r"several evaluations: add eval=NAME. Choose from: direct/greedy, rag/greedy"):
        find(other)


def test_runs_of_one_name_are_told_apart(tmp_path: Path) -> None:
    a, b = (save(tmp_path / folder / "otc", {"before": RUN, "after": RUN}) for folder in "ab")
    assert labels([find(a), find(a, "before")]) == ["otc, after", "otc, before"]
    assert labels([find(a), find(b)]) == [str(a / "eval/after"), str(b / "eval/after")]


def test_parameters_are_counted_in_the_models_files(tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    run = save(tmp_path / "run", {"after": RUN})
    assert parameters(find(run)) is None
    (run / "model").mkdir()
    for part in (1, 2):
        tensors = {f"w{part}": np.zeros((3, part), np.float32), f"b{part}": np.zeros(5, np.float32)}
        save_file(tensors, run / "model" / f"model-{part}.safetensors")
    assert parameters(find(run)) == 3 + 5 + 6 + 5


def test_settings_that_differ_are_named(runs: tuple[Path, Path]) -> None:
    assert changed_settings(find(runs[0]).config, find(runs[1]).config) == [
        ("reward._target_", "OutcomeReward", "OTCReward"),
        ("reward.alpha", None, 1.0),
    ]


# -- training -------------------------------------------------------------------------------------------------


def test_the_cost_of_training_by_hand(runs: tuple[Path, Path]) -> None:
    found = training(steps(runs[1]), window=2)
    assert (found.steps, found.seconds) == (6, 30.0)
    assert found.em == pytest.approx((0.8 + 1.0) / 2)
    assert found.means["calls/well_formed"] == 1
    assert found.means["perf/tool_s"] == 0.5
    assert found.per_step == {"calls/well_formed": 8, "rollout/sampled_tokens": 160, "perf/tool_s": 4}
    unequal = [step(0.5, calls=1.0), step(0.5, calls=3.0) | {"perf/tokens_per_s": 50.0 * 2 / 10}]
    assert training(unequal).per_step["calls/well_formed"] == (8 * 1 + 2 * 3) / 2, "a step counts by what was played"
    unlogged = [{name: value for name, value in row.items() if name != "perf/tool_s"} for row in unequal]
    assert training(unlogged).per_step["perf/tool_s"] is None


def test_the_time_to_an_em_is_that_of_the_first_step_whose_window_reaches_it(runs: tuple[Path, Path]) -> None:
    rows = steps(runs[1])
    assert em_curve(rows, window=2) == pytest.approx([0.1, 0.3, 0.5, 0.7, 0.9])
    assert time_to(rows, 0.3, window=2) is not None
    reached = time_to(rows, 0.49, window=2)
    assert reached is not None
    assert (reached.step, reached.seconds, reached.at_most) == (4, 20.0, False)
    assert time_to(rows, 0.95, window=2) is None
    assert em_curve(rows, window=100) == pytest.approx([0.5])  # fewer steps than the window: all of them
    unlogged = [{k: v for k, v in row.items() if k != "reward/correct"} for row in rows]
    assert (em_curve(unlogged), time_to(unlogged, 0.1), training(unlogged).em) == ([], None, None)


# -- the commands -----------------------------------------------------------------------------------------------


def shown(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    assert cli.main([str(word) for word in words]) == 0
    return capsys.readouterr().out


def refusal(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    assert cli.main([str(word) for word in words]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    return lines[0].removeprefix("otcrl: error: ")


@pytest.fixture(autouse=True)
def _wide_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rich._console", None)
    monkeypatch.setenv("COLUMNS", "220")


def test_compare_tells_figures_behaviour_costs_and_settings(
    runs: tuple[Path, Path], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    text = " ".join(shown(capsys, "compare", *runs, "window=2", f"json={tmp_path / 'out.json'}").split())
    assert "otc against outcome, the baseline" in text
    for words in (
        "overall TC 2.000 1.500 -0.500 -",
        "nq 4 25.0 25.0 25.0 25.0 0.0 0.0 1.000 1.000",
        "EM at the end 0.450 0.900",
        "calls per step 16.000 8.000 (▼50.0%)",
        "response tokens per step 160.0 160.0 (▲0.0%)",
        "tool seconds per step 4.000 4.000 (▲0.0%)",
        "seconds per step 10.000 5.000 (▼50.0%)",
        "calls per trajectory 2.000 1.000 (▼50.0%)",
        "seconds of all steps 60.000 30.000 (▼50.0%)",
        "steps to EM 0.450 6 4",  # the highest of the one that has less
        "seconds to EM 0.450 60.000 20.000",
        "reward._target_: OutcomeReward | OTCReward",
        "p: paired bootstrap over questions",
    ):
        assert words in text, words
    said = json.loads((tmp_path / "out.json").read_text())
    assert said["sets"]["overall"]["behaviour"]["more_accurate"]["value"] == pytest.approx(2 / 6)
    assert said["training"]["runs"]["otc"]["to_em"] == {"step": 4, "seconds": 20.0, "at_most": False}
    assert said["settings"][0] == ["reward._target_", "OutcomeReward", "OTCReward"]


def test_compare_says_when_an_em_was_never_reached(runs: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert shown(capsys, "compare", *runs, "window=2", "em=0.95").count("not reached") == 4  # step and seconds, twice


def test_an_em_that_the_first_steps_had_is_said_to_be_so(
    runs: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    flat = save(runs[0].parent / "flat", {"after": BASELINE}, rows=[step(0.5)] * 30)
    risen = save(runs[0].parent / "risen", {"after": RUN}, rows=[step(0.25)] * 20 + [step(0.75)] * 10)
    for pair in ((flat, risen), (risen, flat)):  # both can be asked for it, whichever is the baseline
        rows = {row[0]: row[1:] for row in rows_of(shown(capsys, "table", *pair, "of=training"))}
        forwards = slice(None, None, 1 if pair[0] is flat else -1)
        assert rows["steps to EM 0.500"][forwards] == ["≤10", "25"]
        assert rows["seconds to EM 0.500"][forwards] == ["≤100.0", "250.0"]
    fallen = save(runs[0].parent / "fallen", {"after": RUN}, rows=[step(0.5)] * 20 + [step(0.25)] * 10)
    rows = {row[0]: row[1:] for row in rows_of(shown(capsys, "table", flat, fallen, "of=training"))}
    assert rows["steps to EM 0.500"] == ["≤10", "≤10"]
    assert r"$\leq$10" in shown(capsys, "table", flat, fallen, "of=training", "format=latex")


def test_runs_that_were_never_trained_are_compared_as_well(
    runs: tuple[Path, Path], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    untrained = save(runs[0].parent / "rag", {"greedy": RUN})
    text = shown(capsys, "compare", untrained, runs[1], f"json={tmp_path / 'out.json'}")
    assert "Training" not in text
    assert list(json.loads((tmp_path / "out.json").read_text())["training"]["runs"]) == ["otc"]


def test_runs_with_several_attempts_are_compared_and_tabled(
    runs: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    several = save(runs[0].parent / "several", {"sampled": [*RUN, answered("nq/a", False, 2), *RUN[1:]]})
    text = " ".join(shown(capsys, "compare", runs[0], several).split())
    assert "18 attempts at 6 questions: figures are means over a question's attempts" in text
    assert "overall EM 0.500 0.583 0.083" in text  # nq/a is right in one of two
    assert rows_of(shown(capsys, "table", several))[-1][1] == "0.375", "nq: 3 of 8 attempts"
    behaviour = rows_of(shown(capsys, "table", several, "of=behaviour", f"baseline={runs[0]}"))[2]
    assert behaviour[:6] == ["nq", "4", "12.5", "25.0", "25.0", "37.5"]


def test_compare_is_loud_about_questions_that_it_leaves_out(
    runs: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    fewer = save(runs[0].parent / "fewer", {"after": RUN[1:]})
    assert "add common=true to compare on the 5 that both have" in refusal(capsys, "compare", runs[0], fewer)
    text = " ".join(shown(capsys, "compare", runs[0], fewer, "common=true").split())
    assert "Only on the 5 questions that both runs answered; 1 answers to others are left out" in text


def test_compare_refuses_what_it_cannot_read(runs: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert refusal(capsys, "compare", runs[0]) == "otcrl compare needs two runs, the baseline first; got 1"
    assert refusal(capsys, "compare", *runs, "comon=true").startswith("compare.comon is not a setting of ")
    assert "Did you mean 'common'?" in refusal(capsys, "compare", *runs, "comon=true")
    assert refusal(capsys, "compare", *runs, "window=0") == "compare: window must be at least 1 step, got 0"
    assert refusal(capsys, "compare", *runs, "em=2") == "compare: em must be a share between 0 and 1, got 2.0"
    assert "Did you mean 'executed'?" in refusal(capsys, "compare", *runs, "counter=execute")
    assert refusal(capsys, "compare", *runs, "seed=-1") == "compare: seed must be at least 0, got -1"
    assert refusal(capsys, "compare", *runs, "seed=x") == "compare.seed must be int, got 'x'"
    assert refusal(capsys, "compare", *runs, "seed=1", "seed=2") == "seed is given twice"
    assert "holds no evaluation" in refusal(capsys, "compare", runs[0], runs[0].parent / "none")
    assert (
        refusal(capsys, "compare", *runs, "json=/none/such.json") == "json=/none/such.json: No such file or directory"
    )
    assert refusal(capsys, "table", *runs, "out=/none/such.md") == "out=/none/such.md: No such file or directory"
    other = save(runs[0].parent / "emitted", {"after": RUN}, change=lambda report: replace(report, counter="emitted"))
    assert "the reports count different calls, emitted and well_formed" in refusal(capsys, "compare", runs[0], other)
    assert "emitted" in shown(capsys, "compare", runs[0], other, "counter=emitted")


def rows_of(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]


def test_the_table_of_results_has_every_set_and_the_means(
    runs: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    head, _, first, second = rows_of(shown(capsys, "table", *runs, f"baseline={runs[0]}"))
    assert head == ["run", "nq EM", "nq TC", "nq TP", "hotpotqa EM", "hotpotqa TC", "hotpotqa TP",
                    "all sets, mean EM", "all sets, mean TC", "all sets, mean TP",
                    "overall EM", "overall TC", "overall TP"]  # fmt: skip
    assert first[:4] == ["outcome", "0.500", "1.500", "0.333"]
    assert second[:4] == ["otc", "0.500", "1.250 (▼16.7%)", "0.400 (▲20.0%)"]
    assert second[7] == "0.750"


def test_a_table_says_what_does_not_compare(runs: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    fewer = save(runs[0].parent / "fewer", {"after": RUN[1:4]})
    text = shown(capsys, "table", *runs, fewer)
    assert "No means: the runs were not evaluated on the same data sets" in text
    assert "Questions of nq differ: 4 (outcome), 4 (otc), 3 (fewer)" in text
    assert rows_of(text)[-1] == ["fewer", "0.333", "1.333", "0.250", "-", "-", "-"]
    other = save(runs[0].parent / "emitted", {"after": RUN}, change=lambda report: replace(report, counter="emitted"))
    assert "the reports count different calls" in refusal(capsys, "table", runs[0], other)


def test_a_baseline_of_other_sets_is_compared_where_it_can_be_and_named(
    runs: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    fewer = save(runs[0].parent / "fewer", {"after": BASELINE[:3]})
    text = shown(capsys, "table", runs[1], f"baseline={fewer}")
    assert "No changes of means: the baseline was evaluated on other data sets" in text
    assert "Questions of nq differ: 4 (otc), 3 (fewer)" in text
    row = dict(zip(*rows_of(text)[::2], strict=True))
    assert "▼" in row["nq TC"]
    assert not {"▼", "▲"} & set(row["overall TC"] + row["all sets, mean TC"] + row["hotpotqa TC"])


def test_the_same_table_in_latex_and_csv(
    runs: tuple[Path, Path], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    text = shown(capsys, "table", *runs, f"baseline={runs[0]}", "format=latex")
    assert r"\multicolumn{3}{c}{nq}" in text
    assert r"otc & 0.500 & 1.250 ($\downarrow$16.7\%) & 0.400 ($\uparrow$20.0\%)" in text
    assert text.count(r"\\") == 4  # two heads, two runs
    out = tmp_path / "table.csv"
    assert shown(capsys, "table", *runs, f"baseline={runs[0]}", "format=csv", "intervals=true", f"out={out}") == ""
    first, second = csv.DictReader(io.StringIO(out.read_text()))
    assert float(second["nq TC"]) == 1.25
    assert float(second["nq TC change"]) == pytest.approx(-1 / 6)
    assert float(first["nq EM low"]) <= 0.5 <= float(first["nq EM high"])
    assert first["nq TC change"] == ""


def test_calls_by_data_set_and_difficulty(runs: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    rows = rows_of(shown(capsys, "table", *runs, "of=difficulty"))
    assert rows[0] == ["data set", "difficulty", "n", "outcome EM", "outcome TC", "otc EM", "otc TC"]
    assert rows[2] == ["nq", "a", "1", "1.000", "2.000", "1.000", "1.000"]
    assert len(rows) == 2 + 6
    plain = save(runs[0].parent / "plain", {"after": RUN}, change=lambda report: replace(report, difficulty={}))
    assert "evaluate.difficulty=COLUMN" in refusal(capsys, "table", plain, "of=difficulty")


def test_behaviour_of_several_runs(runs: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    text = shown(capsys, "table", *runs, "of=behaviour", f"baseline={runs[0]}")
    assert rows_of(text)[-1][:4] == ["overall", "6", "16.7", "16.7"]
    assert "add baseline=RUN" in refusal(capsys, "table", *runs, "of=behaviour")
    both_evaluations = shown(capsys, "table", runs[1], "of=behaviour", f"baseline={runs[0]}", "eval=all")
    assert [row[:2] for row in rows_of(both_evaluations)[2:]] == [
        ["otc, before", "nq"], ["otc, before", "hotpotqa"], ["otc, before", "overall"],
        ["otc, after", "nq"], ["otc, after", "hotpotqa"], ["otc, after", "overall"],
    ]  # fmt: skip


def test_costs_of_training_against_the_first_run(runs: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    rows = rows_of(shown(capsys, "table", *runs, "of=training", "window=2"))
    assert rows[0] == ["figure", "outcome", "otc"]
    assert rows[-3:] == [
        ["seconds of all steps", "60.000", "30.000 (▼50.0%)"],
        ["steps to EM 0.450", "6", "4"],
        ["seconds to EM 0.450", "60.000", "20.000"],
    ]
    untrained = save(runs[0].parent / "rag", {"greedy": RUN})
    assert "rag was not trained" in refusal(capsys, "table", runs[0], untrained, "of=training")


def test_offloading_by_model_size_and_training_step(
    runs: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    from safetensors.numpy import save_file

    without_calls = [replace(t, tool_calls=()) for t in BASELINE]
    passes = compare_passes(RUN, without_calls, [], correct)
    names = {"before": RUN, "step-000002/greedy": RUN, "after": BASELINE}
    for name, width in (("large", 9), ("small", 2)):
        run = save(runs[0].parent / name, names, rows=[step(0.5)] * 4, change=lambda r: replace(r, offloading=passes))
        (run / "model").mkdir()
        save_file({"w": np.zeros(width, np.float32)}, run / "model/model.safetensors")
    large, small = (runs[0].parent / name for name in ("large", "small"))
    text = shown(capsys, "table", large, small, runs[0], "of=offloading", "eval=all")
    rows = rows_of(text)
    assert [row[1:3] for row in rows[2:]] == [["2", "0"], ["2", "2"], ["2", "4"], ["9", "0"], ["9", "2"], ["9", "4"]]
    assert rows[2][5] == "50.0"  # right with tools off
    assert "2 evaluations without these passes are left out" in text
    assert "evaluate.offloading=true" in refusal(capsys, "table", runs[0], "of=offloading")


def test_wrong_words_for_a_table_are_refused(runs: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert refusal(capsys, "table") == "otcrl table needs at least one run"
    assert "Did you mean 'results'?" in refusal(capsys, "table", runs[0], "of=result")
    assert "Did you mean 'latex'?" in refusal(capsys, "table", runs[0], "format=latx")


# -- forms ------------------------------------------------------------------------------------------------------

TEXT = st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"]), max_size=12)


@given(st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=4))
def test_any_text_survives_every_form(rows: list[tuple[str, str]]) -> None:
    grid = Grid(title="t", columns=[("g", "a"), ("g", "b")], rows=rows)
    assert list(csv.reader(io.StringIO(comma_separated(grid))))[1:] == [list(row) for row in rows]
    assert len(markdown(grid).splitlines()) == 4 + len(rows)
    body = latex(grid).split(r"\midrule")[1].split(r"\bottomrule")[0].strip("\n").split("\n")
    assert len(body) == len(rows)
    for line in body:
        assert len(re.findall(r"(?<!\\)&", line)) == 1  # what separates cells, and no other


def test_no_text_is_taken_for_a_command_of_latex() -> None:
    text = latex(Grid(title="t", columns=[("", "a"), ("", "p < .001")], rows=[["[best] a|b", "<0.001"], ["*", "~"]]))
    assert r"p $<$ .001" in text
    assert r"{}[best] a$|$b & $<$0.001 \\" in text  # a bracket after the end of a line would be its argument
    assert r"{}* & \textasciitilde{} \\" in text


def test_a_cell_is_rounded_for_people_and_whole_for_programs() -> None:
    row = [Cell(1 / 3), Cell(None), Cell(1234.5678), Cell(7, digits=0), Cell(1e-9, least=0.001)]
    grid = Grid(title="t", columns=[("", name) for name in "abcde"], rows=[row])
    assert markdown(grid).splitlines()[-1] == "| 0.333 | - | 1,234.6 | 7 | <0.001 |"
    assert comma_separated(grid).splitlines()[1] == f"{1 / 3!r},,1234.5678,7,1e-09"
