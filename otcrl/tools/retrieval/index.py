"""Nearest passages by inner product: exact search, and the directory an index is kept in.

The directory holds `index.faiss`, `passages.jsonl` with `offsets.npy` (text is read by seek, so a corpus need
not fit in memory) and `manifest.json`, which says what the vectors were made of; what does not match is refused.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from otcrl.errors import DataError
from otcrl.tools.retrieval.corpus import Passage
from otcrl.tools.retrieval.encode import Encoder

if TYPE_CHECKING:
    import faiss

CHUNK = 2048  # passages encoded at a time; the encoder sorts them by length
THREADS = 2  # of faiss: the learner wants the rest


class Passages(Protocol):
    def __len__(self) -> int: ...

    def __getitem__(self, row: int, /) -> Passage: ...


@dataclass(frozen=True, slots=True)
class Hit:
    passage: Passage
    score: float  # cosine


@dataclass(frozen=True, slots=True)
class Manifest:
    """What an index was made of."""

    encoder: str
    dimension: int
    metric: str
    rows: int
    corpus_sha256: str  # of passages.jsonl


class PassageFile:
    """Passages on disk, one read per look-up; safe to share between threads."""

    def __init__(self, directory: Path) -> None:
        self._offsets = np.load(directory / "offsets.npy", mmap_mode="r")  # [rows + 1] int64, bytes
        self._file = open(directory / "passages.jsonl", "rb")  # noqa: SIM115 (closed with the object)

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def __getitem__(self, row: int, /) -> Passage:
        start, end = int(self._offsets[row]), int(self._offsets[row + 1])
        return Passage(**json.loads(os.pread(self._file.fileno(), end - start, start)))


@dataclass(frozen=True, eq=False)
class Index:
    """Passages and their vectors."""

    vectors: faiss.Index  # flat, inner product
    passages: Passages
    encoder: Encoder

    def search(self, queries: Sequence[str], topk: int) -> list[list[Hit]]:
        """For each query the `topk` nearest passages (all of them where there are fewer), best first."""
        import faiss

        faiss.omp_set_num_threads(THREADS)  # it counts for the calling thread only
        vectors_ND = self.encoder.encode(queries, is_query=True)
        scores, rows = self.vectors.search(vectors_ND, min(topk, len(self.passages)))  # pyright: ignore
        return [
            [Hit(self.passages[int(row)], float(score)) for row, score in zip(*pair, strict=True)]
            for pair in zip(rows, scores, strict=True)
        ]


def row_line(passage: Passage) -> bytes:
    return json.dumps(asdict(passage), ensure_ascii=False).encode(errors="surrogatepass") + b"\n"


def corpus_sha256(passages: Iterable[Passage]) -> str:
    digest = hashlib.sha256()
    for passage in passages:
        digest.update(row_line(passage))
    return digest.hexdigest()


def memory_index(passages: Passages, encoder: Encoder) -> Index:
    """An index of `passages` in memory. Raises DataError if there are none."""
    import faiss
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

    if not len(passages):
        raise DataError("the corpus holds no passage")
    faiss.omp_set_num_threads(THREADS)
    vectors = faiss.IndexFlatIP(encoder.dimension)
    columns = ("[progress.description]{task.description}", BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, disable=len(passages) <= CHUNK) as progress:
        task = progress.add_task("encoding passages", total=len(passages))
        for start in range(0, len(passages), CHUNK):
            chunk = [passages[row].contents for row in range(start, min(start + CHUNK, len(passages)))]
            vectors.add(encoder.encode(chunk, is_query=False))  # pyright: ignore
            progress.advance(task, len(chunk))
    return Index(vectors, passages, encoder)


def build_index(passages: Iterable[Passage], encoder: Encoder, directory: str | Path) -> Index:
    """The index of `passages`, kept in `directory`, which appears complete or not at all.

    Raises DataError if it is there already.
    """
    import faiss

    directory = Path(directory)
    if directory.exists():
        raise DataError(f"index directory {directory} is there already: delete it or name another")
    unfinished = directory.with_name(f".{directory.name}.{os.getpid()}.unfinished")
    unfinished.mkdir(parents=True)
    try:
        digest, offsets = hashlib.sha256(), [0]
        with open(unfinished / "passages.jsonl", "wb") as lines:
            for passage in passages:
                line = row_line(passage)
                digest.update(line)
                offsets.append(offsets[-1] + lines.write(line))
        np.save(unfinished / "offsets.npy", np.array(offsets, dtype=np.int64))
        index = memory_index(PassageFile(unfinished), encoder)
        faiss.write_index(index.vectors, str(unfinished / "index.faiss"))
        manifest = Manifest(encoder.name, encoder.dimension, "inner_product", len(offsets) - 1, digest.hexdigest())
        (unfinished / "manifest.json").write_text(json.dumps(asdict(manifest), indent=2) + "\n")
        unfinished.rename(directory)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return index


def read_manifest(directory: Path) -> Manifest:
    path = directory / "manifest.json"
    try:
        return Manifest(**json.loads(path.read_text()))
    except OSError as error:
        raise DataError(
            f"index: {directory} is no index directory: {path.name} cannot be read ({error.strerror})"
        ) from error
    except (ValueError, TypeError) as error:
        raise DataError(f"{path}: expected the fields {', '.join(Manifest.__slots__)}: {error}") from error


def refuse(directory: Path, what: str, built: object, wanted: object) -> None:
    """Raises DataError unless the two are equal."""
    if built != wanted:
        raise DataError(
            f"index {directory} was built with {what} {built!r}, but this run has {wanted!r}: "
            "use the same one, or name another directory to build anew"
        )


def open_index(directory: str | Path, encoder: Encoder) -> Index:
    """The index kept in `directory`. Raises DataError where it does not fit `encoder` or itself."""
    import faiss

    directory = Path(directory)
    manifest = read_manifest(directory)
    refuse(directory, "encoder", manifest.encoder, encoder.name)
    refuse(directory, "dimension", manifest.dimension, encoder.dimension)
    refuse(directory, "metric", manifest.metric, "inner_product")
    try:
        vectors, passages = faiss.read_index(str(directory / "index.faiss")), PassageFile(directory)
    except (RuntimeError, OSError, ValueError) as error:
        raise DataError(f"index {directory} is damaged: {error}") from error
    for part, rows in (("index.faiss", vectors.ntotal), ("offsets.npy", len(passages))):
        if rows != manifest.rows:
            raise DataError(f"index {directory} is damaged: {part} has {rows} rows, manifest.json {manifest.rows}")
    return Index(vectors, passages, encoder)


def build_or_open(corpus: Iterable[Passage], encoder: Encoder, directory: str | Path) -> Index:
    """The index of `corpus` in `directory`, built where there is none. `corpus` is iterated once.

    Raises DataError where the directory holds an index of something else: hours of work are never overwritten.
    """
    directory = Path(directory)
    if not directory.exists():
        return build_index(corpus, encoder, directory)
    refuse(directory, "corpus sha256", read_manifest(directory).corpus_sha256, corpus_sha256(corpus))
    return open_index(directory, encoder)
