"""Locks one child up before it runs a program that nobody has read. Standard library only: it runs inside.

The zygote keeps CAP_SYS_ADMIN of the sandbox's own user namespace, to make pid, mount, ipc and uts namespaces for each
child; the supervisor gives every capability up, and so does the child before it is handed a program. Kernel
interfaces: capabilities(7), landlock(7), mount(2), prctl(2), seccomp(2), unshare(2).
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import signal
import struct
import sys
from collections.abc import Mapping
from dataclasses import dataclass

NEW_MOUNTS, NEW_UTS, NEW_IPC, NEW_PIDS = 0x20000, 0x4000000, 0x8000000, 0x20000000
READ_ONLY, NO_SUID, NO_DEV, NO_EXEC, REMOUNT, BIND = 1, 2, 4, 8, 32, 4096
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_SECCOMP, PR_CAPBSET_DROP, PR_SET_CHILD_SUBREAPER = 1, 4, 22, 24, 36
PR_SET_NO_NEW_PRIVS, PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL = 38, 47, 4
SECCOMP_MODE_FILTER = 2
CAPABILITY_VERSION_3 = 0x20080522
LANDLOCK_CREATE, LANDLOCK_ADD, LANDLOCK_RESTRICT = 444, 445, 446  # the same on every architecture
LANDLOCK_VERSION, LANDLOCK_PATH_BENEATH = 1, 1
FS_EXECUTE, FS_WRITE_FILE, FS_READ_FILE, FS_READ_DIR = 1, 2, 4, 8
FS_ALL = {1: (1 << 13) - 1, 2: (1 << 14) - 1, 3: (1 << 15) - 1, 5: (1 << 16) - 1}  # first ABI -> rights it knows
MAX_OPEN_FILES = 64
LAST_WORDS_BYTES = 64 << 20  # a program out of memory still needs some to say so

NO_CAPABILITIES = struct.pack("=Ii", CAPABILITY_VERSION_3, 0), bytes(24)

libc = ctypes.CDLL(None, use_errno=True)
holding_the_gil = ctypes.PyDLL(None, use_errno=True)


class Filter(ctypes.Structure):
    """`struct sock_fprog`: seccomp(2)."""

    _fields_ = (("length", ctypes.c_ushort), ("filters", ctypes.c_char_p))


def checked(result: int, what: str) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return result


def prctl(option: int, *arguments: object) -> int:
    return libc.prctl(option, *(arguments + (0,) * (4 - len(arguments))))


def fork() -> int:
    """`os.fork` without the handlers that Python then runs in the child: they repair what a second thread could have
    broken, and write to two hundred pages for it. For a process with one thread."""
    return checked(holding_the_gil.fork(), "fork")


def fork_alone(own_pids: int) -> int:
    """`fork`, the child being pid 1 of a new pid namespace. `own_pids`: an open /proc/self/ns/pid."""
    checked(libc.unshare(NEW_PIDS), "a pid namespace")
    try:
        pid = fork()
    except OSError:
        libc.setns(own_pids, NEW_PIDS)
        raise
    if pid:
        checked(libc.setns(own_pids, NEW_PIDS), "back to the own pid namespace")
    return pid


def private_namespaces(scratch: Mapping[str, int]) -> None:
    """New mount, ipc and uts namespaces, in which the `scratch` directories (-> bytes) are empty and its own."""
    checked(libc.unshare(NEW_MOUNTS | NEW_IPC | NEW_UTS), "a mount, an ipc and a uts namespace")
    for directory, size in scratch.items():
        mount(directory, NO_SUID | NO_DEV | NO_EXEC, f"size={size},nr_inodes=16384,mode=0700")


def cover_proc() -> int:
    """Nobody sees /proc from now on but through the descriptor that this returns."""
    proc = os.open("/proc", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    mount("/proc", NO_SUID | NO_DEV | NO_EXEC | READ_ONLY, "size=0,mode=0555")
    return proc


def protect_devices() -> None:
    """Their inodes are the host's: without this their mode could be changed by whoever owns them there."""
    for name in os.listdir("/dev"):
        path = f"/dev/{name}"
        if os.path.ismount(path) and not os.path.isdir(path):
            flags = os.statvfs(path).f_flag & (NO_SUID | NO_EXEC) | REMOUNT | BIND | READ_ONLY
            checked(libc.mount(None, path.encode(), None, flags, None), f"a read-only {path}")


def mount(directory: str, flags: int, options: str) -> None:
    checked(libc.mount(b"tmpfs", directory.encode(), b"tmpfs", flags, options.encode()), f"a tmpfs on {directory}")


def forgo_capabilities() -> None:
    """For the zygote, and with it for its children: what it gives up can never come back."""
    for capability in range(64):
        if prctl(PR_CAPBSET_DROP, capability) < 0:
            break  # past the last one that the kernel has
    checked(prctl(PR_SET_NO_NEW_PRIVS, 1), "no_new_privs")
    checked(prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL), "dropping ambient capabilities")


def drop_capabilities() -> None:
    """None is left."""
    checked(libc.capset(*NO_CAPABILITIES), "dropping capabilities")


def landlock_abi() -> int:
    """0 where the kernel has no Landlock."""
    return max(0, libc.syscall(LANDLOCK_CREATE, None, ctypes.c_size_t(0), ctypes.c_uint(LANDLOCK_VERSION)))


@dataclass(frozen=True)
class Landlock:
    """Reading anywhere in sight, writing beneath some directories only; no TCP, no signals to the outside."""

    attributes: bytes  # struct landlock_ruleset_attr
    rights: dict[str, bytes]  # path -> what is allowed beneath it


def landlock(abi: int, writable: Mapping[str, int]) -> Landlock:
    everything = FS_ALL[max(first for first in FS_ALL if first <= abi)]
    tcp = 3 if abi >= 4 else 0  # bind, connect
    scopes = 3 if abi >= 6 else 0  # abstract sockets, signals
    attributes = struct.pack("=QQQ", everything, tcp, scopes)[: 8 if abi < 4 else 16 if abi < 6 else 24]
    read = FS_EXECUTE | FS_READ_FILE | FS_READ_DIR
    rights = {"/": read, "/dev/null": FS_READ_FILE | FS_WRITE_FILE, **dict.fromkeys(writable, everything)}
    return Landlock(attributes, {path: struct.pack("=Q", allowed) for path, allowed in rights.items()})


def restrict_files(rules: Landlock) -> None:
    size = ctypes.c_size_t(len(rules.attributes))
    ruleset = checked(libc.syscall(LANDLOCK_CREATE, rules.attributes, size, ctypes.c_uint(0)), "a Landlock ruleset")
    for path, allowed in rules.rights.items():
        beneath = os.open(path, os.O_PATH | os.O_CLOEXEC)
        rule = allowed + beneath.to_bytes(4, sys.byteorder)
        checked(libc.syscall(LANDLOCK_ADD, ruleset, LANDLOCK_PATH_BENEATH, rule, 0), f"a Landlock rule for {path}")
        os.close(beneath)
    checked(libc.syscall(LANDLOCK_RESTRICT, ruleset, 0), "Landlock")
    os.close(ruleset)


def syscall_filter(program: bytes) -> Filter:
    """Of a BPF program: an array of `struct sock_filter`, 8 bytes each."""
    return Filter(len(program) // 8, program)


def restrict_syscalls(allowed: Filter) -> None:
    """By seccomp."""
    checked(prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.byref(allowed)), "seccomp")


def limit_for_good(file_bytes: int) -> None:
    """The limits that every child has alike and the zygote can live with."""
    lower(
        {
            resource.RLIMIT_FSIZE: (file_bytes, file_bytes),
            resource.RLIMIT_CORE: (1, 1),  # 0 would not stop a core_pattern that is a pipe: core(5)
            resource.RLIMIT_MSGQUEUE: (0, 0),
            resource.RLIMIT_MEMLOCK: (0, 0),
        }
    )


def limit_resources(*, baseline_bytes: int, memory_mb: int, cpu_s: int, threads: int) -> None:
    """A child's own; memory counts on top of what the warmed interpreter already maps."""
    memory = baseline_bytes + (memory_mb << 20)
    lower(
        {
            resource.RLIMIT_AS: (memory, memory + LAST_WORDS_BYTES),
            resource.RLIMIT_CPU: (cpu_s, cpu_s + 1),
            resource.RLIMIT_NPROC: (threads, threads),  # the kernel exempts root, hence the zygote counts as well
            resource.RLIMIT_NOFILE: (MAX_OPEN_FILES, MAX_OPEN_FILES),
        }
    )


def lower(limits: dict[int, tuple[int, int]]) -> None:
    """Each to (soft, hard), or less where it is less already."""
    for which, (soft, hard) in limits.items():
        ceiling = resource.getrlimit(which)[1]
        if ceiling != resource.RLIM_INFINITY:
            soft, hard = min(soft, ceiling), min(hard, ceiling)
        resource.setrlimit(which, (soft, hard))


def hide_memory() -> None:
    """Nobody without a capability for it may trace this process, read its memory, or open its files through /proc."""
    checked(prctl(PR_SET_DUMPABLE, 0), "hiding memory")


def die_with(parent: int) -> None:
    """The kernel ends this process when the one that forked it ends, whose pid was `parent`."""
    checked(prctl(PR_SET_PDEATHSIG, signal.SIGKILL), "a signal at the parent's death")
    if os.getppid() != parent:  # it is gone already
        os._exit(70)


def first_to_go() -> None:
    """If the machine runs out of memory, the kernel is to choose this process or its children."""
    with contextlib.suppress(OSError):
        fd = os.open("/proc/self/oom_score_adj", os.O_WRONLY)
        os.write(fd, b"1000")
        os.close(fd)
