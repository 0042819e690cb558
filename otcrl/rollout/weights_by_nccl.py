"""New weights for rollout servers from GPU to GPU: the learner broadcasts, vLLM's own NCCL engine receives.

The trainer's side of that engine has another interface in 0.20, 0.28 and 0.33. What goes over the wire has not: a
group of NCCL in which the trainer is rank 0, and one broadcast for each parameter, in the order that was announced.
That is spoken here, so one sender serves every version.

NCCL waits for ever for a rank that has died. So the broadcasts run on a daemon thread, which hinders nobody from going
on or ending, and everything else, with a deadline, on the event loop. A group that has lost a rank is over: it is
destroyed on both sides, which wakes who waits in it (vLLM 0.20 cannot), and whoever is left gets all weights anew.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Protocol, TypeVar
from urllib.parse import urlsplit

import torch
from torch import Tensor

from otcrl.errors import EngineError
from otcrl.models.devices import make_current
from otcrl.models.published import Layers, is_split
from otcrl.rollout.daemon import in_daemon_thread
from otcrl.rollout.fleet import Fleet, Server, named
from otcrl.rollout.publication import Message, check_delivery, check_names
from otcrl.rollout.vllm_worker import fingerprint
from otcrl.tools.remote import ServerLost

if TYPE_CHECKING:
    from httpx import Response
    from transformers import PreTrainedModel

NAME = "weights by NCCL"  # of the threads
DESTROY_S = 6.0  # that a group's end is waited for; vLLM itself waits for 5
WORKERS_SHARE, ANSWERS_SHARE = 0.35, 0.45  # of a publication's time, for one broadcast: a second must fit in it
MAX_LOST = 3  # broadcasts that lose a server, until a publication is without
T = TypeVar("T")


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
        self._lost = 0  # broadcasts that lost a server, since a publication was without

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
        except BaseException:  # whatever it is goes on, and nobody knows who is where in the group
            self._end_group()
            raise

    async def _bring(self, servers: Sequence[Server]) -> list[Server]:
        before, undisturbed = self._digests, True
        while True:
            servers = await self._fleet.each(servers, self._begin)  # who is lost until here is left out
            if not servers:
                return []
            try:
                await self._join(servers)
                self._digests = await self._send(servers)
                break
            except ServerLost as error:
                self._end_group()
                # who is left may have some of the weights: they will not change in it, now or when it is asked again
                before, self._digests, undisturbed = {}, {}, False
                servers = await self._left(servers, error)
        if undisturbed:
            self._lost = 0
        await self._fleet.each(servers, self._finish)
        all_changed = bool(before) and all(before.get(name) != digest for name, digest in self._digests.items())
        types = sorted({str(dtype).removeprefix("torch.") for _, dtype, _ in self._source.described()})

        async def arrived(server: Server) -> None:
            reports = await self._fleet.rpc(server, "otcrl_arrived", self._version, types, timeout_s=self._timeout_s)
            with named(server):
                check_delivery(reports, Message("", {}, self._version, all_changed))

        return await self._fleet.each(servers, arrived)

    async def _begin(self, server: Server) -> None:
        """Whatever does not need the others."""
        await self._fleet.rpc(server, "otcrl_remember", WORKERS_SHARE * self._timeout_s)
        answer = await self._fleet.ask(server, "GET", "/get_world_size")
        self._workers[server.url] = answer.json()["world_size"]
        answer = await self._session(server, "/start_weight_update")
        if answer.is_server_error:  # a trainer that has died within an update left it open
            await self._session(server, "/finish_weight_update")
            answer = await self._session(server, "/start_weight_update")
        check(answer)

    async def _finish(self, server: Server) -> None:
        check(await self._session(server, "/finish_weight_update"))

    async def _session(self, server: Server, path: str) -> Response:
        """Opens or ends an update, where vLLM has such things (not in 0.20)."""
        return await self._fleet.attempt(server, "POST", path, {}, timeout_s=self._timeout_s)

    async def _join(self, servers: Sequence[Server]) -> None:
        """This process and all their workers are in one group. Raises ServerLost if a server is lost meanwhile."""
        if self._group is not None and self._members == [(server, server.losses) for server in servers]:
            return
        self._end_group()  # also for one that was lost and is a new process now
        await asyncio.gather(*(self._fleet.rpc(server, "otcrl_leave") for server in servers))
        sizes = [self._workers[server.url] for server in servers]
        address, port = self._address or address_towards(servers[0].url), free_port()
        group = {"master_address": address, "master_port": port, "world_size": 1 + sum(sizes)}
        bodies = [{"init_info": {**group, "rank_offset": 1 + sum(sizes[:number])}} for number in range(len(servers))]
        ranks, device = 1 + sum(sizes), self._model.device
        opening = in_daemon_thread(lambda: self._open_group(address, port, ranks, device), NAME)
        self._group = await self._together(opening, servers, "/init_weight_transfer_engine", bodies)
        self._members = [(server, server.losses) for server in servers]

    async def _send(self, servers: Sequence[Server]) -> dict[str, str]:
        """Digests of what was sent. Raises ServerLost if a server is lost meanwhile."""
        described, group, source = self._source.described(), self._group, self._source
        assert group is not None, "the group is open"
        names, types, shapes = (list(column) for column in zip(*described, strict=True))
        what = {"names": names, "dtype_names": [str(t).removeprefix("torch.") for t in types], "shapes": shapes}
        sending = in_daemon_thread(lambda: sent(source, group.broadcast, self._model.device), NAME)
        return await self._together(sending, servers, "/update_weights", [{"update_info": what}] * len(servers))

    async def _together(
        self, mine: asyncio.Future[T], servers: Sequence[Server], path: str, bodies: Sequence[object]
    ) -> T:
        """What this process has of it, when all workers have taken part. Raises ServerLost when one has not.

        The others have then answered too: they give up waiting after a while (`otcrl_remember`), or are lost as well.
        """
        asked = (
            self._fleet.ask(server, "POST", path, body, timeout_s=ANSWERS_SHARE * self._timeout_s)
            for server, body in zip(servers, bodies, strict=True)
        )
        try:
            answers = await asyncio.gather(*asked, return_exceptions=True)
            failed = [answer for answer in answers if isinstance(answer, BaseException)]
            lost = [error for error in failed if isinstance(error, ServerLost)]
            broken = mine.exception() if mine.done() else None
            if isinstance(broken, EngineError):  # this process cannot take part: the others wait in vain
                raise broken
            if lost or (failed and broken is None):
                raise (lost or failed)[0]
            return await mine
        except RuntimeError as error:  # NCCL's
            raise EngineError(f"weights could not be broadcast: {error}") from error
        finally:
            mine.cancel()  # if it is not done, its thread may wait for ever

    async def _left(self, servers: Sequence[Server], error: ServerLost) -> list[Server]:
        """Those that are still there after one was lost in a broadcast. Raises EngineError if that goes on."""
        self._lost += 1
        if self._lost > MAX_LOST:
            raise EngineError(
                f"{self._lost} broadcasts of weights have lost a server, and no publication went without. Last: {error}"
            ) from error
        if is_split(self._model):  # the other ranks gather it too, once
            raise EngineError(f"a server was lost in the middle of a broadcast, {error}") from error

        async def finish(server: Server) -> None:
            """Its update ends, if it has not: whatever has arrived is sent again."""
            await self._session(server, "/finish_weight_update")

        return await self._fleet.each([server for server in servers if server.is_up], finish)

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


def check(answer: Response) -> None:
    """Raises EngineError for a refusal; one that does not know the route has no need of it."""
    if answer.is_error and answer.status_code != 404:
        raise EngineError(f"{answer.url} answered {answer.status_code}: {answer.text[:1000]}")


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
