"""Queries that wait together are searched together, once each, and nobody is answered by another's index."""

import math
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, wait
from contextlib import contextmanager

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from otcrl.errors import DataError, ToolUnavailable
from otcrl.tools.retrieval.batches import Answer, Batches
from otcrl.tools.retrieval.build import memory_index
from otcrl.tools.retrieval.corpus import Passage
from otcrl.tools.retrieval.encode import HashingEncoder
from otcrl.tools.retrieval.index import Hit, Index

PLACES = {"Paris": "France", "Rome": "Italy", "Oslo": "Norway", "Lima": "Peru"}


def capitals(prefix: str = "") -> Index:
    passages = [
        Passage(f"{prefix}{i}", town, f"{town} is the capital of {land}.")
        for i, (town, land) in enumerate(PLACES.items())
    ]
    return memory_index(passages, HashingEncoder(dimension=256))


class Watched:
    """An index that keeps what it was asked, may be held up, and may break."""

    def __init__(self, identity: str = "A", prefix: str = "") -> None:
        self.inner, self.identity, self.rows = capitals(prefix), identity, len(PLACES)
        self.searched: list[list[str]] = []
        self.error: Exception | None = None
        self.entered, self.free = threading.Event(), threading.Event()
        self.free.set()

    def search(self, queries: Sequence[str], topk: int) -> list[list[Hit]]:
        self.searched.append(list(queries))
        self.entered.set()
        assert self.free.wait(10)
        if self.error:
            raise self.error
        return self.inner.search(queries, topk)

    def find(self, id: str) -> Passage | None:
        return self.inner.find(id)

    def describe(self) -> dict[str, object]:
        return self.inner.describe()

    @contextmanager
    def held(self, batches: Batches) -> Iterator[None]:
        """While the search of one query, "first", does not come back."""
        self.free.clear()
        self.entered.clear()
        first = batches.ask_all(["first"], 1)
        assert self.entered.wait(10)
        yield
        self.free.set()
        first.result(10)


@pytest.fixture
def index() -> Watched:
    return Watched()


@contextmanager
def batches_of(index: Watched, **settings: float) -> Iterator[Batches]:
    batches = Batches(lambda: index, **settings)  # pyright: ignore[reportArgumentType] (counts and seconds)
    try:
        yield batches
    finally:
        index.free.set()
        batches.close()


def towns(answers: Future[list[Answer]]) -> list[list[str]]:
    return [[hit.passage.title for hit in answer.hits] for answer in answers.result(10)]


def test_what_many_threads_ask_during_a_search_is_the_next_search(index: Watched):
    with batches_of(index) as batches:
        with index.held(batches):
            asked: list[Future[list[Answer]]] = []
            threads = [
                threading.Thread(target=lambda i=i: asked.append(batches.ask_all([f"Rome {i}"], 1))) for i in range(50)
            ]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert (batches.running, batches.queued) == (1, 50)
        assert all(towns(future) == [["Rome"]] for future in asked)
        assert [len(queries) for queries in index.searched] == [1, 50]
        assert (batches.counts.queries, batches.counts.searched, batches.counts.batches) == (51, 51, 2)


def test_what_is_asked_twice_is_searched_once_even_while_it_is_being_searched(index: Watched):
    with batches_of(index) as batches:
        with index.held(batches):
            again = batches.ask_all(["first", "Oslo", "Oslo"], 1)
            others = [batches.ask_all(["Oslo"], 1) for _ in range(9)]
        assert towns(again)[1:] == [["Oslo"], ["Oslo"]]
        assert all(towns(other) == [["Oslo"]] for other in others)
        assert index.searched == [["first"], ["Oslo"]]


def test_an_idle_thread_waits_a_moment_for_company(index: Watched):
    with batches_of(index, max_wait_s=0.5) as batches:
        asked = [batches.ask_all([town], 1) for town in PLACES]
        assert [towns(future) for future in asked] == [[[town]] for town in PLACES]
        assert index.searched == [list(PLACES)]


def test_a_full_batch_waits_for_nobody(index: Watched):
    with batches_of(index, max_wait_s=60, max_batch=2) as batches:
        begun = time.monotonic()
        asked = [batches.ask_all([town], 1) for town in PLACES]
        assert not wait(asked, 10).not_done
        assert time.monotonic() - begun < 5
        assert index.searched == [["Paris", "Rome"], ["Oslo", "Lima"]]


def test_what_gathered_during_a_search_waits_for_nobody_else(index: Watched):
    with batches_of(index, max_wait_s=1.0) as batches:
        with index.held(batches):
            late = batches.ask_all(["Lima"], 1)
        begun = time.monotonic()
        assert towns(late) == [["Lima"]]
        assert time.monotonic() - begun < 0.5


def test_a_search_is_for_one_topk_and_groups_take_turns(index: Watched):
    """An approximate index may find other things for topk=1 when it is asked for 2: company must not matter."""
    with batches_of(index, max_batch=1) as batches:
        with index.held(batches):
            one = batches.ask_all(["Rome", "Oslo"], 1)
            two = batches.ask_all(["Paris"], 2)
        assert [len(found) for found in towns(one) + towns(two)] == [1, 1, 2]
        assert index.searched == [["first"], ["Rome"], ["Paris"], ["Oslo"]]


def test_a_query_past_its_deadline_is_not_searched(index: Watched):
    with batches_of(index) as batches:
        with index.held(batches):
            late = batches.ask_all(["Paris", "Rome"], 1, time.monotonic() + 0.01)
            patient = batches.ask_all(["Rome"], 1)
            time.sleep(0.02)
        with pytest.raises(TimeoutError, match="deadline"):
            late.result(10)
        assert towns(patient) == [["Rome"]]
        assert index.searched == [["first"], ["Rome"]]


def test_who_gives_up_is_not_searched_for_and_takes_nothing_from_others(index: Watched):
    with batches_of(index) as batches:
        with index.held(batches):
            gone = batches.ask_all(["first", "Paris", "Rome"], 1)
            patient = batches.ask_all(["Rome"], 1)
            assert gone.cancel()
        assert towns(patient) == [["Rome"]]
        assert index.searched == [["first"], ["Rome"]]


def test_a_search_that_fails_fails_those_who_asked_and_nobody_else(index: Watched):
    with batches_of(index) as batches:
        with index.held(batches):
            next_one = batches.ask_all(["Rome"], 1)
        assert towns(next_one) == [["Rome"]]
        index.error = RuntimeError("out of memory")
        asked = [batches.ask_all([town], 1) for town in ("Paris", "Oslo")]
        for future in asked:
            with pytest.raises(RuntimeError, match="out of memory"):
                future.result(10)
        index.error = None
        assert towns(batches.ask_all(["Paris"], 1)) == [["Paris"]]


def test_an_index_that_cannot_be_opened_is_tried_again():
    tries: list[int] = []

    def open() -> Watched:
        tries.append(1)
        if len(tries) < 3:
            raise DataError("no index yet")
        return Watched()

    batches = Batches(open)
    for attempt in (batches.prepare(), batches.ask_all(["Rome"], 1)):
        with pytest.raises(DataError, match="no index yet"):
            attempt.result(10)
        assert batches.index is None
    assert towns(batches.ask_all(["Rome"], 1)) == [["Rome"]]
    assert batches.index is not None
    batches.close()


def test_answers_are_remembered_least_recently_used_first_out(index: Watched):
    with batches_of(index, cache_size=2) as batches:
        for query in ("Rome", "Paris", "Rome", "Oslo", "Rome", "Paris"):  # Oslo pushes Paris out, not Rome
            batches.ask_all([query], 1).result(10)
        assert index.searched == [["Rome"], ["Paris"], ["Oslo"], ["Paris"]]
        assert (batches.counts.queries, batches.counts.hits, batches.counts.searched) == (6, 2, 4)
        [cached] = batches.ask_all(["Paris"], 1).result(10)
        [other_topk] = batches.ask_all(["Paris"], 2).result(10)
        assert (cached.cached, other_topk.cached) == (True, False)


def test_a_request_is_answered_by_the_index_it_began_with():
    old, new = Watched("A", "a"), Watched("B", "b")
    opened = iter([old, new])
    batches = Batches(lambda: next(opened), max_batch=1)
    assert batches.prepare().result(10) is old
    with old.held(batches):
        before = batches.ask_all(["Rome", "Oslo", "Lima"], 1)
        assert batches.reload() is new
        after = batches.ask_all(["Rome", "Oslo"], 1)
    for asked, name in ((before, "A"), (after, "B")):
        assert {answer.index for answer in asked.result(10)} == {name}
        assert {hit.passage.id[0] for answer in asked.result(10) for hit in answer.hits} == {name.lower()}
    assert not any(answer.cached for answer in after.result())  # what A found for Rome is no answer of B
    batches.close()


def test_a_reload_that_fails_leaves_the_old_index_in_place(index: Watched):
    opened = iter([index])

    def open() -> Watched:
        if (found := next(opened, None)) is None:
            raise DataError("damaged")
        return found

    batches = Batches(open)
    batches.prepare().result(10)
    with pytest.raises(DataError, match="damaged"):
        batches.reload()
    assert batches.index is index
    assert towns(batches.ask_all(["Rome"], 1)) == [["Rome"]]
    batches.close()


def test_a_passage_is_found_by_its_id_even_under_load(index: Watched):
    with batches_of(index, max_batch=1) as batches:
        with index.held(batches):
            for town in PLACES:
                batches.ask_all([town], 1)
            found = [batches.find("1"), batches.find("9")]
        passages = [future.result(10) for future in found]
        assert [passage and passage.title for passage in passages] == ["Rome", None]


def test_close_answers_what_is_being_searched_and_refuses_the_rest(index: Watched):
    batches = Batches(lambda: index, max_wait_s=0)
    index.free.clear()
    running = batches.ask_all(["Rome"], 1)
    assert index.entered.wait(10)
    waiting = batches.ask_all(["Paris"], 1)
    closing = threading.Thread(target=batches.close)
    closing.start()
    with pytest.raises(ToolUnavailable, match="closed"):
        waiting.result(10)
    index.free.set()
    closing.join()
    assert towns(running) == [["Rome"]]
    for ask in (lambda: batches.ask_all(["Rome"], 1), lambda: batches.find("1"), batches.prepare):
        with pytest.raises(ToolUnavailable, match="closed"):
            ask()


def test_nothing_asked_is_answered_at_once(index: Watched):
    with batches_of(index) as batches:
        assert batches.ask_all([], 3).result(0) == []


REQUESTS = st.lists(st.tuples(st.lists(st.sampled_from([*PLACES, *PLACES.values()]), max_size=5), st.integers(1, 6)))


@given(requests=REQUESTS, max_batch=st.integers(1, 4), cache_size=st.integers(0, 3))
@settings(max_examples=30, deadline=None)
def test_whatever_is_asked_at_once_is_answered_as_if_it_were_asked_alone(
    requests: list[tuple[list[str], int]], max_batch: int, cache_size: int
):
    index = Watched()
    with batches_of(index, max_batch=max_batch, cache_size=cache_size, max_wait_s=0) as batches:
        asked = [batches.ask_all(queries, topk) for queries, topk in requests]
        for future, (queries, topk) in zip(asked, requests, strict=True):
            alone = [index.inner.search([query], topk)[0] for query in queries]
            for answer, hits in zip(future.result(10), alone, strict=True):
                assert [hit.passage for hit in answer.hits] == [hit.passage for hit in hits]
                assert all(math.isclose(a.score, b.score, abs_tol=1e-6) for a, b in zip(answer.hits, hits, strict=True))
    counts = batches.counts
    assert counts.queries == sum(len(queries) for queries, _ in requests)
    assert counts.hits + counts.searched <= counts.queries
