"""A model's weights as an engine wants them: under the plain model's names, whole, and with adapters merged in.

Under ZeRO-3 a rank holds a part of each weight, so a weight is given as the parameters that it is made of and how: who
asks sees to it that these are whole meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Weight:
    """One weight of the plain model."""

    name: str
    parameters: tuple[nn.Parameter, ...]  # that it is made of, the plain one first
    value: Callable[[], Tensor]  # once they are whole; valid while they are

    @property
    def shape(self) -> torch.Size:
        return whole_shape(self.parameters[0])


def published(model: nn.Module) -> Iterator[Weight]:
    """Every weight of the plain model once, tied ones under their first name."""
    adapted: Mapping[str, Any] = {
        f"{name}.base_layer.weight": layer for name, layer in model.named_modules() if hasattr(layer, "lora_A")
    }
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            continue
        layer = adapted.get(name)
        if layer is None:
            yield Weight(plain(name), (parameter,), parameter.detach)
        else:
            parts = (parameter, *layer.lora_A.parameters(), *layer.lora_B.parameters())
            yield Weight(plain(name), parts, lambda layer=layer: merged(layer))


def merged(layer: Any) -> Tensor:
    """What peft's `merge` would leave in the base layer, which stays as it is."""
    base = layer.base_layer.weight.detach()
    with torch.no_grad():
        for adapter in layer.active_adapters:
            base = base + layer.get_delta_weight(adapter).to(base.dtype)
    return base


def plain(name: str) -> str:
    """The name that a parameter has in the model without adapters."""
    return name.replace(".base_layer.", ".")


def whole_shape(parameter: nn.Parameter) -> torch.Size:
    """Also of a parameter of which this rank has a part."""
    return getattr(parameter, "ds_shape", parameter.shape)
