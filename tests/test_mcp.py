"""Tools of a real MCP server: what the policy is shown, and what becomes of a server that dies."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from otcrl.build import tools_of
from otcrl.dialects.search_r1 import SearchR1
from otcrl.errors import ConfigError, ToolUnavailable
from otcrl.protocols import Call, Tool, ToolResult
from otcrl.types import Outcome
from tests.test_chat import HERMES

pytest.importorskip("mcp", reason="needs otcrl[mcp]")

from otcrl.tools.mcp import KEPT, MAX_DEPTH, MCPServer, MCPTool

ROOT = Path(__file__).parents[1]
COMMAND = [sys.executable, "-m", "tests.mcp_server"]


def serving(**settings: object) -> MCPServer:
    config = {"command": COMMAND, "env": {"PYTHONPATH": str(ROOT)}, "folder": str(ROOT)} | settings
    return MCPServer(**config)  # pyright: ignore[reportArgumentType]


@pytest.fixture(scope="module")
def server() -> Iterator[MCPServer]:
    it = serving()
    yield it
    asyncio.run(it.close())


@pytest.fixture(scope="module")
def tools(server: MCPServer) -> Mapping[str, MCPTool]:
    return {tool.name: tool for tool in server.tools()}


def run(tool: Tool, arguments: object) -> ToolResult:
    text = arguments if isinstance(arguments, str) else json.dumps(arguments)
    return asyncio.run(tool.run(text, "s"))


def test_what_the_server_lists_are_tools_with_its_schemas(tools: Mapping[str, MCPTool]):
    assert {"add", "shout", "fail"} <= tools.keys()
    add = tools["add"]
    assert add.description == "Adds two whole numbers."
    assert {name: schema["type"] for name, schema in add.parameters["properties"].items()} == {
        "a": "integer",
        "b": "integer",
    }
    assert add.parameters["required"] == ["a", "b"]


def test_the_result_is_the_text_that_the_server_gives(tools: Mapping[str, MCPTool]):
    assert run(tools["add"], {"a": 2, "b": 40}) == ToolResult("42")
    assert run(tools["shout"], {"text": "olá\n"}) == ToolResult("OLÁ")
    assert run(tools["nothing"], {}).text == "The tool returned nothing."


@pytest.mark.parametrize(
    ("name", "arguments", "said"),
    [
        ("fail", {"why": "too late"}, "too late"),
        ("add", {"a": "two", "b": 1}, "a"),
        ("add", {"a": 2}, "b"),
        ("add", "2 + 2", 'Error: add takes a JSON object: {"a": integer, "b": integer}.'),
        ("add", "[1, 2]", "Error: add takes a JSON object"),
    ],
)
def test_what_the_policy_got_wrong_is_its_own_failure(
    tools: Mapping[str, MCPTool], name: str, arguments: object, said: str
):
    result = run(tools[name], arguments)
    assert result.outcome is Outcome.MODEL_ERROR
    assert said in result.text


def nested(levels: int) -> str:
    return '{"text": ' + "[" * (levels - 1) + "]" * (levels - 1) + "}"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ('{"text": "\\ud83d"}', "Error: shout takes no arguments that hold half a surrogate pair, '\\ud83d'."),
        ('{"text": "x", "\\udc00": 1}', "half a surrogate pair"),
        ("bare \ud83d", "half a surrogate pair"),
        (nested(MAX_DEPTH + 1), f"Error: shout takes no arguments that are nested more than {MAX_DEPTH} levels deep."),
        (nested(200), "levels deep"),
        (nested(900), "levels deep"),
    ],
)
def test_what_cannot_be_sent_is_not_and_the_others_keep_their_server(
    tools: Mapping[str, MCPTool], arguments: str, said: str
):
    async def main() -> tuple[ToolResult, ToolResult]:
        other = asyncio.ensure_future(tools["wait"].run('{"seconds": 0.3}', "a"))
        await asyncio.sleep(0.1)
        return await tools["shout"].run(arguments, "b"), await other

    before = run(tools["process"], {}).text
    refused, other = asyncio.run(main())
    assert refused.outcome is Outcome.MODEL_ERROR
    assert said in refused.text
    assert other.text == "waited"
    assert run(tools["process"], {}).text == before


def test_what_is_nested_as_deep_as_may_be_and_a_whole_surrogate_pair_are_sent(tools: Mapping[str, MCPTool]):
    before = run(tools["process"], {}).text
    assert "valid string" in run(tools["shout"], nested(MAX_DEPTH)).text  # the server's own words
    assert run(tools["shout"], '{"text": "\\ud83d\\ude00"}').text == "\U0001f600"
    assert run(tools["process"], {}).text == before


def test_a_tool_that_takes_one_text_can_be_given_it_bare(tools: Mapping[str, MCPTool]):
    assert run(tools["shout"], " hello ").text == "HELLO"


def test_a_long_result_is_cut_in_the_middle(tools: Mapping[str, MCPTool]):
    text = run(tools["long"], {}).text
    assert len(text) < 4100
    assert text.startswith("aaa")
    assert text.endswith("bbb")


def test_calls_of_many_trajectories_run_side_by_side_in_any_event_loop(tools: Mapping[str, MCPTool]):
    async def many() -> list[ToolResult]:
        waits = (tools["wait"].run('{"seconds": 0.3}', f"s{i}") for i in range(10))
        return await asyncio.gather(*waits)

    begun = time.monotonic()
    for _ in range(2):  # each in a loop of its own
        assert {result.text for result in asyncio.run(many())} == {"waited"}
    assert time.monotonic() - begun < 2.5  # one after the other would be 6


def test_the_program_gets_the_environment_that_is_named_and_no_secrets(
    tools: Mapping[str, MCPTool], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("A_SECRET", "x")
    assert run(tools["environment"], {"name": "PYTHONPATH"}).text == str(ROOT)
    other = serving()
    seen = {tool.name: tool for tool in other.tools()}
    assert run(seen["environment"], {"name": "A_SECRET"}).text == "not set"
    asyncio.run(other.close())


def test_both_kinds_of_dialect_can_call_it(tools: Mapping[str, MCPTool]):
    tags = SearchR1(instructions="{tools}\n{question}", observation_template="{result}", require_think=False)
    call = tags.parse('<add> {"a": 2, "b": 40} </add>', tools)
    assert isinstance(call, Call)
    assert run(tools[call.tool], call.arguments).text == "42"
    call = HERMES.parse('<tool_call>{"name": "add", "arguments": {"a": 2, "b": 40}}</tool_call>', tools)
    assert isinstance(call, Call)
    assert run(tools[call.tool], call.arguments).text == "42"


# -- a server that is not there, dies or hangs --------------------------------------------------------------


def test_a_server_that_dies_in_a_call_is_an_infrastructure_failure_and_the_next_call_finds_a_new_one():
    server = serving()
    tools = {tool.name: tool for tool in server.tools()}
    before = run(tools["process"], {}).text
    with pytest.raises(ToolUnavailable, match=r"the MCP server .* is down: .*It last wrote: .*these are my last words"):
        run(tools["die"], {})
    assert run(tools["add"], {"a": 1, "b": 1}).text == "2"
    after = run(tools["process"], {}).text
    assert before != after
    asyncio.run(server.close())
    assert not Path(f"/proc/{after}").exists()


def test_of_what_a_chatty_server_writes_only_the_end_is_kept():
    server = serving()
    tools = {tool.name: tool for tool in server.tools()}
    link = server._line._link
    assert link is not None
    assert run(tools["chatter"], {"kilobytes": 2000}).text == "written"  # far more than a pipe takes by itself
    assert link.last_words().endswith("x that was all")
    assert stat.S_ISFIFO(os.fstat(link._stderr.fileno()).st_mode), "a file would grow"
    assert len(link._words) <= KEPT
    with pytest.raises(ToolUnavailable, match="these are my last words"):
        run(tools["die"], {})
    asyncio.run(server.close())
    link.thread.join(10)
    assert link._heard.closed
    assert link._stderr.closed
    assert link.last_words().endswith("these are my last words")


def test_every_call_of_a_server_that_dies_fails_and_one_new_server_is_started():
    server = serving()
    tools = {tool.name: tool for tool in server.tools()}

    async def main() -> tuple[list, set[str]]:
        calls = [tools["wait"].run('{"seconds": 20}', "a") for _ in range(5)]
        lost = await asyncio.gather(*calls, tools["die"].run("{}", "b"), return_exceptions=True)
        return lost, {(await tools["process"].run("{}", "c")).text for _ in range(3)}

    lost, processes = asyncio.run(main())
    assert {type(error) for error in lost} == {ToolUnavailable}
    assert len(processes) == 1
    asyncio.run(server.close())


def test_a_call_that_takes_too_long_does_not_cost_the_others_their_server():
    server = serving(timeout_s=1.0)
    tools = {tool.name: tool for tool in server.tools()}

    async def main() -> None:
        before = (await tools["process"].run("{}", "")).text
        slow = asyncio.ensure_future(tools["wait"].run('{"seconds": 20}', "a"))
        await asyncio.sleep(0.3)
        assert (await tools["shout"].run("hi", "b")).text == "HI"
        with pytest.raises(ToolUnavailable, match="did not answer one call"):
            await slow
        assert (await tools["process"].run("{}", "")).text == before

    asyncio.run(main())
    asyncio.run(server.close())


def test_a_server_that_answers_nobody_is_replaced():
    server = serving(timeout_s=1.0)
    tools = {tool.name: tool for tool in server.tools()}
    before = run(tools["process"], {}).text
    with pytest.raises(ToolUnavailable, match="is down"):
        run(tools["hang"], {"seconds": 60})
    assert run(tools["process"], {}).text != before
    asyncio.run(server.close())


@pytest.mark.parametrize(("fatal", "arguments"), [("hang", '{"seconds": 60}'), ("die", "{}")])
def test_calls_that_lose_their_connection_to_another_are_made_again_where_that_does_no_harm(fatal: str, arguments: str):
    server = serving(timeout_s=2.0)
    tools = {tool.name: tool for tool in server.tools()}
    assert {name for name, tool in tools.items() if tool.repeatable} == {"look"}
    before = run(tools["process"], {}).text

    async def main() -> list[ToolResult | BaseException]:
        hangs = [tools["hang"].run(arguments, "")] if fatal == "hang" else []
        began = [asyncio.ensure_future(call) for call in hangs]
        await asyncio.sleep(1)  # so that what follows is given up with it, before its own time is over
        others = [asyncio.ensure_future(tools[name].run('{"seconds": 1.5}', "")) for name in ("look", "wait")]
        await asyncio.sleep(0.2)
        last = [] if hangs else [tools["die"].run("{}", "")]
        return await asyncio.gather(*others, *began, *last, return_exceptions=True)

    again, lost, cause = asyncio.run(main())
    assert isinstance(again, ToolResult)
    assert int(again.text) != int(before)
    assert isinstance(lost, ToolUnavailable)
    assert isinstance(cause, ToolUnavailable)
    asyncio.run(server.close())


def test_a_cancelled_call_leaves_the_connection_as_it_was(tools: Mapping[str, MCPTool]):
    async def main() -> str:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.2):
                await tools["wait"].run('{"seconds": 20}', "a")
        return (await tools["shout"].run("still here", "b")).text

    assert asyncio.run(main()) == "STILL HERE"


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"command": []}, "name either command, a program and its arguments, or the url of a server"),
        ({"url": "http://127.0.0.1:9/mcp"}, "name either command"),
        ({"timeout_s": 0}, "timeout_s must be above 0, got 0"),
        ({"command": [], "url": "http://x", "token_env": "NO_SUCH_VARIABLE"}, "NO_SUCH_VARIABLE is not set"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings: dict, why: str):
    with pytest.raises(ConfigError, match=why):
        serving(**settings)


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"command": ["no-such-program"]}, "'no-such-program' is down: FileNotFoundError"),
        ({"command": [*COMMAND, "--fail"]}, "It last wrote: no such port"),
        ({"command": ["sleep", "60"], "start_timeout_s": 0.5}, "is down: it does not answer"),
        (
            {"command": [], "url": "http://127.0.0.1:9/mcp"},
            "the MCP server 'http://127.0.0.1:9/mcp' is down: ConnectError",
        ),
        ({"only": ["ad"]}, "has no tool 'ad'. Did you mean 'add'?"),
    ],
)
def test_a_server_that_cannot_be_had_is_refused_before_the_run(settings: dict, why: str):
    with pytest.raises(ConfigError) as caught:
        tools_of(serving(**settings), "tools.mcp")
    assert str(caught.value).startswith("tools.mcp: ")
    assert why in str(caught.value)


def test_tools_can_be_chosen_and_named_apart():
    server = serving(only=["add"], prefix="far_")
    (tool,) = server.tools()
    assert tool.name == "far_add"
    assert run(tool, {"a": 1, "b": 2}).text == "3"
    asyncio.run(server.close())


RAW = [sys.executable, "-m", "tests.mcp_raw"]


def test_what_is_no_text_in_an_answer_is_replaced_and_the_others_keep_their_server():
    server = serving(command=RAW)
    tools = {tool.name: tool for tool in server.tools()}
    link = server._line._link
    assert run(tools["half"], {}) == ToolResult("cut ? here")
    assert run(tools["bytes"], {}) == ToolResult("no \ufffd UTF-8")
    with pytest.raises(ToolUnavailable, match="failed in one call: it broke"):
        run(tools["broken"], {})
    unread = ToolResult("Error: what the tool returned cannot be read", Outcome.MODEL_ERROR)
    assert run(tools["odd"], {}) == unread
    assert run(tools["promises"], {}) == unread
    assert run(tools["fine"], {}) == ToolResult("fine")
    assert server._line._link is link
    asyncio.run(server.close())


@pytest.mark.parametrize("properties", [{"value": True}, None])
def test_a_schema_that_any_value_fits_is_a_schema(properties: object):
    tool = MCPTool(
        name="any", description="", parameters={"type": "object", "properties": properties}, remote_name="any",
        server=serving(), repeatable=False,
    )  # fmt: skip
    assert run(tool, "no JSON").text.startswith("Error: any takes a JSON object: {")


def test_messages_say_nothing_secret_of_the_server():
    assert serving(command=["srv", "--api-key", "S1", "--token=S2", "-v"]).name == (
        "the MCP server 'srv --api-key ... --token=... -v'"
    )
    elsewhere = replace(serving(), command=[], url="https://me:S3@host:1/mcp?key=S4")
    assert elsewhere.name == "the MCP server 'https://host:1/mcp'"


def test_a_tool_says_when_its_server_counts_as_down(tools: Mapping[str, MCPTool]):
    """Before the trajectory gives the call up: else one that hangs would never be replaced (otcrl/build.py)."""
    assert {tool.timeout_s for tool in tools.values()} == {serving().timeout_s}


# -- streamable HTTP ------------------------------------------------------------------------------------------


@pytest.fixture
def port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def started(port: int, command: Sequence[str] = COMMAND) -> subprocess.Popen[bytes]:
    process = subprocess.Popen(
        [*command, "--http", str(port)], cwd=ROOT, stderr=subprocess.DEVNULL, env=os.environ | {"PYTHONPATH": str(ROOT)}
    )
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return process
        time.sleep(0.1)
    raise AssertionError("the server did not start")


def test_a_server_elsewhere_is_spoken_to_over_http_and_found_again_after_it_was_gone(port: int):
    process = started(port)
    server = replace(serving(), command=[], url=f"http://127.0.0.1:{port}/mcp")
    tools = {tool.name: tool for tool in server.tools()}
    try:
        assert run(tools["add"], {"a": 2, "b": 40}) == ToolResult("42")
        assert run(tools["fail"], {"why": "no"}).outcome is Outcome.MODEL_ERROR
        process.kill()
        process.wait()
        with pytest.raises(ToolUnavailable, match=f"'http://127.0.0.1:{port}/mcp' is down"):
            run(tools["add"], {"a": 2, "b": 40})
        process = started(port)
        assert run(tools["add"], {"a": 2, "b": 40}) == ToolResult("42")
    finally:
        process.kill()
        process.wait()
        asyncio.run(server.close())


@pytest.mark.parametrize("token", [None, "A_TOKEN"])
def test_over_http_a_call_has_its_own_deadline_and_no_connection_to_wait_for(
    port: int, token: str | None, monkeypatch: pytest.MonkeyPatch
):
    """httpx's own are 5 s and 100 connections, and whoever passes either costs all the others their calls."""
    monkeypatch.setenv("A_TOKEN", "t")
    process = started(port)
    server = replace(serving(), command=[], url=f"http://127.0.0.1:{port}/mcp", token_env=token)
    waiting = {tool.name: tool for tool in server.tools()}["wait"]
    try:
        link = server._line._link

        async def many() -> list[ToolResult]:
            return await asyncio.gather(*(waiting.run('{"seconds": 6}') for _ in range(130)))

        assert {result.text for result in asyncio.run(many())} == {"waited"}
        assert server._line._link is link
    finally:
        process.kill()
        process.wait()
        asyncio.run(server.close())


@contextmanager
def raw_over_http(port: int) -> Iterator[tuple[MCPServer, Mapping[str, MCPTool]]]:
    """The server that writes what no other would, and its tools by name."""
    process = started(port, RAW)
    server = replace(serving(), command=[], url=f"http://127.0.0.1:{port}/mcp")
    try:
        yield server, {tool.name: tool for tool in server.tools()}
    finally:
        process.kill()
        process.wait()
        asyncio.run(server.close())


def test_over_http_too_one_tool_that_breaks_costs_the_others_nothing(port: int):
    with raw_over_http(port) as (server, tools):
        link = server._line._link
        with pytest.raises(ToolUnavailable, match="failed in one call: it broke"):
            run(tools["broken"], {})
        assert run(tools["fine"], {}) == ToolResult("fine")
        assert server._line._link is link


@pytest.mark.parametrize("tool", ["half", "bytes"])
def test_an_answer_over_http_that_cannot_be_read_is_an_observation(port: int, tool: str):
    with raw_over_http(port) as (server, tools):
        link = server._line._link
        unread = ToolResult("Error: what the tool returned cannot be read", Outcome.MODEL_ERROR)
        assert run(tools[tool], {}) == unread
        assert run(tools["fine"], {}) == ToolResult("fine")
        assert server._line._link is link
