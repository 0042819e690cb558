"""vLLM servers as the engine: rollout on GPUs of its own, on this machine or others, spoken to over HTTP.

What holds for vLLM in this process (vllm_engine.py) holds here: token ids in and out, log-probs of the distribution
that was sampled from, interrupted and resumed by each publication, arrival of the weights proven. Beyond that:

- Every server is asked for its version every few seconds. One that was started anew has none of our weights, and would
  otherwise answer as if nothing had happened; it takes longer to start than a beat, so it is always found out.
- A server that is lost takes no tokens with it that were counted: its requests are made again elsewhere, with their
  seeds. It comes back by itself when it has been given the weights.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from torch import Tensor

from otcrl.errors import ConfigError, EngineError
from otcrl.protocols import Completion
from otcrl.rollout.completions_api import PATH, continued, scored, to_continue, to_score
from otcrl.rollout.fleet import LONGEST_S, Fleet, Server, share_of_rank
from otcrl.rollout.gate import Common, Gate, deadline
from otcrl.rollout.submission import Part, check_request, complete, drop_prefixes, sampling
from otcrl.rollout.vllm_launch import check_context, check_dtype, check_version, check_vllm, torch_dtype
from otcrl.rollout.vllm_worker import EXTENSION
from otcrl.rollout.weights_by_file import WeightsByFile
from otcrl.rollout.weights_by_nccl import WeightsByNCCL
from otcrl.tools.remote import ServerLost

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from otcrl.models.tokenizer import HFTokenizer

BEAT_S = 2.0  # between two looks at a server; vLLM needs longer than that to start
HEALTH_S = 5.0
EXACTLY = {  # as `Receiver.otcrl_settings` names it -> the value, and how to get it
    "logprobs_mode": ("processed_logprobs", "--logprobs-mode processed_logprobs"),
    "generation_config": ("vllm", "--generation-config vllm"),
    "policy": ("priority", "--scheduling-policy priority"),
}
AT_LEAST = {"context": "--max-model-len", "max_sequences": "--max-num-seqs", "batch_tokens": "--max-num-batched-tokens"}
NCCL = """--weight-transfer-config '{"backend": "nccl"}'"""


@dataclass(kw_only=True)
class VLLMServers:
    model: PreTrainedModel  # the learner's: its parameters are what the servers are given
    tokenizer: HFTokenizer
    urls: tuple[str, ...]  # one for each copy of the model; under torchrun each rank takes its share
    api_key_env: str  # environment variable with the servers' --api-key, if they have one
    context: int  # most tokens a trajectory may hold
    max_sequences: int  # that each server decodes at a time, at least
    batch_tokens: int  # that each server takes per forward, at least
    dtype: str | None  # of their copies of the weights; null: the model's own
    transport: Literal["file", "nccl"]  # of new weights
    weights_dir: str | None  # of transport file: a folder that the servers see too; null: this machine's main memory
    nccl_address: str | None  # of transport nccl: this machine as the servers know it; null: found out
    sync_timeout_s: float  # of one publication
    patience_s: float  # without any server
    wired: ClassVar[frozenset[str]] = frozenset({"model", "tokenizer"})
    shares_weights: ClassVar[bool] = True  # `model` is only read
    version: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        for name in ("context", "max_sequences", "batch_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("sync_timeout_s", "patience_s"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}")
        check_dtype(self.dtype)
        check_context(self.context, self.model)
        if self.transport == "nccl":
            check_vllm()  # whose NCCL is spoken here too
            if self.model.device.type != "cuda":
                raise ValueError(f"transport nccl needs a model on a GPU, and it is on {self.model.device}: use file")
        self._fleet = Fleet(share_of_rank(self.urls), os.environ.get(self.api_key_env) or None)
        if self.transport == "file":
            self._weights = WeightsByFile(
                self._fleet, self.model, self.weights_dir, self.sync_timeout_s, torch_dtype(self.dtype)
            )
        else:
            self._weights = WeightsByNCCL(self._fleet, self.model, self.nccl_address, self.sync_timeout_s)
        self._gate, self._common = Gate(), Common()  # the first publication, if nobody else has made one
        self._has_begun = False  # to be given weights: from then on they come from the learner alone
        self._looking = asyncio.Lock()  # a beat, or a publication: neither takes the other's doing for a loss
        self._probes = itertools.count()
        self._beats: asyncio.Task[None] | None = None

    # -- generation -----------------------------------------------------------------------------------

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
        """See `Engine.generate`. Cancelling the task that awaits it aborts the request."""
        self._gate.check()
        check_request(token_ids, stop, max_tokens, temperature, self.context)

        async def submit(ids: list[int], most: int, seed: int) -> Part:
            settings = sampling(stop, most, temperature, seed, self.tokenizer)
            answer, version = await self._ask(to_continue(ids, settings, priority), session)
            return continued(answer, version)

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
        """See `Engine.score`. The servers take turns, so that as many scores as servers prove them all."""
        self._gate.check()
        check_request(token_ids, (), 1, 1.0, self.context)
        turn = next(self._probes)
        session = f"score {turn}"
        try:
            while True:
                answer, _ = await self._ask(to_score(token_ids), session, turn)
                if answer["choices"][0]["finish_reason"] != "abort":
                    return scored(answer, token_ids)
        finally:
            self.release(session)

    def release(self, session: str) -> None:
        self._fleet.release(session)

    async def _ask(self, body: dict[str, Any], session: str, turn: int | None = None) -> tuple[dict[str, Any], int]:
        """The answer of the session's server, and its weights; of another when that is lost."""
        while True:
            server = await self._server(session, turn)
            assert server.version is not None, "only who is in is asked"
            version = server.version
            server.generating += 1
            try:
                response = await self._fleet.ask(server, "POST", PATH, body, timeout_s=LONGEST_S)
                return response.json(), version
            except ServerLost:
                continue
            finally:
                server.generating -= 1

    async def _server(self, session: str, turn: int | None = None) -> Server:
        """The session's, when it may be asked. Raises EngineError when there has been none for too long."""
        if not (self._has_begun or self._gate.broken):
            await self._common.done(lambda: self.load_weights(self.model.named_parameters(), self.version))
        give_up = time.monotonic() + self.patience_s
        while True:
            await self._gate.passed()
            if (server := self._fleet.route(session, turn)) is not None:
                return server
            if time.monotonic() > give_up:
                self._gate.broken = self._none_left()
                raise EngineError(self._gate.broken)
            await asyncio.sleep(0.1)

    def _none_left(self) -> str:
        return f"no server was left for engine.patience_s={self.patience_s:g} s: {self._fleet.why_out()}"

    # -- weights --------------------------------------------------------------------------------------

    async def sleep(self) -> None:
        """Nothing to do: the learner has no use for the servers' memory."""

    async def load_weights(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        """See `Engine.load_weights`. Requests in flight are interrupted and go on under the new weights.

        A server that cannot be reached is left out, and gets them later; raises EngineError when there is no other.
        """
        async with self._looking, self._gate.publishing(version, "the servers"):
            self._has_begun = True
            async with deadline(self.sync_timeout_s, "pausing the servers"):  # before this process is busy
                await self._fleet.each([server for server in self._fleet.servers if server.is_up], self._stop)
            self._weights.prepare(weights, version)  # in this thread: to gather weights may be a collective
            give_up, again = time.monotonic() + self.patience_s, False
            while not await self._give([s for s in self._fleet.servers if s.is_up], version, again=again):
                again = self._weights.keeps  # one may have taken them and not said so: then they will not change in it
                if time.monotonic() > give_up:
                    raise EngineError(self._none_left())
                await asyncio.sleep(BEAT_S)
                for server in self._fleet.servers:
                    server.is_up = True  # or so one hopes
            self.version = version
        if self._beats is None or self._beats.done():
            self._beats = asyncio.create_task(self._beat_on())
            self._beats.add_done_callback(self._beats_ended)

    async def _give(self, servers: Sequence[Server], version: int, *, again: bool = False) -> list[Server]:
        """Those that now sample from the weights prepared last. Raises EngineError when one has others."""
        async with deadline(self.sync_timeout_s, f"publishing version {version}"):
            having = await self._fleet.each(servers, self._stop)
            having = await self._weights.bring(having, again=again)
            having = await self._fleet.each(having, self._go_on)
        for server in servers:
            if server in having:
                self._fleet.admit(server, version)
            elif server.version is not None:  # it was busy, is paused perhaps, and has other weights
                self._fleet.eject(server, f"it did not take version {version}")
        return having

    async def _stop(self, server: Server) -> None:
        """End whatever it is generating; who waits for it submits it again."""
        if server.version is None:
            await self._check(server)
        while True:
            await self._fleet.ask(server, "POST", "/pause?mode=abort")
            await asyncio.sleep(0)
            if not server.generating:
                return
            await asyncio.sleep(0.005)  # some came while it paused, and it would keep them: once more

    async def _go_on(self, server: Server) -> None:
        async def reset() -> bool:
            answer = await self._fleet.ask(server, "POST", "/reset_prefix_cache")
            return not answer.content or answer.json()["success"]  # before 0.28 it does not say

        await drop_prefixes(server.url, reset)
        await self._fleet.ask(server, "POST", "/resume")

    async def _check(self, server: Server) -> None:
        """Raises EngineError naming what the server must be started with."""
        start = f"{server.url}: start the server with"
        running = (await self._fleet.ask(server, "GET", "/version")).json()["version"]
        try:
            check_version(f"{server.url} runs vLLM {running}")
        except ConfigError as error:
            raise EngineError(str(error)) from error
        body = {"method": "otcrl_settings"}
        response = await self._fleet.attempt(server, "POST", "/collective_rpc", body)
        if response.status_code == 404:
            raise EngineError(f"{start} VLLM_SERVER_DEV_MODE=1 in its environment")
        if response.is_error and "otcrl_settings" in response.text:
            raise EngineError(f"{start} --worker-extension-cls {EXTENSION}")
        workers = await self._fleet.rpc(server, "otcrl_settings")
        if (await self._fleet.ask(server, "GET", "/get_world_size")).json()["world_size"] != len(workers):
            raise EngineError(
                f"{server.url}: start the server without --data-parallel-size, and one for each copy of the model: of "
                "several in one, only the first says which weights it has"
            )
        settings = workers[0]
        for name, (value, flag) in EXACTLY.items():
            if settings[name] != value:
                raise EngineError(f"{start} {flag}; its {name} is {settings[name]}")
        dtype = self.dtype or str(self.model.dtype).removeprefix("torch.")
        if settings["dtype"] != dtype:
            raise EngineError(f"{start} --dtype {dtype}, or set engine.dtype={settings['dtype']}, which it has")
        for name, flag in AT_LEAST.items():
            if settings[name] < getattr(self, name):
                raise EngineError(
                    f"{start} {flag} {getattr(self, name)}; engine.{name} asks for more than {settings[name]}"
                )
        if self.transport == "nccl" and settings["weight_transfer"] != "nccl":
            raise EngineError(f"{start} {NCCL}; engine.transport=nccl needs it")

    # -- servers that are lost and come back ------------------------------------------------------------

    async def _beat_on(self) -> None:
        while True:
            await asyncio.sleep(BEAT_S)
            async with self._looking:
                await self._fleet.each(self._fleet.servers, self._beat)

    async def _beat(self, server: Server) -> None:
        """A server that has other weights than it was given is out; one that is out and up gets them."""
        given = server.version
        if self._gate.broken:
            return
        if given is not None:
            states = await self._fleet.rpc(server, "otcrl_state")
            if server.version == given and any(state["version"] != given for state in states):
                self._fleet.eject(server, "it has lost its weights")
            return
        await self._fleet.attempt(server, "GET", "/health", timeout_s=HEALTH_S)  # a publication waits for it
        server.is_up = True  # the next publication is for it too
        if self._weights.keeps:
            async with self._gate.exclusive:
                with self._gate.breaking():
                    await self._give([server], self.version, again=True)
            return
        states = await self._fleet.rpc(server, "otcrl_state")
        if states and all(state["version"] == self.version for state in states):
            async with self._gate.exclusive, deadline(self.sync_timeout_s, "taking a server back"):
                with self._gate.breaking():
                    stopped = await self._fleet.each([server], self._stop)
                    for healthy in await self._fleet.each(stopped, self._go_on):  # only its connection had broken
                        self._fleet.admit(healthy, self.version)

    def _beats_ended(self, beats: asyncio.Task[None]) -> None:
        """Whatever ends them ends the run: who is not watched could have other weights."""
        if not beats.cancelled() and (error := beats.exception()) is not None:
            self._gate.broken = str(error) if isinstance(error, EngineError) else f"the servers' watch broke: {error!r}"
            self._gate.close()
            for server in self._fleet.servers:  # who waits for an answer is to hear of it
                self._fleet.eject(server, self._gate.broken)

    async def close(self) -> None:
        self._gate.broken = "the engine is closed"
        self._gate.close()
        await self._common.cancel()
        if self._beats is not None:
            self._beats.cancel()
            await asyncio.wait([self._beats])
        await self._weights.close()
        await self._fleet.close()
