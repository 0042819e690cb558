"""Cognitive offloading: does the agent call a tool for what it knows, and guess at what it could look up?

Three passes over the same questions:
    normal  the agent as it is
    closed  tools off: the answer's opening is written for it; who calls all the same does not know
    forced  a call's opening is written for it, on the questions that it got wrong without calling
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

import numpy as np

from otcrl import dist
from otcrl.evaluate.attempts import Correct, is_right
from otcrl.evaluate.metrics import Estimate, ratios
from otcrl.types import Problem, Stop, Trajectory, count_calls

Collect = Callable[[Sequence[Problem], str], Awaitable[list[Trajectory]]]  # problems, text put after the prompt


@dataclass(frozen=True, slots=True, kw_only=True)
class Offloading:
    """Shares of questions. None: the pass that tells was not run, or there was no such question."""

    right_closed: Estimate  # right with tools off, of all
    over_call: Estimate  # called all the same, of those right with tools off
    wrong_without_call: Estimate  # wrong, and no call made, of all
    under_call: Estimate  # a call would have made it right, of those wrong without a call
    under_call_of_all: Estimate  # the same, of all questions
    void: int  # trajectories left out, over the passes


async def offloading(
    problems: Sequence[Problem],
    collect: Collect,
    correct: Correct,
    *,
    answer_opening: str,
    call_openings: Sequence[str],
    counter: str = "well_formed",
    normal: Sequence[Trajectory] | None = None,
    seed: int = 0,
) -> Offloading:
    """Run the passes and compare them. `normal` is used where the agent has already been evaluated.

    With several tools each is forced in turn, and one that makes the answer right is enough.
    """
    if normal is None:
        normal = await collect(problems, "")
    closed = await collect(problems, answer_opening)
    guessed = [t.problem for t in normal if wrong_without_call(t, correct, counter)]
    guessed = dist.from_first(guessed, "who guessed")  # judges may be slow, and of two minds
    forced = [t for opening in call_openings if guessed for t in await collect(guessed, opening)]
    return compare_passes(normal, closed, forced, correct, counter, seed)


def wrong_without_call(trajectory: Trajectory, correct: Correct, counter: str) -> bool:
    """Whether the agent got it wrong and had made no call."""
    return trajectory.stop is not Stop.VOID and not (count_calls(trajectory, counter) or _right(trajectory, correct))


def compare_passes(
    normal: Sequence[Trajectory],
    closed: Sequence[Trajectory] | None,
    forced: Sequence[Trajectory] | None,
    correct: Correct,
    counter: str = "well_formed",
    seed: int = 0,
) -> Offloading:
    """The figures from finished passes; None for a pass that was not run.

    A question is left out of a figure when one of the trajectories that the figure needs is void.
    `normal` and `closed` hold one trajectory a question, `forced` one a question and tool.
    """
    scored = _by_question(normal)
    known = {k: _right(t, correct) and not t.tool_calls for k, t in _by_question(closed or ()).items()}
    tried: dict[str, list[bool | None]] = {}  # whether it was right; None: void
    for t in forced or ():
        tried.setdefault(t.problem.id, []).append(None if t.stop is Stop.VOID else _right(t, correct))
    # where one tool was down, another may have settled it all the same
    fixed = {k: any(own) for k, own in tried.items() if any(own) or None not in own}
    guessed = {k: wrong_without_call(t, correct, counter) for k, t in scored.items()}
    called = {k: count_calls(t, counter) > 0 for k, t in scored.items()}

    has_closed = [k in known for k in scored]
    is_known = [known.get(k, False) for k in scored]
    knew_and_called = [known.get(k, False) and called[k] for k in scored]
    is_guessed = list(guessed.values())
    told = [forced is not None and (k in fixed or not guessed[k]) for k in scored]  # what a call would do is settled
    guessed_and_told = [guessed[k] and k in fixed for k in scored]
    would_be_fixed = [guessed[k] and fixed.get(k, False) for k in scored]
    shares = {
        "right_closed": (is_known, has_closed),
        "over_call": (knew_and_called, is_known),
        "wrong_without_call": (is_guessed, [True] * len(scored)),
        "under_call": (would_be_fixed, guessed_and_told),
        "under_call_of_all": (would_be_fixed, told),
    }
    arrays = {name: (np.array(a, dtype=float), np.array(b, dtype=float)) for name, (a, b) in shares.items()}
    passes = [*normal, *(closed or ()), *(forced or ())]
    return Offloading(void=sum(t.stop is Stop.VOID for t in passes), **ratios(arrays, seed))


def _by_question(trajectories: Sequence[Trajectory]) -> dict[str, Trajectory]:
    found = {t.problem.id: t for t in trajectories}
    assert len(found) == len(trajectories), "a pass holds one trajectory a question"
    return {k: t for k, t in found.items() if t.stop is not Stop.VOID}


def _right(trajectory: Trajectory, correct: Correct) -> bool:
    """Partial credit is not right."""
    return is_right(trajectory, correct) >= 1.0
