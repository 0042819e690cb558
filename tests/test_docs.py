"""The documentation: links lead somewhere, on GitHub and on the site, and what people are told to type is right."""

from __future__ import annotations

import importlib.util
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from otcrl import cli
from otcrl.compose import compose
from otcrl.manual import COMMANDS
from otcrl.presets import find_preset, presets

ROOT = Path(__file__).parents[1]
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [*sorted(ROOT.glob("*.md")), *DOCS, ROOT / "examples/README.md"]
FENCED = re.compile(r"^(`{3,})(.*?)^\1$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\((?P<path>[^)\s#:]*)(?:#(?P<anchor>[^)\s]*))?\)")


def prose(path: Path) -> str:
    return FENCED.sub("", path.read_text())


def anchors(path: Path) -> set[str]:
    """What GitHub calls the headings: lower case, without punctuation, a hyphen for each space."""
    headings = re.findall(r"^#+ (.+)$", prose(path), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def navigation(node: object) -> Iterator[str]:
    if isinstance(node, str):
        yield node
    elif isinstance(node, list | dict):
        for inner in node.values() if isinstance(node, dict) else node:
            yield from navigation(inner)


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_every_link_leads_to_a_file_and_a_heading(path: Path):
    for link in LINK.finditer(prose(path)):
        target = (path.parent / link["path"]) if link["path"] else path
        assert target.exists(), f"{path.name} links to {link['path']}, which is not there"
        assert not link["anchor"] or link["anchor"] in anchors(target), f"{target.name} has no #{link['anchor']}"


def test_every_page_is_linked_once_in_the_readme_and_once_in_the_navigation():
    names = sorted(path.name for path in DOCS)
    found = re.findall(r"\]\(docs/([\w-]+\.md)\)", prose(ROOT / "README.md"))
    assert sorted(found) == names, "README.md, Documentation"
    content = (ROOT / "mkdocs.yml").read_text()
    listed = [name for name in navigation(yaml.safe_load(content)["nav"]) if "/" not in name and name != "index.md"]
    assert sorted(listed) == names, "mkdocs.yml, nav"


def commands() -> Iterator[tuple[str, str]]:
    """(page, command) of each `otcrl ...` in a fenced block, comments left out."""
    for path in PAGES:
        for block in FENCED.finditer(path.read_text()):
            for line in re.sub(r"\\\n\s*", " ", block[2]).splitlines():
                if words := re.match(r"(?:\$ )?(?:[A-Z_]+=\S+ )*(otcrl \w+.*)", line.strip()):
                    yield path.name, words[1]


def test_every_command_in_the_documentation_exists():
    for page, line in commands():
        name = line.split()[1]
        assert name in COMMANDS or name == "COMMAND", f"{page}: {line}"


def test_every_setting_that_people_are_told_to_type_exists(monkeypatch: pytest.MonkeyPatch):
    """Of commands that name a shipped preset: those with files of the reader's own cannot be tried here."""
    monkeypatch.setenv("OTCRL_DATA", "DIR")
    known, tried = {preset.name for preset in presets()}, 0
    for page, line in commands():
        words = shlex.split(line, comments=True)
        named, settings = cli.take([w for w in words[2:] if "=" in w], "conf", "resume", "run", "model", "data", "as")
        if words[1] not in ("train", "sft") or named.get("conf") not in known or "..." in line or "$" in line:
            continue
        own = [setting for setting in settings if setting.split("=")[1] in ("mine", *EXAMPLES)]
        settings = [setting for setting in settings if setting not in own and "-m" not in words]
        try:
            compose(settings, preset=find_preset(named["conf"]))
        except Exception as error:
            raise AssertionError(f"{page}: {line}") from error
        tried += 1
    assert tried > 10


EXAMPLES = {path.stem for path in (ROOT / "examples").glob("*.py")}


def test_the_plots_are_those_that_the_code_draws(tmp_path: Path):
    pytest.importorskip("matplotlib", reason="needs otcrl[docs]")
    spec = importlib.util.spec_from_file_location("plots", ROOT / "docs/plots.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for drawn in module.draw(tmp_path):
        kept = ROOT / "docs/images" / drawn.name
        assert drawn.read_text() == kept.read_text(), f"{drawn.name} is out of date: python docs/plots.py"


@pytest.mark.slow
def test_the_site_builds_and_what_the_repository_holds_is_shown_in_it(tmp_path: Path):
    pytest.importorskip("mkdocs", reason="needs otcrl[docs]")
    pytest.importorskip("mkdocstrings", reason="needs otcrl[docs]")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Train LLM agents that answer right" in (tmp_path / "site/index.html").read_text()
    assert "r_tool_ppo" in (tmp_path / "site/source/otcrl/rewards/otc.py.html").read_text()
    assert "def pack" in (tmp_path / "site/reference.html").read_text().replace("<span>", "") or (
        "otcrl.types.pack" in (tmp_path / "site/reference.html").read_text()
    )
    addresses = re.findall(r'(?:src|href)="(https?://[^"]+)"', (tmp_path / "site/start.html").read_text())
    assert not [a for a in addresses if a.endswith((".js", ".css", ".woff2"))], "the site loads nothing from elsewhere"
