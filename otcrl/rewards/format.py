"""Search-R1's format reward (arXiv:2505.15117; qa_em_format.py): a state machine and six cases, from right to nothing.

This is its v0.3. Its v0.2, exact match alone, is `reward=outcome` with require_well_formed=false.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from otcrl.dialects.search_r1 import TAG
from otcrl.protocols import Dialect
from otcrl.rewards.matching import mentions
from otcrl.rewards.outcome import Correct, pass_over
from otcrl.types import Outcome, Reward, Trajectory


def format_score(
    right: bool, answered: bool, valid: bool, retrieved: bool, structure: float, final: float, retrieval: float
) -> float:
    """right, valid: 1 | right, invalid: 1 - structure | not right, valid: structure (+ retrieval) |
    wrong, invalid: final | no answer, invalid: 0."""
    if right:
        return 1.0 if valid else 1.0 - structure
    if valid:
        return structure + (retrieval if retrieved else 0.0)
    return final if answered else 0.0


def fault(response: str, calls: Sequence[str] = ("search",), result: str = "information") -> str | None:
    """Where a response leaves  think (call result think)* answer;  None where it does not.

    Between the tags only white space may stand, and no tag inside another. What follows the last </answer> is not
    looked at: the token that ended the completion may hold more than the tag.
    """
    after = {"": ("think",), "think": (*calls, "answer"), result: ("think",), "answer": ()}
    after |= dict.fromkeys(calls, (result,))
    head, closing, _ = response.rpartition("</answer>")
    names = "|".join(re.escape(name) for name in after if name)
    pieces = re.split(rf"(</?(?:{names})>)", head + closing)  # text, tag, text, tag, ..., text
    opened, closed = "", ""  # the tag that is open, and the one that was closed last
    for text, tag in zip(pieces[::2], [*pieces[1::2], ""], strict=True):
        name = tag.strip("</>")
        if text.strip() and not opened:
            return f"{text.strip()[:60]!r} stands between tags"
        if tag.startswith("</"):
            if name != opened:
                return f"{tag} closes {f'<{opened}>' if opened else 'nothing'}"
            opened, closed = "", name
        elif tag:
            if opened or name not in after[closed]:
                return f"{tag} {f'inside <{opened}>' if opened else f'after </{closed}>' if closed else 'comes first'}"
            opened = name
    return None if closed == "answer" and not opened else "it does not end with an answer"


@dataclass(frozen=True, kw_only=True)
class FormatReward:
    correct: Correct
    structure: float  # lambda_s
    final: float  # lambda_f
    retrieval: float  # lambda_r: a gold answer stands in an observation
    rules: Literal["sequence", "dialect"]
    calls: Sequence[str]  # tags; empty: the tools' names
    result: str  # tag; empty: the one that the dialect writes
    tool_names: Collection[str] = ()
    dialect: Dialect | None = None  # None: nobody knows it here

    wired = frozenset({"correct", "tool_names", "dialect"})
    needs_groups = False

    def __post_init__(self) -> None:
        # tags that nobody writes would make every trajectory with a call malformed
        tag = TAG.search(str(self.dialect.observation(""))) if self.dialect else None
        object.__setattr__(self, "calls", self.calls or tuple(self.tool_names))
        object.__setattr__(self, "result", self.result or (tag[2] if tag else ""))

    def __call__(self, trajectories_PG: Sequence[Sequence[Trajectory]]) -> list[list[Reward]]:
        return [[self._score(t) for t in group] for group in trajectories_PG]

    def _score(self, t: Trajectory) -> Reward:
        right = 0.0 if t.answer is None else self.correct(t.answer, t.problem)
        # whole words; the original takes any substring: "us" stands in "business", and "" (of "The") everywhere
        # in what was found: an error may repeat what the policy wrote, which is no retrieval
        found = [call.result for call in t.tool_calls if call.outcome is Outcome.OK]
        retrieved = any(mentions(result, answer) for result in found for answer in t.problem.answers)
        well_formed = not t.violations if self.rules == "dialect" else self._fault(t) is None
        value = format_score(
            right >= 1,
            t.answer is not None,
            well_formed and t.answer is not None,
            retrieved,
            self.structure,
            self.final,
            self.retrieval,
        )
        return Reward(value, {"correct": right, "well_formed": float(well_formed), "retrieved": float(retrieved)})

    def _fault(self, t: Trajectory) -> str | None:
        """By what was sampled alone: a passage may hold any tag, and the policy did not write it."""
        return fault(f"<{self.result}></{self.result}>".join(t.turns), self.calls, self.result)

    def state_dict(self) -> dict[str, float]:
        return {}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        pass_over(state)
