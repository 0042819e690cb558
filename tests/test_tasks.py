"""Question answering and arithmetic: which problems, what is right, and what demonstrations teach."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path

import pytest
import yaml

from otcrl.construct import construct
from otcrl.dialects.search_r1 import SearchR1
from otcrl.dialects.torl import ToRL
from otcrl.errors import ConfigError, DataError
from otcrl.presets import shipped
from otcrl.protocols import Call, Demo, Dialect, Task, Tool, ToolResult
from otcrl.rewards.matching import mentions
from otcrl.tasks.arithmetic import Arithmetic, Kind, evaluate
from otcrl.tasks.question_answering import Passage, QuestionAnswering, reading_order
from otcrl.types import Problem

CONF = Path(__file__).parents[1] / "conf"
TINY = shipped("tiny_qa")
TAGS = SearchR1(
    instructions="Question: {question}\n",
    observation_template="\n<information>{result}</information>\n",
    require_think=False,
)
NOTEBOOK = ToRL(instructions="Problem: {question}\n", free_last_turn=False)


@dataclass(frozen=True)
class NamedTool:
    """A tool that demonstrations may mention and nobody runs."""

    name: str
    description: str = "for tests"

    async def run(self, arguments: str, session: str) -> ToolResult:
        raise AssertionError("a demonstration runs no tool")

    async def release(self, session: str) -> None: ...

    async def close(self) -> None: ...


TOOLS: Mapping[str, Tool] = {name: NamedTool(name) for name in ("search", "python")}


def tiny(**settings: object) -> QuestionAnswering:
    task = QuestionAnswering(
        train=[str(TINY / "train.jsonl")],
        test=[str(TINY / "test.jsonl")],
        corpus=[str(TINY / "corpus.jsonl")],
        tools=TOOLS,
    )
    return replace(task, **settings)  # pyright: ignore[reportArgumentType]


def sums(**settings: object) -> Arithmetic:
    task = Arithmetic(
        kinds={
            "small": Kind(
                dataset="chain_sum",
                weight=1,
                size="small",
                options={"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1},
            ),
            "large": Kind(
                dataset="basic_arithmetic",
                weight=3,
                size="large",
                options={"min_terms": 3, "max_terms": 6, "min_digits": 3, "operators": ["+", "-", "*"]},
            ),
        },
        train_size=80,
        test_size=20,
        generated=400,
        tools=TOOLS,
    )
    return replace(task, **settings)  # pyright: ignore[reportArgumentType]


def observations(demo: Demo) -> str:
    return " ".join(s.text.replace("<", " <") for s in demo[1:] if not s.is_action)


def calls(demo: Demo, dialect: Dialect) -> list[Call]:
    """What a rollout would read in the demonstration's actions."""
    actions = [dialect.parse(segment.text, TOOLS) for segment in demo if segment.is_action]
    return [action for action in actions if isinstance(action, Call)]


@pytest.fixture(params=["question answering", "arithmetic"])
def task(request: pytest.FixtureRequest) -> Task:
    return tiny() if request.param == "question answering" else sums()


# -- what holds for both -------------------------------------------------------------------------


def test_a_step_always_gives_the_same_problems(task: Task) -> None:
    assert task.sample(3, 5) == task.sample(3, 5)
    assert task.sample(3, 5) != task.sample(4, 5)


def test_problems_are_one_sequence_of_which_every_step_takes_the_next(task: Task) -> None:
    whole = task.sample(0, 60)
    for count in (1, 4, 5):
        assert [p for step in range(60 // count) for p in task.sample(step, count)] == whole


def test_steps_walk_through_the_epoch_without_repeating_a_place(task: Task) -> None:
    epoch = Counter(
        p.id for step in range(4) for p in task.sample(step, 5 if isinstance(task, QuestionAnswering) else 20)
    )
    assert epoch == Counter(p.id for p in task.sample(1, epoch.total()))  # the next epoch, whole


def test_more_problems_than_there_are_begin_the_next_epoch(task: Task) -> None:
    assert len(task.sample(0, 1000)) == 1000


def test_nothing_held_out_is_ever_practised(task: Task) -> None:
    held_out = {p.question for p in task.held_out()}
    assert held_out
    assert len(held_out) == len(task.held_out())
    assert held_out.isdisjoint(p.question for p in task.sample(0, 1000))


def test_every_gold_answer_is_right(task: Task) -> None:
    for problem in task.held_out():
        assert [task.correct(answer, problem) for answer in problem.answers] == [1.0] * len(problem.answers)


@pytest.mark.parametrize("dialect", [TAGS, NOTEBOOK], ids=["search_r1", "torl"])
def test_a_demonstration_begins_with_the_prompt_and_trains_on_actions_only(task: Task, dialect: Dialect) -> None:
    for problem_first in task.demonstrations(0, 30, dialect):
        prompt, *rest = problem_first
        assert not prompt.is_action
        assert [segment.is_action for segment in rest] == [i % 2 == 0 for i in range(len(rest))]
        assert rest[-1].is_action
        for segment in rest:
            assert segment.is_action or segment.text.startswith("\n")  # what the environment writes


def test_demonstrations_are_the_same_for_the_same_step(task: Task) -> None:
    assert task.demonstrations(2, 4, TAGS) == task.demonstrations(2, 4, TAGS)
    assert task.demonstrations(2, 4, TAGS) != task.demonstrations(3, 4, TAGS)


def test_the_actions_of_a_demonstration_break_no_rule_of_the_dialect(task: Task) -> None:
    for demo in task.demonstrations(0, 30, TAGS):
        assert TAGS.violations([s.text for s in demo if s.is_action], TOOLS) == ()


def test_demonstrations_need_the_tool_they_call(task: Task) -> None:
    assert isinstance(task, QuestionAnswering | Arithmetic)
    with pytest.raises(ConfigError, match="not in tools: none"):
        replace(task, tools={}).demonstrations(0, 1, TAGS)


@pytest.mark.parametrize(("name", "cls"), [("qa", QuestionAnswering), ("arithmetic", Arithmetic)])
def test_the_yaml_lists_every_setting_and_builds_the_task(name: str, cls: type) -> None:
    section = yaml.safe_load((CONF / "task" / f"{name}.yaml").read_text())
    assert set(section) - {"_target_"} == {f.name for f in fields(cls)} - cls.wired
    assert isinstance(construct({**section, "seed": 0}, "task", tools=TOOLS), cls)


# -- question answering ----------------------------------------------------------------------------


def test_every_gold_passage_is_looked_up_by_its_title() -> None:
    task = tiny()
    by_question = {p.question.strip(): p for p in task.sample(0, 20)}
    for demo in task.demonstrations(0, 20, TAGS):
        problem = by_question[demo[0].text.removeprefix("Question: ").strip()]
        titles = problem.meta["supporting_titles"]
        assert isinstance(titles, list)
        assert sorted(call.arguments for call in calls(demo, TAGS)) == sorted(titles)
        assert any(mentions(observations(demo), answer) for answer in problem.answers)
        assert demo[-1].text == TAGS.write_answer(problem.answers[0])


def test_an_observation_is_what_the_search_tool_would_write() -> None:
    task = tiny(demo_passages=2, demo_max_words=4)
    demo = next(d for d in task.demonstrations(0, 20, TAGS) if "atomic number" in d[0].text)
    first = demo[2].text
    assert first.startswith("\n<information>Doc 1(Title: ")
    assert "(Title: Polonium) Polonium is a chemical ...\n" in first or first.count("Polonium is a chemical ...") == 1
    assert first.count("Doc ") == 2


def test_the_gold_passage_stands_at_any_place_among_distinct_others() -> None:
    task = tiny(demo_passages=3)
    places: Counter[int] = Counter()
    for step in range(10):
        for demo in task.demonstrations(step, 20, TAGS):
            for action, observation in zip(demo[1:-1:2], demo[2::2], strict=True):
                query = calls([action], TAGS)[0].arguments
                titles = [line.split("Title: ")[1].split(")")[0] for line in observation.text.strip().splitlines()]
                assert len(set(titles)) == len(titles) == 3
                places[titles.index(query)] += 1
    assert sorted(places) == [0, 1, 2]
    assert min(places.values()) > 0.25 * places.total()


def test_demo_direct_and_demo_extra_are_shares_of_the_demonstrations() -> None:
    def num_calls(**settings: float) -> list[int]:
        task = tiny(**settings)
        return [len(calls(d, TAGS)) for step in range(20) for d in task.demonstrations(step, 20, TAGS)]

    needed = num_calls()
    assert num_calls(demo_direct=1.0) == [0] * 400
    assert num_calls(demo_extra=1.0) == [n + 1 for n in needed]
    direct = num_calls(demo_direct=0.3, demo_extra=0.5).count(0) / 400
    assert direct == pytest.approx(0.3, abs=0.08)  # 3.5 standard deviations
    with pytest.raises(ConfigError, match=r"at most 1, got 0\.7 and 0\.5"):
        tiny(demo_direct=0.7, demo_extra=0.5)


def test_demonstrations_search_for_titles_or_for_the_question_and_once_too_often_for_the_other() -> None:
    task = tiny(demo_query="question", demo_extra=1.0)
    questions, titles = {p.question for p in task.sample(0, 400)}, {p.title for p in task.passages.values()}
    for demo in task.demonstrations(0, 4, TAGS):
        *needed, redundant = [call.arguments for call in calls(demo, TAGS)]
        assert len(set(needed)) == 1
        assert needed[0] in questions
        assert redundant in titles
    with pytest.raises(
        ConfigError, match=r"task.demo_query must be 'title' or 'question', got 'titel'. Did you mean 'title'?"
    ):
        construct({"_target_": "otcrl.tasks.question_answering.QuestionAnswering", "demo_query": "titel"}, "task")


def test_thoughts_say_what_is_looked_up() -> None:
    (demo,) = tiny(thoughts=True).demonstrations(0, 1, TAGS)
    query = calls(demo, TAGS)[0].arguments
    assert demo[1].text == f"<think> I need to look up {query}. </think>\n<search> {query} </search>"
    assert demo[-1].text.startswith("<think> I have found the answer. </think>\n<answer>")
    assert replace(TAGS, require_think=True).violations([s.text for s in demo if s.is_action], TOOLS) == ()


def test_hops_are_read_in_an_order_that_leads_to_the_answer() -> None:
    problem = Problem("q", "Where did the father of Ada Lovelace die?", ("Missolonghi",), "tiny")
    ada, byron = Passage("Ada Lovelace", "Her father was Lord Byron."), Passage("Lord Byron", "He died in Missolonghi.")
    assert reading_order(problem, [byron, ada]) == [ada, byron]


def test_a_gold_passage_that_is_not_in_the_corpus_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "corpus.jsonl").write_text('{"id": "tiny-00", "title": "x", "text": "y"}\n')
    with pytest.raises(DataError, match=r"gold passage 'tiny-\d\d' is not in task\.corpus"):
        tiny(corpus=[str(tmp_path / "corpus.jsonl")]).demonstrations(0, 20, TAGS)


def test_two_passages_with_one_id_are_an_error() -> None:
    with pytest.raises(DataError, match="was already read"):
        tiny(corpus=[str(TINY / "corpus.jsonl")] * 2).demonstrations(0, 1, TAGS)


def test_training_on_the_evaluation_file_is_an_error() -> None:
    twice = r"train and task\.test together: two problems have the id .*test\.jsonl, row 1 and .*test\.jsonl, row 1; "
    with pytest.raises(DataError, match=twice):
        tiny(train=[str(TINY / "test.jsonl")])


def test_a_task_without_training_data_can_be_evaluated_and_says_that_it_cannot_train() -> None:
    task = tiny(train=[])
    assert len(task.held_out()) == 10
    with pytest.raises(ConfigError, match=r"task\.train names no data"):
        task.sample(0, 1)
    with pytest.raises(ConfigError, match="gold_ids"):
        task.demonstrations(0, 1, TAGS)


def test_each_source_can_be_limited() -> None:
    task = tiny(max_train=5, max_test=3)
    assert len({p.id for p in task.sample(0, 20)}) == 5
    assert len(task.held_out()) == 3


def test_the_data_sets_that_are_in_domain_must_be_there_unless_nothing_is_trained() -> None:
    assert tiny(test=[f"held_out={TINY / 'test.jsonl'}"], in_domain=["held_out", "tiny_qa"]).in_domain
    with pytest.raises(ConfigError, match=r"in_domain: there is no data set 'tiny-qa'. Did you mean 'tiny_qa'\?"):
        tiny(in_domain=["tiny-qa"])
    assert tiny(train=(), in_domain=["hotpotqa"]).in_domain == ["hotpotqa"]


def test_a_template_that_cannot_be_filled_is_an_error() -> None:
    with pytest.raises(ConfigError, match="template may hold"):
        tiny(template="{name}")


def test_words_are_matched_exactly_and_mathematics_by_meaning() -> None:
    problem = Problem("q", "?", (r"\frac{1}{2}",), "math")
    assert tiny(match="math").correct("0.5", problem) == 1.0
    assert tiny(match="words").correct("0.5", problem) == 0.0
    assert tiny().correct("the Elbe!", replace(problem, answers=("Trent", "elbe"))) == 1.0


def test_an_answer_that_mathematics_cannot_check_is_named_before_the_run(tmp_path: Path) -> None:
    path = tmp_path / "long.jsonl"
    path.write_text(json.dumps({"id": 1, "question": "Prove it", "answer": "x" * 301}) + "\n")
    tiny(test=[str(path)])
    with pytest.raises(
        DataError, match=r"problem '.*/long/1': task\.match=math checks answers of at most 300 characters"
    ):
        tiny(test=[str(path)], match="math")


# -- arithmetic --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("expression", "value"),
    [("3 + 4", 7), ("2 - -3", 5), ("-( 2 + 3 ) * 4", -20), ("( 56 + -33 ) - 84", -61), ("2 * 3 * 4", 24)],
)
def test_expressions_are_evaluated(expression: str, value: int) -> None:
    assert evaluate(expression) == value


@pytest.mark.parametrize("expression", ["1 / 2", "2 ** 9", "abs(1)", "True + 1", "1.5 + 1", "x", "1 +", "'a' + 'b'"])
def test_nothing_but_whole_number_arithmetic_is_evaluated(expression: str) -> None:
    with pytest.raises(DataError, match="whole numbers"):
        evaluate(expression)


def test_kinds_are_mixed_by_weight_and_small_ones_repeat() -> None:
    task = sums()
    epoch = task.sample(0, 80)
    assert Counter(p.source for p in epoch) == {"small": 20, "large": 60}
    assert Counter(p.meta["size"] for p in epoch) == {"small": 20, "large": 60}
    assert len({p.id for p in sums(train_size=4000, generated=400).sample(0, 4000)}) < 4000


def test_small_problems_are_answered_at_once_and_large_ones_by_python() -> None:
    for demo in sums().demonstrations(0, 80, TAGS):
        expression = demo[0].text.removeprefix("Question: What is ").strip().removesuffix("?")
        if evaluate(expression) < 20 and len(expression) <= 5:
            assert calls(demo, TAGS) == []
        else:
            assert calls(demo, TAGS) == [Call("python", f"print({expression})")]
            assert demo[2].text == f"\n<information>{evaluate(expression)}</information>\n"
        assert demo[-1].text == TAGS.write_answer(str(evaluate(expression)))


def test_demo_overcall_is_the_share_of_small_problems_with_a_call() -> None:
    assert all(len(calls(d, TAGS)) == 1 for d in sums(demo_overcall=1.0).demonstrations(0, 80, TAGS))
    task = sums(demo_overcall=0.5)
    num_calls = [len(calls(d, TAGS)) for step in range(40) for d in task.demonstrations(step, 80, TAGS)]
    assert num_calls.count(0) / (len(num_calls) / 4) == pytest.approx(0.5, abs=0.07)


def test_a_drill_teaches_a_small_result_in_the_answers_place_and_nothing_about_calling() -> None:
    task = sums(drill_share=0.25)
    demos = [demo for step in range(30) for demo in task.demonstrations(step, 40, TAGS)]
    drills = [demo for demo in demos if not demo[1].is_action]
    assert len(drills) == 300
    for prompt, opening, result in drills:
        expression = prompt.text.removeprefix("Question: What is ").strip().removesuffix("?")
        assert opening.text == TAGS.open_answer()
        assert opening.text + result.text == TAGS.write_answer(str(evaluate(expression)))
        assert result.is_action
    drilled = {prompt.text for prompt, *_ in drills}
    small = {TAGS.prompt(p, TOOLS) for p in task.held_out() if p.meta["size"] == "small"}
    assert small
    assert small <= drilled, "what is held out from practice is known all the same"
    assert drilled.isdisjoint(TAGS.prompt(p, TOOLS) for p in task.held_out() if p.meta["size"] == "large")
    assert small.isdisjoint(demo[0].text for demo in demos if demo[1].is_action), "and nobody shows whether to call"


def test_drills_need_something_small_to_teach() -> None:
    large = Kind(dataset="chain_sum", weight=1, size="large", options={})
    with pytest.raises(ConfigError, match="no kind is of size small"):
        sums(kinds={"large": large}, drill_share=0.5)


def test_the_notebook_dialect_runs_the_same_code() -> None:
    demo = next(d for d in sums().demonstrations(0, 80, NOTEBOOK) if len(d) > 2)
    assert calls(demo, NOTEBOOK)[0].arguments.startswith("print(")


@pytest.mark.parametrize(
    ("answer", "expected"), [("7", 1.0), ("7.0", 1.0), ("+7", 1.0), ("3 + 4", 0.0), ("8", 0.0), ("", 0.0)]
)
def test_the_question_itself_is_no_answer(answer: str, expected: float) -> None:
    assert sums().correct(answer, Problem("q", "What is 3 + 4?", ("7",), "small")) == expected


@pytest.mark.parametrize(
    ("dataset", "options", "message"),
    [
        ("chain_sums", {}, "Did you mean 'chain_sum'"),
        ("chain_sum", {"min_term": 2}, "Did you mean 'min_terms'"),
        ("chain_sum", {"min_terms": 0}, "min_terms must be positive"),
        ("leg_counting", {}, "carry no `expression`"),
    ],
)
def test_a_kind_that_reasoning_gym_cannot_make_is_an_error(dataset: str, options: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        sums(kinds={"k": Kind(dataset=dataset, weight=1, size="small", options=options)})


def test_a_weight_must_be_positive() -> None:
    with pytest.raises(ConfigError, match="weight must be above 0"):
        Kind(dataset="chain_sum", weight=0, size="small")


# -- real data ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "count"), [("hotpotqa", 700), ("musique", 100), ("2wikimultihopqa", 500)])
def test_published_questions_make_whole_demonstrations(shared: Path, name: str, count: int) -> None:
    folder = shared / "data" / name
    task = tiny(train=[str(folder / "train.jsonl.gz")], test=[], corpus=[str(folder / "corpus.jsonl.gz")])
    by_question = {p.question.strip(): p for p in task.sample(0, count)}
    demos = task.demonstrations(0, count, TAGS)
    spoken = found = 0
    for demo in demos:
        problem = by_question[demo[0].text.removeprefix("Question: ").strip()]
        gold = problem.meta["gold_ids"]
        assert isinstance(gold, list)
        assert len(calls(demo, TAGS)) == len(gold)
        assert all(not s.is_action for s in demo if "<information>" in s.text)
        if problem.answers[0] not in ("yes", "no"):
            spoken += 1
            found += any(mentions(observations(demo), answer) for answer in problem.answers)
    assert len(demos) == count
    assert found / spoken > 0.85  # the rest stands behind the first 100 words of its passage
