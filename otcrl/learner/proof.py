"""The proof that the engine samples from the learner's weights: both say how likely the same few tokens are.

What an engine reports about its weights (names, digests, versions) proves that they arrived. Only its answers prove
that it computes with them: a parameter loaded into the wrong place, or a cache of old weights, shows here alone.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from otcrl.errors import TrainingError
from otcrl.protocols import Engine
from otcrl.types import Metrics

MOST = 0.3  # nats; two engines that run one model never differ by that much, in whatever type
LEAST = {"float32": 1e-4, "16 bits": 0.03}  # nats, on both sides, on either; differences are a tenth to a third of it
ROOM = 10  # times the difference seen first


@dataclass(kw_only=True)
class Proof:
    every: int  # publications; 0: never
    probes: int  # token sequences that both score
    tokens: int  # of each, at most
    tolerance: float | None  # nats, mean over the tokens; None: from the first publication's difference
    rounds: bool = False  # whether the learner or the engine computes in 16 bits
    wired: ClassVar[frozenset[str]] = frozenset({"rounds"})
    _found: float | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        for name, least in (("every", 0), ("probes", 1), ("tokens", 2)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if self.tolerance is not None and not self.tolerance > 0:
            raise ValueError(f"tolerance must be null or above 0, got {self.tolerance}")

    def is_due(self, version: int) -> bool:
        return bool(self.every) and version % self.every == 0

    def chosen(self, token_ids: Sequence[Sequence[int]]) -> list[Sequence[int]]:
        """The shortest of them, cut: what a step learned from shows its update most, and costs least."""
        usable = sorted((ids for ids in token_ids if len(ids) > 1), key=len)
        return [ids[: self.tokens] for ids in usable[: self.probes]]

    async def __call__(
        self,
        engine: Engine,
        says: Callable[[Sequence[int]], Awaitable[list[float]]],
        probes: Sequence[Sequence[int]],
        version: int,
    ) -> Metrics:
        """Metrics of the difference. `says`: the learner's log-probs. Raises TrainingError when it is too large."""
        probes = [ids[: engine.context - 1] for ids in probes]  # to score them the engine samples a token more
        answers = await asyncio.gather(*(engine.score(ids) for ids in probes))
        expected = [await says(ids) for ids in probes]
        pairs = [pair for both in zip(answers, expected, strict=True) for pair in list(zip(*both, strict=True))[1:]]
        gaps = [abs(a - b) for a, b in pairs]
        mean, largest = sum(gaps) / len(gaps), max(gaps)
        if not mean <= self.allowed():  # NaN is no agreement
            raise TrainingError(
                f"after version {version} of the weights was published, the engine's log-probs differ from the "
                f"learner's by {mean:.3g} nats on average (at most {largest:.3g}) over {len(gaps)} tokens, and "
                f"{self.allowed():.3g} is allowed: it computes with other weights, though it says that it has these. "
                "Did it keep the version before, or put a parameter in the wrong place? (sync.tolerance, sync.every)"
            )
        self._found = mean if self._found is None else self._found
        return {"sync/logprob_gap_mean": mean, "sync/logprob_gap_max": largest}

    def allowed(self) -> float:
        if self.tolerance is not None:
            return self.tolerance
        least = LEAST[
            "16 bits" if self.rounds else "float32"
        ]  # the first publication may happen to agree to the last bit
        return MOST if self._found is None else min(MOST, max(least, ROOM * self._found))


def is_16_bit(dtype: object) -> bool:
    """Of a torch type, or its name; None is no type."""
    return str(dtype).removeprefix("torch.") in ("bfloat16", "float16")
