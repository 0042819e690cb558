"""The last value of every metric for Prometheus to scrape, from a small HTTP server beside the training loop.

`reward/value` is `otcrl_reward_value{run="NAME"}`: Prometheus knows letters, digits and underscores.
"""

from __future__ import annotations

import re
import time
from hashlib import blake2b

from otcrl.errors import ConfigError
from otcrl.tell import tell
from otcrl.types import Metrics


class PrometheusLogger:
    wired = frozenset({"name", "steps"})

    def __init__(self, *, host: str, port: int, name: str, steps: int) -> None:
        if not 0 <= port < 65536:
            raise ValueError(f"port must be between 0 (any that is free) and 65535, got {port}")
        try:
            from prometheus_client import CollectorRegistry, Gauge, ProcessCollector, start_http_server
        except ModuleNotFoundError as error:
            why = "prometheus-client is not installed: pip install 'otcrl[serve]', or choose logger=console"
            raise ConfigError(why) from error
        self._registry, self._gauge, self._run = CollectorRegistry(), Gauge, name
        self._gauges: dict[str, Gauge] = {}
        self._names = {name: name for name in ("otcrl_steps", "otcrl_step", "otcrl_step_timestamp_seconds")}
        try:
            self._server, self._thread = start_http_server(port, addr=host, registry=self._registry)
        except OSError as error:
            why = f"nothing can be served at {host}:{port}: {error.strerror}; choose another port, or 0"
            raise ConfigError(why) from error
        ProcessCollector(registry=self._registry)  # its memory, CPU seconds and open files
        self._set("otcrl_steps", "training steps that the run is to make", steps)
        self.port: int = self._server.server_port
        tell(f"metrics for Prometheus at http://{host}:{self.port}/metrics")

    def log(self, metrics: Metrics, step: int) -> None:
        for metric, value in metrics.items():
            self._set(self._exposed(metric), f"{metric}: docs/metrics.md", value)
        self._set("otcrl_step", "the last step that was logged", step)
        self._set("otcrl_step_timestamp_seconds", "when it was, in seconds since the epoch", time.time())

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def _exposed(self, metric: str) -> str:
        """A name that no other metric has: names that differ in what Prometheus does not know get a digest."""
        name = exposed(metric)
        if self._names.setdefault(name, metric) == metric:
            return name
        return f"{name}_{blake2b(metric.encode(), digest_size=4).hexdigest()}"

    def _set(self, exposed: str, said: str, value: float) -> None:
        if exposed not in self._gauges:
            self._gauges[exposed] = self._gauge(exposed, said, ["run"], registry=self._registry)
        self._gauges[exposed].labels(run=self._run).set(value)


def exposed(metric: str) -> str:
    """`calls/source/nq-open` -> `otcrl_calls_source_nq_open`."""
    return "otcrl_" + re.sub(r"[^a-zA-Z0-9]+", "_", metric).strip("_")
