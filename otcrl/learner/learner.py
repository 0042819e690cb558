"""The models being trained: score a batch, update on it, hand out the weights.

The normaliser is global: a token's weight is fixed over its whole mini-batch before any split, so how
rows are grouped into forward passes changes memory and speed, never the gradient.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from otcrl.algos.functional import token_weights
from otcrl.algos.mismatch import mismatch
from otcrl.errors import TrainingError, nearest
from otcrl.learner.optimizer import Optimizer, check_precision
from otcrl.learner.thread import stop_if_cancelled
from otcrl.models.packed_attention import Packed
from otcrl.models.policy import autocast, recomputing
from otcrl.models.reader import Packing, Reader
from otcrl.models.token_logprobs import Entropy
from otcrl.protocols import Algorithm
from otcrl.types import Batch, Forward, Metrics, Rows, Scores, Targets, rows

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from otcrl.models.critic import Critic


@dataclass(kw_only=True)
class Learner:
    policy: PreTrainedModel
    reference: PreTrainedModel | None
    critic: Critic | None
    steps: int  # of the whole run, for the schedules
    seed: int
    temperature: float  # of the rollout: the sampled distribution is the one that is trained
    policy_optimizer: Optimizer
    critic_optimizer: Optimizer
    epochs: int
    minibatch_size: int  # trajectories per optimizer step; 0: all of them
    packing: Packing  # what a forward pass may hold of its rows: their common prefixes once, no padding, or padding
    micro_tokens: int  # per forward pass, as they are packed
    max_grad_norm: float
    old_logprobs: str  # recompute: one more forward pass | sampler: what the engine reported
    autocast: str | None
    wired = frozenset({"policy", "reference", "critic", "steps", "seed", "temperature"})
    optimizers: dict[str, torch.optim.AdamW] = field(init=False)

    def __post_init__(self) -> None:
        if self.old_logprobs not in ("recompute", "sampler"):
            hint = nearest(self.old_logprobs, ("recompute", "sampler"))
            raise ValueError(f"old_logprobs must be 'recompute' or 'sampler', got {self.old_logprobs!r}.{hint}")
        for name, least in (("epochs", 1), ("minibatch_size", 0), ("micro_tokens", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        check_precision(self.max_grad_norm, self.autocast)
        self._readers = {"policy": Reader.of(self.policy, self.packing, self.autocast)}
        if self._readers["policy"].why_padded:
            print(
                f"otcrl: learner.packing={self.packing} is padded for this model: {self._readers['policy'].why_padded}"
            )
        if self.reference is not None:
            self._readers["reference"] = self._readers["policy"].like(self.reference)
        if self.critic is not None:
            self._readers["policy"].prepare(self.critic.body)
        self.optimizers = {"policy": self.policy_optimizer.build(self.policy.parameters())}
        if self.critic is not None:
            self.optimizers["critic"] = self.critic_optimizer.build(self.critic.parameters())

    # -- score -------------------------------------------------------------------------------------

    @torch.no_grad()
    def score(self, batch: Batch) -> Scores:
        """What the frozen models say; a pass that nothing needs is not made."""
        old, ref, values = (torch.zeros_like(batch.sampler_logprobs) for _ in range(3))
        if self.old_logprobs == "sampler":
            old = batch.sampler_logprobs
        for index, micro, packed in self._micros(batch, batch.action_mask.any(1)):
            width = micro.token_ids.shape[1]
            if self.old_logprobs == "recompute":
                old[index, :width] = self._logprobs("policy", micro, packed)[0].to(old)
            if self.reference is not None:
                ref[index, :width] = self._logprobs("reference", micro, packed)[0].to(ref)
            if self.critic is not None:
                values[index, :width] = self._values(micro, packed).to(values)
        return Scores(old, ref if self.reference is not None else old, values)

    @torch.no_grad()
    def says(self, token_ids: Sequence[int]) -> list[float]:
        """[L] log-probs (nats, temperature 1) of the policy; 0.0 for the first. What `Engine.score` must agree with."""
        ids_1T = torch.tensor([list(token_ids)])
        scored_1T = torch.arange(len(token_ids))[None] > 0
        reader, device = self._readers["policy"], self.policy.device
        said_1T = torch.zeros(ids_1T.shape)
        for micro in reader.micros(ids_1T, scored_1T, len(token_ids)):
            said_1T = reader.logprobs(ids_1T.to(device), scored_1T.to(device), micro.packed)[0]
        return said_1T[0].tolist()

    # -- update ------------------------------------------------------------------------------------

    def update(
        self,
        step: int,
        batch: Batch,
        scores: Scores,
        targets: Targets,
        algo: Algorithm,
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> Metrics:
        """`epochs` passes of mini-batch AdamW. TrainingError, before a weight is touched, at a loss of NaN."""
        configs = {"policy": self.policy_optimizer, "critic": self.critic_optimizer}
        for name, optimizer in self.optimizers.items():
            configs[name].set_rate(optimizer, step, self.steps)
        totals: dict[str, list[float]] = defaultdict(list)
        gap: Metrics = {}
        if self.old_logprobs == "recompute":
            gap = mismatch(scores.old_logprobs, batch.sampler_logprobs, batch.action_mask)
        for number, index in enumerate(self._minibatches(step, len(batch.rewards))):
            mini = rows(batch, index)
            new_BT = torch.full_like(mini.sampler_logprobs, torch.nan)
            sums = self._accumulate(mini, rows(scores, index), rows(targets, index), algo, progress, new_BT)
            if not gap:  # nothing has been updated yet, so new log-probs are the old ones
                gap = mismatch(new_BT, mini.sampler_logprobs, mini.action_mask & ~new_BT.isnan())
            norms = self._clip()
            for name, value in {"loss": sums["loss"], **norms}.items():
                if not math.isfinite(value):
                    raise TrainingError(
                        f"{name} is {value} at step {step}, mini-batch {number} (rows {index[:8].tolist()}...): "
                        "nothing was updated. Is learner.policy_optimizer.lr too high, or a reward not finite?"
                    )
            self._step()
            for name, value in (sums | norms).items():
                totals[name].append(value)
        averages = {f"update/{name}": sum(v) / len(v) for name, v in totals.items()}
        return averages | {f"rollout/{name}": value for name, value in gap.items()}

    def _accumulate(
        self,
        mini: Batch,
        scores: Scores,
        targets: Targets,
        algo: Algorithm,
        progress: Callable[[int, int], None] = lambda done, total: None,
        new_BT: Tensor | None = None,
    ) -> dict[str, float]:
        """Gradients of one mini-batch, and the weighted mean of every per-token statistic.

        `new_BT` is filled with the log-probs of the rows that were looked at.
        """
        weights_BT = token_weights(mini.action_mask, algo.weighting)
        acting_B = mini.action_mask.any(1)
        if algo.only_advantages_matter:  # the rest would add exactly nothing
            acting_B &= (targets.advantages != 0).any(1)
        sums: dict[str, float] = defaultdict(float)
        done, total = 0, int(acting_B.sum())
        seen = 0.0  # share of the weight that was looked at, so statistics stay averages
        for index, micro, packed in self._micros(mini, acting_B):
            width, device = micro.token_ids.shape[1], self.policy.device
            w_BT = weights_BT[index, :width].to(device)
            cut_scores, cut_targets = self._cut(scores, index, width), self._cut(targets, index, width)
            new = self._forward(micro, packed, "train" if algo.trains_entropy else "measure")
            out = algo.token_loss(new, micro, cut_scores, cut_targets)
            loss = (out.loss * w_BT).sum()
            loss.backward()
            if new_BT is not None:
                new_BT[index, :width] = new.logprobs.detach().to(new_BT)
            for name, value_BT in {"loss": out.loss, **out.stats}.items():
                sums[name] += (value_BT.detach() * w_BT).sum().item()
            seen += w_BT.sum().item()
            done += len(index)
            progress(done, total)
        means = {k: v if k == "loss" else v / max(seen, 1e-12) for k, v in sums.items()}
        return {"loss": 0.0} | means | {"used_weight": seen}

    def _clip(self) -> dict[str, float]:
        norms = {}
        for name, optimizer in self.optimizers.items():
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            norms[f"{name}_grad_norm"] = nn.utils.clip_grad_norm_(parameters, self.max_grad_norm).item()
        return norms

    def _step(self) -> None:
        for optimizer in self.optimizers.values():
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    # -- pieces ------------------------------------------------------------------------------------

    def _forward(self, micro: Batch, packed: Packed | None, entropy: Entropy) -> Forward:
        with recomputing(self.policy, *([self.critic] if self.critic is not None else [])):
            logprobs_BT, entropy_BT = self._logprobs("policy", micro, packed, entropy)
            values_BT = self._values(micro, packed) if self.critic is not None else torch.zeros_like(logprobs_BT)
        return Forward(logprobs_BT, entropy_BT, values_BT)

    def _logprobs(
        self, name: str, micro: Batch, packed: Packed | None, entropy: Entropy = "skip"
    ) -> tuple[Tensor, Tensor]:
        reader = self._readers[name]
        return reader.logprobs(micro.token_ids, micro.action_mask, packed, self.temperature, entropy)

    def _values(self, micro: Batch, packed: Packed | None) -> Tensor:
        assert self.critic is not None
        with autocast(self.autocast, micro.token_ids.device):
            return self.critic(micro.token_ids, packed) * micro.action_mask

    def _minibatches(self, step: int, count: int) -> Iterator[Tensor]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
        for _ in range(self.epochs):
            yield from torch.randperm(count, generator=generator).split(self.minibatch_size or count)

    def _micros(self, batch: Batch, chosen_B: Tensor) -> Iterator[tuple[Tensor, Batch, Packed | None]]:
        """One forward pass each: row numbers, those rows cut after their last action on the policy's device, packed."""
        mask_BT = batch.action_mask & chosen_B[:, None]
        for micro in self._readers["policy"].micros(batch.token_ids, mask_BT, self.micro_tokens):
            stop_if_cancelled()
            index = torch.tensor(micro.rows)
            yield index, self._cut(batch, index, micro.width), micro.packed

    def _cut(self, data: Rows, index: Tensor, width: int) -> Rows:
        """Rows `index`, columns up to `width`, on the policy's device."""
        picked = rows(data, index)
        values = (getattr(picked, f.name).to(self.policy.device) for f in fields(picked))
        return type(data)(*(value[:, :width] if value.dim() == 2 else value for value in values))

    # -- weights and state ---------------------------------------------------------------------------

    def begin(self) -> None:
        """Reference and critic start from the policy as it is now: it may have had a cold start."""
        if self.reference is not None:
            self.reference.load_state_dict(self.policy.state_dict())
        if self.critic is not None:
            self.critic.body.load_state_dict(self.policy.base_model.state_dict())

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        for name, parameter in self.policy.named_parameters():  # tied parameters once
            yield name, parameter.detach()

    def state_dict(self) -> dict[str, Any]:
        """Optimizers and critic; the policy is saved as a Hugging Face directory of its own."""
        state: dict[str, Any] = {name: optimizer.state_dict() for name, optimizer in self.optimizers.items()}
        return state | ({"critic_weights": self.critic.state_dict()} if self.critic is not None else {})

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for name, optimizer in self.optimizers.items():
            optimizer.load_state_dict(state[name])
        if self.critic is not None:
            self.critic.load_state_dict(state["critic_weights"])
