"""What the policy reads after a program, and whose fault a failure is."""

import asyncio
import os
import signal
import time
from collections.abc import Iterator

import pytest

from otcrl.errors import ConfigError, ToolUnavailable
from otcrl.protocols import ToolResult
from otcrl.tools.python import NOTHING_PRINTED, RESTARTED, PythonTool, shorten, strip_fences
from otcrl.tools.sandbox.execution import Program
from otcrl.tools.sandbox.pool import Pool
from otcrl.types import Outcome
from tests.test_sandbox import has_bubblewrap, sandboxes
from tests.test_sandbox_server import serving

needs_bubblewrap = pytest.mark.skipif(not has_bubblewrap(), reason="bubblewrap cannot make namespaces here")


@pytest.fixture(scope="module")
def tool() -> Iterator[PythonTool]:
    shared = PythonTool(workers=1, timeout_s=2, memory_mb=128, max_output_chars=400)
    yield shared
    asyncio.run(shared.close())


def run(tool: PythonTool, code: str) -> ToolResult:
    return asyncio.run(tool.run(code))


@needs_bubblewrap
@pytest.mark.parametrize(
    ("code", "text"),
    [
        ("print(6 * 7)", "42"),
        ("6 * 7", "42"),
        ("print(1)\n6 * 7", "1"),
        ("```python\nprint(6 * 7)\n```", "42"),
        ("x = 42", NOTHING_PRINTED),
        ("import sys\nprint('a warning', file=sys.stderr)", "a warning"),
    ],
    ids=["printed", "last value", "printed wins over the last value", "fenced", "silent", "on stderr"],
)
def test_a_program_that_ends_well_is_ok(tool: PythonTool, code: str, text: str):
    assert run(tool, code) == ToolResult(text, Outcome.OK)


@needs_bubblewrap
@pytest.mark.parametrize(
    ("code", "end"),
    [
        ("print(1)\n1 / 0", "ZeroDivisionError: division by zero"),
        ("print(", "SyntaxError: '(' was never closed"),
        ("while True: pass", "TimeoutError: the program was stopped after 2 s."),
        ("bytearray(1 << 40)", "MemoryError"),
        ("import os\nos._exit(3)", "The program ended with exit code 3."),
        ("import os\nos.abort()", "The program crashed (signal 11)."),
        (" \n", "The program is empty. Write Python code."),
    ],
    ids=["exception", "syntax", "time", "memory", "exit code", "crash", "empty"],
)
def test_a_program_that_fails_is_the_policys_error(tool: PythonTool, code: str, end: str):
    result = run(tool, code)
    assert result.outcome is Outcome.MODEL_ERROR
    assert result.text.endswith(end)


@needs_bubblewrap
def test_what_was_printed_before_a_failure_is_shown(tool: PythonTool):
    assert run(tool, "print('before')\n1 / 0").text.startswith("before\nTraceback (most recent call last):\n")


@needs_bubblewrap
def test_a_long_output_keeps_both_ends_and_the_error(tool: PythonTool):
    result = run(tool, "print('first')\nprint('x' * 100_000)\n1 / 0")
    assert result.text.startswith("first\nxxx")
    assert "characters cut] ..." in result.text
    assert result.text.endswith("ZeroDivisionError: division by zero")
    assert len(result.text) < 450


@needs_bubblewrap
def test_the_last_value_is_shown_only_if_asked_for():
    plain = PythonTool(workers=1, show_value=False)
    assert run(plain, "6 * 7").text == NOTHING_PRINTED
    asyncio.run(plain.close())


@needs_bubblewrap
def test_a_remembered_program_is_not_run_again():
    caching = PythonTool(workers=1, cache_size=1)
    clock = "import time\nprint(time.time())"
    try:
        first, again = run(caching, clock), run(caching, clock)
        assert not first.cached
        assert again == ToolResult(first.text, cached=True)
        run(caching, "1")  # pushes the clock out
        assert run(caching, clock).text != first.text
    finally:
        asyncio.run(caching.close())


@needs_bubblewrap
def test_one_tool_serves_many_event_loops(tool: PythonTool):
    assert [run(tool, f"print({i})").text for i in range(3)] == ["0", "1", "2"]


@needs_bubblewrap
def test_after_close_the_tool_is_unavailable():
    closed = PythonTool(workers=1)
    run(closed, "1")
    asyncio.run(closed.close())
    with pytest.raises(ToolUnavailable, match="closed"):
        run(closed, "1")


@needs_bubblewrap
def test_a_trajectorys_variables_live_until_it_is_released():
    notebook = PythonTool(workers=1, sessions=True)

    async def main() -> list[str]:
        shown = [(await notebook.run(code, session)).text for code, session in (("x = 1", "a"), ("x + 1", "a"))]
        shown.append((await notebook.run("x", "b")).text)
        await notebook.release("a")
        shown.append((await notebook.run("x", "a")).text)
        await notebook.close()
        return shown

    nothing, two, other, released = asyncio.run(main())
    assert (nothing, two) == (NOTHING_PRINTED, "2")
    assert "NameError" in other
    assert "NameError" in released
    assert RESTARTED not in released


@needs_bubblewrap
def test_a_session_that_died_says_so():
    notebook = PythonTool(workers=1, sessions=True)

    async def main() -> list[str]:
        shown = [(await notebook.run(code, "a")).text for code in ("x = 1", "import os\nos._exit(3)", "print(1)")]
        await notebook.close()
        return shown

    assert asyncio.run(main())[1:] == ["The program ended with exit code 3.", RESTARTED + "1"]


@needs_bubblewrap
def test_a_cancelled_call_leaves_nothing_to_the_trajectory_that_is_played_again():
    """The names of trajectories are the same in a replay: that is how their seeds are."""
    notebook = PythonTool(workers=1, sessions=True, timeout_s=3)

    async def main() -> tuple[str, str]:
        await notebook.start()
        shown = []
        for name in ("a", "b"):  # its first call is under way, or has not begun
            busy = asyncio.create_task(notebook.run("import time\ntime.sleep(0.6)", "c")) if name == "b" else None
            await asyncio.sleep(0.1)
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.2):
                    await notebook.run("secret = 1\nimport time\ntime.sleep(0.5)", name)
            await notebook.release(name)
            if busy is not None:
                await busy
            shown.append((await notebook.run("print(secret)", name)).text)
        await notebook.close()
        return shown[0], shown[1]

    for text in asyncio.run(main()):
        assert "NameError: name 'secret' is not defined" in text
        assert RESTARTED not in text


@needs_bubblewrap
def test_an_interpreter_that_falls_silent_is_replaced_and_no_program_blamed(monkeypatch: pytest.MonkeyPatch):
    """As when the machine swaps or is frozen; its late reply must not be taken for that of the next call."""
    monkeypatch.setattr("otcrl.tools.sandbox.pool.GRACE_S", 1.0)
    before = sandboxes()

    async def main() -> list[str]:
        pool = Pool(1, ["math"], "bubblewrap")
        await pool.start()
        limits = {"timeout_s": 1.0, "memory_mb": 64, "max_bytes": 2000}
        await pool.run(Program(code="x = 1", session="a", **limits))  # type: ignore[arg-type]
        frozen = sandboxes() - before
        for pid in frozen:
            os.kill(pid, signal.SIGSTOP)
        await pool.end("a")
        for pid in frozen & sandboxes():
            os.kill(pid, signal.SIGCONT)
        shown = [(await pool.run(Program(code=f"print({i})", **limits))).stdout for i in range(3)]  # type: ignore[arg-type]
        for pid in sandboxes() - before:
            os.kill(pid, signal.SIGSTOP)
        again = await pool.run(Program(code="print(3)", **limits))  # type: ignore[arg-type]
        await pool.close()
        return [*shown, again.stdout]

    assert asyncio.run(main()) == ["0\n", "1\n", "2\n", "3\n"]


@needs_bubblewrap
def test_a_server_does_not_begin_what_nobody_waits_for():
    with serving(workers=1) as url:
        remote = PythonTool(urls=[url], timeout_s=3)

        async def main() -> float:
            slow = [asyncio.create_task(remote.run("import time\ntime.sleep(1)", f"t{i}")) for i in range(8)]
            await asyncio.sleep(0.5)
            for call in slow:
                call.cancel()
            await asyncio.gather(*slow, return_exceptions=True)
            begun = time.monotonic()
            assert (await remote.run("print(1)")).text == "1"
            await remote.close()
            return time.monotonic() - begun

        assert asyncio.run(main()) < 5  # not the eight seconds of those who hung up


@needs_bubblewrap
def test_programs_may_run_on_servers_in_the_same_words():
    with serving() as url:
        remote = PythonTool(urls=[url], sessions=True)

        async def main() -> list[ToolResult]:
            results = [
                await remote.run(code, "a") for code in ("x = 6", "x * 7", "1 / 0", "import os; os._exit(3)", "x")
            ]
            await remote.close()
            return results

        nothing, product, error, died, after = asyncio.run(main())
    assert (nothing.text, product.text) == (NOTHING_PRINTED, "42")
    assert error.text.endswith("ZeroDivisionError: division by zero")
    assert died.text == "The program ended with exit code 3."
    assert after.text.startswith(RESTARTED)


def test_sessions_are_not_cached():
    with pytest.raises(ConfigError, match="cache_size is 9, but in sessions the same program may do something else"):
        PythonTool(sessions=True, cache_size=9)


def test_without_isolation_it_is_not_built():
    with pytest.raises(ConfigError, match="isolation: none"):
        PythonTool(bwrap="/nowhere/bwrap")


def test_limits_must_be_above_zero():
    with pytest.raises(ConfigError, match="timeout_s must be above 0, got 0"):
        PythonTool(timeout_s=0)
    with pytest.raises(ConfigError, match="memory_mb must be above 0, got -1"):
        PythonTool(memory_mb=-1)
    with pytest.raises(ConfigError, match="workers must be above 0, got 0"):
        PythonTool(workers=0)


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("print(1)", "print(1)"),
        ("```python\nprint(1)\n```", "print(1)"),
        ("\n```py\nprint(1)\n```\n", "print(1)"),
        ("```\nprint(1)", "print(1)"),
        ("s = '''\n```\n'''", "s = '''\n```\n'''"),
    ],
    ids=["bare", "fence", "spaced fence", "unclosed fence", "a fence that is data"],
)
def test_a_fence_around_the_code_is_taken_off(text: str, code: str):
    assert strip_fences(text) == code


def test_shorten_says_how_much_is_missing():
    assert shorten("abcdefghij", 10) == "abcdefghij"
    assert shorten("abcdefghij", 4) == "ab\n... [6 characters cut] ...\nij"
    assert shorten("abcd", 4, dropped=100) == "ab\n... [100 characters cut] ...\ncd"
