"""The text of an OpenAI-compatible endpoint as it comes, until a stop string is in it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from otcrl.errors import EngineError

if TYPE_CHECKING:
    from httpx import Response


@dataclass(slots=True)
class StreamedText:
    """A completion as it streams in, up to and with the first stop string."""

    stop: Sequence[str]
    text: str = ""
    end: str | None = None  # finish_reason; None: there is more to come
    at_stop: bool = False  # it ended with one of `stop`

    async def read(self, response: Response) -> None:
        """Takes what there is of an answer, until it has ended. Raises EngineError for what is none."""
        self.text, self.end, self.at_stop = "", None, False
        try:
            if "text/event-stream" not in response.headers.get("content-type", ""):
                self._take(json.loads(await response.aread()))  # it does not stream
                return
            async for line in response.aiter_lines():
                said = line.removeprefix("data:").strip() if line.startswith("data:") else ""
                if said and said != "[DONE]":
                    self._take(json.loads(said))
                if self.end:
                    return
        except (ValueError, KeyError, TypeError) as error:
            raise EngineError(f"{response.request.url} is no OpenAI-compatible endpoint: {error!r}") from error

    def _take(self, chunk: Mapping[str, Any]) -> None:
        if "error" in chunk:
            raise EngineError(f"the server failed in the middle of an answer: {chunk['error']}")
        for choice in chunk["choices"][:1]:  # none in the one that counts tokens
            self.text += choice.get("text") or ""
            self.end = choice.get("finish_reason")
            if found := [at + len(each) for each in self.stop if (at := self.text.find(each)) >= 0]:
                self.text, self.end, self.at_stop = self.text[: min(found)], "stop", True
