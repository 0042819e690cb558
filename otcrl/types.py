"""Everything that flows through otcrl, in the order it flows:

    Problem -> Trajectory -> Reward -> Batch -> Scores -> Targets -> Metrics

Dimension key. A tensor (or list) whose shape is known ends in these letters.
    P  problems in one step
    G  trajectories sampled per problem (a group)
    B  trajectories in a batch, B = P * G, or fewer inside a mini-batch
    T  tokens in a padded trajectory
    L  tokens in one ragged trajectory
    V  vocabulary

Alignment. Index t always speaks about token t: `logprobs_BT[b, t]` is
log pi(token t | tokens < t), `values_BT[b, t]` is V(tokens < t). Column 0 has no
past, so it is never an action.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from enum import StrEnum
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:  # torch takes seconds to import, and `otcrl --help` needs none of it
    from torch import Tensor

Metrics = dict[str, float]


class Stop(StrEnum):
    """Why a trajectory ended."""

    ANSWERED = "answered"
    MAX_CALLS = "max_calls"
    MAX_TURNS = "max_turns"
    MAX_TOKENS = "max_tokens"
    INVALID = "invalid"  # the policy ended its text with neither a call nor an answer
    VOID = "void"  # infrastructure failed: no reward, no loss, no statistics


class Outcome(StrEnum):
    """What became of a call the policy wrote."""

    OK = "ok"
    MODEL_ERROR = "model_error"  # the tool ran and the policy's input failed in it
    INFRA_ERROR = "infra_error"  # the tool is down; the trajectory is void
    INVALID = "invalid"  # malformed, or no such tool: nothing ran
    OVER_BUDGET = "over_budget"  # one call too many: nothing ran, the trajectory ended


@dataclass(frozen=True, slots=True)
class Problem:
    """One question and how to check it."""

    id: str  # unique over all sources: "source/split/index"
    question: str  # as the data set words it; the dialect adds the instructions
    answers: tuple[str, ...]  # any of them is right
    source: str  # data set, for per-source metrics
    optimal_calls: int | None = None  # least tool calls that suffice, where it is known (Atlas)
    meta: Mapping[str, object] = field(default_factory=dict)
    place: str = field(default="", compare=False)  # file and row that it was read from, for errors; "" where made


@dataclass(frozen=True, slots=True)
class ToolCall:
    """One call the policy wrote, whatever became of it."""

    tool: str
    arguments: str
    result: str  # as much of it as the policy was shown; why nothing came back, where the outcome is INFRA_ERROR
    outcome: Outcome
    seconds: float = 0.0
    price: float = 0.0  # money; 0 where the tool is free
    cached: bool = False


@dataclass(frozen=True, slots=True)
class Trajectory:
    """One finished attempt at one problem. Token lists have equal length L."""

    problem: Problem
    token_ids: list[int]  # [L] prompt, sampled and observation tokens, as the engine saw them
    action_mask: list[bool]  # [L] True where the policy sampled the token
    logprobs: list[float]  # [L] nats, under the sampler; 0.0 where not an action
    versions: list[int]  # [L] weights that sampled the token; -1 where not an action
    tool_calls: tuple[ToolCall, ...]
    answer: str | None  # from sampled text only; None when the policy gave none
    violations: tuple[str, ...]  # format rules broken in the sampled text; empty = well-formed
    stop: Stop
    response: str  # everything after the prompt, decoded for people; never encoded again
    turns: tuple[str, ...] = ()  # of it what was sampled, a text for each completion; results stand between them
    timings: Metrics = field(default_factory=dict)  # seconds: generate_s, tool_s

    def __post_init__(self) -> None:
        lengths = {len(self.token_ids), len(self.action_mask), len(self.logprobs), len(self.versions)}
        assert len(lengths) == 1, f"token lists differ in length: {lengths}"


COUNTERS: dict[str, frozenset[Outcome]] = {
    "emitted": frozenset(Outcome),
    "executed": frozenset({Outcome.OK}),
    "failed": frozenset({Outcome.MODEL_ERROR}),
    "invalid": frozenset({Outcome.INVALID}),
    "well_formed": frozenset({Outcome.OK, Outcome.MODEL_ERROR}),  # executed + failed: the default for TC and TP
}


def count_calls(trajectory: Trajectory, counter: str) -> int:
    """How many calls of one kind the trajectory holds; `counter` is a key of COUNTERS."""
    outcomes = COUNTERS[counter]
    return sum(call.outcome in outcomes for call in trajectory.tool_calls)


@dataclass(frozen=True, slots=True)
class Reward:
    """The scalar that is optimised, and the named parts it came from (logged only)."""

    value: float
    parts: Metrics = field(default_factory=dict)
    unshaped: float | None = None  # the value without what is paid for length alone; None: there is no such part


@dataclass(frozen=True, slots=True)
class Batch:
    """Trajectories as right-padded tensors. Never mutated after `pack`."""

    token_ids: Tensor  # [B, T] int64
    attention_mask: Tensor  # [B, T] bool, False on padding
    action_mask: Tensor  # [B, T] bool, True where the policy sampled the token
    sampler_logprobs: Tensor  # [B, T] float32, nats
    rewards: Tensor  # [B] float32
    group_ids: Tensor  # [B] int64, equal for trajectories of one problem


@dataclass(frozen=True, slots=True)
class Scores:
    """What the frozen models say about a batch before the update begins."""

    old_logprobs: Tensor  # [B, T] float32, nats, under the policy being updated
    ref_logprobs: Tensor  # [B, T] float32, nats, under the reference; old_logprobs if there is none
    values: Tensor  # [B, T] float32, reward units; zeros without a critic


@dataclass(frozen=True, slots=True)
class Targets:
    """What the update should move towards."""

    advantages: Tensor  # [B, T] float32, 0 off actions
    returns: Tensor  # [B, T] float32, reward units; what the critic should have said


@dataclass(frozen=True, slots=True)
class Forward:
    """One differentiable pass of the models being trained."""

    logprobs: Tensor  # [B, T] float32, nats
    entropy: Tensor  # [B, T] float32, nats
    values: Tensor  # [B, T] float32, reward units; zeros without a critic


@dataclass(frozen=True, slots=True)
class TokenLoss:
    """Per-token loss and per-token diagnostics; the learner averages both alike."""

    loss: Tensor  # [B, T] float32
    stats: dict[str, Tensor] = field(default_factory=dict)  # name -> [B, T]


Rows = TypeVar("Rows", Batch, Scores, Targets)


def rows(data: Rows, index: slice | Tensor) -> Rows:
    """The same data for fewer trajectories: every field indexed along B."""
    return type(data)(*(getattr(data, f.name)[index] for f in fields(data)))


def pack(groups_PG: Sequence[Sequence[tuple[Trajectory, Reward]]], pad_id: int) -> Batch:
    """Flatten `[P][G]` scored trajectories into one right-padded batch. Groups may differ in size."""
    import torch

    flat = [(g, t, r) for g, group in enumerate(groups_PG) for t, r in group]
    longest = max(len(t.token_ids) for _, t, _ in flat)

    def padded(lists: Sequence[list[int] | list[float] | list[bool]], fill: float, dtype: torch.dtype) -> Tensor:
        return torch.tensor([[*x, *[fill] * (longest - len(x))] for x in lists], dtype=dtype)

    return Batch(
        token_ids=padded([t.token_ids for _, t, _ in flat], pad_id, torch.int64),
        attention_mask=padded([[True] * len(t.token_ids) for _, t, _ in flat], False, torch.bool),
        action_mask=padded([t.action_mask for _, t, _ in flat], False, torch.bool),
        sampler_logprobs=padded([t.logprobs for _, t, _ in flat], 0.0, torch.float32),
        rewards=torch.tensor([r.value for _, _, r in flat], dtype=torch.float32),
        group_ids=torch.tensor([g for g, _, _ in flat], dtype=torch.int64),
    )
