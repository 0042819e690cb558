"""`otcrl serve`: a tool behind HTTP, so that many runs on other machines can share it."""

from __future__ import annotations

import asyncio
import math
import os
import signal
import socket
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from ipaddress import ip_address

from otcrl.errors import ConfigError, ToolUnavailable, nearest
from otcrl.presets import conf_dir

SHARED = ("memory_mb", "preload", "isolation", "bwrap")  # settings whose defaults are those of conf/tools/python.yaml


def serve(settings: Sequence[str]) -> int:
    """Serves until SIGTERM; then what runs is finished, and the exit code is 0."""
    name, *rest = settings or [""]
    if name != "python":
        raise ConfigError(f"otcrl serve has no tool {name!r}.{nearest(name, ['python'])}")
    from otcrl.compose import load, parse
    from otcrl.construct import construct_as

    section = load(conf_dir() / "tools/python.yaml")["python"]
    node = {key: section[key] for key in SHARED}
    for setting in rest:
        key, _, text = setting.partition("=")
        node[key] = text if key in ("token", "host") else parse(setting).value()  # a token may look like a number
    construct_as(PythonServer, node, "serve python").run()
    return 0


@dataclass(frozen=True, kw_only=True)
class PythonServer:
    """The settings of `otcrl serve python`."""

    host: str = "127.0.0.1"
    port: int = 8080  # 0: any that is free
    token: str | None = None  # None: OTCRL_TOKEN of the environment, which other users cannot see
    queue: int = 256  # calls that may wait; more are refused with 429
    workers: int | None = None  # programs at a time; None: one per core
    timeout_s: float = 10.0  # of a call that names no run_timeout; SandboxFusion's, which its clients count on
    max_timeout_s: float = 300.0  # the most that a call may name
    memory_mb: int = 512  # of a call that names no memory_limit_MB
    max_memory_mb: int = 4096  # the most that a call may name
    preload: Sequence[str] = ("math",)
    isolation: str = "bubblewrap"
    bwrap: str | None = None

    def __post_init__(self) -> None:
        for name in ("timeout_s", "memory_mb", "workers"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ConfigError(f"{name} must be above 0, got {value}")
        for name in ("timeout_s", "memory_mb"):
            if getattr(self, name) > getattr(self, f"max_{name}"):
                raise ConfigError(f"max_{name} must be at least {name}, {getattr(self, name)}")
        if self.queue < 0:
            raise ConfigError(f"queue must be 0 or more, got {self.queue}")
        if not self.secret and not is_loopback(self.host):
            raise ConfigError(
                f"host={self.host} lets other machines run programs here: add token=... for them to show, "
                "or set OTCRL_TOKEN"
            )

    @property
    def secret(self) -> str | None:
        from otcrl.tools.remote import checked_token

        token = self.token or os.environ.get("OTCRL_TOKEN")
        return checked_token(token) if token else None

    def run(self) -> None:
        with closing(self._listen()) as listener:
            asyncio.run(self._serve(listener))

    def _listen(self) -> socket.socket:
        """A socket that takes connections from now on; the first ones wait until the sandbox is warm."""
        family = socket.AF_INET6 if ":" in self.host else socket.AF_INET
        try:
            return socket.create_server((self.host, self.port), family=family, backlog=2048)
        except (OSError, OverflowError) as error:
            raise ConfigError(f"cannot listen on host={self.host} port={self.port}: {error}") from error

    async def _serve(self, listener: socket.socket) -> None:
        from otcrl.tools.sandbox.pool import Pool

        try:
            import uvicorn

            from otcrl.tools.sandbox.server import Limits, make_app
        except ModuleNotFoundError as error:
            raise ConfigError(f"otcrl serve needs {error.name}: pip install 'otcrl[serve]'") from error

        workers = self.workers or len(os.sched_getaffinity(0))
        pool = Pool(workers, tuple(self.preload), self.isolation, self.bwrap)
        limits = Limits(
            timeout_s=self.timeout_s,
            memory_mb=self.memory_mb,
            max_timeout_s=self.max_timeout_s,
            max_memory_mb=self.max_memory_mb,
        )
        app = make_app(pool, workers=workers, token=self.secret, queue=self.queue, limits=limits)
        try:
            await pool.start()  # before the app would, whose server shows a traceback instead of the reason
            drain_s = math.ceil(self.max_timeout_s)  # who waits longer is cut off, and asks another server
            server = uvicorn.Server(
                uvicorn.Config(
                    app,
                    log_level="warning",
                    access_log=False,
                    ws="none",
                    lifespan="on",
                    timeout_graceful_shutdown=drain_s,
                )
            )
            # uvicorn takes the signal over, and raises it once more when it is done
            signal.signal(signal.SIGTERM, lambda *_: setattr(server, "should_exit", True))
            print(f"otcrl: serving python on {url_of(listener)} ({workers} at a time)", flush=True)
            await server.serve([listener])
            assert server.started, "uvicorn did not start; its log says why"
        except ToolUnavailable as error:
            raise ConfigError(str(error)) from error
        finally:
            await pool.close()


def is_loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def url_of(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
