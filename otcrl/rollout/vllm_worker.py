"""What otcrl adds to each of vLLM's workers: take new weights from the trainer, and tell which ones are there.

vLLM mixes this class into its worker (`worker_extension_cls`), where its methods are reached by name. Weights go in by
`reload_weights`, which every vLLM from 0.20 has, which keeps the addresses that CUDA graphs hold, and which works on
CPU too, where linear layers are repacked after loading and `model.load_weights` fails.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Collection, Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import Any, cast

import torch
from torch import Tensor

from otcrl.rollout import device_handles
from otcrl.rollout.snapshot import Manifest, damaged, digest, read

EXTENSION = "otcrl.rollout.vllm_worker.Receiver"
CHUNK = 2**22  # words that are summed at a time: 32 MiB each, of a GPU that is full
LEAVE_S = 5.0
LEAVING = threading.Lock()  # a group that is destroyed twice crashes
BLANK = 0.1875  # no parameter of a trained model has this value alone, and every floating type can hold it


class Receiver:
    """Mixed into vLLM's worker; names begin with `otcrl_` since they share its namespace."""

    model_runner: Any
    vllm_config: Any
    reload_weights: Any  # the worker's, not its runner's: it says which configuration is current (from 0.27.1)
    otcrl_version = -1  # of the weights that are loaded; -1: those the engine came with
    _otcrl_before: Mapping[str, str] = MappingProxyType({})
    _otcrl_limit = threading.Timer(0, lambda: None)  # until what is to come must have arrived
    _otcrl_blank: Mapping[str, str] | None = None  # what its parameters are while they have no value; None: unknown yet

    def otcrl_load_file(self, manifest: Mapping[str, Any]) -> dict[str, Any]:
        """Weights from a snapshot on this machine. Nothing is loaded if a parameter was damaged on its way."""
        source = Manifest.of(manifest)
        if broken := list(damaged(source)):
            return {"version": self.otcrl_version, "damaged": broken, "unchanged": [], "blank": []}
        return self._otcrl_load(read(source), source.version, {entry.dtype for entry in source.entries})

    def otcrl_load_handles(self, handles: Mapping[str, Any]) -> dict[str, Any]:
        """Weights from another process's memory on the same GPUs."""
        tensors = dict(device_handles.opened(handles["tensors"]))
        digests = {name: fingerprint(tensor) for name, tensor in tensors.items()}
        if broken := [name for name, expected in handles["digests"].items() if digests.get(name) != expected]:
            return {"version": self.otcrl_version, "damaged": broken, "unchanged": [], "blank": []}
        types = {str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values()}
        return self._otcrl_load(iter(tensors.items()), handles["version"], types)

    def otcrl_state(self) -> dict[str, Any]:
        """The version of the loaded weights."""
        return {"version": self.otcrl_version}

    def otcrl_remember(self, limit_s: float | None = None) -> None:
        """Before weights come another way (NCCL): what there is now.

        If they have not arrived after `limit_s`, they will not: then the group that they come in is left, so that
        whoever waits for them in this worker goes on.
        """
        end_broken_load(self.model_runner.get_model())
        if self._otcrl_blank is None:
            self._otcrl_blank = {}
            if self.vllm_config.load_config.load_format == "dummy":
                made_up = {name: fingerprint(parameter) for name, parameter in self._otcrl_parameters()}
                self.otcrl_forget()  # what is made up may be the true value: norms begin as 1
                self._otcrl_blank = made_up | self._otcrl_blank  # in a byte, it stays
        self._otcrl_before = {name: fingerprint(parameter) for name, parameter in self._otcrl_parameters()}
        if limit_s is not None:
            self._otcrl_limit.cancel()
            self._otcrl_limit = threading.Timer(limit_s, self.otcrl_leave)
            self._otcrl_limit.daemon = True
            self._otcrl_limit.start()

    def otcrl_forget(self) -> None:
        """The weights were dropped (sleep level 2): one that does not come again shall not pass for what it was."""
        wide = {name: p for name, p in self._otcrl_parameters() if p.is_floating_point() and p.itemsize > 1}
        self._otcrl_blank = {name: fingerprint(p.fill_(BLANK)) for name, p in wide.items()}

    def otcrl_arrived(self, version: int, types: Collection[str]) -> dict[str, Any]:
        """Weights have come since `otcrl_remember`, and are this version. `types`: theirs, as they were sent.

        A parameter of a narrower type than that may be what it was after a small update, by rounding.
        """
        self._otcrl_limit.cancel()
        here = dict(self._otcrl_parameters())
        now, blank = {name: fingerprint(p) for name, p in here.items()}, self._otcrl_blank or {}
        rounds = {module_of(name) for name, p in here.items() if not all(holds(p.dtype, sent) for sent in types)}
        exact = [name for name in here if module_of(name) not in rounds]  # its scales may stay, too
        without = [name for name, p in self.model_runner.get_model().named_parameters() if p.is_meta]  # memory
        self.otcrl_version = version
        return {
            "version": version,
            "damaged": [],
            "unchanged": [name for name in exact if self._otcrl_before.get(name) == now[name]],
            "blank": [*without, *(name for name in here if blank.get(name) == now[name])],
        }

    def otcrl_leave(self) -> None:
        """The group in which weights came by NCCL is over; vLLM would keep it, and join the next one beside it."""
        engine = getattr(self, "weight_transfer_engine", None)
        with LEAVING:
            group = getattr(engine, "model_update_group", None)
            if engine is None or group is None:
                return
            engine.model_update_group = None
        ending = threading.Thread(target=group.destroy, daemon=True)  # vLLM 0.20 waits for the other ranks in it
        ending.start()
        ending.join(LEAVE_S)

    def otcrl_settings(self) -> dict[str, Any]:
        """How a server was started, in so far as training depends on it."""
        config = self.vllm_config
        transfer = config.weight_transfer_config
        return {
            "logprobs_mode": str(config.model_config.logprobs_mode),
            "generation_config": config.model_config.generation_config,
            "policy": str(config.scheduler_config.policy),
            "dtype": str(config.model_config.dtype).removeprefix("torch."),
            "context": config.model_config.max_model_len,
            "max_sequences": config.scheduler_config.max_num_seqs,
            "batch_tokens": config.scheduler_config.max_num_batched_tokens,
            "weight_transfer": None if transfer is None else transfer.backend,
        }

    def _otcrl_load(
        self, weights: Iterator[tuple[str, Tensor]], version: int, types: Collection[str]
    ) -> dict[str, Any]:
        own = self.vllm_config.model_config.dtype  # in which the learner has compared those that it rounds
        types = {sent if holds(own, sent) else str(own).removeprefix("torch.") for sent in types}
        self.otcrl_remember()
        self.reload_weights(weights_iterator=weights)
        repack(self.model_runner.get_model())
        return self.otcrl_arrived(version, types)

    def _otcrl_parameters(self) -> Iterable[tuple[str, Tensor]]:
        """Those that still lie here as such; on CPU repacked ones do not."""
        named = self.model_runner.get_model().named_parameters()
        return ((name, parameter.detach()) for name, parameter in named if parameter.numel() and not parameter.is_meta)


def holds(dtype: torch.dtype, sent: str) -> bool:
    """Whether it holds every number of the type `sent`, e.g. "float32"."""
    try:
        return torch.promote_types(dtype, getattr(torch, sent)) == dtype
    except RuntimeError:  # there is no such type, as for float8 and bfloat16
        return False


def module_of(parameter: str) -> str:
    return parameter.rpartition(".")[0]


def end_broken_load(model: torch.nn.Module) -> None:
    """What a load that failed has begun is forgotten, and the layers have what they had.

    vLLM would go on with it: without memory for some layers, or with parts of the weights before among the next ones.
    """
    layerwise: Any = sys.modules.get("vllm.model_executor.model_loader.reload.layerwise")
    if layerwise is None:  # nothing was ever loaded that way
        return
    for layer in model.modules():
        info = layerwise.get_layerwise_info(layer)
        if info.can_load():
            if info.kernel_tensors is not None:
                layerwise._place_kernel_tensors(layer, info)
            info.reset()


def repack(model: torch.nn.Module) -> None:
    """An output layer that shares the embedding's weights is not reloaded, so on CPU its packed copy is the old one.

    Found by `learner/proof.py`: everything had arrived, and the log-probs were those of the weights before.
    """
    for module in model.modules():
        weight, method = getattr(module, "weight", None), getattr(module, "quant_method", None)
        if hasattr(module, "cpu_linear") and isinstance(weight, Tensor) and weight.numel() and method is not None:
            cast(Any, method).process_weights_after_loading(module)


def fingerprint(tensor: Tensor) -> str:
    """A digest of the tensor's bytes; on a GPU two sums of them, computed there."""
    if tensor.device.type == "cpu":
        return digest(tensor)
    words = tensor.contiguous().view(-1).view(torch.uint8 if tensor.nbytes % 2 else torch.int16)
    plain, placed = 0, 0
    for number, chunk in enumerate(words.split(CHUNK)):
        values = chunk.to(torch.int64)
        plain += int(values.sum())
        placed += (number + 1) * int((values * (torch.arange(len(values), device=values.device) % 65_521 + 1)).sum())
    return f"{plain:x} {placed:x}"
