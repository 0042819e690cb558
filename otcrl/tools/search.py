"""Search as a tool: a query in, the nearest passages out.

Queries that arrive together are encoded and searched as one batch in one thread, so the event loop never waits
and the tool may be used from any loop.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from otcrl.errors import ConfigError, DataError, ToolUnavailable
from otcrl.protocols import ToolResult
from otcrl.tools.retrieval.corpus import Corpus, Passage
from otcrl.tools.retrieval.encode import Encoder
from otcrl.tools.retrieval.index import Index, build_or_open, memory_index, open_index
from otcrl.types import Outcome

SEARCH_R1 = "Doc {i}(Title: {title}) {text}\n"


@dataclass(frozen=True, kw_only=True, eq=False)
class SearchTool:
    """Finds the passages nearest to a query."""

    encoder: Encoder
    name: str = "search"
    description: str = "finds passages of an encyclopedia; write a short query"
    corpus: Sequence[str] = ()  # jsonl or jsonl.gz files
    passages: Sequence[Passage] = ()  # or the passages themselves: a task's own, wired by build
    index: str | None = None  # directory: opened if it is there, built if not; None: in memory
    topk: int = 3
    template: str = SEARCH_R1  # per passage
    max_passage_words: int = 0  # 0: all
    max_query_chars: int = 1000
    cache_size: int = 10_000  # queries; 0: none
    timeout_s: float = 30.0
    batch_wait_s: float = 0.002

    wired = frozenset({"passages"})

    def __post_init__(self) -> None:
        for field in ("topk", "max_query_chars", "timeout_s"):
            if getattr(self, field) <= 0:
                raise ConfigError(f"{field} must be above 0, got {getattr(self, field)}")
        for field in ("max_passage_words", "cache_size", "batch_wait_s"):
            if getattr(self, field) < 0:
                raise ConfigError(f"{field} must be 0 or more, got {getattr(self, field)}")
        try:
            self.template.format(i=1, title="", text="")
        except (KeyError, IndexError, ValueError) as error:
            raise ConfigError(f"template may use {{i}}, {{title}} and {{text}}, got {self.template!r}") from error
        if self.corpus and self.passages:
            raise ConfigError("corpus and passages exclude each other: name files, or let the task bring its own")
        if not self.corpus and not self.passages and self.index is None:
            raise ConfigError(
                "corpus is empty, there is no index, and the task brings no passages: nothing to search in"
            )
        assert all(isinstance(passage, Passage) for passage in self.passages), (
            "a config library turned passages to dicts"
        )
        for path in self.corpus:
            if not Path(path).is_file():
                raise DataError(f"corpus: there is no file {path}")

    async def start(self) -> None:
        """The index opened or built; without it the first query does that. Raises DataError."""
        await asyncio.wrap_future(self._batches.prepare())

    async def run(self, arguments: str, session: str = "") -> ToolResult:
        query = " ".join(arguments.split())
        if not query:
            return ToolResult("The query is empty. Write what to search for.", Outcome.MODEL_ERROR)
        if len(query) > self.max_query_chars:
            why = f"The query has {len(query)} characters, at most {self.max_query_chars} are allowed. Make it shorter."
            return ToolResult(why, Outcome.MODEL_ERROR)
        if (text := self._batches.remembered(query)) is not None:
            return ToolResult(text, cached=True)
        if not self._batches.has_index:
            await self.start()
        try:  # shielded: others may wait for the same answer
            answer = asyncio.shield(asyncio.wrap_future(self._batches.ask(query)))
            return ToolResult(await asyncio.wait_for(answer, self.timeout_s))
        except TimeoutError as error:
            raise ToolUnavailable(f"{self.name}: no answer within timeout_s={self.timeout_s:g}") from error
        except (RuntimeError, OSError, MemoryError) as error:
            raise ToolUnavailable(f"{self.name}: the retriever failed: {error}") from error

    async def release(self, session: str) -> None:
        """Nothing: a search remembers no trajectory."""

    async def close(self) -> None:
        await asyncio.to_thread(self._batches.close)

    @cached_property
    def _batches(self) -> Batches:
        return Batches(self)

    def open(self) -> Index:
        """The index that the fields describe."""
        if self.corpus or self.passages:
            passages = Corpus(self.corpus) if self.corpus else self.passages
            return (
                build_or_open(passages, self.encoder, self.index)
                if self.index
                else memory_index(list(passages), self.encoder)
            )
        assert self.index is not None
        return open_index(self.index, self.encoder)

    def show(self, passages: Sequence[Passage]) -> str:
        """What the policy reads."""
        shown = []
        for i, passage in enumerate(passages, start=1):
            words = passage.text.split() if self.max_passage_words else []
            cut = len(words) > self.max_passage_words
            text = " ".join(words[: self.max_passage_words]) + " ..." if cut else passage.text
            shown.append(self.template.format(i=i, title=passage.title, text=text))
        return "".join(shown).strip() or "No passage was found."


class Batches:
    """The queries that wait, the thread that answers them, and the answers remembered. Mutable."""

    def __init__(self, tool: SearchTool) -> None:
        self._tool = tool
        self._lock = threading.Lock()
        self._asked: dict[str, Future[str]] = {}  # waiting, or being answered
        self._waiting: list[str] = []
        self._answers: OrderedDict[str, str] = OrderedDict()  # least recently used first
        self._index: Index | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=tool.name)

    @property
    def has_index(self) -> bool:
        return self._index is not None

    def prepare(self) -> Future[Index]:
        return self._thread.submit(self._open)

    def remembered(self, query: str) -> str | None:
        with self._lock:
            if query in self._answers:
                self._answers.move_to_end(query)
            return self._answers.get(query)

    def ask(self, query: str) -> Future[str]:
        """The answer to come; one future for all who ask the same meanwhile."""
        with self._lock:
            if query not in self._asked:
                self._asked[query] = Future()
                self._waiting.append(query)
                if len(self._waiting) == 1:
                    self._thread.submit(self._answer)
            return self._asked[query]

    def close(self) -> None:
        self._thread.shutdown(wait=True, cancel_futures=True)

    def _open(self) -> Index:
        if self._index is None:
            self._index = self._tool.open()
        return self._index

    def _answer(self) -> None:
        time.sleep(self._tool.batch_wait_s)
        with self._lock:
            queries, self._waiting = self._waiting, []
        try:
            hits = self._open().search(queries, self._tool.topk)
            texts = [self._tool.show([hit.passage for hit in query_hits]) for query_hits in hits]
        except Exception as error:  # whatever it is, it belongs to those who wait: this thread has nobody to tell
            with self._lock:
                futures = [self._asked.pop(query) for query in queries]
            for future in futures:
                future.set_exception(error)
            return
        with self._lock:
            futures = [self._asked.pop(query) for query in queries]
            self._answers.update(zip(queries, texts, strict=True))
            while len(self._answers) > self._tool.cache_size:
                self._answers.popitem(last=False)
        for future, text in zip(futures, texts, strict=True):
            future.set_result(text)
