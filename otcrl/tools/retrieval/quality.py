"""How well an index answers questions whose gold passages are known."""

from __future__ import annotations

import math
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from statistics import fmean

from otcrl.errors import DataError
from otcrl.jsonlines import read_json_lines
from otcrl.tools.retrieval.index import Index

AT_A_TIME = 64  # queries


@dataclass(frozen=True, slots=True)
class Question:
    text: str
    gold: frozenset[str]  # ids of the passages that answer it


def read_questions(path: str) -> list[Question]:
    """Of rows {question, gold_ids}. Raises DataError naming the line."""
    found = []
    for where, row in read_json_lines(path):
        if not isinstance(row, dict) or not isinstance(row.get("question"), str):
            raise DataError(f'{where}: expected {{"question", "gold_ids"}}, but `question` is missing')
        gold = row.get("gold_ids")
        if not isinstance(gold, list) or not gold or not all(isinstance(id, str | int) for id in gold):
            raise DataError(f"{where}: expected `gold_ids`, a list of passage ids, got {gold!r}")
        found.append(Question(row["question"], frozenset(map(str, gold))))
    if not found:
        raise DataError(f"{path} holds no question")
    return found


def recall_at(k: int, found: Sequence[str], gold: Collection[str]) -> float:
    """The share of the gold passages among the first k."""
    return len(set(found[:k]) & set(gold)) / len(gold)


def reciprocal_rank(found: Sequence[str], gold: Collection[str]) -> float:
    """1 / the rank of the first gold passage; 0 if there is none."""
    return next((1 / rank for rank, id in enumerate(found, start=1) if id in gold), 0.0)


def ndcg_at(k: int, found: Sequence[str], gold: Collection[str]) -> float:
    """Normalised discounted cumulative gain with gains 0 and 1 (Järvelin and Kekäläinen, 2002)."""
    gain = sum(1 / math.log2(rank + 1) for rank, id in enumerate(found[:k], start=1) if id in gold)
    return gain / sum(1 / math.log2(rank + 1) for rank in range(1, min(k, len(gold)) + 1))


def measure(index: Index, questions: Sequence[Question], ks: Sequence[int] = (1, 3, 10)) -> dict[str, float]:
    """recall@k and nDCG@k for each k, MRR among the first max(ks), and milliseconds a query in batches of 64.

    Raises DataError for a gold passage that the index does not have.
    """
    for question in questions:
        for id in question.gold:
            if index.find(id) is None:
                raise DataError(f"the gold passage {id!r} of {question.text[:60]!r} is not in the index")
    begun = time.perf_counter()
    found = []
    for start in range(0, len(questions), AT_A_TIME):
        texts = [question.text for question in questions[start : start + AT_A_TIME]]
        found += [[hit.passage.id for hit in hits] for hits in index.search(texts, max(ks))]
    seconds = time.perf_counter() - begun
    pairs = [(ids, question.gold) for ids, question in zip(found, questions, strict=True)]
    return {
        **{f"recall@{k}": fmean(recall_at(k, *pair) for pair in pairs) for k in ks},
        **{f"ndcg@{k}": fmean(ndcg_at(k, *pair) for pair in pairs) for k in ks},
        "mrr": fmean(reciprocal_rank(*pair) for pair in pairs),
        "ms_per_query": 1e3 * seconds / len(questions),
    }
