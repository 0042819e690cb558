"""A trajectory's text as reasoning, calls, observations and the answer.

What was sampled and what was injected is known of every token. Where in a sampled turn the call begins is not: it is
looked for by the call's arguments and the tag or fence before them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import Any, Literal

from otcrl.report.attempts import Attempt

Kind = Literal["reasoning", "call", "observation", "answer"]
OBSERVED = 60  # characters of a result that are looked for where the tokens are not known


@dataclass(frozen=True, slots=True)
class Segment:
    kind: Kind
    pieces: Sequence[str]  # its text, token by token; all in one where the tokens are not known
    call: int | None = None  # of a call and its observation: number of the call


def segments(attempt: Attempt) -> list[Segment]:
    """Together their pieces are the response, and in order its tokens."""
    found: list[Segment] = []
    number = 0  # of the call that the next sampled turn ends with, if it does
    is_known = "spans" in attempt.tokens
    spans = list(known_spans(attempt) if is_known else guessed_spans(attempt))
    for place, (is_sampled, pieces) in enumerate(spans):
        if not is_sampled:
            found.append(Segment("observation", pieces, number - 1 if number else None))
            continue
        call = attempt.calls[number] if number < len(attempt.calls) else None
        number += call is not None
        if call is not None:
            at, last = opening(text_of(pieces), call["arguments"], marks(call["tool"])), Segment("call", (), number - 1)
        elif attempt.answer is not None and place == len(spans) - 1:
            at, last = opening(text_of(pieces), attempt.answer, ("<answer", "\\boxed{")), Segment("answer", ())
        else:
            at, last = None, Segment("reasoning", ())
        found += split(pieces, at, last)
    return found if is_known else [replace(segment, pieces=[text_of(segment.pieces)]) for segment in found]


def split(pieces: Sequence[str], at: int | None, last: Segment) -> Iterator[Segment]:
    """Reasoning up to the token with character `at`, then `last`."""
    starts = [0, *accumulate(len(piece) for piece in pieces)]
    cut = len(pieces) if at is None else sum(start <= at for start in starts[1:])
    if cut:
        yield Segment("reasoning", pieces[:cut])
    if cut < len(pieces):
        yield Segment(last.kind, pieces[cut:], last.call)


def opening(text: str, body: str, before: Sequence[str]) -> int | None:
    """Where in `text` the last of the marks before `body` begins, or `body` itself; None when `body` is not there."""
    at = text.rfind(body)
    if at < 0:
        return None
    marked = max(text.rfind(mark, 0, at + 1) for mark in before)
    return marked if marked >= 0 else at


def marks(tool: str) -> tuple[str, ...]:
    return (f"<{tool}", f"```{tool}", "<tool_call")


def text_of(pieces: Sequence[str]) -> str:
    return "".join(pieces)


def known_spans(attempt: Attempt) -> Iterator[tuple[bool, Sequence[str]]]:
    """(sampled or injected, its tokens), by turns."""
    cuts = [0, *accumulate(attempt.tokens["lengths"])]
    pieces = [attempt.response[start:end] for start, end in pairwise(cuts)]
    borders = [0, *accumulate(attempt.tokens["spans"])]
    for number, (start, end) in enumerate(pairwise(borders)):
        yield number % 2 == 0, pieces[start:end]


def guessed_spans(attempt: Attempt) -> Iterator[tuple[bool, Sequence[str]]]:
    """The same from where the calls' results stand in the text, with the tags around them; its characters."""
    at = 0
    for call in attempt.calls:
        start, end = place_of(call, attempt.response, at)
        if end > start:
            yield True, [*attempt.response[at:start]]
            yield False, [*attempt.response[start:end]]
            at = end
    if at < len(attempt.response):
        yield True, [*attempt.response[at:]]


def place_of(call: Any, text: str, after: int) -> tuple[int, int]:
    """Where the call's observation stands; an empty place when it is not there."""
    begin = re.escape(call["result"][:OBSERVED])
    if not begin:
        return after, after
    tagged = re.compile(rf"\s*<(\w+)>\s*{begin}.*?(</\1>\s*|\Z)", re.DOTALL)
    fenced = re.compile(rf"(?<=```output)\s*{begin}.*?(```\s*|\Z)", re.DOTALL)
    found = tagged.search(text, after) or fenced.search(text, after)
    return found.span() if found else (after, after)
