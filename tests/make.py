"""Records with only what a test cares about spelled out."""

from __future__ import annotations

from otcrl.types import Outcome, Problem, Stop, ToolCall, Trajectory


def problem(id: str = "nq/train/0", answer: str = "paris", optimal_calls: int | None = None) -> Problem:
    return Problem(id=id, question="?", answers=(answer,), source=id.split("/")[0], optimal_calls=optimal_calls)


def trajectory(
    *,
    right: bool = True,
    calls: int = 0,
    of: Problem | None = None,
    outcomes: tuple[Outcome, ...] = (),
    stop: Stop = Stop.ANSWERED,
    violations: tuple[str, ...] = (),
    answer: str | None = "",
) -> Trajectory:
    """One token of prompt, one of action. `answer=None`: none was given."""
    of = of or problem()
    what = (*outcomes, *[Outcome.OK] * calls)
    return Trajectory(
        problem=of,
        token_ids=[1, 2],
        action_mask=[False, True],
        logprobs=[0.0, -0.5],
        versions=[-1, 0],
        tool_calls=tuple(ToolCall("search", "q", "r", outcome) for outcome in what),
        answer=None if answer is None else (of.answers[0] if right else "wrong"),
        violations=violations,
        stop=stop,
        response="",
    )
