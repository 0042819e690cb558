"""A pool of interpreters on other machines: `otcrl serve python` behind the methods of `Pool`."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from otcrl.errors import ConfigError, ToolUnavailable
from otcrl.tools.remote import ServerBusy, ServerLost, Servers
from otcrl.tools.sandbox.execution import Execution, Program, State
from otcrl.tools.sandbox.inside.channel import encodable

if TYPE_CHECKING:
    from httpx import Response

TRIAL = Program(code="", timeout_s=1.0, memory_mb=64, max_bytes=1000)
END_S = 5.0  # to end a session; one that cannot be ended ends when it was idle for long
REASONS = {
    State.MEMORY: "The program was stopped: it used too much memory.\n",
    State.THREADS: "The program was stopped: it started too many threads.\n",
    State.OUTPUT: "The program was stopped: it printed too much.\n",
    State.SIGNAL: "The program crashed.\n",
    State.KILLED: "The program was stopped from outside, twice.\n",
}


@dataclass(frozen=True, slots=True)
class Home:
    """Where a session lives, and under which name. A name is never used again once its server failed:
    the program whose answer was lost may have run there."""

    url: str
    name: str


class RemotePool:
    """`otcrl serve python` at each of `urls`. Mutable; may be used from any event loop."""

    def __init__(
        self,
        urls: Sequence[str],
        token: str | None = None,
        *,
        wait_s: float = 120.0,  # for a server's answer, past the program's own time limit
        deadline_s: float = 300.0,  # of a call with all its attempts, past the program's own time limit
        failures: int = 3,
        open_s: float = 5.0,
    ) -> None:
        """Raises ConfigError for what is no URL; nothing is asked yet."""
        self._servers = Servers(urls, token, deadline_s=deadline_s, failures=failures, open_s=open_s)
        self._wait_s, self._deadline_s = wait_s, deadline_s
        self._homes: dict[str, Home] = {}
        self._closed = False

    async def start(self) -> None:
        """Every server tried. Raises ToolUnavailable if none serves, ConfigError if one refuses us."""
        deadline = time.monotonic() + self._deadline_s
        tries = [self._send(url, TRIAL, "", deadline) for url in self._servers.urls]
        replies = await asyncio.gather(*tries, return_exceptions=True)
        for reply in replies:
            if isinstance(reply, BaseException) and not isinstance(reply, (ServerBusy, ServerLost)):
                raise reply
        if all(isinstance(reply, ServerLost) for reply in replies):
            raise ToolUnavailable(f"no Python sandbox serves: {'; '.join(map(str, replies))}")

    async def run(self, program: Program) -> Execution:
        """What the program did; one whose server fails runs again on another, in a fresh session if in any.

        Raises ToolUnavailable when no server is to be had, ConfigError when one refuses the request as such.
        """
        if self._closed:
            raise ToolUnavailable("the Python sandbox is closed")
        deadline = time.monotonic() + self._deadline_s + program.timeout_s
        while True:
            home = await self._home(program.session, deadline)
            try:
                return await self._send(home.url, program, home.name, deadline)
            except ServerLost:
                if self._homes.get(program.session) is home:
                    del self._homes[program.session]
            except ServerBusy:
                if program.session:
                    await self._servers.choose(deadline, [home.url])

    async def end(self, session: str) -> None:
        """Free a session; nothing happens where there is none, or its server is gone."""
        if (home := self._homes.pop(session, None)) is not None:
            deadline = time.monotonic() + END_S
            with contextlib.suppress(ServerBusy, ServerLost):
                await self._servers.send(home.url, "DELETE", f"/session/{home.name}", deadline=deadline)

    async def close(self) -> None:
        """Every session freed; the servers go on."""
        self._closed = True
        await asyncio.gather(*(self.end(session) for session in list(self._homes)))
        await self._servers.close()

    async def _home(self, session: str, deadline: float) -> Home:
        home = self._homes.get(session)
        if home is None or not self._servers.is_up(home.url):
            home = Home(await self._servers.choose(deadline), uuid4().hex if session else "")
            if session:
                self._homes[session] = home
        return home

    async def _send(self, url: str, program: Program, session: str, deadline: float) -> Execution:
        response = await self._servers.send(
            url,
            "POST",
            "/run_code",
            request(program, session),
            deadline=deadline,
            timeout_s=program.timeout_s + self._wait_s,
            is_failure=has_no_sandbox,
        )
        if 400 <= response.status_code < 500:
            raise ConfigError(f"{url} refuses the request (HTTP {response.status_code}): {response.text[:500]}")
        try:
            return execution(response.json()["run_result"], response.json()["files"])
        except (ValueError, KeyError, TypeError) as error:
            raise ToolUnavailable(
                f"{url} answers as no `otcrl serve python` would: HTTP {response.status_code} {response.text[:200]}"
            ) from error


def has_no_sandbox(response: Response) -> bool:
    """The server is there and its sandbox is not: nothing was run."""
    if response.status_code != 200 or '"SandboxError"' not in response.text:
        return False
    reply = response.json()
    return reply["status"] == "SandboxError" and reply["run_result"] is None


def request(program: Program, session: str) -> dict[str, Any]:
    """The body of `POST /run_code`."""
    return {
        "language": "python",
        "code": encodable(program.code),
        "stdin": encodable(program.stdin),
        "run_timeout": program.timeout_s,
        "memory_limit_MB": program.memory_mb,
        "max_bytes": program.max_bytes,
        "files": dict(program.files),
        "fetch_files": list(program.fetch),
        "session": session,
    }


def execution(result: dict[str, Any], files: dict[str, str]) -> Execution:
    """What the server's pool said, from a `run_result`."""
    state = State(result["outcome"])
    return Execution(
        state,
        code=abs(result["return_code"] or 0),
        stdout=result["stdout"],
        stderr=result["stderr"].removesuffix(REASONS.get(state, "")),
        value=result["value"],
        files=files,
        dropped=result["dropped"],
        seconds=result["execution_time"],
        fresh=result["fresh"],
    )


def with_reason(stderr: str, state: State) -> str:
    """`stderr` and why the program ended, for clients that do not know `outcome`."""
    reason = REASONS.get(state, "")
    return f"{stderr}\n{reason}" if reason and stderr and not stderr.endswith("\n") else f"{stderr}{reason}"
