"""The release: a wheel and an sdist that are whole, and that train in a directory far from the checkout."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest
import yaml

import otcrl
from otcrl import cli
from tests.test_bad_input import ATLAS

ROOT = Path(__file__).parents[1]
LEFT_OUT = shutil.ignore_patterns("__pycache__", "*.egg-info")
WHOLE = ("otcrl", "conf", "docs", "examples", "tests", "constraints")

needs_build = pytest.mark.skipif(importlib.util.find_spec("build") is None, reason="needs build, of otcrl[dev]")
needs_twine = pytest.mark.skipif(importlib.util.find_spec("twine") is None, reason="needs twine, of otcrl[dev]")


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist, and the wheel that was built from it; the checkout stays as it is."""
    folder = tmp_path_factory.mktemp("release")
    source = folder / "source"
    for part in WHOLE:
        shutil.copytree(ROOT / part, source / part, ignore=LEFT_OUT)
    for path in ROOT.iterdir():
        if path.is_file() and path.name != ".git":
            shutil.copy(path, source)
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder / "dist"), str(source)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "dist"


def run(*words: str | Path, cwd: Path, timeout: float = 600) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(
        [str(word) for word in words], cwd=cwd, env=environment, capture_output=True, text=True, timeout=timeout
    )


def test_the_version_stands_in_one_place_and_everything_says_it(capsys: pytest.CaptureFixture[str]):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"otcrl {otcrl.__version__}\n"
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == otcrl.__version__
    newest = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert newest
    assert newest[1] == otcrl.__version__


@needs_build
@pytest.mark.slow
def test_wheel_and_sdist_hold_what_they_should_and_nothing_else(dist: Path):
    (wheel,), (sdist,) = dist.glob("*.whl"), dist.glob("*.tar.gz")
    assert wheel.name == f"otcrl-{otcrl.__version__}-py3-none-any.whl"
    inside = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in inside}
    assert tops == {"otcrl", f"otcrl-{otcrl.__version__}.dist-info"}, "no tests, docs or examples in site-packages"
    code = {str(path.relative_to(ROOT)) for path in (ROOT / "otcrl").rglob("*.py")}
    assert code <= set(inside)
    assert any(name.endswith("licenses/LICENSE") for name in inside)
    with tarfile.open(sdist) as archive:
        packed = {name.partition("/")[2] for name in archive.getnames()}
    assert {
        "Makefile",
        "setup.py",
        "conf/config.yaml",
        "tests/tiny.py",
        "docs/start.md",
        "examples/linear.py",
    } <= packed
    assert {"CHANGELOG.md", "CITATION.cff", "constraints/cpu.txt", "mkdocs.yml", "docs/images/otc-reward.svg"} <= packed


@needs_build
@needs_twine
@pytest.mark.slow
def test_an_index_would_take_wheel_and_sdist(dist: Path):
    done = run(sys.executable, "-m", "twine", "check", "--strict", *sorted(dist.iterdir()), cwd=dist)
    assert done.returncode == 0, done.stdout


@needs_build
@pytest.mark.slow
def test_the_wheel_trains_in_an_empty_directory(dist: Path, tmp_path: Path):
    """Its environment shares the libraries of this one: they are large, and those of its own are the next test's."""
    venv.create(tmp_path / "env", system_site_packages=True, with_pip=False)
    python = tmp_path / "env/bin/python"
    libraries = {path for path in sys.path if path.endswith("site-packages")}
    here = Path(
        run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=tmp_path).stdout.strip()
    )
    target = [sys.executable, "-m", "pip", "install", "-qq", "--no-deps", "--no-index", "--target", here]
    done = run(*target, next(dist.glob("*.whl")), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (here / "beside.pth").write_text("\n".join(sorted(libraries)))
    where = run(python, "-c", "import otcrl; print(otcrl.__file__)", cwd=tmp_path).stdout.strip()
    assert where == str(here / "otcrl/__init__.py")
    done = run(python, "-m", "otcrl", "train", *ATLAS, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "runs/quickstart/model/config.json").is_file()
    assert run(python, "-m", "otcrl", "report", "runs/quickstart", cwd=tmp_path).returncode == 0
    assert otcrl.__version__ in (tmp_path / "report.html").read_text()


@needs_build
@pytest.mark.slow
@pytest.mark.skipif("OTCRL_LONG" not in os.environ, reason="an environment of its own and a whole run: OTCRL_LONG=1")
def test_the_wheel_and_what_it_asks_for_are_enough_for_the_whole_quickstart(dist: Path, tmp_path: Path):
    venv.create(tmp_path / "env", with_pip=True)
    pip = [tmp_path / "env/bin/pip", "install", "-qq", "-c", ROOT / "constraints/cpu.txt"]
    done = run(*pip, f"{next(dist.glob('*.whl'))}[cpu]", cwd=tmp_path, timeout=3600)
    assert done.returncode == 0, done.stderr
    done = run(tmp_path / "env/bin/otcrl", "train", "conf=quickstart", cwd=tmp_path, timeout=3600)
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "runs/quickstart/summary.json").read_text())
    assert summary["after"]["em"] > 0.95
    assert summary["after"]["tc"] < 0.6 * summary["before"]["tc"]
