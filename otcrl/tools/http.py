"""What the tools' HTTP servers share: who may come in, how many at a time, what is counted, how a refusal looks."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Callable, Coroutine, Iterator
from contextlib import AbstractAsyncContextManager, contextmanager
from dataclasses import dataclass
from hmac import compare_digest
from typing import Any, TypeVar

from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.exceptions import RequestValidationError
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from pydantic import BaseModel
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

MAX_BODY_BYTES = 32 << 20
MAX_RETRY_AFTER_S = 60
CLIENT_GONE = 499  # as nginx calls it; seen in /metrics only
BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)  # seconds


# -- refusals ---------------------------------------------------------------------------------------


class Refusal(BaseModel):
    detail: str


def refusals(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """For an endpoint's `responses`."""
    return {status: {"model": Refusal} for status in statuses}


def ascii_json(content: object, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """Plain ASCII, as a text in it may have no bytes in UTF-8."""
    return Response(json.dumps(content), status, headers, media_type="application/json")


def detail(status: int, why: object, headers: dict[str, str] | None = None) -> Response:
    """A refusal."""
    return ascii_json({"detail": why}, status, headers)


def wrong_field(name: str, why: str, *where: int) -> RequestValidationError:
    """What FastAPI raises for a field of the body, from a check that its model cannot make."""
    return RequestValidationError([{"type": "value_error", "loc": ("body", name, *where), "msg": why}])


T = TypeVar("T")


async def unless_gone(client: Request, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which is cancelled when the client hangs up. Raises HTTPException then."""
    doing, gone = asyncio.ensure_future(work), asyncio.ensure_future(disconnected(client))
    try:
        await asyncio.wait({doing, gone}, return_when=asyncio.FIRST_COMPLETED)
        if doing.done():
            return doing.result()
        raise HTTPException(CLIENT_GONE, "the client hung up")
    finally:
        gone.cancel()
        doing.cancel()


async def disconnected(client: Request) -> None:
    while (await client.receive())["type"] != "http.disconnect":
        pass


# -- who may come in --------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Door:
    """ASGI middleware: no token, no entry; and no body is read past the limit. /health is open."""

    app: ASGIApp
    token: str | None
    max_body_bytes: int = MAX_BODY_BYTES

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers, read = dict(scope.get("headers", ())), 0

        async def limited() -> Message:
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if read > self.max_body_bytes:
                raise HTTPException(413, self.too_large)
            return message

        if scope["type"] != "http":
            await self.app(scope, receive, send)
        elif scope["path"] != "/health" and not self.admits(headers.get(b"authorization", b"")):
            why, how = "add the header Authorization: Bearer TOKEN", {"WWW-Authenticate": "Bearer"}
            await detail(401, why, how)(scope, receive, send)
        elif int(headers.get(b"content-length", b"0")) > self.max_body_bytes:
            await detail(413, self.too_large)(scope, receive, send)
        else:
            await self.app(scope, limited, send)

    @property
    def too_large(self) -> str:
        return f"the body must not exceed {self.max_body_bytes >> 20} MiB"

    def admits(self, credentials: bytes) -> bool:
        scheme, _, token = credentials.partition(b" ")
        return not self.token or (scheme.lower() == b"bearer" and compare_digest(token, self.token.encode()))


@dataclass(slots=True)
class Line:
    """Who is served and who waits. Mutable; `inside` is touched by the event loop only."""

    workers: int  # served at a time
    queue: int
    what: str = "calls"
    inside: int = 0
    recent_s: float = 0.1  # of being served; a moving average

    @property
    def running(self) -> int:
        return min(self.inside, self.workers)

    @property
    def queued(self) -> int:
        return self.inside - self.running

    def took(self, seconds: float) -> None:
        self.recent_s += 0.1 * (seconds - self.recent_s)

    @contextmanager
    def place(self, places: int = 1) -> Iterator[None]:
        """Raises HTTPException where there is no room for so many, and says when to come back."""
        if self.inside + places > self.workers + self.queue:
            seconds = min(MAX_RETRY_AFTER_S, math.ceil(self.recent_s * max(1.0, self.queued / self.workers)))
            why = f"{self.queued} {self.what} are waiting already, of {self.queue} at most"
            raise HTTPException(429, why, {"Retry-After": str(seconds)})
        self.inside += places
        try:
            yield
        finally:
            self.inside -= places


# -- the app ----------------------------------------------------------------------------------------


class Meters:
    """What /metrics shows of one app; `own` is for more of them."""

    def __init__(self, namespace: str, queued: Callable[[], float], running: Callable[[], float], what: str) -> None:
        self.registry = CollectorRegistry()
        self.own: dict[str, Any] = {"namespace": namespace, "registry": self.registry}
        Gauge("queued", f"{what} that wait", **self.own).set_function(queued)
        Gauge("running", f"{what} that run", **self.own).set_function(running)
        self.seconds = Histogram("seconds", "from request to answer, waiting included", buckets=BUCKETS, **self.own)
        self.outcomes = Counter("calls", "calls by outcome", ["outcome"], **self.own)


def make_app(
    title: str, token: str | None, meters: Meters, lifespan: Callable[[FastAPI], AbstractAsyncContextManager[None]]
) -> FastAPI:
    """An app with a door, with /metrics, and whose every refusal is a JSON object with a `detail`."""
    app = FastAPI(title=title, lifespan=lifespan, docs_url=None, redoc_url=None)
    app.add_middleware(Door, token=token)

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> Response:
        """FastAPI's form without its copy of what was sent."""
        return detail(422, [{key: each[key] for key in ("loc", "msg", "type")} for each in error.errors()])

    @app.exception_handler(StarletteHTTPException)
    async def refused(_: Request, error: StarletteHTTPException) -> Response:
        return detail(error.status_code, error.detail, dict(error.headers or {}))

    @app.get("/metrics", responses=refusals(401), response_class=Response)
    async def metrics() -> Response:
        """For Prometheus."""
        return Response(generate_latest(meters.registry), media_type=CONTENT_TYPE_LATEST)

    return app
