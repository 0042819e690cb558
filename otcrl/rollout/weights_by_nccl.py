"""New weights for rollout servers from GPU to GPU: the learner broadcasts, vLLM's own NCCL engine receives.

The trainer's side of that engine has another interface in 0.20, 0.28 and 0.33. What goes over the wire has not: a
group of NCCL in which the trainer is rank 0, and one broadcast for each parameter, in the order that was announced.
That is spoken here, so one sender serves every version.

NCCL waits for ever for a rank that has died. So the broadcasts run on a daemon thread, which hinders nobody from going
on or ending, and everything else, with a deadline, on the event loop.

A group that is over is destroyed on both sides, which also wakes who waits in it. vLLM 0.20 cannot wake anybody.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Protocol
from urllib.parse import urlsplit

import torch
from torch import Tensor

from otcrl.errors import EngineError
from otcrl.models.devices import make_current
from otcrl.models.published import Layers
from otcrl.rollout.daemon import in_daemon_thread
from otcrl.rollout.fleet import Fleet, Server, named
from otcrl.rollout.publication import Message, check_delivery, check_names
from otcrl.rollout.vllm_worker import fingerprint
from otcrl.tools.remote import ServerLost

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NAME = "weights by NCCL"  # of the threads
DESTROY_S = 6.0  # that a group's end is waited for; vLLM itself waits for 5


class Group(Protocol):
    def broadcast(self, tensor: Tensor) -> None:
        """To all other ranks."""
        ...

    def destroy(self) -> None:
        """It is over. May take long where another rank has died."""
        ...


OpenGroup = Callable[[str, int, int, torch.device], Group]  # (address, port, ranks, this rank's GPU)


class WeightsByNCCL:
    keeps = False  # the learner goes on to change what it sent

    def __init__(
        self,
        fleet: Fleet,
        model: PreTrainedModel,
        address: str | None,
        timeout_s: float,
        open_group: OpenGroup | None = None,  # None: vLLM's
    ) -> None:
        self._fleet, self._model, self._address, self._timeout_s = fleet, model, address, timeout_s
        self._open_group = open_group or nccl_group
        self._group: Group | None = None
        self._members: list[tuple[Server, int]] = []  # of the group; how often each had been lost
        self._workers: dict[str, int] = {}  # by URL of their server
        self._source = Layers(())
        self._version = 0
        self._digests: dict[str, str] = {}

    def prepare(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Raises EngineError naming a parameter that is missing, unknown or of another shape."""
        self._source = weights if isinstance(weights, Layers) else Layers.of(weights)
        self._version = version
        described = self._source.described()
        list(check_names([(name, torch.empty(shape, device="meta")) for name, _, shape in described], self._model))

    async def bring(self, servers: Sequence[Server], *, again: bool = False) -> list[Server]:
        """Those that have the weights prepared last. Raises EngineError naming a parameter that did not change."""
        assert not again, "weights are not kept"
        try:
            return await self._bring(servers)
        except BaseException:
            self._end_group()  # nobody knows who is where in it
            raise

    async def _bring(self, servers: Sequence[Server]) -> list[Server]:
        servers = await self._fleet.each(servers, self._begin)  # who is lost until here is left out
        if not servers:
            return []
        if self._group is None or self._members != [(server, server.losses) for server in servers]:
            self._end_group()  # also for one that was lost and is a new process now
            servers = await self._fleet.each(servers, lambda server: self._fleet.rpc(server, "otcrl_leave"))
            if not servers:
                return []
            await self._open(servers)
        before, self._digests = self._digests, await self._send(servers)
        await self._fleet.each(servers, lambda server: self._session(server, "/finish_weight_update"))
        all_changed = bool(before) and all(before.get(name) != digest for name, digest in self._digests.items())
        types = sorted({str(dtype).removeprefix("torch.") for _, dtype, _ in self._source.described()})

        async def arrived(server: Server) -> None:
            reports = await self._fleet.rpc(server, "otcrl_arrived", self._version, types, timeout_s=self._timeout_s)
            with named(server):
                check_delivery(reports, Message("", {}, self._version, all_changed))

        return await self._fleet.each(servers, arrived)

    async def _begin(self, server: Server) -> None:
        """Whatever does not need the others: after this every loss ends the run."""
        await self._fleet.rpc(server, "otcrl_remember")
        answer = await self._fleet.ask(server, "GET", "/get_world_size")
        self._workers[server.url] = answer.json()["world_size"]
        await self._session(server, "/start_weight_update")

    async def _open(self, servers: Sequence[Server]) -> None:
        """A new group of this process and all workers of the servers."""
        sizes = [self._workers[server.url] for server in servers]
        address, port = self._address or address_towards(servers[0].url), free_port()
        group = {"master_address": address, "master_port": port, "world_size": 1 + sum(sizes)}
        bodies = [{"init_info": {**group, "rank_offset": 1 + sum(sizes[:number])}} for number in range(len(servers))]
        path, device = "/init_weight_transfer_engine", self._model.device
        opening = in_daemon_thread(lambda: self._open_group(address, port, group["world_size"], device), NAME)
        joining = [self._collective(s, path, body) for s, body in zip(servers, bodies, strict=True)]
        self._group, *_ = await asyncio.gather(opening, *joining)
        self._members = [(server, server.losses) for server in servers]

    async def _send(self, servers: Sequence[Server]) -> dict[str, str]:
        """Digests of what was sent."""
        described, group, source = self._source.described(), self._group, self._source
        assert group is not None, "the group is open"
        names, types, shapes = (list(column) for column in zip(*described, strict=True))
        what = {"names": names, "dtype_names": [str(t).removeprefix("torch.") for t in types], "shapes": shapes}
        receiving = [self._collective(server, "/update_weights", {"update_info": what}) for server in servers]
        digests, *_ = await asyncio.gather(
            in_daemon_thread(lambda: sent(source, group.broadcast, self._model.device), NAME), *receiving
        )
        return digests

    async def _collective(self, server: Server, path: str, body: object) -> None:
        """What every worker must take part in. Raises EngineError for one that does not: the others wait for ever."""
        try:
            response = await self._fleet.attempt(server, "POST", path, body, timeout_s=self._timeout_s)
        except ServerLost as error:
            raise EngineError(f"a server was lost in the middle of a broadcast, {error}") from error
        if response.is_error:
            raise EngineError(f"{server.url}{path} answered {response.status_code}: {response.text[:1000]}")

    async def _session(self, server: Server, path: str) -> None:
        """Opens or ends an update, where vLLM has such things (not in 0.20)."""
        response = await self._fleet.attempt(server, "POST", path, {}, timeout_s=self._timeout_s)
        if response.is_error and response.status_code != 404:
            raise EngineError(f"{server.url}{path} answered {response.status_code}: {response.text[:1000]}")

    def _end_group(self) -> asyncio.Future[None] | None:
        """On a thread of its own: to destroy it may take as long as what it waits for."""
        if self._group is None:
            return None
        group, self._group = self._group, None
        return in_daemon_thread(group.destroy, f"{NAME} end")

    async def close(self) -> None:
        """Best effort: who cannot be asked to leave the group ends it with its process."""
        if (ending := self._end_group()) is None:
            return

        async def leave(server: Server) -> None:
            with suppress(EngineError):
                await self._fleet.rpc(server, "otcrl_leave", timeout_s=DESTROY_S)

        await self._fleet.each([server for server, _ in self._members if server.version is not None], leave)
        await asyncio.wait([ending], timeout=DESTROY_S)


def sent(source: Layers, broadcast: Callable[[Tensor], None], device: torch.device) -> dict[str, str]:
    """Broadcasts every parameter in order. Digests by name; each has left the GPU before the next is gathered."""
    make_current(device)  # in this thread
    digests = {}
    for name, tensor in source:
        whole = tensor.contiguous()  # NCCL sends what lies behind the pointer
        broadcast(whole)
        digests[name] = fingerprint(whole)
        if device.type == "cuda":
            torch.cuda.current_stream(device).synchronize()
    return digests


def nccl_group(address: str, port: int, ranks: int, device: torch.device) -> Group:
    from otcrl.rollout.vllm_engine import NCCLGroup

    make_current(device)  # in this thread
    return NCCLGroup(address, port, ranks, device)


def address_towards(url: str) -> str:
    """This machine's address on the way to `url`. Nothing is sent."""
    parts = urlsplit(url)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((parts.hostname, parts.port or 80))
        return probe.getsockname()[0]


def free_port() -> int:
    with socket.create_server(("", 0)) as listener:
        return listener.getsockname()[1]
