"""Tensors in GPU memory that another process on the same machine can open: nothing is copied to hand them over.

PyTorch's own CUDA IPC (`torch.multiprocessing.reductions`), with devices named by UUID: two processes may number them
differently.
"""

from __future__ import annotations

import base64
import pickle
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import rebuild_cuda_tensor, reduce_tensor

DEVICE_ARGUMENT = 6  # of rebuild_cuda_tensor: the number of the device in the process that shares


def shared(tensors: Iterable[tuple[str, Tensor]]) -> dict[str, Any]:
    """Handles by name, as plain values. The tensors must live until the other side has closed them."""
    handles = {}
    for name, tensor in tensors:
        _, arguments = reduce_tensor(tensor.detach())
        pickled = base64.b64encode(pickle.dumps(arguments)).decode()
        handles[name] = {"device": uuid(tensor.device.index), "arguments": pickled}
    return handles


def opened(handles: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """The tensors, in the memory of the process that shares them. Raises RuntimeError for a GPU out of sight."""
    devices = {uuid(index): index for index in range(torch.cuda.device_count())}
    for name, handle in handles.items():
        if handle["device"] not in devices:
            raise RuntimeError(f"the GPU {handle['device']} of parameter {name!r} is not visible in this process")
        arguments = list(pickle.loads(base64.b64decode(handle["arguments"])))  # from our own trainer, by its own pipe
        arguments[DEVICE_ARGUMENT] = devices[handle["device"]]
        yield name, rebuild_cuda_tensor(*arguments)


def uuid(index: int) -> str:
    return str(torch.cuda.get_device_properties(index).uuid)
