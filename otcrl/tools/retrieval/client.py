"""An index on other machines: `otcrl serve retrieval`, or Search-R1's retriever, behind one method.

A corpus in parts (shards) is asked as a whole: an answer that lacks a part would be another answer, and nobody
could tell. What is no answer to the question counts as the server's failure, and another server is asked.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections.abc import Callable, Coroutine, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any, TypeVar

from otcrl.errors import ConfigError, DataError, ToolUnavailable
from otcrl.tools.remote import NotServed, Servers, checked_url
from otcrl.tools.retrieval.corpus import parse_passage
from otcrl.tools.retrieval.index import Hit

if TYPE_CHECKING:
    from httpx import Response

PATHS = {"otcrl": "/search", "search_r1": "/retrieve"}
UNNAMED = ""  # the identity of what Search-R1's retriever serves, which does not tell
TRIAL = "Is anybody there?"
HEALTH_S = 5.0  # for a server to say what it serves
MAX_DEADLINE_S = 3600.0  # that a request may name

Answer = list[list[Hit]]  # best first, for each query
T = TypeVar("T")


class RemoteIndex:
    """The index whose parts the `shards` hold, each of them at several urls. May be used from any event loop."""

    def __init__(
        self,
        shards: Sequence[Sequence[str]],
        token: str | None = None,
        *,
        protocol: str = "otcrl",
        timeout_s: float = 30.0,  # of a call; an attempt may take half of it, so that another server has time too
        failures: int = 3,
        open_s: float = 5.0,
    ) -> None:
        """Raises ConfigError for what is no URL, or is in two shards; nothing is asked yet."""
        urls = [url for replicas in shards for url in {checked_url(url) for url in replicas}]
        if twice := {url for url in urls if urls.count(url) > 1}:
            raise ConfigError(f"shards: {min(twice)} is in two of them, which would find its passages twice")
        self._timeout_s, self._is_closed = timeout_s, False
        self._is_checked = protocol == "search_r1"  # its servers do not say what they serve
        self._shards = [
            Shard(Servers(replicas, token, timeout_s=timeout_s / 2, failures=failures, open_s=open_s), protocol)
            for replicas in shards
        ]

    @property
    def identity(self) -> tuple[str, ...] | None:
        """What is served, shard by shard; None before all have told."""
        names = tuple(shard.identity for shard in self._shards if shard.identity is not None)
        return names if len(names) == len(self._shards) else None

    async def start(self) -> None:
        """Every server asked what it serves.

        Raises ToolUnavailable if of some shard none answers, DataError if they do not serve one index.
        """
        await self._start(time.monotonic() + self._timeout_s)

    async def search(self, queries: Sequence[str], topk: int) -> Answer:
        """For each query the `topk` best passages of all shards.

        Raises ToolUnavailable when a shard cannot be had in time, or refuses the request.
        """
        if self._is_closed:
            raise ToolUnavailable("it is closed")
        deadline = time.monotonic() + self._timeout_s
        if not self._is_checked:
            await self._start(deadline)
        calls = [self._limited(shard.search(queries, topk, deadline), shard, deadline) for shard in self._shards]
        return [merged(parts, topk) for parts in zip(*await together(calls), strict=True)]

    async def close(self) -> None:
        """The servers go on."""
        self._is_closed = True
        for shard in self._shards:
            await shard.servers.close()

    async def _start(self, deadline: float) -> None:
        await together([self._limited(shard.start(deadline), shard, deadline) for shard in self._shards])
        names = self.identity or ()
        for number, name in enumerate(names):
            if name != UNNAMED and name in names[:number]:
                raise DataError(f"shards {names.index(name) + 1} and {number + 1} serve the same index, {name!r}")
        for number, shard in enumerate(self._shards, start=1):
            if shard.kind == "hybrid" and len(self._shards) > 1:
                raise DataError(
                    f"shard {number} is hybrid, whose scores are places within it and do not compare with another "
                    "shard's: build shards of one kind, flat, ivf, ivfpq, hnsw or bm25"
                )
        self._is_checked = True

    async def _limited(self, work: Coroutine[Any, Any, T], shard: Shard, deadline: float) -> T:
        """Its result, in time even from a server that sends a byte now and then. Names the shard if there are more."""
        where = f"shard {self._shards.index(shard) + 1} of {len(self._shards)}: " if len(self._shards) > 1 else ""
        try:
            async with asyncio.timeout(deadline - time.monotonic()):
                return await work
        except TimeoutError as error:
            why = f"no whole answer of {', '.join(shard.servers.urls)} within timeout_s={self._timeout_s:g}"
            raise ToolUnavailable(where + why) from error
        except ToolUnavailable as error:
            raise ToolUnavailable(f"{where}{error}") from error


class Shard:
    """Servers of one index. What it is called is learned from the first that tells; the others must agree."""

    def __init__(self, servers: Servers, protocol: str) -> None:
        self.servers, self._protocol = servers, protocol
        self.identity = UNNAMED if protocol == "search_r1" else None
        self.kind = ""  # of its index; "" while nobody has told
        self._named_by = ""  # url

    async def start(self, deadline: float) -> None:
        if self._protocol == "search_r1":  # it has no /health
            await self.search([TRIAL], 1, deadline)
        while self.identity is None:
            urls = self.servers.urls
            served = await together([self._health(url, deadline) for url in urls])
            told = [(found[0], url) for found, url in zip(served, urls, strict=True) if found is not None]
            self.kind = next((found[1] for found in served if found is not None), self.kind)
            if self.identity is not None:  # learned meanwhile, by another call
                told.insert(0, (self.identity, self._named_by))
            for name, url in told:
                if name != told[0][0]:
                    raise DataError(f"replicas serve different indexes: {told[0][1]} {told[0][0]!r}, {url} {name!r}")
            if told:
                self.identity, self._named_by = told[0]
            else:
                await self.servers.choose(deadline)

    async def search(self, queries: Sequence[str], topk: int, deadline: float) -> Answer:
        encodable = [query.encode(errors="replace").decode() for query in queries]  # half a surrogate pair has no bytes
        body: dict[str, object] = {"queries": encodable, "topk": topk}

        def read(reply: object) -> Answer:
            return self._read(reply, len(queries), topk)

        while True:
            url = await self.servers.choose(deadline)
            if self._protocol == "search_r1":
                body["return_scores"] = True
            else:
                seconds = min(self.servers.timeout_s, deadline - time.monotonic(), MAX_DEADLINE_S)
                body["deadline_s"] = max(0.001, seconds)
            with contextlib.suppress(NotServed):
                return await self._ask(url, "POST", PATHS[self._protocol], body, read, deadline)

    async def _health(self, url: str, deadline: float) -> tuple[str, str] | None:
        """What is served there, and of what kind it is; None if nobody says."""
        try:
            seconds = min(HEALTH_S, self.servers.timeout_s)
            return await self._ask(url, "GET", "/health", None, index_of, deadline, timeout_s=seconds)
        except NotServed:
            return None

    async def _ask(
        self,
        url: str,
        method: str,
        path: str,
        body: object,
        read: Callable[[object], T],
        deadline: float,
        timeout_s: float | None = None,
    ) -> T:
        """What `read` makes of the answer. Its ValueError says why it is none, and the server failed.

        Raises NotServed; ToolUnavailable if the server refuses the request, which no other would take either.
        """
        answers: list[T] = []

        def why_failed(response: Response) -> str:
            if 400 <= response.status_code < 500:
                return ""
            if response.status_code != 200:
                return f"HTTP {response.status_code} {response.text[:200]}"
            try:
                answers.append(read(response.json()))
            except (ValueError, OverflowError, RecursionError) as error:
                return f"it answers {path} wrongly: {error}"
            return ""

        response = await self.servers.send(
            url, method, path, body, deadline=deadline, timeout_s=timeout_s, is_failure=why_failed
        )
        if not answers:
            raise ToolUnavailable(f"{url} refuses the request (HTTP {response.status_code}): {detail(response)}")
        return answers[0]

    def _read(self, reply: object, num_queries: int, topk: int) -> Answer:
        """Raises ValueError saying what is wrong."""
        match self._protocol, reply:
            case "otcrl", {"index": str(name), "results": list(rows_of_queries)}:
                if name != self.identity:
                    raise ValueError(f"its index is {name!r}, that of {self._named_by} {self.identity!r}")
            case "search_r1", {"result": list(rows_of_queries)}:
                pass
            case _:
                raise ValueError(f"got {str(reply)[:100]}")
        if len(rows_of_queries) != num_queries:
            raise ValueError(f"{len(rows_of_queries)} results for {num_queries} queries")
        if not all(isinstance(rows, list) and len(rows) <= topk for rows in rows_of_queries):
            raise ValueError(f"a result is no list of at most topk={topk} passages")
        return [[hit(row) for row in rows] for rows in rows_of_queries]


def index_of(health: object) -> tuple[str, str]:
    match health:
        case {"index": str(name), **rest}:
            return name, str(rest.get("kind", ""))
    raise ValueError(f"it names no index, as `otcrl serve retrieval` would: {str(health)[:100]}")


def hit(row: object) -> Hit:
    """Of `{"id", "title", "text", "score"}`, or of Search-R1's `{"document": ..., "score"}`. Raises ValueError."""
    match row:
        case {"score": int() | float() as score, **rest} if math.isfinite(score):
            return Hit(parse_passage(rest.get("document", rest), "a passage"), float(score))
    raise ValueError(f"a passage without a score: {str(row)[:100]}")


def merged(parts: Sequence[Sequence[Hit]], topk: int) -> list[Hit]:
    """The best of the shards' hits; at equal scores, those of the shard that is named first."""
    return list(parts[0]) if len(parts) == 1 else sorted(chain(*parts), key=lambda hit: -hit.score)[:topk]


def detail(response: Response) -> str:
    """What the server says about its refusal."""
    try:
        return str(response.json()["detail"])[:500]
    except (ValueError, KeyError, TypeError):
        return response.text[:500]


async def together(work: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    """All results in order, or the first error, and then nothing is left running."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(each) for each in work]
    except ExceptionGroup as errors:
        raise errors.exceptions[0] from errors.exceptions[0].__cause__
    return [task.result() for task in tasks]
