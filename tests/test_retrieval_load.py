"""A retrieval server under load: work is shared, refused or given up as promised, and indexes change beneath it."""

import asyncio
import itertools
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from otcrl.errors import DataError
from otcrl.tools.retrieval.batches import Batches, Searchable
from otcrl.tools.retrieval.build import build_index
from otcrl.tools.retrieval.corpus import Passage
from otcrl.tools.retrieval.encode import HashingEncoder
from otcrl.tools.retrieval.index import open_index
from tests.test_batches import PLACES, Watched
from tests.test_retrieval_server import post, serving, serving_batches, until_warm


def waits(url: str, count: int) -> None:
    """Until so many queries wait."""
    deadline = time.monotonic() + 10
    while (queued := httpx.get(f"{url}/health").json()["queued"]) < count:
        assert time.monotonic() < deadline, f"{queued} queries wait, expected {count}"
        time.sleep(0.01)


def held_up(index: Watched, threads: ThreadPoolExecutor, url: str, *queries: str) -> Future[httpx.Response]:
    """The answer to a request that is being searched, until `index.free` is set."""
    index.free.clear()
    asked = threads.submit(post, url, queries=queries)
    assert index.entered.wait(10)
    return asked


def test_requests_that_come_during_a_search_are_one_search():
    index = Watched()
    with serving(index, cache_size=0) as url, ThreadPoolExecutor(20) as threads:
        calls = [held_up(index, threads, url, "Rome")]
        calls += [threads.submit(post, url, queries=[f"Oslo {i}"]) for i in range(19)]
        waits(url, 19)
        index.free.set()
        replies = [call.result().json()["results"] for call in calls]
        assert [result[0][0]["title"] for result in replies] == ["Rome"] + ["Oslo"] * 19
        assert [len(queries) for queries in index.searched] == [1, 19]


def test_queries_past_the_queue_are_refused_and_told_when_to_come_back():
    index = Watched()
    with serving(index, queue=0) as url, ThreadPoolExecutor(4) as threads:  # 64 may be inside, being searched
        calls = [
            held_up(index, threads, url, *(f"0 {j}" for j in range(20)))
        ]  # the others cannot be one search with it
        calls += [threads.submit(post, url, queries=[f"{i} {j}" for j in range(20)]) for i in (1, 2)]
        waits(url, 40)
        refused = post(url, queries=["x"] * 5)
        assert (refused.status_code, refused.json()["detail"]) == (429, "0 queries are waiting already, of 0 at most")
        assert 1 <= int(refused.headers["Retry-After"]) <= 60
        fits = threads.submit(post, url, queries=["x"] * 4)
        index.free.set()
        assert [call.result().status_code for call in (*calls, fits)] == [200] * 4


def test_a_request_past_its_deadline_is_refused_and_its_queries_are_not_searched():
    index = Watched()
    with serving(index) as url, ThreadPoolExecutor(1) as threads:
        first = held_up(index, threads, url, "Rome")
        late = post(url, queries=["Oslo"], deadline_s=0.05)
        assert (late.status_code, late.json()["detail"]) == (504, "no answer within deadline_s=0.05")
        index.free.set()
        assert first.result().status_code == 200
        assert post(url, queries=["Paris"]).status_code == 200
        assert index.searched == [["Rome"], ["Paris"]]


def test_nobody_searches_for_a_client_that_hung_up():
    index = Watched()
    with serving(index) as url, ThreadPoolExecutor(1) as threads:
        first = held_up(index, threads, url, "Rome")
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{url}/search", json={"queries": ["Oslo"]}, timeout=0.2)
        while 'outcome="499"' not in httpx.get(f"{url}/metrics").text:
            time.sleep(0.01)
        index.free.set()
        assert first.result().status_code == 200
        assert post(url, queries=["Paris"]).status_code == 200
        assert index.searched == [["Rome"], ["Paris"]]


def test_a_search_that_fails_is_a_503_that_says_why():
    index = Watched()
    with serving(index) as url:
        index.error = RuntimeError("CUDA \ud800 out of memory")
        failed = post(url, queries=["Rome"])
        assert (failed.status_code, failed.json()["detail"]) == (
            503,
            "the retriever failed: CUDA \ud800 out of memory",
        )
        index.error = None
        assert post(url, queries=["Rome"]).status_code == 200


# -- another index ------------------------------------------------------------------------------------


def build(directory: Path, prefix: str) -> None:
    passages = [Passage(f"{prefix}{i}", town, f"{town} of {prefix}") for i, town in enumerate(PLACES)]
    build_index(passages, HashingEncoder(), directory)


def replace(directory: Path, by: Path) -> None:
    directory.rename(directory.with_name(f"gone-{time.monotonic_ns()}"))
    by.rename(directory)


def test_an_index_is_replaced_under_load_and_no_answer_is_of_two(tmp_path: Path):
    served, successors = tmp_path / "served", [tmp_path / f"next{i}" for i in range(5)]
    build(served, "a0-")
    for i, successor in enumerate(successors):
        build(successor, f"a{i + 1}-")

    async def client(url: str, numbers: Iterator[int], stop: asyncio.Event, names: dict[str, set[str]]) -> None:
        async with httpx.AsyncClient() as http:
            while not stop.is_set():
                queries = [f"{town} {next(numbers) % 50}" for town in PLACES]
                reply = (await http.post(f"{url}/search", json={"queries": queries})).raise_for_status().json()
                found = {hit["id"].partition("-")[0] for hits in reply["results"] for hit in hits}
                names.setdefault(reply["index"], set()).update(found)

    async def main(url: str) -> dict[str, set[str]]:
        names: dict[str, set[str]] = {}
        stop, numbers = asyncio.Event(), itertools.count()
        clients = [asyncio.create_task(client(url, numbers, stop, names)) for _ in range(8)]
        async with httpx.AsyncClient() as http:
            for successor in successors:
                replace(served, successor)
                now = (await http.post(f"{url}/reload")).raise_for_status().json()
                assert (await http.get(f"{url}/health")).json()["index"] == now["index"]
                after = (await http.post(f"{url}/search", json={"queries": ["Rome"]})).json()
                assert after["index"] == now["index"]
                while now["index"] not in names:
                    await asyncio.sleep(0.01)
        stop.set()
        await asyncio.gather(*clients)
        return names

    batches = Batches(lambda: open_index(served, HashingEncoder()), max_batch=3)
    with serving_batches(batches) as url:
        until_warm(url)
        names = asyncio.run(main(url))
    found = [names[identity] for identity in names]
    assert all(len(prefixes) == 1 for prefixes in found)  # what one identity answered is of one index
    assert {f"a{i}" for i in range(1, 6)} <= set[str]().union(*found) <= {f"a{i}" for i in range(6)}


def test_a_reload_that_fails_says_why_and_the_old_index_goes_on():
    opened = iter([Watched("A1")])

    def open() -> Searchable:
        if (index := next(opened, None)) is None:
            raise DataError("manifest.json cannot be read")
        return index

    with serving_batches(Batches(open)) as url:
        until_warm(url)
        failed = httpx.post(f"{url}/reload")
        assert failed.status_code == 409
        assert failed.json()["detail"] == "the index A1 goes on: manifest.json cannot be read"
        assert post(url, queries=["Rome"]).json()["index"] == "A1"
