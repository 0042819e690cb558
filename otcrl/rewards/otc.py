"""OTC: be right, with as few tool calls as it takes (arXiv:2504.14870, Sec. 3.3; the letters are the paper's).

m = tool calls in this trajectory, n = the least calls known to suffice for its question,
c = decay: larger forgives more calls.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import cos, inf, pi, sin

from otcrl.rewards.outcome import Phi
from otcrl.types import COUNTERS, Problem, Reward, Stop, Trajectory, count_calls


def r_tool_ppo(m: int, c: float) -> float:
    """Eq. 5:  cos(m pi / (2m + c)): 1 without a call, falling towards 0, never reaching it."""
    return cos(m * pi / (2 * m + c))


def f(m: int, n: int) -> float:
    """Sec. 3.3:  maps m into [0, 2n);  0 if m = n = 0;  m if n = 0;  2nm / (m + n) otherwise."""
    if n == 0:
        return m
    return 2 * n * m / (m + n)


def r_tool_grpo(m: int, n: int, c: float) -> float:
    """Eq. 6:  1 if f = n = 0;  cos(m pi / (2m + c)) if n = 0;  sin(f pi / 2n) otherwise, whose peak is m = n."""
    if n == 0:
        return r_tool_ppo(m, c)  # equals 1 at m = 0
    return sin(f(m, n) * pi / (2 * n))


@dataclass(frozen=True, kw_only=True)
class OTCReward:
    """Eq. 7:  alpha * r_tool * r_phi: multiplied, so few calls never pay for a wrong answer.

    With `form: grpo` and `scope: global` the table of n is state: Problem.id -> least calls of any
    correct, non-void trajectory ever seen, updated with the current groups before they are scored.
    """

    correct: Callable[[str, Problem], float]
    alpha: float
    c: float
    form: str  # ppo: Eq. 5 | grpo: Eq. 6
    scope: str  # n over all time (global) or within the group (local); unused by form: ppo
    counter: str
    format_weight: float
    require_well_formed: bool
    table: dict[str, int] = field(default_factory=dict)

    wired = frozenset({"correct", "table"})

    def __post_init__(self) -> None:
        for name, value, choices in (
            ("form", self.form, ("ppo", "grpo")),
            ("scope", self.scope, ("global", "local")),
            ("counter", self.counter, tuple(COUNTERS)),
        ):
            if value not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")
        for name in ("alpha", "c"):
            if not 0 < getattr(self, name) < inf:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}")

    def __call__(self, trajectories_PG: Sequence[Sequence[Trajectory]]) -> list[list[Reward]]:
        phi = Phi(self.correct, self.format_weight, self.require_well_formed)
        right_PG = [[phi.r_correct(t) for t in group] for group in trajectories_PG]
        least: dict[str, int] = {} if self.scope == "local" else self.table
        for group, right_G in zip(trajectories_PG, right_PG, strict=True):
            for t, right in zip(group, right_G, strict=True):
                if right >= 1 and t.stop is not Stop.VOID:
                    m = count_calls(t, self.counter)
                    least[t.problem.id] = min(m, least.get(t.problem.id, m))
        return [
            [self._score(t, right, phi.r_format(t), least) for t, right in zip(group, right_G, strict=True)]
            for group, right_G in zip(trajectories_PG, right_PG, strict=True)
        ]

    def _score(self, t: Trajectory, right: float, r_format: float, least: Mapping[str, int]) -> Reward:
        m, n = count_calls(t, self.counter), least.get(t.problem.id)
        # n is unknown only while nobody was right: then Eq. 5 scales what r_format pays, if anything
        r_tool = r_tool_ppo(m, self.c) if self.form == "ppo" or n is None else r_tool_grpo(m, n, self.c)
        parts = {"correct": right, "tool": r_tool, "well_formed": float(not t.violations)}
        return Reward(self.alpha * r_tool * (right + r_format), parts)

    def state_dict(self) -> dict[str, int]:
        return dict(self.table)

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        self.table.clear()
        self.table.update(state)
