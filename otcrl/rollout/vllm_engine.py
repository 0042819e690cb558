"""vLLM as the engine, on CPU or CUDA: token ids in, token ids and their log-probs out, new weights after every update.

vLLM's engine runs in processes of its own beside the trainer. This is the only module that imports vllm, and it knows
the differences between its versions (0.20 to 0.33). What it relies on, found by running it:

- Log-probs must be those of the distribution that was sampled from: `processed_logprobs`, no top-p, top-k or min-p.
- `generation_config` of a checkpoint sets top-p and top-k behind one's back: "vllm" turns that off.
- A stop string cuts the text in the middle of a token; the ids keep the whole token, and only ids are used here.
- Unseeded requests may share a random stream: every request has a seed of its own.
- A paused scheduler still accepts requests, before 0.33; from then on it refuses them. Publication ends whatever is in
  flight and submits it again afterwards, so that each token's version is known, and its prefix is computed with the
  weights that sample the token.
"""

from __future__ import annotations

import asyncio
import gc
import itertools
import multiprocessing
import sys
from collections.abc import Coroutine, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor

from otcrl.errors import EngineError, nearest
from otcrl.protocols import Completion
from otcrl.rollout.daemon import in_daemon_thread
from otcrl.rollout.gate import LOOK_S, Common, Gate, deadline
from otcrl.rollout.own_folder import OwnFolder
from otcrl.rollout.publication import Message, Publisher, check_delivery
from otcrl.rollout.submission import Part, check_request, complete, drop_prefixes, sampling
from otcrl.rollout.vllm_launch import (
    arguments,
    check_settings,
    check_vllm,
    child_environment,
    devices_of_rank,
    save_description,
    sleeps,
    takes_handles,
    torch_dtype,
)
from otcrl.tell import tell

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from vllm.outputs import RequestOutput
    from vllm.v1.engine.async_llm import AsyncLLM

    from otcrl.models.tokenizer import HFTokenizer

STARTS = 4  # of one revival, at most
AGAIN_S = 10.0  # after the first that failed; twice and three times as long after the next
AGAIN_SOON_S = 0.01  # after a request that came while vLLM paused; then the gate is closed


@dataclass(kw_only=True)
class VLLMEngine:
    model: PreTrainedModel  # the learner's: its config is what vLLM builds, its weights what it starts with
    tokenizer: HFTokenizer
    context: int  # most tokens a trajectory may hold
    max_sequences: int  # that decode at a time
    batch_tokens: int  # most tokens, of prompts and observations too, per forward
    dtype: str | None  # of vLLM's copy of the weights; null: the model's own
    gpu_memory: float  # share of each GPU that vLLM may fill
    cpu_cache_gib: float  # K/V cache where there is no GPU
    devices: tuple[int, ...] | None  # GPUs, by number; null: all that are visible, under torchrun this rank's
    tensor_parallel: int  # GPUs that share one copy of the model
    transport: Literal["auto", "file", "ipc"]  # of new weights
    weights_dir: str | None  # of transport file; null: main memory
    sleep_level: Literal[0, 1, 2]  # while the learner works: 0 stays awake, 1 weights to main memory, 2 drops them
    start_timeout_s: float
    sync_timeout_s: float  # of one publication
    max_deaths: int  # of the engine's processes in one run; one more ends it
    options: dict[str, Any]  # of vLLM's AsyncEngineArgs, beside those above
    wired: ClassVar[frozenset[str]] = frozenset({"model", "tokenizer"})
    shares_weights: ClassVar[bool] = True  # `model` is only read
    version: int = field(default=0, init=False)
    deaths: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        check_vllm()
        check_settings(self)
        self._sleeps = sleeps(self)
        self._check_options()
        self._llm: AsyncLLM | None = None
        self._processes: list[Any] = []
        self._folder = OwnFolder()
        folder = Path(self.weights_dir) if self.weights_dir else None
        how = {"by_handle": takes_handles(self), "folder": folder, "dtype": torch_dtype(self.dtype)}
        self._publisher = Publisher(self.model, **how)
        self._gate, self._common = Gate(), Common()  # a start or a revival
        self._has_begun = False  # to be given weights: from then on they come from the learner alone
        self._in_flight: set[str] = set()  # requests that vLLM has
        self._numbers = itertools.count()

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
            params = self._params(stop, most, temperature, seed)
            output, version = await self._submit(ids, params, session, priority)
            part = output.outputs[0]
            return Part(list(part.token_ids), sampled_logprobs(part), version, str(part.finish_reason))

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
        self._gate.check()
        check_request(token_ids, (), 1, 1.0, self.context)
        from vllm import SamplingParams

        params = SamplingParams(max_tokens=1, temperature=1.0, prompt_logprobs=0, detokenize=False)
        while True:
            output, _ = await self._submit(list(token_ids), params, "score", 0)
            if output.prompt_logprobs is not None and output.outputs[0].finish_reason != "abort":
                found = zip(token_ids, output.prompt_logprobs, strict=True)
                return [0.0 if at is None else at[token].logprob for token, at in found]

    def release(self, session: str) -> None:
        """Nothing to do: vLLM's prefix cache forgets what is not used."""

    def _params(self, stop: Sequence[str], max_tokens: int, temperature: float, seed: int) -> Any:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        return SamplingParams(
            **sampling(stop, max_tokens, temperature, seed, self.tokenizer),
            flat_logprobs=True,
            output_kind=RequestOutputKind.FINAL_ONLY,
            detokenize=bool(stop),
        )

    async def _submit(self, ids: list[int], params: Any, session: str, priority: int) -> tuple[RequestOutput, int]:
        """What became of the request, and the weights that it ran under; again if the engine dies of it or with it."""
        from vllm import exceptions
        from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

        paused: Any = getattr(exceptions, "RetryableRequestError", ())  # from 0.33
        while True:
            await self._ready()
            llm, version = self._llm, self.version
            assert llm is not None
            request = f"{session}/{next(self._numbers)}"
            self._in_flight.add(request)
            final: RequestOutput | None = None
            try:
                prompt: Any = {"prompt_token_ids": ids}
                async for output in llm.generate(prompt, params, request, priority=priority):
                    final = output
                assert final is not None, "a request ends with an output"
                return final, version
            except paused:
                await asyncio.sleep(AGAIN_SOON_S)
                continue
            except EngineDeadError as error:
                dead = error
            except (EngineGenerateError, exceptions.VLLMValidationError, ValueError) as error:
                cause = error.__cause__ or error  # vLLM's own may say nothing
                raise EngineError(f"vLLM could not answer a request: {type(cause).__name__}: {cause}") from error
            finally:
                self._in_flight.discard(request)  # before it waits for a publication, which waits for what is in flight
            await self._common.done(partial(self._revive, llm, dead))

    # -- weights --------------------------------------------------------------------------------------

    async def sleep(self) -> None:
        """The GPU's memory is the learner's. An engine that is found dead has none; the next weights restart it."""
        from vllm.v1.engine.exceptions import EngineDeadError

        if not self._sleeps or self._llm is None:
            return
        async with self._gate.exclusive, deadline(self.sync_timeout_s, "falling asleep"):
            with suppress(EngineDeadError):
                await self._while_alive(self._fall_asleep(self._llm))

    async def _fall_asleep(self, llm: AsyncLLM) -> None:
        await self._interrupt(llm)
        await llm.sleep(level=self.sleep_level)

    async def load_weights(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        """See `Engine.load_weights`. Requests in flight are interrupted and go on under the new weights."""
        async with self._gate.publishing(version, "vLLM"):
            self._has_begun = True
            message = self._publisher.prepare(weights, version)  # in this thread: to gather weights may be a collective
            if self._llm is None:
                await self._start()
            await self._publish(message)
            self.version = version

    async def _publish(self, message: Message) -> None:
        from vllm.v1.engine.exceptions import EngineDeadError

        while True:
            llm = self._llm
            assert llm is not None
            try:
                async with deadline(self.sync_timeout_s, f"publishing version {message.version}"):
                    await self._while_alive(self._deliver(llm, message))
                    return
            except EngineDeadError as error:
                await self._restart(llm, error)
                message = self._publisher.again() or message  # what was lent to the dead one may have been given back

    async def _deliver(self, llm: AsyncLLM, message: Message) -> None:
        """Raises EngineError unless every worker says that it has the weights."""
        await self._interrupt(llm)
        if self._sleeps and await llm.is_sleeping():
            self._give_back_memory()
            await llm.wake_up(tags=["weights"])
            if self.sleep_level == 2:
                await llm.collective_rpc("otcrl_forget")
        check_delivery(await llm.collective_rpc(message.method, args=(message.content,)), message)
        self._publisher.delivered()
        if self._sleeps:
            self._give_back_memory()
            await llm.wake_up(tags=["kv_cache"])
        await drop_prefixes("vLLM", llm.reset_prefix_cache)
        await llm.resume_generation()

    def _give_back_memory(self) -> None:
        """What the learner freed but torch keeps for it, and what was lent by handle: vLLM takes it for itself."""
        if self.model.device.type == "cuda":
            torch.cuda.ipc_collect()
            torch.cuda.empty_cache()

    async def _while_alive(self, work: Coroutine[Any, Any, None]) -> None:
        """Awaits `work`, which asks vLLM's processes something and would wait for ever if they ended.

        Raises EngineDeadError when they end, and EngineError for a worker's failure, which vLLM raises as Exception.
        """
        from vllm.v1.engine.exceptions import EngineDeadError

        task = asyncio.ensure_future(work)
        try:
            while not task.done():
                await asyncio.wait([task], timeout=LOOK_S)
                if not task.done() and any(process.exitcode is not None for process in self._processes):
                    raise EngineDeadError
            task.result()
        except (EngineDeadError, EngineError):
            raise
        except Exception as error:  # vLLM raises nothing better for what went wrong in a worker
            raise EngineError(f"vLLM failed: {error}") from error
        finally:
            if not task.done():
                task.cancel()
                await asyncio.wait([task])

    async def _interrupt(self, llm: AsyncLLM) -> None:
        """End whatever is in flight; who waits for it submits it again when the engine is open."""
        self._gate.close()
        await llm.pause_generation(mode="abort")
        for _ in range(3):  # turns of the event loop in which who was answered goes on
            await asyncio.sleep(0)
        while late := list(self._in_flight):  # they came while the scheduler paused, and it would keep them
            await llm.abort(late)  # of no effect on one that vLLM is still preparing: hence again
            await asyncio.sleep(0.002)

    # -- processes ------------------------------------------------------------------------------------

    async def _ready(self) -> None:
        """Returns when requests may be submitted; the first caller starts the engine if nobody has."""
        if not (self._has_begun or self._gate.broken):
            await self._common.done(lambda: self.load_weights(self.model.named_parameters(), self.version))
        await self._gate.passed()

    async def _start(self) -> None:
        self._give_back_memory()
        folder = self._folder.path
        save_description(folder, self.model, self.tokenizer)
        try:
            async with asyncio.timeout(self.start_timeout_s):
                self._llm = await self._constructed(folder)
        except TimeoutError as error:
            raise EngineError(f"vLLM did not start within engine.start_timeout_s={self.start_timeout_s:g} s") from error
        except (RuntimeError, ValueError) as error:
            raise EngineError(f"vLLM did not start: {error}") from error

    async def _constructed(self, folder: Path) -> AsyncLLM:
        """A revival may try again: vLLM gives up when a learner on its GPU frees memory while it measures its own."""
        start = 1
        while True:
            before = set(multiprocessing.active_children())
            try:
                llm = await in_daemon_thread(lambda: self._construct(folder), "vLLM starts")
                self._processes = [p for p in multiprocessing.active_children() if p not in before]
                return llm
            except RuntimeError as error:  # a setting that cannot work would have shown at the first start
                if not self.deaths or start == STARTS:
                    raise
                tell(f"vLLM did not start ({error}); trying again", sys.stdout)
            await asyncio.sleep(start * AGAIN_S)
            start += 1
            self._give_back_memory()

    def _construct(self, folder: Path) -> AsyncLLM:
        with child_environment(devices_of_rank(self), self.cpu_cache_gib, folder):
            from vllm.engine.arg_utils import AsyncEngineArgs
            from vllm.v1.engine.async_llm import AsyncLLM

            return AsyncLLM.from_engine_args(AsyncEngineArgs(**arguments(self, folder), **self.options))

    async def _revive(self, dead: AsyncLLM, error: Exception) -> None:
        """The engine again, with the weights it had. Raises EngineError when it has died too often."""
        async with self._gate.exclusive:
            if self._llm is not dead:
                return  # another request has seen to it
            self._gate.close()
            with self._gate.breaking():
                await self._restart(dead, error)
                if not await self._publish_again():
                    return  # an update is under way: its publication will open the engine
            self._gate.open()

    async def _publish_again(self) -> bool:
        """Whether the engine has the weights that it had. False when the learner, in its own thread, changed them."""
        message = self._publisher.again()
        if message is None:
            return False
        try:
            await self._publish(message)
        except EngineError:
            if self._gate.broken or self._publisher.is_current():  # broken: it died too often
                raise
            return False  # it was found damaged on its way
        return self._publisher.is_current()

    async def _restart(self, dead: AsyncLLM, error: Exception) -> None:
        self.deaths += 1
        why = f"{error} ({self._exit_codes()})"
        if self.deaths > self.max_deaths:
            self._gate.broken = (
                f"vLLM died {self.deaths} times in this run, more than engine.max_deaths={self.max_deaths}. Last: {why}"
            )
            raise EngineError(self._gate.broken) from error
        tell(f"vLLM died ({why}); starting it again, death {self.deaths} of at most {self.max_deaths}", sys.stdout)
        self._llm = None
        async with deadline(self.sync_timeout_s, "ending the dead vLLM"):
            await in_daemon_thread(dead.shutdown, "vLLM ends")
        await self._start()

    def _exit_codes(self) -> str:
        codes = [f"{p.name} ended with code {p.exitcode}" for p in self._processes if p.exitcode is not None]
        return ", ".join(codes) or "its processes have not ended"

    async def close(self) -> None:
        self._gate.broken, llm, self._llm = "the engine is closed", self._llm, None
        self._gate.close()
        await self._common.cancel()
        if llm is not None:
            try:
                async with deadline(self.sync_timeout_s, "ending vLLM"):
                    await in_daemon_thread(llm.shutdown, "vLLM ends")
            except EngineError as error:
                tell(f"{error}: its processes are killed", sys.stdout)
                for process in self._processes:
                    process.kill()
            await asyncio.sleep(0)  # its task hears that it is cancelled
            del llm
            gc.collect()  # now: its finalizer fails when the interpreter is already going
        self._publisher.close()
        self._folder.close()

    def _check_options(self) -> None:
        if not self.options:
            return
        from vllm.engine.arg_utils import AsyncEngineArgs

        known = AsyncEngineArgs.__dataclass_fields__
        for name in self.options:
            if name not in known:
                raise ValueError(f"options.{name} is none of vLLM's AsyncEngineArgs.{nearest(name, known)}")
            if name in arguments(self, Path()):
                raise ValueError(f"options.{name} is set by otcrl itself")


def sampled_logprobs(part: Any) -> list[float]:
    """[L] of the sampled tokens themselves; vLLM lists the likeliest beside them when asked to."""
    return [part.logprobs.logprobs[at] for at in part.logprobs.start_indices] if part.token_ids else []


class NCCLGroup:
    """Broadcasts tensors of `device` to the workers of other vLLMs; made when all `ranks` are there.

    A `StatelessProcessGroup` keeps clear of the process groups that the learner has.
    """

    def __init__(self, address: str, port: int, ranks: int, device: torch.device) -> None:
        from vllm.distributed.device_communicators.pynccl import PyNcclCommunicator
        from vllm.distributed.utils import StatelessProcessGroup

        ranks_meet = StatelessProcessGroup.create(address, port, rank=0, world_size=ranks)
        self._group, self._device, self._is_over = PyNcclCommunicator(ranks_meet, device=device), device, False
        if self._group.disabled:  # it would broadcast nothing, without a word
            raise EngineError("vLLM finds no NCCL here: install it, or set engine.transport=file")

    def broadcast(self, tensor: Tensor) -> None:
        if self._is_over:
            raise EngineError("the group for weights is over")  # its memory is gone: to go on would crash
        self._group.broadcast(tensor, src=0, stream=torch.cuda.current_stream(self._device))

    def destroy(self) -> None:
        self._is_over = True
        self._group.destroy()
