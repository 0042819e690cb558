"""A trajectory's text as reasoning, calls, observations and the answer.

What was sampled and what was injected is known of every token. Where in a sampled turn the call begins is not: it is
looked for by the call's arguments and the tag or fence before them. A turn may make several calls; one observation has
their results.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import Any, Literal

from otcrl.report.attempts import Attempt

Kind = Literal["reasoning", "call", "observation", "answer"]
Call = Mapping[str, Any]  # as the transcript has it
OBSERVED = 60  # characters of a result that are looked for where the tokens are not known
BEGINNING = 20  # and where they are: a result may have been cut
BOXED = "\\boxed{"


THOUGHT = "</think>"


@dataclass(frozen=True, slots=True)
class Segment:
    kind: Kind
    pieces: Sequence[str]  # its text, token by token; all in one where the tokens are not known
    calls: Sequence[int] = ()  # numbers of those that it makes, or whose results it is


def segments(attempt: Attempt) -> list[Segment]:
    """Together their pieces are the response, and in order its tokens."""
    found: list[Segment] = []
    number = 0  # of the first call that has no place yet
    is_known = "spans" in attempt.tokens
    spans = list(known_spans(attempt) if is_known else guessed_spans(attempt))
    for (is_sampled, pieces), (_, following) in pairwise([*spans, (False, ())]):
        if not is_sampled:
            found.append(Segment("observation", pieces, found[-1].calls if found else ()))
            continue
        if following:
            own = answered(attempt.calls, number, text_of(following))
        else:  # the last turn: it was the answer, or its calls were never answered
            own = range(number, len(attempt.calls) if attempt.answer is None else number)
        number = own.stop
        if own:
            at, last = call_start(text_of(pieces), [attempt.calls[k] for k in own]), Segment("call", (), [*own])
        elif attempt.answer is not None and not following:
            at, last = opening(text_of(pieces), attempt.answer, ("<answer", "<response", BOXED)), Segment("answer", ())
        else:
            at, last = None, Segment("reasoning", ())
        found += split(pieces, at, last)
    return found if is_known else [replace(segment, pieces=[text_of(segment.pieces)]) for segment in found]


def answered(calls: Sequence[Call], number: int, observation: str) -> range:
    """The calls from `number` on whose results an observation holds; the next one where that cannot be told.

    The first of all may have been made before the policy wrote anything, and its result be part of the prompt.
    """
    seen, at, first, last = plain(observation), 0, number, number
    for k in range(number, len(calls)):
        begin = plain(calls[k]["result"])[:BEGINNING]
        place = seen.find(begin, at) if begin else -1
        if place >= 0:
            first, last, at = (k, k + 1, place + len(begin)) if last == number else (first, k + 1, place + len(begin))
        elif number > 0 or last > number:
            break
    return range(first, last) if last > first else range(number, min(number + 1, len(calls)))


def plain(text: str) -> str:
    return " ".join(text.split())


def split(pieces: Sequence[str], at: int | None, last: Segment) -> Iterator[Segment]:
    """Reasoning up to the token with character `at`, then `last`."""
    starts = [0, *accumulate(len(piece) for piece in pieces)]
    cut = len(pieces) if at is None else sum(start <= at for start in starts[1:])
    if cut:
        yield Segment("reasoning", pieces[:cut])
    if cut < len(pieces):
        yield replace(last, pieces=pieces[cut:])


def call_start(text: str, calls: Sequence[Call]) -> int | None:
    """Where in a turn its calls begin: before the arguments of the only one, or at the first tag after the thought."""
    if len(calls) == 1 and (at := opening(text, calls[0]["arguments"], marks(calls[0]["tool"]))) is not None:
        return at
    after = max(text.rfind(THOUGHT), 0)
    places = [text.find(mark, after) for call in calls for mark in marks(call["tool"])]
    return min((place for place in places if place >= 0), default=None)


def opening(text: str, body: str, before: Sequence[str]) -> int | None:
    """Where in `text` the mark before `body` begins, the first kind that is there, or `body`; None without it."""
    at = text.rfind(body)
    if at < 0:
        return None
    places = (text.rfind(mark, 0, at + 1) for mark in before)
    return next((place for place in places if place >= 0), at)


def marks(tool: str) -> tuple[str, ...]:
    return ("<tool_call", "<code>", f"<{tool}", f"```{tool}")


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


def place_of(call: Call, text: str, after: int) -> tuple[int, int]:
    """Where the call's observation stands; an empty place when it is not there."""
    begin = re.escape(call["result"][:OBSERVED])
    if not begin:
        return after, after
    tagged = re.compile(rf"\s*<(\w+)>\s*{begin}.*?(</\1>\s*|\Z)", re.DOTALL)
    fenced = re.compile(rf"(?<=```output)\s*{begin}.*?(```\s*|\Z)", re.DOTALL)
    found = tagged.search(text, after) or fenced.search(text, after)
    return found.span() if found else (after, after)
