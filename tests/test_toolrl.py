"""ToolRL's reward against the paper's formulas written out, and on its own published data."""

from __future__ import annotations

import gzip
import itertools
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from otcrl.errors import DataError
from otcrl.rewards.toolrl import Length, ToolRLReward, correctness_score, format_score, greedy, optimal, scales
from tests.make import problem, trajectory

Call = dict


def completion(*calls: object, response: str = "", think: str = "why") -> str:
    lines = "\n".join(json.dumps(call) for call in calls)
    block = f"\n<tool_call>\n{lines}\n</tool_call>" if calls else ""
    return f"<think>{think}</think>{block}" + (f"\n<response>{response}</response>" if response else "")


def call(name: str, **parameters: object) -> Call:
    return {"name": name, "parameters": parameters}


# -- the paper's formulas, by sets and by trying every matching -----------------------------------------------


def jaccard(a: list[str], b: list[str]) -> float:
    """Of multisets: each copy of an element is an element of its own."""

    def copies(items: list[str]) -> set[tuple[str, int]]:
        return {(item, items[:i].count(item)) for i, item in enumerate(items)}

    return len(copies(a) & copies(b)) / len(copies(a) | copies(b)) if a or b else 1.0


def pair(gold: Call, predicted: Call) -> float:
    if gold["name"] != predicted["name"]:
        return 0.0
    g, p = gold["parameters"], predicted["parameters"]
    return jaccard(list(g), list(p)) + len([key for key in g if key in p and g[key] == p[key]])


def paper(gold: list[Call], predicted: list[Call], best: float) -> float:
    most = 1 + len(gold) + sum(len(g["parameters"]) for g in gold)
    return 6 * (jaccard([g["name"] for g in gold], [p["name"] for p in predicted]) + best) / most - 3


def best_matching(gold: list[Call], predicted: list[Call]) -> float:
    slots = [*range(len(predicted)), *[None] * len(gold)]
    return max(
        sum(pair(g, predicted[i]) for g, i in zip(gold, chosen, strict=True) if i is not None)
        for chosen in set(itertools.permutations(slots, len(gold)))
    )


def greedy_matching(gold: list[Call], predicted: list[Call]) -> float:
    total, used = 0.0, set()
    for g in gold:
        best, which = 0.0, None
        for i, p in enumerate(predicted):
            if i not in used and pair(g, p) > best:
                best, which = pair(g, p), i
        if which is not None:
            used.add(which)
        total += best
    return total


calls = st.builds(
    lambda name, parameters: {"name": name, "parameters": parameters},
    st.sampled_from(["search", "python", "mail"]),
    st.dictionaries(st.sampled_from("abc"), st.sampled_from([1, 2, "x"]), max_size=3),
)


@given(st.lists(calls, min_size=1, max_size=3), st.lists(calls, min_size=1, max_size=3))
@settings(max_examples=200, deadline=None)
def test_correctness_is_the_papers_with_either_matching(gold, predicted):
    texts = completion(*predicted), completion(*gold)
    assert correctness_score(*texts, optimal) == pytest.approx(paper(gold, predicted, best_matching(gold, predicted)))
    assert correctness_score(*texts, greedy) == pytest.approx(paper(gold, predicted, greedy_matching(gold, predicted)))
    assert -3 <= correctness_score(*texts, greedy) <= correctness_score(*texts, optimal) + 1e-9 <= 3 + 1e-8


@given(st.lists(calls, min_size=1, max_size=4), st.randoms())
def test_the_gold_calls_in_any_order_earn_all(gold, rng):
    shuffled = rng.sample(gold, len(gold))
    assert correctness_score(completion(*shuffled), completion(*gold), optimal) == pytest.approx(3)


def test_greedy_matching_can_miss_what_the_optimal_one_finds():
    gold, made = [call("f", a=1), call("f", a=1, b=2)], [call("f", a=1, b=2), call("f", a=3)]
    # the first gold call takes the first prediction (0.5 + 1 against 1 + 0), which the second one matches in full
    found = [correctness_score(completion(*made), completion(*gold), match) for match in (greedy, optimal)]
    assert found == pytest.approx([6 * (1 + 1.5 + 0.5) / 6 - 3, 6 * (1 + 1 + 3) / 6 - 3])


@pytest.mark.parametrize(
    "block",
    [
        "", "<tool_call>", "<tool_call>\n\n</tool_call>", "<tool_call>\nnot json\n</tool_call>",
        "<tool_call>\n[1]\n</tool_call>", '<tool_call>\n{"name": "f"}\n</tool_call>',
        '<tool_call>\n{"name": [], "parameters": {}}\n</tool_call>', "<tool_call>\n" + "[" * 100_000 + "\n</tool_call>",
    ],
    ids=["none", "open", "empty", "no JSON", "no object", "no parameters", "no name", "deep"],
)  # fmt: skip
def test_a_block_that_holds_no_calls_earns_the_least(block):
    assert correctness_score(f"<think>why</think>\n{block}", completion(call("f")), greedy) == -3


def test_where_nothing_is_to_be_called_only_the_format_counts():
    gold = completion(response="done")
    for made in (completion(response="other"), completion(call("f"), response="other")):
        assert correctness_score(made, gold, greedy) == 0


def test_a_gold_completion_that_cannot_be_read_is_an_error_and_not_a_reward():
    with pytest.raises(DataError, match="a gold completion holds a line that is no call"):
        correctness_score(completion(call("f")), "<think>a</think>\n<tool_call>\nf(x)\n</tool_call>", greedy)


CALL, TALK, BOTH = completion(call("f")), completion(response="hi"), completion(call("f"), response="hi")


@pytest.mark.parametrize(
    ("made", "gold", "value"),
    [
        (CALL, CALL, 1), (TALK, TALK, 1), (BOTH, BOTH, 1), (completion(), completion(), 1),
        (TALK, CALL, 0), (CALL, TALK, 0), (CALL, BOTH, 0), (BOTH, CALL, 0), (CALL, completion(), 0),
        (f"so {CALL}", CALL, 0), (f"{CALL} so", CALL, 0), (CALL.replace("\n", ""), CALL, 0),
        (f"{CALL}\n{CALL}", CALL, 0), (CALL.replace("<think>why</think>\n", ""), CALL, 0),
        (completion(call("f"), think="line\nline"), CALL, 1),
    ],
)  # fmt: skip
def test_format_is_the_fields_of_the_gold_completion_in_order(made, gold, value):
    assert format_score(made, gold) == value


@pytest.mark.parametrize("matching", ["greedy", "optimal"])
def test_a_reward_is_format_and_correctness_of_the_completion(matching):
    reward = ToolRLReward(matching=matching)
    of = problem(answer=BOTH)
    group = [trajectory(of=of, answer=""), trajectory(of=of, right=False), trajectory(of=of, answer=None)]
    assert [r.value for r in reward([group])[0]] == [4, -3, -3]
    assert not reward.needs_groups


# -- its variants ---------------------------------------------------------------------------------------------


@given(st.lists(calls, min_size=1, max_size=3), st.lists(calls, min_size=1, max_size=3))
@settings(max_examples=200, deadline=None)
def test_coarser_correctness_is_the_original_codes(gold, predicted):
    texts = completion(*predicted), completion(*gold)
    same = [sorted(g["name"] for g in each) for each in (gold, predicted)]
    exact, left = 0, [*predicted]
    for g in gold:
        if g in left:
            left.remove(g)
            exact += 1
    names = jaccard([g["name"] for g in gold], [p["name"] for p in predicted])
    assert correctness_score(*texts, greedy, "coarse") == (3 if gold == predicted else -3)
    assert correctness_score(*texts, greedy, "intermediate") == pytest.approx(6 * (names + exact) / (1 + len(gold)) - 3)
    assert correctness_score(*texts, greedy, "refined") <= correctness_score(*texts, optimal) + 1e-9
    if same[0] != same[1]:
        assert correctness_score(*texts, greedy, "refined") < 3


def test_refined_correctness_pays_for_all_keys_or_none():
    gold, made = [call("f", a=1, b=2)], [call("f", a=1)]
    assert correctness_score(completion(*made), completion(*gold), greedy, "refined") == pytest.approx(6 * 2 / 4 - 3)
    assert correctness_score(completion(*made), completion(*gold), greedy) == pytest.approx(6 * 2.5 / 4 - 3)


@pytest.mark.parametrize(
    ("schedule", "step", "found"),
    [
        ("none", 500, (0, 1, 3)),
        ("two_stage", 29, (0, 1, 1)), ("two_stage", 30, (0, 0.5, 3)),
        ("smooth", 0, (-2, 2, 2)), ("smooth", 75, (-1, 1.5, 2.5)), ("smooth", 150, (-1, 1, 3)),
        ("smooth", 900, (-1, 1, 3)),
    ],
)  # fmt: skip
def test_a_schedule_moves_what_format_and_correctness_are_worth(schedule, step, found):
    assert scales(schedule, step, 3.0) == pytest.approx(found)


def test_longer_thoughts_earn_up_to_one_more():
    length, text = Length(first=4, last=8, steps=10), completion(call("f"), think="one two three four")
    assert [length.score(text, step) for step in (0, 5, 10, 99)] == pytest.approx([1, 4 / 6, 0.5, 0.5])
    assert Length().score(text, 0) == length.score("no thought", 0) == 0
    reward = ToolRLReward(matching="greedy", most=1.0, length=Length(first=1, last=1))
    of = problem(answer=CALL)
    assert [r.value for r in reward([[trajectory(of=of), trajectory(of=of, right=False)]])[0]] == [3, -1]


def test_every_published_gold_completion_earns_all_there_is(shared: Path):
    reward = ToolRLReward(matching="greedy")
    with gzip.open(shared / "data/toolrl/test.jsonl.gz", "rt") as lines:
        gold = [json.loads(line)["output"].strip() for line in lines]
    right = [trajectory(of=problem(id=f"toolrl/test/{i}", answer=text)) for i, text in enumerate(gold)]
    found = [r.value for r in reward([right])[0]]
    assert found == [4.0 if "<tool_call>" in text else 1.0 for text in gold]
    assert len(set(found)) == 2
