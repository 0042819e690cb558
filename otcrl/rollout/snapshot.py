"""A model's weights as one memory-mapped file, with a digest for each parameter: how they reach another process.

The file lies in memory (memfd) and is gone with the process that made it, however that ends; a folder can be named
instead, e.g. one that other machines see: what a killed process has left there, the next one removes. It is rewritten
in place, which spares the system from finding and clearing new pages at every step, and it stays: an engine that died
gets the same weights again.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor

from otcrl.errors import EngineError
from otcrl.rollout.own_folder import OwnFolder

ALIGNMENT = 64  # bytes


@dataclass(frozen=True, slots=True)
class Entry:
    """One parameter in the file."""

    name: str
    dtype: str  # of torch: float32, bfloat16 ...
    shape: tuple[int, ...]
    offset: int  # bytes
    digest: str  # of its bytes


@dataclass(frozen=True, slots=True)
class Manifest:
    """What the file holds. Travels as plain values (`asdict`), `Manifest.of` reads them back."""

    path: str
    version: int
    entries: tuple[Entry, ...]

    @staticmethod
    def of(plain: Mapping[str, Any]) -> Manifest:
        entries = tuple(Entry(**{**entry, "shape": tuple(entry["shape"])}) for entry in plain["entries"])
        return Manifest(plain["path"], plain["version"], entries)

    def plain(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def nbytes(self) -> int:
        return max((e.offset + nbytes(e) for e in self.entries), default=0)


class Snapshot:
    """Writes sets of weights, one after the other, into one file of its own."""

    def __init__(self, folder: Path | None = None) -> None:
        """`folder` null: main memory. Raises EngineError when nothing can be written there."""
        self._place = "memory" if folder is None else str(folder)
        try:
            self._folder = None if folder is None else OwnFolder(folder)
            if self._folder is None:
                self._handle = os.memfd_create("otcrl-weights")
                self.path = Path(f"/proc/{os.getpid()}/fd/{self._handle}")
            else:
                self.path = self._folder.path / "weights"
                self._handle = os.open(self.path, os.O_RDWR | os.O_CREAT, mode=0o600)
        except OSError as error:
            raise EngineError(f"weights cannot be handed over in {self._place}: {error.strerror or error}") from error

    def write(self, weights: Iterable[tuple[str, Tensor]], version: int) -> Manifest:
        """Copies the tensors into the file as they come. Raises EngineError when they do not fit in it."""
        entries, offset = list[Entry](), 0
        for name, tensor in weights:
            own = tensor.detach().contiguous().cpu()
            self._write(own, offset)
            dtype = str(own.dtype).removeprefix("torch.")
            entries.append(Entry(name, dtype, tuple(own.shape), offset, digest(own)))
            offset += -(-own.nbytes // ALIGNMENT) * ALIGNMENT
        os.truncate(self._handle, offset)
        return Manifest(str(self.path), version, tuple(entries))

    def _write(self, tensor: Tensor, offset: int) -> None:
        """By the system, not through a memory map: where that runs out of room the process would be killed."""
        raw = tensor.view(-1).view(torch.uint8).numpy().data
        try:
            while raw:
                done = os.pwrite(self._handle, raw, offset)
                raw, offset = raw[done:], offset + done
        except OSError as error:
            size = (offset + len(raw)) / 2**30
            raise EngineError(f"weights of {size:.2f} GiB or more do not fit in {self._place}: {error}") from error

    def close(self) -> None:
        os.close(self._handle)
        if self._folder is not None:
            self._folder.close()


def read(manifest: Manifest) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) in the order written; the tensors are views of the file, not copies."""
    store = mapped(Path(manifest.path), manifest.nbytes)
    for entry in manifest.entries:
        yield entry.name, at(store, entry)


def damaged(manifest: Manifest) -> Sequence[str]:
    """Names of the parameters whose bytes in the file are not those that were written."""
    tensors = zip(manifest.entries, read(manifest), strict=True)
    return [entry.name for entry, (_, tensor) in tensors if digest(tensor) != entry.digest]


def mapped(path: Path, size: int) -> Tensor:
    """[size] uint8 view of the file's first bytes, shared with every process that maps it."""
    if size == 0:
        return torch.empty(0, dtype=torch.uint8)
    with path.open("r+b") as file:
        return torch.frombuffer(mmap.mmap(file.fileno(), size), dtype=torch.uint8)


def at(store: Tensor, entry: Entry) -> Tensor:
    dtype = getattr(torch, entry.dtype)
    return store[entry.offset : entry.offset + nbytes(entry)].view(dtype).view(entry.shape)


def nbytes(entry: Entry) -> int:
    return torch.Size(entry.shape).numel() * getattr(torch, entry.dtype).itemsize


def digest(tensor: Tensor) -> str:
    """Of the bytes of a tensor in main memory."""
    raw = tensor.contiguous().view(-1).view(torch.uint8).numpy()
    return xxhash.xxh3_64_hexdigest(raw.data)
