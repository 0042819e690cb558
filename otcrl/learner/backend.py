"""What holds a trained module, its gradients and its optimizer: alone, or split over the ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from otcrl.models.lora import without_adapters
from otcrl.models.published import Layers, published, whole_shape

if TYPE_CHECKING:
    from otcrl.learner.optimizer import Optimizer

Forward = Callable[..., Any]
T = TypeVar("T")


class Backend(Protocol):
    """Gradients are sums over all ranks: whoever makes them weighs each token by its share of the mini-batch."""

    @property
    def module(self) -> nn.Module: ...

    @property
    def in_step(self) -> bool:
        """True when a pass needs all ranks, so that each makes as many as the others, and one at least."""
        ...

    def __call__(self, *inputs: Any) -> Any:
        """What the function that was given with the module makes of them, with whatever it needs there."""
        ...

    def inside(self, function: Callable[..., T], *inputs: Any) -> T:
        """What another function makes of them, in the same way."""
        ...

    def backward(self, outputs: Sequence[Tensor], gradients: Sequence[Tensor], *, last: bool) -> None:
        """Gradients of the parameters from those of a call's outputs, added to earlier ones. `last`: before a step."""
        ...

    def step(self, rate: float, what: str) -> float:
        """Clip, update with the learning rate `rate`, and forget the gradients: their norm over all ranks.

        Where it is not finite nothing is updated. `what` is said when another rank does not come.
        """
        ...

    def begin(self, optimizer: Optimizer, max_grad_norm: float) -> None:
        """Forget what the optimizer has gathered, and go on with these settings."""
        ...

    def whole(self, parameters: Sequence[Tensor]) -> AbstractContextManager[object]:
        """Inside, this rank has all of these parameters; all ranks ask for them together."""
        ...

    def put(self, parameter: Tensor, value: Tensor) -> None:
        """`parameter` has this value from now on, which all ranks give."""
        ...

    def state(self) -> Iterator[tuple[str, Tensor]]:
        """What the optimizer has gathered, whole and in float32, whoever holds it; names end in a parameter's."""
        ...

    def load_state(self, read: Callable[[str], Tensor]) -> None:
        """The same back; `read` has it by its name."""
        ...


class Computes(nn.Module):
    """Calls functions as a module that has `module`'s parameters: what a backend can wrap."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, function: Forward, *inputs: Any) -> Any:
        return function(*inputs)


class Unadapted:
    """A trained module as it is without its adapters: the reference of a run that trains nothing else."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend

    def __call__(self, *inputs: Any) -> Any:
        with torch.no_grad(), without_adapters(self._backend.module):
            return self._backend(*inputs)


def fold(backend: Backend) -> None:
    """Adapters become part of the weights that they were put into, and begin anew: they change nothing as yet."""
    for weight in published(backend.module):
        if len(weight.parameters) > 1:
            with backend.whole(weight.parameters):
                value = weight.value()
            backend.put(weight.parameters[0], value)
    for name, parameter in backend.module.named_parameters():
        if ".lora_B." in name:
            backend.put(parameter, torch.zeros(whole_shape(parameter), dtype=parameter.dtype, device=parameter.device))


def weights(backend: Backend) -> Layers:
    """The plain model's."""
    return Layers(list(published(backend.module)), backend.whole)


def load_weights(backend: Backend, values: Iterable[tuple[str, Tensor]]) -> list[str]:
    """Give the plain model's weights new values, in any order; the names of those that it does not have."""
    own = {weight.name: weight.parameters[0] for weight in published(backend.module)}
    unknown = []
    for name, value in values:
        if name in own:
            backend.put(own[name], value)
        else:
            unknown.append(name)
    return unknown
