"""The presets: each has the published values, and each runs on a small model with the tools that it has."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from otcrl import cli
from otcrl.algos.mismatch import Correction
from otcrl.construct import construct, construct_as
from otcrl.evaluate.report import Report
from otcrl.experiment import Evaluate
from otcrl.learner.optimizer import Optimizer
from otcrl.preflight import check_group_size
from otcrl.presets import Preset, presets
from otcrl.rollout.loop import Limits
from otcrl.sft import Sft
from otcrl.train import Loop
from tests.templates import APPENDS, chat_tokenizer
from tests.test_bad_input import refusal
from tests.tiny import tiny_llama

SMALL_BY_THEMSELVES = ("quickstart", "smollm2_python", "smollm2_search")  # they have tests and pages of their own
SYSTEMS = {preset.name: preset for preset in presets() if preset.name not in SMALL_BY_THEMSELVES}


def command(preset: Preset) -> str:
    """What the preset is for, as its first comment says."""
    return next((name for name in ("eval", "sft") if f"for `otcrl {name}`" in preset.summary), "train")


# -- published values -------------------------------------------------------------------------------------

Values = Mapping[str, object]
VERL: Values = {  # AdamW as it is by default there
    f"learner.{which}.{name}": value
    for which in ("policy_optimizer", "critic_optimizer")
    for name, value in {"betas": [0.9, 0.999], "weight_decay": 0.01}.items()
}
PASSAGES: Values = {"tools.search.topk": 3, "tools.search.template": "Doc {i}(Title: {title}) {text}\n"}
SEARCH: Values = {  # arXiv:2503.09516 App. B.2 and scripts/nq_hotpotqa/v0.2, re-used by OTC
    "model.path": "Qwen/Qwen2.5-3B",
    "task.train": ["PeterJinGo/nq_hotpotqa_train:train"],
    "task.in_domain": ["nq", "hotpotqa"],
    **PASSAGES,
    **VERL,
    "loop.problems_per_step": 512,
    "loop.steps": 1005,
    "rollout.temperature": 1.0,
    "rollout.limits.max_calls": 4,
    "rollout.limits.max_turns": 4 + 1,  # and one more generation, to answer in
    "rollout.limits.max_turn_tokens": 500,
    "rollout.limits.max_observation_tokens": 500,
    "rollout.limits.max_tokens": 4096,
    "learner.policy_optimizer.lr": 1e-6,
    "learner.policy_optimizer.warmup_steps": round(0.285 * 1005),
    "learner.minibatch_size": 256,
    "learner.epochs": 1,
    "learner.max_grad_norm": 1.0,
    "algo.clip_low": 0.2,
    "algo.clip_high": 0.2,
    "algo.entropy_coef": 0.001,
    "algo.weighting": "token",
}
GRPO: Values = {"rollout.group_size": 5, "algo.kl_coef": 0.001, "algo.normalize": True, "algo.std_floor": 0.0}
PPO: Values = {
    "rollout.group_size": 1,
    "algo.kl_reward_coef": 0.001,
    "algo.kl_coef": 0.0,
    "algo.gamma": 1.0,
    "algo.lam": 1.0,
    "algo.value_clip": 0.5,
    "learner.critic_optimizer.lr": 1e-5,
    "learner.critic_optimizer.warmup_steps": round(0.015 * 1005),
}
EXACT: Values = {"reward.require_well_formed": False}  # v0.1 and v0.2 pay for exact match alone
FORMAT: Values = {"reward.structure": 0.2, "reward.final": 0.1, "reward.retrieval": 0.0}
OTC: Values = {  # Sec. 4.1
    "reward.alpha": 1.0,
    "reward.combine": "product",
    "reward.format_weight": 0.0,
    "reward.counter": "well_formed",
}
BY_SEARCH_R1: Values = {  # Table 1
    "dialect.instructions": (
        "Answer the given question. You must conduct reasoning inside <think> and </think> first every time you get "
        "new information. After reasoning, if you find you lack some knowledge, you can call a search engine by "
        "<search> query </search> and it will return the top searched results between <information> and </information>."
        " You can search as many times as you want. If you find no further external knowledge needed, you can directly "
        "provide the answer inside <answer> and </answer>, without detailed illustrations. For example, "
        "<answer> Beijing </answer>. Question: {question}"
    ),
    "dialect.observation_template": "\n\n<information>{result}</information>\n\n",  # generation.py
    "dialect.require_think": False,
}
BY_OTC: Values = {  # App. C
    "dialect.instructions": (
        "Answer the given question. You must conduct reasoning inside <think> and </think> first every time you get "
        "new information. After reasoning, if you find you lack some knowledge, you can call a search engine by "
        "<search> query </search> and it will return the top searched results between <observation> and </observation>."
        " You need to make every search call count and gain helpful results. If you find no further external knowledge "
        "needed, you can directly provide the answer inside <answer> and </answer>, without detailed illustrations. "
        "For example, <answer> xxx </answer>. Question: {question}"
    ),
    "dialect.observation_template": "\n\n<observation>{result}</observation>\n\n",
    "dialect.require_think": False,
}
BY_RETOOL = """\
Solve the following problem step by step. You now have the ability to selectively write executable Python code to \
enhance your reasoning process. The Python code will be executed by an external sandbox, and the output (wrapped in \
`<interpreter>output_str</interpreter>`) can be returned to aid your reasoning and help you arrive at the final \
answer. The Python code should be complete scripts, including necessary imports.
Each code snippet is wrapped with `<code>
```python
code snippet
```
</code>`.
The last part of your response should be in the following format:
<answer>
\\boxed{'The final answer goes here.'}
</answer>

*user question:*
{question}

Remember to place the final answer in the last part using the format:
<answer>
\\boxed{'The final answer goes here.'}
</answer>"""  # evaluation/prompt_template.json
TRANSCRIPT = (  # tir_base_0309 of verl/utils/dataset/rl_dataset.py
    "A conversation between User and Assistant. The user asks a question, and the Assistant solves it.\n"
    "User: Please integrate natural language reasoning with programs to solve the problem above, "
    "and put your final answer within \\boxed{}.\n{question}\nAssistant:\n"
)
CODE: Values = {  # scripts/torl_1.5b.sh, with C = 3 of OTC
    "model.path": "Qwen/Qwen2.5-Math-1.5B",
    "model.chat": False,
    "task.match": "math",
    "loop.problems_per_step": 128,
    "rollout.group_size": 16,
    "rollout.temperature": 1.0,
    "rollout.limits.max_calls": 3,
    "rollout.limits.max_turns": 3 + 1,
    "rollout.limits.max_tokens": 3072,
    **VERL,
    "tools.python.timeout_s": 10.0,
    "tools.python.max_output_chars": 256,
    "tools.python.show_value": False,
    "learner.policy_optimizer.lr": 1e-6,
    "learner.minibatch_size": 0,
    "algo.clip_high": 0.2,
    "algo.kl_coef": 0.0,
    "algo.entropy_coef": 0.0,
    "evaluate.sampled": True,
    "evaluate.samples": 4,  # figures of AIME are multiples of 1 / 120, and it has 30 problems
}
ASKED: Values = {"dialect.instructions": TRANSCRIPT, "dialect.free_last_turn": True}
TOOLRL: Values = {  # examples/grpo_trainer/run_grpo.sh
    "loop.problems_per_step": 512,
    "loop.steps": 3920 // 512 * 15,
    "rollout.temperature": 1.0,
    "learner.policy_optimizer.lr": 1e-6,
    "reward.matching": "greedy",
    "reward.most": 3.0,
    "rollout.limits.max_turns": 1,
    "algo.entropy_coef": 0.001,
    **VERL,
}
INSTRUCT: Values = {"model.path": "Qwen/Qwen2.5-3B-Instruct"}  # arXiv:2503.09516 Sec. 4.3
PUBLISHED: dict[str, Values] = {
    "search_r1_grpo": SEARCH | GRPO | EXACT | BY_SEARCH_R1,
    "search_r1_grpo_format": SEARCH | GRPO | FORMAT | BY_SEARCH_R1 | {"learner.policy_optimizer.lr": 5e-7},
    "search_r1_ppo": SEARCH | PPO | EXACT | BY_SEARCH_R1,
    "search_r1_ppo_format": SEARCH | PPO | FORMAT | BY_SEARCH_R1,
    "otc_grpo_search": SEARCH | GRPO | OTC | EXACT | BY_OTC
    | {"reward.form": "grpo", "reward.c": 4.0, "reward.scope": "global"},
    "otc_ppo_search": SEARCH | PPO | OTC | EXACT | BY_OTC | {"reward.form": "ppo", "reward.c": 4.0},
    "behaviour_grpo_search": SEARCH | GRPO | BY_OTC | {"reward.calls_scale": 4.0, "reward.counter": "well_formed"},
    "r1_base": {**SEARCH, **GRPO, "rollout.limits.max_calls": 0, "rollout.limits.max_turns": 1} | {"tools": {}},
    "sft": {"task.train": SEARCH["task.train"], "task.demo_direct": 1.0, "tools": {}},
    "direct": INSTRUCT | {"tools": {}},
    "cot": INSTRUCT | {"tools": {}},
    "rag": INSTRUCT | PASSAGES | {"rollout.limits.max_calls": 1},
    "ircot": INSTRUCT | PASSAGES | {"rollout.limits.max_calls": 10},
    "tir": INSTRUCT | PASSAGES,
    "torl_grpo": CODE | ASKED | {"reward.error_penalty": 0.0, "algo.weighting": "token"},
    "torl_ppo": CODE | ASKED | {"reward.error_penalty": 0.0, "algo.kl_reward_coef": 0.0},
    "otc_grpo_code": CODE | ASKED | OTC | {"reward.form": "grpo", "reward.c": 3.0, "reward.scope": "global"},
    "otc_ppo_code": CODE | ASKED | OTC | {"reward.form": "ppo", "reward.c": 3.0},
    "r1_base_code": {**CODE, "rollout.limits.max_calls": 0, "rollout.limits.max_turns": 1, "tools": {}},
    "cot_code": {"model.path": "Qwen/Qwen2.5-Math-1.5B-Instruct", "tools": {}},
    "tir_code": {"model.path": "Qwen/Qwen2.5-Math-1.5B-Instruct", "rollout.limits.max_calls": 3},
    "retool": {  # arXiv:2504.11536 Sec. 2.2, 2.3, 3.1, 3.2
        "dialect.instructions": BY_RETOOL,
        "loop.steps": 400,
        "loop.problems_per_step": 512,
        "rollout.temperature": 1.0,
        "evaluate.sampled": True,
        "evaluate.samples": 32,  # evaluation/scripts/eval.sh
        "model.path": "Qwen/Qwen2.5-32B-Instruct",
        "task.train": ["BytedTsinghua-SIA/DAPO-Math-17k:train"],
        "task.traces": ["JoeYing/ReTool-SFT:train"],
        "engine.context": 16384,
        "learner.minibatch_size": 512,
        "learner.policy_optimizer.lr": 1e-6,
        "algo.kl_coef": 0.0,
        "algo.kl_reward_coef": 0.0,
        "reward.error_penalty": 0.0,
    },
    "toolrl_grpo": TOOLRL
    | {"rollout.group_size": 4, "learner.minibatch_size": 128 * 4, "rollout.limits.max_tokens": 1024}
    | {"algo.kl_coef": 0.0, "algo.clip_low": 0.2},
    "toolrl_ppo": TOOLRL
    | {"rollout.group_size": 1, "learner.minibatch_size": 128, "rollout.limits.max_tokens": 512}
    | {"learner.critic_optimizer.lr": 1e-5, "algo.kl_reward_coef": 0.001},
}  # fmt: skip


def at(config: Any, key: str) -> object:
    for name in key.split("."):
        config = config[name]
    return config


def without_tools(key: str, config: Any) -> bool:
    return key.startswith("tools.") and not config["tools"]


def test_every_preset_has_published_values_to_be_held_to():
    assert SYSTEMS.keys() == PUBLISHED.keys()


@pytest.mark.parametrize("name", SYSTEMS)
def test_a_preset_has_the_published_values(name: str):
    config = cli.run_config([f"conf={name}"])
    expected = {key: value for key, value in PUBLISHED[name].items() if not without_tools(key, config)}
    assert {key: at(config, key) for key in expected} == expected


@pytest.mark.parametrize("name", SYSTEMS)
def test_all_that_needs_no_weights_can_be_built_at_full_scale(name: str):
    config = cli.run_config([f"conf={name}", "scale=8gpus"])
    no_data = {key: [] for key in ("train", "test", "in_domain", "traces") if key in config["task"]}
    task = construct(config["task"] | no_data, "task", tools={})
    reward = construct(config["reward"], "reward", correct=task.correct, tool_names=tuple(config["tools"]))
    algo = construct(config["algo"], "algo")
    check_group_size(config["rollout"]["group_size"], algo, reward)
    for section, key in ((config["tools"], "tools"), ({"model": config["model"]}, "model")):
        for each, settings in section.items():
            construct(settings, f"{key}.{each}")
    construct(config["dialect"], "dialect", tools={})
    limits = construct_as(Limits, config["rollout"]["limits"], "rollout.limits")
    assert limits.max_tokens < config["engine"]["context"], "nothing is left for the prompt"
    for cls, key in ((Loop, "loop"), (Sft, "sft"), (Evaluate, "evaluate"), (Correction, "correction")):
        construct_as(cls, config[key], key)
    for which in ("policy_optimizer", "critic_optimizer"):
        construct_as(Optimizer, config["learner"][which], which)
    assert config["engine"]["_target_"] == "otcrl.rollout.vllm_engine.VLLMEngine"
    assert config["loop"]["problems_per_step"] % 8 == 0, "eight ranks play as many each"


def test_a_system_and_its_otc_twin_differ_in_prompt_and_reward_alone():
    for name, twin in (
        ("search_r1_grpo", "otc_grpo_search"),
        ("search_r1_ppo", "otc_ppo_search"),
        ("torl_grpo", "otc_grpo_code"),
        ("torl_ppo", "otc_ppo_code"),
    ):
        one, other = (cli.run_config([f"conf={each}"]) for each in (name, twin))
        differ = {key for key in one if one[key] != other[key]}
        assert differ <= {"name", "run_dir", "reward", "dialect"}, name


@pytest.mark.parametrize("algo", ["grpo", "ppo", "rloo", "dapo"])
@pytest.mark.parametrize("name", ["otc_ppo_search", "otc_grpo_code", "toolrl_ppo", "retool"])
def test_what_a_preset_and_those_it_is_based_on_say_of_another_algorithm_is_left_out(name: str, algo: str):
    assert cli.run_config([f"conf={name}", f"algo={algo}"])["algo"]["_target_"].startswith(f"otcrl.algos.{algo}.")


def test_a_preset_of_the_users_own_may_be_based_on_a_published_one(tmp_path: Path):
    (tmp_path / "mine.yaml").write_text("defaults: [otc_grpo_search, _self_]\nname: mine\nreward: {c: 8.0}\n")
    config, base = (cli.run_config([f"conf={conf}"]) for conf in (tmp_path / "mine.yaml", "otc_grpo_search"))
    assert config["reward"] == base["reward"] | {"c": 8.0}
    assert config["rollout"] == base["rollout"]


# -- two steps of each --------------------------------------------------------------------------------------

TURNS = (  # what the policy says most of the time, each one token
    "<think> I look it up. </think>\n<search> Which river flows through Prague? </search>",
    "<think> I know it. </think>\n<answer> Budapest </answer>",
    "I compute.\n```python\nprint(6 * 7)\n```\n```output",
    "So it is \\boxed{15}.",
    "<code>\n```python\nprint(8 * 7)\n```\n</code>",
    "<answer>\n\\boxed{56}\n</answer>",
    "<think> The weather. </think>\n<tool_call>\n"
    '{"name": "get_weather", "parameters": {"city": "Quito", "day": "Tuesday"}}\n</tool_call>',
    "Batian is the highest peak.\n",
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with a chat template that writes calls and answers of every dialect, at random."""
    folder = tmp_path_factory.mktemp("models") / "turns"
    tokenizer = chat_tokenizer(APPENDS, *TURNS)
    llama = tiny_llama(tokenizer.vocab_size, context=4096)
    said = [tokenizer.encode(turn)[0] for turn in TURNS]
    with torch.no_grad():
        llama.model.embed_tokens.weight[:, 0] = 10.0  # the same for all tokens, so the head sees it in every place
        llama.lm_head.weight[:, 0] = 0.0
        llama.lm_head.weight[said] = 0.0  # as likely as each other
        llama.lm_head.weight[said, 0] = 2.0
        llama.lm_head.weight[tokenizer.end_id, 0] = 1.8
    llama.save_pretrained(folder)
    tokenizer.hf.save_pretrained(folder)
    return folder


def settings(name: str, model: Path, folder: Path) -> list[str]:
    config = cli.run_config([f"conf={name}"])
    python = ["tools.python.workers=1", "tools.python.preload=[math]"] if "python" in config["tools"] else []
    return [
        f"conf={name}", "scale=small", f"model.path={model}", "engine.context=4096", "sft.steps=1", "sft.batch_size=2",
        "sft.max_tokens=4096", "loop.steps=2", "loop.problems_per_step=2", "loop.checkpoint_every=0",
        "rollout.group_size=2", "task.max_test=2", "evaluate.before=false", *python, f"run_dir={folder / 'run'}",
    ]  # fmt: skip


@pytest.mark.parametrize("name", [name for name, preset in SYSTEMS.items() if command(preset) == "train"])
def test_a_preset_trains_two_steps_on_a_small_model_with_its_tools(name: str, model: Path, tmp_path: Path):
    assert cli.main(["train", *settings(name, model, tmp_path)]) == 0
    run = tmp_path / "run"
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "reward/value" in line]
    assert [line["step"] for line in steps] == [0, 1]
    assert all(math.isfinite(value) for line in steps for value in line.values())
    transcripts = [json.loads(line) for line in (run / "transcripts.jsonl").read_text().splitlines()]
    calls = [call for line in transcripts for call in line["calls"]]
    tools = cli.run_config([f"conf={name}"])["tools"]
    assert {call["tool"] for call in calls if call["outcome"] == "ok"} == set(tools), "the real tool answered"
    assert json.loads((run / "summary.json").read_text())["after"]["em"] is not None


@pytest.mark.parametrize("name", [name for name, preset in SYSTEMS.items() if command(preset) == "eval"])
def test_a_preset_without_rl_is_evaluated_on_a_small_model_with_its_tools(name: str, model: Path, tmp_path: Path):
    assert cli.main(["eval", *settings(name, model, tmp_path)]) == 0
    report = Report.load(tmp_path / "run/eval/greedy")
    assert report.overall.em.value is not None
    if name in ("rag", "direct", "cot", "cot_code"):
        assert report.overall.tc.value == (1.0 if name == "rag" else 0.0)
    if name == "ircot":
        assert (report.overall.tc.value or 0) >= 1.0


def test_the_sft_preset_writes_a_model_that_can_be_evaluated(model: Path, tmp_path: Path):
    words = settings("sft", model, tmp_path)
    assert cli.main(["sft", *words]) == 0
    trained = [word for word in words if not word.startswith("model.path")]
    assert cli.main(["eval", *trained, f"model={tmp_path / 'run/model'}"]) == 0
    assert (tmp_path / "run/eval/greedy").is_dir()


# -- what does not go together --------------------------------------------------------------------------------

REFUSED = {
    "conf=otc_grpo_serch": "conf=otc_grpo_serch: there is no such preset. Did you mean 'otc_grpo_search'?",
    "conf=otc_grpo_search scale=smal": "scale=smal: there is no such yaml. Did you mean 'small'?",
    "conf=otc_ppo_search algo=grpo rollout.group_size=1": "rollout.group_size is 1, and GRPO compares trajectories",
    "conf=otc_ppo_search reward=otc_grpo reward.scope=local rollout.group_size=1": "group_size is 1, and OTCReward",
    "conf=otc_grpo_search dialect=retool": "dialect: dialect.tool: <code> runs 'python', which is no tool.",
    "conf=otc_grpo_search dialect=toolrl": "the task is not about calls to imitate: use dialect.calls=run",
    "conf=toolrl_grpo dialect=otc": "the task compares a whole turn: use dialect=toolrl",
    "conf=otc_grpo_code dialect=hermes model.chat=false": "functions by its chat template only: set model.chat=true",
    "conf=rag tools=none": "dialect: dialect.tool is 'search', which is not in tools.",
    "conf=toolrl_grpo reward.granularity=corse": "reward.granularity must be 'fine' or 'refined' or 'intermediate' or ",
    "conf=toolrl_grpo reward.most=0": "reward: most must be above 0, got 0.0",
    "conf=toolrl_grpo reward.length.first=512": "reward.length: last must be at least 1, got 0",
    "conf=otc_grpo_search reward=toolrl": "reward is ToolRLReward, which compares a turn with a published one, and the "
    "task has none: use task=tool_calls, or another reward",
    "conf=torl_grpo algo=max_rl": "algo is MaxRL, which divides by a group's mean reward, and ToRLReward can be below ",
    "conf=otc_grpo_search algo=max_rl reward=overlong": "mean reward, and Overlong can be below 0: use reward=outcome",
    "conf=torl_grpo reward=format": "reward.rules is 'sequence', and what ToRL writes never keeps to it with ",
    "conf=otc_grpo_search reward=format reward.result=information": "reward.result='information' ('<observation>r</ob",
    "conf=otc_grpo_search reward.price.per_second=0.01": "reward: form grpo is for whole calls: it jumps at n = 0",
}  # fmt: skip


@pytest.mark.parametrize(("words", "message"), REFUSED.items(), ids=REFUSED.keys())
def test_what_does_not_go_together_is_refused_with_what_would(
    words: str, message: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    conf, *overrides = words.split()
    known = conf.removeprefix("conf=") in SYSTEMS
    common = settings(conf.removeprefix("conf="), model, tmp_path)[1:] if known else []
    chosen = {override.partition("=")[0] for override in overrides}
    common = [word for word in common if word.partition("=")[0] not in chosen]
    assert message in refusal(capsys, "train", conf, *common, *overrides)
    assert not (tmp_path / "run").exists()
