"""`otcrl serve python`: SandboxFusion's own client works against it, and no call is lost when a server is."""

import asyncio
import base64
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import httpx
import pytest
import sandbox_fusion
from hypothesis import given
from hypothesis import strategies as st
from sandbox_fusion import RunCodeRequest, RunCodeResponse
from schemathesis import GenerationMode

from otcrl.tools.sandbox.client import execution
from otcrl.tools.sandbox.execution import Execution, Program, State
from otcrl.tools.sandbox.pool import Pool
from otcrl.tools.sandbox.server import Limits, make_app, run_response
from tests.apps import keeps_its_promises, served
from tests.test_sandbox import has_bubblewrap

pytestmark = pytest.mark.skipif(not has_bubblewrap(), reason="bubblewrap cannot make namespaces here")

ROOT = Path(__file__).parents[1]
SERVE = "import sys; from otcrl.serve import serve; sys.exit(serve(sys.argv[1:]))"
PROGRAM = Program(code="", timeout_s=10.0, memory_mb=64, max_bytes=8000)
T = TypeVar("T")


@contextmanager
def serving(
    workers: int = 1, queue: int = 64, token: str | None = None, limits: Limits | None = None, pool: Pool | None = None
) -> Iterator[str]:
    """The address of a server in a thread of this process."""
    pool = pool or Pool(workers, ["math"], "bubblewrap")
    app = make_app(pool, workers=workers, queue=queue, token=token, limits=limits or Limits())
    with served(app) as url:
        yield url


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with serving(workers=2) as address:
        yield address


def post(url: str, code: Any = "", **fields: Any) -> httpx.Response:
    return httpx.post(f"{url}/run_code", json={"code": code, "language": "python"} | fields, timeout=60)


# -- SandboxFusion's client, as it comes from PyPI -----------------------------------------------------


def asked(code: str, **fields: Any) -> RunCodeRequest:
    fields = {"code": code, "language": "python"} | fields
    return RunCodeRequest(**fields)


def fusion(url: str, code: str, **fields: Any) -> RunCodeResponse:
    return sandbox_fusion.run_code(asked(code, **fields), url, max_attempts=1)


def stdout(reply: RunCodeResponse) -> str | None:
    return reply.run_result and reply.run_result.stdout


def test_sandboxfusions_client_runs_a_program(url: str):
    reply = fusion(url, "print(input()[::-1])", stdin="abc")
    assert (reply.status, reply.message, reply.compile_result, reply.files) == ("Success", "", None, {})
    assert reply.run_result is not None
    assert reply.run_result.status == "Finished"
    assert (reply.run_result.return_code, reply.run_result.stdout, reply.run_result.stderr) == (0, "cba\n", "")


def test_sandboxfusions_client_sends_and_fetches_files(url: str):
    content = base64.b64encode(b"6 7").decode()
    code = "a, b = map(int, open('in/x.txt').read().split())\nopen('y.txt', 'w').write(str(a * b))"
    reply = fusion(url, code, files={"in/x.txt": content, "z": None}, fetch_files=["y.txt", "none.txt"])
    assert reply.files == {"y.txt": base64.b64encode(b"42").decode()}


def test_sandboxfusions_client_sees_failures_and_timeouts(url: str):
    failed, late = fusion(url, "1 / 0"), fusion(url, "while True: pass", run_timeout=0.3)
    assert failed.run_result is not None
    assert late.run_result is not None
    assert (failed.status, failed.run_result.status, failed.run_result.return_code) == ("Failed", "Finished", 1)
    assert (late.status, late.run_result.status, late.run_result.return_code) == ("Failed", "TimeLimitExceeded", None)
    names = sandbox_fusion.SummaryMapping(Success="ok", Failed="failed", RunTimeout="late")
    assert [sandbox_fusion.summary_run_code_result(reply, names) for reply in (failed, late)] == ["failed", "late"]


def test_sandboxfusions_client_is_told_of_a_language_that_is_not_there(url: str):
    with pytest.raises(Exception, match=r"Sandbox responded with error.*'cpp' is not supported.*'python'"):
        fusion(url, "", language="cpp")
    assert post(url, language="cpp").status_code == 200  # as SandboxFusion answers for what its side fails at


def test_sandboxfusions_concurrent_helper_and_async_client_work(url: str):
    requests = [asked(f"print({i} ** 2)") for i in range(20)]
    replies = sandbox_fusion.run_concurrent(sandbox_fusion.run_code, args=[[r, url] for r in requests], concurrency=8)

    async def at_once() -> list[RunCodeResponse]:
        return await asyncio.gather(*(sandbox_fusion.run_code_async(request, url) for request in requests))

    for answers in (replies, asyncio.run(at_once())):
        assert [stdout(reply) for reply in answers] == [f"{i**2}\n" for i in range(20)]


# -- how a program's end is told ----------------------------------------------------------------------

THREADS = """
import threading, time
threading.stack_size(32768)
while True:
    try: threading.Thread(target=time.sleep, args=(60,)).start()
    except RuntimeError: pass
"""


@pytest.mark.parametrize(
    ("code", "status", "return_code", "outcome", "stderr"),
    [
        ("print(1)\n6 * 7", "Success", 0, "ok", ""),
        ("int('x')", "Failed", 1, "error", "ValueError"),
        ("import sys; sys.exit(3)", "Failed", 3, "error", ""),
        ("bytearray(1 << 40)", "Failed", 1, "memory", "MemoryError\nThe program was stopped: it used too much memory."),
        (THREADS, "Failed", None, "threads", "too many threads."),
        ("while True: print('x' * 65536)", "Failed", None, "output", "The program was stopped: it printed too much."),
        ("import os; os.abort()", "Failed", -signal.SIGSEGV, "signal", "The program crashed."),  # pid 1 has no SIGABRT
    ],
    ids=lambda value: value if value in set(State) else "",
)
def test_every_end_of_a_program_is_an_answer(
    url: str, code: str, status: str, return_code: int | None, outcome: str, stderr: str
):
    reply = post(url, code, memory_limit_MB=200).json()
    result = reply["run_result"]
    assert (reply["status"], result["status"], result["outcome"]) == (status, "Finished", outcome)
    assert stderr in result["stderr"]
    assert result["return_code"] == return_code if return_code is not None else result["return_code"] != 0
    assert result["value"] == ("42" if outcome == "ok" else "")


TEXTS = st.text(max_size=20)
EXECUTIONS = st.builds(
    Execution,
    st.sampled_from(State),
    code=st.integers(1, 255),
    stdout=TEXTS,
    stderr=TEXTS.map(lambda text: text.rstrip("\n") + "\n"),
    value=TEXTS,
    files=st.dictionaries(st.sampled_from(["a", "b/c"]), st.just("eA==")),
    dropped=st.integers(0, 99),
    seconds=st.floats(0, 99),
    fresh=st.booleans(),
)


@given(done=EXECUTIONS)
def test_the_client_reads_what_the_pool_said(done: Execution):
    if done.state in (State.OK, State.TIMEOUT):
        done = replace(done, code=0)
    if done.state is State.KILLED:
        done = replace(done, files={})
    told = run_response(done, ["a", "b/c"]).model_dump(mode="json")
    assert execution(told["run_result"], told["files"]) == done


def test_what_was_killed_from_outside_is_the_sandboxs_own_error():
    told = run_response(Execution(State.KILLED), [])
    assert (told.status, told.message) == ("SandboxError", "The program was stopped from outside, twice.\n")
    assert told.run_result is not None
    assert told.run_result.status == "Error"


def test_a_sandbox_that_is_gone_is_a_sandbox_error():
    pool = Pool(1, ["math"], "bubblewrap")
    with serving(pool=pool) as url:
        asyncio.run(pool.close())
        reply = post(url, "1").json()
    assert (reply["status"], reply["message"], reply["run_result"]) == (
        "SandboxError",
        "the Python sandbox is closed",
        None,
    )


def test_text_without_bytes_in_utf8_comes_back_as_question_marks(url: str):
    code = "class C:\n    def __repr__(self): return chr(0xd800) + '!'\nC()"
    assert post(url, code).json()["run_result"]["value"] == "?!"


# -- what is refused ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "where", "why"),
    [
        ({"files": {"/etc/passwd": "eA=="}}, "files", "must be relative"),
        ({"files": {"a/../../b": "eA=="}}, "files", "without '..'"),
        ({"files": {"a": "eA==", "a/b": "eA=="}}, "body", "'a' cannot be a file and a directory"),
        ({"files": {"a": "e"}}, "files", "Base64"),
        ({"fetch_files": [""]}, "fetch_files", "must be relative"),
        ({"fetch_files": ["x" * 256]}, "fetch_files", "255 bytes"),
        ({"run_timeout": 0}, "run_timeout", "greater than 0"),
        ({"run_timeout": 301}, "run_timeout", "allows 300 at most, got 301"),
        ({"memory_limit_MB": 5000}, "memory_limit_MB", "allows 4096 at most, got 5000"),
        ({"code": None}, "code", "valid string"),
        ({"session": "x" * 201}, "session", "200 characters"),
        ({"session": "a\n"}, "session", "pattern"),
    ],
)
def test_a_wrong_request_is_told_what_is_wrong(url: str, fields: dict[str, Any], where: str, why: str):
    reply = post(url, **fields)
    assert reply.status_code == 422
    (problem,) = reply.json()["detail"]
    assert where in problem["loc"]
    assert why in problem["msg"]


def test_half_a_surrogate_pair_does_no_harm(url: str):
    def posted(body: str) -> httpx.Response:
        return httpx.post(f"{url}/run_code", content=body, headers={"Content-Type": "application/json"})

    ran = posted(r"""{"language": "python", "code": "input() + '\ud800'", "stdin": "\udc80"}""")
    assert ran.json()["run_result"]["value"] == "'??'"
    assert posted(r'{"language": "python", "code": "", "files": {"\ud800": "eA=="}}').status_code == 422
    assert posted(r'{"language": "\ud800", "code": ""}').json()["status"] == "SandboxError"


def test_a_sessions_variables_live_on_until_it_is_ended(url: str):
    def result(code: str) -> dict[str, Any]:
        return post(url, code, session="a/b?c").json()["run_result"]

    assert result("x = 6")["fresh"]
    again = result("x * 7")
    assert (again["value"], again["fresh"]) == ("42", False)
    assert "NameError" in post(url, "x").json()["run_result"]["stderr"]
    for _ in range(2):  # ending what is not there is fine
        assert httpx.delete(f"{url}/session/a/b%3Fc").status_code == 204
    assert "NameError" in result("x")["stderr"]


# -- whatever comes in ---------------------------------------------------------------------------------


def in_python(body: dict[str, Any]) -> None:
    body["language"] = "python"  # few would guess it


def test_no_request_makes_the_server_fail_or_leave_its_schema():
    limits = Limits(timeout_s=0.3, max_timeout_s=0.5, memory_mb=64, max_memory_mb=64)
    with serving(workers=2, limits=limits) as url:
        for method, path, mode in (
            ("POST", "/run_code", GenerationMode.POSITIVE),
            ("POST", "/run_code", GenerationMode.NEGATIVE),
            ("DELETE", "/session/{name}", GenerationMode.POSITIVE),
        ):
            keeps_its_promises(url, method, path, mode, examples=30, change=in_python)
