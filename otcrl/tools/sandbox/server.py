"""The Python sandbox over HTTP, as SandboxFusion defines it for `language: python`: its clients work unchanged.

Request and answer: github.com/bytedance/SandboxFusion, sandbox/server/sandbox_api.py and sandbox/runners/types.py.
As there, a program that fails is a 200 whose status is Failed, and what the sandbox itself fails at is a 200 whose
status is SandboxError; a 4xx is the caller's own mistake. Not there are: `session` and `max_bytes` in a request; the
last four fields of a `run_result`; tokens, 413, 429, /session, /health and /metrics.
"""

from __future__ import annotations

import base64
import os
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Annotated, Literal

from fastapi import FastAPI, Request
from pydantic import AfterValidator, Base64Bytes, BaseModel, ConfigDict, Field, model_validator

from otcrl.errors import OtcrlError
from otcrl.tools import http
from otcrl.tools.http import Line, Meters, refusals, wrong_field
from otcrl.tools.sandbox.client import with_reason
from otcrl.tools.sandbox.execution import Execution, Program, State
from otcrl.tools.sandbox.inside.channel import encodable
from otcrl.tools.sandbox.pool import Pool

Status = Literal["Finished", "Error", "TimeLimitExceeded"]
STATUS: dict[State, Status] = {State.TIMEOUT: "TimeLimitExceeded", State.KILLED: "Error"}


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
                raise wrong_field(name, f"this server allows {most:g} at most, got {amount:g}")
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
    meters = Meters("otcrl_python", lambda: line.queued, lambda: line.running, "calls")

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        try:
            await pool.start()
            yield
        finally:
            await pool.close()

    app = http.make_app("otcrl serve python", token, meters, lifespan)

    @app.post("/run_code", responses=refusals(400, 401, 413, 429))
    async def run_code(request: RunRequest, client: Request) -> RunResponse:
        if request.language != "python":
            why = f"language {request.language!r} is not supported: this server runs 'python' only"
            return RunResponse(status="SandboxError", message=why)
        program, begun = limits.program(request), time.monotonic()
        with line.place():
            try:
                done = await http.unless_gone(client, pool.run(program))
            except OtcrlError as error:
                meters.outcomes.labels("unavailable").inc()
                return RunResponse(status="SandboxError", message=str(error))
        line.took(done.seconds)
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

    return app
