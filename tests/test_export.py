"""What a run has trained, as a directory that others load."""

from __future__ import annotations

import errno
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from otcrl import build, checkpoint, cli
from otcrl.sealed import seal
from tests.test_bad_input import ATLAS, refusal
from tests.test_learner import grpo, make_learner
from tests.tiny import tiny_llama, tiny_tokenizer

BY_LENGTH = "reward._target_=tests.ranks.ByLength"  # every group has a signal, so the weights change in every step


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("export") / "run"
    settings = ["loop.steps=4", "loop.keep_checkpoints=2", "loop.keep_best=-rollout/tokens"]
    assert cli.main(["train", *ATLAS, BY_LENGTH, f"run_dir={folder}", *settings]) == 0
    return folder


def exported(run: Path, out: Path, *words: str) -> dict[str, torch.Tensor]:
    assert cli.main(["export", str(run), f"out={out}", *words]) == 0
    return load_file(out / "model.safetensors")


def test_transformers_loads_a_finished_run(run, tmp_path, capsys):
    weights = exported(run, tmp_path / "out")
    assert f"otcrl: wrote the model of {run} to {tmp_path / 'out'}" in capsys.readouterr().out
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert not (tmp_path / "out/manifest.json").exists()
    assert all(torch.equal(weights[name], p) for name, p in model.named_parameters() if name in weights)
    assert tokenizer.encode("is")
    assert GenerationConfig.from_pretrained(tmp_path / "out").eos_token_id == tokenizer.eos_token_id


def test_a_checkpoint_is_chosen_by_its_step_or_as_the_best(run, tmp_path):
    kept = sorted(int(path.name[-6:]) for path in run.glob("checkpoints/step-*"))
    assert kept[-2:] == [3, 4]
    last, before = exported(run, tmp_path / "a", "step=4"), exported(run, tmp_path / "b", "step=3")
    name = "model.embed_tokens.weight"
    assert not torch.equal(last[name], before[name])
    assert torch.equal(exported(run, tmp_path / "by-name", "step=000003")[name], before[name])
    assert torch.equal(last[name], exported(run, tmp_path / "c")[name])
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    fewest = min(
        (row["rollout/tokens"], -row["step"]) for row in rows if row["step"] in kept and "rollout/tokens" in row
    )
    best = exported(run, tmp_path / "d", "step=best")
    assert torch.equal(best[name], exported(run, tmp_path / "e", f"step={-fewest[1]}")[name])


def test_a_run_may_have_an_equals_sign_in_its_name_and_goes_not_into_the_current_directory(
    run, tmp_path, monkeypatch, capsys
):
    named = shutil.copytree(run, tmp_path / "seed=1")
    exported(named, tmp_path / "out")
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    assert cli.main(["export", str(run), "out=."]) == 2
    assert "out=. is the current directory: name a folder in it" in capsys.readouterr().err
    (tmp_path / "empty/here").touch()
    assert cli.main(["train", *ATLAS, "run_dir=."]) == 2
    assert "run_dir is the current directory, which cannot be moved aside" in capsys.readouterr().err


def test_a_run_that_is_not_finished_gives_its_newest_checkpoint_that_is_whole(run, tmp_path, capsys):
    folder = shutil.copytree(run, tmp_path / "run")
    (folder / "summary.json").unlink()
    (folder / "checkpoints/step-000004/run.json").write_text("{}")
    exported(folder, tmp_path / "out")
    shown = capsys.readouterr()
    assert f"otcrl: wrote step 3 of {folder} to " in shown.out
    assert "CORRUPT CHECKPOINT: " in shown.err
    assert (folder / "checkpoints/step-000004").is_dir(), "the run is only read"


def test_the_chat_template_goes_along(tmp_path):
    tokenizer = tiny_tokenizer().hf
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    folder = tmp_path / "run"
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "config.yaml").write_text("loop: {}\n")
    checkpoint.save_model(
        folder / "checkpoints/step-000001/model", make_learner(grpo(), policy=tiny_llama(200)), tokenizer
    )
    (folder / "checkpoints/step-000001/model/manifest.json").unlink()
    seal(folder / "checkpoints/step-000001", {})
    exported(folder, tmp_path / "out")
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == tokenizer.chat_template


def test_several_chat_templates_go_along(tmp_path):
    """One for tools beside the usual one, as Hermes models have."""
    tokenizer, templates = tiny_tokenizer().hf, {"default": "{{ messages[0].content }}", "tool_use": "{{ tools }}"}
    tokenizer.chat_template = templates
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.yaml").write_text("loop: {}\n")
    checkpoint.save_model(folder / "model", make_learner(grpo(), policy=tiny_llama(200)), tokenizer)
    exported(folder, tmp_path / "out")
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == templates


def test_a_run_with_adapters_leaves_a_plain_model(tmp_path):
    """Merged: whoever loads it needs neither peft nor the model that was adapted."""
    pytest.importorskip("peft")
    folder = tmp_path / "run"
    lora = ["learner.lora.rank=2", "learner.lora.alpha=64", "learner.policy_optimizer.lr=0.01"]
    assert cli.main(["train", *ATLAS, BY_LENGTH, f"run_dir={folder}", *lora]) == 0
    exported(folder, tmp_path / "out")
    assert not list(tmp_path.rglob("adapter*"))
    before, after = (AutoModelForCausalLM.from_pretrained(path) for path in (folder / "sft", tmp_path / "out"))
    name = "model.layers.0.mlp.up_proj.weight"
    assert not torch.equal(before.get_parameter(name), after.get_parameter(name))
    assert cli.main(["eval", f"run={folder}"]) == 0


def test_an_evaluation_goes_where_it_is_told_to_and_is_refused_before_it_begins_where_nothing_can_be_written(
    run, tmp_path, capsys, monkeypatch
):
    assert cli.main(["eval", f"run={run}", f"run_dir={tmp_path / 'elsewhere'}", "as=mine"]) == 0
    assert (tmp_path / "elsewhere/eval/mine/greedy/report.json").is_file()
    assert not (run / "eval/mine").exists()
    moved = shutil.copytree(run, tmp_path / "moved")
    monkeypatch.setattr(build, "evaluate", lambda *given: pytest.fail("it begins"))
    monkeypatch.setattr(build, "TemporaryFile", refuse)
    assert refusal(capsys, "eval", f"run={moved}") == f"run_dir: cannot write in {moved}/eval: Read-only file system"


def refuse(dir: Path) -> None:
    raise OSError(errno.EROFS, "Read-only file system")


def test_questions_that_a_model_cannot_read_are_counted(run, tmp_path, capsys):
    """One with a token a word can only answer wrong there; nothing else would say why."""
    (tmp_path / "toy.jsonl").write_text(json.dumps({"id": "1", "question": "Quo vadis?", "answers": ["Roma"]}))
    assert cli.main(["eval", f"run={run}", f"data={tmp_path / 'toy.jsonl'}", "tools=none", "as=toy"]) == 0
    assert "otcrl: 1 of 1 questions hold what the tokenizer cannot read, as 'Quo vadis?'" in capsys.readouterr().err
    assert cli.main(["eval", f"run={run}", "as=own"]) == 0
    assert "cannot read" not in capsys.readouterr().err


def test_of_a_run_that_has_not_ended_a_checkpoint_can_be_evaluated(run, tmp_path, capsys):
    stopped = shutil.copytree(run, tmp_path / "stopped")
    shutil.rmtree(stopped / "model")
    kept = sorted(int(path.name[-6:]) for path in run.glob("checkpoints/step-*"))
    expected = f"evaluate a checkpoint, step=4 (of {', '.join(map(str, kept))}), or go on with it"
    assert expected in refusal(capsys, "eval", f"run={stopped}")


def test_what_cannot_be_exported_is_one_line(run, tmp_path, capsys):
    out = f"out={tmp_path / 'out'}"
    assert refusal(capsys, "export", out) == "otcrl export needs one run directory and out=DIR, got none"
    assert refusal(capsys, "export", str(run)) == "otcrl export needs out=..."
    assert refusal(capsys, "export", str(tmp_path), out) == f"{tmp_path} is not a run directory: it has no config.yaml"
    assert refusal(capsys, "export", str(run), out, "step=9").startswith(f"step=9: {run} has no such checkpoint.")
    assert refusal(capsys, "export", str(run), f"out={run}").endswith("is there already, and not an empty directory")
    damaged = shutil.copytree(run, tmp_path / "damaged")
    (damaged / "model/config.json").write_text("{}")
    assert "/model/config.json has 2 bytes, and " in refusal(capsys, "export", str(damaged), out)
    assert not (tmp_path / "out").exists()
