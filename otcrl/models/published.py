"""A model's weights as an engine wants them: under the plain model's names, whole, and with adapters merged in.

Under ZeRO-3 a rank holds a part of each weight, so a weight is given as the parameters that it is made of and how:
`Layers` sees to it that these are whole meanwhile, and that no others are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Weight:
    """One weight of the plain model."""

    name: str
    parameters: tuple[Tensor, ...]  # that it is made of, the plain one first
    value: Callable[[], Tensor]  # once they are whole; valid while they are

    @property
    def shape(self) -> torch.Size:
        return whole_shape(self.parameters[0])


@dataclass(frozen=True)
class Layers:
    """A model's weights, whole, one layer at a time: of a split model never more than a layer is in memory.

    Iteration gives (name, tensor), as often as it is asked for; a tensor is valid until the next. On all ranks.
    """

    weights: Sequence[Weight]
    gather: Callable[[Sequence[Tensor]], AbstractContextManager[object]] = lambda parameters: nullcontext()

    @staticmethod
    def of(tensors: Iterable[tuple[str, Tensor]]) -> Layers:
        """Of tensors that are whole already."""
        return Layers([Weight(name, (tensor,), tensor.detach) for name, tensor in tensors])

    def described(self) -> list[tuple[str, torch.dtype, list[int]]]:
        """Name, type and whole shape of each, in order; nothing is gathered for it."""
        return [(weight.name, weight.parameters[0].dtype, list(weight.shape)) for weight in self.weights]

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        for _, found in groupby(self.weights, key=lambda weight: layer_of(weight.name)):
            layer = list(found)
            with self.gather([parameter for weight in layer for parameter in weight.parameters]):
                yield from ((weight.name, weight.value()) for weight in layer)


def layer_of(name: str) -> str:
    """`model.layers.3.mlp.up_proj.weight` -> `model.layers.3`; the name itself where no number is in it."""
    parts = name.split(".")
    number = next((at for at, part in enumerate(parts) if part.isdigit()), None)
    return name if number is None else ".".join(parts[: number + 1])


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


def whole_shape(parameter: Tensor) -> torch.Size:
    """Also of a parameter of which this rank has a part."""
    return getattr(parameter, "ds_shape", parameter.shape)


def is_split(model: nn.Module) -> bool:
    """Whether this rank has parts of its parameters only."""
    return any(hasattr(parameter, "ds_shape") for parameter in model.parameters())
