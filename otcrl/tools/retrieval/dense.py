"""Nearest vectors with faiss: exact, or approximate with as much effort as the wanted recall takes.

Kinds: `flat` compares with every vector; `ivf` with those of the nearest lists; `ivfpq` the same with compressed
vectors; `hnsw` walks a graph. See https://github.com/facebookresearch/faiss/wiki/The-index-factory.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from otcrl.errors import ConfigError, DataError, nearest
from otcrl.tools.retrieval.store import chunks

if TYPE_CHECKING:
    import faiss

# Dimension letters here: N vectors, Q queries, D vector dimension, K neighbours.
KINDS = ("flat", "ivf", "ivfpq", "hnsw")
STORAGE = {"float32": "Flat", "float16": "SQfp16", "int8": "SQ8"}
BYTES = {"float32": 4, "float16": 2, "int8": 1}
METRICS = ("ip", "l2")
PER_LIST = 128  # training vectors for each list; faiss wants 39 to 256
CODES = 256  # of a product quantiser's byte
NEIGHBOURS = 10  # recall is measured at
ADD_AT_A_TIME = 65536


@dataclass(frozen=True, kw_only=True)
class Dense:
    """How vectors are kept and searched. None: chosen from how many there are."""

    kind: str = "flat"
    storage: str = "float32"
    metric: str = "ip"
    lists: int | None = None  # of ivf and ivfpq; None: 4 times the square root of the rows
    code_bytes: int | None = None  # of a vector in ivfpq; None: an eighth of its dimension
    links: int = 32  # of a node in hnsw
    build_depth: int = 200  # candidates looked at when a node is linked in hnsw
    effort: int | None = None  # lists probed (ivf, ivfpq) or candidates kept (hnsw); None: the least for target_recall
    target_recall: float = 0.95  # of the 10 true neighbours

    def __post_init__(self) -> None:
        for field, choices in {"kind": KINDS, "storage": tuple(STORAGE), "metric": METRICS}.items():
            if (value := getattr(self, field)) not in choices:
                raise ConfigError(
                    f"{field} must be one of {', '.join(choices)}, got {value!r}.{nearest(value, choices)}"
                )
        for field in ("lists", "code_bytes", "links", "build_depth", "effort"):
            if (value := getattr(self, field)) is not None and value < 1:
                raise ConfigError(f"{field} must be 1 or more, got {value}")
        if self.links < 2:  # faiss crashes
            raise ConfigError(f"links must be 2 or more, got {self.links}")
        if not 0 < self.target_recall <= 1:
            raise ConfigError(f"target_recall must be above 0 and at most 1, got {self.target_recall}")
        if self.kind == "ivfpq" and self.storage != "float32":
            raise ConfigError(f"storage={self.storage} is for other kinds: ivfpq keeps code_bytes for each vector")

    def lists_for(self, rows: int) -> int:
        return self.lists or max(1, min(rows // 39, round(4 * math.sqrt(rows))))

    def code_bytes_for(self, dimension: int) -> int:
        """The nearest that divides the dimension."""
        wanted = self.code_bytes or max(1, dimension // 8)
        return next(count for count in range(min(wanted, dimension), 0, -1) if dimension % count == 0)

    def factory(self, rows: int, dimension: int) -> str:
        """What faiss calls it."""
        storage = STORAGE[self.storage]
        return {
            "flat": storage,
            "ivf": f"IVF{self.lists_for(rows)},{storage}",
            "ivfpq": f"IVF{self.lists_for(rows)},PQ{self.code_bytes_for(dimension)}",
            "hnsw": f"HNSW{self.links}" + ("" if storage == "Flat" else f"_{storage}"),
        }[self.kind]

    def ram_bytes(self, rows: int, dimension: int) -> int:
        """Of the loaded index, without the passages."""
        vector = self.code_bytes_for(dimension) if self.kind == "ivfpq" else dimension * BYTES[self.storage]
        extra = {"flat": 0, "ivf": 8, "ivfpq": 8, "hnsw": 4 * 2 * self.links + 16}[self.kind]
        return rows * (vector + extra) + (self.lists_for(rows) * dimension * 4 if self.kind.startswith("ivf") else 0)


def build(settings: Dense, vectors_ND: NDArray[np.float32], threads: int | None = None) -> faiss.Index:
    """Trained on a fixed sample and filled in order, so that the same vectors give the same index.

    `vectors_ND` may be mapped from a file. A graph depends on the order in which threads add to it, hence hnsw takes
    one thread unless `threads` says otherwise. Raises DataError where there are too few vectors to train with.
    """
    faiss = library()
    rows, dimension = vectors_ND.shape
    refuse_few(settings, rows)
    metric = faiss.METRIC_INNER_PRODUCT if settings.metric == "ip" else faiss.METRIC_L2
    index: Any = faiss.index_factory(dimension, settings.factory(rows, dimension), metric)
    faiss.omp_set_num_threads(threads or (1 if settings.kind == "hnsw" else cores()))
    if settings.kind == "hnsw":
        index.hnsw.efConstruction = settings.build_depth
    if hasattr(index, "do_polysemous_training"):
        index.do_polysemous_training = False  # minutes, for a filter that is not used
    # finding lists is what takes hours; flat has nothing to find, and GPUs have no flat int8 and no long codes of ivfpq
    on_gpu = settings.kind == "ivf" and hasattr(faiss, "index_cpu_to_all_gpus") and faiss.get_num_gpus() > 0
    if on_gpu:
        index = faiss.index_cpu_to_all_gpus(index)
    if not index.is_trained:
        index.train(training_sample(vectors_ND, max(CODES * 4, PER_LIST * settings.lists_for(rows))))
    for start, stop in chunks(rows, size=ADD_AT_A_TIME):
        index.add(np.ascontiguousarray(vectors_ND[start:stop]))
    return faiss.index_gpu_to_cpu(index) if on_gpu else index


def library():
    """Raises ConfigError where there is no faiss."""
    try:
        import faiss
    except ModuleNotFoundError as error:
        raise ConfigError("vectors are searched with faiss: pip install 'otcrl[cpu]', or 'otcrl[gpu]'") from error
    return faiss


def refuse_few(settings: Dense, rows: int) -> None:
    """Raises DataError where there are too few vectors to train with, which is known before any is computed."""
    if settings.kind == "ivfpq" and rows < CODES:
        raise DataError(f"kind=ivfpq learns its codes from {CODES} passages or more, the corpus has {rows}: use flat")
    if settings.kind.startswith("ivf") and settings.lists_for(rows) > rows:
        raise DataError(f"lists={settings.lists} is more than the {rows} passages of the corpus: leave it out")


def cores() -> int:
    """That this process may use; what a search has told faiss does not count."""
    return int(os.environ.get("OMP_NUM_THREADS", 0)) or len(os.sched_getaffinity(0))


def training_sample(vectors_ND: NDArray[np.float32], most: int) -> NDArray[np.float32]:
    rows = len(vectors_ND)
    chosen = np.arange(rows) if rows <= most else np.sort(np.random.default_rng(0).choice(rows, most, replace=False))
    return np.ascontiguousarray(vectors_ND[chosen])


def set_effort(index: faiss.Index, effort: int) -> None:
    """Lists probed, or candidates kept; nothing to set where the search is exact."""
    import faiss

    inner: Any = faiss.downcast_index(index)
    if hasattr(inner, "nprobe"):
        inner.nprobe = min(effort, inner.nlist)
    elif hasattr(inner, "hnsw"):
        inner.hnsw.efSearch = effort


def exact(vectors_ND: NDArray[np.float32], queries_QD: NDArray[np.float32], metric: str) -> NDArray[np.int64]:
    """[Q, K] rows of the true neighbours, best first, from vectors that need not fit in memory."""
    import faiss

    kept = faiss.ResultHeap(len(queries_QD), NEIGHBOURS, keep_max=metric == "ip")
    kind = faiss.METRIC_INNER_PRODUCT if metric == "ip" else faiss.METRIC_L2
    for start, stop in chunks(len(vectors_ND), size=ADD_AT_A_TIME):
        count = min(NEIGHBOURS, stop - start)
        scores, rows = faiss.knn(queries_QD, np.ascontiguousarray(vectors_ND[start:stop]), count, metric=kind)
        kept.add_result(scores, rows + start)
    kept.finalize()
    return kept.I


def overlap(found_QK: NDArray[np.int64], true_QK: NDArray[np.int64]) -> float:
    """The share of the true neighbours that were found: recall@K."""
    pairs = zip(found_QK, true_QK, strict=True)
    shares = [len((set(found) & set(true)) - {-1}) / max(1, np.sum(true >= 0)) for found, true in pairs]  # -1: none
    return float(np.mean(shares))


def tune(
    index: faiss.Index, settings: Dense, vectors_ND: NDArray[np.float32], queries_QD: NDArray[np.float32]
) -> dict[str, float]:
    """Set the effort that `settings` names, or the least power of two that reaches its target recall.

    {effort, recall_at_10}; nothing where the search is exact.
    """
    if settings.kind == "flat" or not len(queries_QD):
        return {}
    true_QK = exact(vectors_ND, queries_QD, settings.metric)
    most = settings.lists_for(len(vectors_ND)) if settings.kind.startswith("ivf") else 1024
    first = 1 if settings.kind.startswith("ivf") else 16
    efforts: Sequence[int] = [settings.effort] if settings.effort else [*doubling(first, most), most]
    found = {}
    for effort in efforts:
        set_effort(index, effort)
        _, rows = index.search(queries_QD, NEIGHBOURS)  # pyright: ignore[reportCallIssue]
        found = {"effort": effort, "recall_at_10": round(overlap(rows, true_QK), 4)}
        if found["recall_at_10"] >= settings.target_recall:
            break
    return found


def doubling(first: int, most: int) -> list[int]:
    return [first << power for power in range(64) if first << power < most]
