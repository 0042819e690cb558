"""HTTP apps in tests: served in a thread of this process, and asked whatever their schema allows."""

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import schemathesis
import uvicorn
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode, checks
from starlette.types import ASGIApp

PROMISES = [
    checks.not_a_server_error,
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_schema_conformance,
]
SLOW = [HealthCheck.too_slow, HealthCheck.filter_too_much]


@contextmanager
def served(app: ASGIApp, port: int = 0, *, breaks_off: bool = False) -> Iterator[str]:
    """Its address. At the end it finishes what it is doing, unless it `breaks_off`."""
    config = uvicorn.Config(
        app,
        log_level="critical" if breaks_off else "warning",
        ws="none",
        lifespan="on",
        timeout_graceful_shutdown=0 if breaks_off else None,
    )
    listener, server = socket.create_server(("127.0.0.1", port), backlog=256), uvicorn.Server(config)
    thread = threading.Thread(target=server.run, args=([listener],))
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.005)
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit, server.force_exit = True, breaks_off
        thread.join()
        listener.close()


def keeps_its_promises(
    url: str, method: str, path: str, mode: GenerationMode, examples: int, change: Callable[[dict], None] | None = None
) -> None:
    """Made-up requests, right or wrong by the schema, get the answers that it names; `change` may alter a body."""
    schema = schemathesis.openapi.from_url(f"{url}/openapi.json")

    @given(case=schema[path][method].as_strategy(generation_mode=mode))
    @settings(max_examples=examples, deadline=None, suppress_health_check=SLOW, derandomize=True)
    def holds(case: schemathesis.Case) -> None:
        if change and isinstance(case.body, dict):
            change(case.body)
        case.call_and_validate(checks=PROMISES)

    holds()
