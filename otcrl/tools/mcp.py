"""The tools of a Model Context Protocol server: a program on this machine (stdio), or a URL (streamable HTTP).

A connection lives on a thread with an event loop of its own: the SDK's sessions belong to the loop that opened them, a
tool may be used from any. What a tool says of the policy's arguments is its result. A server that dies, or does not
answer, is down, and the next call finds a new connection. Calls that were in flight are made once more there if the
server says of their tool that this does no harm; the others are not, for they may have had effects.
"""

from __future__ import annotations

import asyncio
import json
import os
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

from otcrl.errors import ConfigError, ToolUnavailable, nearest
from otcrl.protocols import ToolResult
from otcrl.secrets import public
from otcrl.tools.mcp_mending import mending
from otcrl.tools.python import shorten
from otcrl.types import Outcome

if TYPE_CHECKING:
    from mcp import Client
    from mcp.types import CallToolResult
    from mcp.types import Tool as RemoteTool

T = TypeVar("T")
END_S = 10.0  # for a server to end, which the SDK kills after 4
LAST_WORDS = 300  # characters of what a server wrote to stderr, in an error
KEPT = 4096  # bytes of it
PIPE = 65536  # bytes that wait in a pipe, at most
CONNECT_S, SILENT_S = 30.0, 300.0  # to connect and to write; without a byte of an answer. As the SDK has them
UNREADABLE = "what the tool returned cannot be read"
BY_HTTP = (
    "Session terminated",
    "Server returned an error response",
)  # the SDK's words for what a gateway may have said
MAX_DEPTH = 50  # of arguments; readers of JSON give up a message, and with it the connection, at 64, 128 or 200


@dataclass(frozen=True, kw_only=True, eq=False)
class MCPServer:
    """One server. `tools` are otcrl tools, each with the name, the description and the schema that the server gives."""

    command: Sequence[str] = ()  # a program and its arguments, spoken to by stdio
    env: Mapping[str, str] = field(default_factory=dict)  # of the program, beside PATH, HOME and the like
    folder: str | None = None  # that the program starts in; None: this one
    url: str | None = None  # or a server elsewhere, by streamable HTTP
    token_env: str | None = None  # environment variable with a bearer token for the url; None: none is sent
    only: Sequence[str] = ()  # tools to take; none: all of them
    prefix: str = ""  # before each tool's name, where two servers have one of the same
    timeout_s: float = 30.0  # of a call before the server counts as down
    start_timeout_s: float = 60.0  # to start, to shake hands and to list the tools
    max_output_chars: int = 4000  # shown of a result; head and tail are kept

    def __post_init__(self) -> None:
        if bool(self.command) == bool(self.url):
            raise ConfigError("name either command, a program and its arguments, or the url of a server")
        for name in ("timeout_s", "start_timeout_s", "max_output_chars"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} must be above 0, got {getattr(self, name)}")
        if self.token_env and not os.environ.get(self.token_env):
            raise ConfigError(f"token_env: the environment variable {self.token_env} is not set")

    def tools(self) -> list[MCPTool]:
        """What the server lists. Starts it. Raises ConfigError when it cannot be had, or lacks one of `only`."""
        try:
            listed = self._line.run(_list_tools, self.start_timeout_s)
        except ToolUnavailable as error:
            self._line.close()
            raise ConfigError(str(error)) from error
        known = {tool.name: tool for tool in listed}
        for name in self.only:
            if name not in known:
                self._line.close()
                raise ConfigError(f"only: {self.name} has no tool {name!r}.{nearest(name, known)}")
        return [
            MCPTool(
                name=f"{self.prefix}{name}",
                description=" ".join((tool.description or tool.title or name).split()),
                parameters=tool.input_schema,
                remote_name=name,
                server=self,
                repeatable=_is_repeatable(tool),
            )
            for name, tool in known.items()
            if not self.only or name in self.only
        ]

    @property
    def name(self) -> str:
        """For messages, which the policy and whoever reads transcripts see: without what is secret."""
        if self.url is None:
            return f"the MCP server {' '.join(public([*self.command]))!r}"
        parts = urlsplit(self.url)
        return (
            f"the MCP server {parts._replace(netloc=parts.netloc.rpartition('@')[2], query='', fragment='').geturl()!r}"
        )

    async def call(self, tool: str, arguments: Mapping[str, Any], repeatable: bool = False) -> ToolResult:
        """Raises ToolUnavailable when the server is down."""
        from mcp import MCPError
        from mcp.types import PARSE_ERROR

        try:
            result = await self._line.ask(
                lambda client: client.call_tool(tool, dict(arguments), read_timeout_seconds=self.timeout_s), repeatable
            )
        except MCPError as error:  # the others are the server's
            why = UNREADABLE if error.code == PARSE_ERROR else error.message
            return ToolResult(f"Error: {why}", Outcome.MODEL_ERROR)
        except (RuntimeError, ValueError):  # it does not keep to the schema that it gave, or to the protocol's
            return ToolResult(f"Error: {UNREADABLE}", Outcome.MODEL_ERROR)
        text = shorten(_text(result), self.max_output_chars)
        return ToolResult(text, Outcome.MODEL_ERROR if result.is_error else Outcome.OK)

    async def close(self) -> None:
        await asyncio.to_thread(self._line.close)

    @cached_property
    def _line(self) -> Line:
        return Line(self)


@dataclass(frozen=True, kw_only=True, eq=False)
class MCPTool:
    name: str
    description: str
    parameters: Mapping[str, Any]  # JSON schema of the object that `run` gets
    remote_name: str
    server: MCPServer
    repeatable: bool  # True: asking twice does no more than asking once, says the server

    async def run(self, arguments: str, session: str = "") -> ToolResult:
        given = self._object(arguments)
        if given is None:
            return ToolResult(f"Error: {self.name} takes a JSON object: {self._form}.", Outcome.MODEL_ERROR)
        if why := _unsendable(given):
            return ToolResult(f"Error: {self.name} takes no arguments that {why}.", Outcome.MODEL_ERROR)
        return await self.server.call(self.remote_name, given, self.repeatable)

    @property
    def timeout_s(self) -> float:
        return self.server.timeout_s

    async def release(self, session: str) -> None:
        """Nothing is kept for a trajectory: all of them share the server."""

    async def close(self) -> None:
        await self.server.close()

    def _object(self, arguments: str) -> Mapping[str, Any] | None:
        """What the policy wrote; a tool that takes one text may be given it bare."""
        try:
            given = json.loads(arguments, strict=False)
        except (ValueError, RecursionError):
            given = None
        if isinstance(given, Mapping):
            return given
        names = self.parameters.get("required") or list(self._kinds)
        if len(names) == 1 and self._kinds.get(names[0]) == "string":
            return {names[0]: arguments.strip()}
        return None

    @property
    def _kinds(self) -> dict[str, object]:
        """Of each argument; a schema may be true, which any value fits."""
        properties = self.parameters.get("properties") or {}
        return {
            name: schema.get("type", "any") if isinstance(schema, Mapping) else "any"
            for name, schema in properties.items()
        }

    @property
    def _form(self) -> str:
        required = self.parameters.get("required") or []
        listed = (f'"{name}": {kind}{"" if name in required else " (optional)"}' for name, kind in self._kinds.items())
        return f"{{{', '.join(listed)}}}"


def _unsendable(arguments: Mapping[str, Any]) -> str:
    """What keeps them from being sent; "" if nothing does. The SDK learns it too late: all lose the connection."""
    if not _is_flat(arguments, MAX_DEPTH):
        return f"are nested more than {MAX_DEPTH} levels deep"
    try:
        json.dumps(arguments, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        return f"hold half a surrogate pair, {error.object[error.start : error.end]!r}"
    return ""


def _is_flat(value: object, levels: int) -> bool:
    """Whether `value` is nested that deep at most."""
    inner = value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else None
    return inner is None or (levels > 0 and all(_is_flat(each, levels - 1) for each in inner))


def _is_repeatable(tool: RemoteTool) -> bool:
    hints = tool.annotations
    return hints is not None and bool(hints.read_only_hint or hints.idempotent_hint)


async def _list_tools(client: Client) -> list[RemoteTool]:
    page = await client.list_tools()
    found = list(page.tools)
    while page.next_cursor:
        page = await client.list_tools(cursor=page.next_cursor)
        found += page.tools
    return found


def _text(result: CallToolResult) -> str:
    """The texts of a result; what is none (a picture, a sound) by its kind."""
    shown = []
    for block in result.content:
        inner = getattr(block, "resource", block)
        text = getattr(inner, "text", getattr(inner, "uri", None))
        shown.append(f"[{block.type}]" if text is None else str(text))
    if not shown and result.structured_content is not None:
        shown = [json.dumps(result.structured_content, ensure_ascii=False)]
    return "\n".join(shown).strip() or "The tool returned nothing."


# -- the connection -----------------------------------------------------------------------------------------


class Line:
    """The server's connection, made at the first use and again after it was lost. Mutable; for any thread and loop."""

    def __init__(self, server: MCPServer) -> None:
        self._server, self._lock = server, threading.Lock()
        self._link: Link | None = None

    def run(self, work: Callable[[Client], Awaitable[T]], timeout_s: float) -> T:
        """What `work` gives, waited for in this thread. Raises ToolUnavailable."""
        link = self._connected()
        try:
            link.ready.result()  # it has its own deadline
            return link.start(work).result(timeout_s)
        except Exception as error:  # the SDK, its transports and the operating system raise what they like
            raise ToolUnavailable(self._lost(link, _why(error))) from error

    async def ask(self, work: Callable[[Client], Awaitable[T]], repeatable: bool) -> T:
        """What `work` gives; one that lost its connection is done once more if it is `repeatable`.

        Raises ToolUnavailable; the SDK's MCPError, RuntimeError and ValueError for what concerns this call alone.
        """
        from mcp import MCPError
        from mcp.types import CONNECTION_CLOSED, INVALID_PARAMS, PARSE_ERROR, REQUEST_TIMEOUT

        while True:
            link, begun = self._connected(), time.monotonic()
            try:
                await asyncio.shield(asyncio.wrap_future(link.ready))  # it has its own deadline
                answer = await asyncio.wrap_future(link.start(work))
            except MCPError as error:
                if error.code in (INVALID_PARAMS, PARSE_ERROR):
                    raise
                is_gone = self._link is not link or error.code == CONNECTION_CLOSED  # another call may have given it up
                is_late = error.code == REQUEST_TIMEOUT
                if not is_gone and is_late and link.answered > begun:  # others were served: this call is slow
                    raise ToolUnavailable(f"{self._server.name} did not answer one call: {error}") from error
                is_whole = self._server.url is None or error.message not in BY_HTTP
                if not is_gone and not is_late and is_whole:
                    raise ToolUnavailable(f"{self._server.name} failed in one call: {error}") from error
                why = self._lost(link, str(error))
                if not (is_gone and repeatable):
                    raise ToolUnavailable(why) from error
                repeatable = False
            except (RuntimeError, ValueError) as error:
                if self._link is link and link.is_open:
                    link.answered = time.monotonic()
                    raise
                raise ToolUnavailable(self._lost(link, _why(error))) from error
            except Exception as error:  # as in `run`
                raise ToolUnavailable(self._lost(link, _why(error))) from error
            else:
                link.answered = time.monotonic()
                return answer

    def _lost(self, link: Link, why: str) -> str:
        """An error's text; the next use makes a new connection."""
        link.end()
        with self._lock:
            self._link = None if self._link is link else self._link
        words = link.last_words()
        return f"{self._server.name} is down: {why}.{f' It last wrote: {words}' if words else ''}"

    def close(self) -> None:
        with self._lock:
            link, self._link = self._link, None
        if link is not None:
            link.end()
            link.thread.join(END_S)

    def _connected(self) -> Link:
        with self._lock:
            if self._link is None:
                self._link = Link(self._server)
            return self._link


class Link:
    """One connection, from its handshake to its end, on a thread of its own."""

    def __init__(self, server: MCPServer) -> None:
        self._server = server
        heard, spoken = os.pipe()  # the server's stderr, which is a file to the SDK; of a file only its end is wanted
        os.set_blocking(heard, False)
        self._heard, self._stderr = os.fdopen(heard, "rb", buffering=0), os.fdopen(spoken, "w")
        self._words, self._hearing = b"", threading.Lock()
        self.answered = 0.0  # when the server last did, on time.monotonic's clock
        self._loop = asyncio.new_event_loop()
        self._loop.add_reader(heard, self._hear)
        self._over = asyncio.Event()
        self.ready: Future[Client] = Future()
        self.thread = threading.Thread(target=self._live, name=server.name, daemon=True)
        self.thread.start()

    def start(self, work: Callable[[Client], Awaitable[T]]) -> Future[T]:
        async def run() -> T:
            return await work(self.ready.result())

        return asyncio.run_coroutine_threadsafe(run(), self._loop)

    def end(self) -> None:
        """Asks the connection to end, and the server with it, without waiting."""
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._over.set)

    @property
    def is_open(self) -> bool:
        return self.thread.is_alive() and not self._over.is_set()

    def last_words(self) -> str:
        """What the server last wrote to stderr."""
        self._hear()  # the loop may not have come to it yet
        return " ".join(self._words.decode(errors="replace")[-LAST_WORDS:].split())

    def _hear(self) -> None:
        """Takes what waits in the pipe, lest the server wait for room, and keeps the end of it."""
        with self._hearing:
            if not self._heard.closed:
                self._words = (self._words + (self._heard.read(PIPE) or b""))[-KEPT:]

    def _live(self) -> None:
        with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
            runner.run(self._connection())
        self._hear()
        with self._hearing:
            self._heard.close()
            self._stderr.close()

    async def _connection(self) -> None:
        from mcp import Client

        try:
            async with (
                asyncio.timeout(self._server.start_timeout_s) as start,
                self._transport() as transport,
                Client(transport) as client,
            ):
                start.reschedule(None)
                self.ready.set_result(client)
                await self._over.wait()
        except Exception as error:  # of the SDK, its transports and the operating system; told to whoever waits
            if not self.ready.done():
                self.ready.set_exception(error)

    @asynccontextmanager
    async def _transport(self) -> AsyncIterator[Any]:
        """What the SDK's client speaks through."""
        from mcp import StdioServerParameters
        from mcp.client.stdio import stdio_client
        from mcp.client.streamable_http import streamable_http_client

        server = self._server
        if server.url is None:
            program, *arguments = server.command
            parameters = StdioServerParameters(
                command=program,
                args=arguments,
                env=dict(server.env),
                cwd=server.folder,
                encoding_error_handler="replace",  # else a byte that is no UTF-8 ends the connection
            )
            yield mending(stdio_client(parameters, errlog=self._stderr))
        else:
            import httpx2  # the SDK's own

            headers = {"Authorization": f"Bearer {os.environ[server.token_env]}"} if server.token_env else {}
            # a call has its deadline elsewhere; whoever waits in line for one of 100 connections would lose the link
            timeout = httpx2.Timeout(CONNECT_S, read=max(SILENT_S, server.timeout_s), pool=None)
            limits = httpx2.Limits(max_connections=None)
            async with httpx2.AsyncClient(headers=headers, timeout=timeout, limits=limits) as http:
                yield streamable_http_client(server.url, http_client=http)


def _why(error: BaseException) -> str:
    """The first cause in a group of errors, which is what the SDK's task groups raise."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    if isinstance(error, TimeoutError) and not str(error):
        return "it does not answer"
    return f"{type(error).__name__}: {error}".rstrip(": ")
