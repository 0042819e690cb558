"""Several servers as one: the least busy is asked, one that fails is left alone for a while.

Only what is the infrastructure's fault is tried again: no connection, a connection that broke, 429, 502, 503, 504.
Any other answer is the caller's to judge.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import importlib.util
import random
import resource
import threading
import time
from collections.abc import Awaitable, Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING
from urllib.parse import urlsplit
from weakref import WeakKeyDictionary

from otcrl.errors import ConfigError, ToolUnavailable
from otcrl.tell import tell

if TYPE_CHECKING:
    from httpx import AsyncClient, Response

CONNECT_S = 5.0
BACKOFF_S = 0.05  # after a first failure; doubled by each one that follows
BUSY_S = 1.0  # after a 429 that does not say how long
FULL = "this process has as many files and connections open as it may"
MOST_FILES = 65_536  # that a process asks for
LEAST_S = 0.1  # after one that says 0
PROBING_S = 0.05  # how often to look whether somebody's probe came back
JITTER = 0.25  # of a wait, on top of it: those who were refused together do not come back together
DOWN = (502, 503, 504)


class NotServed(Exception):
    """One attempt that came to nothing; never leaves the clients."""


class ServerBusy(NotServed):
    """The server refused for now: the request was certainly not served."""


class ServerLost(NotServed):
    """The server failed: the request may have been served or not."""


Read = Callable[["Response"], Awaitable[object]]


def never(response: Response) -> bool:
    return False


async def whole(response: Response) -> None:
    await response.aread()


@dataclass(slots=True, eq=False)
class Server:
    """What is known of one server, and its circuit breaker."""

    url: str
    outstanding: int = 0
    failures: int = 0  # in a row
    not_before: float = 0.0  # time.monotonic(); nothing is sent until then
    is_probed: bool = False  # one request finds out whether it is back
    last_failure: str = ""


class Servers:
    """Mutable; may be used from any event loop.

    Each loop has an HTTP client of its own, because connections belong to a loop. No connection is kept between
    requests: an idle one that the server closes looks like a failure, and would outlive its loop.
    """

    def __init__(
        self,
        urls: Sequence[str],
        token: str | None = None,
        *,
        timeout_s: float = 60.0,  # of one attempt
        deadline_s: float = 180.0,  # of a request, with all its attempts and waits
        failures: int = 3,  # in a row that open a server's breaker
        open_s: float = 5.0,  # until one request probes it
        connections: int = 256,  # at a time, of one loop
        uses_proxy: bool = False,  # that of the environment; servers of one's own are asked without
    ) -> None:
        """Raises ConfigError for what is no URL, for a token that no header can carry, and without httpx."""
        if importlib.util.find_spec("httpx") is None:
            raise ConfigError("speaking to servers needs httpx: pip install 'otcrl[serve]'")
        self._servers = {url: Server(url) for url in map(checked_url, urls)}
        if not self._servers:
            raise ConfigError("urls: name at least one server, e.g. http://127.0.0.1:8080")
        for name, value in {"timeout_s": timeout_s, "deadline_s": deadline_s, "open_s": open_s}.items():
            if not value > 0:
                raise ConfigError(f"{name} must be above 0, got {value}")
        self.urls, self.timeout_s, self.deadline_s = tuple(self._servers), timeout_s, deadline_s
        self._headers = {"Authorization": f"Bearer {checked_token(token)}"} if token else {}
        self._failures, self._open_s, self._connections = failures, open_s, connections
        self._uses_proxy = uses_proxy
        room_for_connections()
        self._lock = threading.Lock()  # loops run in threads
        self._clients: WeakKeyDictionary[asyncio.AbstractEventLoop, AsyncClient] = WeakKeyDictionary()

    async def request(
        self,
        method: str,
        path: str,
        body: object = None,
        *,
        is_failure: Callable[[Response], bool | str] = never,
        read: Read = whole,
    ) -> Response:
        """The first answer that is no infrastructure error, from whichever server.

        A request whose server failed is sent again, so it must not matter if it is served twice.
        `is_failure` may count more answers as such; `read` takes the body of each, and may do so in part.
        Raises ToolUnavailable after `deadline_s`.
        """
        deadline = time.monotonic() + self.deadline_s
        while True:
            url = await self.choose(deadline)
            with contextlib.suppress(NotServed):
                return await self.send(url, method, path, body, deadline=deadline, is_failure=is_failure, read=read)

    async def choose(self, deadline: float, among: Collection[str] = ()) -> str:
        """The least busy server that takes requests, as soon as one does; `among` some, if given.

        Raises ToolUnavailable when none will before `deadline` (time.monotonic()).
        """
        servers = [server for server in self._servers.values() if not among or server.url in among]
        while True:
            now = time.monotonic()
            free = [server for server in servers if self._is_free(server, now)]
            if free and now < deadline:
                return min(free, key=lambda server: (server.outstanding, random.random())).url
            wait = max(PROBING_S, min(server.not_before for server in servers) - now)
            wait *= 1 + random.uniform(0, JITTER)
            if now + wait > deadline:
                raise ToolUnavailable("; ".join(f"{server.url}: {server.last_failure}" for server in servers))
            await asyncio.sleep(wait)

    def is_up(self, url: str) -> bool:
        """Whether its breaker is closed."""
        return self._servers[url].failures < self._failures

    async def send(
        self,
        url: str,
        method: str,
        path: str,
        body: object = None,
        *,
        deadline: float,
        timeout_s: float | None = None,
        is_failure: Callable[[Response], bool | str] = never,
        is_busy: Callable[[Response], bool] = never,
        read: Read = whole,
    ) -> Response:
        """One attempt at one server; `is_failure` may say why, `is_busy` names refusals for now, beside 429.

        Raises ServerBusy or ServerLost.
        """
        import httpx

        server, left = self._servers[url], max(0.001, deadline - time.monotonic())
        seconds = min(left, timeout_s or self.timeout_s)
        timeout = httpx.Timeout(seconds, connect=min(seconds, CONNECT_S), pool=left)
        with self._attempt(server):
            try:
                async with self._client().stream(method, url + path, json=body, timeout=timeout) as response:
                    await (whole if response.is_error else read)(response)
            except httpx.PoolTimeout:
                server.last_failure = f"more than {self._connections} requests at a time"
                raise ServerBusy from None
            except httpx.RequestError as error:
                if out_of_files(error):  # this process is, and no server is to blame
                    server.last_failure = FULL
                    server.not_before = time.monotonic() + BACKOFF_S
                    say_full()
                    raise ServerBusy from None
                raise self._lost(server, f"{type(error).__name__} {error}".strip()) from error
        if response.status_code == 429 or is_busy(response):
            server.failures, server.last_failure = 0, f"it is busy (HTTP {response.status_code})"
            server.not_before = time.monotonic() + retry_after(response)
            raise ServerBusy
        if why := response.status_code in DOWN or is_failure(response):
            raise self._lost(
                server, why if isinstance(why, str) else f"HTTP {response.status_code} {response.text[:200]}"
            )
        server.failures = 0
        return response

    async def close(self) -> None:
        """Free this loop's client; the other loops' hold nothing open."""
        if (client := self._clients.pop(asyncio.get_running_loop(), None)) is not None:
            await client.aclose()

    def _is_free(self, server: Server, now: float) -> bool:
        """With its breaker open, only for one request at a time."""
        return now >= server.not_before and (self.is_up(server.url) or not server.is_probed)

    @contextlib.contextmanager
    def _attempt(self, server: Server) -> Iterator[None]:
        with self._lock:
            is_probe = not self.is_up(server.url)
            server.is_probed |= is_probe
            server.outstanding += 1
        try:
            yield
        finally:
            with self._lock:
                server.outstanding -= 1
                server.is_probed &= not is_probe

    def _lost(self, server: Server, why: str) -> ServerLost:
        server.failures += 1
        backoff = min(self._open_s, BACKOFF_S * 2 ** min(server.failures, 16))
        server.not_before = time.monotonic() + (backoff if self.is_up(server.url) else self._open_s)
        server.last_failure = why
        return ServerLost(f"{server.url}: {why}")

    def _client(self) -> AsyncClient:
        import httpx

        loop = asyncio.get_running_loop()
        if loop not in self._clients:
            limits = httpx.Limits(max_connections=self._connections, max_keepalive_connections=0)
            self._clients[loop] = httpx.AsyncClient(headers=self._headers, limits=limits, trust_env=self._uses_proxy)
        return self._clients[loop]


def out_of_files(error: BaseException | None) -> bool:
    """Whether it came of a connection that this process, or this machine, could not open for want of files."""
    while error is not None:
        causes = [error, *getattr(error, "exceptions", ())]
        if any(isinstance(each, OSError) and each.errno in (errno.EMFILE, errno.ENFILE) for each in causes):
            return True
        error = error.__cause__ or error.__context__
    return False


@cache
def say_full() -> None:
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    tell(f"{FULL}, which is {soft}: requests wait for each other. Raise `ulimit -n`, or lower rollout.concurrency")


def room_for_connections() -> None:
    """Each request has a connection of its own, and many systems allow 1024 files where more may be asked for."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MOST_FILES if hard == resource.RLIM_INFINITY else min(hard, MOST_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def retry_after(response: Response) -> float:
    """Seconds; a date, which HTTP allows too, counts as not saying."""
    text = response.headers.get("Retry-After", "")
    return max(float(text), LEAST_S) if text.isdigit() else BUSY_S


def checked_url(url: str) -> str:
    """`url` without a slash at its end."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
        raise ConfigError(f"urls: {url!r} is no server's address; write it as http://HOST:PORT")
    return url.rstrip("/")


def checked_token(token: str) -> str:
    if not (token.isascii() and token.isprintable()) or " " in token:
        raise ConfigError("token: only printable ASCII without spaces fits into an HTTP header")
    return token
