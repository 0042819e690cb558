"""`otcrl serve retrieval`: Search-R1's and verl's clients work against it, and a wrong request is told why."""

import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from schemathesis import GenerationMode

from otcrl.serve import Address, RetrievalServer
from otcrl.tools.retrieval.batches import Batches, Searchable
from otcrl.tools.retrieval.build import build_index
from otcrl.tools.retrieval.corpus import Passage
from otcrl.tools.retrieval.encode import HashingEncoder
from otcrl.tools.retrieval.server import Limits, make_app
from tests.apps import keeps_its_promises, served
from tests.test_batches import Watched, capitals

LIMITS = Limits(max_topk=10, max_queries=20, max_query_chars=100, deadline_s=10.0)
QUERIES = ["What is the capital of Italy?", "capital of Norway"]


@contextmanager
def serving(
    index: Searchable, limits: Limits = LIMITS, token: str | None = None, queue: int = 64, **settings: Any
) -> Iterator[str]:
    """The address of a server in a thread of this process."""
    with serving_batches(Batches(lambda: index, **settings), limits, token, queue) as url:
        until_warm(url)
        yield url


@contextmanager
def serving_batches(
    batches: Batches, limits: Limits = LIMITS, token: str | None = None, queue: int = 64
) -> Iterator[str]:
    app = make_app(batches, max_batch=64, token=token, queue=queue, limits=limits)
    with served(app) as url:
        batches.prepare()
        yield url


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with serving(capitals()) as address:
        yield address


def post(url: str, path: str = "/search", **body: Any) -> httpx.Response:
    return httpx.post(url + path, json=body, timeout=30)


def is_warm(url: str) -> bool:
    return httpx.get(f"{url}/health").status_code == 200


def until_warm(url: str) -> None:
    deadline = time.monotonic() + 60
    while not is_warm(url):
        assert time.monotonic() < deadline, "the index is not open yet"
        time.sleep(0.01)


def sample(url: str, name: str) -> float:
    [value] = re.findall(rf"^{re.escape(name)} (.+)$", httpx.get(f"{url}/metrics").text, re.MULTILINE)
    return float(value)


# -- Search-R1's protocol -----------------------------------------------------------------------------


def search_r1_client(search_url: str, topk: int, queries: list[str]) -> list[str]:
    """What Search-R1's generation.py does: `_batch_search` and `_passages2string`."""

    def passages2string(retrieval_result: list[dict[str, Any]]) -> str:
        format_reference = ""
        for idx, doc_item in enumerate(retrieval_result):
            content = doc_item["document"]["contents"]
            title = content.split("\n")[0]
            text = "\n".join(content.split("\n")[1:])
            format_reference += f"Doc {idx + 1}(Title: {title}) {text}\n"
        return format_reference

    payload = {"queries": queries, "topk": topk, "return_scores": True}
    results = httpx.post(search_url, json=payload).json()["result"]
    return [passages2string(result) for result in results]


def test_search_r1s_client_reads_what_it_expects(url: str):
    assert search_r1_client(f"{url}/retrieve", 1, QUERIES) == [
        'Doc 1(Title: "Rome") Rome is the capital of Italy.\n',
        'Doc 1(Title: "Oslo") Oslo is the capital of Norway.\n',
    ]
    assert search_r1_client(f"{url}/retrieve", 3, []) == []  # it asks even if no trajectory searches


def test_verls_client_reads_what_it_expects(url: str):
    payload = {"queries": QUERIES[:1], "topk": 3, "return_scores": True}
    headers = {"Content-Type": "application/json", "Accept": "application/json"}
    response = httpx.post(f"{url}/retrieve", headers=headers, json=payload, timeout=30)
    response.raise_for_status()
    [documents] = response.json().get("result", [])
    assert [type(document["score"]) for document in documents] == [float] * 3
    assert documents[0]["document"] == {"id": "1", "contents": '"Rome"\nRome is the capital of Italy.'}
    assert documents[0]["score"] > documents[1]["score"] >= documents[2]["score"]


def test_without_scores_the_documents_come_alone(url: str):
    bare, scored = (
        post(url, "/retrieve", queries=QUERIES, topk=2, return_scores=with_scores).json()["result"]
        for with_scores in (False, True)
    )
    assert bare == [[each["document"] for each in documents] for documents in scored]
    assert post(url, "/retrieve", queries=QUERIES, topk=2).json()["result"] == bare  # as in Search-R1 by default


def test_topk_is_the_servers_unless_asked_for_and_all_there_are_at_most(url: str):
    for asked, given_back in ((None, 3), (1, 1), (4, 4), (10, 4)):
        [documents] = post(url, "/retrieve", queries=["Rome"], topk=asked).json()["result"]
        assert len(documents) == given_back


# -- our own ------------------------------------------------------------------------------------------


def test_search_tells_the_passages_their_scores_the_index_and_what_was_remembered():
    with serving(Watched("A1")) as url:
        first = post(url, queries=["capital of Peru"], topk=2).json()
        assert first["index"] == "A1"
        [[best, second]] = first["results"]
        assert (best["id"], best["title"], best["text"]) == ("3", "Lima", "Lima is the capital of Peru.")
        assert best["score"] > second["score"]
        again = post(url, queries=["capital of Peru", "Oslo"], topk=2, deadline_s=5).json()
        assert (first["cached"], again["cached"]) == ([False], [True, False])
        assert again["results"][0] == first["results"][0]
        assert post(url, queries=[]).json() == {"index": "A1", "results": [], "cached": []}


def test_remembered_answers_are_bounded_by_their_passages(tmp_path: Path):
    build_index(list(capitals().passages), HashingEncoder(dimension=256), tmp_path / "index")  # pyright: ignore

    def cached(size: int, *asked: tuple[str, int]) -> list[bool]:
        batches = RetrievalServer(at=Address(), index=str(tmp_path / "index"), cache_size=size).batches()
        found = [batches.ask_all([query], topk).result(30)[0].cached for query, topk in (("", 1), *asked)][1:]
        batches.close()
        return found

    rome, oslo, lima = ("Rome", 3), ("Oslo", 3), ("Lima", 3)
    assert cached(2, rome, oslo, rome, oslo) == [False, False, True, True]
    assert cached(2, rome, oslo, lima, oslo, rome) == [False, False, False, True, False]
    assert cached(2, rome, oslo, ("Lima", 4), oslo, rome) == [False] * 5  # four and three are more than six
    assert cached(2, *((town, 1) for town in "aacba")) == [False, True, False, False, False]  # two of one are two still
    assert cached(1, rome, ("Oslo", 4), ("Oslo", 4), rome) == [False, False, False, True]  # too large for it
    assert cached(0, rome, rome) == [False, False]


def test_a_document_is_read_by_its_id_whatever_characters_it_has():
    index = Watched(prefix="a/ü?%00 ")
    with serving(index) as url:
        got = httpx.get(f"{url}/document/a%2F%C3%BC%3F%2500%20{1}")
        assert got.json() == {"id": "a/ü?%00 1", "title": "Rome", "text": "Rome is the capital of Italy."}
        for unknown in ("", "9", "%00", "%FF", "../1"):
            missing = httpx.get(f"{url}/document/{unknown}")
            assert (missing.status_code, list(missing.json())) == (404, ["detail"])


def test_health_and_metrics_tell_what_is_served_and_how_it_goes():
    with serving(Watched("A1")) as url:
        assert httpx.get(f"{url}/health").json() == {
            "status": "ok",
            "index": "A1",
            "rows": 4,
            "kind": "flat",
            "encoder": "hashing-256",
            "queued": 0,
            "running": 0,
        }
        post(url, queries=["Rome", "Oslo", "Rome"])
        post(url, "/retrieve", queries=["Rome"])
        post(url, queries=[""])
        counted = {
            'calls_total{outcome="200"}': 2,
            'calls_total{outcome="422"}': 1,
            "seconds_count": 2,
            "queries_total": 4,
            "cache_hits_total": 1,
            "batch_size_count": 1,
            "batch_size_sum": 2,
            "search_seconds_count": 1,
            "queued": 0,
            "running": 0,
        }
        assert {name: sample(url, f"otcrl_retrieval_{name}") for name in counted} == counted


def test_until_the_index_is_open_everything_but_health_is_refused_for_a_while():
    may_open = threading.Event()

    def open() -> Searchable:
        assert may_open.wait(10)
        return capitals()

    with serving_batches(Batches(open)) as url:
        answers = [httpx.get(f"{url}/health"), post(url, queries=["x"]), post(url, "/retrieve", queries=["x"])]
        answers += [httpx.get(f"{url}/document/1"), httpx.post(f"{url}/reload")]
        assert [(it.status_code, it.headers["Retry-After"]) for it in answers] == [(503, "1")] * 5
        may_open.set()
        until_warm(url)
        assert post(url, queries=["x"]).status_code == 200


# -- what is refused ----------------------------------------------------------------------------------


def test_an_empty_query_is_refused_but_costs_search_r1_only_its_own_documents(url: str):
    answer = post(url, "/search", queries=["a", " "])
    assert answer.status_code == 422
    assert "query 1 is empty" in answer.text
    result = post(url, "/retrieve", queries=["", "capital of France", " "], topk=2).json()["result"]
    assert [len(documents) for documents in result] == [0, 2, 0]


@pytest.mark.parametrize("path", ["/search", "/retrieve"])
@pytest.mark.parametrize(
    ("body", "where", "why"),
    [
        ({"queries": ["a", "b", "x" * 101]}, ["queries", 2], "query 2 has 101 characters, this server allows 100"),
        ({"queries": ["x"] * 21}, ["queries"], "this server takes 20 at a time, got 21"),
        ({"queries": "a"}, ["queries"], "valid list"),
        ({"queries": [None]}, ["queries", 0], "valid string"),
        ({}, ["queries"], "required"),
        ({"queries": ["a"], "topk": 0}, ["topk"], "greater than or equal to 1"),
        ({"queries": ["a"], "topk": 11}, ["topk"], "this server allows 10 at most, got 11"),
        ({"queries": ["a"], "k": 3}, ["k"], "not permitted"),
    ],
)
def test_a_wrong_request_is_told_what_is_wrong(url: str, path: str, body: dict[str, Any], where: list[Any], why: str):
    reply = post(url, path, **body)
    assert reply.status_code == 422
    [problem] = reply.json()["detail"]
    assert problem["loc"] == ["body", *where]
    assert why in problem["msg"]


def test_what_is_no_json_is_refused_and_half_a_surrogate_pair_does_no_harm(url: str):
    def posted(body: str) -> httpx.Response:
        return httpx.post(f"{url}/search", content=body, headers={"Content-Type": "application/json"})

    assert [posted(body).status_code for body in ("{", "", "[" * 100_000, '{"queries": ["\xff')] == [422, 422, 400, 422]
    assert posted(r'{"queries": ["Rome \ud800", "Rome\u0000"]}').json()["results"][0][0]["title"] == "Rome"
    assert posted(r'{"queries": [], "\ud800": 1}').status_code == 422


def test_a_passage_with_half_a_surrogate_pair_is_answered(tmp_path: Path):
    with serving(build_index([Passage("\udc80", "Rome", "\ud800")], HashingEncoder(), tmp_path / "index")) as url:
        assert post(url, queries=["Rome"]).json()["results"][0][0]["text"] == "\ud800"


def test_without_the_token_only_health_answers(url: str):
    with serving(capitals(), token="s3cret") as locked:
        for method, path in (("POST", "/search"), ("POST", "/retrieve"), ("POST", "/reload"), ("GET", "/document/1")):
            refused = httpx.request(method, locked + path, headers={"Authorization": "Bearer s3cre"})
            assert (refused.status_code, refused.headers["WWW-Authenticate"]) == (401, "Bearer")
        allowed = {"Authorization": "Bearer s3cret"}
        assert httpx.post(f"{locked}/search", json={"queries": ["Rome"]}, headers=allowed).status_code == 200


# -- whatever comes in ---------------------------------------------------------------------------------


def with_time(body: dict[str, Any]) -> None:
    match body:
        case {"deadline_s": float() as seconds} if 0 < seconds < 1:
            body["deadline_s"] = 1.0  # less may rightly be a 504


def test_no_request_makes_the_server_fail_or_leave_its_schema():
    with serving(capitals()) as url:
        for method, path, mode in (
            *(("POST", path, mode) for path in ("/search", "/retrieve") for mode in GenerationMode),
            ("GET", "/document/{id}", GenerationMode.POSITIVE),
            ("POST", "/reload", GenerationMode.POSITIVE),
            ("GET", "/health", GenerationMode.POSITIVE),
        ):
            keeps_its_promises(url, method, path, mode, examples=40, change=with_time)


def test_the_schema_says_what_fields_mean(url: str):
    schemas = httpx.get(f"{url}/openapi.json").json()["components"]["schemas"]
    assert "identity of the index" in schemas["SearchResponse"]["properties"]["index"]["description"]
    assert "title in double quotes" in schemas["Document"]["properties"]["contents"]["description"]
