"""DeepSpeed: optimizer state, gradients and weights split over the ranks (ZeRO, arXiv:1910.02054), or kept elsewhere.

Stages split more and more: 1 the optimizer's state, 2 gradients too, 3 weights too. Offloading keeps the optimizer's
state in main memory or on an NVMe disk, and with stage 3 the weights in main memory. (DeepSpeed can put weights on a
disk too. Where it was tried, version 0.19 on CPU, they came back in another type or not at all.) The only file that
imports deepspeed.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from otcrl import dist
from otcrl.errors import ConfigError, DataError
from otcrl.learner.backend import Computes, Forward
from otcrl.learner.optimizer import Optimizer
from otcrl.models.published import is_split, whole_shape

T = TypeVar("T")
NEEDED = "0.19.8"  # setup.py says why
MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True, kw_only=True)
class DeepSpeed:
    """How training is split over the ranks. See https://www.deepspeed.ai/docs/config-json/"""

    zero_stage: Literal[1, 2, 3]  # 0, everything on every rank, is the torch backend
    offload: Literal["none", "cpu", "nvme"]  # of the optimizer's state
    offload_params: Literal["none", "cpu"]  # of weights, with stage 3
    nvme_path: str | None  # a folder on the disk, for nvme
    bucket: float  # numbers that are sent at a time
    overlap: bool  # send gradients while others are computed; on CUDA

    def __post_init__(self) -> None:
        if self.offload_params != "none" and self.zero_stage < 3:
            raise ValueError(f"offload_params={self.offload_params} needs zero_stage=3, got {self.zero_stage}")
        if self.offload == "nvme" and not self.nvme_path:
            raise ValueError("offload to nvme needs nvme_path, a folder on the disk")
        if self.offload == "nvme" and self.zero_stage < 3:
            raise ValueError(f"offload=nvme needs zero_stage=3, got {self.zero_stage}")
        if not self.bucket >= 1:
            raise ValueError(f"bucket must be at least 1, got {self.bucket}")

    def of(self, model: str) -> DeepSpeed:
        """For one of the models: on a disk each has a folder of its own, which DeepSpeed empties when it begins."""
        if self.offload != "nvme":
            return self
        return replace(self, nvme_path=str(Path(self.nvme_path or "") / model))

    def untrained(self) -> DeepSpeed:
        """For a model without an optimizer."""
        return replace(self, offload="none")

    def config(self, dtype: torch.dtype, max_grad_norm: float) -> dict[str, Any]:
        """DeepSpeed's own. Raises ConfigError where the disk that it names cannot be used."""
        if self.offload == "nvme":
            check_disk(Path(self.nvme_path or ""))
        zero: dict[str, Any] = {
            "stage": self.zero_stage,
            "overlap_comm": self.overlap and torch.cuda.is_available(),
            "contiguous_gradients": True,
            "reduce_bucket_size": int(self.bucket),
        }
        places = {"offload_optimizer": self.offload, "offload_param": self.offload_params}
        for key, place in places.items():
            if place != "none":
                zero[key] = {"device": place, "pin_memory": torch.cuda.is_available()}
                zero[key] |= {"nvme_path": self.nvme_path} if place == "nvme" else {}
        if self.zero_stage == 3:
            zero |= {
                "stage3_prefetch_bucket_size": int(self.bucket) // 10,
                "stage3_param_persistence_threshold": 10_000,
            }
        else:
            zero["allgather_bucket_size"] = int(self.bucket)
        return {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": 1,  # otcrl says when an update is due, and weighs tokens itself
            "gradient_clipping": max_grad_norm,
            "zero_optimization": zero,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "bf16": {"enabled": dtype == torch.bfloat16},
            "data_types": {"grad_accum_dtype": "fp32"},
            "steps_per_print": 1 << 60,
        }


class Pausing(torch.optim.AdamW):
    """AdamW whose step can do nothing: DeepSpeed's own around it, which frees gradients and gathers weights, is made
    all the same."""

    paused = False

    def step(self, closure: Any = None) -> Any:
        return None if self.paused else super().step(closure)


class DeepSpeedBackend:
    """See `Backend`. With bfloat16 weights the optimizer has float32 ones."""

    in_step = True

    def __init__(
        self, module: nn.Module, function: Forward, optimizer: Optimizer, max_grad_norm: float, settings: DeepSpeed
    ) -> None:
        deepspeed = imported()
        self.module = module
        self._stage = settings.zero_stage
        self._trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
        self._adamw = Pausing(self._trained.values(), lr=0.0)
        self._learns = torch.zeros((), dtype=torch.bool)  # whether any gradient since the last step was not 0
        dtype = next(iter(self._trained.values())).dtype
        if is_split(module):  # DeepSpeed casts whole modules alone, and wants what it trains in one type
            for parameter in self._trained.values():
                parameter.data = parameter.data if hasattr(parameter, "ds_id") else parameter.data.to(dtype)
        config = settings.config(dtype, max_grad_norm)
        use_gpu(module)
        self._function = function
        self._engine: Any = deepspeed.initialize(model=Computes(module), optimizer=self._adamw, config=config)[0]
        self._make_state()
        self.begin(optimizer, max_grad_norm)

    def _make_state(self) -> None:
        """AdamW's before its first step, so that it can be read and written from the beginning."""
        inner = self._inner()
        for part in self._parts():
            if part not in inner.state:
                moments = {key: torch.zeros_like(part) for key in MOMENTS}
                inner.state[part] = {"step": torch.zeros(()), **moments}
        if link := getattr(self._engine.optimizer, "_lazy_init_hp_params_optimizer_state", None):
            link()

    def _parts(self) -> Iterator[Tensor]:
        """What AdamW updates: this rank's part of all weights. From a disk each is here until the next is asked for."""
        outer = self._engine.optimizer
        parts = getattr(outer, "fp32_partitioned_groups_flat", None)
        if parts is None:
            yield from (part for group in self._inner().param_groups for part in group["params"])
            return
        for index, part in enumerate(parts):
            if is_on_disk := outer._swappable_optimizer_subgroup(index):
                outer._optimizer_states_and_gradient_swap_in(index)
            yield part
            if is_on_disk:
                outer._optimizer_states_and_gradient_swap_out(index)

    def begin(self, optimizer: Optimizer, max_grad_norm: float) -> None:
        self._engine.optimizer.clip_grad = max_grad_norm
        for group in self._engine.optimizer.param_groups:
            group |= {"lr": optimizer.lr, "betas": tuple(optimizer.betas), "weight_decay": optimizer.weight_decay}
        for part in self._parts():
            for value in self._inner().state[part].values():
                value.zero_()

    def _inner(self) -> torch.optim.Optimizer:
        """The optimizer that DeepSpeed's has inside, whose parameters are this rank's parts."""
        return self._engine.optimizer.optimizer

    def __call__(self, *inputs: Any) -> Any:
        return self._engine(self._function, *inputs)

    def inside(self, function: Callable[..., T], *inputs: Any) -> T:
        return self._engine(function, *inputs)

    def backward(self, outputs: Sequence[Tensor], gradients: Sequence[Tensor], *, last: bool) -> None:
        """DeepSpeed averages over the ranks, and ours are shares of a sum."""
        for gradient in gradients:
            self._learns = self._learns.to(gradient.device) | (gradient != 0).any()  # NaN too
        self._engine.set_gradient_accumulation_boundary(last)
        pairs = zip(outputs, gradients, strict=True)
        self._engine.backward(sum((out * (gradient * dist.size())).sum() for out, gradient in pairs))

    def step(self, rate: float, what: str) -> float:
        for group in self._engine.optimizer.param_groups:
            group["lr"] = rate
        # 0 on all ranks: nothing was to be learned; no momentum either. A rank's part of the gradient would not tell
        self._adamw.paused = not dist.largest(int(self._learns), what)
        self._learns = torch.zeros_like(self._learns)
        with dist.deadline(what):
            self._engine.step()
            dist.settle()
        return float(self._engine.get_global_grad_norm())

    def whole(self, parameters: Sequence[Tensor]) -> AbstractContextManager[object]:
        return imported().zero.GatheredParameters(list(parameters)) if self._stage == 3 else nullcontext()

    def put(self, parameter: Tensor, value: Tensor) -> None:
        zero = imported().zero
        gathered = zero.GatheredParameters([parameter], modifier_rank=0) if self._stage == 3 else nullcontext()
        with gathered, torch.no_grad():
            parameter.copy_(value)
        if parameter.requires_grad:
            self._set(parameter, value)

    def _set(self, parameter: Tensor, value: Tensor, moment: str | None = None) -> None:
        """The optimizer's own weight, or a moment of it."""
        tools, key = imported().utils, () if moment is None else (moment,)
        value = value.to(parameter.device, torch.float32)
        if self._stage < 3:
            setter = tools.safe_set_full_fp32_param if moment is None else tools.safe_set_full_optimizer_state
            setter(parameter, value, *key)
            return
        size: int = parameter.partition_numel()  # pyright: ignore[reportAttributeAccessIssue]
        missing = size * dist.size() - value.numel()  # the last parts may be empty
        whole = nn.functional.pad(value.flatten(), (0, missing))
        setter = tools.safe_set_local_fp32_param if moment is None else tools.safe_set_local_optimizer_state
        setter(parameter, whole[dist.rank() * size : (dist.rank() + 1) * size], *key)

    def state(self) -> Iterator[tuple[str, Tensor]]:
        tools = imported().utils
        steps = [float(state["step"]) for state in self._inner().state.values()]
        for name, parameter in self._trained.items():
            for key in MOMENTS:
                yield f"{key}/{name}", tools.safe_get_full_optimizer_state(parameter, key)
            yield f"step/{name}", torch.tensor(steps[0])
            if parameter.dtype != torch.float32:
                yield f"master/{name}", tools.safe_get_full_fp32_param(parameter)

    def load_state(self, read: Callable[[str], Tensor]) -> None:
        for name, parameter in self._trained.items():
            for key in MOMENTS:
                self._set(parameter, read(f"{key}/{name}").view(whole_shape(parameter)), key)
            if parameter.dtype != torch.float32:
                try:
                    self._set(parameter, read(f"master/{name}"))
                except DataError:  # a value head, which is float32 itself in torch's backend
                    self._set(parameter, read(f"weights/{name}"))
        step = read(f"step/{next(iter(self._trained))}")
        for state in self._inner().state.values():
            state["step"].copy_(step)


class Frozen:
    """A module that is only read, its weights split over the ranks as with stage 3."""

    def __init__(self, module: nn.Module, function: Forward, settings: DeepSpeed) -> None:
        self.module = module
        self._function = function
        config = settings.untrained().config(next(module.parameters()).dtype, 1.0)
        use_gpu(module)
        self._engine: Any = imported().initialize(model=Computes(module), config=config)[0]

    def __call__(self, *inputs: Any) -> Any:
        return self._engine(self._function, *inputs)

    def put(self, parameter: Tensor, value: Tensor) -> None:
        with imported().zero.GatheredParameters([parameter], modifier_rank=0), torch.no_grad():
            parameter.copy_(value)


def check_disk(folder: Path) -> None:
    """Raises ConfigError where DeepSpeed cannot keep anything in `folder`, one inside `learner.deepspeed.nvme_path`."""
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"learner.deepspeed.nvme_path is {str(folder.parent)!r}, and nothing can be kept there: {error.strerror}"
        ) from error
    imported()
    from deepspeed.accelerator import get_accelerator

    builder: Any = get_accelerator()
    if not builder.create_op_builder("AsyncIOBuilder").is_compatible():
        raise ConfigError(
            "learner.deepspeed: for nvme DeepSpeed compiles its disk access with libaio, which was not found: "
            "apt-get install libaio-dev g++ ninja-build, or use offload=cpu"
        )


@contextmanager
def made_split(settings: DeepSpeed, dtype: torch.dtype) -> Iterator[None]:
    """Inside, the models that transformers loads or makes are split over the ranks, one layer after another.

    The file is mapped into memory, the first rank reads a layer and the others get their parts of it: no rank ever
    has a whole copy. On all ranks.
    """
    imported()
    if torch.cuda.is_available():
        os.environ["LOCAL_RANK"] = str(dist.own_gpu())  # see `use_gpu`
    from transformers.integrations.deepspeed import HfDeepSpeedConfig, unset_hf_deepspeed_config

    config = HfDeepSpeedConfig(settings.untrained().config(dtype, 1.0))  # transformers finds it while it lives
    try:
        yield
    finally:
        unset_hf_deepspeed_config()
        del config


def use_gpu(module: nn.Module) -> None:
    """Tells DeepSpeed where the model is: it takes LOCAL_RANK for the number of its GPU, would move the model there,
    and a rank may have been shown one GPU alone, or been given another by `model.device`."""
    device = next(module.parameters()).device
    if device.type == "cuda":
        os.environ["LOCAL_RANK"] = str(device.index)


@cache
def check_installed() -> None:
    """Raises ConfigError where DeepSpeed is missing, or too old. It is not imported: an old one may fail at that."""
    from packaging.version import Version

    fix = f"pip install 'deepspeed>={NEEDED}'"
    try:
        found = metadata.version("deepspeed")
    except metadata.PackageNotFoundError as error:
        raise ConfigError(f"learner.backend is deepspeed, and it is not installed: {fix}") from error
    if Version(found) < Version(NEEDED):
        raise ConfigError(
            f"learner.backend is deepspeed, and DeepSpeed {found} is here, where {NEEDED} or later is needed: {fix}"
        )


def imported() -> Any:
    """The package, whose process group is the run's. Raises ConfigError where it is missing or too old."""
    check_installed()
    os.environ.setdefault("DS_SKIP_CUDA_CHECK", "1")  # nothing is compiled that it is about
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # a compiler's minute, and gloo does it too
    if not torch.distributed.is_initialized():
        alone()
    return deepspeed


def alone() -> None:
    """A process group of one, which DeepSpeed needs even so, and what a launcher would have said."""
    os.environ.setdefault("LOCAL_RANK", "0")
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    store = torch.distributed.HashStore()  # pyright: ignore[reportPrivateImportUsage]  # documented, and not in __all__
    torch.distributed.init_process_group(backend, store=store, rank=0, world_size=1)
    import deepspeed

    deepspeed.init_distributed(auto_mpi_discovery=False)
