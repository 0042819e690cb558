"""The half of the embedded engine that runs in its thread: prefill, decode and sample; and what it asks of a model."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedModel

from otcrl.bucketing import by_length
from otcrl.errors import ConfigError, EngineError, nearest
from otcrl.models.policy import token_logprobs
from otcrl.protocols import Completion
from otcrl.rollout.kv_pool import GROUPED_ATTENTION, KVPool, Window
from otcrl.rollout.sampling import sample, uniforms


@dataclass(slots=True)
class Stats:
    """What the engine has done so far; counts only grow."""

    prefilled: int = 0  # prompt and observation tokens whose K/V a prefill computed
    reused: int = 0  # tokens of `generate` calls whose K/V was there from the session's last one
    shared: int = 0  # prompt tokens whose K/V was copied from an identical prompt
    sampled: int = 0  # tokens
    steps: int = 0  # decode forwards
    evicted: int = 0  # paused sessions that lost their cache to another


@dataclass(slots=True, eq=False)
class Request:
    """One `generate` call."""

    future: asyncio.Future[Completion]
    start: int  # length of the prompt
    end: int  # length at which the trajectory must stop
    stop: tuple[str, ...]
    watch: frozenset[int]  # token ids that end it, or whose text may complete a stop string
    temperature: float
    seed: int
    priority: int  # lower goes first
    logprobs: list[float] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)


@dataclass(slots=True, eq=False)
class Session:
    """One trajectory. The K/V of `ids[:cached]` is in row `row` of the pool."""

    name: str
    ids: list[int] = field(default_factory=list)
    cached: int = 0
    row: int = -1  # -1: no cache
    request: Request | None = None  # None: paused, e.g. for a tool

    @property
    def missing(self) -> int:
        """Tokens to prefill. The last token is not among them: it goes through a decode step."""
        return len(self.ids) - 1 - self.cached


@dataclass(frozen=True, slots=True)
class Moves:
    """Rows of the pool that change places."""

    source: Sequence[int] = ()
    target: Sequence[int] = ()
    width: int = 0  # tokens of each that matter


class Forward:
    def __init__(self, model: PreTrainedModel, *, max_rows: int, context: int, batch_tokens: int) -> None:
        check_model(model, context)
        if model.config._attn_implementation != "eager":
            model.set_attn_implementation(GROUPED_ATTENTION)
        self.model = model.eval()
        self.stats = Stats()
        self._max_rows, self._context, self._batch_tokens = max_rows, context, batch_tokens
        self._pool = KVPool(max_rows=max_rows, max_tokens=context)
        self._is_cut_short = False

    def reset(self) -> None:
        """The next step begins with an empty pool. A step may still be under way: its result is lost."""
        self._is_cut_short = True

    def step(self, running: Sequence[Session], moves: Moves) -> tuple[list[int], list[float]]:
        """One more token for each of `running`, which are the first rows in order, and its log-prob."""
        with torch.inference_mode():
            if self._is_cut_short:
                self._pool = KVPool(max_rows=self._max_rows, max_tokens=self._context)
                self._is_cut_short = False
            self._pool.reserve(
                rows=1 + max((len(running) - 1, *moves.source, *moves.target)),
                tokens=max((moves.width, *(len(here.ids) for here in running))),
            )
            if moves.source:
                self._pool.copy(moves.source, moves.target, moves.width)
            self._prefill(running)
            return self._decode(running)

    def score(self, ids: Sequence[int]) -> list[float]:
        """[L] log-probs of `ids`, nats, at temperature 1; 0.0 for the first."""
        ids_1T = torch.tensor([list(ids)], device=self.model.device)
        scored_1T = torch.ones_like(ids_1T, dtype=torch.bool)
        scored_1T[:, 0] = False
        with torch.inference_mode():
            return token_logprobs(self.model, ids_1T, scored_1T)[0][0].tolist()

    def _prefill(self, running: Sequence[Session]) -> None:
        """The K/V of all tokens but the last; identical fresh prompts (a group) are computed once."""
        todo: list[Session] = []
        fresh: dict[tuple[int, ...], Session] = {}
        twins: list[tuple[Session, Session]] = []  # of one prompt: the one that is computed, one that copies
        for here in running:
            if here.missing and not here.cached:
                original = fresh.setdefault(tuple(here.ids[:-1]), here)
                if original is not here:
                    twins.append((original, here))
                    continue
            if here.missing:
                todo.append(here)
        for bucket in by_length([here.missing for here in todo], self._batch_tokens):
            self._extend([todo[place] for place in bucket])
        if twins:
            source, target = [original.row for original, _ in twins], [twin.row for _, twin in twins]
            self._pool.copy(source, target, max(original.cached for original, _ in twins))
        for original, twin in twins:
            twin.cached = original.cached
            self.stats.shared += twin.cached

    def _extend(self, batch: Sequence[Session]) -> None:
        rows = [here.row for here in batch]
        while batch[0].missing:  # more than once only if it is alone and longer than one forward may be
            pieces = [here.ids[here.cached : -1][: self._batch_tokens] for here in batch]
            self.model.base_model(**self._inputs(rows, pieces, [here.cached for here in batch]))
            for here, piece in zip(batch, pieces, strict=True):
                here.cached += len(piece)
                self.stats.prefilled += len(piece)

    def _decode(self, running: Sequence[Session]) -> tuple[list[int], list[float]]:
        pieces, starts = [here.ids[-1:] for here in running], [here.cached for here in running]
        logits = self.model(**self._inputs(None, pieces, starts)).logits[:, -1]
        requests = [here.request for here in running if here.request is not None]
        draws = uniforms([r.seed for r in requests], [len(here.ids) for here in running])
        temperatures = torch.tensor([r.temperature for r in requests], device=logits.device)
        ids, logprobs = sample(logits, temperatures, torch.from_numpy(draws).to(logits.device))
        if not logprobs.isfinite().all():
            raise EngineError("the model's logits are not finite: its weights have diverged")
        self.stats.steps += 1
        self.stats.sampled += len(running)
        return ids.tolist(), logprobs.tolist()

    def _inputs(self, rows: list[int] | None, pieces: list[list[int]], starts: list[int]) -> dict[str, object]:
        """Of a forward in which `pieces[b]`, right-padded, goes on from position `starts[b]` of pool row `rows[b]`.

        `rows` None stands for the first rows of the pool, which are then read in place.
        """
        device = self.model.device
        longest = max(map(len, pieces))
        starts_B, lengths_B = torch.tensor(starts), torch.tensor([len(piece) for piece in pieces])
        rows_B = torch.arange(len(pieces)) if rows is None else torch.tensor(rows)
        position_BT = starts_B[:, None] + torch.arange(longest)
        batch_N, column_N = (torch.arange(longest) < lengths_B[:, None]).nonzero(as_tuple=True)
        ids_BT = torch.zeros(len(pieces), longest, dtype=torch.int64)
        ids_BT[batch_N, column_N] = torch.tensor([token for piece in pieces for token in piece])
        width = int((starts_B + lengths_B).max())
        self._pool.window = Window(
            rows=slice(len(pieces)) if rows is None else rows_B.to(device),
            width=width,
            batch=batch_N.to(device),
            column=column_N.to(device),
            row=rows_B[batch_N].to(device),
            position=position_BT[batch_N, column_N].to(device),
        )
        position_BT = position_BT.clamp_max(self._context - 1).to(device)  # padding may reach past the last position
        is_future_BTS = torch.arange(width, device=device) > position_BT[:, :, None]
        mask = torch.zeros(is_future_BTS.shape, dtype=self.model.dtype, device=device)
        return {
            "input_ids": ids_BT.to(device),
            "position_ids": position_BT,
            "attention_mask": mask.masked_fill_(is_future_BTS, torch.finfo(mask.dtype).min)[:, None],
            "past_key_values": self._pool,
            "use_cache": True,
        }


def check_model(model: PreTrainedModel, context: int) -> None:
    """Raises ConfigError if the model's memory is not plain attention over the whole context."""
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if kinds or config.is_encoder_decoder or model._is_stateful:
        what = ", ".join(sorted(kinds)) or config.model_type
        raise ConfigError(f"the embedded engine runs decoders with plain attention only, not {what}")
    limits = {name: getattr(config, name, None) for name in ("max_position_embeddings", "sliding_window")}
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") == "longrope":  # past this, the longest row of a batch would change all the others
        limits["original_max_position_embeddings"] = rope.get("original_max_position_embeddings")
    for name, most in limits.items():
        if most is not None and context > most:
            raise ConfigError(f"context is {context}, and the model's {name} is {most}: set context={most} or less")


def copy_weights(model: PreTrainedModel, weights: Iterable[tuple[str, Tensor]]) -> None:
    """Every parameter overwritten in place, by name; for tied ones either name will do. Raises EngineError."""
    own = model.state_dict(keep_vars=True)
    missing = {id(parameter): name for name, parameter in model.named_parameters()}
    for name, tensor in weights:
        if name not in own:
            raise EngineError(f"the engine's model has no parameter {name!r}.{nearest(name, own)}")
        if tensor.shape != own[name].shape:
            shapes = f"{list(tensor.shape)}, and the engine's is {list(own[name].shape)}"
            raise EngineError(f"parameter {name!r} has shape {shapes}")
        own[name].detach().copy_(tensor.detach())
        missing.pop(id(own[name]), None)
    if missing:
        raise EngineError(f"{len(missing)} parameters were not among the new weights: {', '.join(missing.values())}")
