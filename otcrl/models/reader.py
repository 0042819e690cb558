"""How a causal language model is read: as cheaply as this one can be without saying anything else.

`Reader.of` tries on a few tokens what it is about to rely on, so a model with an attention, positions or logits of its
own kind is found out at once, whatever the kind.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from otcrl import packing
from otcrl.bucketing import by_length
from otcrl.models.packed_attention import PACKED_ATTENTION, Packed
from otcrl.models.policy import autocast, output_layer, token_states
from otcrl.models.token_logprobs import Entropy

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

Packing = Literal["shared", "packed", "padded"]

PROBE = ((1, 2, 3, 4, 5), (1, 2, 3, 6), (7, 8, 9, 1, 2, 3))  # token ids; two rows begin alike
CLOSE = 1e-4  # of hidden states, relative to their length; those of another attention differ by about 1
CLOSE_IN_HALF = 0.05  # in bfloat16 and float16


@dataclass(frozen=True)
class Micro:
    """One forward pass."""

    rows: list[int]
    width: int  # columns up to the last action
    packed: Packed | None  # None: padded


@dataclass(frozen=True)
class Reader:
    model: PreTrainedModel
    packing: Packing
    why_padded: str  # empty unless rows should be packed and cannot be
    head: nn.Linear | None  # None: logits are more than the output layer of hidden states

    @classmethod
    def of(cls, model: PreTrainedModel, packing: Packing) -> Reader:
        """Packs if it is asked to and the model can be packed; the model's attention is then another."""
        why_padded = why_not_packed(model) if packing != "padded" else ""
        packing = "padded" if why_padded else packing
        reader = cls(model, packing, why_padded, plain_head(model))
        reader.prepare(model)
        return reader

    def prepare(self, model: PreTrainedModel) -> None:
        """Another copy of the model, or of its body, can be read in the same way."""
        if self.packing != "padded":
            model.set_attn_implementation(PACKED_ATTENTION)

    def like(self, model: PreTrainedModel) -> Reader:
        """The same for another copy."""
        self.prepare(model)
        return replace(self, model=model, head=output_layer(model) if self.head is not None else None)

    def micros(
        self, token_ids_BT: Tensor, action_mask_BT: Tensor, max_tokens: int, rank: int = 0, ranks: int = 1
    ) -> Iterator[Micro]:
        """All rows with an action, up to the token before the last one: nothing depends on the rest.

        A pass has at most `max_tokens` tokens, or one row: what rows share counts once, and padding counts. Of several
        ranks, the share of one, which has about as many tokens as any other's.
        """
        T = token_ids_BT.shape[1]
        ids = token_ids_BT.numpy()
        last_B = (action_mask_BT * torch.arange(T)).amax(1)
        acting = last_B.nonzero().flatten().tolist()
        if ranks > 1:
            prefixes = [ids[i, : int(last_B[i])] for i in acting]
            shares = packing.shares(prefixes, ranks, share=self.packing == "shared")
            acting = [acting[i] for i in shares[rank]]
        lengths = [int(last_B[i]) for i in acting]
        if self.packing == "padded":
            for bucket in by_length([length + 1 for length in lengths], max_tokens):
                yield Micro([acting[i] for i in bucket], max(lengths[i] for i in bucket) + 1, None)
            return
        share = self.packing == "shared"
        rows = [ids[i, :length] for i, length in zip(acting, lengths, strict=True)]
        for bucket in packing.micro_batches(rows, max_tokens, share=share):
            layout = packing.lay_out([rows[i] for i in bucket], share=share)
            width = max(lengths[i] for i in bucket) + 1
            yield Micro([acting[i] for i in bucket], width, Packed(layout, self.model.device))

    def logprobs(
        self,
        token_ids_BT: Tensor,
        action_mask_BT: Tensor,
        packed: Packed | None,
        temperature: float = 1.0,
        entropy: Entropy = "skip",
        half: str | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The first two of `states`."""
        return self.states(token_ids_BT, action_mask_BT, packed, temperature, entropy, half)[:2]

    def states(
        self,
        token_ids_BT: Tensor,
        action_mask_BT: Tensor,
        packed: Packed | None,
        temperature: float = 1.0,
        entropy: Entropy = "skip",
        half: str | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `token_states`. `half`: matrix products in bfloat16; None: in the model's own dtype."""
        with autocast(half, self.model.device):
            return token_states(
                self.model, token_ids_BT, action_mask_BT, temperature, entropy, packed=packed, head=self.head
            )


# -- what a model can do ------------------------------------------------------------------------------


@contextmanager
def tried(model: PreTrainedModel) -> Iterator[None]:
    """Without gradients or dropout, and nothing is left changed."""
    attention, training = model.config._attn_implementation or "sdpa", {m: m.training for m in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.set_attn_implementation(attention)
        for module, was in training.items():
            module.training = was


def why_not_packed(model: PreTrainedModel) -> str:
    """Why rows cannot be packed for this model, empty if they can."""
    config = model.config.get_text_config()
    own = model.config._attn_implementation
    if own not in ("sdpa", "flash_attention_2", PACKED_ATTENTION):
        return f"its attention is {own!r}, and packing replaces only 'sdpa' and 'flash_attention_2'"
    kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if kinds or config.is_encoder_decoder or model._is_stateful:
        return f"it has more than plain attention: {', '.join(sorted(kinds)) or config.model_type}"
    rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type")
    if rope in ("dynamic", "longrope"):
        return f"the longest row of a pass changes its {rope} positions, and so all the others"
    with tried(model):
        return difference(model, config)


def difference(model: PreTrainedModel, config: PreTrainedConfig) -> str:
    """What packing changes of the hidden states of `PROBE`'s rows, empty if nothing. Leaves another attention."""
    rows = [np.array(row) % config.vocab_size for row in PROBE]
    rows_1L = [torch.tensor(row, device=model.device)[None] for row in rows]
    expected = [model.base_model(row_1L, use_cache=False).last_hidden_state[0] for row_1L in rows_1L]
    packed = Packed(packing.lay_out(rows, share=True), model.device)
    model.set_attn_implementation(PACKED_ATTENTION)
    try:
        found_UD = model.base_model(**packed.inputs()).last_hidden_state[0]
    except (TypeError, ValueError, RuntimeError, IndexError) as error:  # as unusual models may
        return f"its forward does not hand on what packed attention needs ({error})"
    if set(windows(config)) - packed.windows:
        return "its sliding windows are not what its attention is told"
    close = CLOSE if torch.finfo(found_UD.dtype).bits >= 32 else CLOSE_IN_HALF
    for i, own_LD in enumerate(expected):
        gap = (found_UD[packed.where_BT[i, : len(own_LD)]] - own_LD).norm() / own_LD.norm()
        if not gap < close:
            return f"it changes hidden states by {gap:.2g} of their length: are its positions or attention unusual?"
    return ""


def windows(config: PreTrainedConfig) -> list[int]:
    """Sizes of the sliding windows in use."""
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"]
    size = getattr(config, "sliding_window", None)
    return [size] if size is not None and "sliding_attention" in kinds else []


def plain_head(model: PreTrainedModel) -> nn.Linear | None:
    """The output layer, if the logits are what it makes of the last hidden states, and nothing else."""
    head = output_layer(model)
    if type(head) is not nn.Linear:
        return None
    seen: dict[str, Tensor] = {}

    def see_body(_: nn.Module, __: object, output: Any) -> None:
        seen["hidden"] = output[0]

    def see_head(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        seen["input"], seen["logits"] = inputs[0], output

    hooks = [model.base_model.register_forward_hook(see_body), head.register_forward_hook(see_head)]
    try:
        ids_1T = torch.tensor([PROBE[0]], device=model.device) % model.config.get_text_config().vocab_size
        with tried(model):
            logits = model(ids_1T, use_cache=False).logits
    finally:
        for hook in hooks:
            hook.remove()
    is_last = torch.equal(logits, seen["logits"].to(logits.dtype))
    is_first = "hidden" in seen and torch.equal(seen["hidden"], seen["input"])  # not where a model skips its own body
    return head if is_first and is_last else None
