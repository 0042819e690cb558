"""BM25 by the library bm25s: passages that share rare words with the query."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from otcrl.errors import ConfigError, DataError
from otcrl.tools.retrieval.store import Passages

if TYPE_CHECKING:
    import bm25s

FOLDER = "bm25"


def library():
    try:
        import bm25s
    except ModuleNotFoundError as error:
        raise ConfigError("kind: bm25 and hybrid need the library bm25s: pip install bm25s") from error
    return bm25s


def build_bm25(passages: Passages, k1: float, b: float) -> bm25s.BM25:
    """Every passage's words are in memory while it is built."""
    bm25 = library()
    texts = [passages[row].contents for row in range(len(passages))]
    model = bm25.BM25(k1=k1, b=b)
    words: Any = bm25.tokenize(texts, stopwords="en", show_progress=False)
    if not words.vocab:
        raise DataError("kind=bm25: no passage has a word of two letters or more that is no stop word")
    model.index(words, show_progress=False)
    return model


def save_bm25(model: bm25s.BM25, directory: Path) -> None:
    model.save(directory / FOLDER, show_progress=False)


def open_bm25(directory: Path, mmap: bool) -> bm25s.BM25:
    return library().BM25.load(directory / FOLDER, mmap=mmap, show_progress=False)


def search_bm25(model: bm25s.BM25, queries: Sequence[str], count: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """([Q, K] scores, [Q, K] rows), best first; -1 fills up the rows of a query that shares no word with so many."""
    tokens = library().tokenize(list(queries), stopwords="en", return_ids=False, show_progress=False)
    found = model.retrieve(tokens, k=count, show_progress=False, n_threads=0)
    rows, scores = found
    return scores.astype(np.float32), np.where(scores > 0, rows, -1).astype(np.int64)
