"""OTC: be right, with as few tool calls as it takes (arXiv:2504.14870, Sec. 3.3; the letters are the paper's).

m = tool calls in this trajectory (or their price), n = the least that is known to suffice for its question,
c = decay: larger forgives more calls.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import cos, inf, pi, sin

from otcrl.errors import nearest
from otcrl.rewards.cost import Price, cost
from otcrl.rewards.outcome import Phi
from otcrl.types import COUNTERS, Problem, Reward, Stop, Trajectory


def r_tool_ppo(m: float, c: float) -> float:
    """Eq. 5:  cos(m pi / (2m + c)): 1 without a call, falling towards 0, never reaching it."""
    return cos(m * pi / (2 * m + c))


def f(m: float, n: float) -> float:
    """Sec. 3.3:  maps m into [0, 2n);  0 if m = n = 0;  m if n = 0;  2nm / (m + n) otherwise."""
    if n == 0:
        return m
    return 2 * n * m / (m + n)


def r_tool_grpo(m: float, n: float, c: float) -> float:
    """Eq. 6:  1 if f = n = 0;  cos(m pi / (2m + c)) if n = 0;  sin(f pi / 2n) otherwise, whose peak is m = n.

    It jumps at n = 0: with one call too many it pays cos(pi / (2 + c)) there, and nearly nothing for a small n > 0.
    So prices that are not whole calls (seconds, tokens) want Eq. 5, and are refused here.
    """
    if n == 0:
        return r_tool_ppo(m, c)  # equals 1 at m = 0
    return sin(f(m, n) * pi / (2 * n))


@dataclass(frozen=True, kw_only=True)
class Warmup:
    """Where alpha and c begin; they reach their own values, in a straight line, after `steps` steps."""

    steps: int  # 0: they are there at once
    alpha: float
    c: float

    def __post_init__(self) -> None:
        check_above_zero(self, "alpha", "c")
        if self.steps < 0:
            raise ValueError(f"steps must be at least 0, got {self.steps}")

    def at(self, step: int, start: float, end: float) -> float:
        return end if step >= self.steps else start + (end - start) * step / self.steps


@dataclass(frozen=True, kw_only=True)
class OTCReward:
    """Eq. 7:  alpha * r_tool * r_phi: multiplied, so few calls never pay for a wrong answer.

    That needs an r_phi of 0 for a wrong answer. ToRL's -1 would turn the product round: every further call would
    make a wrong answer cheaper. (r + 1) / 2 of it is r_correct, and a group's advantages are the same for both.

    With `form: grpo` and `scope: global` the table of n is state: Problem.id -> least calls of any
    correct, non-void trajectory ever seen, updated with the current groups before they are scored.
    """

    correct: Callable[[str, Problem], float]
    alpha: float
    c: float
    warmup: Warmup
    form: str  # ppo: Eq. 5 | grpo: Eq. 6
    scope: str  # n over all time (global) or within the group (local); unused by form: ppo
    combine: str  # product: Eq. 7 | sum: alpha * r_tool + r_phi
    counter: str
    price: Price
    format_weight: float
    require_well_formed: bool
    table: dict[str, float] = field(default_factory=dict)

    wired = frozenset({"correct", "table"})

    def __post_init__(self) -> None:
        for name, value, choices in (
            ("form", self.form, ("ppo", "grpo")),
            ("scope", self.scope, ("global", "local")),
            ("combine", self.combine, ("product", "sum")),
            ("counter", self.counter, tuple(COUNTERS)),
        ):
            if value not in choices:
                hint = nearest(value, choices)
                raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}.{hint}")
        check_above_zero(self, "alpha", "c")
        if self.form == "grpo" and (name := self.price.in_parts()):
            raise ValueError(
                f"form grpo is for whole calls: it jumps at n = 0, and price.{name}={self.price.named[name]} makes n a "
                "part of one: use form ppo"
            )

    @property
    def needs_groups(self) -> bool:
        """A trajectory alone is its own n, so every right answer would earn the same."""
        return self.form == "grpo" and self.scope == "local"

    def __call__(self, trajectories_PG: Sequence[Sequence[Trajectory]]) -> list[list[Reward]]:
        phi = Phi(self.correct, self.format_weight, self.require_well_formed)
        judged_PG = [[phi.judged(t) for t in group] for group in trajectories_PG]
        least_P: list[dict[str, float]] = [{} if self.scope == "local" else self.table for _ in trajectories_PG]
        for group, judged_G, least in zip(trajectories_PG, judged_PG, least_P, strict=True):
            for t, judged in zip(group, judged_G, strict=True):
                if phi.gated(t, judged) >= 1 and t.stop is not Stop.VOID:
                    m = cost(t, self.counter, self.price)
                    least[t.problem.id] = min(m, least.get(t.problem.id, m))
        rewards_PG: list[list[Reward]] = []
        for group, judged_G, least in zip(trajectories_PG, judged_PG, least_P, strict=True):
            step = trained_steps(group)
            rewards_PG.append([self._score(t, judged, least, step) for t, judged in zip(group, judged_G, strict=True)])
        return rewards_PG

    def _score(self, t: Trajectory, judged: float, least: Mapping[str, float], step: int) -> Reward:
        phi = Phi(self.correct, self.format_weight, self.require_well_formed)
        m, n = cost(t, self.counter, self.price), least.get(t.problem.id)
        alpha = self.warmup.at(step, self.warmup.alpha, self.alpha)
        c = self.warmup.at(step, self.warmup.c, self.c)
        # n is unknown only while nobody was right: then Eq. 5 scales what r_format pays, if anything
        r_tool = r_tool_ppo(m, c) if self.form == "ppo" or n is None else r_tool_grpo(m, n, c)
        r_phi = phi.gated(t, judged) + phi.r_format(t)
        value = alpha * r_tool * r_phi if self.combine == "product" else alpha * r_tool + r_phi
        return Reward(value, {"correct": judged, "tool": r_tool, "cost": m, "well_formed": float(not t.violations)})

    def state_dict(self) -> dict[str, float]:
        return dict(self.table)

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        self.table.clear()
        self.table.update(state)


def trained_steps(group: Sequence[Trajectory]) -> int:
    """Updates of the weights that sampled the group's newest token: one number for siblings, which are compared."""
    return max((version for t in group for version in t.versions), default=0)


def check_above_zero(owner: object, *names: str) -> None:
    """Raises ValueError for the first of these settings that is not above 0, or infinite."""
    for name in names:
        if not 0 < getattr(owner, name) < inf:
            raise ValueError(f"{name} must be above 0, got {getattr(owner, name)}")
