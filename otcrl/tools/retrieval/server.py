"""Search over HTTP: `POST /retrieve` as Search-R1's and verl's clients call it, and `POST /search`, which tells more.

Request and answer of /retrieve: github.com/PeterGriffinJin/Search-R1, search_r1/search/retrieval_server.py. There,
`return_scores: false` ends in an error; here it gives the documents alone. Whatever is asked, one index answers all
queries of a request: one that is being replaced goes on for those it has begun with.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Annotated

from fastapi import FastAPI, HTTPException, Request, Response
from prometheus_client import Counter, Histogram
from pydantic import AfterValidator, BaseModel, ConfigDict, Field
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from otcrl.errors import OtcrlError
from otcrl.tools import http
from otcrl.tools.http import BUCKETS, Line, Meters, ascii_json, refusals, wrong_field
from otcrl.tools.retrieval.batches import Answer, Batches, Searchable

FAILURES = (OtcrlError, OSError, RuntimeError, ValueError, MemoryError)  # of opening or searching an index
SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)  # queries
ASKED = ("/retrieve", "/search")
REFUSED = refusals(400, 401, 413, 429, 503, 504)


# -- what travels -----------------------------------------------------------------------------------


def encodable(text: str) -> str:
    """`text` with a question mark for half a surrogate pair, which no tokenizer takes."""
    return text.encode(errors="replace").decode()


Query = Annotated[str, AfterValidator(encodable)]
Queries = Annotated[list[Query], Field(description="each a short text")]
TopK = Annotated[int | None, Field(ge=1, description="documents per query; null: the server's own number")]


class RetrieveRequest(BaseModel):
    """As Search-R1 and verl send it."""

    model_config = ConfigDict(extra="forbid")

    queries: Queries
    topk: TopK = None
    return_scores: Annotated[bool, Field(description="whether each document comes with its score")] = False


class Document(BaseModel):
    id: str
    contents: Annotated[str, Field(description='the title in double quotes, a line break, the text: "Title"\\ntext')]


class Scored(BaseModel):
    document: Document
    score: Annotated[float, Field(description="of documents of one query the higher is the nearer")]


class RetrieveResponse(BaseModel):
    result: Annotated[
        list[list[Scored]] | list[list[Document]], Field(description="for each query its documents, best first")
    ]


class SearchRequest(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    queries: Queries
    topk: TopK = None
    deadline_s: Annotated[
        float | None,
        Field(gt=0, le=3600, description="seconds after which nobody waits any more; null: the server's own number"),
    ] = None


class Found(BaseModel):
    id: str
    title: Annotated[str, Field(description="empty if it has none")]
    text: str
    score: float


class SearchResponse(BaseModel):
    index: Annotated[str, Field(description="identity of the index that answered: another one, other answers")]
    results: Annotated[list[list[Found]], Field(description="for each query its passages, best first")]
    cached: Annotated[list[bool], Field(description="for each query whether its answer was remembered")]


class PassageResponse(BaseModel):
    id: str
    title: str
    text: str


class Opened(BaseModel):
    index: Annotated[str, Field(description="identity of the index that answers now")]
    rows: Annotated[int, Field(description="passages")]


class Health(BaseModel):
    status: str
    index: Annotated[str, Field(description="identity of the index that answers now")]
    rows: Annotated[int, Field(description="passages")]
    kind: str
    encoder: str | None
    queued: Annotated[int, Field(description="different queries that wait")]
    running: Annotated[int, Field(description="different queries that are being searched")]


def retrieved(answer: Answer, with_scores: bool) -> Sequence[dict[str, object]]:
    documents: list[dict[str, object]] = [
        {"id": hit.passage.id, "contents": f'"{hit.passage.title}"\n{hit.passage.text}'} for hit in answer.hits
    ]
    if not with_scores:
        return documents
    return [{"document": document, "score": hit.score} for document, hit in zip(documents, answer.hits, strict=True)]


def found(answer: Answer) -> list[dict[str, object]]:
    hits = ((hit.passage, hit.score) for hit in answer.hits)
    return [{"id": it.id, "title": it.title, "text": it.text, "score": score} for it, score in hits]


# -- what is measured -------------------------------------------------------------------------------


class SearchMeters:
    """What /metrics shows; sees every request and every batch."""

    def __init__(self, batches: Batches, line: Line) -> None:
        self.common = Meters("otcrl_retrieval", lambda: batches.queued, lambda: batches.running, "queries")
        own, self._line = self.common.own, line
        self.queries = Counter("queries", "queries of requests that were let in", **own)
        self.cache_hits = Counter("cache_hits", "queries whose answer was remembered", **own)
        self.batch_size = Histogram("batch_size", "queries that were searched together", buckets=SIZES, **own)
        self.search_seconds = Histogram("search_seconds", "to encode and search a batch", buckets=BUCKETS, **own)

    def batch(self, size: int, seconds: float) -> None:
        self.batch_size.observe(size)
        self.search_seconds.observe(seconds)
        self._line.took(seconds)

    def request(self, status: int, seconds: float) -> None:
        self.common.outcomes.labels(str(status)).inc()
        if status == 200:
            self.common.seconds.observe(seconds)

    def answered(self, answers: Sequence[Answer]) -> None:
        self.queries.inc(len(answers))
        self.cache_hits.inc(sum(answer.cached for answer in answers))


@dataclass(frozen=True, slots=True)
class Measured:
    """ASGI middleware: every search is counted, by its status and with its seconds."""

    app: ASGIApp
    meters: SearchMeters

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] not in ASKED:
            return await self.app(scope, receive, send)
        status, begun = 500, time.monotonic()

        async def watched(message: Message) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        try:
            await self.app(scope, receive, watched)
        finally:
            self.meters.request(status, time.monotonic() - begun)


# -- the app ----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What a request gets that asks for nothing, and the most that one may ask for."""

    topk: int = 3
    max_topk: int = 100
    max_queries: int = 4096
    max_query_chars: int = 10_000
    deadline_s: float = 30.0

    def checked(self, queries: Sequence[str], topk: int | None) -> int:
        """The documents per query. Raises RequestValidationError naming what is wrong, and the query by its place."""
        if len(queries) > self.max_queries:
            raise wrong_field("queries", f"this server takes {self.max_queries} at a time, got {len(queries)}")
        for place, query in enumerate(queries):
            if not query.strip():
                raise wrong_field("queries", f"query {place} is empty", place)
            if len(query) > self.max_query_chars:
                why = f"query {place} has {len(query)} characters, this server allows {self.max_query_chars}"
                raise wrong_field("queries", why, place)
        if topk is not None and topk > self.max_topk:
            raise wrong_field("topk", f"this server allows {self.max_topk} at most, got {topk}")
        return self.topk if topk is None else topk


@dataclass(frozen=True, slots=True)
class Desk:
    """Where queries are handed in."""

    batches: Batches
    line: Line
    limits: Limits

    def index(self) -> Searchable:
        """Raises HTTPException until it is open."""
        if (index := self.batches.index) is None:
            raise HTTPException(503, "the index is being opened", {"Retry-After": "1"})
        return index

    async def answers(
        self, queries: Sequence[str], topk: int | None, deadline_s: float | None, request: Request
    ) -> list[Answer]:
        """One for each query, all from one index. Nobody searches for a caller that hung up or waited too long."""
        topk, deadline_s = self.limits.checked(queries, topk), deadline_s or self.limits.deadline_s
        self.index()
        with self.line.place(len(queries)), failures_told(deadline_s):
            asked = asyncio.wrap_future(self.batches.ask_all(queries, topk, time.monotonic() + deadline_s))
            gone = asyncio.ensure_future(http.disconnected(request))
            try:
                await asyncio.wait({asked, gone}, timeout=deadline_s, return_when=asyncio.FIRST_COMPLETED)
                if asked.done():
                    return asked.result()
                raise HTTPException(http.CLIENT_GONE, "the client hung up") if gone.done() else TimeoutError
            finally:
                gone.cancel()
                asked.cancel()


@contextlib.contextmanager
def failures_told(deadline_s: float) -> Iterator[None]:
    """Whatever goes wrong in a search becomes an HTTP status that sends the caller to another server."""
    try:
        yield
    except TimeoutError as error:
        raise HTTPException(504, f"no answer within deadline_s={deadline_s:g}") from error
    except FAILURES as error:
        raise HTTPException(503, f"the retriever failed: {error}") from error


def make_app(
    batches: Batches, *, max_batch: int, token: str | None = None, queue: int = 8192, limits: Limits
) -> FastAPI:
    """The app that serves `batches`, and closes them. Until they are prepared, which is the caller's, it answers 503.

    More than `queue` queries are not kept waiting, beside the `max_batch` that are searched at a time.
    """
    line = Line(max_batch, queue, "queries")
    desk, meters = Desk(batches, line, limits), SearchMeters(batches, line)
    batches.on_batch = meters.batch

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        try:
            yield
        finally:
            await asyncio.to_thread(batches.close)

    app = http.make_app("otcrl serve retrieval", token, meters.common, lifespan)
    app.add_middleware(Measured, meters=meters)
    add_searches(app, desk, meters)
    add_documents(app, desk)
    add_upkeep(app, desk)
    return app


def add_searches(app: FastAPI, desk: Desk, meters: SearchMeters) -> None:
    @app.post("/retrieve", response_model=RetrieveResponse, responses=REFUSED)
    async def retrieve(body: RetrieveRequest, request: Request) -> Response:
        """The nearest documents, as Search-R1's retrieval server gives them; none for an empty query.

        Its client sends the queries of many trajectories at once, and must not lose all for one that wrote nothing.
        """
        asked = [query for query in body.queries if query.strip()]
        answers = await desk.answers(asked, body.topk, None, request)
        meters.answered(answers)
        documents = iter(retrieved(answer, body.return_scores) for answer in answers)
        return ascii_json({"result": [next(documents) if query.strip() else [] for query in body.queries]})

    @app.post("/search", response_model=SearchResponse, responses=REFUSED)
    async def search(body: SearchRequest, request: Request) -> Response:
        """The nearest passages, and which index they come from."""
        answers = await desk.answers(body.queries, body.topk, body.deadline_s, request)
        meters.answered(answers)
        index = answers[0].index if answers else desk.index().identity
        results, cached = [found(answer) for answer in answers], [answer.cached for answer in answers]
        return ascii_json({"index": index, "results": results, "cached": cached})


def add_documents(app: FastAPI, desk: Desk) -> None:
    @app.get("/document/{id:path}", response_model=PassageResponse, responses=refusals(401, 404, 503))
    async def document(id: str) -> Response:
        """The passage of that id."""
        desk.index()
        deadline_s = desk.limits.deadline_s
        with failures_told(deadline_s):
            passage = await asyncio.wait_for(asyncio.wrap_future(desk.batches.find(id)), deadline_s)
        if passage is None:
            raise HTTPException(404, f"the index has no passage with the id {id!r}")
        return ascii_json({"id": passage.id, "title": passage.title, "text": passage.text})


def add_upkeep(app: FastAPI, desk: Desk) -> None:
    @app.post("/reload", response_model=Opened, responses=refusals(401, 409, 503))
    async def reload() -> Response:
        """Open the index directory anew; the index that is open answers meanwhile, and goes on if that fails (409)."""
        identity = desk.index().identity
        try:
            index = await asyncio.to_thread(desk.batches.reload)
        except FAILURES as error:
            raise HTTPException(409, f"the index {identity} goes on: {error}") from error
        return ascii_json({"index": index.identity, "rows": index.rows})

    @app.get("/health", response_model=Health, responses=refusals(503))
    async def health() -> Response:
        """200 once the index is open and has answered a first query; needs no token."""
        index = desk.index()
        about = index.describe()
        state = {"status": "ok", "index": index.identity, "rows": index.rows}
        state |= {"kind": about.get("kind"), "encoder": about.get("encoder")}
        return ascii_json(state | {"queued": desk.batches.queued, "running": desk.batches.running})
