"""Many servers as one: what fails is retried elsewhere, left alone for a while, and comes back."""

import asyncio
import re
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from itertools import pairwise

import pytest

from otcrl.errors import ConfigError, ToolUnavailable
from otcrl.tools.remote import ServerBusy, Servers
from tests.test_sandbox import has_bubblewrap
from tests.test_sandbox_server import serving

needs_bubblewrap = pytest.mark.skipif(not has_bubblewrap(), reason="bubblewrap cannot make namespaces here")


@asynccontextmanager
async def scripted(*replies: int | str, port: int = 0) -> AsyncIterator[tuple[str, list[float]]]:
    """A server that answers with one status after the other, then with the last; "" hangs up, "..." says nothing.

    Its address, and when each request came.
    """
    asked: list[float] = []

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        asked.append(time.monotonic())
        reply = replies[min(len(asked), len(replies)) - 1]
        if reply == "...":
            await asyncio.sleep(3)
        elif reply:
            writer.write(f"HTTP/1.1 {reply} X\r\nRetry-After: 1\r\nContent-Length: 2\r\n\r\n{{}}".encode())
            await writer.drain()
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", port)
    async with server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", asked


def closed_port() -> str:
    async def find() -> str:
        async with scripted(200) as (url, _):
            return url

    return asyncio.run(find())


def gaps(asked: list[float]) -> list[float]:
    return [later - sooner for sooner, later in pairwise(asked)]


# -- any servers --------------------------------------------------------------------------------------


@pytest.mark.parametrize("failure", [502, 503, 504, ""])
def test_an_infrastructure_error_is_tried_again(failure: int | str):
    async def use() -> None:
        async with scripted(failure, failure, 200) as (url, asked):
            assert (await Servers([url]).request("POST", "/x", {"a": 1})).status_code == 200
            assert len(asked) == 3

    asyncio.run(use())


@pytest.mark.parametrize("status", [200, 204, 301, 400, 401, 404, 413, 422, 500])
def test_any_other_answer_is_the_callers(status: int):
    async def use() -> None:
        async with scripted(status) as (url, asked):
            assert (await Servers([url]).request("GET", "/x")).status_code == status
            assert len(asked) == 1

    asyncio.run(use())


def test_a_busy_server_is_asked_again_after_the_time_it_named():
    async def use() -> None:
        async with scripted(429, 200) as (url, asked):
            await Servers([url]).request("GET", "/x")
            assert 1.0 <= gaps(asked)[0] < 2.0

    asyncio.run(use())


def test_those_who_are_refused_together_do_not_come_back_together():
    async def use() -> None:
        async with scripted(*[429] * 20, 200) as (url, asked):
            servers = Servers([url])
            await asyncio.gather(*(servers.request("GET", "/x") for _ in range(20)))
            first, again = asked[:20], asked[20:]
            assert len(again) == 20
            assert min(again) - min(first) >= 1.0
            assert max(again) - min(again) > 0.1  # of 0.25 s

    asyncio.run(use())


def test_while_one_server_is_busy_another_is_asked_at_once():
    async def use() -> None:
        async with scripted(429, 200) as (busy, asked), scripted(200) as (free, _):
            servers, begun = Servers([busy, free]), time.monotonic()
            with pytest.raises(ServerBusy):
                await servers.send(busy, "GET", "/x", deadline=begun + 5)
            for _ in range(8):
                await servers.request("GET", "/x")
            assert time.monotonic() - begun < 0.9
            assert len(asked) == 1

    asyncio.run(use())


def test_a_breaker_opens_after_failures_in_a_row_lets_one_probe_through_and_closes():
    async def use() -> None:
        async with scripted(503, 503, 503, 503, 200) as (url, asked):
            servers = Servers([url], failures=3, open_s=0.6)
            replies = await asyncio.gather(*(servers.request("GET", f"/{i}") for i in range(3)))
            assert [reply.status_code for reply in replies] == [200] * 3
            opened, probed, *rest = asked[2:]
            assert probed - opened >= 0.6  # open: nobody asks
            assert rest[0] - probed >= 0.6  # the one probe failed, and it is open again
            assert len(asked) == 7  # three failures, a failed probe, one that came through, and the other two
            assert servers.is_up(url)

    asyncio.run(use())


def test_a_server_that_comes_back_is_used_again():
    async def use() -> None:
        url = await asyncio.to_thread(closed_port)
        servers = Servers([url], failures=2, open_s=0.2, deadline_s=10)
        waiting = asyncio.ensure_future(servers.request("GET", "/x"))
        await asyncio.sleep(0.5)
        assert not servers.is_up(url)
        async with scripted(200, port=int(url.rpartition(":")[2])):
            assert (await waiting).status_code == 200
        assert servers.is_up(url)

    asyncio.run(use())


def test_after_the_deadline_the_tool_is_unavailable_and_says_why():
    async def use() -> None:
        dead = await asyncio.to_thread(closed_port)
        async with scripted("...") as (silent, _):
            servers, begun = Servers([dead, silent], timeout_s=0.2, deadline_s=1.0), time.monotonic()
            with pytest.raises(ToolUnavailable, match=f"{dead}: ConnectError.*; {silent}: ReadTimeout"):
                await servers.request("GET", "/x")
            assert 0.5 < time.monotonic() - begun < 1.5

    asyncio.run(use())


def test_who_finds_no_free_connection_until_the_deadline_is_told():
    async def use() -> None:
        async with scripted("...") as (url, _):
            servers = Servers([url], connections=1, deadline_s=0.4)
            holds = asyncio.ensure_future(servers.send(url, "GET", "/x", deadline=time.monotonic() + 2))
            await asyncio.sleep(0.1)
            with pytest.raises(ToolUnavailable, match="more than 1 requests at a time"):
                await servers.request("GET", "/x")
            holds.cancel()

    asyncio.run(use())


def test_the_server_with_the_fewest_requests_is_asked():
    async def use() -> None:
        async with scripted("...", 200) as (slow, asked_slow), scripted(200) as (fast, asked_fast):
            servers = Servers([slow, fast], timeout_s=5)
            held = asyncio.ensure_future(servers.send(slow, "GET", "/x", deadline=time.monotonic() + 5))
            await asyncio.sleep(0.1)
            for _ in range(5):
                await servers.request("GET", "/x")
            assert (len(asked_slow), len(asked_fast)) == (1, 5)
            held.cancel()

    asyncio.run(use())


@needs_bubblewrap
def test_servers_outlive_any_one_event_loop():
    with serving() as url:
        servers = Servers([url])
        for _ in range(3):
            assert asyncio.run(servers.request("GET", "/health")).status_code == 200


@pytest.mark.parametrize(
    ("urls", "token", "why"),
    [
        ([], None, "urls: name at least one server"),
        (["localhost:8080"], None, "urls: 'localhost:8080' is no server's address"),
        (["http://a"], "two words", "token: only printable ASCII without spaces"),
    ],
)
def test_what_is_no_address_is_a_config_error(urls: list[str], token: str | None, why: str):
    with pytest.raises(ConfigError, match=re.escape(why)):
        Servers(urls, token)
