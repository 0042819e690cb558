"""Messages of an MCP server that the SDK's reader of JSON gives up, and Python can read."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from mcp.client._transport import ReadStream, TransportStreams
    from mcp.shared.message import SessionMessage


@asynccontextmanager
async def mending(transport: AbstractAsyncContextManager[TransportStreams]) -> AsyncIterator[TransportStreams]:
    async with transport as (heard, spoken):
        yield Mending(heard), spoken


@dataclass(frozen=True)
class Mending:
    """The server's messages; one that holds half a surrogate pair has "?" for it.

    The SDK's reader of JSON takes no such message, and whoever waits for it would wait in vain.
    """

    stream: ReadStream[SessionMessage | Exception]

    async def receive(self) -> SessionMessage | Exception:
        return mended(await self.stream.receive())

    async def aclose(self) -> None:
        await self.stream.aclose()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> SessionMessage | Exception:
        return mended(await self.stream.__anext__())

    async def __aenter__(self) -> Self:
        await self.stream.__aenter__()
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc_val: BaseException | None, exc_tb: TracebackType | None
    ) -> bool | None:
        return await self.stream.__aexit__(exc_type, exc_val, exc_tb)


def mended(message: SessionMessage | Exception) -> SessionMessage | Exception:
    """The message that an error of the SDK's reader was about, if Python can read it; else as it is."""
    from mcp.shared.message import SessionMessage
    from mcp.types import jsonrpc_message_adapter

    if isinstance(message, SessionMessage) or not isinstance(message, ValueError):
        return message
    try:
        (wrong,) = getattr(message, "errors", list)()  # pydantic's
        text = json.dumps(json.loads(wrong["input"]), ensure_ascii=False).encode(errors="replace")
        return SessionMessage(jsonrpc_message_adapter.validate_json(text, by_name=False))
    except (ValueError, TypeError, KeyError, RecursionError):
        return message
