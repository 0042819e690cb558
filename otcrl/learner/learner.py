"""The models being trained: score a batch, update on it, hand out the weights.

The normaliser is global: a token's weight is fixed over its whole mini-batch before any split, so how rows are grouped
into forward passes, and spread over ranks, changes memory and speed, never the gradient. Every rank has the whole batch
and reads its own share of the rows; what was read is added up.
"""

from __future__ import annotations

import math
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from otcrl import dist
from otcrl.algos.functional import token_weights
from otcrl.algos.mismatch import mismatch
from otcrl.algos.parts import loss_of_weighted
from otcrl.errors import TrainingError, nearest
from otcrl.learner.backend import Backend, Unadapted, fold, load_weights, weights
from otcrl.learner.deepspeed_backend import DeepSpeed, DeepSpeedBackend, Frozen
from otcrl.learner.optimizer import Optimizer, check_precision, check_trained
from otcrl.learner.passes import idle_mask, passes
from otcrl.learner.torch_backend import TorchBackend, Whole
from otcrl.models.critic import Critic, SharedCritic
from otcrl.models.lora import Lora
from otcrl.models.packed_attention import Packed
from otcrl.models.policy import autocast, recomputing
from otcrl.models.published import Layers, is_split, plain, published
from otcrl.models.reader import Packing, Reader
from otcrl.models.token_logprobs import Entropy
from otcrl.protocols import Algorithm
from otcrl.tell import tell
from otcrl.types import Batch, Forward, Metrics, Rows, Scores, Targets, rows

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Pass:
    """One forward pass of this rank."""

    index: Tensor  # numbers of its rows in the batch
    rows: Batch  # cut after their last action, on the policy's device
    packed: Packed | None
    counts: bool  # False: made only because another rank has one more


@dataclass(frozen=True)
class Outputs:
    """What the models say in one pass, with what gradients go back through."""

    said: Forward
    hidden_ND: Tensor | None = None  # the policy's states that chose the actions, where the critic reads them
    read_ND: Tensor | None = None  # the same values, whose gradient is the critic's


@dataclass(kw_only=True)
class Learner:
    policy: PreTrainedModel
    reference: PreTrainedModel | None  # the policy itself: what it says without its adapters
    critic: Critic | SharedCritic | None
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
    max_skipped: int  # updates in a row whose loss or gradient is not finite; one more ends the run
    old_logprobs: str  # recompute: one more forward pass | sampler: what the engine reported
    autocast: str | None
    backend: str  # torch: every rank has everything | deepspeed: split over the ranks
    deepspeed: DeepSpeed
    lora: Lora
    critic_trunk: Literal["own", "shared"]  # shared: the critic is a head on the policy's hidden states
    wired = frozenset({"policy", "reference", "critic", "steps", "seed", "temperature"})
    backends: dict[str, Backend] = field(init=False)
    reader: Reader = field(init=False)
    pull_B: Tensor = field(init=False)  # of the last update's rows: how hard each pulled, summed |d loss / d log-prob|

    def __post_init__(self) -> None:
        self._check()
        self._skipped = 0  # updates in a row
        came_split = is_split(self.policy)
        self.lora.adapt(self.policy, self.seed)
        policy = self._trained("policy", self.policy, self._read_policy, self.policy_optimizer)
        self.backends = {"policy": policy}
        for module in () if came_split else (self.reference, self.critic):  # the backend may have moved the policy
            if module is not None and module is not self.policy:
                nn.Module.to(module, self.policy.device)
        self.reader = reader = policy.inside(Reader.of, self.policy, self.packing)
        if reader.why_padded and dist.is_first():
            tell(f"learner.packing={self.packing} is padded for this model: {reader.why_padded}", sys.stdout)
        self._reference: Any = None
        if self.reference is self.policy:
            self._reference = Unadapted(policy)
        elif self.reference is not None:
            self._reference = self._frozen(self.reference, reader.like(self.reference).logprobs)
        if isinstance(self.critic, SharedCritic):  # a few numbers: there is nothing to split
            given = (self.critic, self.critic.forward, self.critic_optimizer, self.max_grad_norm)
            self.backends["critic"] = TorchBackend(*given)
        elif self.critic is not None:
            reader.prepare(self.critic.body)
            self.lora.adapt(self.critic.body, self.seed)
            self.backends["critic"] = self._trained("critic", self.critic, self._read_critic, self.critic_optimizer)
        if came_split:
            self._copy_policy()

    def _check(self) -> None:
        for name, choices in (("old_logprobs", ("recompute", "sampler")), ("backend", ("torch", "deepspeed"))):
            if getattr(self, name) not in choices:
                given = getattr(self, name)
                listed = " or ".join(map(repr, choices))
                raise ValueError(f"{name} must be {listed}, got {given!r}.{nearest(given, choices)}")
        for name, least in (("epochs", 1), ("minibatch_size", 0), ("micro_tokens", 1), ("max_skipped", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        check_precision(self.max_grad_norm, self.autocast)
        check_trained(self.policy.dtype)

    def _read_policy(self, *inputs: Any) -> tuple[Tensor, ...]:
        """(log-probs, entropy), and the hidden states where the critic reads them."""
        shares = isinstance(self.critic, SharedCritic)
        return self.reader.states(*inputs) if shares else self.reader.logprobs(*inputs)

    def _read_critic(self, token_ids_BT: Tensor, packed: Packed | None) -> Tensor:
        """Values. Autocast begins inside, as DeepSpeed ends what was begun outside."""
        assert self.critic is not None, "whoever asks it has one"
        with autocast(self.autocast, token_ids_BT.device):
            return self.critic(token_ids_BT, packed)

    def _trained(self, name: str, module: Any, function: Callable[..., Any], optimizer: Optimizer) -> Backend:
        if self.backend == "deepspeed":
            settings = self.deepspeed.of(name)
            return DeepSpeedBackend(module, function, optimizer, self.max_grad_norm, settings)
        return TorchBackend(module, function, optimizer, self.max_grad_norm)

    def _frozen(self, module: PreTrainedModel, function: Callable[..., Any]) -> Any:
        if self.backend == "deepspeed" and self.deepspeed.zero_stage == 3:
            return Frozen(module, function, self.deepspeed)
        return Whole(module, function)

    # -- score -------------------------------------------------------------------------------------

    @torch.no_grad()
    def score(self, batch: Batch) -> Scores:
        """What the frozen models say; a pass that nothing needs is not made."""
        recompute = self.old_logprobs == "recompute"
        old, ref, values = (torch.zeros_like(batch.sampler_logprobs) for _ in range(3))
        needed = recompute or self._reference is not None or self.critic is not None
        for each in self._passes(batch, batch.action_mask.any(1)) if needed else ():
            place = each.index[: len(each.index) * each.counts], slice(each.rows.token_ids.shape[1])
            if recompute or isinstance(self.critic, SharedCritic):
                said = self._outputs(each, "skip").said
                old[place] = said.logprobs[: len(place[0])].to(old)
                values[place] = said.values[: len(place[0])].to(values)
            elif self.critic is not None:
                values[place] = self._values(each)[: len(place[0])].to(values)
            if self._reference is not None:
                ref[place] = self._said(self._reference, each)[0][: len(place[0])].to(ref)
        if needed:
            dist.add([old, ref, values], "log-probs of the step's batch")
        old = old if recompute else batch.sampler_logprobs
        return Scores(old, ref if self._reference is not None else old, values)

    @torch.no_grad()
    def says(self, token_ids: Sequence[int]) -> list[float]:
        """[L] log-probs (nats, temperature 1) of the policy; 0.0 for the first. What `Engine.score` must agree with."""
        ids_1T = torch.tensor([list(token_ids)])
        scored_1T = torch.arange(len(token_ids))[None] > 0
        device = self.policy.device
        said_1T = torch.zeros(ids_1T.shape)
        for micro in self.reader.micros(ids_1T, scored_1T, len(token_ids)):
            inputs = (ids_1T.to(device), scored_1T.to(device), micro.packed, 1.0, "skip", self.autocast)
            said_1T = self.backends["policy"](*inputs)[0]
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
        """`epochs` passes of mini-batch AdamW.

        A mini-batch whose loss or gradient is not finite is skipped; TrainingError after more than `max_skipped`.
        """
        totals: dict[str, list[float]] = defaultdict(list)
        gap: Metrics = {}
        skipped = 0
        self.pull_B = torch.zeros(len(batch.rewards))
        if self.old_logprobs == "recompute":
            gap = mismatch(scores.old_logprobs, batch.sampler_logprobs, batch.action_mask)
        for number, index in enumerate(self._minibatches(step, len(batch.rewards))):
            what = f"step {step}, mini-batch {number}"
            mini = rows(batch, index)
            new_BT = torch.zeros_like(mini.sampler_logprobs)
            pull_B = torch.zeros(len(index))
            given = (mini, rows(scores, index), rows(targets, index), algo)
            sums = self._accumulate(*given, progress, new_BT, pull_B, what)
            self.pull_B.index_add_(0, index, pull_B)
            if not gap:  # nothing has been updated yet, so new log-probs are the old ones
                looked_B = self._acting(mini, rows(targets, index), algo)
                gap = mismatch(new_BT, mini.sampler_logprobs, mini.action_mask & looked_B[:, None])
            norms = self._step(step, what)
            if self._is_finite(sums | norms, what, index):
                for name, value in (sums | norms).items():
                    totals[name].append(value)
            else:
                skipped += 1
        averages = {f"update/{name}": sum(v) / len(v) for name, v in totals.items()}
        return averages | {"update/skipped": skipped} | {f"rollout/{name}": value for name, value in gap.items()}

    def _is_finite(self, found: Mapping[str, float], what: str, index: Tensor) -> bool:
        """Whether the update was made. Raises TrainingError when too many in a row were not."""
        broken = {name: value for name, value in found.items() if not math.isfinite(value)}
        if not broken:
            self._skipped = 0
            return True
        self._skipped += 1
        said = ", ".join(f"{name} is {value}" for name, value in broken.items())
        why = (
            f"{said} at {what} (rows {index[:8].tolist()}...): nothing was updated. "
            "Is learner.policy_optimizer.lr too high, or a reward not finite?"
        )
        if self._skipped > self.max_skipped:
            raise TrainingError(f"{why} {self._skipped} in a row; learner.max_skipped={self.max_skipped}")
        if dist.is_first():
            tell(f"{why} Skipped, {self._skipped} in a row of at most {self.max_skipped}", sys.stdout)
        return False

    def _accumulate(
        self,
        mini: Batch,
        scores: Scores,
        targets: Targets,
        algo: Algorithm,
        progress: Callable[[int, int], None] = lambda done, total: None,
        new_BT: Tensor | None = None,
        pull_B: Tensor | None = None,
        what: str = "a mini-batch",
    ) -> dict[str, float]:
        """Gradients of one mini-batch, and the weighted mean of every per-token statistic, over all ranks.

        `new_BT` is filled with the log-probs of the rows that were looked at, `pull_B` with how hard each pulled.
        """
        weights_BT = token_weights(mini.action_mask, algo.weighting)
        acting_B = self._acting(mini, targets, algo)
        new_BT = torch.zeros_like(mini.sampler_logprobs) if new_BT is None else new_BT
        pull_B = torch.zeros(len(mini.rewards)) if pull_B is None else pull_B
        sums: dict[str, Tensor] = defaultdict(lambda: torch.zeros((), dtype=torch.float64))
        done, own = 0, list(self._passes(mini, acting_B))
        total = sum(len(each.index) for each in own if each.counts)
        while own:
            each = own.pop(0)  # what attention has made for a pass goes with it
            width, device = each.rows.token_ids.shape[1], self.policy.device
            w_BT = weights_BT[each.index, :width].to(device) * each.counts
            cut_scores, cut_targets = self._cut(scores, each.index, width), self._cut(targets, each.index, width)
            with recomputing(*(backend.module for backend in self.backends.values())):
                outputs = self._outputs(each, "train" if algo.trains_entropy else "measure")
                leaves = cut_off(outputs.said)
                out = loss_of_weighted(algo, leaves, each.rows, cut_scores, cut_targets, w_BT)
                self._backward(outputs, leaves, (out.loss * w_BT).sum(), last=not own)
            if each.counts:
                new_BT[each.index, :width] = leaves.logprobs.detach().to(new_BT)
                if leaves.logprobs.grad is not None:
                    pull_B[each.index] = leaves.logprobs.grad.abs().sum(1).to(pull_B)
                for name, value_BT in {"loss": out.loss, **out.stats}.items():
                    sums[name] += (value_BT.detach() * w_BT).sum().cpu()
                sums["used_weight"] += w_BT.sum().cpu()  # that was looked at, so statistics stay averages
                done += len(each.index)
                progress(done, total)
        return self._added(sums, [new_BT, pull_B], what)

    def _added(self, sums: Mapping[str, Tensor], rows: Sequence[Tensor], what: str) -> dict[str, float]:
        """Of all ranks: the statistics, and in place what each has said of its rows."""
        names = sorted(set().union(*dist.gather(list(sums), what)))
        values = torch.tensor([float(sums.get(name, 0.0)) for name in names], dtype=torch.float64)
        dist.add([values, *rows], what)
        found = dict(zip(names, values.tolist(), strict=True))
        seen = found.pop("used_weight", 0.0)
        means = {k: v if k == "loss" else v / max(seen, 1e-12) for k, v in found.items()}
        return {"loss": 0.0} | means | {"used_weight": seen}

    def _backward(self, outputs: Outputs, leaves: Forward, loss: Tensor, *, last: bool) -> None:
        """Through the algorithm, then through each model: one need not know what the other is made of.

        Through the critic first: where it reads the policy's states, its gradient goes on from there.
        """
        loss.backward()
        said = outputs.said
        parts: dict[str, list[tuple[Tensor, Tensor]]] = {
            "critic": [(said.values, leaves.values)],
            "policy": [(said.logprobs, leaves.logprobs), (said.entropy, leaves.entropy)],
        }
        if outputs.hidden_ND is not None and outputs.read_ND is not None:
            parts["policy"].append((outputs.hidden_ND, outputs.read_ND))
        for name in ("critic", "policy"):
            if (backend := self.backends.get(name)) is None:
                continue
            pairs = [(output, leaf) for output, leaf in parts[name] if leaf.requires_grad]
            gradients = [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for _, leaf in pairs]
            if not torch.isfinite(loss.detach()):  # whatever the gradients are: they must not be used
                gradients = [torch.full_like(gradient, torch.nan) for gradient in gradients]
            backend.backward([output for output, _ in pairs], gradients, last=last)

    def _acting(self, mini: Batch, targets: Targets, algo: Algorithm) -> Tensor:
        """[B] bool: rows that are read."""
        acting_B = mini.action_mask.any(1)
        if algo.only_advantages_matter:  # the rest would add exactly nothing
            acting_B &= (targets.advantages != 0).any(1)
        return acting_B

    def _step(self, step: int, what: str) -> dict[str, float]:
        configs = {"policy": self.policy_optimizer, "critic": self.critic_optimizer}
        return {
            f"{name}_grad_norm": backend.step(configs[name].rate(step, self.steps), f"{what}: gradients of the {name}")
            for name, backend in self.backends.items()
        }

    # -- pieces ------------------------------------------------------------------------------------

    def _outputs(self, each: Pass, entropy: Entropy) -> Outputs:
        logprobs_BT, entropy_BT, *states = self._said(self.backends["policy"], each, entropy)
        if states:
            hidden_ND = states[0]
            read_ND = hidden_ND.detach().requires_grad_(hidden_ND.requires_grad)
            values_BT = self.backends["critic"](read_ND, each.rows.action_mask)
            return Outputs(Forward(logprobs_BT, entropy_BT, values_BT), hidden_ND, read_ND)
        values_BT = self._values(each) if self.critic is not None else torch.zeros_like(logprobs_BT)
        return Outputs(Forward(logprobs_BT, entropy_BT, values_BT))

    def _said(self, backend: Any, each: Pass, entropy: Entropy = "skip") -> tuple[Tensor, ...]:
        ids_BT, mask_BT = each.rows.token_ids, each.rows.action_mask
        return backend(ids_BT, mask_BT, each.packed, self.temperature, entropy, self.autocast)

    def _values(self, each: Pass) -> Tensor:
        return self.backends["critic"](each.rows.token_ids, each.packed) * each.rows.action_mask

    def _minibatches(self, step: int, count: int) -> Iterator[Tensor]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
        for _ in range(self.epochs):
            yield from torch.randperm(count, generator=generator).split(self.minibatch_size or count)

    def _passes(self, batch: Batch, chosen_B: Tensor) -> Iterator[Pass]:
        """This rank's share of the rows."""
        mask_BT = batch.action_mask & chosen_B[:, None]
        own = passes(self.reader, self.backends["policy"], batch.token_ids, mask_BT, self.micro_tokens)
        for micro, counts in own:
            index = torch.tensor(micro.rows)
            cut = self._cut(batch, index, micro.width)
            if not counts:
                cut = replace(cut, action_mask=idle_mask().to(cut.action_mask.device))
            yield Pass(index, cut, micro.packed, counts)

    def _cut(self, data: Rows, index: Tensor, width: int) -> Rows:
        """Rows `index`, columns up to `width`, on the policy's device."""
        picked = rows(data, index)
        values = (getattr(picked, f.name).to(self.policy.device) for f in fields(picked))
        return type(data)(*(value[:, :width] if value.dim() == 2 else value for value in values))

    # -- weights and state ---------------------------------------------------------------------------

    def begin(self) -> None:
        """Reference and critic start from the policy as it is now: it may have had a cold start.

        In a run of adapters, what they have learned becomes part of the weights beside them.
        """
        if self.lora.rank:
            fold(self.backends["policy"])
        self._copy_policy()
        self.backends["policy"].begin(self.policy_optimizer, self.max_grad_norm)

    def _copy_policy(self) -> None:
        """Reference and critic get its weights."""
        prefix = f"{self.policy.base_model_prefix}."
        copies = []
        if self.reference is not None and self.reference is not self.policy:
            copies.append((self._reference, ""))
        if isinstance(self.critic, Critic):
            copies.append((self.backends["critic"], prefix))
        for backend, cut in copies:
            own = backend.module.body if cut else backend.module
            parameters = {plain(name): p for name, p in own.named_parameters()}
            for name, value in self.weights():
                if name.removeprefix(cut) in parameters:
                    backend.put(parameters[name.removeprefix(cut)], value)

    def weights(self) -> Layers:
        """The policy's, whole, by the plain model's names, tied ones once; each valid until the next; on all ranks."""
        return weights(self.backends["policy"])

    def shapes(self) -> dict[str, torch.Size]:
        """Of `weights`, by name."""
        return {weight.name: weight.shape for weight in published(self.policy)}

    def load_weights(self, values: Iterable[tuple[str, Tensor]]) -> None:
        """The policy's weights back. With adapters nothing: the plain model is as it was, and they are in `state`."""
        if not self.lora.rank:
            load_weights(self.backends["policy"], values)

    def refer_to(self, values: Iterable[tuple[str, Tensor]]) -> None:
        """What `begin` started from before the run was interrupted: the reference has these weights.

        In a run of adapters, so do all models beside theirs.
        """
        if self.lora.rank:
            load_weights(self.backends["policy"], values)
            self._copy_policy()
        elif self._reference is not None:
            load_weights(self._reference, values)

    def state(self) -> Iterator[tuple[str, Tensor]]:
        """All else that training goes on from: what the optimizers have gathered, the critic, adapters.

        By names that say nothing of how the work is split. On all ranks, and each valid until the next.
        """
        yield "learner/skipped", torch.tensor(self._skipped)
        for name, backend in self.backends.items():
            for key, value in backend.state():
                yield f"{name}/{key}", value
            for key, parameter in self._own_weights(name):
                with backend.whole([parameter]):
                    yield f"{name}/weights/{key}", parameter.detach()

    def load_state(self, read: Callable[[str], Tensor]) -> None:
        """What `state` gave; `read` has it by its name."""
        self._skipped = int(read("learner/skipped"))
        for name, backend in self.backends.items():
            for key, parameter in self._own_weights(name):
                backend.put(parameter, read(f"{name}/weights/{key}"))
            backend.load_state(lambda key, name=name: read(f"{name}/{key}"))

    def _own_weights(self, name: str) -> list[tuple[str, nn.Parameter]]:
        """What is trained and not in the published weights."""
        if name == "policy" and not self.lora.rank:
            return []
        return [(key, p) for key, p in self.backends[name].module.named_parameters() if p.requires_grad]


def cut_off(outputs: Forward) -> Forward:
    """The same values, whose gradients end here."""
    values = (getattr(outputs, f.name) for f in fields(outputs))
    return Forward(*(value.detach().requires_grad_(value.requires_grad) for value in values))
