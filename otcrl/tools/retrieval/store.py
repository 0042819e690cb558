"""Passages on disk: read by seek, so that a corpus need not fit in memory.

`passages.jsonl` has a passage a line; `offsets.npy` ([rows + 1] int64) the byte at which each begins; `ids.npy`
([rows] uint64, sorted) the hashes of their ids and `id_rows.npy` ([rows] int64) whose they are.
"""

from __future__ import annotations

import hashlib
import json
import os
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from otcrl.errors import DataError
from otcrl.tools.retrieval.corpus import Passage

FILES = ("passages.jsonl", "offsets.npy", "ids.npy", "id_rows.npy")
AT_A_TIME = 2048  # rows


class Passages(Protocol):
    def __len__(self) -> int: ...

    def __getitem__(self, row: int, /) -> Passage: ...

    def find(self, id: str, /) -> Passage | None: ...


class PassageList(list[Passage]):
    """Passages in memory."""

    def find(self, id: str, /) -> Passage | None:
        return next((passage for passage in self if passage.id == id), None)


class PassageFile:
    """Passages in a directory, one read per look-up; safe to share between threads."""

    def __init__(self, directory: Path) -> None:
        """Raises OSError or ValueError where a file is missing or damaged."""
        self._offsets, self._ids, self._id_rows = (np.load(directory / name, mmap_mode="r") for name in FILES[1:])
        self._file = open(directory / "passages.jsonl", "rb")  # noqa: SIM115 (closed with the object)
        size = os.fstat(self._file.fileno()).st_size
        if not len(self._offsets) or int(self._offsets[-1]) != size:
            raise ValueError(f"passages.jsonl has {size} bytes, which is not what offsets.npy says")

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def __getitem__(self, row: int, /) -> Passage:
        start, end = int(self._offsets[row]), int(self._offsets[row + 1])
        return Passage(**json.loads(os.pread(self._file.fileno(), end - start, start)))

    def find(self, id: str, /) -> Passage | None:
        """The passage of that id."""
        place = int(np.searchsorted(self._ids, np.uint64(id_hash(id))))
        while place < len(self._ids) and int(self._ids[place]) == id_hash(id):
            if (passage := self[int(self._id_rows[place])]).id == id:
                return passage
            place += 1
        return None


def id_hash(id: str) -> int:
    return int.from_bytes(hashlib.blake2b(id.encode(errors="surrogatepass"), digest_size=8).digest(), "little")


def row_line(passage: Passage) -> bytes:
    return json.dumps(asdict(passage), ensure_ascii=False).encode(errors="surrogatepass") + b"\n"


def corpus_sha256(passages: Iterable[Passage]) -> str:
    digest = hashlib.sha256()
    for passage in passages:
        digest.update(row_line(passage))
    return digest.hexdigest()


def write_passages(passages: Iterable[Passage], directory: Path) -> tuple[int, str]:
    """(rows, sha256 of passages.jsonl); each file appears whole or not at all.

    Raises DataError for an id that two passages share.
    """
    digest, offsets, hashes = hashlib.sha256(), array("q", [0]), array("Q")
    unfinished = directory / "passages.jsonl.unfinished"
    with open(unfinished, "wb") as lines:
        for passage in passages:
            line = row_line(passage)
            digest.update(line)
            offsets.append(offsets[-1] + lines.write(line))
            hashes.append(id_hash(passage.id))
        lines.flush()
        os.fsync(lines.fileno())
    os.replace(unfinished, directory / "passages.jsonl")
    hashes_N = np.frombuffer(hashes, np.uint64) if hashes else np.empty(0, np.uint64)
    rows_N = np.argsort(hashes_N, kind="stable")
    tables = (np.frombuffer(offsets, np.int64), hashes_N[rows_N], rows_N.astype(np.int64))
    for name, table in zip(FILES[1:], tables, strict=True):
        save(directory / name, table)
    refuse_shared_ids(PassageFile(directory), tables[1], tables[2])
    return len(offsets) - 1, digest.hexdigest()


def save(path: Path, table: NDArray[np.generic]) -> None:
    unfinished = path.with_name(f"{path.name}.unfinished")
    with open(unfinished, "wb") as file:
        np.save(file, table)
    os.replace(unfinished, path)


def refuse_shared_ids(passages: PassageFile, hashes_N: NDArray[np.uint64], rows_N: NDArray[np.int64]) -> None:
    for place in np.flatnonzero(hashes_N[1:] == hashes_N[:-1]):
        first, second = int(rows_N[place]), int(rows_N[place + 1])
        if passages[first].id == passages[second].id:
            raise DataError(
                f"the passages {first + 1} and {second + 1} of the corpus share the id {passages[first].id!r}: "
                "ids must differ, as a document is asked for by its id"
            )


def contents(passages: Passages, start: int, stop: int) -> list[str]:
    return [passages[row].contents for row in range(start, min(stop, len(passages)))]


def chunks(rows: int, start: int = 0, size: int = AT_A_TIME) -> Iterator[tuple[int, int]]:
    """(start, stop) of each chunk."""
    for first in range(start, rows, size):
        yield first, min(first + size, rows)
