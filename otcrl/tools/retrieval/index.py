"""The passages nearest to a query: by meaning (faiss), by words (BM25), or by both.

An index directory holds its passages (`store.py`), `index.faiss` and `bm25/` as its kind needs, and `manifest.json`,
which says what all was made of, with sizes and hashes. What does not match it is refused.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from otcrl.errors import DataError
from otcrl.tools.retrieval.corpus import Passage
from otcrl.tools.retrieval.dense import cores, library
from otcrl.tools.retrieval.encode import TYPES, Encoder, encoder_from
from otcrl.tools.retrieval.lexical import FOLDER, open_bm25, search_bm25
from otcrl.tools.retrieval.store import PassageFile, Passages

if TYPE_CHECKING:
    import bm25s
    import faiss

FORMAT = 2
THREADS = 2  # of faiss: the learner wants the rest
FUSION_CONSTANT = 60  # Cormack, Clarke, Büttcher: Reciprocal Rank Fusion (SIGIR 2009)
LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")  # of a container
FUSED = 100  # ranks of each list that count
SAMPLE = 8  # passages that are encoded again to tell whose the vectors are
LIKE_ITSELF, LIKE_ITS_CODE = 0.95, 0.7  # cosine


@dataclass(frozen=True, slots=True)
class Hit:
    passage: Passage
    score: float  # higher is nearer: cosine, minus the squared distance, BM25, or the fused ranks


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """What an index was made of."""

    format: int
    kind: str  # flat, ivf, ivfpq, hnsw, bm25, hybrid
    encoder: str | None  # its name; None: no vectors
    encoder_settings: dict[str, Any] | None
    dimension: int
    metric: str  # ip or l2
    parameters: dict[str, Any]
    rows: int
    corpus_sha256: str  # of passages.jsonl
    files: dict[str, list[Any]]  # name -> [bytes, sha256]


@dataclass(frozen=True, eq=False, kw_only=True)
class Index:
    """Passages and how to find them; `vectors` need an `encoder`."""

    passages: Passages
    vectors: faiss.Index | None = None
    encoder: Encoder | None = None
    lexical: bm25s.BM25 | None = None
    manifest: Manifest | None = None  # None: in memory only
    identity: str = "memory"  # hash of the manifest
    threads: int = THREADS  # of faiss

    @property
    def rows(self) -> int:
        return len(self.passages)

    def find(self, id: str) -> Passage | None:
        return self.passages.find(id)

    def describe(self) -> dict[str, Any]:
        kind = self.manifest.kind if self.manifest else "flat"
        return {"kind": kind, "encoder": self.encoder.name if self.encoder else None, "rows": self.rows}

    def search(self, queries: Sequence[str], topk: int) -> list[list[Hit]]:
        """For each query the `topk` best passages (all that match where there are fewer), best first."""
        count = min(topk, self.rows)
        depth = count if self.vectors is None or self.lexical is None else min(self.rows, max(FUSED, count))
        rankings = []
        if self.vectors is not None:
            rankings.append(self._nearest(queries, depth))
        if self.lexical is not None:
            rankings.append(search_bm25(self.lexical, queries, depth))
        scores, rows = rankings[0] if len(rankings) == 1 else fused([rows for _, rows in rankings], count)
        return [
            [self._hit(int(row), float(score)) for row, score in zip(*pair, strict=True) if row >= 0]
            for pair in zip(rows, scores, strict=True)
        ]

    def _hit(self, row: int, score: float) -> Hit:
        try:
            return Hit(self.passages[row], score)
        except (ValueError, TypeError) as error:  # TypeError: of a damaged name of a field
            raise RuntimeError(
                f"passage {row + 1} of passages.jsonl is damaged: {error}. otcrl index check tells what else is"
            ) from error

    def _nearest(self, queries: Sequence[str], count: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        import faiss

        assert self.encoder is not None
        assert self.vectors is not None
        faiss.omp_set_num_threads(min(self.threads, cores()))  # it counts for the calling thread only
        vectors_QD = self.encoder.encode(queries, is_query=True)
        scores, rows = self.vectors.search(vectors_QD, count)  # pyright: ignore[reportCallIssue]
        return (-scores if self.vectors.metric_type == faiss.METRIC_L2 else scores), rows


def fused(rankings: Sequence[NDArray[np.int64]], count: int) -> tuple[list[list[float]], list[list[int]]]:
    """Reciprocal rank fusion: a row's score is the sum of 1 / (60 + its rank) over the lists that have it."""
    scores, rows = [], []
    for lists in zip(*rankings, strict=True):
        points: dict[int, float] = {}
        for ranked in lists:
            for rank, row in enumerate(ranked, start=1):
                if row >= 0:
                    points[int(row)] = points.get(int(row), 0.0) + 1 / (FUSION_CONSTANT + rank)
        best = sorted(points, key=lambda row: (-points[row], row))[:count]
        rows.append(best)
        scores.append([points[row] for row in best])
    return scores, rows


# -- the directory ------------------------------------------------------------------------------------


def read_manifest(directory: Path) -> Manifest:
    return parsed_manifest(directory, manifest_bytes(directory))


def manifest_bytes(directory: Path) -> bytes:
    try:
        return (directory / "manifest.json").read_bytes()
    except OSError as error:
        raise DataError(
            f"index: {directory} is no index directory: manifest.json cannot be read ({error.strerror})"
        ) from error


def parsed_manifest(directory: Path, content: bytes) -> Manifest:
    path = directory / "manifest.json"
    try:
        manifest = Manifest(**json.loads(content))
    except (ValueError, TypeError) as error:
        raise DataError(f"{path}: expected the fields {', '.join(Manifest.__slots__)}: {error}") from error
    if manifest.format != FORMAT:
        raise DataError(f"{path}: this otcrl reads format {FORMAT}, the index has {manifest.format}: build it anew")
    return manifest


def refuse(directory: Path, what: str, built: object, wanted: object) -> None:
    """Raises DataError unless the two are equal."""
    if built != wanted:
        raise DataError(
            f"index {directory} was built with {what} {built!r}, but this run has {wanted!r}: "
            "use the same one, or name another directory to build anew"
        )


def open_index(
    directory: str | Path, encoder: Encoder | None = None, mmap: bool = False, threads: int = THREADS
) -> Index:
    """The index kept in `directory`; with `mmap` its vectors stay on disk and are read as they are needed.

    `encoder` None: the one that the manifest describes. Raises DataError where it does not fit `encoder`, itself, or
    into memory, and where it is replaced meanwhile.
    """
    directory = Path(directory)
    content = manifest_bytes(directory)
    manifest = parsed_manifest(directory, content)
    if manifest.encoder is not None:
        encoder = encoder or encoder_from(manifest.encoder_settings or {})
        refuse(directory, "encoder", manifest.encoder, encoder.name)
        refuse(directory, "dimension", manifest.dimension, encoder.dimension)
    refuse_sizes(directory, manifest)
    refuse_too_large(directory, manifest, mmap)
    vectors = lexical = None
    faiss: Any = library() if "index.faiss" in manifest.files else None
    try:
        passages = PassageFile(directory)
        if "index.faiss" in manifest.files:
            vectors = faiss.read_index(str(directory / "index.faiss"), faiss.IO_FLAG_MMAP_IFC if mmap else 0)
        if any(name.startswith(FOLDER) for name in manifest.files):
            lexical = open_bm25(directory, mmap)
    except (RuntimeError, OSError, ValueError, KeyError) as error:
        raise DataError(f"index {directory} is damaged: {error}") from error
    counts = {"passages.jsonl": len(passages)} | ({"index.faiss": vectors.ntotal} if vectors is not None else {})
    for part, rows in counts.items():
        if rows != manifest.rows:
            raise DataError(f"index {directory} is damaged: {part} has {rows} rows, manifest.json {manifest.rows}")
    refuse_replaced(directory, content)
    return Index(
        passages=passages,
        vectors=vectors,
        encoder=encoder if manifest.encoder is not None else None,
        lexical=lexical,
        manifest=manifest,
        identity=hashlib.sha256(content).hexdigest()[:16],
        threads=threads,
    )


def refuse_replaced(directory: Path, manifest: bytes) -> None:
    """What was opened would be old and new files, or the old ones under the new ones' name. Raises DataError."""
    path = directory / "manifest.json"
    if not path.is_file() or path.read_bytes() != manifest:
        raise DataError(f"index {directory} was replaced while it was opened: open it again")


def refuse_sizes(directory: Path, manifest: Manifest) -> None:
    """Cheap, at every start; `check` reads the files."""
    for name, (size, _) in manifest.files.items():
        path = directory / name
        if not path.is_file():
            raise DataError(f"index {directory} is damaged: {name} is missing")
        if path.stat().st_size != size:
            raise DataError(
                f"index {directory} is damaged: {name} has {path.stat().st_size} bytes, manifest.json says {size}"
            )


def refuse_too_large(directory: Path, manifest: Manifest, mmap: bool) -> None:
    """What this process holds already counts too: a server that loads an index anew has the old one meanwhile."""
    needed, limit, held = sum(memory_bytes(manifest, mmap).values()), memory_limit(), held_bytes()
    if needed + held > limit:
        raise DataError(
            f"index {directory} needs {needed / 1e9:.1f} GB of memory beside the {held / 1e9:.1f} that this process "
            f"has, and it may have {limit / 1e9:.1f}: open it with mmap=true, build it smaller (storage=int8, "
            "kind=ivfpq), or in shards"
        )


def memory_limit() -> int:
    """Of this machine, or of the container that this is."""
    limits = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    for path in LIMITS:
        with suppress(OSError, ValueError):  # "max" is no number
            limits.append(int(Path(path).read_text()))
    return min(limits)


def held_bytes() -> int:
    """Of its own, not mapped from files; 0 where nothing says it."""
    with suppress(OSError, ValueError):
        status = Path("/proc/self/status").read_text()
        return int(status.partition("RssAnon:")[2].split(maxsplit=1)[0]) * 1024
    return 0


def memory_plan(manifest: Manifest, mmap: bool = False) -> str:
    """For people, before it is loaded."""
    parts = ", ".join(f"{part} {size / 1e6:,.0f} MB" for part, size in memory_bytes(manifest, mmap).items() if size)
    return f"{manifest.rows:,} passages on disk; in memory {parts or 'nothing but what is asked for'}"


def memory_bytes(manifest: Manifest, mmap: bool = False) -> dict[str, int]:
    """What opening the index takes, by part. Passages, and what is mapped, stay on disk."""
    parts = {"index.faiss": 0, FOLDER: 0}
    for name, (size, _) in manifest.files.items():
        part = FOLDER if name.startswith(FOLDER) else name
        if part in parts and not mmap:
            parts[part] += size
    return parts


def check(directory: str | Path) -> list[str]:
    """What is wrong with an index, found by reading all of it; empty: nothing."""
    directory = Path(directory)
    manifest = read_manifest(directory)
    found = []
    for name, (size, sha256) in manifest.files.items():
        path = directory / name
        if not path.is_file():
            found.append(f"{name} is missing")
        elif path.stat().st_size != size:
            found.append(f"{name} has {path.stat().st_size} bytes, manifest.json says {size}")
        elif file_sha256(path) != sha256:
            found.append(f"{name} has changed since it was built")
    if not found and (manifest.encoder_settings or {}).get("type") in TYPES:  # else only its owner can try it
        found += wrong_vectors(open_index(directory, mmap=True))
    return found


def file_sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def wrong_vectors(index: Index) -> list[str]:
    """What is wrong with some passages' vectors, encoded again: another encoder's are not alike."""
    assert index.encoder is not None
    vectors: Any = index.vectors
    compressed = hasattr(vectors, "make_direct_map")  # maybe only codes, which resemble their vectors
    if compressed:
        vectors.make_direct_map()
    rows = np.linspace(0, index.rows - 1, min(SAMPLE, index.rows)).astype(int)
    kept_ND = np.stack([vectors.reconstruct(int(row)) for row in rows])
    again_ND = index.encoder.encode([index.passages[int(row)].contents for row in rows], is_query=False)
    lengths_N = np.linalg.norm(kept_ND, axis=1) * np.linalg.norm(again_ND, axis=1)
    cosines_N = np.where(lengths_N > 0, (kept_ND * again_ND).sum(1) / np.maximum(lengths_N, 1e-12), 1.0)
    worst = int(np.argmin(cosines_N))
    if cosines_N[worst] >= (LIKE_ITS_CODE if compressed else LIKE_ITSELF):
        return []
    return [
        f"the vector of passage {int(rows[worst]) + 1} is not what {index.encoder.name} makes of it "
        f"(cosine {cosines_N[worst]:.3f})"
    ]


def manifest_files(directory: Path, but: Collection[str] = ()) -> dict[str, list[Any]]:
    """All that lies there, but for the manifest and what is named."""
    left_out = {"manifest.json", *but}
    names = sorted(path for path in directory.rglob("*") if path.is_file() and path.name not in left_out)
    return {str(path.relative_to(directory)): [path.stat().st_size, file_sha256(path)] for path in names}


def described(manifest: Manifest) -> Mapping[str, Any]:
    """For people."""
    return {
        "kind": manifest.kind,
        "rows": manifest.rows,
        "encoder": manifest.encoder,
        "dimension": manifest.dimension,
        "metric": manifest.metric,
        **manifest.parameters,
        "corpus sha256": manifest.corpus_sha256,
        **{f"memory, {part}": f"{size / 1e6:,.1f} MB" for part, size in memory_bytes(manifest).items() if size},
        "on disk": f"{sum(size for size, _ in manifest.files.values()) / 1e6:,.1f} MB",
    }
