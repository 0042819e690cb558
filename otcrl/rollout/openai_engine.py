"""Any OpenAI-compatible endpoint as the engine, for `otcrl eval`: it cannot be given weights, so it cannot be trained.

A server that takes token ids as a prompt and gives them back (vLLM) is spoken to in token ids, as everywhere in otcrl.
Any other gets text, and its text is encoded with our tokenizer; evaluation reads nothing but the text. Then the stop
strings are not sent: a reply that ended at one does not say at which, and none says whether it was one or the end of
the text. The text is streamed instead, and listening ends with the first stop string in it, which ends the request.

/v1/chat/completions is not spoken: the server would put the prompt into a template of its own, and a turn could not be
continued in the middle of an assistant's text, where a tool's result belongs. `model.chat` applies the template here.
"""

from __future__ import annotations

import asyncio
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from otcrl.errors import EngineError, ToolUnavailable
from otcrl.protocols import Completion
from otcrl.rollout.completions_api import continued, to_continue
from otcrl.rollout.streamed_text import StreamedText
from otcrl.rollout.submission import Part, check_request, complete, sampling
from otcrl.tools.remote import Read, Servers, whole

if TYPE_CHECKING:
    from httpx import Response
    from torch import Tensor

    from otcrl.models.tokenizer import HFTokenizer

NOT_ALLOWED = (401, 403)
NOT_UNDERSTOOD = (400, 422, 500)  # what servers say to a prompt of token ids that they do not take


@dataclass(kw_only=True)
class OpenAIEngine:
    tokenizer: HFTokenizer
    base_url: str  # of the API, with its version: http://127.0.0.1:8000/v1
    model: str  # by the name that the server has for it
    api_key_env: str  # environment variable that holds the key; no key is sent when it is not set
    context: int  # most tokens a trajectory may hold
    max_sequences: int  # requests at a time; more wait
    batch_tokens: int  # without effect: how a server batches is its own matter, and presets size every engine
    tokens: Literal["auto", "ids", "text"]  # what is exchanged; auto: ids where the server gives them
    timeout_s: float  # without a byte from the server; then it is asked again
    patience_s: float  # of one request with all its attempts
    wired: ClassVar[frozenset[str]] = frozenset({"tokenizer"})
    trains: ClassVar[bool] = False
    version: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        if self.base_url.rstrip("/").endswith("/completions"):
            raise ValueError(
                f"base_url ends with the version of the API, e.g. http://HOST:PORT/v1; got {self.base_url}"
            )
        for name in ("context", "max_sequences"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        self._key = os.environ.get(self.api_key_env, "")
        self._servers = Servers(
            [self.base_url],
            self._key or None,
            timeout_s=self.timeout_s,
            deadline_s=self.patience_s,
            connections=self.max_sequences,
            uses_proxy=True,
        )
        self._slots = asyncio.Semaphore(self.max_sequences)
        self._first = asyncio.Lock()
        self._by_ids: bool | None = None  # not known before the first request
        self._is_our_vocabulary = False  # until an answer showed it

    async def generate(
        self,
        token_ids: Sequence[int],
        *,
        stop: Sequence[str],
        max_tokens: int,
        temperature: float,
        seed: int,
        session: str,
        priority: int = 0,
    ) -> Completion:
        """See `Engine.generate`. As text, log-probs are NaN: nobody knows those of our tokens."""
        check_request(token_ids, stop, max_tokens, temperature, self.context)
        if self._by_ids is None:
            async with self._first:
                if self._by_ids is None:
                    self._by_ids = await self._find_out(token_ids)

        async def submit(ids: list[int], most: int, seed: int) -> Part:
            if self._by_ids:
                return await self._continue_ids(ids, sampling(stop, most, temperature, seed, self.tokenizer))
            return await self._continue_text(ids, stop, most, temperature, seed)

        return await complete(
            submit,
            token_ids,
            stop=stop,
            max_tokens=max_tokens,
            seed=seed,
            context=self.context,
            tokenizer=self.tokenizer,
        )

    async def score(self, token_ids: Sequence[int]) -> list[float]:
        raise EngineError(self._only_evaluates("score tokens for the learner"))

    def release(self, session: str) -> None:
        """Nothing to do: the server keeps what it likes."""

    async def sleep(self) -> None:
        raise EngineError(self._only_evaluates("sleep"))

    async def load_weights(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        raise EngineError(self._only_evaluates("load weights"))

    async def close(self) -> None:
        await self._servers.close()

    def _only_evaluates(self, what: str) -> str:
        return f"the openai engine cannot {what}: it only evaluates. Train with hf, vllm or vllm_servers"

    # -- token ids --------------------------------------------------------------------------------------

    async def _continue_ids(self, ids: list[int], settings: Mapping[str, Any]) -> Part:
        response = await self._post({**to_continue(ids, settings), "model": self.model})
        answer = self._json(response)
        try:
            part, text = continued(answer, self.version), answer["choices"][0]["text"]
        except (KeyError, IndexError, TypeError) as error:
            raise EngineError(f"{self._url} gave no token ids with their log-probs: set engine.tokens=text") from error
        if not self._is_our_vocabulary:
            self._check_vocabulary(part.token_ids, text)
        return part

    def _check_vocabulary(self, ids: Sequence[int], text: str) -> None:
        """Raises EngineError when the server reads the ids that it sampled otherwise than our tokenizer."""
        ours, theirs = (squeezed(each) for each in (self.tokenizer.decode(ids), text))
        if not ours.startswith(theirs):
            raise EngineError(
                f"{self._url} says that its tokens {list(ids[:8])} are {text[:40]!r}, and the tokenizer of "
                f"model.path says {self.tokenizer.decode(ids)[:40]!r}: name the tokenizer of {self.model!r}"
            )
        self._is_our_vocabulary = bool(theirs)

    # -- text -------------------------------------------------------------------------------------------

    async def _continue_text(
        self, ids: Sequence[int], stop: Sequence[str], max_tokens: int, temperature: float, seed: int
    ) -> Part:
        """`max_tokens` counts the server's tokens first, then ours: a text that has more of ours is cut."""
        start = self.tokenizer.hf.bos_token_id  # the server puts its own
        heard = StreamedText(stop)
        await self._post(
            {
                "model": self.model,
                "prompt": self.tokenizer.decode(ids[1:] if ids[0] == start else ids),
                "max_tokens": max_tokens,
                "temperature": temperature,
                "seed": seed % 2**31,  # some servers take no more bits
                "stream": True,
            },
            heard.read,
            lambda response: "" if heard.end or response.is_error else "its answer broke off",
        )
        found = self.tokenizer.encode(heard.text)
        if heard.end == "stop" and not heard.at_stop:
            found.append(self.tokenizer.end_id)
        end = heard.end if len(found) <= max_tokens else "length"
        found = found[:max_tokens]
        return Part(found, [math.nan] * len(found), self.version, "stop" if end == "stop" else "length")

    # -- requests ---------------------------------------------------------------------------------------

    @property
    def _url(self) -> str:
        return f"{self._servers.urls[0]}/completions"

    async def _find_out(self, token_ids: Sequence[int]) -> bool:
        """Whether the server takes and gives token ids."""
        await self._check_context()
        by_ids = self.tokens == "ids"
        if self.tokens == "auto":
            settings = sampling((), 1, 0.0, 0, self.tokenizer)
            body = {**to_continue(token_ids, settings), "model": self.model}
            response = await self._send("POST", "/completions", body)
            if response.is_error and response.status_code not in NOT_UNDERSTOOD:
                raise self._refused(response)
            by_ids = response.is_success and gives_ids(self._json(response), token_ids)
        what = "token ids" if by_ids else "text, which is encoded here"
        print(f"otcrl: {self._servers.urls[0]} is spoken to in {what}")
        return by_ids

    async def _check_context(self) -> None:
        """Raises EngineError for a key that is not taken, and when the server says (vLLM does) that it takes less."""
        response = await self._send("GET", "/models")
        if response.status_code in NOT_ALLOWED:
            raise self._refused(response)
        if response.is_error:
            return
        listed = self._json(response).get("data") or []
        most = next((each.get("max_model_len") for each in listed if each.get("id") == self.model), None)
        if most is not None and most < self.context:
            raise EngineError(
                f"engine.context is {self.context}, and {self.model!r} at {self._url} takes {most} tokens"
            )

    async def _post(self, body: Mapping[str, Any], read: Read = whole, fails: Any = lambda response: "") -> Response:
        """The answer to a completion. Raises EngineError with the URL and the body when there is none."""

        def is_failure(response: Response) -> str:
            return (
                f"HTTP {response.status_code} {self._said(response)}" if response.is_server_error else fails(response)
            )

        response = await self._send("POST", "/completions", body, is_failure, read)
        if response.is_error:
            raise self._refused(response)
        return response

    async def _send(
        self, method: str, path: str, body: object = None, is_failure: Any = lambda response: "", read: Read = whole
    ) -> Response:
        async with self._slots:
            try:
                return await self._servers.request(method, path, body, is_failure=is_failure, read=read)
            except ToolUnavailable as error:
                raise EngineError(f"no completion within engine.patience_s={self.patience_s:g} s: {error}") from error

    def _refused(self, response: Response) -> EngineError:
        hint = ""
        if response.status_code in NOT_ALLOWED:
            state = "holds the key that was sent" if self._key else "is not set"
            hint = f" (the environment variable {self.api_key_env}, engine.api_key_env, {state})"
        return EngineError(f"{response.request.url} answered {response.status_code}: {self._said(response)}{hint}")

    def _said(self, response: Response) -> str:
        text = response.text[:500]
        return text.replace(self._key, "***") if self._key else text

    def _json(self, response: Response) -> dict[str, Any]:
        try:
            answer = response.json()
        except ValueError:
            answer = None
        if not isinstance(answer, dict):
            raise EngineError(
                f"{response.request.url} is no OpenAI-compatible endpoint, it said: {self._said(response)}"
            )
        return answer


def gives_ids(answer: Mapping[str, Any], asked: Sequence[int]) -> bool:
    """Whether a server that was asked in token ids took them, and answered in them."""
    choices = answer.get("choices") or [{}]
    return bool(choices[0].get("token_ids")) and choices[0].get("prompt_token_ids") == list(asked)


def squeezed(text: str) -> str:
    """Without white space and half characters, which two decoders of the same tokens may handle differently."""
    return "".join(text.replace("\ufffd", "").split())
