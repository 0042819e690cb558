"""The embedded engine: continuous batching over any transformers causal language model, on CPU or CUDA.

One asyncio task serves all trajectories, step by step. A step first computes the K/V of tokens that were not sampled
here (prompts, observations), all but the last one; then every running trajectory, whatever its length, decodes one
token. So a prefill needs no logits, and there is one place where tokens are sampled. The forwards of a step run in a
thread (hf_forward.py) while tools make progress; everything in this file happens on the event loop, between steps.

Correctness never depends on the cache: a session's K/V may be reused, evicted or dropped with the same result.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractAsyncContextManager, nullcontext
from functools import cached_property
from typing import ClassVar

from torch import Tensor
from transformers import PreTrainedModel

from otcrl.errors import ConfigError, EngineError
from otcrl.models.devices import make_current
from otcrl.protocols import Completion, Tokenizer
from otcrl.rollout.hf_forward import Forward, Moves, Request, Session, Stats, copy_weights
from otcrl.rollout.pace import Pace

LOOP_TURNS = 3  # turns of the event loop between steps: who just got a completion can submit the next turn in time


class HFEngine:
    wired: ClassVar[frozenset[str]] = frozenset({"model", "tokenizer"})

    def __init__(
        self,
        *,
        model: PreTrainedModel,
        tokenizer: Tokenizer,
        max_sequences: int,
        context: int,
        batch_tokens: int,
        tool_steps: int = 4,
        tool_patience_s: float = 1.0,
    ) -> None:
        """`model` is the engine's own copy. Raises ConfigError if the model or a number cannot work."""
        if tool_steps < 0:
            raise ConfigError(f"tool_steps must be 0 or more, got {tool_steps}")
        if not tool_patience_s >= 0:
            raise ConfigError(f"tool_patience_s must be 0 or more, got {tool_patience_s}")
        for name, value in (("max_sequences", max_sequences), ("context", context), ("batch_tokens", batch_tokens)):
            if value < 1:
                raise ConfigError(f"{name} must be at least 1, got {value}")
        self.context = context
        self.version = 0
        self._forward = Forward(model, max_rows=max_sequences, context=context, batch_tokens=batch_tokens)
        self._thread = ThreadPoolExecutor(
            1, thread_name_prefix="hf_engine", initializer=make_current, initargs=(self._forward.model.device,)
        )
        self._tokenizer = tokenizer
        self._vocab = model.config.get_text_config().vocab_size
        self._watched: dict[tuple[str, ...], frozenset[int]] = {}
        self._rows: list[Session | None] = [None] * max_sequences
        self._sessions: dict[str, Session] = {}  # least recently used first
        self._waiting: list[Session] = []
        self._running: list[Session] = []  # sorted by row
        self._loads: list[tuple[Iterable[tuple[str, Tensor]], int, asyncio.Future[None]]] = []
        self._scores: list[tuple[list[int], asyncio.Future[list[float]]]] = []
        self._pace = Pace(tool_steps, tool_patience_s) if tool_steps else None
        self._server: asyncio.Task[None] | None = None
        self._incomplete = ""  # what went wrong with the weights: nothing is generated until they are whole
        self._closed = False

    # -- what callers use ---------------------------------------------------------------------------

    @property
    def stats(self) -> Stats:
        return self._forward.stats

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
        """See `Engine.generate`. Cancelling the task that awaits it frees the session's slot."""
        self._check(token_ids, stop, max_tokens, temperature)
        ids = list(token_ids)
        future: asyncio.Future[Completion] = asyncio.get_running_loop().create_future()
        here = self._paused(session)
        keep = min(here.cached, len(ids) - 1)
        here.cached = keep if here.ids[:keep] == ids[:keep] else 0
        here.ids = ids
        here.request = Request(
            future=future,
            start=len(ids),
            end=min(len(ids) + max_tokens, self.context),
            stop=tuple(stop),
            watch=self._watch(tuple(stop)),
            temperature=temperature,
            seed=seed,
            priority=priority,
        )
        self._sessions[session] = here
        self._waiting.append(here)
        self._start()
        return await future

    async def score(self, token_ids: Sequence[int]) -> list[float]:
        self._check(token_ids, (), max_tokens=1, temperature=1.0)
        future: asyncio.Future[list[float]] = asyncio.get_running_loop().create_future()
        self._scores.append((list(token_ids), future))
        self._start()
        return await future

    def release(self, session: str) -> None:
        gone = self._sessions.get(session)
        if gone is None:
            return
        if gone.request is None:
            self._forget(gone)
        elif not gone.request.future.done():
            gone.request.future.set_exception(EngineError(f"session {session!r} was released while generating"))

    def pace(self) -> AbstractAsyncContextManager[None]:
        """Holds the tool call inside to a fixed number of decode steps (otcrl/rollout/pace.py)."""
        if self._pace is None or self._closed:
            return nullcontext()
        self._start()
        return self._pace.call()

    async def sleep(self) -> None:
        """Its memory is the trainer's own: there is nothing to give back."""

    async def load_weights(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        """The next step samples from `weights`; trajectories under way go on with them, their K/V computed again.

        Raises EngineError naming a parameter that is missing, unknown or of another shape; nothing is generated after
        that until a complete set has been loaded.
        """
        if self._closed:
            raise EngineError("the engine is closed")
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._loads.append((weights, version, future))
        self._start()
        await future

    async def close(self) -> None:
        self._closed = True
        if self._server is not None and not self._server.done():
            self._server.cancel()
            await asyncio.wait([self._server])
        self._thread.shutdown()

    # -- a request ------------------------------------------------------------------------------------

    def _check(self, token_ids: Sequence[int], stop: Sequence[str], max_tokens: int, temperature: float) -> None:
        if self._closed or self._incomplete:
            raise EngineError(self._incomplete or "the engine is closed")
        if not 0 < len(token_ids) < self.context:
            raise EngineError(f"a prompt must have 1 to {self.context - 1} tokens (context - 1), got {len(token_ids)}")
        if min(token_ids) < 0 or max(token_ids) >= self._vocab:
            raise EngineError(f"token ids must be 0 to {self._vocab - 1}, got {min(token_ids)} to {max(token_ids)}")
        if "" in stop:
            raise EngineError("a stop string must not be empty")
        if max_tokens < 1:
            raise EngineError(f"max_tokens must be at least 1, got {max_tokens}")
        if temperature < 0:
            raise EngineError(f"temperature must be 0 or more, got {temperature}")

    def _paused(self, session: str) -> Session:
        """The session, with the cache of its last call if it still has one."""
        here = self._sessions.get(session)
        if here is None:
            return Session(session)
        if here.request is None:
            return here
        if here.request.future.done():
            return Session(session)  # cancelled a moment ago; the next step forgets that one
        raise EngineError(f"session {session!r} is already generating")

    @cached_property
    def _texts(self) -> list[str]:
        """[V] text of each token."""
        return [self._tokenizer.decode([token]) for token in range(self._tokenizer.vocab_size)]

    def _watch(self, stop: tuple[str, ...]) -> frozenset[int]:
        """Ids that end a completion, or may: their text has the last character of a stop string, or a part of one."""
        if stop not in self._watched:
            ends = {string[-1] for string in stop} | ({"\ufffd"} if any(not s[-1].isascii() for s in stop) else set())
            may_end = [token for token, text in enumerate(self._texts) if ends.intersection(text)] if ends else []
            self._watched[stop] = self._tokenizer.stop_ids.union(may_end)
        return self._watched[stop]

    def _is_over(self, here: Session, request: Request) -> bool:
        """Whether the last token, one of those to watch, ends the completion."""
        if here.ids[-1] in self._tokenizer.stop_ids:
            return True
        text = self._tokenizer.decode(here.ids[request.start :])
        return any(string in text for string in request.stop)

    # -- the server task ------------------------------------------------------------------------------

    def _start(self) -> None:
        if self._server is None or self._server.done():
            self._server = asyncio.get_running_loop().create_task(self._serve())

    async def _serve(self) -> None:
        """Steps until there is nothing to do. Whatever goes wrong reaches everyone who waits."""
        try:
            while self._waiting or self._running or self._loads or self._scores or self._is_holding:
                await turns()
                if self._pace is not None and await self._pace.tick(idle=not (self._waiting or self._running)):
                    await turns()
                self._reap()
                self._load()
                await self._score()
                self._admit()
                if self._running:
                    await self._step(self._compact())
        except BaseException as error:  # whatever it is, who awaits a completion must hear of it, or waits for ever
            self._fail(error)
            if not isinstance(error, Exception):
                raise

    @property
    def _is_holding(self) -> bool:
        return self._pace is not None and self._pace.is_holding

    async def _step(self, moves: Moves) -> None:
        loop = asyncio.get_running_loop()
        tokens, logprobs = await loop.run_in_executor(self._thread, self._forward.step, self._running, moves)
        running: list[Session] = []
        for here, token, logprob in zip(self._running, tokens, logprobs, strict=True):
            request = here.request
            assert request is not None
            here.ids.append(token)
            here.cached += 1
            request.logprobs.append(logprob)
            request.versions.append(self.version)
            is_over = token in request.watch and self._is_over(here, request)
            if (is_over or len(here.ids) == request.end) and not request.future.done():
                self._finish(here, request, is_over)
            else:
                running.append(here)
        self._running = running

    def _finish(self, here: Session, request: Request, is_over: bool) -> None:
        ids = here.ids[request.start :]
        request.future.set_result(Completion(ids, request.logprobs, request.versions, is_over))
        here.request = None
        self._sessions[here.name] = self._sessions.pop(here.name)  # the most recently used

    def _reap(self) -> None:
        """Drop whom nobody awaits any more: cancelled, or released while generating."""
        for here in (*self._running, *self._waiting):
            if here.request is not None and here.request.future.done():
                self._forget(here)
        self._running = [here for here in self._running if here.request is not None]
        self._waiting = [here for here in self._waiting if here.request is not None]

    def _load(self) -> None:
        """In this thread, not the other: the learner's iterator may gather shards, and collectives stay in theirs."""
        while self._loads:
            weights, version, done = self._loads[0]
            self._incomplete = "load_weights failed and left the weights incomplete: load all of them first"
            copy_weights(self._forward.model, weights)
            self._incomplete, self.version = "", version
            self._drop_caches()
            self._loads.pop(0)
            if not done.done():
                done.set_result(None)

    async def _score(self) -> None:
        while self._scores:
            ids, future = self._scores[0]
            result = await asyncio.get_running_loop().run_in_executor(self._thread, self._forward.score, ids)
            self._scores.pop(0)
            if not future.done():
                future.set_result(result)

    def _admit(self) -> None:
        """Slots for those who wait: first who still has one, then by priority, then in order of arrival."""
        self._waiting.sort(key=lambda here: (here.row < 0, here.request.priority if here.request else 0))
        admitted = 0
        for here in self._waiting:
            if here.row < 0 and not self._give_row(here):
                break
            admitted += 1
            self.stats.reused += here.cached
        self._running = sorted(self._running + self._waiting[:admitted], key=lambda here: here.row)
        del self._waiting[:admitted]

    def _give_row(self, here: Session) -> bool:
        """The lowest free row, else that of the paused session that was used least recently, else none."""
        if None not in self._rows:
            paused = next((other for other in self._sessions.values() if other.request is None), None)
            if paused is None:
                return False
            self._forget(paused)
            self.stats.evicted += 1
        here.row = self._rows.index(None)
        self._rows[here.row] = here
        return True

    def _compact(self) -> Moves:
        """Running sessions trade rows with paused ones until they are the first: a forward reads those in place."""
        count = len(self._running)
        taken = {here.row for here in self._running}
        gaps = [row for row in range(count) if row not in taken]
        source, target, width = [], [], 0
        for here, gap in zip((here for here in self._running if here.row >= count), gaps, strict=True):
            other, row = self._rows[gap], here.row
            self._rows[gap], here.row = here, gap
            self._rows[row] = other
            source, target, width = [*source, row], [*target, gap], max(width, here.cached)
            if other is not None:
                other.row = row
                source, target, width = [*source, gap], [*target, row], max(width, other.cached)
        self._running.sort(key=lambda here: here.row)
        return Moves(source, target, width)

    # -- forgetting -----------------------------------------------------------------------------------

    def _forget(self, gone: Session) -> None:
        if gone.row >= 0:
            self._rows[gone.row] = None
        if self._sessions.get(gone.name) is gone:
            del self._sessions[gone.name]
        gone.row, gone.cached, gone.request = -1, 0, None

    def _drop_caches(self) -> None:
        for here in list(self._sessions.values()):
            here.cached = 0
            if here.request is None:
                self._forget(here)

    def _fail(self, error: BaseException) -> None:
        """Everyone who waits gets an EngineError; the cache starts anew, since a step may have been cut short."""
        why = str(error) if isinstance(error, EngineError) else f"generation failed: {error!r}"
        if isinstance(error, asyncio.CancelledError):
            why = "the engine was closed" if self._closed else "the engine's event loop ended"
        waiting = [here.request.future for here in (*self._running, *self._waiting) if here.request is not None]
        for future in (*waiting, *(done for _, _, done in self._loads), *(done for _, done in self._scores)):
            if not future.done():
                failure = EngineError(why)
                failure.__cause__ = error
                future.set_exception(failure)
        for here in (*self._running, *self._waiting):
            self._forget(here)
        self._running, self._waiting, self._loads, self._scores = [], [], [], []
        if self._pace is not None:
            self._pace.let_go()
        self._drop_caches()
        self._forward.reset()


async def turns() -> None:
    for _ in range(LOOP_TURNS):
        await asyncio.sleep(0)
