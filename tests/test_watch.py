"""`otcrl watch`: what it says of a run that begins, goes on, stands still and ends."""

from __future__ import annotations

import io
import json
import os
import pty
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from otcrl import cli
from otcrl.loggers.panel import SPARKS, clock, sparkline
from otcrl.watch import read_progress, view
from tests.runs import write_run

ROOT = Path(__file__).parents[1]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_run(tmp_path / "one", steps=8, problems=2, group=2)


def shown(folder: Path, later: float = 1.0) -> str:
    screen = io.StringIO()
    Console(file=screen, width=100).print(view(read_progress(folder), time.time() + later))
    return screen.getvalue()


def test_a_run_that_goes_on_says_how_far_it_is_and_how_long_it_takes(run):
    shutil.rmtree(run / "eval")
    config = (run / "config.yaml").read_text().replace("steps: 8", "steps: 20")
    (run / "config.yaml").write_text(config)
    progress = read_progress(run)
    assert progress.step_s is not None
    assert progress.left_s == pytest.approx(12 * progress.step_s)
    text = shown(run)
    assert "step 8 of 20" in text
    assert "to go" in text
    assert "no news" not in text
    for label in ("EM", "TC", "TP", "rollout", "of calls failed or malformed", "entropy"):
        assert label in text


def test_a_run_that_stands_still_says_for_how_long(run):
    assert "no news for 1:00:00 h" in shown(run, later=3600)


def test_a_finished_run_says_so_and_shows_its_evaluations(run):
    (run / "summary.json").write_text("{}")
    text = shown(run, later=10**6)
    assert "finished" in text
    assert "no news" not in text
    assert text.index("before") < text.index("after")


def test_a_cold_start_is_followed_too(run):
    for name in ("metrics.jsonl", "transcripts.jsonl"):
        (run / name).unlink()
    (run / "config.yaml").write_text("sft: {steps: 30}\nloop: {steps: 9}\n")
    assert "starting" in shown(run)
    (run / "sft.jsonl").write_text("".join(json.dumps({"step": k, "sft/loss": 1.0}) + "\n" for k in range(6)))
    assert "cold start, step 6 of 30" in shown(run)


def test_tool_productivity_without_a_call_is_no_number(run):
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    rows[-1] |= {"calls/well_formed": 0.0}
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert "no calls" in shown(run)


def test_the_command_prints_once_where_there_is_no_terminal(run, capsys):
    assert cli.main(["watch", str(run)]) == 0
    assert "step 8 of 8" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "otcrl watch follows one run directory, got 0"),
        (["nowhere"], "there is no run nowhere"),
        (["nowhere", "every=often"], "every must be a number of seconds above 0, got 'often'"),
        (["nowhere", "--onc"], "otcrl watch has no option --onc. Did you mean '--once'?"),
    ],
)
def test_a_wrong_word_is_one_line(words, message, capsys):
    assert cli.main(["watch", *words]) == 2
    assert capsys.readouterr().err.startswith(f"otcrl: error: {message}")


def test_it_follows_a_run_to_its_end(run):
    """On a terminal: it takes in what is new, and goes when the run is finished."""
    terminal, its_side = pty.openpty()
    command = [sys.executable, "-m", "otcrl.cli", "watch", str(run), "every=0.05"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=its_side, env=os.environ | {"COLUMNS": "100", "TERM": "xterm"})
    until(terminal, "step 8 of 8")
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "time/step_s": 1.0, "reward/correct": 1.0}\n')
    until(terminal, "step 9 of 8")
    (run / "summary.json").write_text("{}")
    until(terminal, "finished")
    assert process.wait(timeout=60) == 0


def until(terminal: int, words: str) -> None:
    seen = ""
    while words not in seen:
        seen += os.read(terminal, 4096).decode(errors="replace")


# -- lines of eight heights ------------------------------------------------------------------------


@given(
    st.lists(st.none() | st.floats(-1e6, 1e6), min_size=1, max_size=200).filter(lambda v: any(x is not None for x in v))
)
def test_a_sparkline_is_as_wide_as_there_is_room_and_spans_what_it_shows(values: list[float | None]):
    line = sparkline(values, width=20)
    assert len(line) == min(20, len(values))
    assert set(line) <= set(SPARKS) | {" "}


def test_a_sparkline_rises_as_the_values_do():
    assert sparkline([0, 1, 2, 3, 4, 5, 6, 7]) == SPARKS
    assert sparkline([1.0, None, 3.0]) == "▁ █"
    assert len(set(sparkline([2.0, 2.0, 2.0]))) == 1


def test_a_clock_reads_minutes_and_hours():
    assert [clock(s) for s in (5, 65, 3600 + 125)] == ["0:05 min", "1:05 min", "1:02:05 h"]
