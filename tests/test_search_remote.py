"""Search behind servers: every query is answered as its index would, or fails by name and in time."""

import asyncio
import json
import random
import re
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import count, cycle, repeat
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from otcrl.errors import ConfigError, DataError, ToolUnavailable
from otcrl.protocols import ToolResult
from otcrl.tools.retrieval.build import memory_index
from otcrl.tools.retrieval.client import RemoteIndex
from otcrl.tools.retrieval.corpus import Passage
from otcrl.tools.retrieval.encode import HashingEncoder
from otcrl.tools.retrieval.index import Hit
from otcrl.tools.search import SearchTool
from otcrl.types import Outcome
from tests.apps import served
from tests.test_remote import closed_port
from tests.test_retrieval_server import serving as really_serving

Search = Callable[[Sequence[str], int], list[list[Hit]]]

CAPITALS = [
    Passage("1", "Paris", "Paris is the capital of France."),
    Passage("2", "Rome", "Rome is the capital of Italy."),
    Passage("3", "Bern", "Bern is the capital of Switzerland."),
    Passage("4", "Oslo", "Oslo is the capital of Norway."),
]


def echo(queries: Sequence[str], topk: int) -> list[list[Hit]]:
    """Passages that tell whose they are."""
    return [[Hit(Passage(f"{q}/{i}", q, f"{i} of {q}"), 1 - i / 10) for i in range(topk)] for q in queries]


def echoed(query: str) -> str:
    return f"Doc 1(Title: {query}) 0 of {query}\nDoc 2(Title: {query}) 1 of {query}"


# -- a server with faults --------------------------------------------------------------------------------


class Fake:
    """Speaks as `otcrl serve retrieval` and as Search-R1's retriever do; each search suffers the next of `faults`."""

    def __init__(
        self,
        search: Search = echo,
        *,
        index: str = "one",
        kind: str = "flat",
        faults: Iterable[str] = (),
        health: Iterable[int] = (),  # its first answers
        token: str = "",
        seconds: float = 0.0,
    ) -> None:
        self.search, self.index, self.token, self.seconds = search, index, token, seconds
        self.kind = kind
        self.faults, self.health = iter(faults), iter(health)
        self.asked: list[dict[str, Any]] = []

    def app(self) -> Starlette:
        return Starlette(
            routes=[
                Route("/health", self.tell_health),
                Route("/search", self.serve, methods=["POST"]),
                Route("/retrieve", self.serve, methods=["POST"]),
            ]
        )

    async def tell_health(self, request: Request) -> Response:
        status = next(self.health, 200)
        about = {"status": "ok", "index": self.index, "kind": self.kind}
        return JSONResponse(about if status == 200 else {"detail": "loading"}, status)

    async def serve(self, request: Request) -> Response:
        body = await request.json()
        self.asked.append(body)
        if self.token and request.headers.get("Authorization") != f"Bearer {self.token}":
            return JSONResponse({"detail": "who are you"}, 401)
        await asyncio.sleep(self.seconds)
        results = self.search(body["queries"], body["topk"])
        reply = retrieved(results) if request.url.path == "/retrieve" else found(results, self.index)
        return await faulty(next(self.faults, ""), reply)


def found(results: list[list[Hit]], index: str) -> dict[str, Any]:
    rows = [
        [{"id": h.passage.id, "title": h.passage.title, "text": h.passage.text, "score": h.score} for h in hits]
        for hits in results
    ]
    return {"index": index, "results": rows, "cached": [False] * len(rows)}


def retrieved(results: list[list[Hit]]) -> dict[str, Any]:
    def scored(hit: Hit) -> dict[str, Any]:
        contents = f'"{hit.passage.title}"\n{hit.passage.text}'
        return {"document": {"id": hit.passage.id, "contents": contents}, "score": hit.score}

    return {"result": [[scored(hit) for hit in hits] for hits in results]}


async def faulty(fault: str, reply: dict[str, Any]) -> Response:
    key = "results" if "results" in reply else "result"
    if fault.isdigit():
        return JSONResponse({"detail": "a fault"}, int(fault), {"Retry-After": "1"})
    if fault == "hang":
        await asyncio.sleep(60)
    if fault == "drip":
        return StreamingResponse(drips(), media_type="application/json")
    if fault == "cut":
        return Response(b'{"index"', headers={"Content-Length": "1000"})
    if fault == "gzip":
        return Response(b"no gzip", headers={"Content-Encoding": "gzip"})
    bad = {
        "html": "<html>",
        "deep": "[" * 100_000,
        "list": "[]",
        "empty": "{}",
        "one too few": json.dumps(reply | {key: reply[key][1:]}),
        "one too many": json.dumps(reply | {key: [*reply[key], []]}),
        "other index": json.dumps(reply | {"index": "other"}),
        "more passages": json.dumps(reply | {key: [rows * 9 for rows in reply[key]]}),
        "no passage": json.dumps(reply | {key: [[{"score": 1.0}]]}),
        "no number": json.dumps(reply).replace("1.0", "NaN"),
        "huge number": json.dumps(reply).replace("1.0", "9" * 400),
    }
    return Response(bad.get(fault, json.dumps(reply)), media_type="application/json")


async def drips() -> AsyncIterator[bytes]:
    while True:
        yield b" "
        await asyncio.sleep(0.05)


WRONG = ("html", "deep", "list", "empty", "one too few", "one too many", "more passages", "no passage", "no number")
BROKEN = ("500", "502", "503", "504", "302", "204", "cut", "gzip", "huge number")


@contextmanager
def serving(fake: Fake, port: int = 0) -> Iterator[str]:
    """Its address; what it is doing at the end is broken off."""
    with served(fake.app(), port, breaks_off=True) as url:
        yield url


@contextmanager
def servers(*fakes: Fake) -> Iterator[list[str]]:
    with ExitStack() as stack:
        yield [stack.enter_context(serving(fake)) for fake in fakes]


def tool(urls: Sequence[str], **fields: Any) -> SearchTool:
    return SearchTool(**{"urls": urls, "topk": 2, "timeout_s": 10.0} | fields)


def ask(search: SearchTool, *queries: str, session: str = "") -> list[ToolResult]:
    """All at once, in one event loop, and then the tool is closed."""

    async def main() -> list[ToolResult]:
        try:
            return await asyncio.gather(*(search.run(query, session) for query in queries))
        finally:
            await search.close()

    return asyncio.run(main())


def within(seconds: float, work: Callable[[], object]) -> None:
    begun = time.monotonic()
    work()
    assert time.monotonic() - begun < seconds


# -- what is asked and shown --------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", ["otcrl", "search_r1"])
def test_the_policy_reads_what_a_local_index_would_have_shown_it(protocol: str):
    local = SearchTool(encoder=HashingEncoder(), passages=CAPITALS)
    queries = ["capital of Italy", "Bern", "Norway ?"]
    with really_serving(memory_index(CAPITALS, HashingEncoder()), token="s3cret") as url:
        assert ask(tool([url], topk=3, protocol=protocol, token="s3cret"), *queries) == ask(local, *queries)


def test_a_request_names_the_number_of_passages_and_the_seconds_left():
    fake = Fake()
    with serving(fake) as url:
        ask(tool([url], timeout_s=8.0), " two\n words ")
    [asked] = fake.asked
    assert 3.0 < asked.pop("deadline_s") <= 4.0  # another attempt has the other half
    assert asked == {"queries": ["two words"], "topk": 2}


def test_search_r1s_retriever_is_asked_as_search_r1_asks_it():
    fake = Fake()
    with serving(fake) as url:
        assert ask(tool([url], protocol="search_r1"), "q")[0].text == echoed("q")
    assert fake.asked == [{"queries": ["q"], "topk": 2, "return_scores": True}]


def test_several_queries_are_one_request():
    fake = Fake()
    with serving(fake) as url:
        [result] = ask(tool([url], separator=";", topk=1), "a; b;a")
    assert [asked["queries"] for asked in fake.asked] == [["a", "b"]]
    assert result.text == (
        "Query: a\nDoc 1(Title: a) 0 of a\nQuery: b\nDoc 1(Title: b) 0 of b\nQuery: a\nNo other passage was found."
    )


def test_a_remembered_query_is_marked_and_not_asked_again():
    fake = Fake()
    with serving(fake) as url:
        search = tool([url], separator=";")
        results = [asyncio.run(search.run(text)) for text in ("a", "a", "a;b", "b; a")]  # a loop each
    assert [result.cached for result in results] == [False, True, False, True]
    assert [asked["queries"] for asked in fake.asked] == [["a"], ["b"]]


def test_a_server_gets_the_token():
    with serving(Fake(token="s3cret")) as url:
        assert ask(tool([url], token="s3cret"), "q")[0].text == echoed("q")
        with pytest.raises(ToolUnavailable, match=f"search: {url} refuses the request .HTTP 401.: who are you"):
            ask(tool([url], token="guess"), "q")


def test_half_a_surrogate_pair_is_asked_as_a_question_mark():
    with serving(Fake()) as url:
        assert ask(tool([url]), "\ud800")[0].text == echoed("?")


# -- faults -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def flaky() -> Iterator[tuple[Fake, str]]:
    """A server whose faults the test sets."""
    fake = Fake()
    with serving(fake) as url:
        yield fake, url


@pytest.mark.parametrize("fault", [*WRONG, *BROKEN])
def test_what_is_no_answer_is_asked_for_again(fault: str, flaky: tuple[Fake, str]):
    fake, url = flaky
    fake.asked, fake.faults = [], iter([fault])
    assert ask(tool([url]), "q") == [ToolResult(echoed("q"))]
    assert len(fake.asked) == 2


@pytest.mark.parametrize("fault", ["html", "one too few", "no passage", "500", "cut", "hang"])
def test_search_r1s_retriever_may_fail_likewise(fault: str):
    with serving(Fake(faults=[fault])) as url:
        assert ask(tool([url], protocol="search_r1", timeout_s=2.0), "q") == [ToolResult(echoed("q"))]


def test_a_busy_server_is_asked_again_after_the_time_it_named():
    with serving(Fake(faults=["429"])) as url:
        begun = time.monotonic()
        assert ask(tool([url]), "q")[0].text == echoed("q")
        assert 1.0 <= time.monotonic() - begun < 3.0


def test_a_server_that_hangs_costs_half_of_the_time():
    with servers(Fake(faults=repeat("hang")), Fake(seconds=0.1)) as urls:
        search = tool(urls, timeout_s=3.0)
        queries = [f"q{i}" for i in range(10)]
        within(2.9, lambda: ask_and_compare(search, queries))


def ask_and_compare(search: SearchTool, queries: Sequence[str]) -> None:
    assert [result.text for result in ask(search, *queries)] == [echoed(query) for query in queries]


@pytest.mark.parametrize("fault", ["html", "500", "hang", "drip", "other index", "429"])
def test_when_every_server_fails_the_tool_is_unavailable_in_time_and_names_them(fault: str):
    with servers(Fake(faults=repeat(fault)), Fake(faults=repeat(fault))) as urls:
        with pytest.raises(ToolUnavailable) as caught:
            within(2.0, lambda: ask(tool(urls, timeout_s=1.5), "q"))
        assert str(caught.value).startswith("search: ")
        assert all(url in str(caught.value) for url in urls)


@pytest.mark.parametrize("status", [400, 401, 404, 413, 422])
def test_a_refusal_is_not_tried_again(status: int, flaky: tuple[Fake, str]):
    fake, url = flaky
    fake.asked, fake.faults = [], iter([str(status)])
    with pytest.raises(ToolUnavailable, match=f"search: {url} refuses .*HTTP {status}.: a fault"):
        ask(tool([url]), "q")
    assert len(fake.asked) == 1


def test_a_replica_with_another_index_is_never_believed():
    with servers(Fake(faults=repeat("other index")), Fake()) as urls:
        ask_and_compare(tool(urls), [f"q{i}" for i in range(20)])


def test_under_any_mixture_of_faults_every_query_gets_its_own_answer_or_a_named_error():
    faults = [*WRONG, *BROKEN, "429", "other index", "hang"]
    draw = random.Random(0)
    mixture = [draw.choice(faults) if draw.random() < 0.2 else "" for _ in range(997)]
    with servers(Fake(faults=cycle(mixture)), Fake(faults=cycle(reversed(mixture)))) as urls:
        answered, failed = asyncio.run(soak(RemoteIndex([urls], timeout_s=4.0, open_s=0.2), 100, lambda: True))
    assert answered + len(failed) == 100
    assert answered > 50
    assert all("http://127.0.0.1" in error for error in failed)


async def soak(index: RemoteIndex, clients: int, is_over: Callable[[], bool]) -> tuple[int, list[str]]:
    """Clients that ask until it is over; every answer is its query's own, and comes in time, as every error does.

    How many were answered, and the errors.
    """
    answered, failed = 0, []

    async def client(name: int) -> None:
        nonlocal answered
        for i in count():
            queries = [f"{name}-{i}-{j}" for j in range(1 + name % 3)]
            begun = time.monotonic()
            try:
                assert await index.search(queries, 2) == echo(queries, 2)
                answered += 1
            except ToolUnavailable as error:
                failed.append(str(error))
            assert time.monotonic() - begun < 2 * 4.0 + 2.0  # the first asks what is served; a busy machine is late
            if is_over():
                return

    try:
        await asyncio.gather(*map(client, range(clients)))
    finally:
        await index.close()
    return answered, failed


def test_no_query_is_lost_while_one_of_two_replicas_is_killed_and_restarted():
    stop, restarts = time.monotonic() + 5.0, 0
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]

    def come_and_go() -> None:
        nonlocal restarts
        while time.monotonic() < stop:
            with serving(Fake(seconds=0.01), port):
                time.sleep(0.4)
            restarts += 1
            time.sleep(0.2)

    mortal = threading.Thread(target=come_and_go)
    mortal.start()
    with serving(Fake(seconds=0.01)) as steady:
        index = RemoteIndex([[steady, f"http://127.0.0.1:{port}"]], timeout_s=4.0, open_s=0.2)
        answered, failed = asyncio.run(soak(index, 64, lambda: time.monotonic() > stop))
    mortal.join()
    assert failed == []
    assert answered > 200
    assert restarts > 3


# -- the start ---------------------------------------------------------------------------------------------


def start(search: SearchTool) -> None:
    asyncio.run(search.start())


def test_replicas_of_different_indexes_are_refused():
    with servers(Fake(index="one"), Fake(index="two")) as urls:
        search = tool(urls)
        for use in (start, lambda search: asyncio.run(search.run("q")), start):
            with pytest.raises(DataError, match=f"replicas serve different indexes: {urls[0]} 'one', {urls[1]} 'two'"):
                use(search)


def test_without_any_server_the_start_says_which():
    urls = [closed_port(), closed_port()]
    for protocol in ("otcrl", "search_r1"):
        with pytest.raises(ToolUnavailable, match=f"search: {urls[0]}: ConnectError.*; {urls[1]}: ConnectError"):
            within(2.0, lambda protocol=protocol: start(tool(urls, protocol=protocol, timeout_s=1.0)))


def test_one_server_of_two_is_enough():
    with serving(Fake()) as url:
        search = tool([closed_port(), url])
        start(search)
        ask_and_compare(search, [f"q{i}" for i in range(5)])


def test_a_server_that_opens_its_index_is_waited_for():
    with serving(Fake(health=[503, 503])) as url:
        start(tool([url]))


def test_what_is_no_search_server_is_named():
    app = Fake()
    app.index = None  # pyright: ignore[reportAttributeAccessIssue]
    with serving(app) as url, pytest.raises(ToolUnavailable, match=f"{url}: .*/health wrongly: it names no index"):
        start(tool([url], timeout_s=0.5))


def test_search_r1s_retriever_is_tried_with_a_query():
    fake = Fake()
    with serving(fake) as url:
        start(tool([url], protocol="search_r1"))
    assert len(fake.asked) == 1


# -- shards ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", ["otcrl", "search_r1"])
def test_shards_answer_as_the_whole_index_would(protocol: str):
    encoder, words = HashingEncoder(), ["apple", "pear", "plum", "fig", "lime", "kiwi"]
    passages = [Passage(f"{i}", "", " ".join(words[:i])) for i in range(1, 7)]  # the longer, the less of an apple
    parts = [memory_index(passages[0::2], encoder), memory_index(passages[1::2], encoder)]
    with servers(*(Fake(part.search, index=f"part {i}") for i, part in enumerate(parts))) as urls:
        sharded = tool((), shards=[[url] for url in urls], protocol=protocol, topk=3, template="{i} {text}\n")
        whole = SearchTool(encoder=encoder, passages=passages, topk=3, template="{i} {text}\n")
        results = ask(sharded, "apple", "kiwi lime", "fig")
        assert results == ask(whole, "apple", "kiwi lime", "fig")
    assert results[0].text == "1 apple\n2 apple pear\n3 apple pear plum"


def test_an_answer_is_never_silently_partial():
    with servers(Fake(index="a"), Fake(index="b", faults=repeat("500"))) as urls:
        shards = [[urls[0]], [urls[1]]]
        with pytest.raises(ToolUnavailable, match=f"search: shard 2 of 2: {urls[1]}: HTTP 500"):
            within(2.0, lambda: ask(tool((), shards=shards, timeout_s=1.5), "q"))


def test_each_shard_has_replicas():
    with servers(Fake(index="a"), Fake(index="b", faults=repeat("html")), Fake(index="b")) as urls:
        [result] = ask(tool((), shards=[urls[:1], urls[1:]], topk=1), "q")
    assert result.text == "Doc 1(Title: q) 0 of q"


def test_shards_of_the_same_index_are_refused():
    with (
        servers(Fake(index="a"), Fake(index="a")) as urls,
        pytest.raises(DataError, match="shards 1 and 2 serve the same index, 'a'"),
    ):
        ask(tool((), shards=[[url] for url in urls]), "q")


def test_shards_whose_scores_do_not_compare_are_refused():
    """Those of a hybrid index are places: the best of each shard would be as good as the others'."""
    with (
        servers(Fake(index="a"), Fake(index="b", kind="hybrid")) as urls,
        pytest.raises(DataError, match="shard 2 is hybrid, whose scores are places within it"),
    ):
        ask(tool((), shards=[[url] for url in urls]), "q")


# -- trajectories ------------------------------------------------------------------------------------------


def test_a_trajectorys_searches_have_a_time_of_their_own():
    async def use(search: SearchTool) -> None:
        assert (await search.run("a", "slow")).outcome is Outcome.OK
        for query in ("b", "c"):  # the first runs out of time, the other has none
            with pytest.raises(ToolUnavailable, match=r"search: the trajectory's searches took all of .*=0\.5"):
                await search.run(query, "slow")
        assert (await search.run("a", "slow")).cached  # which takes none
        assert (await search.run("d", "other")).outcome is Outcome.OK
        await search.release("slow")
        assert (await search.run("e", "slow")).outcome is Outcome.OK

    with serving(Fake(seconds=0.3)) as url:
        asyncio.run(use(tool([url], trajectory_timeout_s=0.5)))


def test_a_trajectory_in_a_hurry_is_no_servers_failure():
    async def use(search: SearchTool) -> None:
        for i in range(5):  # three failures would open the breaker
            with pytest.raises(ToolUnavailable):
                await search.run("q", f"{i}")
        begun = time.monotonic()
        assert (await search.run("q")).text == echoed("q")
        assert time.monotonic() - begun < 1.0

    with serving(Fake(seconds=0.2)) as url:
        asyncio.run(use(tool([url], trajectory_timeout_s=0.1)))


# -- settings ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"shards": [["http://b"]]}, "urls and shards exclude each other"),
        ({"passages": CAPITALS}, "urls: this task brings its own passages, which no server has"),
        ({"protocol": "searchr1"}, "protocol must be otcrl or search_r1, got 'searchr1'. Did you mean 'search_r1'?"),
        ({"urls": ["a:80"]}, "urls: 'a:80' is no server's address"),
        ({"urls": (), "shards": [["http://b"], []]}, "shards: name at least one server of each"),
        ({"urls": (), "shards": [["http://b"], ["http://b/"]]}, "shards: http://b is in two of them"),
        ({"trajectory_timeout_s": -1}, "trajectory_timeout_s must be 0 or more, got -1"),
    ],
)
def test_servers_that_cannot_be_used_are_refused_at_once(fields: dict[str, Any], complaint: str):
    with pytest.raises(ConfigError, match=re.escape(complaint)):
        tool(**{"urls": ["http://a"]} | fields)


def test_after_close_the_tool_is_unavailable():
    async def use(search: SearchTool) -> None:
        await search.run("a")
        await search.close()
        with pytest.raises(ToolUnavailable, match="search: it is closed"):
            await search.run("b")

    with serving(Fake()) as url:
        asyncio.run(use(tool([url])))
