"""A real MCP server, for the tests to start: `python -m tests.mcp_server [--http PORT]`."""

from __future__ import annotations

import asyncio
import os
import sys

from mcp.server.mcpserver import MCPServer
from mcp.server.mcpserver.exceptions import ToolError
from mcp.types import ToolAnnotations

server = MCPServer("tests")


@server.tool()
def add(a: int, b: int) -> int:
    """Adds two
    whole numbers."""
    return a + b


@server.tool()
def shout(text: str) -> str:
    """Says it in capitals."""
    return text.upper()


@server.tool()
def fail(why: str) -> str:
    """Fails as it is told."""
    raise ToolError(why)


@server.tool()
async def wait(seconds: float) -> str:
    """Waits."""
    await asyncio.sleep(seconds)
    return "waited"


@server.tool()
def hang(seconds: float) -> str:
    """Stops the whole server."""
    import time

    time.sleep(seconds)
    return "hung"


@server.tool()
def die() -> str:
    """Ends the server in the middle of the call."""
    print("these are my last words", file=sys.stderr, flush=True)
    os._exit(3)


@server.tool()
def chatter(kilobytes: int) -> str:
    """Writes that much to stderr."""
    for _ in range(kilobytes):
        print("x" * 1023, file=sys.stderr)
    print("that was all", file=sys.stderr, flush=True)
    return "written"


@server.tool(annotations=ToolAnnotations(read_only_hint=True))
async def look(seconds: float) -> int:
    """Waits, and says the server's process."""
    await asyncio.sleep(seconds)
    return os.getpid()


@server.tool()
def process() -> int:
    """The server's process."""
    return os.getpid()


@server.tool()
def environment(name: str) -> str:
    """A variable of the server's environment."""
    return os.environ.get(name, "not set")


@server.tool()
def long() -> str:
    """More than anybody reads."""
    return "a" * 5000 + "b" * 5000


@server.tool()
def nothing() -> str:
    """Gives nothing."""
    return ""


if __name__ == "__main__":
    if "--fail" in sys.argv:
        sys.exit("no such port")
    if "--http" in sys.argv:
        server.run("streamable-http", host="127.0.0.1", port=int(sys.argv[-1]))
    else:
        server.run("stdio")
