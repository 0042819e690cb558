"""Rollout servers whose answers are lost, and a trainer that may open no more connections; the servers stand in."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse

from otcrl.rollout.fleet import Fleet
from otcrl.rollout.vllm_servers import VLLMServers
from tests.apps import served
from tests.test_bad_input import ROOT
from tests.test_publication import Worker
from tests.tiny import tiny_llama, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
SETTINGS = {
    "logprobs_mode": "processed_logprobs", "generation_config": "vllm", "policy": "priority",
    "context": 512, "max_sequences": 64, "batch_tokens": 1024, "weight_transfer": None, "dtype": "float32",
}  # fmt: skip


@dataclass
class Standing:
    """Answers as vLLM's server does; its worker is the real one, around a small model."""

    late_s: float = 0.0  # for the answer that version 1 is there; as vLLM it goes on though nobody listens
    worker: Worker = field(default_factory=Worker)
    refuses: int = 0  # requests that it takes for late, as vLLM 0.33 does while it is paused
    heard: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.worker.model_runner.model = tiny_llama(TOKENIZER.vocab_size, seed=1)

    def app(self) -> FastAPI:
        app = FastAPI()
        app.get("/version")(lambda: {"version": "0.32.0"})
        app.get("/health")(lambda: None)
        app.get("/get_world_size")(lambda: {"world_size": 1})
        for path in ("/pause", "/resume", "/reset_prefix_cache"):
            app.post(path)(lambda path=path: self.heard.append(path) or {"success": True})

        @app.post("/collective_rpc")
        async def rpc(request: Request) -> dict[str, Any]:
            body = await request.json()
            self.heard.append(body["method"])
            if body["method"] == "otcrl_settings":
                return {"results": [SETTINGS]}
            if body["method"] == "otcrl_state":
                return {"results": [self.worker.otcrl_state()]}
            report = self.worker.otcrl_load_file(*body["args"])
            if report["version"] == 1:
                late, self.late_s = self.late_s, 0.0
                await asyncio.sleep(late)
            return {"results": [report]}

        @app.post("/v1/completions")
        async def complete() -> JSONResponse:
            self.heard.append("/v1/completions")
            if self.refuses:
                self.refuses -= 1
                error = {"message": "Generation is paused. Please retry after it resumes.", "code": 503}
                return JSONResponse({"error": error | {"type": "ServiceUnavailableError"}}, 503)
            await asyncio.sleep(0.2)
            choice = {"token_ids": [5], "logprobs": {"token_logprobs": [0.0]}, "finish_reason": "length"}
            return JSONResponse({"choices": [choice]})

        return app


def make(url: str, **settings: Any) -> VLLMServers:
    given: dict[str, Any] = {
        "api_key_env": "NO_SUCH_KEY", "context": 512, "max_sequences": 64, "batch_tokens": 1024, "dtype": None,
        "transport": "file", "weights_dir": None, "nccl_address": None, "sync_timeout_s": 30, "patience_s": 20,
    }  # fmt: skip
    model = tiny_llama(TOKENIZER.vocab_size, seed=2)
    return VLLMServers(model=model, tokenizer=TOKENIZER, urls=(url,), **given | settings)


def with_engine(standing: Standing, work: Callable[[VLLMServers], Awaitable[None]], **settings: Any) -> None:
    async def main(url: str) -> None:
        engine = make(url, **settings)
        try:
            await engine.load_weights(engine.model.named_parameters(), 0)
            await work(engine)
        finally:
            await engine.close()

    with served(standing.app()) as url:
        asyncio.run(asyncio.wait_for(main(url), 60))


async def generate(engine: VLLMServers, seed: int) -> list[int]:
    asked = engine.generate([5, 6], stop=(), max_tokens=1, temperature=1.0, seed=seed, session=str(seed))
    return (await asked).token_ids


def test_weights_that_arrived_without_a_word_of_it_are_published_again():
    """The second time they change nothing, and the server is not to blame for that."""
    standing = Standing(late_s=1.0)

    async def publish(engine: VLLMServers) -> None:
        new = [(name, p.detach() + 1) for name, p in engine.model.named_parameters()]
        await engine.load_weights(new, 1)
        assert engine.version == 1

    with_engine(standing, publish, sync_timeout_s=1)
    assert standing.heard.count("otcrl_load_file") == 3
    assert standing.worker.otcrl_version == 1


def test_a_server_whose_connection_broke_is_in_again_though_weights_are_not_kept():
    """By NCCL nothing can be sent between publications; but one that has the version needs nothing."""
    standing = Standing()

    async def lose(engine: VLLMServers) -> None:
        engine._weights.keeps = False  # as by NCCL
        asking = asyncio.create_task(generate(engine, 1))
        await asyncio.sleep(0.05)
        engine._fleet.eject(engine._fleet.servers[0], "ReadError")
        assert await asking == [5]

    with_engine(standing, lose)
    assert standing.heard.count("otcrl_load_file") == 1


def test_a_server_that_takes_no_requests_while_it_is_paused_stays_in():
    standing = Standing(refuses=2)

    async def ask(engine: VLLMServers) -> None:
        assert await generate(engine, 1) == [5]
        assert engine._fleet.servers[0].losses == 0

    with_engine(standing, ask)
    assert standing.heard.count("/v1/completions") == 3


def test_a_server_without_the_version_stays_out_where_weights_are_not_kept():
    standing = Standing()

    async def restart(engine: VLLMServers) -> None:
        engine._weights.keeps = False
        engine._fleet.eject(engine._fleet.servers[0], "it was started anew")
        standing.worker.otcrl_version = -1
        await asyncio.sleep(5)
        assert engine._fleet.servers[0].version is None

    with_engine(standing, restart)


def test_probes_go_to_the_servers_in_turn_whoever_has_less_to_do():
    fleet = Fleet(["http://a:1", "http://b:1"])
    for server in fleet.servers:
        fleet.admit(server, 1)
    for number in range(8):
        fleet.route(f"trajectory {number}")
    for number in (0, 2):  # of one server
        fleet.release(f"trajectory {number}")
    found = [fleet.route(f"score {turn}", turn) for turn in range(2)]
    assert {server.url for server in found if server} == {"http://a:1", "http://b:1"}


def test_who_may_open_few_files_asks_fewer_at_a_time_and_blames_no_server():
    code = """
import asyncio, resource, sys
from tests.test_fleet import generate, make
resource.setrlimit(resource.RLIMIT_NOFILE, (100, 100))
async def main():
    engine = make(sys.argv[1])
    await engine.load_weights(engine.model.named_parameters(), 0)
    async with asyncio.timeout(30):
        await asyncio.gather(*(generate(engine, number) for number in range(150)))
    print("lost", engine._fleet.servers[0].losses)
    await engine.close()
asyncio.run(main())
"""
    with served(Standing().app()) as url:
        done = subprocess.run([sys.executable, "-c", code, url], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.stdout.strip().endswith("lost 0"), done.stderr
    assert "as many files and connections open as it may, which is 100" in done.stderr


def test_a_trainer_may_open_as_many_connections_as_the_system_lets_it():
    code = """
import resource
soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (256, min(hard, 4096)))
from tests.test_fleet import make
make("http://127.0.0.1:1")
print(resource.getrlimit(resource.RLIMIT_NOFILE)[0] == min(hard, 4096))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.stdout == "True\n", done.stderr
