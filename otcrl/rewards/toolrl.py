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
from otcrl.types import Reward, Trajectory

MOST = 3.0  # correctness lies in -3 to 3


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


def correctness_score(completion: str, gold: str, match: Callable[[Similarity], float]) -> float:
    """R_correct = 6 R_max / S_max - 3, in [-3, 3]; 0 where the gold completion calls nothing.

    R_max = r_name + the best matching's sum of r_param + r_value,  S_max = 1 + |G| + sum of |parameters of G_j|.
    A block that is missing, or holds a line that is no call: -3. Raises DataError when the gold block is such.
    """
    if "<tool_call>" not in gold:
        return 0.0
    wanted = read_calls(gold)
    if wanted is None:
        raise DataError(f"a gold completion holds a line that is no call {{name, parameters}}: {gold[:200]!r}")
    made = read_calls(completion)
    if made is None:
        return -MOST
    score = overlap([g["name"] for g in wanted], [p["name"] for p in made])
    score += match([[similarity(g, p) for p in made] for g in wanted])
    return 2 * MOST * score / (1 + sum(1 + len(g["parameters"]) for g in wanted)) - MOST


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


def overlap(a: Sequence[str], b: Sequence[str]) -> float:
    """r_name, and r_param of one pair:  |A and B| / |A or B|  of multisets; 1 when both are empty."""
    common = (Counter(a) & Counter(b)).total()
    either = len(a) + len(b) - common
    return common / either if either else 1.0


def similarity(g: GoldCall, p: GoldCall) -> float:
    """r_param + r_value of a pair:  overlap of the keys + the number of gold parameters whose value is met."""
    if g["name"] != p["name"]:
        return 0.0
    wanted, given = g["parameters"], p["parameters"]
    return overlap(list(wanted), list(given)) + sum(k in given and given[k] == v for k, v in wanted.items())


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


@dataclass(frozen=True, kw_only=True)
class ToolRLReward:
    matching: Literal["greedy", "optimal"]

    needs_groups = False

    def __call__(self, trajectories_PG: Sequence[Sequence[Trajectory]]) -> list[list[Reward]]:
        return [[self._score(t) for t in group] for group in trajectories_PG]

    def _score(self, t: Trajectory) -> Reward:
        completion, gold = (t.answer or "").strip(), t.problem.answers[0].strip()
        form = format_score(completion, gold)
        correctness = correctness_score(completion, gold, greedy if self.matching == "greedy" else optimal)
        return Reward(form + correctness, {"format": form, "correctness": correctness})

    def state_dict(self) -> dict[str, float]:
        return {}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        assert not state, f"ToolRL's reward has no state, got {len(state)} entries"
