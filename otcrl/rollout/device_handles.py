"""Tensors in GPU memory that another process on the same machine can open: nothing is copied to hand them over.

PyTorch's own CUDA IPC, with two differences. Devices are named by UUID: two processes may number them differently. And
a storage has one handle as long as it lives: each new one would take a counter and an event that torch frees only with
the storage, and a learner hands the same weights over at every step. So the counter is not for those who open to count
down: it keeps the memory of a tensor that is gone here until the lender takes it back.
"""

from __future__ import annotations

import base64
import pickle
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, TypedStorage, UntypedStorage
from torch.multiprocessing.reductions import StorageWeakRef, rebuild_cuda_tensor

DEVICE_ARGUMENT = 6  # of rebuild_cuda_tensor: the number of the device in the process that shares
NO_COUNTER = b"/otcrl-counts-nothing"  # torch passes over a counter that does not exist, as of a process that has ended


@dataclass(frozen=True, slots=True)
class Loan:
    """One storage that others may open; the last fields are what torch says of it (`_share_cuda_`)."""

    device: str  # UUID
    handle: bytes | None  # of the allocation; None: an empty storage
    size: int  # bytes
    offset: int  # bytes, in the allocation
    counter: bytes | None
    counter_offset: int
    event: bytes | None


def lend(storage: UntypedStorage) -> Loan:
    device, handle, size, offset, counter, counter_offset, event, _ = storage._share_cuda_()
    return Loan(uuid(device), handle, size, offset, counter, counter_offset, event)


def take_back(loan: Loan) -> None:
    """Its memory is free as soon as the storage is gone, and `torch.cuda.ipc_collect` has been called."""
    if loan.counter is not None:
        UntypedStorage._release_ipc_counter_cuda(loan.counter, loan.counter_offset)


class Lender:
    """Mutable: the storages that others may open."""

    def __init__(
        self, lend: Callable[[UntypedStorage], Loan] = lend, take_back: Callable[[Loan], None] = take_back
    ) -> None:
        self._lend, self._take_back = lend, take_back
        self._loans: dict[StorageWeakRef, tuple[int, Loan]] = {}  # with the address at which the memory is

    def handles(self, tensors: Iterable[tuple[str, Tensor]]) -> dict[str, Any]:
        """By name, as plain values. What is in the tensors must be there: who opens them does not wait for the GPU.

        They can be opened until `take_back`, also those that are not kept here.
        """
        return {name: self._handle(tensor.detach()) for name, tensor in tensors}

    def _handle(self, tensor: Tensor) -> dict[str, str]:
        loan = self._loan(tensor.untyped_storage())
        arguments = (
            *(Tensor, tensor.size(), tensor.stride(), tensor.storage_offset()),
            *(TypedStorage, tensor.dtype, None, loan.handle, loan.size, loan.offset),
            *(False, NO_COUNTER, 0, loan.event, False),  # no gradient, and no event that is waited for
        )
        return {"device": loan.device, "arguments": base64.b64encode(pickle.dumps(arguments)).decode()}

    def _loan(self, storage: UntypedStorage) -> Loan:
        key = StorageWeakRef(storage)  # no other storage has its number while it is kept here
        address, loan = self._loans.get(key, (0, None))
        if loan is not None and (address, loan.size) == (storage.data_ptr(), storage.nbytes()):
            return loan
        if loan is not None:
            self._take_back(loan)  # it was given other memory
        loan = self._lend(storage)
        self._loans[key] = storage.data_ptr(), loan
        return loan

    def take_back(self) -> None:
        """Nobody needs the tensors any more that are gone here: their memory is given back."""
        for key in [key for key in self._loans if key.expired()]:
            self._take_back(self._loans.pop(key)[1])

    def close(self) -> None:
        """Nobody opens anything any more."""
        while self._loans:
            self._take_back(self._loans.popitem()[1][1])


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
