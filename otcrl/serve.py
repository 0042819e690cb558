"""`otcrl serve`: a tool behind HTTP, so that many runs on other machines can share it."""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import signal
import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, fields
from ipaddress import ip_address
from pathlib import Path
from typing import TYPE_CHECKING, Any

from otcrl.errors import ConfigError, ToolUnavailable, nearest
from otcrl.presets import conf_dir

if TYPE_CHECKING:
    from concurrent.futures import Future

    import uvicorn
    from fastapi import FastAPI

    from otcrl.tools.retrieval.batches import Batches, Searchable

SHARED = ("memory_mb", "preload", "isolation", "bwrap")  # settings whose defaults are those of conf/tools/python.yaml
TEXT = ("token", "host", "index", "device")  # settings that are taken as they are: a token may look like a number


def serve(settings: Sequence[str]) -> int:
    """Serves until SIGTERM; then what runs is finished, and the exit code is 0."""
    name, *rest = settings or [""]
    if name not in SERVERS:
        raise ConfigError(f"otcrl serve has no tool {name!r}.{nearest(name, SERVERS)}")
    from otcrl.compose import parse
    from otcrl.construct import construct_as, settings_of

    cls, defaults = SERVERS[name]
    where, node = f"serve {name}", defaults()
    for setting in rest:
        key, _, text = setting.partition("=")
        node[key] = text if key in TEXT else parse(setting).value()
    own, shared = {"at"} ^ settings_of(cls).keys(), {field.name for field in fields(Address)}
    for key in node.keys() - own - shared:
        raise ConfigError(f"{where}.{key} is not a setting of {cls.__name__}.{nearest(key, own | shared)}")
    at = construct_as(Address, {key: node[key] for key in node.keys() & shared}, where)
    server = construct_as(cls, {key: value for key, value in node.items() if key in own}, where, at=at)
    with closing(at.listen()) as listener:
        asyncio.run(server.run(listener))
    return 0


# -- what all servers share ---------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Address:
    """Where a server listens, and for whom."""

    host: str = "127.0.0.1"
    port: int = 8080  # 0: any that is free
    token: str | None = None  # None: OTCRL_TOKEN of the environment, which other users cannot see

    @property
    def secret(self) -> str | None:
        from otcrl.tools.remote import checked_token

        token = self.token or os.environ.get("OTCRL_TOKEN")
        return checked_token(token) if token else None

    @property
    def is_open(self) -> bool:
        """Whether other machines may come in, and nothing keeps them out."""
        return not self.secret and not is_loopback(self.host)

    def listen(self) -> socket.socket:
        """A socket that takes connections from now on; the first ones wait until somebody serves them."""
        family = socket.AF_INET6 if ":" in self.host else socket.AF_INET
        try:
            listener = socket.create_server((self.host, self.port), family=family, backlog=2048)
        except (OSError, OverflowError) as error:
            raise ConfigError(f"cannot listen on host={self.host} port={self.port}: {error}") from error
        # an answer is two writes, head and body: else the second waits 40 ms for the client's delayed ACK
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return listener


def is_loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def url_of(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


@contextlib.contextmanager
def extra_needed() -> Iterator[None]:
    """Whoever has not installed the packages for servers is told how."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise ConfigError(f"otcrl serve needs {error.name}: pip install 'otcrl[serve]'") from error


def http_server(app: FastAPI, drain_s: float) -> uvicorn.Server:
    """SIGTERM: nothing new is taken, and what runs has `drain_s` to finish; who waits longer asks another server."""
    with extra_needed():
        import uvicorn

    config = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        ws="none",
        lifespan="on",
        timeout_graceful_shutdown=math.ceil(drain_s),
    )
    server = uvicorn.Server(config)
    # uvicorn takes the signal over, and raises it once more when it is done
    signal.signal(signal.SIGTERM, lambda *_: setattr(server, "should_exit", True))
    return server


async def serve_on(listener: socket.socket, server: uvicorn.Server, what: str) -> None:
    print(f"otcrl: serving {what}", flush=True)
    await server.serve([listener])
    assert server.started, "uvicorn did not start; its log says why"


def refuse_below(settings: object, least: float, *names: str) -> None:
    for name in names:
        value = getattr(settings, name)
        if value is not None and value < least:
            raise ConfigError(f"{name} must be {least:g} or more, got {value}")


def refuse_not_positive(settings: object, *names: str) -> None:
    for name in names:
        value = getattr(settings, name)
        if value is not None and not value > 0:
            raise ConfigError(f"{name} must be above 0, got {value}")


# -- python -------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class PythonServer:
    """The settings of `otcrl serve python`, beside its address."""

    at: Address
    queue: int = 256  # calls that may wait; more are refused with 429
    workers: int | None = None  # programs at a time; None: one per core
    timeout_s: float = 10.0  # of a call that names no run_timeout; SandboxFusion's, which its clients count on
    max_timeout_s: float = 300.0  # the most that a call may name
    memory_mb: int = 512  # of a call that names no memory_limit_MB
    max_memory_mb: int = 4096  # the most that a call may name
    preload: Sequence[str] = ("math",)
    isolation: str = "bubblewrap"
    bwrap: str | None = None

    wired = frozenset({"at"})

    def __post_init__(self) -> None:
        refuse_not_positive(self, "timeout_s", "memory_mb", "workers")
        for name in ("timeout_s", "memory_mb"):
            if getattr(self, name) > getattr(self, f"max_{name}"):
                raise ConfigError(f"max_{name} must be at least {name}, {getattr(self, name)}")
        refuse_below(self, 0, "queue")
        if self.at.is_open:
            raise ConfigError(
                f"host={self.at.host} lets other machines run programs here: add token=... for them to show, "
                "or set OTCRL_TOKEN"
            )

    async def run(self, listener: socket.socket) -> None:
        from otcrl.tools.sandbox.pool import Pool

        with extra_needed():
            from otcrl.tools.sandbox.server import Limits, make_app

        workers = self.workers or len(os.sched_getaffinity(0))
        pool = Pool(workers, tuple(self.preload), self.isolation, self.bwrap)
        limits = Limits(
            timeout_s=self.timeout_s,
            memory_mb=self.memory_mb,
            max_timeout_s=self.max_timeout_s,
            max_memory_mb=self.max_memory_mb,
        )
        app = make_app(pool, workers=workers, token=self.at.secret, queue=self.queue, limits=limits)
        try:
            await pool.start()  # before the app would, whose server shows a traceback instead of the reason
            server = http_server(app, self.max_timeout_s)
            await serve_on(listener, server, f"python on {url_of(listener)} ({workers} at a time)")
        except ToolUnavailable as error:
            raise ConfigError(str(error)) from error
        finally:
            await pool.close()


def python_defaults() -> dict[str, Any]:
    from otcrl.compose import load

    section = load(conf_dir() / "tools/python.yaml")["python"]
    return {key: section[key] for key in SHARED}


# -- retrieval ----------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class RetrievalServer:
    """The settings of `otcrl serve retrieval`, beside its address."""

    at: Address
    index: str  # directory, as `otcrl index` writes it
    queue: int = 8192  # queries that may wait; more are refused with 429
    topk: int = 3  # documents per query of a request that names no number; Search-R1's
    max_topk: int = 100  # the most that a request may name
    max_queries: int = 4096  # of one request: Search-R1 sends those of a whole batch of trajectories
    max_query_chars: int = 10_000
    max_batch: int = 64  # queries encoded and searched together
    max_wait_s: float = 0.002  # that an idle server waits for more queries
    cache_size: int = 100_000  # queries whose answer is remembered; one of 30 passages counts as 10; 0: none
    deadline_s: float = 30.0  # of a request that names none; then it is given up
    mmap: bool = False  # leave the vectors on disk and read what is needed
    threads: int | None = None  # of encoder and index; None: one per core
    device: str | None = None  # of the encoder, as torch names it; None: the encoder's default

    wired = frozenset({"at"})

    def __post_init__(self) -> None:
        refuse_below(self, 0, "queue", "max_wait_s", "cache_size")
        refuse_below(self, 1, "topk", "max_topk", "max_queries", "max_query_chars", "max_batch", "threads")
        refuse_not_positive(self, "deadline_s")
        if self.topk > self.max_topk:
            raise ConfigError(f"max_topk must be at least topk, {self.topk}")
        if self.max_queries > self.queue + self.max_batch:
            raise ConfigError(
                f"queue={self.queue} has no room for a request of max_queries={self.max_queries}: make it larger"
            )

    async def run(self, listener: socket.socket) -> None:
        """Takes requests at once; they are refused with 503 until the index is open."""
        with extra_needed():
            from otcrl.tools.retrieval.server import Limits, make_app
        from otcrl.tools.retrieval.index import memory_plan, read_manifest

        manifest = read_manifest(Path(self.index))  # what is no index at all is said before anybody waits for it
        if self.at.is_open:
            why = f"host={self.at.host} without a token: whoever reaches it may read the passages"
            print(f"otcrl: warning: {why}", file=sys.stderr, flush=True)
        batches = self.batches()
        limits = Limits(**{field.name: getattr(self, field.name) for field in fields(Limits)})
        app = make_app(batches, max_batch=self.max_batch, token=self.at.secret, queue=self.queue, limits=limits)
        server = http_server(app, self.deadline_s + 1)
        opening = batches.prepare()
        opening.add_done_callback(lambda it: opened(it, server))
        plan = memory_plan(manifest, self.mmap)
        with reloading_on_sighup(batches):
            await serve_on(listener, server, f"retrieval on {url_of(listener)} ({self.index}: {plan})")
        if opening.done() and not opening.cancelled() and (error := opening.exception()) is not None:
            raise error

    def batches(self) -> Batches:
        """Where queries wait and answers are remembered."""
        from otcrl.tools.retrieval.batches import Batches

        return Batches(self.open, self.max_batch, self.max_wait_s, self.cache_size)

    def open(self) -> Searchable:
        """The index with an encoder of its own, warm: it has answered a query. Raises DataError."""
        from otcrl.tools.retrieval.dense import cores
        from otcrl.tools.retrieval.encode import encoder_from
        from otcrl.tools.retrieval.index import open_index, read_manifest

        manifest = read_manifest(Path(self.index))
        built = manifest.encoder_settings
        if self.device is not None and built is None:
            raise ConfigError(f"device={self.device} is for an encoder, and the index {self.index} has none")
        encoder = encoder_from(built | {"device": self.device}) if self.device is not None and built else None
        index = open_index(self.index, encoder, self.mmap, self.threads or cores())
        if self.threads is not None and "torch" in sys.modules:
            import torch

            torch.set_num_threads(self.threads)
        index.search(["warm"], 1)
        return index


def opened(opening: Future[Searchable], server: uvicorn.Server) -> None:
    """The server stops if the index could not be opened."""
    if opening.cancelled() or opening.exception() is not None:
        server.should_exit = True
    else:
        print(f"otcrl: ready: {told(opening.result())}", flush=True)


def told(index: Searchable) -> str:
    about = index.describe()
    encoder = f", {about['encoder']}" if about.get("encoder") else ""
    return f"{index.rows} passages ({about.get('kind')}{encoder}), index {index.identity}"


@contextlib.contextmanager
def reloading_on_sighup(batches: Batches) -> Iterator[None]:
    from otcrl.tools.retrieval.server import FAILURES

    loop, tasks = asyncio.get_running_loop(), set[asyncio.Task[None]]()

    async def reload() -> None:
        try:
            print(f"otcrl: reloaded: {told(await asyncio.to_thread(batches.reload))}", flush=True)
        except FAILURES as error:
            print(
                f"otcrl: not reloaded, the index goes on: {' '.join(str(error).split())}", file=sys.stderr, flush=True
            )

    def begin() -> None:
        if batches.index is not None:  # else it is being opened right now
            task = loop.create_task(reload())
            tasks.add(task)
            task.add_done_callback(tasks.discard)

    loop.add_signal_handler(signal.SIGHUP, begin)
    try:
        yield
    finally:
        loop.remove_signal_handler(signal.SIGHUP)


Server = PythonServer | RetrievalServer
SERVERS: dict[str, tuple[Callable[..., Server], Callable[[], dict[str, Any]]]] = {
    "python": (PythonServer, python_defaults),
    "retrieval": (RetrievalServer, dict),
}
