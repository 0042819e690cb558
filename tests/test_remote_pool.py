"""Interpreters behind `otcrl serve python` are used as local ones, and no call is lost when a server is."""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any, TypeVar

import pytest

from otcrl.errors import ConfigError, ToolUnavailable
from otcrl.tools.sandbox.client import RemotePool
from otcrl.tools.sandbox.execution import Execution, Program, State
from otcrl.tools.sandbox.pool import Pool
from tests.test_remote import closed_port, scripted
from tests.test_sandbox import has_bubblewrap
from tests.test_sandbox_server import serving
from tests.test_serve import process

needs_bubblewrap = pytest.mark.skipif(not has_bubblewrap(), reason="bubblewrap cannot make namespaces here")

PROGRAM = Program(code="", timeout_s=10.0, memory_mb=64, max_bytes=8000)
T = TypeVar("T")


def remote(urls: list[str], use: Callable[[RemotePool], Awaitable[T]], token: str | None = None) -> T:
    async def using() -> T:
        pool = RemotePool(urls, token, open_s=0.3, deadline_s=30.0)
        try:
            return await use(pool)
        finally:
            await pool.close()

    return asyncio.run(using())


def program(code: str, **fields: Any) -> Program:
    return replace(PROGRAM, code=code, **fields)


@needs_bubblewrap
def test_a_remote_pool_says_what_a_pool_says():
    programs = [
        program("print('a'); 6 * 7", stdin="b", files={"f": "eA=="}, fetch=["f", "g"]),
        program("1 / 0"),
        program("print('x' * 100_000)", max_bytes=10),
        program("bytearray(1 << 40)"),
        program("import os; os.abort()"),
        program("'\ud800'"),
    ]

    async def use(pool: RemotePool | Pool) -> list[Execution]:
        await pool.start()
        return [replace(await pool.run(each), seconds=0.0) for each in programs]

    async def direct() -> list[Execution]:
        pool = Pool(1, ["math"], "bubblewrap")
        try:
            return await use(pool)
        finally:
            await pool.close()

    with serving() as url:
        remotely, directly = remote([url], use), asyncio.run(direct())
    assert remotely[:-1] == directly[:-1]
    assert remotely[-1].value == "'?'"  # no bytes in UTF-8 for it


@needs_bubblewrap
def test_a_server_that_refuses_is_a_config_error():
    with serving(token="s3cret") as url:
        assert remote([url], lambda pool: pool.run(program("6 * 7")), token="s3cret").value == "42"
        with pytest.raises(ConfigError, match=f"{url} refuses the request .HTTP 401.*Bearer TOKEN"):
            remote([url], lambda pool: pool.start())
        with pytest.raises(ConfigError, match=r"HTTP 422.*allows 300 at most, got 999"):
            remote([url], lambda pool: pool.run(program("", timeout_s=999)), token="s3cret")


def test_a_pool_without_any_server_does_not_start():
    with pytest.raises(ToolUnavailable, match=r"no Python sandbox serves: .*ConnectError"):
        remote([closed_port(), closed_port()], lambda pool: pool.start())


def test_what_is_no_sandbox_is_unavailable():
    async def use() -> None:
        async with scripted(200) as (url, _):
            with pytest.raises(ToolUnavailable, match="answers as no `otcrl serve python` would"):
                await RemotePool([url]).run(program(""))

    asyncio.run(use())


@needs_bubblewrap
def test_no_call_is_lost_when_a_queue_is_full():
    async def eight(pool: RemotePool) -> list[Execution]:
        return await asyncio.gather(*(pool.run(program(f"import time; time.sleep(0.1); {i}")) for i in range(8)))

    with serving(workers=1, queue=1) as url:
        assert [done.value for done in remote([url], eight)] == [str(i) for i in range(8)]


@needs_bubblewrap
def test_no_call_is_lost_when_one_of_two_servers_is_killed():
    with process("python") as (one, victim), process("python") as (other, _):

        async def use(pool: RemotePool) -> list[Execution]:
            calls = [pool.run(program(f"import time; time.sleep(0.2); {i}")) for i in range(12)]
            answers = asyncio.gather(*calls)
            await asyncio.sleep(0.5)
            victim.kill()
            return await answers

        done = remote([one, other], use)
    assert [(each.state, each.value) for each in done] == [(State.OK, str(i)) for i in range(12)]


@needs_bubblewrap
def test_a_broken_sandbox_is_passed_over_although_its_server_answers():
    broken = Pool(1, ["math"], "bubblewrap")
    with serving(pool=broken) as one, serving() as other:
        asyncio.run(broken.close())

        async def use(pool: RemotePool) -> list[str]:
            return [(await pool.run(program(f"{i}"))).value for i in range(10)]

        assert remote([one, other], use) == [str(i) for i in range(10)]


@needs_bubblewrap
def test_sessions_stick_to_their_server_and_end_there():
    async def use(pool: RemotePool) -> None:
        for name in "abcd":
            assert (await pool.run(program(f"x = {name!r}", session=name))).fresh
        for _ in range(2):
            for name in "abcd":
                done = await pool.run(program("x", session=name))
                assert (done.value, done.fresh) == (repr(name), False)
        await pool.end("a")
        assert (await pool.run(program("'x' in vars()", session="a"))).value == "False"
        await pool.end("none")

    with serving() as one, serving() as other:
        remote([one, other], use)


@needs_bubblewrap
def test_two_pools_never_share_a_session():
    async def use(pool: RemotePool) -> Execution:
        return await pool.run(program("x = 1", session="same"))

    with serving() as url:
        assert remote([url], use).fresh
        assert remote([url], use).fresh


@needs_bubblewrap
def test_a_session_whose_server_is_gone_starts_afresh_elsewhere():
    with process("python") as (one, victim), serving() as other:

        async def use(pool: RemotePool) -> None:
            sessions = [f"{i}" for i in range(14)]  # that all fall to one server: once in 8,192 times
            for session in sessions:
                await pool.run(program("x = 1", session=session))
            victim.kill()
            victim.wait()
            done = [await pool.run(program("'x' in vars()", session=session)) for session in sessions]
            assert {(each.value, each.fresh) for each in done} == {("True", False), ("False", True)}
            assert not any([(await pool.run(program("1", session=session))).fresh for session in sessions])

        remote([one, other], use)
