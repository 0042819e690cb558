"""Weights from the learner's GPU to rollout servers: what is announced and sent, in which order, and what if it hangs.

NCCL itself needs two GPUs (the last test); here a group is anything that takes tensors, and a server what answers.
"""

from __future__ import annotations

import asyncio
import copy
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from torch import Tensor

from otcrl.errors import EngineError
from otcrl.models.published import Layers, layer_of
from otcrl.rollout.fleet import Fleet
from otcrl.rollout.gate import deadline
from otcrl.rollout.vllm_worker import Receiver
from otcrl.rollout.weights_by_nccl import WeightsByNCCL, sent
from tests.apps import served
from tests.tiny import tiny_llama

CPU = torch.device("cpu")
MODEL = tiny_llama(32, heads=(1, 1))
NAMES = [name for name, _ in MODEL.named_parameters()]


# -- a layer at a time ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("model.layers.3.mlp.up_proj.weight", "model.layers.3"),
        ("model.layers.3.mlp.experts.7.w1", "model.layers.3"),  # an expert is part of its layer
        ("transformer.h.0.ln_1.bias", "transformer.h.0"),
        ("lm_head.weight", "lm_head.weight"),
    ],
)
def test_a_layer_is_what_has_the_first_number_in_common(name, layer):
    assert layer_of(name) == layer


@dataclass
class Sharded:
    """Parameters of which nothing is here until they are gathered, as under ZeRO-3."""

    whole: dict[str, Tensor]
    shards: dict[str, Tensor] = field(init=False)
    gathered: list[list[str]] = field(default_factory=list)
    at_once: int = 0

    def __post_init__(self) -> None:
        self.shards = {name: torch.empty(0) for name in self.whole}
        for name, shard in self.shards.items():
            shard.ds_shape = self.whole[name].shape  # pyright: ignore[reportAttributeAccessIssue]

    @contextmanager
    def gather(self, parameters: Sequence[Tensor]) -> Iterator[None]:
        names = [name for p in parameters for name, shard in self.shards.items() if shard is p]
        self.gathered.append(names)
        for name in names:
            self.shards[name].data = self.whole[name]
        self.at_once = max(self.at_once, sum(shard.numel() > 0 for shard in self.shards.values()))
        yield
        for name in names:
            self.shards[name].data = torch.empty(0)

    def source(self) -> Layers:
        return Layers(Layers.of(self.shards.items()).weights, self.gather)


@pytest.fixture
def sharded() -> Sharded:
    return Sharded({name: parameter.detach().clone() for name, parameter in MODEL.named_parameters()})


def test_a_sharded_model_is_announced_whole_without_being_gathered(sharded):
    expected = [(name, p.dtype, list(p.shape)) for name, p in MODEL.named_parameters()]
    assert sharded.source().described() == Layers.of(list(MODEL.named_parameters())).described() == expected
    assert sharded.gathered == []


def test_never_more_than_one_layer_is_whole(sharded):
    arrived = []
    sent(sharded.source(), lambda tensor: arrived.append(tensor.clone()), CPU)
    assert [tuple(t.shape) for t in arrived] == [tuple(p.shape) for p in MODEL.parameters()]
    assert all(torch.equal(a, p) for a, p in zip(arrived, MODEL.parameters(), strict=True))
    assert [name for layer in sharded.gathered for name in layer] == NAMES
    layers = [layer for layer in sharded.gathered if layer[0].startswith("model.layers.")]
    assert [len(layer) for layer in layers] == [9, 9]
    assert sharded.at_once == 9


def test_iteration_gives_each_parameter_while_it_is_whole(sharded):
    for (name, tensor), (expected_name, parameter) in zip(sharded.source(), MODEL.named_parameters(), strict=True):
        assert name == expected_name
        assert torch.equal(tensor, parameter)


def test_what_lies_otherwise_in_memory_is_sent_in_its_order():
    turned = torch.arange(6.0).view(2, 3).t()
    arrived = []
    sent(Layers.of([("x", turned)]), arrived.append, CPU)
    assert arrived[0].is_contiguous()
    assert torch.equal(arrived[0], turned)


# -- what the servers are told ----------------------------------------------------------------------------


@dataclass
class Receiving:
    """A server whose workers take part in whatever is broadcast, and say what they are asked."""

    workers: int = 1
    without: tuple[str, ...] = ()  # routes that its version does not have
    unchanged: tuple[str, ...] = ()  # parameters that keep their old values
    fails: str = ""  # at this route
    lost_at: str = ""  # this route
    updating: bool = False  # an update is open
    heard: list[tuple[str, Any]] = field(default_factory=list)

    def app(self) -> FastAPI:
        app = FastAPI()
        app.get("/get_world_size")(lambda: {"world_size": self.workers})

        @app.post("/collective_rpc")
        async def rpc(request: Request) -> dict[str, Any]:
            body = await request.json()
            self.heard.append((body["method"], body["args"]))
            report = {"version": (body["args"] or [None])[0], "damaged": [], "unchanged": list(self.unchanged)}
            return {"results": [report] * self.workers}

        @app.post("/{route}")
        async def control(route: str, request: Request) -> JSONResponse:
            if route in self.without:
                return JSONResponse({"detail": "Not Found"}, 404)
            if route == self.lost_at:
                return JSONResponse({"message": "the engine is dead"}, 503)
            self.heard.append((route, await request.json()))
            if route in ("start_weight_update", "finish_weight_update"):
                starts = route == "start_weight_update"
                if starts == self.updating:
                    return JSONResponse({"message": "a weight update is already active, or none is"}, 500)
                self.updating = starts
            return JSONResponse({"message": "out of memory"}, 500 if route == self.fails else 200)

        app.get("/health")(lambda: None)
        return app

    def routes(self) -> list[str]:
        return [route for route, _ in self.heard]

    def told(self, route: str) -> Any:
        return next(body for heard, body in self.heard if heard == route)


@dataclass
class Group:
    """What was opened and broadcast."""

    opened: list[tuple[str, int]] = field(default_factory=list)  # (address, ranks)
    arrived: list[Tensor] = field(default_factory=list)
    destroyed: int = 0
    threads: set[threading.Thread] = field(default_factory=set)

    def open(self, address: str, port: int, ranks: int, device: torch.device) -> Group:
        assert port > 0
        assert device == MODEL.device
        self.opened.append((address, ranks))
        return self

    def destroy(self) -> None:
        self.destroyed += 1

    def broadcast(self, tensor: Tensor) -> None:
        self.threads.add(threading.current_thread())
        self.arrived.append(tensor.clone())


def publish(servers: list[Receiving], group: Any, *versions: int, change: float = 1.0, seconds: float = 30) -> None:
    """One publication for each version; the weights change by `change` before each but the first."""

    async def all_of_them(urls: list[str]) -> None:
        fleet = Fleet(urls)
        weights = WeightsByNCCL(fleet, MODEL, None, 30, group.open)
        for number, version in enumerate(versions):
            weights.prepare([(name, p.detach() + number * change) for name, p in MODEL.named_parameters()], version)
            async with deadline(seconds, "publishing"):
                assert await weights.bring(fleet.servers) == fleet.servers
        await fleet.close()

    with ExitStack() as stack:
        asyncio.run(all_of_them([stack.enter_context(served(server.app())) for server in servers]))


def test_each_worker_of_each_server_has_a_rank_of_its_own():
    servers, group = [Receiving(workers=2), Receiving(workers=3)], Group()
    publish(servers, group, 0)
    assert group.opened == [("127.0.0.1", 6)], "the way to the servers, and the learner with five workers"
    infos = [server.told("init_weight_transfer_engine")["init_info"] for server in servers]
    assert [(info["rank_offset"], info["world_size"]) for info in infos] == [(1, 6), (3, 6)]
    assert infos[0]["master_port"] == infos[1]["master_port"]


def test_what_is_announced_is_what_is_sent_in_one_order():
    server, group = Receiving(), Group()
    publish([server], group, 7)
    announced = server.told("update_weights")["update_info"]
    assert announced["names"] == NAMES
    assert announced["shapes"] == [list(tensor.shape) for tensor in group.arrived]
    assert set(announced["dtype_names"]) == {"float32"}
    assert all(torch.equal(a, p) for a, p in zip(group.arrived, MODEL.parameters(), strict=True))
    assert server.routes() == [
        *["otcrl_remember", "start_weight_update", "otcrl_leave", "init_weight_transfer_engine", "update_weights"],
        *["finish_weight_update", "otcrl_arrived"],
    ]
    assert server.told("otcrl_arrived") == [7, ["float32"]]


def test_the_group_stays_open():
    server, group = Receiving(), Group()
    publish([server], group, 0, 1, 2)
    assert len(group.opened) == 1
    assert server.routes().count("update_weights") == 3
    assert threading.main_thread() not in group.threads


def test_who_is_in_the_group_changes_with_who_is_in():
    servers, group = [Receiving(), Receiving()], Group()

    async def one_falls_out(urls: list[str]) -> None:
        fleet = Fleet(urls)
        weights = WeightsByNCCL(fleet, MODEL, None, 30, group.open)
        for members in (fleet.servers, fleet.servers[1:], fleet.servers):
            weights.prepare(MODEL.named_parameters(), 0)
            assert await weights.bring(members) == members
        await fleet.close()

    with ExitStack() as stack:
        asyncio.run(one_falls_out([stack.enter_context(served(server.app())) for server in servers]))
    assert [ranks for _, ranks in group.opened] == [3, 2, 3]
    assert group.destroyed == 2, "each that was left"
    assert servers[1].routes().count("otcrl_leave") == 3, "on its side too"


def test_a_group_is_destroyed_on_both_sides_when_the_engine_is_closed():
    server, group = Receiving(), Group()

    async def once(url: str) -> None:
        fleet = Fleet([url])
        weights = WeightsByNCCL(fleet, MODEL, None, 30, group.open)
        weights.prepare(MODEL.named_parameters(), 0)
        for each in await weights.bring(fleet.servers):
            fleet.admit(each, 0)
        await weights.close()
        await weights.close()
        await fleet.close()

    with served(server.app()) as url:
        asyncio.run(once(url))
    assert group.destroyed == 1
    assert server.routes()[-1] == "otcrl_leave"


def test_a_group_that_cannot_be_destroyed_keeps_nobody_from_closing(monkeypatch):
    class Stuck(Group):
        def destroy(self) -> None:
            threading.Event().wait()

    monkeypatch.setattr("otcrl.rollout.weights_by_nccl.DESTROY_S", 0.1)

    async def once(url: str) -> None:
        fleet = Fleet([url])
        weights = WeightsByNCCL(fleet, MODEL, None, 30, Stuck().open)
        weights.prepare(MODEL.named_parameters(), 0)
        await weights.bring(fleet.servers)
        async with asyncio.timeout(5):
            await weights.close()
        await fleet.close()

    with served(Receiving().app()) as url:
        asyncio.run(once(url))


def test_a_worker_leaves_its_group_before_it_joins_another():
    worker, group = Receiver(), Group()
    worker.otcrl_leave()  # it has no engine for it
    engine = SimpleNamespace(model_update_group=None)
    worker.weight_transfer_engine = engine  # pyright: ignore[reportAttributeAccessIssue]
    worker.otcrl_leave()  # and now no group
    engine.model_update_group = group
    worker.otcrl_leave()
    worker.otcrl_leave()
    assert group.destroyed == 1
    assert engine.model_update_group is None


def test_one_that_is_lost_before_the_broadcast_is_left_out_and_a_smaller_group_opened():
    servers, group = [Receiving(workers=2), Receiving()], Group()

    async def one_is_lost(urls: list[str]) -> None:
        fleet = Fleet(urls)
        weights = WeightsByNCCL(fleet, MODEL, None, 30, group.open)
        weights.prepare(MODEL.named_parameters(), 0)
        assert await weights.bring(fleet.servers) == fleet.servers
        servers[0].lost_at = "start_weight_update"
        weights.prepare([(name, p.detach() + 1) for name, p in MODEL.named_parameters()], 1)
        assert await weights.bring(fleet.servers) == fleet.servers[1:]
        await fleet.close()

    with ExitStack() as stack:
        asyncio.run(one_is_lost([stack.enter_context(served(server.app())) for server in servers]))
    assert [ranks for _, ranks in group.opened] == [4, 2]
    assert servers[1].told("otcrl_arrived")[0] == 0
    assert servers[1].heard[-1][1][0] == 1, "the second version arrived"


def test_one_that_was_lost_and_is_back_has_to_join_again():
    """The same server by its URL, and another process: it has never heard of the group."""
    servers, group = [Receiving(), Receiving()], Group()

    async def one_restarts(urls: list[str]) -> None:
        fleet = Fleet(urls)
        weights = WeightsByNCCL(fleet, MODEL, None, 30, group.open)
        for number in range(2):
            weights.prepare([(name, p.detach() + number) for name, p in MODEL.named_parameters()], number)
            assert await weights.bring(fleet.servers) == fleet.servers
            fleet.eject(fleet.servers[1], "killed, and started again")
        await fleet.close()

    with ExitStack() as stack:
        asyncio.run(one_restarts([stack.enter_context(served(server.app())) for server in servers]))
    assert [ranks for _, ranks in group.opened] == [3, 3]
    assert servers[1].routes().count("init_weight_transfer_engine") == 2


def test_a_version_without_sessions_does_without():
    server = Receiving(without=("start_weight_update", "finish_weight_update"))
    publish([server], Group(), 0, 1)
    assert server.routes().count("update_weights") == 2


def test_an_update_that_a_trainer_left_open_when_it_died_is_ended_first():
    server = Receiving(updating=True)
    publish([server], Group(), 0)
    start, finish = "start_weight_update", "finish_weight_update"
    assert [route for route in server.routes() if route in (start, finish)] == [start, finish, start, finish]


def test_one_that_lets_no_update_begin_is_named():
    with pytest.raises(EngineError, match=r"http://.*/start_weight_update answered 500: .*out of memory"):
        publish([Receiving(fails="start_weight_update")], Group(), 0)


def test_a_parameter_that_did_not_change_is_named():
    with pytest.raises(EngineError, match=r"worker 0 kept the old values of model\.norm\.weight when 1 was published"):
        publish([Receiving(unchanged=("model.norm.weight",))], Group(), 0, 1)


def test_a_parameter_that_the_learner_did_not_change_may_stay():
    publish([Receiving(unchanged=("model.norm.weight",))], Group(), 0, 1, change=0.0)


def test_a_server_that_refuses_is_named():
    with pytest.raises(EngineError, match=r"http://.*/update_weights answered 500: .*out of memory"):
        publish([Receiving(fails="update_weights")], Group(), 0)


def test_a_missing_parameter_is_named_before_anything_is_sent():
    weights = WeightsByNCCL(Fleet(["http://127.0.0.1:1"]), MODEL, None, 1)
    with pytest.raises(EngineError, match=r"not among the new weights: model\.norm\.weight"):
        weights.prepare([(name, p) for name, p in MODEL.named_parameters() if name != "model.norm.weight"], 0)


# -- what hangs -------------------------------------------------------------------------------------------


@dataclass
class Hanging(Group):
    """Who broadcasts waits until it is destroyed, as when another rank is lost."""

    over: threading.Event = field(default_factory=threading.Event)

    def broadcast(self, tensor: Tensor) -> None:
        self.over.wait()
        raise RuntimeError("NCCL error: the communicator was aborted")

    def destroy(self) -> None:
        super().destroy()
        self.over.set()


def hang() -> None:
    publish([Receiving()], Hanging(), 0, seconds=1)


def test_a_broadcast_that_hangs_ends_the_run_with_the_reason():
    group = Hanging()
    with pytest.raises(EngineError, match=r"publishing took more than engine.sync_timeout_s=1 s"):
        publish([Receiving()], group, 0, seconds=1)
    assert group.over.wait(10), "nor does the thread wait any longer"


def test_and_the_process_ends_though_nobody_wakes_the_thread():
    code = "from tests.test_weights_by_nccl import Hanging, hang; Hanging.destroy = lambda group: None; hang()"
    root = Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1
    assert "EngineError: publishing took more than engine.sync_timeout_s=1 s" in done.stderr


def test_without_nccl_in_this_process_the_run_ends_with_that_and_no_server_is_blamed():
    class Without(Group):
        def open(self, address: str, port: int, ranks: int, device: torch.device) -> Group:
            raise EngineError("vLLM finds no NCCL here")

    with pytest.raises(EngineError, match="finds no NCCL here"):
        publish([Receiving(lost_at="init_weight_transfer_engine")], Without(), 0)


def test_a_worker_that_waits_for_weights_in_vain_leaves_their_group():
    worker, first, second = Receiver(), Hanging(), Hanging()
    worker.model_runner = SimpleNamespace(get_model=lambda: MODEL)
    worker.vllm_config = SimpleNamespace(load_config=SimpleNamespace(load_format="auto"))
    engine = SimpleNamespace(model_update_group=first)
    worker.weight_transfer_engine = engine  # pyright: ignore[reportAttributeAccessIssue]
    worker.otcrl_remember(0.2)
    worker.otcrl_arrived(1, ["float32"])
    assert not first.over.wait(0.5), "they came in time"
    worker.otcrl_remember(0.5)
    worker.otcrl_leave()
    assert first.over.is_set()
    engine.model_update_group = second
    assert second.over.wait(10), "the limit holds for the group that it joins then"
    assert (first.destroyed, second.destroyed) == (1, 1)


# -- a server is lost in the middle -----------------------------------------------------------------------


@dataclass
class FirstHangs(Group):
    """The first group has lost a rank; those that are opened after it have not."""

    first: Hanging = field(default_factory=Hanging)

    def open(self, address: str, port: int, ranks: int, device: torch.device) -> Group:
        super().open(address, port, ranks, device)
        return self if len(self.opened) > 1 else self.first


@dataclass
class WakesUp(Receiving):
    """What it says of an update that it was woken from; it takes the next."""

    def app(self) -> FastAPI:
        app = super().app()

        @app.middleware("http")
        async def once(request: Request, go_on: Any) -> Any:
            answer = await go_on(request)
            if request.url.path == f"/{self.fails}":
                self.fails = ""
            return answer

        return app


@pytest.mark.parametrize("fails", ["", "update_weights"], ids=["with what came", "with an error"])
def test_a_server_that_is_lost_in_a_broadcast_is_left_out_and_all_is_sent_anew(fails):
    servers, group = [WakesUp(fails=fails), Receiving(lost_at="update_weights")], FirstHangs()

    async def one_is_lost(urls: list[str]) -> None:
        fleet = Fleet(urls)
        weights = WeightsByNCCL(fleet, MODEL, None, 30, group.open)
        weights.prepare(MODEL.named_parameters(), 0)
        async with asyncio.timeout(10):
            assert await weights.bring(fleet.servers) == fleet.servers[:1]
        assert [server.is_up for server in fleet.servers] == [True, False]
        await fleet.close()

    with ExitStack() as stack:
        asyncio.run(one_is_lost([stack.enter_context(served(server.app())) for server in servers]))
    assert [ranks for _, ranks in group.opened] == [3, 2]
    assert group.first.over.is_set(), "nobody waits in it any more"
    assert all(torch.equal(a, p) for a, p in zip(group.arrived, MODEL.parameters(), strict=True))
    once = ["otcrl_remember", "start_weight_update", "otcrl_leave", "init_weight_transfer_engine", "update_weights"]
    assert servers[0].routes() == [*once, "finish_weight_update", *once, "finish_weight_update", "otcrl_arrived"]


def test_a_parameter_that_arrived_in_a_broadcast_that_failed_may_stay_in_the_next():
    servers = [Receiving(unchanged=("model.norm.weight",)), Receiving()]
    group = FirstHangs()

    async def second_is_lost(urls: list[str]) -> None:
        fleet = Fleet(urls)
        group.opened.append(("", 0))  # the first publication goes well
        weights = WeightsByNCCL(fleet, MODEL, None, 30, group.open)
        weights.prepare(MODEL.named_parameters(), 0)
        assert await weights.bring(fleet.servers) == fleet.servers
        servers[1].lost_at = "update_weights"
        weights.prepare([(name, p.detach() + 1) for name, p in MODEL.named_parameters()], 1)
        assert await weights.bring(fleet.servers) == fleet.servers[:1]
        await fleet.close()

    with ExitStack() as stack:
        asyncio.run(second_is_lost([stack.enter_context(served(server.app())) for server in servers]))


def test_a_parameter_that_arrived_with_the_only_server_may_stay_when_all_is_sent_anew():
    server, group = Receiving(), Group()

    async def its_answer_is_lost(url: str) -> None:
        fleet = Fleet([url])
        weights = WeightsByNCCL(fleet, MODEL, None, 30, group.open)
        weights.prepare(MODEL.named_parameters(), 0)
        assert await weights.bring(fleet.servers) == fleet.servers
        server.lost_at = "update_weights"
        weights.prepare([(name, p.detach() + 1) for name, p in MODEL.named_parameters()], 1)
        assert await weights.bring(fleet.servers) == []
        server.lost_at, server.updating, server.unchanged = "", False, ("model.norm.weight",)
        fleet.servers[0].is_up = True
        assert await weights.bring(fleet.servers) == fleet.servers
        await fleet.close()

    with served(server.app()) as url:
        asyncio.run(its_answer_is_lost(url))


def test_a_split_model_is_not_gathered_again_by_one_rank_alone():
    split, group = copy.deepcopy(MODEL), Group()
    for parameter in split.parameters():
        parameter.ds_shape = parameter.shape  # pyright: ignore[reportAttributeAccessIssue]

    async def one_is_lost(url: str) -> None:
        fleet = Fleet([url])
        weights = WeightsByNCCL(fleet, split, None, 30, group.open)
        weights.prepare(split.named_parameters(), 0)
        with pytest.raises(EngineError, match=f"a server was lost in the middle of a broadcast, {url}"):
            await weights.bring(fleet.servers)
        await fleet.close()

    with served(Receiving(lost_at="update_weights").app()) as url:
        asyncio.run(one_is_lost(url))


def test_when_every_publication_loses_a_server_the_run_ends_and_says_why():
    servers, group = [Receiving(), Receiving(lost_at="update_weights")], Group()

    async def again_and_again(urls: list[str]) -> None:
        fleet = Fleet(urls)
        weights = WeightsByNCCL(fleet, MODEL, None, 30, group.open)
        for number in range(10):
            weights.prepare(MODEL.named_parameters(), number)
            await weights.bring(fleet.servers)
            fleet.servers[1].is_up = True
        await fleet.close()

    with ExitStack() as stack:
        urls = [stack.enter_context(served(server.app())) for server in servers]
        with pytest.raises(EngineError, match=rf"4 broadcasts of weights have lost a server.* Last: {urls[1]}"):
            asyncio.run(again_and_again(urls))


# -- NCCL -------------------------------------------------------------------------------------------------


@pytest.mark.gpu
def test_a_server_on_another_gpu_gets_the_weights_and_samples_from_them(tmp_path):
    """The learner on the first GPU, vLLM on the second."""
    pytest.importorskip("vllm", reason="needs vLLM")
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs: NCCL has one rank on each")
    from otcrl.rollout.vllm_worker import EXTENSION
    from tests.test_vllm_servers import FLAGS, PROMPT, TOKENIZER, apart, fresh_model, learner_logprobs, make
    from tests.vllm_serve import VLLMServer, free_port

    fresh_model().config.save_pretrained(tmp_path / "model")
    TOKENIZER.hf.save_pretrained(tmp_path / "model")
    assert FLAGS["--worker-extension-cls"] == EXTENSION
    flags = [word for pair in FLAGS.items() for word in pair if pair[0] != "--block-size"]
    server = VLLMServer(
        tmp_path / "model",
        (*flags, "--weight-transfer-config", '{"backend": "nccl"}', "--gpu-memory-utilization", "0.2"),
        free_port(),
        environment={"CUDA_VISIBLE_DEVICES": "1"},
    )
    server.start()
    try:
        server.wait()
        asyncio.run(twice(server.url, fresh_model, make, learner_logprobs, apart, PROMPT))
    finally:
        server.kill(signal.SIGTERM)


async def twice(url: str, fresh_model: Any, make: Any, learner_logprobs: Any, apart: Any, prompt: list[int]) -> None:
    learner = fresh_model().to("cuda:0")
    engine = make([url], learner, transport="nccl", sync_timeout_s=120)
    try:
        for version in range(2):
            weights = fresh_model(seed=version).to("cuda:0")
            await engine.load_weights(weights.named_parameters(), version)
            found = await engine.generate(prompt, session="s", seed=1, stop=(), max_tokens=24, temperature=1.0)
            expected = learner_logprobs(weights.cpu(), prompt + found.token_ids)
            assert apart(found.logprobs, expected[len(prompt) :]) < 1e-2
            assert set(found.versions) == {version}
    finally:
        await engine.close()
