"""docs/metrics.md explains every metric that a run logs, and none that no run logs."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from otcrl import cli
from otcrl.evaluate.report import LOGGED
from otcrl.loggers.panel import SHOWN
from tests.test_bad_input import ATLAS, ROOT

ROW = re.compile(r"^\| `(\S+)` \|([^|]*)\| (.+) \|$")


def glossary() -> dict[str, tuple[str, str]]:
    """Name -> (unit, what it is). Tables of settings, whose rows have another form, are not in it."""
    rows = [ROW.match(line) for line in (ROOT / "docs/metrics.md").read_text().splitlines()]
    return {row[1]: (row[2].strip(), row[3]) for row in rows if row and "/" in row[1]}


def general(name: str) -> str:
    """The entry of a metric that has one for each data set."""
    name = re.sub(r"^calls/source/.+$", "calls/source/NAME", name)
    return re.sub(r"^eval/.+/([^/]+)$", r"eval/\1", name)


@pytest.fixture(scope="module")
def logged(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """The names that runs of the quickstart log, with a reference, and with a critic."""
    found: set[str] = set()
    for number, words in enumerate(
        (["algo.kl_coef=0.01"], ["algo=ppo", "reward=otc_ppo", "learner.old_logprobs=recompute"])
    ):
        folder = tmp_path_factory.mktemp("run") / str(number)
        assert cli.main(["train", *ATLAS, *words, "loop.transcripts_every=1", f"run_dir={folder}"]) == 0
        for file in ("metrics.jsonl", "sft.jsonl"):
            found |= {name for line in (folder / file).read_text().splitlines() for name in json.loads(line)}
    return found - {"step"}


def test_every_metric_that_a_run_logs_has_an_entry(logged):
    missing = {name for name in logged if general(name) not in glossary()}
    assert not missing, f"docs/metrics.md does not say what these are: {sorted(missing)}"
    assert len(logged) > 60


def test_every_entry_has_a_meaning_and_stands_once():
    lines = [row[1] for line in (ROOT / "docs/metrics.md").read_text().splitlines() if (row := ROW.match(line))]
    assert len(lines) == len(set(lines))
    for name, (unit, meaning) in glossary().items():
        assert meaning.strip(), name
        if name.endswith("_s"):
            assert unit == ("tokens/s" if name == "perf/tokens_per_s" else "s"), name


def test_every_entry_is_of_a_metric_that_something_logs(logged):
    """By the runs above, or by its name in the code: a metric that is gone leaves no entry behind."""
    code = "".join(path.read_text() for path in (ROOT / "otcrl").rglob("*.py") if path.name != "panel.py")
    endings = {name.rpartition("/")[2] for name in glossary() if name not in {general(known) for known in logged}}
    gone = {name for name in endings if not re.search(rf"[\"'/]{re.escape(name)}[\"':]", code)}
    assert not gone - {"NAME"}


def test_whatever_the_panel_shows_has_an_entry():
    assert {name for name in SHOWN if name} <= glossary().keys()
    assert {f"eval/{label}" for label in LOGGED.values()} <= glossary().keys()


def test_the_test_would_notice_a_metric_without_an_entry():
    assert "reward/value" in glossary()
    assert general("reward/brand_new") not in glossary()
    assert general("eval/nq/accuracy") == "eval/accuracy"
    assert general("calls/source/nq") == "calls/source/NAME"


def test_no_metric_is_named_in_two_ways():
    """Letters, digits and underscores, and slashes between them, so that every tracker can have them."""
    for name in glossary():
        assert re.fullmatch(r"[a-z]+(/[a-zA-Z0-9_]+)+", name), name


def test_the_glossary_is_reached_from_the_readme():
    assert "docs/metrics.md" in Path(ROOT / "README.md").read_text()
