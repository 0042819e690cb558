"""Builds an index directory, which appears whole or not at all.

All is written to `.NAME.building` beside it. Encoding, which takes hours, goes chunk by chunk into `vectors.bin`: a
build that was killed goes on after its last whole chunk, and gives the same bytes as one that was not.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import sys
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

from otcrl.errors import ConfigError, DataError
from otcrl.tools.retrieval import dense, lexical
from otcrl.tools.retrieval.attempt import VECTORS, building, mark_encoding, unfinished, write_manifest
from otcrl.tools.retrieval.corpus import Passage
from otcrl.tools.retrieval.dense import Dense
from otcrl.tools.retrieval.encode import Encoder, Vectors, settings
from otcrl.tools.retrieval.index import (
    FORMAT,
    Index,
    Manifest,
    open_index,
    read_manifest,
    refuse,
    wrong_vectors,
)
from otcrl.tools.retrieval.store import (
    AT_A_TIME,
    PassageFile,
    PassageList,
    Passages,
    chunks,
    contents,
    corpus_sha256,
    write_passages,
)

TUNED_WITH = 256  # titles asked for, to find the effort that reaches the wanted recall
COLUMNS = ("[progress.description]{task.description}", BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())


@dataclass(frozen=True, kw_only=True)
class Bm25:
    """As in Lucene."""

    k1: float = 1.5
    b: float = 0.75


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What to build: vectors, words, or both (hybrid)."""

    dense: Dense | None = field(default_factory=Dense)
    bm25: Bm25 | None = None
    threads: int | None = None  # None: all; for hnsw 1, which alone gives the same graph each time

    @property
    def kind(self) -> str:
        if self.dense is None:
            return "bm25"
        return "hybrid" if self.bm25 else self.dense.kind


def memory_index(passages: Iterable[Passage], encoder: Encoder) -> Index:
    """An exact index in memory. Raises DataError if there are no passages."""
    kept = PassageList(passages)
    refuse_empty(len(kept))
    parts = [encoder.encode(texts, is_query=False) for texts in progress(kept, 0)]
    return Index(passages=kept, vectors=dense.build(Dense(), np.concatenate(parts)), encoder=encoder)


def build_index(
    passages: Iterable[Passage], encoder: Encoder | None, directory: str | Path, recipe: Recipe | None = None
) -> Index:
    """The index of `passages`, kept in `directory`; what an earlier attempt has encoded is not encoded again.

    Raises DataError if it is there already, if somebody else is building it, if the disk is full, or if the attempt
    before was for other passages or another encoder.
    """
    recipe = recipe or Recipe()
    if recipe.dense is not None and encoder is None:
        raise ConfigError(f"encoder is missing: kind={recipe.kind} compares vectors")
    if encoder is not None:
        _ = encoder.dimension  # a model that cannot be loaded says so now
    with unfinished(Path(directory), encodes=recipe.dense is not None) as work:
        rows, sha256 = write_passages(passages, work)
        refuse_empty(rows)
        if recipe.dense is not None:
            dense.refuse_few(recipe.dense, rows)
        write_manifest(work, fill(work, recipe, encoder, rows, sha256))
    return open_index(directory, encoder)


def fill(work: Path, recipe: Recipe, encoder: Encoder | None, rows: int, sha256: str) -> Manifest:
    """Write the searchable files into `work`, where the passages are; the manifest, but for its `files`."""
    passages, parameters = PassageFile(work), {}
    if recipe.dense is not None:
        import faiss

        assert encoder is not None
        vectors_ND = encoded(passages, encoder, work, sha256)
        index = dense.build(recipe.dense, vectors_ND, recipe.threads)
        own = {key: value for key, value in asdict(recipe.dense).items() if key not in ("kind", "metric")}
        parameters |= own | {"factory": recipe.dense.factory(rows, vectors_ND.shape[1])}
        parameters |= dense.tune(index, recipe.dense, vectors_ND, questions(passages, encoder))
        try:
            faiss.write_index(index, str(work / "index.faiss"))
        except RuntimeError as error:
            raise OSError(str(error)) from error
    if recipe.bm25 is not None:
        lexical.save_bm25(lexical.build_bm25(passages, recipe.bm25.k1, recipe.bm25.b), work)
        parameters |= asdict(recipe.bm25)
    return Manifest(
        format=FORMAT,
        kind=recipe.kind,
        encoder=encoder.name if encoder and recipe.dense else None,
        encoder_settings=settings(encoder) if encoder and recipe.dense else None,
        dimension=encoder.dimension if encoder and recipe.dense else 0,
        metric=recipe.dense.metric if recipe.dense else "bm25",
        parameters=parameters,
        rows=rows,
        corpus_sha256=sha256,
        files={},
    )


def build_or_open(corpus: Iterable[Passage], encoder: Encoder | None, directory: str | Path) -> Index:
    """The index of `corpus` in `directory`, built where there is none. `corpus` is iterated once.

    Who finds that another process is building it waits, and opens what that one built; or builds it if that one died.
    Raises DataError where the directory holds an index of something else: hours of work are never overwritten.
    """
    directory, is_told = Path(directory), False
    while not directory.exists():
        try:
            return build_index(corpus, encoder, directory)
        except DataError as error:
            if isinstance(error.__cause__, BlockingIOError):
                if not is_told:
                    why = "another process is building it, which this one waits for"
                    print(f"otcrl: index {directory}: {why}", file=sys.stderr, flush=True)
                    is_told = True
                wait_for_builder(directory)
            elif not directory.exists():  # else another process was done just when this one began
                raise
    refuse(directory, "corpus sha256", read_manifest(directory).corpus_sha256, corpus_sha256(corpus))
    return open_index(directory, encoder)


def wait_for_builder(directory: Path) -> None:
    """Until the lock that `unfinished` takes is free: the index is there, or its builder gave up or died."""
    with suppress(FileNotFoundError):  # it was done just now
        lock = os.open(building(directory), os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.flock(lock, fcntl.LOCK_SH)
        finally:
            os.close(lock)


def derive(base: str | Path, directory: str | Path, recipe: Recipe) -> Index:
    """An index of another kind from a flat one, whose vectors are used as they are. Raises DataError."""
    source = open_index(base)
    manifest = source.manifest
    assert manifest is not None
    if recipe.dense is not None and (manifest.kind != "flat" or manifest.parameters["storage"] != "float32"):
        raise DataError(f"base={base} is {manifest.kind}: exact vectors are only in kind=flat storage=float32")
    with unfinished(Path(directory), encodes=recipe.dense is not None) as work:
        if recipe.dense is not None:
            mark_encoding(work, source.encoder, manifest.corpus_sha256)
            with open(work / VECTORS, "wb") as file:
                for start, stop in chunks(source.rows):
                    file.write(source.vectors.reconstruct_n(start, stop - start).tobytes())  # pyright: ignore
    passages = (source.passages[row] for row in range(source.rows))
    return build_index(passages, source.encoder, directory, recipe)


def adopt(vectors: str | Path, corpus: Iterable[Passage], encoder: Encoder, directory: str | Path) -> Index:
    """An index directory around a faiss file that somebody else wrote (Search-R1's `e5_Flat.index`) and its corpus.

    Raises DataError where the three do not fit together; the vectors of some passages are compared.
    """
    faiss = dense.library()
    try:
        index: Any = faiss.read_index(str(vectors), faiss.IO_FLAG_MMAP_IFC)
    except RuntimeError as error:
        raise DataError(f"{vectors} is no faiss index: {str(error)[:200]}") from error
    if type(faiss.downcast_index(index)).__name__.startswith("IndexIDMap"):
        raise DataError(f"{vectors} has numbers of its own for its vectors: expected them in the order of the corpus")
    if index.d != encoder.dimension:
        raise DataError(f"{vectors} has vectors of {index.d} numbers, {encoder.name} makes {encoder.dimension}")
    metric = {faiss.METRIC_INNER_PRODUCT: "ip", faiss.METRIC_L2: "l2"}.get(index.metric_type)
    if metric is None:
        raise DataError(f"{vectors} compares by faiss's metric {index.metric_type}, expected inner product or L2")
    with unfinished(Path(directory), encodes=False) as work:
        rows, sha256 = write_passages(corpus, work)
        if rows != index.ntotal:
            raise DataError(f"{vectors} has {index.ntotal} vectors, the corpus {rows} passages")
        if wrong := wrong_vectors(Index(passages=PassageFile(work), vectors=index, encoder=encoder)):
            raise DataError(f"{vectors} was made by another encoder, or of another corpus: {wrong[0]}")
        shutil.copyfile(vectors, work / "index.faiss")
        manifest = Manifest(
            format=FORMAT,
            kind="flat" if isinstance(faiss.downcast_index(index), faiss.IndexFlat) else "imported",
            encoder=encoder.name,
            encoder_settings=settings(encoder),
            dimension=index.d,
            metric=metric,
            parameters={"storage": "float32", "imported": Path(vectors).name},
            rows=rows,
            corpus_sha256=sha256,
            files={},
        )
        write_manifest(work, manifest)
    return open_index(directory, encoder)


# -- the work -----------------------------------------------------------------------------------------


def encoded(passages: Passages, encoder: Encoder, work: Path, sha256: str) -> Vectors:
    """[N, D] of all passages, mapped from `vectors.bin`; whole chunks that are there already are kept."""
    mark_encoding(work, encoder, sha256)
    row_bytes = 4 * encoder.dimension
    with open(work / VECTORS, "ab") as file:
        done = file.tell() // row_bytes
        done = done if done == len(passages) else done // AT_A_TIME * AT_A_TIME  # the same chunks, the same vectors
        file.truncate(done * row_bytes)
        start = done
        for texts in progress(passages, done):
            vectors_ND = encoder.encode(texts, is_query=False)
            refuse_bad(vectors_ND, encoder, start)
            file.write(vectors_ND.astype(np.float32, copy=False).tobytes())
            file.flush()
            os.fsync(file.fileno())
            start += len(texts)
    return np.memmap(work / VECTORS, np.float32, "r", shape=(len(passages), encoder.dimension))


def progress(passages: Passages, start: int) -> Iterator[list[str]]:
    """The texts of one chunk after the other; a bar where there are many."""
    rows = len(passages)
    with Progress(*COLUMNS, disable=rows - start <= AT_A_TIME) as bar:
        task = bar.add_task("encoding passages", total=rows, completed=start)
        for first, last in chunks(rows, start):
            yield contents(passages, first, last)
            bar.advance(task, last - first)


def refuse_empty(rows: int) -> None:
    if not rows:
        raise DataError("the corpus holds no passage")


def refuse_bad(vectors_ND: Vectors, encoder: Encoder, start: int) -> None:
    if vectors_ND.shape[1] != encoder.dimension or not np.isfinite(vectors_ND).all():
        row = start + int(np.argmin(np.isfinite(vectors_ND).all(1))) + 1
        raise DataError(f"{encoder.name} made no vector of {encoder.dimension} finite numbers of passage {row}")


def questions(passages: Passages, encoder: Encoder) -> NDArray[np.float32]:
    """[Q, D]: what people might ask for, titles, or the first words where there are none."""
    rows = np.linspace(0, len(passages) - 1, min(TUNED_WITH, len(passages))).astype(int)
    sample = [passages[int(row)] for row in rows]
    return encoder.encode([p.title or " ".join(p.text.split()[:8]) for p in sample], is_query=True)
