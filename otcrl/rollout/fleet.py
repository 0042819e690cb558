"""Rollout servers behind HTTP: which of them are in, and which trajectory is with which.

A trajectory stays with its server, which has its prefix in the cache. A server that does not answer is out at once:
whatever it was asked is asked of another. It is in again when it has been given the current weights.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import sys
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from otcrl.errors import ConfigError, EngineError
from otcrl.tell import tell
from otcrl.tools.remote import ServerBusy, ServerLost, Servers

if TYPE_CHECKING:
    from httpx import Response

ANSWER_S = 30.0  # for what takes no time; a server that needs longer hangs
LONGEST_S = 24 * 3600.0  # of a request for tokens: whether its server still works, the beats find out
BUSY_S = 0.1  # after a refusal for now
CONNECTIONS = 16_384


@dataclass(slots=True, eq=False)
class Server:
    url: str
    version: int | None = None  # of the weights that it was given; None: it is out
    is_up: bool = True  # it may be given weights; True at first, to find out
    why: str = ""  # it was out, or is; empty if never
    losses: int = 0  # how often it was out: it may be another process each time
    sessions: set[str] = field(default_factory=set)  # trajectories that are with it
    generating: int = 0  # requests for tokens
    asked: set[asyncio.Future[Response]] = field(default_factory=set)  # requests of any kind
    chosen: int = 0  # a running number: the last time that a trajectory came


class Fleet:
    """Mutable; of one event loop."""

    def __init__(self, urls: Sequence[str], key: str | None = None) -> None:
        """Raises ConfigError for what is no URL."""
        self._http = Servers(urls, key, timeout_s=LONGEST_S, deadline_s=LONGEST_S, connections=CONNECTIONS)
        self.servers = [Server(url) for url in self._http.urls]
        self._homes: dict[str, Server] = {}
        self._numbers = itertools.count(1)

    @property
    def inside(self) -> list[Server]:
        return [server for server in self.servers if server.version is not None]

    def why_out(self) -> str:
        return "; ".join(
            f"{server.url}: {server.why or 'never asked'}" for server in self.servers if server.version is None
        )

    # -- trajectories -----------------------------------------------------------------------------------

    def route(self, session: str, turn: int | None = None) -> Server | None:
        """Where `session` is, or from now on will be: with who has least to do, or whose `turn` it is.

        None: all are out.
        """
        server = self._homes.get(session)
        if server is not None and server.version is not None:
            return server
        self.release(session)
        free = self.inside
        if not free:
            return None
        least = min(free, key=lambda s: (len(s.sessions), s.generating, s.chosen))
        server = least if turn is None else free[turn % len(free)]
        server.chosen = next(self._numbers)
        server.sessions.add(session)
        self._homes[session] = server
        return server

    def release(self, session: str) -> None:
        if (server := self._homes.pop(session, None)) is not None:
            server.sessions.discard(session)

    # -- requests ---------------------------------------------------------------------------------------

    async def ask(
        self, server: Server, method: str, path: str, body: object = None, *, timeout_s: float = ANSWER_S
    ) -> Response:
        """Its answer. Raises ServerLost when there is none: then the server is out; EngineError when it refuses."""
        response = await self.attempt(server, method, path, body, timeout_s=timeout_s)
        if response.is_server_error:
            await self.attempt(server, "GET", "/health")  # it may be dying of something else
        if response.is_error:
            raise EngineError(f"{server.url}{path} answered {response.status_code}: {response.text[:1000]}")
        return response

    async def attempt(
        self, server: Server, method: str, path: str, body: object = None, *, timeout_s: float = ANSWER_S
    ) -> Response:
        """The same, whatever the answer."""
        until = time.monotonic() + LONGEST_S
        sending = self._http.send(
            server.url, method, path, body, deadline=until, timeout_s=timeout_s, is_busy=is_paused
        )
        asking = asyncio.ensure_future(sending)
        server.asked.add(asking)
        try:
            return await asking
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            raise ServerLost(f"{server.url}: {server.why}") from None  # by `eject`
        except ServerBusy as error:
            await asyncio.sleep(BUSY_S)
            raise ServerLost(f"{server.url} is busy") from error
        except ServerLost as error:
            self.eject(server, str(error).removeprefix(f"{server.url}: "))
            raise
        finally:
            server.asked.discard(asking)

    async def rpc(self, server: Server, method: str, *arguments: object, timeout_s: float = ANSWER_S) -> list[Any]:
        """What each of its workers answers to a method of `vllm_worker.Receiver`."""
        body = {"method": method, "args": list(arguments)}
        response = await self.ask(server, "POST", "/collective_rpc", body, timeout_s=timeout_s)
        return response.json()["results"] if response.content else []

    async def each(self, servers: Sequence[Server], work: Callable[[Server], Awaitable[object]]) -> list[Server]:
        """Those that did the work, all at once; the others are out. Raises an EngineError when all have ended."""
        results = await asyncio.gather(*(work(server) for server in servers), return_exceptions=True)
        for result in results:
            if isinstance(result, BaseException) and not isinstance(result, ServerLost):
                raise result
        return [s for s, result in zip(servers, results, strict=True) if not isinstance(result, ServerLost)]

    # -- out and in -------------------------------------------------------------------------------------

    def eject(self, server: Server, why: str) -> None:
        """Nothing is asked of it until it is admitted; who waits for its answer hears that it is lost."""
        if server.version is not None or not server.why:
            tell(f"{server.url} is out: {why}", sys.stdout)
        server.version, server.is_up, server.why = None, False, why
        server.losses += 1
        for asking in server.asked:
            asking.cancel()

    def admit(self, server: Server, version: int) -> None:
        if server.why:
            tell(f"{server.url} is in again, with version {version}", sys.stdout)
        server.version, server.is_up, server.why = version, True, ""

    async def close(self) -> None:
        await self._http.close()


def is_paused(response: Response) -> bool:
    """Whether vLLM refused a request because it is paused (from 0.33; before, it kept such requests)."""
    return response.status_code == 503 and "ServiceUnavailableError" in response.text


def share_of_rank(urls: Sequence[str], environment: Mapping[str, str] = os.environ) -> list[str]:
    """Of the servers, those of this process: all, or under torchrun every rank has its own. Raises ConfigError."""
    rank, ranks = int(environment.get("RANK", 0)), int(environment.get("WORLD_SIZE", 1))
    mine = list(urls)[rank::ranks]
    if not mine:
        raise ConfigError(f"urls: {ranks} ranks need a server each, and there are {len(urls)}")
    return mine


@contextmanager
def named(server: Server) -> Iterator[None]:
    """An EngineError in the body says which server it is about."""
    try:
        yield
    except EngineError as error:
        raise EngineError(f"{server.url}: {error}") from error
