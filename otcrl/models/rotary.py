"""The frequencies of rotary positions, which ZeRO-3 rounds to the weights' type while it splits a model."""

from __future__ import annotations

from typing import TYPE_CHECKING

from otcrl.models.published import is_split

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NAME = "inv_freq"  # how the names of their buffers end, in transformers


def exact_frequencies(model: PreTrainedModel) -> None:
    """In place; nothing for a whole model. In 16 bits positions drift apart, the further the longer the text."""
    if not is_split(model):
        return
    for module in model.modules():
        rounded = {name: buffer for name, buffer in module.named_buffers(recurse=False) if name.endswith(NAME)}
        for name, buffer in rounded.items():
            setattr(module, name, buffer.float())
        if rounded:
            model._init_weights(module)  # computes them anew
