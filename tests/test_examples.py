"""The examples are what a folder of a user's own would hold: each trains by the command in its first lines."""

from __future__ import annotations

import ast
import asyncio
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from otcrl import cli
from otcrl.compose import compose
from otcrl.construct import construct, locate, settings_of, wired_parts
from otcrl.errors import ConfigError
from otcrl.presets import find_preset
from otcrl.protocols import Answer, Call, Malformed, Nothing
from otcrl.types import Batch, Forward, Outcome, Scores
from tests.make import problem, trajectory
from tests.test_dialect_runs import model, searching, settings, transcripts  # noqa: F401  (model is a fixture)

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
FILES = sorted(EXAMPLES.glob("*.py"))
COMMAND = re.compile(r"^otcrl train conf=(\w+) (\w+)=(\w+)$", re.MULTILINE)
SMALL = [
    "threads=1", "sft.steps=2", "sft.batch_size=8", "model.width=16", "model.layers=1", "model.heads=2",
    "model.ff_width=32", "loop.steps=2", "loop.problems_per_step=4", "loop.transcripts_every=1", "rollout.group_size=4",
    "evaluate.before=false", "evaluate.sampled=false",
]  # fmt: skip


@pytest.fixture(autouse=True)
def in_the_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(EXAMPLES)
    monkeypatch.syspath_prepend(EXAMPLES)
    monkeypatch.setenv("OTCRL_DATA", "DIR")


def command(path: Path) -> tuple[str, str, str]:
    """(preset, group, choice) of the command in an example's first lines."""
    found = COMMAND.search(ast.get_docstring(ast.parse(path.read_text())) or "")
    assert found, f"{path.name} does not say how it is run"
    return found[1], found[2], found[3]


def yaml_of(path: Path) -> dict[str, Any]:
    _, group, choice = command(path)
    return yaml.safe_load((EXAMPLES / group / f"{choice}.yaml").read_text())


def own_section(path: Path) -> dict[str, Any]:
    """The section that names the example's class: of the tools it is one of several."""
    content = yaml_of(path)
    sections = [content] if "_target_" in content else [*content.values()]
    return next(section for section in sections if section["_target_"].startswith(f"{path.stem}."))


def built(path_name: str, **wired: object) -> Any:
    return construct(own_section(EXAMPLES / f"{path_name}.py"), path_name, **wired)


def metrics(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


# -- one file and one yaml ----------------------------------------------------------------------------


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_an_example_is_one_file_and_one_yaml_that_lists_its_settings(path: Path):
    preset, group, choice = command(path)
    section = compose([f"{group}={choice}", "seed=3"], preset=find_preset(preset))[group]
    own = section if "_target_" in section else section[choice]
    cls = locate(own["_target_"], group)
    assert own.keys() - {"_target_"} == settings_of(cls).keys() - wired_parts(cls)


def test_every_extension_point_that_the_manual_names_has_an_example():
    assert {command(path)[1] for path in FILES} == {"tools", "reward", "algo", "task", "dialect"}


@pytest.mark.parametrize("name", ["calculator", "linear", "reinforce", "phonebook"])
def test_an_example_trains(name: str, tmp_path: Path):
    preset, group, choice = command(EXAMPLES / f"{name}.py")
    words = [f"conf={preset}", f"{group}={choice}", *SMALL, "tools=calculator", f"run_dir={tmp_path / 'run'}"]
    assert cli.main(["train", *words]) == 0
    assert [line["step"] for line in metrics(tmp_path / "run") if "reward/value" in line] == [0, 1]
    assert (tmp_path / "run/summary.json").is_file()


def test_an_own_reward_trains_by_the_lines_of_the_first_page_as_they_are_written(tmp_path: Path):
    """In an empty folder; only the model and the steps are smaller."""
    blocks = re.findall(r"```\n(.*?)```", (ROOT / "docs/start.md").read_text(), re.DOTALL)
    lines = next(block for block in blocks if block.startswith("mkdir reward\n"))
    small = " ".join([*SMALL, "tools.python.isolation=none"])
    done = subprocess.run(
        ["bash", "-euc", f'otcrl() {{ "{sys.executable}" -m otcrl "$@" {small}; }}\n{lines}'],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert "reward/correct" in metrics(tmp_path / "runs/mine")[0]


def test_a_yaml_with_the_name_of_one_of_otcrls_own_is_refused_so_that_neither_wins_unsaid(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "reward").mkdir()
    (tmp_path / "reward/outcome.yaml").write_text("_target_: linear.LinearReward\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"reward=outcome: otcrl has one, and so have you: rename .*outcome\.yaml"):
        compose(["reward=outcome"], preset=find_preset("quickstart"))


# -- each of them does what it says -------------------------------------------------------------------


def test_the_calculator_computes_and_tells_the_policy_what_is_no_sum():
    tool = built("calculator")

    def asked(text: str) -> tuple[str, Outcome]:
        result = asyncio.run(tool.run(text, "a trajectory"))
        return result.text, result.outcome

    assert asked("47 + 85") == ("132", Outcome.OK)
    assert asked("+".join(["1"] * 5000))[1] is Outcome.MODEL_ERROR
    assert asked("1 +\0 1")[1] is Outcome.MODEL_ERROR
    assert asked("1000 * 1001") == ("Error: the result is beyond 1000000", Outcome.MODEL_ERROR)
    text, outcome = asked("open('/etc/passwd')")
    assert text.startswith("Error: only + - * ( )")
    assert outcome is Outcome.MODEL_ERROR


def test_the_linear_reward_pays_right_answers_alone_and_less_for_each_call():
    reward = built("linear", correct=lambda answer, problem: float(answer in problem.answers))
    paid = [reward([[trajectory(calls=m)]])[0][0].value for m in range(7)]
    assert paid == pytest.approx([1.0, 0.8, 0.6, 0.4, 0.2, 0.1, 0.1])
    wrong = [trajectory(right=False), trajectory(answer=None), trajectory(violations=("two answers",))]
    assert [r.value for r in reward([wrong])[0]] == [0.0, 0.0, 0.0]


def test_the_gradient_of_reinforce_is_that_of_its_formula():
    algo = built("reinforce")
    logprobs = torch.tensor([[0.0, -0.5, -1.0], [0.0, -0.2, -0.1]], requires_grad=True)
    mask, zeros = torch.tensor([[False, True, True], [False, True, False]]), torch.zeros(2, 3)
    ids = torch.zeros(2, 3, dtype=torch.int64)
    batch = Batch(ids, mask | True, mask, zeros, torch.tensor([1.0, 0.0]), torch.tensor([0, 1]))
    scores = Scores(zeros, zeros, zeros)
    targets = algo.targets(batch, scores)
    algo.token_loss(Forward(logprobs, zeros, zeros), batch, scores, targets).loss.sum().backward()
    assert logprobs.grad is not None
    assert logprobs.grad.tolist() == [[0.0, -0.5, -0.5], [0.0, 0.5, 0.0]]  # -(r - 1/2) where the policy sampled


def test_the_phonebook_asks_the_same_at_the_same_step_and_never_what_is_held_out():
    task = construct(own_section(EXAMPLES / "phonebook.py") | {"seed": 0}, "task")
    assert [p.id for p in task.sample(3, 8)] == [p.id for p in task.sample(3, 8)]
    asked = {p.id for step in range(30) for p in task.sample(step, 10)}
    assert len(asked) == 150
    assert not asked & {p.id for p in task.held_out()}
    one = task.held_out()[0]
    assert (task.correct(f" {one.answers[0]} ", one), task.correct("999", one)) == (1.0, 0.0)
    assert set(" ".join(text for _, _, text in task.own_corpus()).split()) <= set(task.words())


def test_react_reads_what_it_writes_and_makes_something_of_any_text():
    dialect, tools = built("react"), {"search": built("calculator")}
    assert dialect.parse("Thought: who?\n" + dialect.write_call("search", "Marie [Curie"), tools) == Call(
        "search", "Marie [Curie"
    )
    assert dialect.parse(dialect.write_answer("Paris"), tools) == Answer("Paris")
    assert dialect.parse("Finish[Paris]", tools) == Answer("Paris"), "the end of the text may end the line"
    assert dialect.parse("Action: look[x]\n", tools) == Malformed(
        "There is no tool named 'look'. The tools are: search."
    )
    assert isinstance(dialect.parse("Action: search[never closed", tools), Malformed)
    assert dialect.parse("I do not know.", tools) == Nothing()
    assert dialect.prompt(problem(), tools).count("Action: search[...]: computes") == 1
    assert dialect.violations(["Action: search[a]\nObservation: mine\n", "Finish[a]\nFinish[b]\n"], tools) == (
        "the policy wrote an observation itself",
        "2 answers",
    )


@pytest.mark.slow
def test_react_trains_with_any_model_and_its_chat_template(model: Path, tmp_path: Path):  # noqa: F811
    words = [*settings(model, tmp_path), *searching(tmp_path), "dialect=react", "loop.transcripts_every=1"]
    assert cli.main(["train", *words]) == 0
    assert len(transcripts(tmp_path)) == 4
