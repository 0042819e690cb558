"""reasoning_gym's data sets by name, and answers that try to run in their verifiers."""

from __future__ import annotations

import builtins
import os
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from otcrl.dialects.torl import ToRL
from otcrl.errors import ConfigError
from otcrl.rewards.given_up import GIVEN_UP
from otcrl.tasks.reasoning_gym import ReasoningGym, is_plain
from otcrl.types import Problem

pytest.importorskip("reasoning_gym", reason="needs otcrl[reasoning]")

from otcrl.tasks.reasoning_gym_verifier import harmless

ROOT = Path(__file__).parents[1]
PLAIN = ReasoningGym(datasets=["letter_counting", "chain_sum"], train_size=20, test_size=10)


@pytest.fixture(scope="module")
def judged() -> ReasoningGym:
    """Data sets whose verifiers run answers."""
    return ReasoningGym(datasets=["spiral_matrix", "countdown", "simple_integration"], train_size=2, test_size=2)


def test_a_data_set_is_asked_by_its_name():
    assert Counter(p.source for p in PLAIN.sample(0, 40)) == {"letter_counting": 20, "chain_sum": 20}
    assert PLAIN.sample(3, 5) == replace(PLAIN).sample(3, 5)
    assert {p.id for p in PLAIN.sample(0, 40)}.isdisjoint(p.id for p in PLAIN.held_out())


def test_nothing_that_is_practised_is_asked_in_an_evaluation():
    tiny = ReasoningGym(
        datasets=["chain_sum"], train_size=200, test_size=200,
        options={"chain_sum": {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}},
    )  # fmt: skip
    held_out = [p.question for p in tiny.held_out()]
    assert 0 < len(held_out) == len(set(held_out)) < 200
    assert set(held_out).isdisjoint(p.question for p in tiny.sample(0, 200))


def test_a_seed_means_the_same_questions_in_every_process():
    """Python orders a set of words anew in each: `ransom_note` draws from one."""
    code = "from tests.test_reasoning_gym import questions; print(questions())"
    found = {
        subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, env=os.environ | {"PYTHONHASHSEED": seed}, capture_output=True,
            text=True, check=True,
        ).stdout
        for seed in ("1", "2")
    }  # fmt: skip
    assert len(found) == 1
    assert len(found.pop()) > 1000


def questions() -> list[str]:
    return [p.question for p in ReasoningGym(datasets=["ransom_note"], train_size=20, test_size=5).held_out()]


@pytest.mark.parametrize("name", ["propositional_logic", "rush_hour"])
def test_where_no_answer_is_known_the_verifier_alone_says_what_is_right(name: str):
    task = ReasoningGym(datasets=[name], train_size=1, test_size=1)
    problem = task.held_out()[0]
    assert problem.answers == ()
    assert task.correct("None", problem) < 0.1


def test_the_verifier_is_the_data_sets_own(judged: ReasoningGym):
    for problem in (*PLAIN.held_out(), *judged.held_out()):
        task = judged if problem in judged.held_out() else PLAIN
        assert task.correct(problem.answers[0], problem) == 1.0
        assert task.correct("no idea", problem) < 1.0
        assert task.correct("", problem) == 0.0


def test_an_answer_of_another_form_is_as_right_as_its_verifier_says(judged: ReasoningGym):
    integral = next(p for p in judged.held_out() if p.source == "simple_integration")
    assert judged.correct(f"({integral.answers[0].replace('+ C', '')}) * 1 + C", integral) == 1.0
    matrix = next(p for p in judged.held_out() if p.source == "spiral_matrix")
    as_list = "[" + ", ".join(matrix.answers[0].split()) + "]"
    assert 0 < judged.correct(as_list, matrix) < 1.0  # partial credit


def attack(matrix: Problem, code: str) -> str:
    """An answer to `spiral_matrix` that its verifier evaluates: a list is."""
    return f"[{code}]"


@pytest.mark.parametrize(
    "code",
    [
        "print(1.0)",
        "__import__('sys').stdout.write('1.0\\n')",
        "__import__('os')._exit(0)",
        "print(__import__('__main__').asked['signature'], 1.0, flush=True), __import__('os')._exit(0)",
        "[f.f_locals for f in [().__class__.__base__.__subclasses__()]]",
        "__import__('sys').exit(0)",
        "open('{path}', 'w').write('x')",
        "9**9**9**9",
    ],
)
def test_an_answer_that_runs_gains_nothing_and_touches_nothing(judged: ReasoningGym, tmp_path: Path, code: str):
    matrix = next(p for p in judged.held_out() if p.source == "spiral_matrix")
    target, begun, given_up = tmp_path / "written", time.monotonic(), GIVEN_UP.count
    task = replace(judged, timeout_s=2.0) if "9**9" in code else judged
    assert task.correct(attack(matrix, code.replace("{path}", str(target))), matrix) < 0.1
    assert not target.exists()
    assert GIVEN_UP.count - given_up == ("9**9" in code)
    assert time.monotonic() - begun < 60


@pytest.mark.parametrize("calls", ["print(1.0)", "sympify('print(1.0)')", "sin('print(1.0)')", "x.subs(x, print(1.0))"])
def test_of_what_sympy_is_given_only_mathematics_is_evaluated(judged: ReasoningGym, calls: str):
    integral = next(p for p in judged.held_out() if p.source == "simple_integration")
    antiderivative = integral.answers[0].replace("+ C", "")
    assert judged.correct(f"({antiderivative}) + Abs(-2) - sqrt(4) + log(E) + C", integral) == 1.0
    assert judged.correct(f"({antiderivative}) + 0 * {calls} + C", integral) < 0.1


def test_no_data_set_misses_what_answers_may_not_do(monkeypatch: pytest.MonkeyPatch):
    """Every verifier still takes its data set's own answers."""
    from reasoning_gym.factory import DATASETS, create_dataset

    missed = []
    for name in DATASETS:
        try:
            dataset = create_dataset(name, seed=0, size=2)
            entries = [dataset[i] for i in range(2)]
        except (AssertionError, ValueError, TypeError, ImportError, OSError):
            continue  # it cannot be made without options
        if is_plain(dataset):
            continue
        before = [dataset.score_answer(str(entry["answer"]), entry) for entry in entries]
        with monkeypatch.context() as context:
            context.setattr(builtins, "eval", harmless)
            missed += [name] * (before != [dataset.score_answer(str(entry["answer"]), entry) for entry in entries])
    assert not missed


def test_only_comparisons_of_texts_run_here(judged: ReasoningGym):
    made = judged._made | PLAIN._made
    assert {name for name, dataset in made.items() if is_plain(dataset)} == {"letter_counting"}


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"datasets": []}, "datasets names none of reasoning_gym's"),
        ({"datasets": ["chain_sums"]}, "reasoning_gym has no 'chain_sums'. Did you mean 'chain_sum'?"),
        (
            {"options": {"chain_sum": {"min_term": 1}}},
            "options.chain_sum: there is no 'min_term'. Did you mean 'min_ter",
        ),
        (
            {"options": {"chain_sum": {"min_terms": 0}}},
            "options.chain_sum {'min_terms': 0}: min_terms must be positive",
        ),
        ({"options": {"sums": {}}}, "options: 'sums' is not in datasets."),
        ({"train_size": -1}, "train_size must be at least 0, got -1"),
    ],
)
def test_what_reasoning_gym_cannot_make_is_refused(settings: dict, why: str):
    with pytest.raises(ConfigError) as caught:
        replace(PLAIN, **settings)
    assert why in str(caught.value)


def test_there_is_nothing_to_demonstrate():
    with pytest.raises(ConfigError, match=r"set sft\.steps=0"):
        PLAIN.demonstrations(0, 1, ToRL(instructions="{question}", free_last_turn=False))
