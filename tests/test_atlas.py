"""Atlas: the optimum really is the optimum, and nothing leaks from what is held out."""

from __future__ import annotations

import asyncio
from collections import Counter
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import yaml

from otcrl.construct import construct
from otcrl.dialects.search_r1 import SearchR1
from otcrl.models.tiny import word_tokenizer
from otcrl.protocols import Answer, Call
from otcrl.tasks.atlas import HIDDEN, KNOWN, LINKS, OPTIMUM, Atlas
from otcrl.tools.retrieval.corpus import Passage
from otcrl.tools.retrieval.encode import HashingEncoder
from otcrl.tools.search import SearchTool

CONF = Path(__file__).parents[1] / "conf"
DIALECT = SearchR1(
    instructions="{question}", observation_template=" <observation> {result} </observation> ", require_think=False
)


@cache
def atlas(seed: int = 0) -> Atlas:
    settings = yaml.safe_load((CONF / "task/atlas.yaml").read_text())
    return construct(settings | {"seed": seed}, "task")


def test_one_seed_is_one_world_and_another_is_another():
    again = replace(atlas(0))
    assert (again.problems, again.facts) == (atlas(0).problems, atlas(0).facts)
    assert atlas(1).facts != atlas(0).facts


def test_ids_are_unique_and_every_kind_is_there_on_both_sides():
    ids = [p.id for p in atlas().problems]
    assert len(set(ids)) == len(ids)
    assert set(atlas().train) == {p.source for p in atlas().held_out()} == set(OPTIMUM)


def test_held_out_problems_are_never_practised_nor_demonstrated():
    held_out = {p.question for p in atlas().held_out()}
    practised = {p.question for step in range(100) for p in atlas().sample(step, 24)}
    traces = {
        demo[0].text
        for step in range(30)
        for demo in atlas().demonstrations(step, 100, DIALECT)
        if any("<search>" in s.text or "<python>" in s.text for s in demo)
    }
    assert not held_out & practised
    assert not held_out & traces
    assert practised & traces


def test_a_step_asks_every_kind_equally_and_an_epoch_repeats_nothing():
    assert Counter(p.source for p in atlas().sample(3, 24)) == dict.fromkeys(OPTIMUM, 4)
    pool = len(atlas().train["known"])
    seen = [p.id for step in range(pool // 4) for p in atlas().sample(step, 24) if p.source == "known"]
    assert len(set(seen)) == len(seen)


def test_the_same_step_has_the_same_problems_and_demonstrations():
    assert atlas().sample(7, 24) == replace(atlas()).sample(7, 24)
    assert atlas().demonstrations(7, 50, DIALECT) == replace(atlas()).demonstrations(7, 50, DIALECT)


def test_whether_a_fact_is_known_by_heart_follows_from_its_relation():
    for p in atlas().problems:
        if p.source in ("known", "hidden", "two_hop"):
            assert (p.question.split()[0] in KNOWN) == (p.optimal_calls == 0)


def test_every_question_can_be_answered_with_its_optimum_of_real_tool_calls():
    """An independent solver: follows links with the real search tool, adds with int."""
    world = atlas()
    passages = [Passage(*row) for row in world.own_corpus()]
    tool = SearchTool(encoder=HashingEncoder(dimension=2048), passages=passages, topk=1, template="{text}")

    async def look_up(relation: str, entity: str) -> str:
        found = (await tool.run(f"{relation} of {entity}", "")).text.split()
        assert found[:4] == [relation, "of", entity, "is"]
        return found[4]

    async def solve(question: str) -> tuple[str, int]:
        left, _, right = question.removesuffix(" ?").partition(" + ")
        if left.isdigit():
            return str(int(left) + int(right)), 0 if int(left) < 10 and int(right) < 10 else 1
        *path, value = left.split(" of ")
        for relation in reversed(path):
            value = await look_up(relation, value)
        calls = 0 if path[0] in KNOWN else len(path)
        return (str(int(value) + int(right)), calls + 1) if right else (value, calls)

    async def check() -> None:
        for p in world.held_out():
            answer, calls = await solve(p.question)
            assert (world.correct(answer, p), calls) == (1.0, p.optimal_calls), p
        await tool.close()

    asyncio.run(check())


def test_every_word_of_every_demonstration_has_a_token_of_its_own():
    tokenizer = word_tokenizer(atlas().words())
    for demo in atlas().demonstrations(0, 300, DIALECT):
        for segment in demo:
            ids = tokenizer.encode(segment.text)
            assert tokenizer.hf.unk_token_id not in ids
            assert tokenizer.decode(ids) == " ".join(segment.text.split())


def test_demonstrations_speak_the_dialect_and_over_call():
    world, tools = atlas(), {name: SearchStub(name) for name in ("search", "python")}
    extra = Counter()
    for step in range(5):
        for demo in world.demonstrations(step, 120, DIALECT):
            if demo[0].text.endswith("="):
                continue
            actions = [DIALECT.parse(s.text, tools) for s in demo if s.is_action]
            if len(demo) == 3 and not demo[1].is_action:  # a drill: the answer's opening is given
                continue
            assert isinstance(actions[-1], Answer)
            assert all(isinstance(action, Call) for action in actions[:-1])
            problem = next(p for p in world.problems if p.question == demo[0].text)
            extra[len(actions) - 1 - (problem.optimal_calls or 0)] += 1
    assert extra.most_common(1)[0][0] == 1
    assert min(extra) == 0


def test_demonstrations_never_show_where_a_hidden_fact_could_be_memorised():
    """The value that a demonstration shows for a hidden fact is drawn anew each time."""
    shown: dict[str, set[str]] = {}
    for step in range(60):
        for demo in atlas().demonstrations(step, 120, DIALECT):
            for segment in demo:
                words = segment.text.split()
                if not segment.is_action and "is" in words and words[1] in (*HIDDEN, *LINKS):
                    shown.setdefault(" ".join(words[1:4]), set()).add(words[5])
    often = [values for values in shown.values() if len(values) > 1]
    assert len(often) > 0.9 * len(shown)


class SearchStub:
    description = ""

    def __init__(self, name: str) -> None:
        self.name = name

    async def run(self, arguments: str, session: str):
        raise NotImplementedError

    async def release(self, session: str) -> None: ...

    async def close(self) -> None: ...


@pytest.mark.parametrize(("answer", "right"), [("12", 1.0), (" 12 ", 1.0), ("1 2", 0.0), ("", 0.0)])
def test_an_answer_is_compared_word_by_word(answer, right):
    problem = next(p for p in atlas().problems if p.question == "5 + 7 ?")
    assert atlas().correct(answer, problem) == right
