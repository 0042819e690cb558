"""Plain torch: every rank has all weights, gradients and optimizer state, and gradients are added over the ranks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from otcrl import dist
from otcrl.learner.backend import Forward
from otcrl.learner.optimizer import Optimizer

T = TypeVar("T")
MOMENTS = ("exp_avg", "exp_avg_sq", "step")
BUCKET = 1 << 26  # numbers that are added over the ranks at a time


class TorchBackend:
    """See `Backend`. Weights in 16 bits have a float32 copy that is updated, and gradients are added up in float32:
    an update is often smaller than the last bit of a weight in 16."""

    in_step = False

    def __init__(self, module: nn.Module, function: Forward, optimizer: Optimizer, max_grad_norm: float) -> None:
        self.module = module
        self._function = function
        self._trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
        self._updated = {name: self._master(p) for name, p in self._trained.items()}  # what the optimizer sees
        self.begin(optimizer, max_grad_norm)

    def begin(self, optimizer: Optimizer, max_grad_norm: float) -> None:
        self._max_grad_norm = max_grad_norm
        for name, master in self._updated.items():
            if master is not self._trained[name]:
                master.data.copy_(self._trained[name].data)
        self.optimizer = optimizer.build(self._updated.values())

    def _master(self, parameter: nn.Parameter) -> nn.Parameter:
        if torch.finfo(parameter.dtype).bits >= 32:
            return parameter
        master = nn.Parameter(parameter.detach().float())

        def collect(parameter: Tensor) -> None:
            assert parameter.grad is not None
            master.grad = parameter.grad.float() if master.grad is None else master.grad.add_(parameter.grad)
            parameter.grad = None

        parameter.register_post_accumulate_grad_hook(collect)
        return master

    def __call__(self, *inputs: Any) -> Any:
        return self._function(*inputs)

    def inside(self, function: Callable[..., T], *inputs: Any) -> T:
        return function(*inputs)

    def backward(self, outputs: Sequence[Tensor], gradients: Sequence[Tensor], *, last: bool) -> None:
        torch.autograd.backward(outputs, gradients)

    def step(self, rate: float, what: str) -> float:
        parameters = list(self._updated.values())
        if dist.size() > 1:
            add_gradients(parameters, what)
        norm = nn.utils.clip_grad_norm_(parameters, self._max_grad_norm).item()
        if math.isfinite(norm) and norm > 0:  # 0: nothing was to be learned, on however many ranks; no momentum either
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            self.optimizer.step()
            with torch.no_grad():
                for name, master in self._updated.items():
                    if master is not self._trained[name]:
                        self._trained[name].copy_(master)
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def whole(self, parameters: Sequence[Tensor]) -> AbstractContextManager[object]:
        return nullcontext()

    def put(self, parameter: Tensor, value: Tensor) -> None:
        with torch.no_grad():
            parameter.copy_(value)
        for name, own in self._trained.items():
            if own is parameter and self._updated[name] is not own:
                self._updated[name].data.copy_(value)

    def state(self) -> Iterator[tuple[str, Tensor]]:
        for name, parameter in self._updated.items():
            state = self.optimizer.state.get(parameter, {})
            for key in MOMENTS:
                empty = torch.zeros(()) if key == "step" else torch.zeros_like(parameter)
                yield f"{key}/{name}", state.get(key, empty).detach()
            if parameter is not self._trained[name]:
                yield f"master/{name}", parameter.detach()

    def load_state(self, read: Callable[[str], Tensor]) -> None:
        for name, parameter in self._updated.items():
            found = {key: read(f"{key}/{name}") for key in MOMENTS}
            on_device = {key: found[key].to(parameter) for key in MOMENTS[:2]}
            self.optimizer.state[parameter] = {"step": found["step"].float(), **on_device}
            if parameter is not self._trained[name]:
                parameter.data.copy_(read(f"master/{name}"))


class Whole:
    """A module that is only read, all of it on this rank."""

    def __init__(self, module: nn.Module, function: Forward) -> None:
        self.module = module
        self._function = function

    def __call__(self, *inputs: Any) -> Any:
        return self._function(*inputs)

    def put(self, parameter: Tensor, value: Tensor) -> None:
        with torch.no_grad():
            parameter.copy_(value)


def add_gradients(parameters: Sequence[nn.Parameter], what: str) -> None:
    """Each gradient becomes the sum over all ranks."""
    for parameter in parameters:
        if parameter.grad is None:  # this rank had nothing that depends on it
            parameter.grad = torch.zeros_like(parameter)
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    while gradients:
        count, bucket = 0, []
        while gradients and (not bucket or count + gradients[0].numel() <= BUCKET):
            bucket.append(gradients.pop(0))
            count += bucket[-1].numel()
        flat = torch.cat([gradient.flatten() for gradient in bucket])
        dist.add([flat], what)
        for gradient, part in zip(bucket, flat.split([gradient.numel() for gradient in bucket]), strict=True):
            gradient.copy_(part.view_as(gradient))
