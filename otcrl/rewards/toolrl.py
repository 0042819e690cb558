"""ToolRL's reward for tool calls that are imitated, not run (arXiv:2504.13958 Sec. 3.3; rlla.py): format + correctness.

A completion is <think>...</think>, then <tool_call> with one JSON call {"name", "parameters"} a line, or
<response>, or both; so is the gold one, `Problem.answers[0]`. The dialect hands the whole completion on as the answer.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypedDict

from otcrl.errors import ConfigError, DataError
from otcrl.rewards.otc import check_above_zero, trained_steps
from otcrl.rewards.outcome import pass_over
from otcrl.types import Reward, Trajectory

MOST = 3.0  # correctness lies in -3 to 3
Granularity = Literal["fine", "refined", "intermediate", "coarse"]
Schedule = Literal["none", "two_stage", "smooth"]
STAGE, SMOOTH = 30, 150  # steps of the first stage, and until a smooth schedule has its last values


class GoldCall(TypedDict):
    name: str
    parameters: dict[str, object]


Similarity = list[list[float]]  # [gold call][predicted call]: r_param + r_value


def format_score(completion: str, gold: str) -> float:
    """R_format: 1 if the completion has exactly the fields that the gold one has, in order, else 0."""
    fields = [name for name in ("tool_call", "response") if f"<{name}>" in gold]
    pattern = r"<think>.*?</think>"
    pattern += r"\n<tool_call>\n.*?\n</tool_call>" * ("tool_call" in fields)
    pattern += r"\n<response>.*?</response>" * ("response" in fields)
    once = all(completion.count(f"<{name}>") == completion.count(f"</{name}>") == 1 for name in fields)
    return float(once and re.fullmatch(pattern, completion, re.DOTALL) is not None)


def correctness_score(
    completion: str, gold: str, match: Callable[[Similarity], float], granularity: Granularity = "fine"
) -> float:
    """R_correct = 6 R_max / S_max - 3, in [-3, 3]; 0 where the gold completion calls nothing.

    fine: R_max = r_name + the best matching's sum of r_param + r_value,  S_max = 1 + |G| + sum of |parameters of G_j|
    refined: the same, but r_name and r_param are 1 or 0: all names, or all keys, or nothing
    intermediate: R_max = r_name + the number of gold calls that were made as they are,  S_max = 1 + |G|
    coarse: all calls as they are, in their order, or nothing
    (REFINEDREWARD, INTERMEDIATEREWARD and COARSEREWARD of the original code.) A block that is missing, or holds a line
    that is no call: -3. Raises DataError when the gold block is such.
    """
    if "<tool_call>" not in gold:
        return 0.0
    wanted = read_calls(gold)
    if wanted is None:
        raise DataError(f"a gold completion holds a line that is no call {{name, parameters}}: {gold[:200]!r}")
    made = read_calls(completion)
    if made is None:
        return -MOST
    if granularity == "coarse":
        return MOST if made == wanted else -MOST
    names = overlap([g["name"] for g in wanted], [p["name"] for p in made], whole=granularity == "refined")
    score = names + match([[similarity(g, p, granularity) for p in made] for g in wanted])
    most = 1 + sum(1 if granularity == "intermediate" else 1 + len(g["parameters"]) for g in wanted)
    return 2 * MOST * score / most - MOST


def read_calls(text: str) -> list[GoldCall] | None:
    """The calls of the first <tool_call> block; None when there is no block, or a line of it is no call.

    The original notices a line without parameters only where its tool is among the gold ones.
    """
    _, opened, rest = text.partition("<tool_call>")
    block, closed, _ = rest.partition("</tool_call>")
    if not (opened and closed):
        return None
    try:
        calls = [json.loads(line) for line in block.strip().split("\n")]
    except (ValueError, RecursionError):  # a thousand opening brackets are not JSON either
        return None
    return calls if all(map(is_call, calls)) else None


def is_call(value: object) -> bool:
    return isinstance(value, dict) and isinstance(value.get("name"), str) and isinstance(value.get("parameters"), dict)


def overlap(a: Sequence[str], b: Sequence[str], *, whole: bool = False) -> float:
    """r_name, and r_param of one pair:  |A and B| / |A or B|  of multisets; 1 when both are empty. `whole`: 1 or 0."""
    if whole:
        return float(Counter(a) == Counter(b))
    common = (Counter(a) & Counter(b)).total()
    either = len(a) + len(b) - common
    return common / either if either else 1.0


def similarity(g: GoldCall, p: GoldCall, granularity: Granularity = "fine") -> float:
    """r_param + r_value of a pair:  overlap of the keys + the number of gold parameters whose value is met."""
    if g["name"] != p["name"]:
        return 0.0
    if granularity == "intermediate":
        return float(g == p)
    wanted, given = g["parameters"], p["parameters"]
    keys = overlap(list(wanted), list(given), whole=granularity == "refined")
    return keys + sum(k in given and given[k] == v for k, v in wanted.items())


def greedy(similarity_GP: Similarity) -> float:
    """As in the original code: each gold call in turn takes the best prediction that is left, the first of equals."""
    total, free = 0.0, list(range(len(similarity_GP[0])))
    for row in similarity_GP:
        best = max(free, key=row.__getitem__, default=None)
        if best is not None and row[best] > 0:
            total += row[best]
            free.remove(best)
    return total


def optimal(similarity_GP: Similarity) -> float:
    """As in the paper: the largest sum over all one-to-one matchings. Raises ConfigError without scipy."""
    try:
        from scipy.optimize import linear_sum_assignment
    except ImportError as error:
        raise ConfigError("reward.matching=optimal needs scipy: pip install 'otcrl[cpu]'") from error
    chosen = zip(*linear_sum_assignment(similarity_GP, maximize=True), strict=True)
    return sum(similarity_GP[g][p] for g, p in chosen)


def scales(schedule: Schedule, step: int, most: float) -> tuple[float, float, float]:
    """(format unmet, format met, most for correctness) at a step.

    two_stage (MAX1STEP30MAX3): 30 steps with a third of correctness, then all of it and half of the format
    smooth (SCHEDULEREWARD): in 150 steps format goes from 2 to 1 and correctness from 2 to its most
    """
    if schedule == "two_stage":
        return (0.0, 1.0, most / 3) if step < STAGE else (0.0, 0.5, most)
    if schedule == "smooth":
        progress = min(step / SMOOTH, 1.0)
        return min(-1.0, 2 * progress - 2), 2 - progress, 2 + (most - 2) * progress
    return 0.0, 1.0, most


@dataclass(frozen=True, kw_only=True)
class Length:
    """Longer thoughts earn more, up to 1 (WITHLENGTH: 512 words; SCHEDULELENGTH: from 384 to 640 in 105 steps)."""

    first: int = 0  # words that earn 1, at the first step; 0: no length is paid
    last: int = 0  # after `steps`
    steps: int = 105

    def __post_init__(self) -> None:
        for name, least in (("first", 0), ("last", 1 if self.first else 0), ("steps", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")

    def score(self, completion: str, step: int) -> float:
        if not self.first or "<think>" not in completion or "</think>" not in completion:
            return 0.0
        words = completion.rpartition("<think>")[2].partition("</think>")[0].split()
        return min(1.0, len(words) / (self.first + (self.last - self.first) * min(step / self.steps, 1.0)))


@dataclass(frozen=True, kw_only=True)
class ToolRLReward:
    matching: Literal["greedy", "optimal"]
    granularity: Granularity = "fine"
    most: float = MOST  # correctness lies in -most to most
    schedule: Schedule = "none"
    length: Length = Length()

    needs_groups = False
    imitates = True  # so the task must too: it looks for calls in the gold answer
    can_be_negative = True

    def __post_init__(self) -> None:
        check_above_zero(self, "most")

    def __call__(self, trajectories_PG: Sequence[Sequence[Trajectory]]) -> list[list[Reward]]:
        steps = [trained_steps(group) for group in trajectories_PG]
        return [[self._score(t, step) for t in group] for group, step in zip(trajectories_PG, steps, strict=True)]

    def _score(self, t: Trajectory, step: int) -> Reward:
        completion, gold = (t.answer or "").strip(), t.problem.answers[0].strip()
        unmet, met, most = scales(self.schedule, step, self.most)
        form = unmet + (met - unmet) * format_score(completion, gold)
        match = greedy if self.matching == "greedy" else optimal
        correctness = correctness_score(completion, gold, match, self.granularity) * most / MOST
        length = self.length.score(completion, step)
        return Reward(form + correctness + length, {"format": form, "correctness": correctness, "length": length})

    def state_dict(self) -> dict[str, float]:
        return {}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        pass_over(state)
