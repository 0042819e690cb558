"""What a user gets for a mistake, an interrupt or a diverged model: one clear line, and nothing lost."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from otcrl import cli, sealed
from otcrl.errors import DataError
from otcrl.models.pretrained import Pretrained
from otcrl.rewards.otc import OTCReward
from otcrl.types import Reward, Trajectory
from tests.tiny import tiny_llama, tiny_tokenizer

ROOT = Path(__file__).parents[1]
ATLAS = [
    "conf=quickstart", "threads=1",
    "task.entities=6", "task.large_sums=20", "task.held_out_per_kind=2", "model.width=16",
    "model.layers=1", "model.heads=2", "model.ff_width=32", "sft.steps=2", "sft.batch_size=8", "loop.steps=2",
    "loop.problems_per_step=2", "loop.checkpoint_every=1", "rollout.group_size=2", "evaluate.before=false",
    "evaluate.sampled=false", "tools.python.workers=1", "engine.tool_patience_s=60",
]  # fmt: skip


class Poisoned(OTCReward):
    """Every reward is NaN from the third step on."""

    def __call__(self, trajectories_PG: Sequence[Sequence[Trajectory]]) -> list[list[Reward]]:
        is_late = any(max(t.versions) >= 2 for group in trajectories_PG for t in group)
        rewards_PG = super().__call__(trajectories_PG)
        return [[replace(r, value=math.nan) if is_late else r for r in group] for group in rewards_PG]


def refusal(capsys: pytest.CaptureFixture[str], *words: str, code: int = 2) -> str:
    """The one line on stderr of a command that did not do what it was asked to."""
    assert cli.main(words) == code
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    return lines[0].removeprefix("otcrl: error: ")


def steps(folder: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def checkpoints(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


# -- settings that cannot be ----------------------------------------------------------------------------

IMPOSSIBLE = {
    # rollout
    "rollout.group_size=1": "rollout.group_size is 1, and GRPO compares trajectories of one problem: use 2 or more",
    "rollout.group_size=0": "rollout: group_size must be at least 1, got 0",
    "rollout.group_size=abc": "rollout.group_size must be int, got 'abc'",
    "rollout.limits.tool_timeout_s=20": "tools: search has timeout_s=30, and rollout.limits.tool_timeout_s is 20: the "
    "tool's own must be shorter",
    "rollout.first=nearly_don": "rollout.first must be",
    "rollout.concurrency=0": "rollout: concurrency must be at least 1, got 0",
    "rollout.temperature=0": "rollout.temperature is 0, and training needs trajectories that differ: use 1.0",
    "rollout.temperature=-1": "rollout: temperature must be 0 or more, got -1.0",
    "rollout.limits.max_calls=-1": "rollout.limits: max_calls must be at least 0, got -1",
    "rollout.limits.max_turns=0": "rollout.limits: max_turns must be at least 1, got 0",
    "rollout.limits.max_tokens=0": "rollout.limits: max_tokens must be at least 1, got 0",
    "rollout.limits.max_turn_tokens=-3": "rollout.limits: max_turn_tokens must be at least 1, got -3",
    "rollout.limits.max_observation_tokens=0": "rollout.limits: max_observation_tokens must be at least 1, got 0",
    "rollout.limits.tool_timeout_s=0": "rollout.limits: tool_timeout_s must be above 0, got 0.0",
    "rollout.limits.timeout_s=0": "rollout.limits: timeout_s must be null or above 0, got 0.0",
    "rollout.schedule=null": "rollout.schedule must be a section of settings, got None",
    "rollout.schedule.stragglers=kep": "rollout.schedule.stragglers must be 'wait' or 'drop' or 'keep', got 'kep'. "
    "Did you mean 'keep'?",
    "rollout.schedule.oversample=1.5": "rollout.schedule: oversample is 1.5, and stragglers=wait waits for every group",
    "rollout.limits=null": "rollout.limits must be a section of settings, got None",
    "rollout=5": "rollout must be a section of settings, got 5",
    "engine.context=0": "engine: context must be at least 1, got 0",
    "engine.context=129": "engine: context is 129, and the model's max_position_embeddings is 128",
    # learner and algorithm
    "learner.policy_optimizer.lr=-1": "learner.policy_optimizer: lr must be 0 or more, got -1.0",
    "learner.policy_optimizer.lr=nan": "learner.policy_optimizer: lr must be 0 or more, got nan",
    "learner.policy_optimizer.lr=fast": "learner.policy_optimizer.lr must be float, got 'fast'",
    "learner.policy_optimizer.betas=[0.9,1.5]": "learner.policy_optimizer: betas must be at least 0 and below 1",
    "learner.autocast=bfloat61": "learner: autocast must be bfloat16 or null, got 'bfloat61'. Did you mean 'bfloat16'?",
    "learner.autocast=float16": "learner: autocast must be bfloat16 or null, got 'float16'. Did you mean 'bfloat16'?",
    "learner.epochs=0": "learner: epochs must be at least 1, got 0",
    "learner.minibatch_size=-1": "learner: minibatch_size must be at least 0, got -1",
    "learner.packing=share": "learner.packing must be 'shared' or 'packed' or 'padded', got 'share'. Did you mean ",
    "learner.micro_tokens=0": "learner: micro_tokens must be at least 1, got 0",
    "learner.max_grad_norm=0": "learner: max_grad_norm must be above 0, got 0.0",
    "learner.max_skipped=-1": "learner: max_skipped must be at least 0, got -1",
    "learner.backend=deepsped": "learner: backend must be 'torch' or 'deepspeed', got 'deepsped'. Did you mean ",
    "learner.deepspeed.zero_stage=4": "learner.deepspeed.zero_stage must be 1 or 2 or 3, got 4",
    "learner.deepspeed.offload_params=cpu": "learner.deepspeed: offload_params=cpu needs zero_stage=3, got 2",
    "learner.deepspeed.offload=nvme": "learner.deepspeed: offload to nvme needs nvme_path, a folder on the disk",
    "learner.deepspeed.bucket=0": "learner.deepspeed: bucket must be at least 1, got 0.0",
    "learner.lora.rank=-1": "learner.lora: rank must be at least 0, got -1",
    "learner.lora.alpha=0": "learner.lora: alpha must be above 0, got 0",
    "ranks.timeout_s=0": "ranks: timeout_s must be above 0, got 0.0",
    "health.grad_spike=1": "health: grad_spike must be above 1, got 1.0",
    "health.entropy_share=1": "health: entropy_share must be at least 0 and below 1, got 1.0",
    "health.likelihood_drop=0": "health: likelihood_drop must be above 0, got 0.0",
    "learner.old_logprobs=sample": "learner: old_logprobs must be 'recompute' or 'sampler', got 'sample'. Did you mean "
    "'sampler'?",
    "algo.clip_low=-1": "algo: clip_low must be 0 or more, got -1.0",
    "algo.std_floor=-0.1": "algo: std_floor must be 0 or more, got -0.1",
    "algo.kl_coef=inf": "algo: kl_coef must be 0 or more, got inf",
    "algo.weighting=tokn": "algo.weighting must be 'token' or 'sequence', got 'tokn'. Did you mean 'token'?",
    "reward.alpha=nan": "reward: alpha must be above 0, got nan",
    "reward.combine=add": "reward: combine must be one of product, sum, got 'add'",
    "reward.form=gpro": "reward: form must be one of ppo, grpo, got 'gpro'. Did you mean 'grpo'?",
    "reward.warmup.steps=-1": "reward.warmup: steps must be at least 0, got -1",
    "reward.warmup=null": "reward.warmup must be a section of settings, got None",
    "reward.price.per_second=-1": "reward.price: per_second must be 0 or more, got -1.0",
    "+reward.price.tools={serch:2}": "reward.price: tools: there is no tool 'serch'. Did you mean 'search'?",
    "correction.level=tokn": "correction.level must be 'none' or 'token' or 'sequence' or 'geometric', got 'tokn'. "
    "Did you mean 'token'?",
    "correction.bound=clip": "correction.bound must be 'truncate' or 'mask', got 'clip'",
    "correction.high=0.5": "correction: low and high must be around 1, the weight of no mismatch, got 0.0 and 0.5",
    # loop, evaluation, cold start
    "loop.problems_per_step=0": "loop: problems_per_step must be at least 1, got 0",
    "loop.steps=-1": "loop: steps must be at least 0, got -1",
    "loop.steps=many": "loop.steps must be int, got 'many'",
    "loop.stepz=3": "loop.stepz is not a setting. Did you mean 'loop.steps'?",
    "loop.checkpoint_every=-1": "loop: checkpoint_every must be at least 0, got -1",
    "loop.keep_checkpoints=0": "loop: keep_checkpoints must be at least 1, got 0",
    "loop.max_void_share=2": "loop: max_void_share must be a share between 0 and 1, got 2.0",
    "loop.max_logprob_gap=0": "loop: max_logprob_gap must be null or above 0, got 0.0",
    "evaluate.counter=well_frmed": "evaluate: there is no counter 'well_frmed'. Did you mean 'well_formed'?",
    "evaluate.samples=2": "evaluate: samples is 2, and greedy attempts are all the same: set sampled=true",
    "evaluate.difficulty=level": "evaluate.difficulty: no evaluation problem has a column 'level'.",
    "sft.steps=-1": "sft: steps must be at least 0, got -1",
    "sft.batch_size=0": "sft: batch_size must be at least 1, got 0",
    "sft.optimizer.lr=-1": "sft.optimizer: lr must be 0 or more, got -1.0",
    "sft.autocast=int8": "sft: autocast must be bfloat16 or null, got 'int8'.",
    "sft.autocast=float16": "sft: autocast must be bfloat16 or null, got 'float16'. Did you mean 'bfloat16'?",
    "sft.max_tokens=5": "a demonstration of SFT step 0 has ",
    "sft=null": "sft must be a section of settings, got None",
    "~sft": "the config has no sft",
    # task, tools, dialect, model
    "task.large_sums=8101": "task: large_sums must be 1 to 8100, got 8101",  # more do not exist
    "task.held_out_share=0": "the task has no evaluation problems, and a run is judged by them",
    "task.held_out_share=1": "no known question is left to practise: lower task.held_out_share=1.0",
    "+task.demo_mix={fresh:1}": "task: demo_mix: there is no kind 'fresh'. Choose from: ",
    "task.demo_mix={fresh:1}": "task.demo_mix.fresh is not a setting. ",
    "task.demo_extra=[]": "task: demo_extra must hold shares of 0 or more, not all of them 0, got []",
    "~tools.python": "sft: a demonstration holds a call that cannot be made. There is no tool named 'python'. The "
    "tools are: search.",
    "tools=null": "'tools=null': tools is chosen by name. Choose from: ",
    "dialect.instructions=hello": "dialect: instructions must hold {question}, got 'hello'",
    "dialect=torl": "the tokenizer has no tokens for '```output', which the dialect needs",
    "dialect=retool": "the tokenizer has no tokens for '</code>', which the dialect needs",
    "dialect=hermes": "the tokenizer has no tokens for '<tool_call>",
    "dialect=toolrl": "the task is not about calls to imitate: use dialect.calls=run",
    "tools=mcp": "tools.mcp: name either command, a program and its arguments, or the url of a server",
    "tools=none": "sft: a demonstration holds a call that cannot be made. There is no tool named ",
    "model.width=15": "model: width must be a multiple of 2 * heads = 4, got 15",
    "model=pretrained": "model.",
    # the run itself
    "seed=-1": "seed must be at least 0 and below 2**32, got -1",
    "name=7": "name must be str, got 7",
    "run_dir=null": "run_dir must be str, got None",
    "resume=": "resume must not be empty",
    "name=": "name must not be empty",
    "resume_changed=yes please": "resume_changed must be bool, got 'yes please'",
    "loop.keep_best=3": "loop.keep_best must be str | None, got 3",
    "logger=[console,wandbb]": "logger=wandbb: there is no such yaml. Did you mean 'wandb'?",
    "logger=[]": "'logger=[]': logger is chosen by name. Choose from: console, prometheus, tensorboard, wandb.",
    "engine.tool_steps=-1": "engine: tool_steps must be 0 or more, got -1",
    "engine.tool_patience_s=-1": "engine: tool_patience_s must be 0 or more, got -1.0",
    "learner.critic_trunk=share": "learner.critic_trunk must be 'own' or 'shared', got 'share'. Did you mean 'shared'?",
    "run_dir=/proc/none": "run_dir: cannot write in /proc/none: ",
}


@pytest.mark.parametrize(("override", "message"), IMPOSSIBLE.items(), ids=IMPOSSIBLE.keys())
def test_an_impossible_setting_is_one_line_before_anything_is_written(
    override: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    removed = (
        override.removeprefix("~") + "." if override.startswith("~") else "tools." if "tools=" in override else "-"
    )
    settings = [s for s in ATLAS if not s.startswith(("model." if "model=" in override else removed, removed))]
    run_dir = [] if override.startswith("run_dir") else [f"run_dir={tmp_path / 'run'}"]
    assert refusal(capsys, "train", *settings, *run_dir, override).startswith(message)
    assert not (tmp_path / "run").exists()


ALONE = {
    "algo=rloo": "rollout.group_size is 1, and RLOO compares trajectories of one problem: use 2 or more, or algo=ppo",
    "algo=ppo reward.scope=local": "rollout.group_size is 1, and OTCReward compares trajectories of one problem: use 2 "
    "or more, or reward=otc_ppo",
}


@pytest.mark.parametrize(("overrides", "message"), ALONE.items(), ids=ALONE.keys())
def test_one_trajectory_a_problem_is_refused_where_siblings_are_compared(
    overrides: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    words = [*ATLAS, "rollout.group_size=1", f"run_dir={tmp_path / 'run'}"]
    words = [word for word in words if not word.startswith("rollout.group_size=2")]
    assert refusal(capsys, "train", *words, *overrides.split()).startswith(message)
    assert not (tmp_path / "run").exists()


OTHERS = {
    "algo=dr_grpo algo.max_tokens=0": "algo: max_tokens must be at least 1, got 0",
    "algo=gspo algo.clip_low=-1": "algo: clip_low must be 0 or more, got -1.0",
    "algo=gspo correction.bound=mask": "correction.bound=mask at correction.level=token leaves out tokens, and GSPO ",
    "algo=rloo correction.bound=mask": "correction.bound=mask at correction.level=token leaves out tokens, and RLOO ",
    "algo=max_rl algo.weighting=all": "algo.weighting must be 'token' or 'sequence', got 'all'",
    "reward=torl reward.error_penalty=-1": "reward: error_penalty must be 0 or more, got -1.0",
    "reward=toolrl reward.matching=gredy": "reward.matching must be 'greedy' or 'optimal', got 'gredy'. Did you mean ",
    "reward=format reward.rules=seqence": "reward.rules must be 'sequence' or 'dialect', got 'seqence'. Did you mean ",
    "reward=behaviour reward.acting=fewer": "reward.acting must be 'less' or 'any' or 'more', got 'fewer'",
    "reward=behaviour reward.tokens_scale=0": "reward: tokens_scale must be above 0, got 0.0",
    "reward=behaviour reward.counter=wel_formed": "reward: there is no counter 'wel_formed'. Did you mean ",
    "reward=overlong reward.cache_tokens=0": "reward: cache_tokens must be at least 1 and at most max_tokens=100, got",
}


@pytest.mark.parametrize(("overrides", "message"), OTHERS.items(), ids=OTHERS.keys())
def test_an_impossible_setting_of_another_algorithm_or_reward_is_refused_as_well(
    overrides: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    words = [word for word in ATLAS if not word.startswith("algo.")]
    assert refusal(capsys, "train", *words, f"run_dir={tmp_path / 'run'}", *overrides.split()).startswith(message)


def test_an_earlier_run_stays_in_its_place_when_the_next_one_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "summary.json").write_text("{}")
    refusal(capsys, "train", *ATLAS, f"run_dir={tmp_path}", "learner.epochs=0")
    assert (tmp_path / "summary.json").is_file()


def test_a_tool_that_does_not_answer_is_missed_before_the_cold_start(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    nobody = "http://127.0.0.1:9"
    line = refusal(capsys, "train", *ATLAS, f"tools.python.urls=[{nobody}]", f"run_dir={tmp_path / 'run'}", code=1)
    assert f"no Python sandbox serves: {nobody}" in line
    assert not (tmp_path / "run").exists(), "an earlier run would have kept its place"


def test_what_is_no_run_cannot_be_resumed_or_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    for words in (["train", f"resume={tmp_path}"], ["eval", f"run={tmp_path}"]):
        assert refusal(capsys, *words) == f"{tmp_path} is not a run directory: it has no config.yaml"
    assert cli.main(["train", "--cfg", *ATLAS]) == 0
    (tmp_path / "config.yaml").write_text(capsys.readouterr().out)
    assert refusal(capsys, "eval", f"run={tmp_path}").startswith(
        f"run={tmp_path} has not come to its end: go on with it, `otcrl train resume={tmp_path}`"
    )
    assert refusal(capsys, "eval", f"run={tmp_path}", "step=2").startswith(
        f"run={tmp_path} has no checkpoint of step '2'. It has none."
    )


# -- data, tokenizers and prompts ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with a token for every character, as a Hugging Face directory."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tokenizer = tiny_tokenizer()
    tiny_llama(tokenizer.vocab_size).save_pretrained(folder)
    tokenizer.hf.save_pretrained(folder)
    return folder


def questions(model: Path, data: Path) -> list[str]:
    """Settings for training on the questions of a file, with a search tool that has one passage."""
    corpus = data.parent / "corpus.jsonl"
    corpus.write_text('{"id": "1", "title": "Paris", "text": "The capital of France."}\n')
    return [
        "conf=quickstart", "task=qa", f"task.train=[{data}]", f"task.test=[{data.parent / 'test.jsonl'}]",
        "model=pretrained", f"model.path={model}", "model.chat=false", "sft.steps=0", "engine.context=256",
        f"tools.search.corpus=[{corpus}]", f"run_dir={data.parent / 'run'}",
    ]  # fmt: skip


ROW = '{"id": "a", "question": "Who?", "answers": ["x"]}\n'
LONG = json.dumps({"id": "b", "question": "w" * 300, "answers": ["x"]})
DATA = {
    "a line that is no JSON": ("train.jsonl", ROW + '{"id": "b" "question"}\n', ", line 2: expected one JSON object"),
    "a missing column": ("train.jsonl", '{"id": "a", "text": "Who?"}\n', ", row 1: there is no column 'question'."),
    "no rows": ("train.jsonl", "", " holds no rows."),
    "an empty question": (
        "train.jsonl",
        ROW + ROW.replace("Who?", " ").replace('"a"', "2"),
        "question must be a text",
    ),
    "the wrong suffix": ("train.csv", ROW, " must end in one of .jsonl, .jsonl.gz, .json, .parquet, .tsv, got '.csv'"),
    "too long for the context": (
        "train.jsonl",
        ROW + LONG,
        "/train/b' has a prompt of 300 tokens, and the context is 256",
    ),
}


@pytest.mark.parametrize(("name", "text", "message"), DATA.values(), ids=DATA.keys())
def test_bad_data_is_named_with_its_file_and_row_before_training(
    name: str, text: str, message: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / name).write_text(text)
    (tmp_path / "test.jsonl").write_text(ROW)
    assert message in refusal(capsys, "train", *questions(model, tmp_path / name))
    assert not (tmp_path / "run").exists()


def test_a_file_that_is_not_there_is_refused_with_the_nearest_name(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "train.jsonl").write_text(ROW)
    assert "Did you mean 'train.jsonl'?" in refusal(capsys, "train", *questions(model, tmp_path / "trian.jsonl"))
    words = ["eval", *ATLAS, f"data={tmp_path / 'trian.jsonl'}", f"run_dir={tmp_path}"]
    assert "Did you mean 'train.jsonl'?" in refusal(capsys, *words)


def test_a_model_that_cannot_be_used_is_refused(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    data = tmp_path / "train.jsonl"
    for path in (data, tmp_path / "test.jsonl"):
        path.write_text(ROW)
    words = ["train", *questions(model, data)]
    assert "has no chat template: set model.chat=false." in refusal(capsys, *words, "model.chat=true")
    assert "holds no model: there is no config.json" in refusal(capsys, *words, f"model.path={tmp_path}")
    assert "model.path '/none/such' is not a directory" in refusal(capsys, *words, "model.path=/none/such")
    monkeypatch.chdir(tmp_path)
    expected = "model.path 'models/smollm2' is not a directory: otcrl models smollm2 out=models/smollm2 writes it"
    assert expected in refusal(capsys, *words, "model.path=models/smollm2")  # what presets say, in an empty folder
    assert "model.device must be auto, cpu, cuda or cuda:N" in refusal(capsys, *words, "model.device=cudaa")
    copy = shutil.copytree(model, tmp_path / "endless")
    settings = json.loads((copy / "tokenizer_config.json").read_text())
    (copy / "tokenizer_config.json").write_text(json.dumps({k: v for k, v in settings.items() if k != "eos_token"}))
    assert "has no end-of-text token: a completion could never end" in refusal(capsys, *words, f"model.path={copy}")


def test_that_a_model_comes_from_the_hub_is_said_before_the_hub_is_asked(monkeypatch, capsys):
    def asked(*_: object, **__: object) -> None:
        assert "model.path 'nobody/none-such' is no directory here: taken from the Hugging Face hub" in said()
        raise OSError("not in reach")

    def said() -> str:
        return capsys.readouterr().err

    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", asked)
    pretrained = Pretrained(
        path="nobody/none-such", dtype="float32", chat=None, device="cpu", gradient_checkpointing=False
    )
    with pytest.raises(DataError, match="neither a directory nor a hub model in reach: not in reach"):
        pretrained.load_tokenizer(())


def test_float16_is_evaluated_and_not_trained(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    data = tmp_path / "train.jsonl"
    for path in (data, tmp_path / "test.jsonl"):
        path.write_text(ROW)
    words = [*questions(model, data), "tools.python.workers=1", "rollout.limits.max_tokens=4", "model.dtype=float16"]
    for command in ("train", "sft"):
        why = refusal(capsys, command, *words)
        assert why.startswith("model.dtype is 'float16', which can be evaluated and not trained"), why
        assert why.endswith("Use bfloat16 or float32")
    assert cli.main(["eval", *words]) == 0
    assert (tmp_path / "run/eval/greedy/report.json").is_file()


# -- going on after a failure ---------------------------------------------------------------------------


def test_a_loss_of_nan_names_step_and_batch_and_the_run_goes_on_from_its_last_checkpoint(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    words = [
        *ATLAS,
        f"run_dir={tmp_path / 'run'}",
        "loop.steps=4",
        f"reward._target_={__name__}.Poisoned",
        "learner.max_skipped=0",
    ]
    why = refusal(capsys, "train", *words, code=1)
    assert re.match(r"loss is nan, .* at step 2, mini-batch 0 \(rows \[", why)
    assert steps(tmp_path / "run") == [0, 1]
    assert checkpoints(tmp_path / "run") == ["step-000001", "step-000002"]
    last = tmp_path / "run/checkpoints/step-000002"
    about, state = sealed.check(last), json.loads((last / "run.json").read_text())
    (last / "run.json").write_text(json.dumps(state | {"reward_state": {"atlas-0/train/never asked": 7}}))
    (last / sealed.MANIFEST).unlink()
    sealed.seal(last, {name: value for name, value in about.items() if name != "files"})

    assert cli.main(["train", f"resume={tmp_path / 'run'}", "reward=otc_grpo", "resume_changed=true"]) == 0
    assert steps(tmp_path / "run") == [0, 1, 2, 3, 4]  # the last line is the evaluation
    assert checkpoints(tmp_path / "run") == ["step-000003", "step-000004"]
    last = json.loads((tmp_path / "run/checkpoints/step-000004/run.json").read_text())
    assert last["reward_state"]["atlas-0/train/never asked"] == 7  # the table of n


def test_sft_that_diverges_stops_before_it_writes_a_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    words = [*ATLAS, f"run_dir={tmp_path}/run", "sft.steps=9", "sft.optimizer.lr=1e30"]
    assert "lower sft.optimizer.lr (now 1e+30)" in refusal(capsys, "train", *words, code=1)
    assert not (tmp_path / "run/sft").exists()


def test_a_resumed_run_keeps_its_reference_and_refuses_another_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    folder = tmp_path / "run"
    words = [*ATLAS, f"run_dir={folder}", "algo.kl_coef=0.1", "sft.steps=6", "sft.optimizer.lr=0.1"]
    assert cli.main(["train", *words]) == 0
    whole = (folder / "metrics.jsonl").read_text().splitlines()
    shutil.rmtree(folder / "checkpoints/step-000002")
    for other, message in (("model.width=32", "and the config's model has ["), ("algo=ppo", "resume with the algo")):
        assert cli.main(["train", f"resume={folder}", other, "resume_changed=true"]) == 2
        assert message in capsys.readouterr().err.splitlines()[-1]
    assert cli.main(["train", f"resume={folder}"]) == 0
    again = (folder / "metrics.jsonl").read_text().splitlines()
    assert json.loads(again[1])["update/kl"] == pytest.approx(json.loads(whole[1])["update/kl"], abs=1e-6)


# -- Ctrl-C ---------------------------------------------------------------------------------------------


def descendants(pid: int) -> set[int]:
    children = {
        int(child) for file in Path(f"/proc/{pid}/task").glob("*/children") for child in file.read_text().split()
    }
    return children.union(*(descendants(child) for child in children))


def logged(name: str, count: int) -> Callable[[Path], bool]:
    return lambda run: (run / name).is_file() and (run / name).read_text().count("\n") >= count


PHASES = {
    "cold start": (["sft.steps=100000"], logged("sft.jsonl", 3)),
    "rollout": (["loop.steps=1000", "loop.problems_per_step=200", "rollout.group_size=16"], logged("metrics.jsonl", 1)),
    "update": (
        ["learner.epochs=1000000", "learner.minibatch_size=1", "algo.kl_coef=0.01"],
        lambda run: (run / "sft/tokenizer.json").is_file(),
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize(("settings", "is_there"), PHASES.values(), ids=PHASES.keys())
def test_ctrl_c_stops_at_once_and_leaves_nothing_behind(
    settings: list[str], is_there: Callable[[Path], bool], tmp_path: Path
):
    command = [sys.executable, "-m", "otcrl.cli", "train", *ATLAS, *settings, f"run_dir={tmp_path / 'run'}"]
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    deadline = time.monotonic() + 90
    while not is_there(tmp_path / "run"):
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.05)
    time.sleep(0.5)
    started = descendants(process.pid)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does it: to the children too
    try:
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert (process.returncode, err) == (130, "otcrl: interrupted\n")
    while any(Path(f"/proc/{pid}").exists() for pid in started):  # the kernel reaps what bubblewrap held
        assert time.monotonic() < deadline + 30
        time.sleep(0.05)
    if (tmp_path / "run/metrics.jsonl").is_file():
        done = len(steps(tmp_path / "run"))
        assert steps(tmp_path / "run") == list(range(done))
        assert not done or checkpoints(tmp_path / "run")[-1] == f"step-{done:06d}"
