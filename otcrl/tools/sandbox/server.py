"""The Python sandbox over HTTP, as SandboxFusion defines it for `language: python`: its clients work unchanged.

Request and answer: github.com/bytedance/SandboxFusion, sandbox/server/sandbox_api.py and sandbox/runners/types.py.
As there, a program that fails is a 200 whose status is Failed, and what the sandbox itself fails at is a 200 whose
status is SandboxError; a 4xx is the caller's own mistake. Not there are: `session` and `max_bytes` in a request; the
last four fields of a `run_result`; tokens, 413, 429, /session, /health and /metrics.
"""

from __future__ import annotations

import base64
import json
import math
import os
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from hmac import compare_digest
from pathlib import PurePosixPath
from typing import Annotated, Any, Literal

from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.exceptions import RequestValidationError
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from pydantic import AfterValidator, Base64Bytes, BaseModel, ConfigDict, Field, model_validator
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from otcrl.errors import OtcrlError
from otcrl.tools.sandbox.client import with_reason
from otcrl.tools.sandbox.inside.channel import encodable
from otcrl.tools.sandbox.pool import Execution, Pool, Program, State

Status = Literal["Finished", "Error", "TimeLimitExceeded"]
STATUS: dict[State, Status] = {State.TIMEOUT: "TimeLimitExceeded", State.KILLED: "Error"}
MAX_BODY_BYTES = 32 << 20
TOO_LARGE = f"the body must not exceed {MAX_BODY_BYTES >> 20} MiB"
MAX_RETRY_AFTER_S = 60
BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)  # seconds


# -- what travels -----------------------------------------------------------------------------------


def inner(path: str) -> str:
    parts = PurePosixPath(path).parts
    if not parts or parts[0].startswith("/") or ".." in parts or path.endswith(("/", "/.")) or "\0" in path:
        raise ValueError("a file's path must be relative, without '..', and name a file")
    if len(path.encode()) > 4000 or max(len(part.encode()) for part in parts) > 255:
        raise ValueError("a file's path may have 255 bytes between slashes and 4000 in all")
    return path


InnerPath = Annotated[str, AfterValidator(inner)]


class RunRequest(BaseModel):
    model_config = ConfigDict(allow_inf_nan=False)

    code: str
    language: str
    stdin: str | None = None
    compile_timeout: float = 10  # Python has nothing to compile
    run_timeout: float | None = Field(None, gt=0)  # seconds; None: the server's limit, 10 as in SandboxFusion
    memory_limit_MB: int = -1  # on top of the warmed interpreter; 0 and below: the server's limit
    files: dict[InnerPath, Base64Bytes | None] = {}  # without content: no file, as in SandboxFusion
    fetch_files: list[InnerPath] = []
    session: str = Field(
        "", max_length=200, pattern="^[!-~]*$"
    )  # variables live on from one call of a session to the next
    max_bytes: int = Field(1 << 19, gt=0, le=4 << 20)  # of each stream's head, and as much of its tail

    @model_validator(mode="after")
    def no_file_is_a_directory(self) -> RunRequest:
        paths = [PurePosixPath(path) for path in self.files]
        if clash := set(paths) & {parent for path in paths for parent in path.parents}:
            raise ValueError(f"files: {str(min(clash))!r} cannot be a file and a directory")
        return self


class RunResult(BaseModel):
    status: Status
    execution_time: float  # seconds
    return_code: int | None  # None: out of time; -N: ended by signal N
    stdout: str
    stderr: str
    outcome: State
    value: str  # repr of the last expression, "" if None
    dropped: int  # bytes cut from the middle of the longest of stdout, stderr and value
    fresh: bool  # False: the session was there already


class RunResponse(BaseModel):
    status: Literal["Success", "Failed", "SandboxError"]
    message: str = ""
    compile_result: None = None
    run_result: RunResult | None = None
    executor_pod_name: str | None = Field(default_factory=lambda: os.environ.get("MY_POD_NAME"))
    files: dict[str, str] = {}


class Refusal(BaseModel):
    detail: str


def refusals(*statuses: int) -> dict[int | str, dict[str, Any]]:
    return {status: {"model": Refusal} for status in statuses}


def run_response(done: Execution, fetch: list[str]) -> RunResponse:
    """`encodable`, because what a program says about itself may be anything."""
    code = -done.code if done.state is State.SIGNAL else done.code
    result = RunResult(
        status=STATUS.get(done.state, "Finished"),
        execution_time=done.seconds,
        return_code=None if done.state is State.TIMEOUT else code or int(done.state is not State.OK),
        stdout=encodable(done.stdout),
        stderr=with_reason(encodable(done.stderr), done.state),
        outcome=done.state,
        value=encodable(done.value),
        dropped=done.dropped,
        fresh=done.fresh,
    )
    if done.state is State.KILLED:
        return RunResponse(status="SandboxError", message=result.stderr, run_result=result)
    files = {name: encodable(done.files[name]) for name in fetch if name in done.files}
    return RunResponse(status="Success" if done.state is State.OK else "Failed", run_result=result, files=files)


# -- who may come in --------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Door:
    """ASGI middleware: no token, no entry; and no body is read past the limit. /health is open."""

    app: ASGIApp
    token: str | None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers, read = dict(scope.get("headers", ())), 0

        async def limited() -> Message:
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if read > MAX_BODY_BYTES:
                raise HTTPException(413, TOO_LARGE)
            return message

        if scope["type"] != "http":
            await self.app(scope, receive, send)
        elif scope["path"] != "/health" and not self.admits(headers.get(b"authorization", b"")):
            why, how = "add the header Authorization: Bearer TOKEN", {"WWW-Authenticate": "Bearer"}
            await detail(401, why, how)(scope, receive, send)
        elif int(headers.get(b"content-length", b"0")) > MAX_BODY_BYTES:
            await detail(413, TOO_LARGE)(scope, receive, send)
        else:
            await self.app(scope, limited, send)

    def admits(self, credentials: bytes) -> bool:
        scheme, _, token = credentials.partition(b" ")
        return not self.token or (scheme.lower() == b"bearer" and compare_digest(token, self.token.encode()))


def detail(status: int, why: object, headers: dict[str, str] | None = None) -> Response:
    """A refusal. Plain ASCII, as what it quotes may have no bytes in UTF-8."""
    return Response(json.dumps({"detail": why}), status, headers, media_type="application/json")


@dataclass(slots=True)
class Line:
    """Who is served and who waits. Mutable; touched by the event loop only."""

    workers: int
    queue: int
    inside: int = 0
    recent_s: float = 0.1  # of a program; a moving average

    @property
    def running(self) -> int:
        return min(self.inside, self.workers)

    @property
    def queued(self) -> int:
        return self.inside - self.running

    @contextmanager
    def place(self) -> Iterator[None]:
        if self.inside >= self.workers + self.queue:
            seconds = min(MAX_RETRY_AFTER_S, math.ceil(self.recent_s * max(1.0, self.queued / self.workers)))
            raise HTTPException(429, f"{self.queued} calls are waiting already", {"Retry-After": str(seconds)})
        self.inside += 1
        try:
            yield
        finally:
            self.inside -= 1


class Meters:
    """What /metrics shows of one app."""

    def __init__(self, line: Line) -> None:
        self.registry = CollectorRegistry()
        own = {"namespace": "otcrl_python", "registry": self.registry}
        Gauge("queued", "calls that wait", **own).set_function(lambda: line.queued)
        Gauge("running", "calls that run", **own).set_function(lambda: line.running)
        self.seconds = Histogram("seconds", "from request to answer, waiting included", buckets=BUCKETS, **own)
        self.outcomes = Counter("calls", "calls by outcome", ["outcome"], **own)


# -- the app ----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What a program gets that asks for nothing, and the most that one may ask for."""

    timeout_s: float = 10.0
    memory_mb: int = 512
    max_timeout_s: float = 300.0
    max_memory_mb: int = 4096

    def program(self, request: RunRequest) -> Program:
        """Raises RequestValidationError where the request asks for too much."""
        timeout_s = request.run_timeout or self.timeout_s
        memory_mb = request.memory_limit_MB if request.memory_limit_MB > 0 else self.memory_mb
        asked = {"run_timeout": (timeout_s, self.max_timeout_s), "memory_limit_MB": (memory_mb, self.max_memory_mb)}
        for name, (amount, most) in asked.items():
            if amount > most:
                why = f"this server allows {most:g} at most, got {amount:g}"
                raise RequestValidationError([{"type": "less_than_equal", "loc": ("body", name), "msg": why}])
        return Program(
            code=encodable(request.code),
            timeout_s=timeout_s,
            memory_mb=memory_mb,
            max_bytes=request.max_bytes,
            stdin=encodable(request.stdin or ""),
            files={path: base64.b64encode(it).decode() for path, it in request.files.items() if it is not None},
            fetch=request.fetch_files,
            session=request.session,
        )


def make_app(pool: Pool, *, workers: int, token: str | None = None, queue: int = 256, limits: Limits) -> FastAPI:
    """The app that serves `pool`, which has `workers` interpreters; it starts the pool, and closes it.

    More than `queue` calls are not kept waiting. Without `token` anybody who reaches the port may run programs.
    """
    line = Line(workers, queue)
    meters = Meters(line)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        try:
            await pool.start()
            yield
        finally:
            await pool.close()

    app = FastAPI(title="otcrl serve python", lifespan=lifespan, docs_url=None, redoc_url=None)
    app.add_middleware(Door, token=token)

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> Response:
        """FastAPI's form without its copy of what was sent."""
        return detail(422, [{key: each[key] for key in ("loc", "msg", "type")} for each in error.errors()])

    @app.post("/run_code", responses=refusals(400, 401, 413, 429))
    async def run_code(request: RunRequest) -> RunResponse:
        if request.language != "python":
            why = f"language {request.language!r} is not supported: this server runs 'python' only"
            return RunResponse(status="SandboxError", message=why)
        program, begun = limits.program(request), time.monotonic()
        with line.place():
            try:
                done = await pool.run(program)
            except OtcrlError as error:
                meters.outcomes.labels("unavailable").inc()
                return RunResponse(status="SandboxError", message=str(error))
        line.recent_s += 0.1 * (done.seconds - line.recent_s)
        meters.seconds.observe(time.monotonic() - begun)
        meters.outcomes.labels(done.state.value).inc()
        return run_response(done, request.fetch_files)

    @app.delete("/session/{name:path}", status_code=204, responses=refusals(401, 404))
    async def end_session(name: str) -> None:
        """Free a session; nothing happens where there is none."""
        await pool.end(name)

    @app.get("/health")
    async def health() -> dict[str, str | int]:
        return {"status": "ok", "workers": workers, "queued": line.queued}

    @app.get("/metrics", responses=refusals(401), response_class=Response)
    async def metrics() -> Response:
        return Response(generate_latest(meters.registry), media_type=CONTENT_TYPE_LATEST)

    return app
