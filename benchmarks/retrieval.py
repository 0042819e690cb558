"""Search served and search alone: ours against a plain server, approximate against exact.

    python benchmarks/retrieval.py INDEX QUESTIONS [--rows 1000000]

INDEX is a flat index of real passages, QUESTIONS jsonl(.gz) rows with `question`. The plain server does what
Search-R1's does: one model, a synchronous handler, each request encoded and searched by itself. Both get the same
questions from 64 clients, in turns. Vectors beyond those of INDEX are made from them: each is one of them turned by
noise three quarters as long as it, so that neighbourhoods stay as uneven as real ones and are not copies of them.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from operator import truediv
from statistics import median, quantiles
from typing import Any

import faiss
import httpx
import numpy as np
from common import publish
from encoders import loop, measure, ours

from otcrl.tools.retrieval.dense import Dense, build, exact, overlap, tune
from otcrl.tools.retrieval.encode import Vectors
from otcrl.tools.retrieval.index import Index, open_index
from otcrl.tools.retrieval.quality import read_questions

CLIENTS, ROUNDS, TOPK = 64, 3, 3
SIZES = (10_000, 100_000)
ENCODED = 1200  # passages
HEAD = b"POST /retrieve HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
Row = dict[str, str | int | float | None]

PLAIN = """
import sys
import faiss, torch, uvicorn
from fastapi import FastAPI
from pydantic import BaseModel
from transformers import AutoModel, AutoTokenizer
from otcrl.tools.retrieval.encode import resolve_model
from otcrl.tools.retrieval.store import PassageFile
from pathlib import Path

directory, model, port = Path(sys.argv[1]), resolve_model(sys.argv[2]), int(sys.argv[3])
passages, index = PassageFile(directory), faiss.read_index(str(directory / "index.faiss"))
tokenizer, encoder = AutoTokenizer.from_pretrained(model), AutoModel.from_pretrained(model).eval()
app = FastAPI()

class Query(BaseModel):
    queries: list[str]
    topk: int = 3
    return_scores: bool = False

@app.post("/retrieve")
def retrieve(request: Query):
    inputs = tokenizer(request.queries, max_length=256, padding=True, truncation=True, return_tensors="pt")
    with torch.no_grad():
        hidden = encoder(**inputs).last_hidden_state
    mask = inputs["attention_mask"].unsqueeze(-1)
    vectors = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1).numpy()
    scores, rows = index.search(vectors, request.topk)
    found = [[passages[int(row)] for row in one] for one in rows]
    return {"result": [
        [{"document": {"id": p.id, "contents": p.contents}, "score": float(s)} for p, s in zip(*pair)]
        for pair in zip(found, scores)
    ]}

uvicorn.run(app, port=port, log_level="warning")
"""


# -- served -------------------------------------------------------------------------------------------


@contextlib.contextmanager
def server(*command: str, port: int) -> Iterator[None]:
    url = f"http://127.0.0.1:{port}"
    process = subprocess.Popen([sys.executable, *command])
    try:
        deadline = time.monotonic() + 120
        while True:
            with contextlib.suppress(httpx.TransportError):
                if httpx.post(f"{url}/retrieve", json={"queries": ["warm"], "topk": 1}, timeout=60).is_success:
                    break
            if process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"no server: {command[:2]}")
            time.sleep(0.2)
        yield
    finally:
        process.terminate()
        process.wait()


async def load(port: int, questions: Sequence[str]) -> tuple[float, list[float], list[list[str]]]:
    """(queries per second, seconds of each, ids found) with 64 clients that ask one question at a time.

    The requests are written by hand, as an HTTP library would take as much of two cores as a server does.
    """
    waiting, found, seconds = list(enumerate(questions))[::-1], [[""]] * len(questions), []

    async def client() -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        while waiting:
            number, question = waiting.pop()
            body = json.dumps({"queries": [question], "topk": TOPK, "return_scores": True}).encode()
            begun = time.perf_counter()
            writer.write(HEAD % len(body) + body)
            head = await reader.readuntil(b"\r\n\r\n")
            size = int(head.lower().partition(b"content-length:")[2].split()[0])
            answer = json.loads(await reader.readexactly(size))
            seconds.append(time.perf_counter() - begun)
            found[number] = [hit["document"]["id"] for hit in answer["result"][0]]
        writer.close()

    begun = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(CLIENTS)))
    return len(questions) / (time.perf_counter() - begun), seconds, found


def served(directory: str, model: str, questions: Sequence[str]) -> tuple[list[Row], dict[str, float]]:
    """Each round asks both servers other questions, so that nobody has the answer yet."""
    own = ("-m", "otcrl.cli", "serve", "retrieval", f"index={directory}", "port=8971")
    plain = ("-c", PLAIN, directory, model, "8972")
    rates: dict[str, list[float]] = {"otcrl": [], "plain": []}
    seconds: dict[str, list[float]] = {"otcrl": [], "plain": []}
    share = len(questions) // ROUNDS
    same = []
    with server(*own, port=8971), server(*plain, port=8972):
        for round in range(ROUNDS):
            asked = questions[round * share : (round + 1) * share]
            answers = []
            for name, port in (("plain", 8972), ("otcrl", 8971)):
                rate, took, found = asyncio.run(load(port, asked))
                rates[name].append(rate)
                seconds[name] += took
                answers.append(found)
            same += [a == b for a, b in zip(*answers, strict=True)]
    rows: list[Row] = [
        {
            "kind": f"served, {name}",
            "queries_per_s": median(rates[name]),
            "p50_ms": 1e3 * median(seconds[name]),
            "p99_ms": 1e3 * quantiles(seconds[name], n=100)[-1],
        }
        for name in rates
    ]
    p99 = {name: quantiles(took, n=100)[-1] for name, took in seconds.items()}
    return rows, {
        "qps_vs_plain_server": median(rates["otcrl"]) / median(rates["plain"]),
        "p99_vs_plain_server": p99["otcrl"] / p99["plain"],
        "same_answers": sum(same) / len(same),
    }


def parts(index: Index, questions: Sequence[str]) -> list[Row]:
    """Encoding and searching by themselves, one at a time and 64 together."""
    assert index.encoder is not None
    vectors, encoder = index.vectors, index.encoder
    rows: list[Row] = []
    for batch in (1, 64):
        texts = [list(questions[i : i + batch]) for i in range(0, 4 * 64, batch)]
        encoded = [encoder.encode(one, is_query=True) for one in texts]
        took = {
            "encode": per_query(lambda one: encoder.encode(one, is_query=True), texts),
            "search": per_query(lambda one: vectors.search(one, TOPK), encoded),  # pyright: ignore
        }
        rows += [{"kind": f"{name}, {batch} at a time", "ms_per_query": 1e3 * s} for name, s in took.items()]
    return rows


def per_query(call: Callable[..., object], batches: Sequence[Any]) -> float:
    call(batches[0])
    begun = time.perf_counter()
    for batch in batches:
        call(batch)
    return (time.perf_counter() - begun) / sum(map(len, batches))


def built(index: Index) -> tuple[list[Row], float]:
    """Passages per second while an index is built, ours and the loop that people write (encoders.py)."""
    texts = [index.passages[row].contents for row in range(min(ENCODED, index.rows))]
    found = measure({"the usual loop": loop(), "otcrl": ours("auto")}, texts)
    rows: list[Row] = [
        {"kind": f"encoding passages, {kind}", "passages_per_s": 1 / median(it.seconds)} for kind, it in found.items()
    ]
    return rows, median(map(truediv, found["the usual loop"].seconds, found["otcrl"].seconds))


# -- search alone -------------------------------------------------------------------------------------


def more_vectors(real_ND: Vectors, rows: int, seed: int) -> Vectors:
    rng = np.random.default_rng(seed)
    made = np.empty((rows, real_ND.shape[1]), np.float32)
    for start in range(0, rows, 50_000):
        stop = min(start + 50_000, rows)
        noise = rng.standard_normal((stop - start, real_ND.shape[1])).astype(np.float32)
        noise *= 0.75 / np.linalg.norm(noise, axis=1, keepdims=True)
        made[start:stop] = real_ND[rng.integers(0, len(real_ND), stop - start)] + noise
    return made / np.linalg.norm(made, axis=1, keepdims=True)


def search_only(index: faiss.Index, queries_QD: Vectors) -> object:
    return index.search(queries_QD, 10)  # pyright: ignore[reportCallIssue]


def searched(real_ND: Vectors, queries_QD: Vectors, rows: int, kinds: Sequence[Dense]) -> list[Row]:
    vectors_ND = more_vectors(real_ND, rows, seed=0)
    true_QK = exact(vectors_ND, queries_QD, "ip")
    batches = [queries_QD[i : i + 64] for i in range(0, 512, 64)]
    found: list[Row] = []
    for dense in kinds:
        begun = time.perf_counter()
        index = build(dense, vectors_ND, threads=len(os.sched_getaffinity(0)))
        built_s = time.perf_counter() - begun
        tuned = tune(index, dense, vectors_ND, more_vectors(real_ND, 256, seed=2))
        recall = overlap(index.search(queries_QD, 10)[1], true_QK)  # pyright: ignore
        few = queries_QD[: 50 if dense.kind == "flat" else 500]
        alone = []
        for query_1D in few[:, None]:
            begun = time.perf_counter()
            index.search(query_1D, 10)  # pyright: ignore
            alone.append(time.perf_counter() - begun)
        together = per_query(partial(search_only, index), batches)
        found.append(
            {
                "kind": f"{dense.kind}, {rows} vectors",
                "recall_at_10": recall,
                "effort": tuned.get("effort"),
                "queries_per_s": 1 / (sum(alone) / len(alone)),
                "p50_ms": 1e3 * median(alone),
                "p99_ms": 1e3 * quantiles(alone, n=100)[-1],
                "queries_per_s_64_together": 1 / together,
                "build_s": built_s,
            }
        )
        print(found[-1], flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("index")
    parser.add_argument("questions")
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--most-questions", type=int, default=900)
    given = parser.parse_args()
    questions = [question.text for question in read_questions(given.questions)][: given.most_questions]
    index = open_index(given.index)
    assert index.encoder is not None
    rows, ratios = served(given.index, str(getattr(index.encoder, "model", "")), questions)
    rows += parts(index, questions)
    encoded, ratios["build_vs_loop"] = built(index)
    rows += encoded
    real_ND = index.vectors.reconstruct_n(0, index.rows)  # pyright: ignore
    queries_QD = more_vectors(real_ND, 512, seed=1)
    for size in (*SIZES, given.rows):
        ivf = Dense(kind="ivf", lists=min(1024, size // 50), target_recall=0.96)
        rows += searched(real_ND, queries_QD, size, [Dense(), ivf])
    flat, approximate = (
        next(row for row in rows if row["kind"] == f"{kind}, {given.rows} vectors") for kind in ("flat", "ivf")
    )
    rate = {name: float(row["queries_per_s"] or 0) for name, row in (("flat", flat), ("ivf", approximate))}
    ratios["ann_qps_vs_flat_at_recall_095"] = rate["ivf"] / rate["flat"]
    ratios["ann_recall_at_10"] = float(approximate["recall_at_10"] or 0)
    publish("retrieval", rows, ratios)


if __name__ == "__main__":
    main()
