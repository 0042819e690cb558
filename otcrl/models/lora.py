"""Low-rank adapters (LoRA, arXiv:2106.09685) by peft: few parameters are trained, engines get the merged weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from otcrl.errors import ConfigError

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel


@dataclass(frozen=True, kw_only=True)
class Lora:
    """W + alpha / rank * B A for each linear layer in `targets`; A is random, B zero, so training starts at W."""

    rank: int  # 0: none, all weights are trained
    alpha: int
    targets: str | tuple[str, ...]  # names of linear layers, as peft's target_modules; all-linear: all but the output

    def __post_init__(self) -> None:
        if self.rank < 0:
            raise ValueError(f"rank must be at least 0, got {self.rank}")
        if not self.alpha > 0:
            raise ValueError(f"alpha must be above 0, got {self.alpha}")

    def adapt(self, model: PreTrainedModel, seed: int) -> None:
        """Put adapters into `model`, in place; nothing but them is trained then.

        Raises ConfigError without peft, when no layer has one of the names, and for one that cannot be merged.
        """
        if self.rank == 0:
            return
        try:
            from peft import LoraConfig
        except ModuleNotFoundError as error:
            raise ConfigError("learner.lora.rank is above 0, and peft is not installed: pip install peft") from error
        import torch

        targets = self.targets if isinstance(self.targets, str) else list(self.targets)
        config = LoraConfig(r=self.rank, lora_alpha=self.alpha, target_modules=targets, lora_dropout=0.0)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            try:
                model.add_adapter(config)
            except ValueError as error:
                raise ConfigError(f"lora.targets: {str(error).splitlines()[0]}") from error
        check_mergeable(model)


def check_mergeable(model: nn.Module) -> None:
    """Raises ConfigError for an adapter beside weights that no engine could be given merged."""
    holders: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            holders.setdefault(id(parameter), []).append(name)
    for name, module in model.named_modules():
        if not hasattr(module, "lora_A"):
            continue
        weight = getattr(module.base_layer, "_parameters", {}).get("weight")
        why = "is no linear layer" if weight is None else ""
        if weight is not None and len(holders[id(weight)]) > 1:
            why = f"shares its weight with {next(h for h in holders[id(weight)] if not h.startswith(name))!r}"
        if why:
            raise ConfigError(
                f"lora.targets: {name!r} {why}, so its adapter could not be merged for engines: name the layers to "
                "adapt, e.g. [q_proj,k_proj,v_proj,o_proj]"
            )


@contextmanager
def without_adapters(model: nn.Module) -> Iterator[None]:
    """Inside, the model is the one that its adapters were put into."""
    layers: list[Any] = [module for module in model.modules() if hasattr(module, "lora_A")]
    for layer in layers:  # peft's own `enable_adapters` would also say anew what is trained
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False
