"""What ends badly shows early: a gradient far above the usual, an entropy that is gone, right answers grown unlikely.

Nothing here changes the training. A finding is a metric (health/..., 1 while it lasts), and is said when it begins.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, median
from typing import Any

from otcrl.loggers.jsonl import append
from otcrl.types import Metrics, Reward, Trajectory, count_calls

USUAL = 32  # updates whose median norm is the usual one
FIRST = 5  # steps that say what entropy was at first, and over which likelihood is averaged
CULPRITS = 5  # trajectories that are named


@dataclass(kw_only=True)
class Health:
    """Knows a run by its metrics alone, so a resumed run hears the earlier ones again."""

    grad_spike: float  # times the usual gradient norm; null: never
    entropy_share: float  # of the first steps' entropy: less has collapsed
    likelihood_drop: float  # nats a token below the best, of rewarded trajectories: the policy unlearns right answers
    _norms: deque[float] = field(init=False, default_factory=lambda: deque(maxlen=USUAL))
    _entropies: list[float] = field(init=False, default_factory=list)
    _likelihoods: deque[float] = field(init=False, default_factory=lambda: deque(maxlen=FIRST))
    _best: float = field(init=False, default=float("-inf"))
    _found: dict[str, float] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        if not self.grad_spike > 1:
            raise ValueError(f"grad_spike must be above 1, got {self.grad_spike}")
        if not 0 <= self.entropy_share < 1:
            raise ValueError(f"entropy_share must be at least 0 and below 1, got {self.entropy_share}")
        if not self.likelihood_drop > 0:
            raise ValueError(f"likelihood_drop must be above 0, got {self.likelihood_drop}")

    def __call__(self, metrics: Mapping[str, float]) -> tuple[Metrics, list[str]]:
        """(the metrics to add, what is to be said) of one step."""
        said = {
            "health/grad_spike": self._spike(metrics.get("update/policy_grad_norm")),
            "health/entropy_collapse": self._collapse(metrics.get("update/entropy")),
            "health/likelihood_loss": self._unlearning(metrics.get("rollout/rewarded_logprob")),
        }
        new = [text for name, text in said.items() if text and not self._found.get(name)]
        self._found = {name: float(bool(text)) for name, text in said.items()}
        return self._found, new

    def hear(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Earlier steps of this run, as metrics.jsonl has them."""
        for row in rows:
            self({name: value for name, value in row.items() if value is not None})

    def _spike(self, norm: float | None) -> str:
        if not norm:  # 0: nothing was to be learned
            return ""
        usual = median(self._norms) if len(self._norms) >= FIRST else norm
        self._norms.append(norm)
        if norm <= self.grad_spike * usual:
            return ""
        return f"the gradient norm is {norm:.3g}, and {usual:.3g} is usual: spikes.jsonl names the trajectories"

    def _collapse(self, entropy: float | None) -> str:
        if entropy is None:
            return ""
        if len(self._entropies) < FIRST:
            self._entropies.append(entropy)
        first = fmean(self._entropies)
        if entropy >= self.entropy_share * first:
            return ""
        return f"entropy is {entropy:.3g} nats, and was {first:.3g} at first: the policy has stopped exploring"

    def _unlearning(self, likelihood: float | None) -> str:
        if not likelihood:  # 0.0: nothing was rewarded
            return ""
        self._likelihoods.append(likelihood)
        now = fmean(self._likelihoods)
        if len(self._likelihoods) == FIRST:
            self._best = max(self._best, now)
        if now >= self._best - self.likelihood_drop:
            return ""
        return (
            f"rewarded trajectories have {now:.3g} nats a token, and had {self._best:.3g}: right answers grow "
            "unlikely, which often comes before collapse. Look at reward/sign_reversals"
        )


def write_culprits(
    path: Path,
    step: int,
    pairs: Sequence[tuple[Trajectory, Reward]],
    pull: Sequence[float],
    advantages: Sequence[float],
) -> None:
    """Those that pulled most at the update. `pull`: of each, the sum over its tokens of |d loss / d log-prob|.

    Raises OSError when they cannot be written; then the file is what it was.
    """
    total, lines = sum(pull) or 1.0, list[str]()
    for i in sorted(range(len(pairs)), key=lambda i: -pull[i])[:CULPRITS]:
        trajectory, reward = pairs[i]
        row = {
            "step": step,
            "problem": trajectory.problem.id,
            "pull_share": pull[i] / total,
            "advantage": advantages[i],
            "reward": reward.value,
            "calls": count_calls(trajectory, "well_formed"),
            "tokens": len(trajectory.token_ids),
            "stop": str(trajectory.stop),
            "response": trajectory.response[:2000],
        }
        lines.append(json.dumps(row) + "\n")
    with path.open("ab", buffering=0) as file:
        append(file, "".join(lines).encode())
