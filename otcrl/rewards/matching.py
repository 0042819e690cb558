"""When one answer is the same as another: words (Search-R1's rules), numbers and mathematics.

Everything here is a pure function of two texts. `math_equal` asks a helper process (`math_worker`),
because a computer algebra system can be sent into a loop by ten characters of model output, and only
a process can be stopped from any thread.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Iterable
from fractions import Fraction

from otcrl.errors import DataError
from otcrl.rewards.math_worker import MathWorker

MAX_MATH_CHARS = 300  # longer is not an answer; nothing longer is parsed

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)
_NUMBER = re.compile(r"[+-]?((\d+|\d{1,3}(,\d{3})+)(\.\d+)?|\.\d+)", re.ASCII)
_WORKER = MathWorker()


def normalize_answer(text: str) -> str:
    """The text in lower case without punctuation, articles and extra white space (Search-R1 `qa_em.py`).

    >>> normalize_answer("The Beatles' 2nd  album!")
    'beatles 2nd album'
    """
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact_match(answer: str, answers: Iterable[str]) -> float:
    """1.0 if the answer, normalised, is one of the gold answers, else 0.0.

    A gold answer of which nothing is left ("A", "The The") is compared as it is: any empty answer would be right.
    """
    found = compared(answer)
    return float(any(found == compared(gold) for gold in answers))


def compared(text: str) -> str:
    """What is left of it: without articles and punctuation, or with articles, or as it is."""
    lower = text.lower()
    return normalize_answer(text) or " ".join(lower.translate(_PUNCTUATION).split()) or lower.strip()


def f1(answer: str, answers: Iterable[str]) -> float:
    """The best overlap with a gold answer: 2 * common / (words of both), over normalised words, as in SQuAD."""
    words = compared(answer).split()
    return max((_word_f1(words, compared(gold).split()) for gold in answers), default=0.0)


def _word_f1(words: list[str], gold: list[str]) -> float:
    if not words or not gold:
        return float(words == gold)
    common = (Counter(words) & Counter(gold)).total()
    return 2 * common / (len(words) + len(gold))


def mentions(text: str, phrase: str) -> bool:
    """Whether the phrase stands in the text as whole words, both normalised; an empty phrase never does."""
    wanted = normalize_answer(phrase)
    return bool(wanted) and f" {wanted} " in f" {normalize_answer(text)} "


def as_number(text: str) -> Fraction | None:
    """The exact value of a plainly written number (`-1,204.50`, `$7$`, `\\boxed{3}`); None for anything else.

    An expression is not a number: `5 + 3` must not pass for the answer 8.
    """
    if len(text) > MAX_MATH_CHARS:
        return None
    plain = _unwrap(text).replace("\\,", "").replace("{,}", ",")
    return Fraction(plain.replace(",", "")) if _NUMBER.fullmatch(plain) else None


def math_equal(answer: str, gold: str) -> float:
    """1.0 if both texts (LaTeX or plain) mean the same mathematical object, else 0.0.

    Plain numbers are compared exactly; the rest by math-verify. An answer of more than `MAX_MATH_CHARS`
    characters, or one that takes longer than the worker's deadline to compare, is wrong.
    Safe in any thread. Raises ConfigError without math-verify, DataError when the gold answer is too long.
    """
    if len(gold) > MAX_MATH_CHARS:
        raise DataError(
            f"a gold answer has {len(gold)} characters, at most {MAX_MATH_CHARS} can be checked: {gold[:60]!r}..."
        )
    if len(answer) > MAX_MATH_CHARS or not answer.strip():
        return 0.0
    number, gold_number = as_number(answer), as_number(gold)
    if number is not None and gold_number is not None:
        return float(number == gold_number)
    answer, gold = _unwrap(answer), _unwrap(gold)
    return float(answer == gold or _WORKER.equal(answer, gold))


def _unwrap(text: str) -> str:
    r"""The text without the white space, full stop, `$...$`, `\(...\)`, `\[...\]` and `\boxed{...}` around it."""
    text = text.strip().removesuffix(".")
    for opening, closing in (("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]"), (r"\boxed{", "}")):
        inner = text[len(opening) : len(text) - len(closing)]
        if text.startswith(opening) and text.endswith(closing) and inner and opening not in inner:
            text = inner.strip()
    return text
