"""Queries that wait together are searched together: one thread, one encode and search for all of them.

While it searches the next ones gather, so under load nobody waits for company; only an idle thread waits a moment
for more before it begins. What is asked twice is searched once, and answers are remembered.
"""

from __future__ import annotations

import math
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

from otcrl.errors import ToolUnavailable
from otcrl.tools.retrieval.corpus import Passage
from otcrl.tools.retrieval.index import Hit

USUAL = 3  # passages of an answer; one with more takes as much memory as several
T = TypeVar("T")


class Searchable(Protocol):
    """An index, as far as who asks it is concerned. One thread at a time."""

    @property
    def identity(self) -> str:
        """The same text, the same index."""
        ...

    @property
    def rows(self) -> int: ...

    def search(self, queries: Sequence[str], topk: int, /) -> list[list[Hit]]:
        """For each query the `topk` nearest passages (fewer where there are fewer), best first."""
        ...

    def find(self, id: str, /) -> Passage | None: ...

    def describe(self) -> dict[str, Any]: ...


@dataclass(frozen=True, slots=True)
class Answer:
    hits: Sequence[Hit]  # best first
    index: str  # identity of the index that they come from
    cached: bool = False


@dataclass(slots=True)
class Counts:
    queries: int = 0  # asked
    hits: int = 0  # of them answered from memory
    searched: int = 0  # computed; the rest was asked by several at a time, or given up
    batches: int = 0


@dataclass(slots=True, eq=False)
class Source:
    """An index that is opened when it is first needed."""

    open: Callable[[], Searchable]
    index: Searchable | None = None

    def get(self) -> Searchable:
        if self.index is None:
            self.index = self.open()
        return self.index


@dataclass(slots=True, eq=False)
class Request:
    """Some queries of one caller, answered by one index and all at once."""

    future: Future[list[Answer]]
    deadline: float  # time.monotonic()
    answers: dict[int, Answer]  # by the query's place
    missing: int
    is_settled: bool = False  # nothing more is to be done for it

    def settle(self) -> None:
        """Hand the answers over, unless nobody waits any more."""
        if self.future.set_running_or_notify_cancel():
            self.future.set_result([self.answers[place] for place in range(len(self.answers))])

    def fail(self, error: BaseException) -> None:
        if self.future.set_running_or_notify_cancel():
            self.future.set_exception(error)


Group = tuple[Source, int]  # queries that one search can answer: the same index and topk
Batch = OrderedDict[str, list[tuple[Request, int]]]  # query -> who asked, as which of their queries


@dataclass(slots=True)
class Memory:
    """What was found for the last keys: query, topk, identity of the index.

    `size` answers of `USUAL` passages or less: passages take the room, and a caller may ask for a hundred at a time.
    """

    size: int
    found: OrderedDict[tuple[str, int, str], Sequence[Hit]] = field(default_factory=OrderedDict)  # oldest use first
    held: int = 0  # passages, at least USUAL for an answer

    def get(self, key: tuple[str, int, str]) -> Sequence[Hit] | None:
        if key in self.found:
            self.found.move_to_end(key)
        return self.found.get(key)

    def add(self, key: tuple[str, int, str], hits: Sequence[Hit]) -> None:
        if weight(hits) > self.size * USUAL:
            return  # else all others would go for it
        self.held += weight(hits) - (weight(self.found.pop(key)) if key in self.found else 0)
        self.found[key] = hits
        while self.held > self.size * USUAL:
            self.held -= weight(self.found.popitem(last=False)[1])


def weight(hits: Sequence[Hit]) -> int:
    return max(USUAL, len(hits))


class Batches:
    """The queries that wait, the thread that answers them, and the answers remembered.

    Mutable; may be used from any thread and any event loop (`asyncio.wrap_future`). A future that is cancelled takes
    the answer from nobody else.
    """

    def __init__(
        self,
        open: Callable[[], Searchable],
        max_batch: int = 64,  # queries of one search
        max_wait_s: float = 0.002,  # that an idle thread waits for more
        cache_size: int = 10_000,  # queries; 0: none
        *,
        name: str = "retrieval",
    ) -> None:
        self.counts = Counts()
        self.on_batch: Callable[[int, float], None] = lambda size, seconds: None  # told of each, in the thread
        self._open, self._max_batch, self._max_wait_s = open, max_batch, max_wait_s
        self._source = Source(open)
        self._waiting: OrderedDict[Group, Batch] = OrderedDict()
        self._searching: dict[Group, Batch] = {}  # one at most
        self._memory = Memory(cache_size)
        self._is_busy = self._is_closed = False
        self._changed = threading.Condition()
        self._reloading = threading.Lock()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=name)

    @property
    def index(self) -> Searchable | None:
        """The one that is asked; None until it is open."""
        return self._source.index

    @property
    def queued(self) -> int:
        with self._changed:
            return sum(map(len, self._waiting.values()))

    @property
    def running(self) -> int:
        with self._changed:
            return sum(map(len, self._searching.values()))

    def prepare(self) -> Future[Searchable]:
        """The index, opened if it is not yet; without it the first query does that. Raises what `open` raises."""
        return self._submit(self._source.get)

    def ask_all(self, queries: Sequence[str], topk: int, deadline: float = math.inf) -> Future[list[Answer]]:
        """An answer to each query, all from one index.

        From `deadline` (time.monotonic()) on what is not answered is no longer searched for, and the future raises
        TimeoutError; else it raises what the search does. Raises ToolUnavailable after `close`.
        """
        request = Request(Future(), deadline, {}, len(queries))
        with self._changed:
            self._refuse_closed()
            self.counts.queries += len(queries)
            for place, query in enumerate(queries):
                self._place(query, topk, request, place)
            request.is_settled = is_complete = request.missing == 0
            if not is_complete:
                self._wake()
        if is_complete:
            request.settle()
        return request.future

    def find(self, id: str) -> Future[Passage | None]:
        """The passage of that id."""
        source = self._source
        return self._submit(lambda: source.get().find(id))

    def reload(self) -> Searchable:
        """The index opened anew, in this thread; the old one answers until it is there, and goes on if `open` raises.

        The two may be asked at the same time: `open` must give the new one an encoder of its own.
        """
        with self._reloading:
            source = Source(self._open)
            index = source.get()
            with self._changed:
                self._source = source
            return index

    def close(self) -> None:
        """What is being searched is answered still; who waits gets ToolUnavailable."""
        with self._changed:
            self._is_closed = True
            requests = unsettled(request for batch in self._waiting.values() for request in requests_of(batch))
            self._waiting.clear()
            self._changed.notify_all()
        for request in requests:
            request.fail(ToolUnavailable("the index is closed"))
        self._thread.shutdown(wait=True, cancel_futures=True)

    # -- callers' side -----------------------------------------------------------------------------------

    def _place(self, query: str, topk: int, request: Request, place: int) -> None:
        """The answer if it is remembered; else it is waited for, along with those who asked the same before."""
        index, group = self._source.index, (self._source, topk)
        hits = self._memory.get((query, topk, index.identity)) if index is not None else None
        if index is not None and hits is not None:
            request.answers[place] = Answer(hits, index.identity, cached=True)
            request.missing -= 1
            self.counts.hits += 1
            return
        batch = self._searching.get(group, {})
        if query not in batch:
            batch = self._waiting.setdefault(group, OrderedDict())
        batch.setdefault(query, []).append((request, place))

    def _wake(self) -> None:
        if not self._is_busy:
            self._is_busy = True
            self._thread.submit(self._gather)
        elif self._is_full():
            self._changed.notify_all()

    def _submit(self, work: Callable[[], T]) -> Future[T]:
        with self._changed:
            self._refuse_closed()
            return self._thread.submit(work)

    def _refuse_closed(self) -> None:
        if self._is_closed:
            raise ToolUnavailable("the index is closed")

    # -- the thread's side -------------------------------------------------------------------------------

    def _is_full(self) -> bool:
        return any(len(batch) >= self._max_batch for batch in self._waiting.values())

    def _gather(self) -> None:
        """Wait a moment for company, then search."""
        with self._changed:
            self._changed.wait_for(lambda: self._is_full() or self._is_closed, self._max_wait_s)
        self._turn()

    def _turn(self) -> None:
        """One batch searched. Each turn is a task of its own, so that `find` gets its turn under load."""
        with self._changed:
            late: list[Request] = []
            taken = self._take(late)
            self._searching = dict([taken]) if taken else {}
        for request in late:
            request.fail(TimeoutError("the deadline passed before the query's turn came"))
        if taken:
            self._search(*taken)
        with self._changed:
            self._is_busy = bool(self._waiting) and not self._is_closed
            if self._is_busy:
                self._thread.submit(self._turn)

    def _take(self, late: list[Request]) -> tuple[Group, Batch] | None:
        """The next batch, of what is still wanted. Groups take turns; `late` collects whose deadline has passed."""
        now = time.monotonic()
        while self._waiting:
            group, waiting = self._waiting.popitem(last=False)
            batch: Batch = OrderedDict()
            while waiting and len(batch) < self._max_batch:
                query, places = waiting.popitem(last=False)
                late += unsettled(request for request, _ in places if request.deadline < now)
                if wanted := [place for place in places if is_wanted(place[0])]:
                    batch[query] = wanted
            if waiting:
                self._waiting[group] = waiting
            if batch:
                return group, batch
        return None

    def _search(self, group: Group, batch: Batch) -> None:
        (source, topk), queries = group, list(batch)
        try:
            index = source.get()
            begun = time.monotonic()
            hits = index.search(queries, topk)
            self.on_batch(len(queries), time.monotonic() - begun)
            assert len(hits) == len(queries), f"{len(hits)} answers to {len(queries)} queries"
        except Exception as error:  # whatever it is, it belongs to those who wait: this thread has nobody to tell
            with self._changed:
                self._searching = {}
                failed = unsettled(requests_of(batch))
            for request in failed:
                request.fail(error)
            return
        with self._changed:
            self._searching = {}
            self.counts.batches += 1
            self.counts.searched += len(queries)
            complete: list[Request] = []
            for query, query_hits in zip(queries, hits, strict=True):
                self._memory.add((query, topk, index.identity), query_hits)
                complete += unsettled(completed(batch[query], Answer(query_hits, index.identity)))
        for request in complete:
            request.settle()


def requests_of(batch: Batch) -> Iterator[Request]:
    return (request for places in batch.values() for request, _ in places)


def is_wanted(request: Request) -> bool:
    return not request.is_settled and not request.future.cancelled()


def unsettled(requests: Iterable[Request]) -> list[Request]:
    """Those that are not settled, once each; from now on they count as settled, so the caller must see to it."""
    found = []
    for request in requests:
        if not request.is_settled:
            request.is_settled = True
            found.append(request)
    return found


def completed(places: Sequence[tuple[Request, int]], answer: Answer) -> Iterator[Request]:
    """The requests that lacked nothing but `answer`."""
    for request, place in places:
        request.answers[place] = answer
        request.missing -= 1
        if not request.missing:
            yield request
