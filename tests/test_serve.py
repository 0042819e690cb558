"""`otcrl serve`: who may use it and how much, how it ends, and where it does not start."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path

import httpx
import pytest

from otcrl.errors import ConfigError
from otcrl.serve import Address, serve
from otcrl.tools.http import MAX_BODY_BYTES
from tests.test_retrieval_load import build, replace
from tests.test_retrieval_server import is_warm
from tests.test_sandbox import has_bubblewrap
from tests.test_sandbox_server import post, serving

needs_bubblewrap = pytest.mark.skipif(not has_bubblewrap(), reason="bubblewrap cannot make namespaces here")

ROOT = Path(__file__).parents[1]
SERVE = "import sys; from otcrl.serve import serve; sys.exit(serve(sys.argv[1:]))"


@contextmanager
def process(*words: str, token: str = "") -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """The address of a server in a process of its own, and the process."""
    command = [sys.executable, "-c", SERVE, *words, "port=0"]
    environment = os.environ | {"OTCRL_TOKEN": token}
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True) as started:
        try:
            assert started.stdout is not None
            yield started.stdout.readline().split()[4], started
        finally:
            started.kill()


@needs_bubblewrap
def test_without_the_token_only_health_answers():
    with serving(token="s3cret") as url:
        for headers in ({}, {"Authorization": "Bearer s3cre"}, {"Authorization": "Basic s3cret"}):
            for method, path in (
                ("POST", "/run_code"),
                ("GET", "/metrics"),
                ("DELETE", "/session/x"),
                ("GET", "/none"),
            ):
                refused = httpx.request(method, url + path, headers=headers)
                assert (refused.status_code, refused.headers["WWW-Authenticate"]) == (401, "Bearer")
        assert httpx.get(f"{url}/health").json() == {"status": "ok", "workers": 1, "queued": 0}
        allowed = httpx.get(f"{url}/metrics", headers={"Authorization": "bearer s3cret"})
        assert allowed.status_code == 200


@needs_bubblewrap
@pytest.mark.parametrize("is_announced", [True, False])
def test_a_body_past_the_limit_is_not_read(is_announced: bool):
    with serving() as url, socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2]))) as connection:
        head = "POST /run_code HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        if is_announced:
            connection.sendall(f"{head}Content-Length: {MAX_BODY_BYTES + 1}\r\n\r\n".encode())
        else:
            connection.sendall(f"{head}Transfer-Encoding: chunked\r\n\r\n".encode())
            for _ in range(33):
                connection.sendall(b"100000\r\n" + b" " * (1 << 20) + b"\r\n")
        assert connection.recv(1000).startswith(b"HTTP/1.1 413 ")


@needs_bubblewrap
def test_calls_past_the_queue_are_refused_and_told_when_to_come_back():
    with serving(workers=1, queue=1) as url, ThreadPoolExecutor(3) as threads:
        calls = [threads.submit(post, url, "import time; time.sleep(1.5)") for _ in range(3)]
        statuses = sorted(call.result().status_code for call in calls)
        assert statuses == [200, 200, 429]
        (refused,) = [call.result() for call in calls if call.result().status_code == 429]
        assert 1 <= int(refused.headers["Retry-After"]) <= 60


@needs_bubblewrap
def test_metrics_count_outcomes_and_show_who_waits():
    def sample(name: str) -> float:
        (found,) = re.findall(rf"^{re.escape(name)} (.+)$", httpx.get(f"{url}/metrics").text, re.MULTILINE)
        return float(found)

    with serving(workers=1) as url, ThreadPoolExecutor(3) as threads:
        calls = [threads.submit(post, url, "import time; time.sleep(1)") for _ in range(3)]
        while sample("otcrl_python_queued") < 2:
            assert not calls[-1].done()
        assert sample("otcrl_python_running") == 1
        assert httpx.get(f"{url}/health").json()["queued"] == 2
        assert all(call.result().status_code == 200 for call in calls)
        assert post(url, "1 / 0").json()["status"] == "Failed"
        assert sample('otcrl_python_calls_total{outcome="ok"}') == 3
        assert sample('otcrl_python_calls_total{outcome="error"}') == 1
        assert sample("otcrl_python_seconds_count") == 4
        assert sample('otcrl_python_seconds_bucket{le="30.0"}') == 4
        assert sample("otcrl_python_seconds_sum") >= 5  # 1 + 2 + 3: it includes the waiting
        assert (sample("otcrl_python_running"), sample("otcrl_python_queued")) == (0, 0)


@needs_bubblewrap
def test_on_sigterm_what_runs_and_waits_is_finished_and_the_exit_code_is_0():
    with process("python", "workers=1") as (url, server), ThreadPoolExecutor(2) as threads:
        calls = [threads.submit(post, url, "import time; time.sleep(1); print('done')") for _ in range(2)]
        while httpx.get(f"{url}/health").json()["queued"] < 1:
            time.sleep(0.02)
        server.send_signal(signal.SIGTERM)
        time.sleep(0.3)
        with pytest.raises(httpx.ConnectError):
            post(url)
        assert [call.result().json()["run_result"]["stdout"] for call in calls] == ["done\n", "done\n"]
        assert server.wait(10) == 0


@needs_bubblewrap
def test_the_token_may_come_from_the_environment():
    with process("python", "workers=1", token="s3cret") as (url, _):
        assert post(url).status_code == 401


# -- retrieval ----------------------------------------------------------------------------------------


@pytest.fixture
def index(tmp_path: Path) -> Path:
    build(tmp_path / "index", "a")
    return tmp_path / "index"


@contextmanager
def retrieval(index: Path, *words: str, token: str = "") -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """The address of a warm server, and its process."""
    with process("retrieval", f"index={index}", *words, token=token) as (url, server):
        while not is_warm(url):
            assert server.poll() is None
            time.sleep(0.02)
        yield url, server


def ids(url: str) -> list[str]:
    [documents] = httpx.post(f"{url}/retrieve", json={"queries": ["Rome"]}).json()["result"]
    return [document["id"] for document in documents]


def test_retrieval_is_served_from_an_index_directory(index: Path, capfd: pytest.CaptureFixture[str]):
    with retrieval(index, "host=0.0.0.0", "topk=2") as (url, server):
        assert ids(url.replace("0.0.0.0", "127.0.0.1"))[0] == "a1"
        assert len(ids(url.replace("0.0.0.0", "127.0.0.1"))) == 2
        assert server.stdout is not None
        assert re.match(r"otcrl: ready: 4 passages \(flat, hashing-4096.*\), index \w+\n", server.stdout.readline())
    assert "warning: host=0.0.0.0 without a token" in capfd.readouterr().err


def test_retrievals_token_may_come_from_the_environment(index: Path):
    with retrieval(index, token="s3cret") as (url, _):
        assert httpx.post(f"{url}/retrieve", json={"queries": ["Rome"]}).status_code == 401


def test_on_sigterm_what_is_searched_and_waits_is_answered_and_the_exit_code_is_0(index: Path):
    with retrieval(index, "max_batch=20") as (url, server), ThreadPoolExecutor(2) as threads:
        crowd = [[f"{who} {i} {'Rome is a town and Oslo too ' * 50}" for i in range(400)] for who in range(2)]
        calls = [threads.submit(httpx.post, f"{url}/retrieve", json={"queries": its}, timeout=60) for its in crowd]
        while httpx.get(f"{url}/health").json()["queued"] <= 400:  # more than one call's: both have arrived
            assert not any(call.done() for call in calls)
        server.send_signal(signal.SIGTERM)
        assert not any(call.done() for call in calls)
        assert [len(call.result().json()["result"]) for call in calls] == [400, 400]
        assert server.wait(10) == 0


def test_on_sighup_the_index_is_opened_anew(index: Path, capfd: pytest.CaptureFixture[str]):
    build(index.with_name("next"), "b")
    with retrieval(index) as (url, server):
        assert ids(url)[0] == "a1"
        replace(index, index.with_name("next"))
        server.send_signal(signal.SIGHUP)
        while ids(url)[0] != "b1":
            assert server.poll() is None
        (index / "manifest.json").unlink()
        server.send_signal(signal.SIGHUP)
        while "not reloaded, the index goes on: " not in (told := capfd.readouterr().err):
            assert ids(url)[0] == "b1"
        assert "manifest.json cannot be read" in told
        assert ids(url)[0] == "b1"


def test_an_index_that_cannot_be_opened_ends_the_server(index: Path):
    (index / "index.faiss").write_bytes(b"")
    command = [sys.executable, "-m", "otcrl.cli", "serve", "retrieval", f"index={index}", "port=0"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "is damaged: index.faiss" in done.stderr


# -- what cannot be served ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["pyton"], "otcrl serve has no tool 'pyton'. Did you mean 'python'?"),
        (["retrival"], "otcrl serve has no tool 'retrival'. Did you mean 'retrieval'?"),
        ([], "otcrl serve has no tool ''. Choose from: python, retrieval."),
        (["python", "prot=1"], "serve python.prot is not a setting of PythonServer. Did you mean 'port'?"),
        (["python", "port=x"], "serve python.port must be int, got 'x'"),
        (["python", "queue=-1"], "serve python: queue must be 0 or more, got -1"),
        (["python", "timeout_s=400"], "serve python: max_timeout_s must be at least timeout_s, 400"),
        (["python", "token=a b"], "serve python: token: only printable ASCII"),
        (["python", "bwrap=/none", "port=0"], "isolation: bubblewrap needs the program '/none'"),
        (["python", "isolation=chroot", "port=0"], "isolation must be bubblewrap or none, got 'chroot'"),
        (["python", "bwrap=/bin/false", "port=0"], "the Python sandbox does not start: the sandbox ended"),
        (["retrieval"], "serve retrieval.index is missing; RetrievalServer needs it"),
        (["retrieval", "index=/none", "port=0"], "index: /none is no index directory"),
        (
            ["retrieval", "index=.", "tokn=x"],
            "serve retrieval.tokn is not a setting of RetrievalServer. Did you mean 't",
        ),
        (["retrieval", "index=.", "topk=0"], "serve retrieval: topk must be 1 or more, got 0"),
        (["retrieval", "index=.", "topk=101"], "serve retrieval: max_topk must be at least topk, 101"),
        (["retrieval", "index=.", "deadline_s=0"], "serve retrieval: deadline_s must be above 0, got 0"),
        (
            ["retrieval", "index=.", "queue=100"],
            "serve retrieval: queue=100 has no room for a request of max_queries=4",
        ),
        *(
            (["python", f"host={host}", "port=0", "bwrap=/none"], f"host={host} lets other machines")
            for host in ("0.0.0.0", "::", "a.b", "")
        ),
    ],
)
def test_what_cannot_be_served_is_a_config_error(words: list[str], why: str):
    with pytest.raises(ConfigError, match=re.escape(why)):
        serve(words)


def test_a_port_in_use_is_a_config_error():
    why = r"cannot listen on host=127\.0\.0\.1 port=.* in use"
    with socket.create_server(("127.0.0.1", 0)) as other, pytest.raises(ConfigError, match=why):
        serve(["python", f"port={other.getsockname()[1]}"])


def test_an_answers_second_write_does_not_wait_for_the_first_to_be_acknowledged():
    with closing(Address(port=0).listen()) as listener, socket.create_connection(listener.getsockname()):
        accepted, _ = listener.accept()
        with accepted:
            assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
