"""When one answer is the same as another."""

from __future__ import annotations

import random
import re
import signal
import string
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from otcrl.errors import DataError
from otcrl.rewards.given_up import GIVEN_UP, GivenUp
from otcrl.rewards.matching import as_number, exact_match, f1, math_equal, mentions, normalize_answer
from otcrl.rewards.math_worker import MathWorker, _limited

WORDS = st.text(alphabet="aAtThHeE nN.,'-é9 ", max_size=30)


def search_r1_normalize(text: str) -> str:
    """`normalize_answer` of Search-R1's qa_em.py, step by step as published."""
    text = text.lower()
    text = "".join(ch for ch in text if ch not in set(string.punctuation))
    text = re.sub(r"\b(a|an|the)\b", " ", text)
    return " ".join(text.split())


@pytest.mark.parametrize(
    ("text", "normalized"),
    [
        ("The  Beatles!", "beatles"),
        ("An apple a day", "apple day"),
        ("U.S.A.", "usa"),  # punctuation goes before articles do
        ("Theatre", "theatre"),
        ("the", ""),
        ("  \n", ""),
    ],
)
def test_answers_are_normalized_as_in_search_r1(text: str, normalized: str) -> None:
    assert normalize_answer(text) == normalized == search_r1_normalize(text)


@given(WORDS | st.text(max_size=30))
def test_normalization_agrees_with_search_r1_on_any_text(text: str) -> None:
    assert normalize_answer(text) == search_r1_normalize(text)


@given(WORDS.filter(lambda text: any(c.isalnum() for c in text)))
def test_case_spacing_and_punctuation_never_decide(text: str) -> None:
    assert exact_match(f"  {text.upper()} !", [text]) == 1.0


@pytest.mark.parametrize(
    ("answer", "answers", "expected"),
    [
        ("the Beatles", ["Beatles"], 1.0),
        ("Trent", ["River Trent", "Trent"], 1.0),
        ("River", ["River Trent", "Trent"], 0.0),
        ("", ["Trent"], 0.0),
        ("anything", [], 0.0),
        ("", ["A"], 0.0),  # of which no word is left
        (".", ["The The"], 0.0),
        ("", ["%"], 0.0),
        ("%", ["%"], 1.0),
        ("the", ["The The"], 0.0),
        ("a", ["A"], 1.0),
        ("The  the", ["The The"], 1.0),
    ],
)
def test_exact_match_is_the_best_over_the_gold_answers(answer: str, answers: list[str], expected: float) -> None:
    assert exact_match(answer, answers) == expected


def test_f1_counts_common_words() -> None:
    assert f1("the River Trent", ["Trent"]) == pytest.approx(2 * 1 / (2 + 1))
    assert f1("Trent Trent", ["Trent"]) == pytest.approx(2 * 1 / (2 + 1))  # a word repeated is common once
    assert f1("Elbe", ["Trent", "Elbe river"]) == pytest.approx(2 * 1 / (1 + 2))
    assert f1("Elbe", ["Trent"]) == 0.0
    assert f1("Elbe", []) == 0.0


@given(WORDS, st.lists(WORDS, min_size=1, max_size=3))
def test_f1_is_one_on_an_exact_match_and_never_outside_0_and_1(answer: str, answers: list[str]) -> None:
    assert 0.0 <= f1(answer, answers) <= 1.0
    if exact_match(answer, answers):
        assert f1(answer, answers) == 1.0


def test_a_text_mentions_whole_words_only() -> None:
    assert mentions("He died in Missolonghi, in 1824.", "missolonghi")
    assert not mentions("He knows nothing", "no")
    assert not mentions("anything", "the")


@pytest.mark.parametrize(
    ("text", "value"),
    [("7", 7), (" -1,204 ", -1204), ("0.50", 0.5), (".5", 0.5), ("$7$", 7), (r"\boxed{7}", 7), ("7.", 7), ("+3", 3)],
)
def test_a_plainly_written_number_is_read_exactly(text: str, value: float) -> None:
    assert as_number(text) == value


@pytest.mark.parametrize("text", ["5 + 3", "", "1,2", "seven", "7 apples", "1/2", "1e3", "9" * 301])
def test_anything_else_is_not_a_number(text: str) -> None:
    assert as_number(text) is None


@given(st.integers())
def test_every_whole_number_is_read_with_and_without_commas(number: int) -> None:
    assert as_number(str(number)) == as_number(f"{number:,}") == number


@pytest.mark.parametrize(
    ("answer", "gold", "expected"),
    [
        ("1/2", r"\frac{1}{2}", 1.0),
        (r"\boxed{\frac{1}{2}}", "0.5", 1.0),
        ("x^2+2x+1", "(x+1)^2", 1.0),
        (r"(3, \pi/2)", r"\left( 3, \frac{\pi}{2} \right)", 1.0),
        ("1,000", "1000.0", 1.0),
        ("p - q", "q - p", 0.0),
        ("(1,2]", "(1,2)", 0.0),
        ("1001", "1000", 0.0),
        (r"\frac{", "1", 0.0),
        ("", "1", 0.0),
    ],
)
def test_mathematics_is_equal_when_it_means_the_same(answer: str, gold: str, expected: float) -> None:
    assert math_equal(answer, gold) == expected


def test_a_very_long_answer_is_wrong_and_never_parsed() -> None:
    assert math_equal("1+" * 200 + "1", "201") == 0.0


def test_a_gold_answer_that_cannot_be_checked_is_an_error_not_a_zero() -> None:
    with pytest.raises(DataError, match="at most 300"):
        math_equal("1", "1+" * 200 + "1")


def test_mathematics_is_checked_the_same_in_every_thread() -> None:
    """math-verify's own time limit works in the main thread only; a bare call elsewhere raises or scores 0."""
    scores: list[float] = []
    threads = [threading.Thread(target=lambda: scores.append(math_equal(r"\frac{1}{4}", "0.25"))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert scores == [1.0] * 4


def test_an_answer_that_takes_for_ever_is_wrong_and_the_next_one_is_checked() -> None:
    worker = MathWorker(deadline_s=1.0)
    worker.equal("x", "x")  # started: the clock below measures the deadline only
    started, given_up = time.monotonic(), GIVEN_UP.count
    assert not worker.equal("9^{9^{9^9}}", "1")
    assert time.monotonic() - started < 3
    assert GIVEN_UP.count == given_up + 1
    assert worker.equal("2/4", r"\frac{1}{2}")
    assert not worker.equal("2/4", "1")
    assert GIVEN_UP.count == given_up + 1  # that one is wrong
    worker.close()


def test_an_answer_whose_judge_was_killed_is_judged_by_another() -> None:
    worker, given_up = MathWorker(), GIVEN_UP.count
    worker.equal("x", "x")
    process = worker._process
    assert process is not None
    process.send_signal(signal.SIGSTOP)  # so that the question waits when it dies
    with ThreadPoolExecutor(1) as thread:
        judged = thread.submit(worker.equal, "2/4", r"\frac{1}{2}")
        time.sleep(0.3)
        assert not judged.done()
        process.kill()
        assert judged.result()
    assert GIVEN_UP.count == given_up
    worker.close()


def test_a_limit_that_the_judges_own_code_swallows_has_been_reached_all_the_same() -> None:
    with _limited(0.2) as late, suppress(TimeoutError):
        while True:
            pass
    assert late
    with _limited(5.0) as late:
        pass
    assert not late


def test_the_first_answer_that_is_given_up_is_named_once(caplog: pytest.LogCaptureFixture) -> None:
    given_up = GivenUp()
    given_up.add("1" * 100, "took too long")
    given_up.add("2", "took too long")
    assert given_up.count == 2
    assert [each.getMessage() for each in caplog.records] == [
        f"the answer '{'1' * 80}'... counts as wrong: its judge took too long (reward/judge_timeouts counts them)"
    ]


def test_checking_words_imports_no_algebra_system() -> None:
    code = "import sys, otcrl.rewards.matching as m; m.math_equal('7', '7.0'); print('sympy' in sys.modules)"
    path = ":".join(sys.path)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={"PYTHONPATH": path})
    assert done.stdout.strip() == "False", done.stderr


def test_a_shuffled_answer_has_the_same_f1() -> None:
    words = ["one", "two", "three", "four"]
    shuffled = random.Random(0).sample(words, len(words))
    assert f1(" ".join(shuffled), [" ".join(words)]) == 1.0


def test_the_first_question_is_judged_like_any_other() -> None:
    """Loading the algebra system's tables on a busy machine must not look like a wrong answer."""
    worker = MathWorker()
    assert worker.equal(r"\frac{1}{2}", "0.5")
    assert worker.equal(r"\sqrt{8}", r"2\sqrt{2}")
    worker.close()
