"""Search as a tool: a query in, the nearest passages out.

The index is here, and queries that arrive together are encoded and searched as one batch in one thread, so the event
loop never waits; or it is behind servers (`retrieval/client.py`). Either way the tool may be used from any loop.
"""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from otcrl.errors import ConfigError, DataError, OtcrlError, ToolUnavailable, nearest
from otcrl.protocols import ToolResult
from otcrl.tools.retrieval.batches import Batches
from otcrl.tools.retrieval.build import build_or_open, memory_index
from otcrl.tools.retrieval.client import PATHS, RemoteIndex
from otcrl.tools.retrieval.corpus import Corpus, Passage, is_hub_name
from otcrl.tools.retrieval.encode import Encoder
from otcrl.tools.retrieval.index import Hit, Index, open_index
from otcrl.types import Outcome

SEARCH_R1 = "Doc {i}(Title: {title}) {text}\n"
NOTHING, NOTHING_ELSE = "No passage was found.", "No other passage was found."
ABOVE_0 = ("topk", "max_query_chars", "max_queries", "timeout_s")
AT_LEAST_0 = ("max_passage_words", "max_chars", "cache_size", "batch_wait_s", "trajectory_timeout_s")
CUT = " ..."
MAX_BATCH = 256  # queries that are searched at a time


@dataclass(frozen=True, kw_only=True, eq=False)
class SearchTool:
    """Finds the passages nearest to a query."""

    encoder: Encoder | None = None  # None: the one that the index was built with, or the servers'
    name: str = "search"
    description: str = "finds passages of an encyclopedia; write a short query"
    corpus: Sequence[str] = ()  # files, or data sets of the hub
    passages: Sequence[Passage] = ()  # or the passages themselves: a task's own, wired by build
    index: str | None = None  # directory: opened if it is there, built if not; None: in memory
    # of `otcrl serve retrieval`, all with one index; none: the index is here. encoder, corpus, index are theirs then
    urls: Sequence[str] = ()
    shards: Sequence[Sequence[str]] = ()  # or of one in parts, each of them at some urls
    protocol: str = "otcrl"  # or search_r1: the urls are those of Search-R1's retriever
    token: str | None = None  # the servers'; None: OTCRL_TOKEN of the environment
    topk: int = 3
    template: str = SEARCH_R1  # per passage
    max_passage_words: int = 0  # 0: all
    max_chars: int = 0  # shown of a call's passages, of which only the first may be cut; 0: all
    max_query_chars: int = 1000
    separator: str | None = None  # of queries in one call; None: a call is one query
    max_queries: int = 4
    cache_size: int = 10_000  # queries; 0: none
    timeout_s: float = 30.0
    trajectory_timeout_s: float = 0.0  # all searches of one trajectory together; 0: no limit
    batch_wait_s: float = 0.002

    argument = "query"  # what JSON calls the text that `run` takes
    wired = frozenset({"passages"})

    def __post_init__(self) -> None:
        for field in ABOVE_0:
            if getattr(self, field) <= 0:
                raise ConfigError(f"{field} must be above 0, got {getattr(self, field)}")
        for field in AT_LEAST_0:
            if getattr(self, field) < 0:
                raise ConfigError(f"{field} must be 0 or more, got {getattr(self, field)}")
        if 0 < self.max_chars <= len(CUT):
            raise ConfigError(f"max_chars must be 0 or above {len(CUT)}, got {self.max_chars}")
        if self.separator == "":
            raise ConfigError("separator must be null or at least one character")
        try:
            self.template.format(i=1, title="", text="")
        except (KeyError, IndexError, ValueError) as error:
            raise ConfigError(f"template may use {{i}}, {{title}} and {{text}}, got {self.template!r}") from error
        self._check_servers() if self._is_remote else self._check_index()

    def _check_servers(self) -> None:
        if self.urls and self.shards:
            raise ConfigError("urls and shards exclude each other: urls have all of a corpus, shards a part each")
        if self.passages:
            where = "urls" if self.urls else "shards"
            raise ConfigError(f"{where}: this task brings its own passages, which no server has")
        if self.protocol not in PATHS:
            raise ConfigError(
                f"protocol must be {' or '.join(PATHS)}, got {self.protocol!r}.{nearest(self.protocol, PATHS)}"
            )
        if not all(self.shards):
            raise ConfigError("shards: name at least one server of each, e.g. [[http://a:8080], [http://b:8080]]")
        _ = self._source  # refuses here what is no URL

    def _check_index(self) -> None:
        if self.corpus and self.passages:
            raise ConfigError("corpus and passages exclude each other: name files, or let the task bring its own")
        if not self.corpus and not self.passages and self.index is None:
            raise ConfigError(
                "corpus is empty, there is no index, no urls, and the task brings no passages: nothing to search in. "
                "Name files, tools.search.corpus=[FILE], or leave search out, tools=none"
            )
        if self.encoder is None and self.index is None:
            raise ConfigError("encoder is null, and without an index or urls nothing says how to find passages")
        assert all(isinstance(passage, Passage) for passage in self.passages), (
            "a config library turned passages to dicts"
        )
        for path in self.corpus:
            if not Path(path).is_file() and not is_hub_name(path):
                raise DataError(f"corpus: there is no file {path}")

    async def start(self) -> None:
        """The index opened or built, or the servers asked what they serve; without it the first query does that.

        Raises DataError, and ToolUnavailable if no server answers.
        """
        try:
            await self._source.start()
        except ToolUnavailable as error:
            raise ToolUnavailable(f"{self.name}: {error}") from error

    async def run(self, arguments: str, session: str = "") -> ToolResult:
        parts = [arguments] if self.separator is None else arguments.split(self.separator)
        queries = [query for part in parts if (query := " ".join(part.split()))]
        if why := self._refusal(queries):
            return ToolResult(why, Outcome.MODEL_ERROR)
        found = {query: hits for query in queries if (hits := self._answers.get(self._key(query))) is not None}
        if missing := [query for query in dict.fromkeys(queries) if query not in found]:
            for query, hits in zip(missing, await self._search(missing, session), strict=True):
                found[query] = hits
                self._answers.put(self._key(query), hits)
        return ToolResult(self._text(queries, [[hit.passage for hit in found[q]] for q in queries]), cached=not missing)

    async def release(self, session: str) -> None:
        self._seconds.pop(session, None)

    async def close(self) -> None:
        await self._source.close()

    @property
    def is_local(self) -> bool:
        return not self._is_remote

    @property
    def identity(self) -> str | None:
        """Of the index that answers: another one, other answers. None before it is open, or where it does not tell."""
        return "+".join(self._source.identity or ()) or None

    def open(self) -> Index:
        """The index that the fields describe."""
        if self.corpus or self.passages:
            passages = Corpus(self.corpus) if self.corpus else self.passages
            if self.index:
                return build_or_open(passages, self.encoder, self.index)
            assert self.encoder is not None
            return memory_index(list(passages), self.encoder)
        assert self.index is not None
        return open_index(self.index, self.encoder)

    @property
    def _is_remote(self) -> bool:
        return bool(self.urls or self.shards)

    @cached_property
    def _source(self) -> LocalIndex | RemoteIndex:
        if not self._is_remote:
            batches = Batches(self.open, MAX_BATCH, self.batch_wait_s, cache_size=0, name=self.name)
            return LocalIndex(batches, self.timeout_s)
        token = self.token or os.environ.get("OTCRL_TOKEN")
        return RemoteIndex(self.shards or [self.urls], token, protocol=self.protocol, timeout_s=self.timeout_s)

    @cached_property
    def _answers(self) -> Answers:
        return Answers(self.cache_size)

    @cached_property
    def _seconds(self) -> dict[str, float]:
        """Spent by each trajectory."""
        return {}

    def _key(self, query: str) -> tuple[object, ...]:
        return self._source.identity, query, self.topk

    def _refusal(self, queries: Sequence[str]) -> str:
        """What is wrong with them, for the policy; "" if nothing is."""
        if not queries:
            return "The query is empty. Write what to search for."
        if len(queries) > self.max_queries:
            return f"There are {len(queries)} queries, at most {self.max_queries} are allowed. Write fewer."
        length = max(map(len, queries))
        if length > self.max_query_chars:
            return f"The query has {length} characters, at most {self.max_query_chars} are allowed. Make it shorter."
        return ""

    async def _search(self, queries: Sequence[str], session: str) -> Sequence[Sequence[Hit]]:
        """Asks the source, within the trajectory's time. Raises ToolUnavailable, DataError."""
        if not self._is_remote and self._source.identity is None:
            await self.start()  # takes as long as it takes, on no trajectory's account
        limit, begun = self.trajectory_timeout_s if session else 0, time.monotonic()
        left = max(0.0, limit - self._seconds.get(session, 0.0)) if limit else None
        try:
            async with asyncio.timeout(left):
                return await self._source.search(queries, self.topk)
        except TimeoutError as error:
            why = f"the trajectory's searches took all of trajectory_timeout_s={limit:g}"
            raise ToolUnavailable(f"{self.name}: {why}") from error
        except ToolUnavailable as error:
            raise ToolUnavailable(f"{self.name}: {error}") from error
        finally:
            if limit:
                self._seconds[session] = self._seconds.get(session, 0.0) + time.monotonic() - begun

    def _text(self, queries: Sequence[str], found: Sequence[Sequence[Passage]]) -> str:
        """What the policy reads. Passages shown for one query are not shown for the next."""
        blocks, shown = [], set[Passage]()
        for query, passages in zip(queries, found, strict=True):
            new = [passage for passage in passages if passage not in shown]
            shown.update(new)
            pieces = [self._piece(i, passage) for i, passage in enumerate(new, start=1)]
            nothing = NOTHING_ELSE if passages else NOTHING
            blocks.append((f"Query: {query}\n" if len(queries) > 1 else "", pieces or [nothing]))
        return fitted(blocks, self.max_chars)

    def _piece(self, i: int, passage: Passage) -> str:
        words = passage.text.split() if self.max_passage_words else []
        is_cut = len(words) > self.max_passage_words
        text = " ".join(words[: self.max_passage_words]) + CUT if is_cut else passage.text
        return self.template.format(i=i, title=passage.title, text=text)


Block = tuple[str, Sequence[str]]  # a line that opens it, and its passages


def fitted(blocks: Sequence[Block], limit: int) -> str:
    """As many whole passages, from the first on, as `limit` characters hold (0: all); only the first may be cut."""
    count = sum(len(pieces) for _, pieces in blocks)
    text = joined(blocks, count)
    while 0 < limit < len(text) and count > 1:
        count -= 1
        text = joined(blocks, count)
    return text[: limit - len(CUT)].rstrip() + CUT if 0 < limit < len(text) else text


def joined(blocks: Sequence[Block], count: int) -> str:
    """The first `count` passages, under the lines that open their blocks."""
    texts = []
    for opening, pieces in blocks:
        if kept := pieces[:count]:
            texts.append(opening + ("".join(kept).strip() or NOTHING))
        count -= len(kept)
    return "\n".join(texts)


class Answers:
    """What was found, least recently used first. Mutable; threads may share it."""

    def __init__(self, size: int) -> None:
        self._size, self._lock = size, threading.Lock()
        self._kept: OrderedDict[tuple[object, ...], Sequence[Hit]] = OrderedDict()

    def get(self, key: tuple[object, ...]) -> Sequence[Hit] | None:
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
            return self._kept.get(key)

    def put(self, key: tuple[object, ...], hits: Sequence[Hit]) -> None:
        with self._lock:
            self._kept[key] = hits
            while len(self._kept) > self._size:
                self._kept.popitem(last=False)


class LocalIndex:
    """The index of this process, behind the methods of `RemoteIndex`."""

    def __init__(self, batches: Batches, timeout_s: float) -> None:
        self._batches, self._timeout_s = batches, timeout_s

    @property
    def identity(self) -> tuple[str, ...] | None:
        """None until it is open."""
        return (self._batches.index.identity,) if self._batches.index is not None else None

    async def start(self) -> None:
        await asyncio.wrap_future(self._batches.prepare())

    async def search(self, queries: Sequence[str], topk: int) -> Sequence[Sequence[Hit]]:
        """Raises ToolUnavailable; DataError and the like of an index that could not be opened."""
        try:
            async with asyncio.timeout(self._timeout_s):
                asked = self._batches.ask_all(queries, topk, time.monotonic() + self._timeout_s)
                return [answer.hits for answer in await asyncio.wrap_future(asked)]
        except TimeoutError as error:
            raise ToolUnavailable(f"no answer within timeout_s={self._timeout_s:g}") from error
        except OtcrlError:  # some are ValueErrors
            raise
        except (RuntimeError, OSError, MemoryError, ValueError) as error:
            raise ToolUnavailable(f"the retriever failed: {error}") from error

    async def close(self) -> None:
        await asyncio.to_thread(self._batches.close)
