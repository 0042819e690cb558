"""The search tool: what the policy reads, how queries share work, whose fault a failure is."""

import asyncio
import json
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from otcrl.errors import ConfigError, DataError, ToolUnavailable
from otcrl.protocols import ToolResult
from otcrl.tools.retrieval.build import build_index
from otcrl.tools.retrieval.corpus import Passage
from otcrl.tools.retrieval.encode import HashingEncoder, Vectors
from otcrl.tools.search import SearchTool
from otcrl.types import Outcome

CAPITALS = [
    Passage("1", "Paris", "Paris is the capital of France."),
    Passage("2", "Rome", "Rome is the capital of Italy."),
]


class Recorder:
    """A hashing encoder that keeps what it was asked, and may be slow or broken."""

    def __init__(self, seconds: float = 0.0, error: Exception | None = None) -> None:
        self.hashing, self.seconds, self.error = HashingEncoder(), seconds, error
        self.name, self.dimension = self.hashing.name, self.hashing.dimension
        self.batches: list[list[str]] = []

    def encode(self, texts: Sequence[str], is_query: bool) -> Vectors:
        if is_query:
            self.batches.append(list(texts))
            time.sleep(self.seconds)
            if self.error:
                raise self.error
        return self.hashing.encode(texts, is_query)


def ask(tool: SearchTool, *queries: str) -> list[ToolResult]:
    """All at once, in one event loop."""

    async def main() -> list[ToolResult]:
        return await asyncio.gather(*(tool.run(query) for query in queries))

    return asyncio.run(main())


def test_the_policy_reads_the_nearest_passages_in_search_r1s_form():
    tool = SearchTool(encoder=HashingEncoder(), passages=CAPITALS, topk=2)
    assert ask(tool, "capital of Italy") == [
        ToolResult(
            "Doc 1(Title: Rome) Rome is the capital of Italy.\nDoc 2(Title: Paris) Paris is the capital of France."
        )
    ]


def test_long_passages_are_cut():
    tool = SearchTool(encoder=HashingEncoder(), passages=CAPITALS, topk=1, template="{text}", max_passage_words=3)
    assert ask(tool, "Rome")[0].text == "Rome is the ..."


@pytest.mark.parametrize(
    ("max_chars", "shown"),
    [
        (0, "Rome is the capital of Italy.\nParis is the capital of France."),
        (61, "Rome is the capital of Italy.\nParis is the capital of France."),
        (60, "Rome is the capital of Italy."),  # whole passages only
        (29, "Rome is the capital of Italy."),
        (28, "Rome is the capital of I ..."),  # but never none
        (5, "R ..."),
    ],
)
def test_what_is_shown_ends_with_a_passage(max_chars: int, shown: str):
    tool = SearchTool(encoder=HashingEncoder(), passages=CAPITALS, topk=2, template="{text}\n", max_chars=max_chars)
    assert ask(tool, "Italy")[0].text == shown


def test_several_queries_are_shown_in_order_and_no_passage_twice():
    tool = SearchTool(encoder=HashingEncoder(), passages=CAPITALS, topk=1, template="{i} {text}\n", separator="\n")
    [result] = ask(tool, "Italy\n\n  and   France\nRome\n")
    assert result.text == (
        "Query: Italy\n1 Rome is the capital of Italy.\n"
        "Query: and France\n1 Paris is the capital of France.\n"
        "Query: Rome\nNo other passage was found."
    )


def test_several_queries_share_the_characters_in_order():
    tool = SearchTool(
        encoder=HashingEncoder(), passages=CAPITALS, topk=2, template="{text}\n", separator=";", max_chars=60
    )
    assert ask(tool, "Italy; France")[0].text == "Query: Italy\nRome is the capital of Italy."


@pytest.mark.parametrize("separator", [None, ";", "\n"])
def test_one_query_is_shown_alike_with_and_without_a_separator(separator: str | None):
    tool = SearchTool(encoder=HashingEncoder(), passages=CAPITALS, separator=separator)
    assert ask(tool, " capital of Italy\n") == ask(
        SearchTool(encoder=HashingEncoder(), passages=CAPITALS), "capital of Italy"
    )


def test_several_queries_are_remembered_one_by_one():
    encoder = Recorder()
    tool = SearchTool(encoder=encoder, passages=CAPITALS, separator=";")
    assert [ask(tool, text)[0].cached for text in ("Rome", "Rome; Paris", "Paris; Rome")] == [False, False, True]
    assert encoder.batches == [["Rome"], ["Paris"]]


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (" ; ", "The query is empty. Write what to search for."),
        ("a;b;c;d", "There are 4 queries, at most 3 are allowed. Write fewer."),
        ("a;" + "x" * 21, "The query has 21 characters, at most 20 are allowed. Make it shorter."),
    ],
)
def test_bad_queries_are_the_policys_error(arguments: str, why: str):
    tool = SearchTool(encoder=HashingEncoder(), passages=CAPITALS, separator=";", max_queries=3, max_query_chars=20)
    assert ask(tool, arguments) == [ToolResult(why, Outcome.MODEL_ERROR)]


def test_a_trajectorys_searches_have_a_time_of_their_own():
    async def use(tool: SearchTool) -> None:
        for query in ("Rome", "Paris"):
            with pytest.raises(ToolUnavailable, match=r"the trajectory's searches took all of .*=0\.2"):
                await tool.run(query, "slow")
        await tool.release("slow")
        assert "Rome" in (await tool.run("Rome")).text  # nobody's trajectory

    asyncio.run(use(SearchTool(encoder=Recorder(seconds=0.5), passages=CAPITALS, trajectory_timeout_s=0.2)))


@pytest.mark.parametrize(("query", "why"), [(" \n", "empty"), ("x" * 21, "21 characters, at most 20")])
def test_a_bad_query_is_the_policys_error(query: str, why: str):
    encoder = Recorder()
    [result] = ask(SearchTool(encoder=encoder, passages=CAPITALS, max_query_chars=20), query)
    assert result.outcome is Outcome.MODEL_ERROR
    assert why in result.text
    assert encoder.batches == []


def test_queries_that_come_together_are_one_batch():
    encoder = Recorder()
    tool = SearchTool(encoder=encoder, passages=CAPITALS, topk=1, batch_wait_s=0.1)
    results = ask(tool, *(["Rome", "Paris"] * 25))
    [batch] = encoder.batches
    assert sorted(batch) == ["Paris", "Rome"]  # once each; threads queue them in any order
    assert [result.text.partition(")")[0] for result in results] == ["Doc 1(Title: Rome", "Doc 1(Title: Paris"] * 25


def test_without_waiting_every_query_is_still_answered():
    encoder = Recorder()
    tool = SearchTool(encoder=encoder, passages=CAPITALS, topk=1, batch_wait_s=0, cache_size=0)
    assert all("Rome" in result.text for result in ask(tool, *(f"Rome {i}" for i in range(50))))
    assert sorted(query for batch in encoder.batches for query in batch) == sorted(f"Rome {i}" for i in range(50))


def test_a_remembered_query_is_marked_and_not_searched_again():
    encoder = Recorder()
    tool = SearchTool(encoder=encoder, passages=CAPITALS, cache_size=1)
    first, again = ask(tool, "Rome")[0], ask(tool, " Rome\n")[0]
    assert (first.cached, again.cached) == (False, True)
    assert first.text == again.text
    ask(tool, "Paris")  # pushes Rome out
    assert not ask(tool, "Rome")[0].cached
    assert encoder.batches == [["Rome"], ["Paris"], ["Rome"]]


def test_the_event_loop_does_not_wait_for_a_search():
    async def main() -> float:
        tool = SearchTool(encoder=Recorder(seconds=0.3), passages=CAPITALS)
        query = asyncio.ensure_future(tool.run("Rome"))
        slowest = 0.0
        while not query.done():
            start = time.monotonic()
            await asyncio.sleep(0.01)
            slowest = max(slowest, time.monotonic() - start)
        return slowest

    assert asyncio.run(main()) < 0.2


def test_a_broken_encoder_makes_the_tool_unavailable():
    tool = SearchTool(encoder=Recorder(error=RuntimeError("out of memory")), passages=CAPITALS)
    with pytest.raises(ToolUnavailable, match="search: the retriever failed: out of memory"):
        ask(tool, "Rome")


@pytest.mark.parametrize(
    ("damage", "why"), [((b"{", b"x"), "Expecting value: line 1 column 1"), ((b'"title"', b'"titel"'), "'titel'")]
)
def test_a_damaged_passage_makes_the_tool_unavailable(tmp_path: Path, damage: tuple[bytes, bytes], why: str):
    build_index(CAPITALS, HashingEncoder(), tmp_path / "index")
    lines = tmp_path / "index" / "passages.jsonl"
    lines.write_bytes(lines.read_bytes().replace(*damage, 1))
    tool = SearchTool(index=str(tmp_path / "index"))
    with pytest.raises(ToolUnavailable, match=rf"search: the retriever failed: passage 1 .* is damaged: .*{why}"):
        ask(tool, "Paris")


@pytest.mark.parametrize(
    ("error", "raised"), [(ValueError("text is no text"), ToolUnavailable), (DataError("no such model"), DataError)]
)
def test_a_value_error_is_an_outage_and_a_data_error_is_not(error: Exception, raised: type[Exception]):
    with pytest.raises(raised, match=str(error)):
        ask(SearchTool(encoder=Recorder(error=error), passages=CAPITALS), "Rome")


def test_a_search_past_its_deadline_makes_the_tool_unavailable():
    tool = SearchTool(encoder=Recorder(seconds=0.3), passages=CAPITALS, timeout_s=0.05)
    with pytest.raises(ToolUnavailable, match=r"no answer within timeout_s=0\.05"):
        ask(tool, "Rome")


def test_one_caller_that_gives_up_does_not_take_the_answer_from_others():
    async def main() -> ToolResult:
        tool = SearchTool(encoder=Recorder(seconds=0.2), passages=CAPITALS)
        await tool.start()
        impatient, patient = asyncio.ensure_future(tool.run("Rome")), asyncio.ensure_future(tool.run("Rome"))
        await asyncio.sleep(0.05)
        impatient.cancel()
        return await patient

    assert "Rome" in asyncio.run(main()).text


def test_after_close_the_tool_is_unavailable():
    tool = SearchTool(encoder=HashingEncoder(), passages=CAPITALS)
    ask(tool, "Rome")
    asyncio.run(tool.close())
    with pytest.raises(ToolUnavailable):
        ask(tool, "Paris")


def test_files_and_an_index_directory_serve_alike(tmp_path: Path):
    corpus, index = tmp_path / "corpus.jsonl", str(tmp_path / "index")
    rows = [json.dumps({"id": p.id, "title": p.title, "text": p.text}) for p in CAPITALS]
    corpus.write_text("\n".join(rows))
    tools = [
        SearchTool(encoder=HashingEncoder(), corpus=[str(corpus)]),
        SearchTool(encoder=HashingEncoder(), corpus=[str(corpus)], index=index),  # built here
        SearchTool(encoder=HashingEncoder(), corpus=[str(corpus)], index=index),  # opened here
        SearchTool(encoder=HashingEncoder(), index=index),
        SearchTool(index=index),  # which says what it was built with
        SearchTool(encoder=HashingEncoder(), passages=CAPITALS),
    ]
    assert len({ask(tool, "capital of Italy")[0].text for tool in tools}) == 1


def test_a_bad_corpus_is_a_data_error_not_an_outage(tmp_path: Path):
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text("{nonsense\n")
    with pytest.raises(DataError, match="line 1"):
        ask(SearchTool(encoder=HashingEncoder(), corpus=[str(corpus)]), "Rome")


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({}, "nothing to search in"),
        ({"corpus": ["/nowhere.jsonl"]}, "there is no file /nowhere.jsonl"),
        ({"passages": CAPITALS, "corpus": [__file__]}, "exclude each other"),
        ({"passages": CAPITALS, "topk": 0}, "topk must be above 0, got 0"),
        ({"passages": CAPITALS, "cache_size": -1}, "cache_size must be 0 or more, got -1"),
        ({"passages": CAPITALS, "max_chars": 4}, "max_chars must be 0 or above 4, got 4"),
        ({"passages": CAPITALS, "separator": ""}, "separator must be null or at least one character"),
        ({"passages": CAPITALS, "max_queries": 0}, "max_queries must be above 0, got 0"),
        ({"passages": CAPITALS, "template": "{body}"}, r"template may use \{i\}, \{title\} and \{text\}"),
    ],
)
def test_a_config_that_cannot_work_is_refused_at_once(fields: dict, complaint: str):
    with pytest.raises(ConfigError, match=complaint):
        SearchTool(encoder=HashingEncoder(), **fields)


def test_passages_without_an_encoder_are_refused_at_once():
    with pytest.raises(ConfigError, match="encoder is null, and without an index or urls nothing says"):
        SearchTool(passages=CAPITALS)
