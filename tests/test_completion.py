"""Completion offers what the commands and conf/ have; tried in the shells themselves, where they are installed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from otcrl import cli
from otcrl.completion import composed, suggestions
from otcrl.manual import COMMANDS
from otcrl.presets import groups, options, presets
from otcrl.settings import leaves

ROOT = Path(__file__).parents[1]
PRESETS = [preset.name for preset in presets()]


def offered(line: str) -> list[str]:
    return suggestions(f"otcrl {line}")


# -- what is offered --------------------------------------------------------------------------------


def test_commands_and_their_options():
    assert {f"{name} " for name in COMMANDS} <= set(offered(""))
    assert offered("tr") == ["train "]
    assert offered("train --") == ["--cfg ", "--multirun ", "--help "]
    assert offered("nonsense x") == []


def test_presets_groups_and_their_choices():
    assert offered("train conf=") == [f"conf={name} " for name in PRESETS]
    assert offered("train conf=quickstart alg") == ["algo=", "algo."]
    assert offered("train conf=quickstart algo=r") == [f"algo={n} " for n in options("algo") if n.startswith("r")]
    assert offered("train conf=quickstart scale=") == [f"scale={name} " for name in options("scale")]
    assert offered("train conf=quickstart logger=[console,t") == ["logger=[console,tensorboard"]


def test_settings_one_level_at_a_time_and_their_values():
    assert set(offered("train conf=quickstart lo")) == {"logger=", "loop.", "logger."}
    assert "loop.steps=" in offered("train conf=quickstart loop.")
    assert offered("train conf=quickstart loop.steps=") == ["loop.steps=50 "]
    assert offered("train conf=quickstart evaluate.samp") == ["evaluate.sampled=", "evaluate.samples="]
    assert offered("train conf=quickstart evaluate.sampled=") == ["evaluate.sampled=true ", "evaluate.sampled=false "]
    assert offered("train conf=quickstart learner.policy_optimizer.betas=") == [
        "learner.policy_optimizer.betas=[0.9,0.95] "
    ]


def test_the_settings_are_those_of_what_was_chosen():
    assert "algo.weighting=" in offered("train conf=quickstart algo.")
    assert "algo.value_clip=" in offered("train conf=quickstart algo=ppo algo.")
    assert "algo.value_clip=" not in offered("train conf=quickstart algo.")
    assert "engine.gpu_memory=" in offered("train conf=quickstart scale=1gpu engine.")


def test_what_the_usage_line_of_a_command_says():
    assert {"bash ", "zsh ", "fish "} <= set(offered("completion "))
    assert {"python ", "retrieval "} <= set(offered("serve "))
    assert {"build ", "info ", "check ", "eval ", "import "} <= set(offered("index "))
    assert offered("serve python port=") == ["port=8080 "]
    assert offered("table runs/x format=") == ["format=markdown ", "format=latex ", "format=csv "]
    assert offered("data nq,hot") == ["nq,hotpotqa "]
    assert offered("models ") == ["smollm2 ", "out=", "dtype="]
    assert offered("compare runs/a runs/b win") == ["window="]


def test_runs_are_offered_where_they_are_named(tmp_path, monkeypatch):
    (tmp_path / "runs/one").mkdir(parents=True)
    (tmp_path / "runs/one/config.yaml").write_text("loop: {steps: 7}\nalgo: {own: 1}\n")
    monkeypatch.chdir(tmp_path)
    assert offered("train resume=") == ["resume=auto ", "resume=never ", "resume=runs/one "]
    assert offered("eval run=") == ["run=runs/one "]
    assert offered("train resume=runs/one loop.") == ["loop.steps="]


@pytest.mark.parametrize(
    "words",
    [
        *(["conf=" + preset] for preset in PRESETS),
        *(["conf=quickstart", f"{group}={name}"] for group in ("algo", "engine") for name in options(group)),
        ["conf=quickstart", "logger=[console,wandb]"],
        ["conf=quickstart", "tools=search_python"],
        ["conf=quickstart", "scale=2x8gpus"],
    ],
    ids=" ".join,
)
def test_the_settings_are_those_that_hydra_composes(words):
    """Whatever a preset says of a group that is chosen anew is left out by both."""
    given = [*words]
    while True:  # what nobody has by default is given, one thing after another
        try:
            theirs = dict(leaves(cli.run_config(given)))
            break
        except cli.ConfigError as error:
            if "is not set: add" not in str(error):
                raise
            given.append(f"{str(error).partition(' ')[0]}=x")
    ours = dict(leaves(composed(words)))
    assert ours.keys() == theirs.keys()
    same = {name for name in ours if "${" not in str(ours[name]) and "???" not in str(ours[name])}
    typed = {word.partition("=")[0] for word in given}
    assert {n: str(ours[n]) for n in same} == {n: str(theirs[n]) for n in same - typed}


def test_it_is_quick():
    """Nothing heavy is loaded: Hydra alone would take half a second."""
    code = "import os, sys; from otcrl.cli import main; main(['completion', 'suggest']); "
    code += "assert not set(sys.modules) & {'hydra', 'omegaconf', 'torch', 'rich', 'numpy'}"
    begun = time.monotonic()
    line = {"OTCRL_LINE": "otcrl train conf=quickstart loop.st"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=os.environ | line, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "loop.steps=\n"), done.stderr
    assert time.monotonic() - begun < 5.0  # 0.2 s on an idle machine


def test_a_wrong_shell_is_one_line(capsys):
    assert cli.main(["completion", "bsh"]) == 2
    assert capsys.readouterr().err.endswith("got bsh. Did you mean 'bash'?\n")
    assert cli.main(["completion"]) == 2


# -- in the shells -----------------------------------------------------------------------------------


@pytest.fixture
def path(tmp_path) -> str:
    """A PATH on which there is the command `otcrl`."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/otcrl").write_text(f'#!/bin/sh\nexec {sys.executable} -m otcrl "$@"\n')
    (tmp_path / "bin/otcrl").chmod(0o755)
    return f"{tmp_path / 'bin'}:{os.environ['PATH']}"


BASH = """
source <(otcrl completion bash)
line=$1
COMP_LINE=$line COMP_POINT=${#line}
# what readline does: words end at blanks and at the characters of COMP_WORDBREAKS, which are words of their own
COMP_WORDS=() word=
for ((i = 0; i < ${#line}; i++)); do
    c=${line:i:1}
    case $c in
        ' ') [[ -n $word ]] && COMP_WORDS+=("$word"); word= ;;
        [=:]) [[ -n $word ]] && COMP_WORDS+=("$word"); COMP_WORDS+=("$c"); word= ;;
        *) word+=$c ;;
    esac
done
if [[ -n $word || $c == ' ' ]]; then COMP_WORDS+=("$word"); fi
COMP_CWORD=$((${#COMP_WORDS[@]} - 1))
_otcrl
printf '%s\\n' "${COMPREPLY[@]}"
"""


@pytest.mark.parametrize(
    ("line", "answers"),
    [
        ("otcrl tr", ["train "]),
        ("otcrl train conf=qui", ["quickstart "]),
        ("otcrl train conf=", [f"{name} " for name in PRESETS]),
        ("otcrl train conf=quickstart loop.st", ["loop.steps="]),
        ("otcrl train conf=quickstart evaluate.before=", ["true ", "false "]),
        ("otcrl train conf=quickstart logger=[console,wa", ["[console,wandb"]),
        ("otcrl data nq,hot", ["nq,hotpotqa "]),
    ],
)
def test_bash_completes_what_is_left_of_the_word(line, answers, path):
    own = os.environ | {"PATH": path, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(["bash", "-c", BASH, "bash", line], env=own, cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.splitlines() == answers, done.stderr


@pytest.mark.parametrize(
    ("shell", "setup"),
    [
        (["bash", "--norc", "--noprofile", "-i"], "source <(otcrl completion bash)"),
        (["zsh", "-f", "-i"], "autoload -U compinit && compinit -u -D && source <(otcrl completion zsh)"),
    ],
    ids=["bash", "zsh"],
)
def test_an_interactive_shell_completes_at_the_press_of_the_key(shell, setup, path):
    """The real one, on a terminal: TAB fills in the preset, the setting and its value, and Enter runs the line."""
    import pty

    if shutil.which(shell[0]) is None:
        pytest.skip(f"needs {shell[0]}")

    terminal, its_side = pty.openpty()
    own = os.environ | {"PATH": path, "PYTHONPATH": str(ROOT), "PS1": "$ ", "TERM": "dumb", "INPUTRC": "/dev/null"}
    running = subprocess.Popen(
        shell, env=own, cwd=ROOT, stdin=its_side, stdout=its_side, stderr=its_side, start_new_session=True
    )
    os.close(its_side)
    seen = ""

    def until(words: str) -> None:
        nonlocal seen
        while words not in seen:
            seen += os.read(terminal, 4096).decode(errors="replace")
        seen = seen.partition(words)[2]

    until("$ ")
    os.write(terminal, f"{setup}; echo rea''dy\n".encode())
    until("ready")
    os.write(terminal, b"otcrl train --cfg conf=qui\t")
    until("conf=quickstart ")
    os.write(terminal, b"loop.ste\t")
    until("loop.steps=")
    os.write(terminal, b"\t")
    until("50 ")
    os.write(terminal, b" name=typed\n")
    until("name: typed")
    running.kill()
    running.wait(timeout=10)
    os.close(terminal)


@pytest.mark.skipif(shutil.which("fish") is None, reason="needs fish")
def test_fish_completes(path):
    script = "otcrl completion fish | source; complete -C 'otcrl train conf=qui'"
    own = os.environ | {"PATH": path, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(["fish", "--no-config", "-c", script], env=own, cwd=ROOT, capture_output=True, text=True)
    assert "conf=quickstart" in done.stdout, done.stderr


def test_every_group_can_be_completed():
    for group in groups():
        assert offered(f"train conf=quickstart {group}=") == [f"{group}={name} " for name in options(group)]
