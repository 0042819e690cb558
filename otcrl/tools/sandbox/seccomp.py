"""The system calls that a program may make: an allow-list, assembled into the BPF that seccomp(2) takes.

What is missing fails with EPERM. Missing on purpose: new processes and programs (a call is one process with threads,
so nothing multiplies and the kernel limits all its memory), sockets (but for socketpair, which asyncio needs), tracing
(ptrace, process_vm_*, perf_event_open), namespaces and mounts, bpf, io_uring, userfaultfd, keyrings, System V and
POSIX IPC, memfd_create (memory that no limit counts), timer_create (its SIGCONT would wake a session), kernel modules,
clocks, and whatever is newer than this file.
"""

from __future__ import annotations

import errno
import platform
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from otcrl.errors import ConfigError

ALLOWED = """
    read:0:63 write:1:64 open:2:- close:3:57 stat:4:- fstat:5:80 lstat:6:- poll:7:- lseek:8:62 mmap:9:222
    mprotect:10:226 munmap:11:215 brk:12:214 rt_sigaction:13:134 rt_sigprocmask:14:135 rt_sigreturn:15:139
    pread64:17:67 pwrite64:18:68 readv:19:65 writev:20:66 access:21:- pipe:22:- select:23:- sched_yield:24:124
    mremap:25:216 msync:26:227 mincore:27:232 madvise:28:233 dup:32:23 dup2:33:- pause:34:- nanosleep:35:101
    getitimer:36:102 alarm:37:- setitimer:38:103 getpid:39:172 sendfile:40:71 sendto:44:206 recvfrom:45:207
    sendmsg:46:211 recvmsg:47:212 shutdown:48:210 getsockname:51:204 getpeername:52:205 getsockopt:55:209
    exit:60:93 wait4:61:260 kill:62:129 uname:63:160 flock:73:32 fsync:74:82
    fdatasync:75:83 truncate:76:45 ftruncate:77:46 getdents:78:- getcwd:79:17 chdir:80:49 fchdir:81:50 rename:82:-
    mkdir:83:- rmdir:84:- creat:85:- link:86:- unlink:87:- symlink:88:- readlink:89:- chmod:90:- fchmod:91:52
    chown:92:- fchown:93:55 lchown:94:- umask:95:166 gettimeofday:96:169 getrlimit:97:163 getrusage:98:165
    sysinfo:99:179 times:100:153 getuid:102:174 getgid:104:176 geteuid:107:175 getegid:108:177 setpgid:109:154
    getppid:110:173 getpgrp:111:- setsid:112:157 getgroups:115:158 getresuid:118:148 getresgid:120:150
    getpgid:121:155 getsid:124:156 rt_sigpending:127:136 rt_sigtimedwait:128:137 rt_sigqueueinfo:129:138
    rt_sigsuspend:130:133 sigaltstack:131:132 utime:132:- mknod:133:- statfs:137:43 fstatfs:138:44
    getpriority:140:141 setpriority:141:140 sched_getparam:143:121 sched_getscheduler:145:120
    sched_get_priority_max:146:125 sched_get_priority_min:147:126 sched_rr_get_interval:148:127 arch_prctl:158:-
    setrlimit:160:164 gettid:186:178 readahead:187:213 getxattr:191:8 lgetxattr:192:9 fgetxattr:193:10
    listxattr:194:11 llistxattr:195:12 flistxattr:196:13 tkill:200:130 time:201:- futex:202:98
    sched_setaffinity:203:122 sched_getaffinity:204:123 get_thread_area:211:- epoll_create:213:- getdents64:217:61
    set_tid_address:218:96 restart_syscall:219:128 fadvise64:221:223 timer_settime:223:110
    timer_gettime:224:108 timer_getoverrun:225:109 timer_delete:226:111 clock_gettime:228:113 clock_getres:229:114
    clock_nanosleep:230:115 exit_group:231:94 epoll_wait:232:- epoll_ctl:233:21 tgkill:234:131 utimes:235:-
    waitid:247:95 openat:257:56 mkdirat:258:34 mknodat:259:33 fchownat:260:54 futimesat:261:- newfstatat:262:79
    unlinkat:263:35 renameat:264:38 linkat:265:37 symlinkat:266:36 readlinkat:267:78 fchmodat:268:53
    faccessat:269:48 pselect6:270:72 ppoll:271:73 set_robust_list:273:99 get_robust_list:274:100 splice:275:76
    tee:276:77 sync_file_range:277:84 utimensat:280:88 epoll_pwait:281:22 signalfd:282:- timerfd_create:283:85
    eventfd:284:- fallocate:285:47 timerfd_settime:286:86 timerfd_gettime:287:87 signalfd4:289:74 eventfd2:290:19
    epoll_create1:291:20 dup3:292:24 pipe2:293:59 preadv:295:69 pwritev:296:70 rt_tgsigqueueinfo:297:240
    prlimit64:302:261 getcpu:309:168 renameat2:316:276 getrandom:318:278 membarrier:324:283
    copy_file_range:326:285 preadv2:327:286 pwritev2:328:287 statx:332:291 rseq:334:293 pidfd_send_signal:424:424
    pidfd_open:434:434 close_range:436:436 openat2:437:437 faccessat2:439:439 epoll_pwait2:441:441
    futex_waitv:449:449 fchmodat2:452:452
"""  # name:number on x86_64:number on aarch64
CLONE_THREAD = 0x10000  # a new process has it not; a thread gets no namespace without a capability
IOCTLS = (0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451)  # TCGETS TIOCGWINSZ FIONREAD FIONBIO FIONCLEX FIOCLEX
PRCTLS = (1, 3, 15, 16, 21, 39, 0x53564D41)  # PDEATHSIG GET_DUMPABLE SET_NAME GET_NAME GET_SECCOMP GET_NNP SET_VMA
FCNTLS = (0, 1, 2, 3, 4, 5, 6, 7, 36, 37, 38, 1030, 1032)  # dup, flags, locks, the size of a pipe; no leases or signals
AF_UNIX = 1

LOAD, RETURN, JUMP_EQ, JUMP_GE, JUMP_ANY = 0x20, 0x06, 0x15, 0x35, 0x45
ALLOW, KILL = 0x7FFF0000, 0x80000000
REFUSE, UNKNOWN = 0x00050000 | errno.EPERM, 0x00050000 | errno.ENOSYS
NUMBER, ARCHITECTURE, ARGUMENTS = 0, 4, (16, 24)  # offsets in `struct seccomp_data`, low halves
X32_BIT = 0x40000000

Instruction = tuple[int, int, int, int]  # code, jump if true, jump if false, operand


@dataclass(frozen=True)
class Machine:
    """What differs between processors: the audit name, the column of ALLOWED, and the calls with conditions."""

    audit: int
    column: int
    clone: int
    clone3: int
    ioctl: int
    prctl: int
    fcntl: int
    socketpair: int


MACHINES = {
    "x86_64": Machine(0xC000003E, 1, clone=56, clone3=435, ioctl=16, prctl=157, fcntl=72, socketpair=53),
    "aarch64": Machine(0xC00000B7, 2, clone=220, clone3=435, ioctl=29, prctl=167, fcntl=25, socketpair=199),
}


def program(machine: str | None = None) -> bytes:
    """The filter for a processor (this one's by default): an array of `struct sock_filter`. Raises ConfigError."""
    name = platform.machine() if machine is None else machine
    if name not in MACHINES:
        raise ConfigError(f"isolation: there is no list of system calls for {name}; known: {', '.join(MACHINES)}")
    here = MACHINES[name]
    numbers = {fields[0]: fields[here.column] for fields in (word.split(":") for word in ALLOWED.split())}
    code: list[Instruction] = [
        (LOAD, 0, 0, ARCHITECTURE),
        (JUMP_EQ, 1, 0, here.audit),
        (RETURN, 0, 0, KILL),
        (LOAD, 0, 0, NUMBER),
        (JUMP_GE, 0, 1, X32_BIT),
        (RETURN, 0, 0, KILL),
        *where(here.clone3, [(RETURN, 0, 0, UNKNOWN)]),  # its flags lie in memory: the C library then uses clone
        *where(here.clone, [argument(0), (JUMP_ANY, 1, 0, CLONE_THREAD), refuse(), allow()]),
        *where(here.ioctl, one_of(1, IOCTLS)),
        *where(here.prctl, one_of(0, PRCTLS)),
        *where(here.socketpair, one_of(0, (AF_UNIX,))),
        *where(here.fcntl, one_of(1, FCNTLS)),
    ]
    code += search(steps(int(number) for number in numbers.values() if number != "-"))
    return b"".join(struct.pack("=HBBI", *instruction) for instruction in code)


def where(number: int, then: Sequence[Instruction]) -> list[Instruction]:
    """`then` for the system call `number`; it must end in a return."""
    return [(JUMP_EQ, 0, len(then), number), *then]


def one_of(index: int, values: Sequence[int]) -> list[Instruction]:
    """Allowed where an argument has one of the values."""
    tests = [(JUMP_EQ, len(values) - place, 0, value) for place, value in enumerate(values)]
    return [argument(index), *tests, refuse(), allow()]


def argument(index: int) -> Instruction:
    return (LOAD, 0, 0, ARGUMENTS[index])


def allow() -> Instruction:
    return (RETURN, 0, 0, ALLOW)


def refuse() -> Instruction:
    return (RETURN, 0, 0, REFUSE)


def steps(numbers: Iterable[int]) -> list[tuple[int, Instruction]]:
    """What happens from which system call on: refused up to the first one allowed, then allowed, refused again ..."""
    allowed = set(numbers)
    found = [(0, allow() if 0 in allowed else refuse())]
    for number in range(1, max(allowed) + 2):
        if (number in allowed) != (number - 1 in allowed):
            found.append((number, allow() if number in allowed else refuse()))
    return found


def search(among: Sequence[tuple[int, Instruction]]) -> list[Instruction]:
    """A binary search; the kernel runs it for every system call there is when it is installed."""
    if len(among) == 1:
        return [among[0][1]]
    middle = len(among) // 2
    below, above = search(among[:middle]), search(among[middle:])
    return [(JUMP_GE, len(below), 0, among[middle][0]), *below, *above]
