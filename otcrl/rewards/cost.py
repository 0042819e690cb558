"""What a trajectory's calls cost: how many they are, or what they are priced at."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from otcrl.errors import nearest
from otcrl.types import COUNTERS, Trajectory


@dataclass(frozen=True, kw_only=True)
class Price:
    """Prices in calls: 1 is one call as arXiv:2504.14870 counts them, so that is what c and n are in, too."""

    tools: Mapping[str, float]  # of one call, by tool; 1 for a tool that is not named
    per_second: float  # that a call took
    per_token: float  # that a call's result put into the context
    per_fee: float  # of what a tool itself says that a call costs, in its own money
    tool_names: Collection[str] | None = None  # None: nobody knows them here

    wired = frozenset({"tool_names"})

    def __post_init__(self) -> None:
        for name, price in self.named.items():
            if not 0 <= price < math.inf:
                raise ValueError(f"{name} must be 0 or more, got {price}")
        known = self.tools if self.tool_names is None else self.tool_names
        for name in self.tools:
            if name not in known:
                raise ValueError(f"tools: there is no tool {name!r}.{nearest(name, known)}")

    @property
    def named(self) -> dict[str, float]:
        rates = {name: getattr(self, name) for name in ("per_second", "per_token", "per_fee")}
        return {f"tools.{name}": price for name, price in self.tools.items()} | rates

    def in_parts(self) -> str:
        """The first setting that can make a cost that is no whole number; "" where none does."""
        measured = ("per_second", "per_fee")  # times what is no whole number itself
        return next((name for name, p in self.named.items() if p % 1 or (p and name in measured)), "")


def cost(t: Trajectory, counter: str, price: Price) -> float:
    """m: the price of the calls that `counter` counts; their number where nothing is priced."""
    counted = [call for call in t.tool_calls if call.outcome in COUNTERS[counter]]
    calls = sum(
        price.tools.get(call.tool, 1.0) + price.per_second * call.seconds + price.per_fee * call.price
        for call in counted
    )
    return calls + price.per_token * observed_tokens(t)


def observed_tokens(t: Trajectory) -> int:
    """Tokens after the first sampled one that the policy did not sample: its calls' results."""
    first = t.action_mask.index(True) if True in t.action_mask else len(t.action_mask)
    return t.action_mask[first:].count(False)
