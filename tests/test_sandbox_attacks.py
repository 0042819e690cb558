"""An attack suite for the sandbox: tables of hostile programs, each with its exact outcome.

After every attack the same interpreter must still add one and one. `OTCRL_LONG=1` makes the leak test long.
"""

import asyncio
import base64
import os
import platform
import socket
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest

from otcrl.tools.sandbox.execution import Execution, Program, State
from otcrl.tools.sandbox.inside.supervisor import SPARES
from otcrl.tools.sandbox.pool import Pool
from tests.test_sandbox import LIMITS, has_bubblewrap, run

pytestmark = pytest.mark.skipif(not has_bubblewrap(), reason="bubblewrap cannot make namespaces here")
x86_64 = pytest.mark.skipif(platform.machine() != "x86_64", reason="the numbers are those of x86_64")

RAW = """
import ctypes, errno, os
libc = ctypes.CDLL(None, use_errno=True)

def raw(number, *arguments):
    longs = [a if isinstance(a, bytes) or a is None else ctypes.c_ulong(a) for a in arguments]
    return "allowed" if libc.syscall(number, *longs) >= 0 else errno.errorcode[ctypes.get_errno()]

def refused(attempt, *arguments):
    try:
        attempt(*arguments)
        return "allowed"
    except OSError as error:
        return errno.errorcode[error.errno]
"""
FORGE = """
import os, struct

def forge(report, length=None):
    os.write(4, struct.pack(">I", len(report) if length is None else length) + report.encode())
"""
TICKS = """
import os, signal, threading, time
gap, last = 0, time.monotonic()

def tick():
    global gap, last
    while True:
        now = time.monotonic()
        gap, last = max(gap, now - last), now
        time.sleep(0.005)

threading.Thread(target=tick, daemon=True).start()
"""  # the longest time that the process stood still


@dataclass(frozen=True, kw_only=True)
class Attack:
    """`out` and `value` are exact, `err` is a fragment."""

    code: str
    state: State
    out: str | None
    err: str
    value: str | None
    limits: dict[str, Any] = field(default_factory=dict)


def attack(
    name: str,
    code: str,
    state: State = State.OK,
    *,
    out: str | None = None,
    err: str = "",
    value: str | None = None,
    **limits: Any,
) -> Any:
    return pytest.param(Attack(code=dedent(code), state=state, out=out, err=err, value=value, limits=limits), id=name)


def loops(name: str, code: str, state: State = State.TIMEOUT, **expected: Any) -> Any:
    return attack(name, code, state, timeout_s=0.3, **expected)


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    shared = Pool(1, ["math"], "bubblewrap")
    yield shared
    asyncio.run(shared.close())


def play(pool: Pool, code: str, **limits: Any) -> Execution:
    return asyncio.run(pool.run(Program(code=code, **LIMITS | limits)))


def repel(pool: Pool, attacked: Attack) -> None:
    """The outcome is as expected, and the pool works on."""
    done = play(pool, attacked.code, **attacked.limits)
    assert done.state is attacked.state, done
    assert attacked.out is None or done.stdout == attacked.out, done
    assert attacked.value is None or done.value == attacked.value, done
    assert attacked.err in done.stderr, done
    assert run(pool, "1 + 1").value == "2"


# -- taking everything --------------------------------------------------------------------------------

BOMBS = [
    attack("forks", "import os\nwhile True: os.fork()", State.ERROR, err="PermissionError"),
    attack("forks for ever", "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass", State.TIMEOUT,
           timeout_s=0.3),
    attack("programs", "import subprocess\nsubprocess.Popen(['x'])", State.ERROR, err="PermissionError"),
    attack("pools of processes", "import multiprocessing\nmultiprocessing.Pool(2)", State.ERROR, err="FileNotFound"),
    attack(
        "threads",
        """
        import threading, time
        while True:
            try: threading.Thread(target=time.sleep, args=(60,)).start()
            except RuntimeError: pass
        """,
        State.THREADS,
        memory_mb=4096,
    ),
    attack("heap", "x = []\nwhile True: x.append(bytearray(1 << 20))", State.MEMORY, err="MemoryError\n"),
    attack("one allocation", "x = bytearray(1 << 40)", State.MEMORY, err="MemoryError\n"),
    attack(
        "anonymous mmap",
        "import mmap\nx = []\nwhile True: x.append(mmap.mmap(-1, 1 << 20))",
        State.ERROR,
        err="Cannot allocate memory\n",
    ),
    attack(
        "limit raised",
        """
        import resource
        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (hard, 1 << 40))
        """,
        State.ERROR,
        err="ValueError: not allowed to raise maximum limit\n",
    ),
    attack("many in /tmp", "for i in range(99): open(f'{i}', 'wb').write(bytes(1 << 20))", State.ERROR, err="No space"),
    attack("/tmp", "while True: open('/tmp/x', 'ab').write(bytes(1 << 20))", State.ERROR, err="too large"),
    attack("/dev/shm", "open('/dev/shm/x', 'wb')", State.ERROR, err="FileNotFoundError"),
    attack("inodes", "for i in range(20000): open(str(i), 'w').close()", State.ERROR, err="No space left"),
    attack("sparse file", "open('x', 'wb').truncate(1 << 40)", State.ERROR, err="File too large\n"),
    attack(
        "mapped files",
        """
        import mmap
        maps = []
        for name in "ab":
            file = open(name, "w+b")
            file.truncate(60 << 20)
            maps.append(mmap.mmap(file.fileno(), 0))
        for each in maps:
            for at in range(0, 60 << 20, 4096): each[at] = 1
        """,
        State.SIGNAL,
    ),
    attack("pipes", "import os\nwhile True: os.pipe()", State.ERROR, err="Too many open files\n"),
    attack("descriptors", "import os\nwhile True: os.dup(0)", State.ERROR, err="Too many open files\n"),
    attack("bigger pipe", "import fcntl\nfcntl.fcntl(1, 1031, 1 << 20)", State.ERROR, err="Operation not permitted\n"),
    loops("Python's stack", "import sys\nsys.setrecursionlimit(1 << 30)\nf = lambda: f()\nf()", memory_mb=4096),
    attack(
        "C's stack",
        "import sys\nsys.setrecursionlimit(1 << 30)\nx = []\nfor _ in range(1_000_000): x = [x]\nrepr(x)",
        State.SIGNAL,
    ),
    loops("regular expression", "import re\nre.match('(a+)+$', 'a' * 50 + 'b')"),
    loops("power", "9 ** 9 ** 9"),
    loops("sum", "sum(range(1 << 60))"),
    loops("search", "import itertools\n'a' in itertools.repeat('b')"),
    loops("sleep", "import time\ntime.sleep(60)"),
    loops("lock", "import threading\nlock = threading.Lock()\nlock.acquire()\nlock.acquire()"),
    loops("locks in a thread", "import threading\nthreading.Thread(target=threading.Event().wait).start()"),
    loops("reading a pipe", "import os\nos.read(os.pipe()[0], 1)"),
    loops("opening a fifo", "import os\nos.mkfifo('x')\nopen('x')"),
    loops("fetching a fifo", "import os\nos.mkfifo('x')", fetch=("x",)),
    loops("atexit", "import atexit\n@atexit.register\ndef f():\n    print('bye')\n    while True: 1", out="bye\n"),
    loops("own CPU limit", "import resource\nresource.setrlimit(resource.RLIMIT_CPU, (0, 0))\nwhile True: pass"),
    attack(
        "own CPU limit, well before the time limit",
        "import resource\nresource.setrlimit(resource.RLIMIT_CPU, (1, 1))\nwhile True: pass",
        State.TIMEOUT,  # not KILLED, which would blame the machine and run it twice
        timeout_s=3.0,
    ),
]  # fmt: skip


@pytest.mark.parametrize("bomb", BOMBS)
def test_a_bomb_hurts_nobody_else(pool: Pool, bomb: Attack):
    repel(pool, bomb)


# -- output -------------------------------------------------------------------------------------------

EVERY_BYTE = bytes(range(256)).decode(errors="replace")
OUTPUTS = [
    attack("flood", "import os\nwhile True: os.write(1, bytes(1 << 20))", State.OUTPUT, out="\0" * 16000),
    attack("flood of errors", "import os\nwhile True: os.write(2, bytes(1 << 20))", State.OUTPUT, out=""),
    attack("every byte", "import os\nos.write(1, bytes(range(256)))\nNone", out=EVERY_BYTE),
    attack("ends kept", "import sys\nsys.stdout.write('a' * 99 + 'b' * 99)\nNone", out="a" * 9 + "b" * 9, max_bytes=9),
    attack("cut letters", "print('€' * 9, end='')", out="€\ufffd€", max_bytes=4),
    attack("escapes", r"print('\x1b[2J\x1b]0;title\x07\0\r')", out="\x1b[2J\x1b]0;title\x07\0\r\n"),
    attack("lone surrogate", r"print('\ud800')", State.ERROR, out="", err="surrogates not allowed\n"),
    attack("stdout closed", "import os\nos.close(1)\n7", value="7", out=""),
    attack("stderr closed", "import os\nos.close(2)\n1 / 0", State.ERROR, out=""),
    attack("stdout swapped", "import io, sys\nsys.stdout = io.StringIO()\nprint(1)\n7", value="7", out=""),
    attack("stdout no stream", "import sys\nsys.stdout = []\n7", value="7", out=""),
    attack("stdout gone", "import sys\ndel sys.stdout, sys.stderr\n7", value="7", out=""),
    attack("all closed", "import os\nos.closerange(0, 1024)\n7", value="", out=""),
    attack("null on everything", "import os\nfor i in range(1, 5): os.dup2(0, i)\n7", value="", out=""),
    attack("stderr into stdout", "import os\nos.dup2(1, 2)\n1 / 0", State.ERROR, err=""),
    attack("atexit", "import atexit\natexit.register(print, 'bye')\nprint('hi')", out="hi\nbye\n"),
    attack("atexit raises", "import atexit\natexit.register(lambda: 1 / 0)\n7", value="7", err="ZeroDivisionError"),
]


@pytest.mark.parametrize("output", OUTPUTS)
def test_output_is_what_was_written(pool: Pool, output: Attack):
    repel(pool, output)


# -- source -------------------------------------------------------------------------------------------

SOURCES = [
    attack("10 MB of comment", "#" * (10 << 20) + "\n7", value="7"),
    attack("10 MB of text", f"x = '{'é' * (5 << 20)}'\nlen(x)", value=str(5 << 20)),
    attack("10 MB of statements", "x = 1\n" * ((10 << 20) // 6), State.MEMORY),
    attack("parentheses", "(" * 100_000 + ")" * 100_000, State.ERROR, err="SyntaxError: too many nested parentheses"),
    attack("minuses", "-" * 100_000 + "1", State.MEMORY),
    attack("a sum", "1" + "+1" * 100_000, State.ERROR, err="RecursionError"),
    attack("attributes", "x" + ".x" * 100_000, State.ERROR, err="RecursionError"),
    attack("blocks", "".join(" " * i + "if 1:\n" for i in range(101)), State.ERROR, err="IndentationError: too many"),
    attack("null byte", "1\0", State.ERROR, err="source code string cannot contain null bytes\n"),
    attack("lone surrogate", "x = '\ud800'", State.ERROR, err="surrogates not allowed\n"),
    attack("escape", "\x1b[2J", State.ERROR, err="SyntaxError: invalid non-printable character U+001B"),
    attack("syntax", "x = = 1", State.ERROR, err="SyntaxError: invalid syntax\n"),
    attack("encoding", "# coding: utf-7\n+AHgAeA-", State.ERROR, err="SyntaxError: invalid syntax\n"),
    attack("a number too long", "1" * 5000, State.ERROR, err="Exceeds the limit (4300 digits)"),
    attack("nothing", "", value=""),
    attack("no return", "return 1", State.ERROR, err="SyntaxError: 'return' outside function\n"),
    attack("await", "await x", State.ERROR, err="SyntaxError"),
]


@pytest.mark.parametrize("source", SOURCES)
def test_any_source_has_an_outcome(pool: Pool, source: Attack):
    repel(pool, source)


# -- results and ends ---------------------------------------------------------------------------------

DEFINE = "class Value:\n    def __repr__(self): "
VALUES = [
    attack("repr raises", DEFINE + "1 / 0\nValue()", State.ERROR, err="ZeroDivisionError: division by zero\n"),
    attack("repr exits", DEFINE + "import os; os._exit(5)\nValue()", State.ERROR, value=""),
    attack("repr loops", DEFINE + "\n        while True: pass\nValue()", State.TIMEOUT, timeout_s=0.3),
    attack("repr recurses", DEFINE + "return repr(self)\nValue()", State.ERROR, err="RecursionError"),
    attack("repr is no text", DEFINE + "return 1\nValue()", State.ERROR, err="TypeError: __repr__ returned non-string"),
    attack("repr is huge", "'x' * 10_000_000", value="'" + "x" * 15998 + "'"),
    attack("repr is a surrogate", DEFINE + "return chr(0xd800)\nValue()", value="?"),
    attack("repr lies on length", "class S(str): __len__ = lambda s: 1 << 62\n" + DEFINE + "return S('x')\nValue()"),
    attack("a pickle that exits", "class P:\n    def __reduce__(self): import os; os._exit(5)\n[P()] and 7", value="7"),
    attack("contains itself", "x = []\nx.append(x)\nx", value="[[...]]"),
    attack("exception hides", "class E(Exception):\n    def __str__(self): 1 / 0\nraise E", State.ERROR, err="E: <exc"),
    attack("exception exits", "class E(Exception):\n    def __str__(self): import os; os._exit(0)\nraise E", State.OK,
           value=""),
    attack("exception of its own type", "class M(type):\n    __qualname__ = property(lambda c: 1 / 0)\n"
           "class E(Exception, metaclass=M): pass\nraise E", State.ERROR),
    attack("sys.exit()", "import sys\nsys.exit()"),
    attack("sys.exit(256)", "import sys\nsys.exit(256)"),
    attack("sys.exit(-1)", "import sys\nsys.exit(-1)", State.ERROR),
    attack("sys.exit(2 ** 70 + 1)", "import sys\nsys.exit(2 ** 70 + 1)", State.ERROR),
    attack("sys.exit('why')", "import sys\nsys.exit('why')", State.ERROR, err="why\n"),
    attack("sys.exit([])", "import sys\nsys.exit([])", State.ERROR, err="[]\n"),
    attack("raise SystemExit", "raise SystemExit(3)", State.ERROR),
    attack("raise KeyboardInterrupt", "raise KeyboardInterrupt", State.ERROR, err="KeyboardInterrupt"),
    attack("raise GeneratorExit", "raise GeneratorExit", State.ERROR, err="GeneratorExit"),
    attack("os._exit(0)", "import os\nprint('x')\nos._exit(0)", out="x\n", value=""),
    attack("os._exit(3)", "import os\nos._exit(3)", State.ERROR),
    attack("exec", "import os\nos.execv('/python/bin/python3', ['x'])", State.ERROR, err="PermissionError"),
    attack("segmentation fault", "import ctypes\nctypes.string_at(0)", State.SIGNAL),
    attack("_exit taken away", "import os\nos._exit = print\n7", value="7"),
    attack("_exit taken away, raises", "import os\nos._exit = print\nos.close(4)", State.ERROR),
    attack("write taken away", "import os\nos.write = lambda *a: 1 / 0\n7", value=""),
]  # fmt: skip


@pytest.mark.parametrize("value", VALUES)
def test_any_result_has_an_outcome(pool: Pool, value: Attack):
    repel(pool, value)


LOOP = "\nwhile True: pass"
FORGERIES = [
    loops("garbage", "import os\nos.write(4, b'garbage')" + LOOP, value=""),
    loops("too long a report", "import os\nos.write(4, b'\\xff' * 4)" + LOOP, value=""),
    loops("without end", "import os\nos.write(4, b'\\xff' * 4)\nwhile True: os.write(4, bytes(65536))", value=""),
    loops("requests closed", "import os\nos.close(3)" + LOOP),
    loops("own request", "import os\nos.write(3, b'x')", State.ERROR, err="Bad file descriptor\n"),
    attack("no report", "import os\nos.write(4, bytes(4))" + LOOP, State.ERROR, value=""),
    *(
        attack(f"report is {text[:20]}", FORGE + f"forge({text!r})" + LOOP, State.ERROR, value="")
        for text in ("{", "[]", "null", "NaN", "{}", '"code"', "[" * 100_000, '{"code": {}}', "\x00\x1b")
    ),
    *(
        attack(f"report says {name}", FORGE + f"forge({text!r})" + LOOP, State.ERROR, value="")
        for name, text in {
            "endless code": '{"code": Infinity, "value": "", "cut": 0, "files": {}}',
            "endless cut": '{"code": 0, "value": "", "cut": 1e999, "files": {}}',
            "files is text": '{"code": 0, "value": "", "cut": 0, "files": "x"}',
            "killed": '{"code": -9, "value": "", "cut": 0, "files": {}}',
            "timeout": '{"code": -24, "value": "", "cut": 0, "files": {}}',
        }.items()
    ),
    attack(
        "its own value",  # a lie about itself is believed
        FORGE + """forge('{"code": 0, "value": "7", "cut": 0, "files": {}}')""" + LOOP,
        value="7",
    ),
    attack(
        "a value that is too long",
        FORGE + """forge('{"code": 0, "value": "%s", "cut": 0, "files": {}}' % ("x" * 100_000))""" + LOOP,
        value="x" * 16000,
    ),
]


@pytest.mark.parametrize("forgery", FORGERIES)
def test_a_forged_report_is_of_no_use(pool: Pool, forgery: Attack):
    repel(pool, forgery)


def test_a_forged_report_kills_no_session(pool: Pool):
    """Whatever it says, the interpreter that reads it lives on."""
    play(pool, "x = 1", session="bystander")
    for code, cut in (("Infinity", "0"), ("0", "Infinity"), ("1e999", "0"), ("-9", "0")):
        play(pool, FORGE + f"""forge('{{"code": {code}, "value": "", "cut": {cut}, "files": {{}}}}')""" + LOOP)
    assert play(pool, "x", session="bystander").value == "1"
    asyncio.run(pool.end("bystander"))


def test_only_files_that_were_asked_for_come_back(pool: Pool):
    forged = FORGE + """forge('{"code": 0, "value": "", "cut": 0, "files": {"a": "eA==", "../b": "eA=="}}')"""
    assert dict(play(pool, forged + LOOP, fetch=("a",)).files) == {"a": "eA=="}


def test_what_comes_back_can_be_encoded(pool: Pool):
    forged = FORGE + r"""forge('{"code": 0, "value": "\\ud800", "cut": 0, "files": {}}')"""
    assert play(pool, forged + LOOP).value.encode() == b"?"


def test_a_fetched_link_leads_nowhere(pool: Pool):
    code = "import os\nos.symlink('/etc/passwd', 'a')\nos.symlink('/dev/zero', 'b')\nos.symlink('.', 'c')"
    assert dict(play(pool, code, fetch=("a", "b", "c", "/proc/1/environ", "../../etc/passwd")).files) == {}


def test_a_file_placed_beside_the_working_directory_is_refused(pool: Pool):
    done = play(pool, "1", files={"../usr/lib/x": base64.b64encode(b"x").decode()})
    assert done.state is State.ERROR
    assert run(pool, "1 + 1").value == "2"


# -- signals and processes ----------------------------------------------------------------------------

EVERY_SIGNAL = """
import os, signal
for number in range(1, 65):
    try: signal.signal(number, {handler})
    except (OSError, ValueError): pass
"""
SIGNALS = [
    loops("ignores everything", EVERY_SIGNAL.format(handler="signal.SIG_IGN") + LOOP),
    loops("catches everything", EVERY_SIGNAL.format(handler="lambda *a: None") + LOOP),
    loops("blocks everything", "import signal\nsignal.pthread_sigmask(signal.SIG_BLOCK, range(1, 65))" + LOOP),
    attack(
        "sends itself everything",
        "import os\nfor s in (*range(1, 32), *range(34, 65)):\n    os.kill(1, s) if s not in (2,) else 0\n'alive'",
        value="'alive'",
    ),
    attack("kill(-1)", "import os\nos.kill(-1, 9)", State.ERROR, err="ProcessLookupError"),
    attack("kill(0)", "import os\nos.kill(0, 9)\n'alive'", value="'alive'"),
    attack("killpg(parent)", "import os\nos.killpg(os.getppid(), 9)\n'alive'", value="'alive'"),
    attack(
        "other pids",
        """
        import os
        found = []
        for pid in range(2, 5000):
            try: os.kill(pid, 0); found.append(pid)
            except ProcessLookupError: pass
        found
        """,
        value="[]",
    ),
    attack("seen by others", "import os\nos.getpid(), os.getppid(), os.getpgid(0), os.getsid(0)", value="(1, 0, 1, 1)"),
]


@pytest.mark.parametrize("signals", SIGNALS)
def test_a_signal_reaches_nobody_outside(pool: Pool, signals: Attack):
    repel(pool, signals)


# -- files --------------------------------------------------------------------------------------------

HIDDEN = """
    /proc/1/environ /proc/1/root/etc/passwd /proc/self/mem /proc/self/environ /proc/self/exe /proc/self/fd/0
    /proc/self/root /proc/thread-self/ns/user /proc/kcore /proc/sys/kernel/core_pattern /proc/sysrq-trigger
    /proc/version /sys/kernel /sys/fs/cgroup /dev/mem /dev/kmsg /dev/fuse /dev/kvm /dev/sda /dev/vda /dev/tty
    /dev/pts/0 /dev/ptmx /dev/stdin /dev/fd/0 /dev/mqueue /etc/hostname /etc/resolv.conf /etc/ssl /run
    /run/secrets /root /home /var /mnt /opt /srv /boot /bin /sbin /usr/bin /usr/local /oldroot /newroot
    /tmp/../etc/passwd /var/run/docker.sock
""".split()


@pytest.mark.parametrize("path", HIDDEN)
def test_it_is_not_there(pool: Pool, path: str):
    assert run(pool, RAW + f"refused(os.stat, {path!r}), refused(open, {path!r})").value == "('ENOENT', 'ENOENT')"
    assert run(pool, "1 + 1").value == "2"


def test_a_host_file_is_not_there(pool: Pool, tmp_path: Path):
    (tmp_path / "secret").write_text("secret")
    for path in (tmp_path / "secret", tmp_path, Path(__file__)):
        assert run(pool, RAW + f"refused(os.stat, {str(path)!r})").value == "'ENOENT'"


TOUCHES = {
    "make a folder": "os.mkdir, '/usr/lib/x'",
    "make a folder in /": "os.mkdir, '/x'",
    "make a folder in /proc": "os.mkdir, '/proc/x'",
    "make a folder in /dev": "os.mkdir, '/dev/x'",
    "rename": "os.rename, '/python/lib', '/python/lob'",
    "delete": "os.unlink, '/python/bin/python3'",
    "delete the sandbox": "os.unlink, '/sandbox/otcrl/tools/sandbox/inside/zygote.py'",
    "write the sandbox": "open, '/sandbox/otcrl/tools/sandbox/inside/zygote.py', 'r+'",
    "write the library": "open, os.__file__, 'r+b'",
    "truncate": "os.truncate, '/python/bin/python3', 0",
    "change the mode": "os.chmod, '/python/bin/python3', 0o777",
    "change the mode of /": "os.chmod, '/', 0o777",
    "change the time": "os.utime, '/python/bin/python3'",
    "change the owner": "os.chown, '/python/bin/python3', 65534, 65534",
    "write through a link": "os.symlink('/usr/lib/x', '/tmp/x') or open, '/tmp/x', 'w'",
    "link a folder away": "os.symlink('/usr/lib', '/tmp/l') or open, '/tmp/l/x', 'w'",
    "hard link": "os.link, '/python/bin/python3', '/tmp/x'",
    "hard link of a device": "os.link, '/dev/null', '/tmp/x'",
    "rename out": "open('/tmp/x', 'w') and os.rename, '/tmp/x', '/usr/lib/x'",
    "nameless file": "os.open, '/usr/lib', os.O_TMPFILE | os.O_RDWR",
    "device": "os.mknod, '/tmp/x', 0o20666, os.makedev(1, 1)",
    "disk": "os.mknod, '/tmp/x', 0o60666, os.makedev(8, 0)",
    "replace a device": "os.unlink, '/dev/null'",
    "run from /tmp": "__import__('shutil').copy('/python/bin/python3', '/tmp/x') and os.execv, '/tmp/x', ['x']",
    "become another": "os.setuid, 0",
    "join a group": "os.setgroups, [0]",
}


@pytest.mark.parametrize("touch", TOUCHES.values(), ids=TOUCHES)
def test_it_cannot_be_touched(pool: Pool, touch: str):
    assert run(pool, RAW + f"refused({touch})").value in ("'EROFS'", "'EACCES'", "'EPERM'", "'EXDEV'")
    assert run(pool, "1 + 1").value == "2"


@pytest.mark.parametrize("device", ["null", "zero", "full", "random", "urandom"])
def test_the_hosts_devices_cannot_be_changed(pool: Pool, device: str):
    """They are the host's own inodes. Nothing changes here even where it could: it is set to what it was."""
    code = f"""
path = "/dev/{device}"
was = os.stat(path)
refused(os.chmod, path, was.st_mode & 0o777), refused(lambda: os.utime(path, ns=(was.st_atime_ns, was.st_mtime_ns)))
"""
    assert run(pool, RAW + code).value == "('EROFS', 'EROFS')"


def test_native_code_cannot_be_loaded_from_tmp(pool: Pool):
    code = "import _ctypes, ctypes, shutil\nshutil.copy(_ctypes.__file__, '/tmp/x.so')\nctypes.CDLL('/tmp/x.so')"
    assert "failed to map segment" in run(pool, code).stderr


def test_every_descriptor_is_its_own(pool: Pool):
    code = """
import os, stat
found = {}
for fd in range(1024):
    try: mode = os.fstat(fd).st_mode
    except OSError: continue
    found[fd] = "pipe" if stat.S_ISFIFO(mode) else "null" if os.fstat(fd).st_rdev == os.makedev(1, 3) else oct(mode)
found
"""
    assert run(pool, code).value == "{0: 'null', 1: 'pipe', 2: 'pipe', 3: 'pipe', 4: 'pipe'}"
    assert play(pool, code, stdin="x").value.startswith("{0: '0o100755', 1: 'pipe', 2")


def test_the_environment_names_nothing_of_the_host(pool: Pool):
    known = run(pool, "import os\nsorted(os.environ.values())").value
    for secret in (str(Path.home()), os.environ["PATH"], str(Path(__file__).parents[1]), socket.gethostname()):
        assert secret not in known
    assert run(pool, "import os, socket\nos.uname().nodename, socket.gethostname()").value == "('sandbox', 'sandbox')"


# -- system calls -------------------------------------------------------------------------------------

REFUSED = """
    ptrace:101 process_vm_readv:310 process_vm_writev:311 kcmp:312 memfd_create:319 memfd_secret:447
    open_by_handle_at:304 name_to_handle_at:303 setns:308 seccomp:317 landlock_create_ruleset:444 quotactl:179
    reboot:169 swapon:167 swapoff:168 sethostname:170 setdomainname:171 shmget:29 shmat:30 semget:64 msgget:68
    mq_open:240 personality:135 bpf:321 io_uring_setup:425 io_uring_enter:426 keyctl:250 add_key:248
    request_key:249 userfaultfd:323 perf_event_open:298 init_module:175 finit_module:313 delete_module:176
    clock_settime:227 settimeofday:164 adjtimex:159 clock_adjtime:305 mount:165 umount2:166 pivot_root:155
    chroot:161 unshare:272 open_tree:428 move_mount:429 fsopen:430 fsconfig:431 fsmount:432 fspick:433
    mount_setattr:442 socket:41 connect:42 accept:43 bind:49 listen:50 setsockopt:54 setuid:105 setgid:106
    setgroups:116 setresuid:117 setfsuid:122 capset:126 iopl:172 ioperm:173 kexec_load:246 kexec_file_load:320
    acct:163 syslog:103 vhangup:153 pidfd_getfd:438 process_madvise:440 fanotify_init:300 inotify_init:253
    inotify_init1:294 move_pages:279 mbind:237 uselib:134 modify_ldt:154 setxattr:188 fsetxattr:190 pkey_alloc:330
    vmsplice:278 sched_setscheduler:144 ioprio_set:251 mlock:149 mlockall:151 set_mempolicy:238
    lsm_set_self_attr:460 statmount:457 unknown:1000
""".split()
NAMESPACES = {
    "mount": 0x20000, "cgroup": 0x2000000, "uts": 0x4000000, "ipc": 0x8000000, "user": 0x10000000, "pid": 0x20000000,
    "net": 0x40000000,
}  # fmt: skip
OTHER_CALLS = {
    "unshare time": ("272, 0x80", "EPERM"),
    **{f"unshare {name}": (f"272, {flag}", "EPERM") for name, flag in NAMESPACES.items()},
    **{f"clone {name}": (f"56, {flag | 17}, 0, 0, 0, 0", "EPERM") for name, flag in NAMESPACES.items()},
    "clone user, high bits set": (f"56, {1 << 40 | NAMESPACES['user'] | 17}, 0, 0, 0, 0", "EPERM"),
    "clone as a sibling": ("56, 0x8000 | 17, 0, 0, 0, 0", "EPERM"),
    "clone3": ("435, bytes(88), 88", "ENOSYS"),
    "TIOCSTI": ("16, 0, 0x5412, b'x'", "EPERM"),
    "TIOCSTI, high bits set": ("16, 0, 0x5412 | 1 << 32, b'x'", "EPERM"),
    "TIOCLINUX": ("16, 0, 0x541C, b'x'", "EPERM"),
    "adding entropy": ("16, os.open('/dev/urandom', os.O_RDONLY), 0x40085203, bytes(16)", "EPERM"),
    "freezing a file system": ("16, os.open('/usr/lib', os.O_RDONLY), 0xC0045877, 0", "EPERM"),
    "file flags": ("16, os.open('/tmp', os.O_RDONLY), 0x40086602, bytes(8)", "EPERM"),
    "dumpable again": ("157, 4, 1, 0, 0, 0", "EPERM"),
    "no seccomp": ("157, 22, 0, 0, 0, 0", "EPERM"),
    "keeping capabilities": ("157, 8, 1, 0, 0, 0", "EPERM"),
    "subreaper": ("157, 36, 1, 0, 0, 0", "EPERM"),
    "internet socket pair": ("53, 2, 1, 0, bytes(8)", "EPERM"),
    "a lease on a host file": ("72, os.open('/python/bin/python3', os.O_RDONLY), 1024, 0", "EPERM"),
    "news of a host folder": ("72, os.open('/usr/lib', os.O_RDONLY), 1026, 1", "EPERM"),
}


@x86_64
@pytest.mark.parametrize("name", REFUSED)
def test_a_system_call_is_refused(pool: Pool, name: str):
    number = name.partition(":")[2]
    assert run(pool, RAW + f"raw({number}, 0, 0, 0, 0, 0)").value == "'EPERM'"
    assert run(pool, "1 + 1").value == "2"


@x86_64
@pytest.mark.parametrize(("arguments", "expected"), OTHER_CALLS.values(), ids=OTHER_CALLS)
def test_a_system_call_is_refused_by_its_arguments(pool: Pool, arguments: str, expected: str):
    assert run(pool, RAW + f"signal = __import__('signal').signal(29, 1)\nraw({arguments})").value == repr(expected)
    assert run(pool, "1 + 1").value == "2"


@x86_64
@pytest.mark.parametrize("number", [0x40000000 | 39, 0x40000000 | 101, 0x40000000 | 520, -1, 1 << 31])
def test_another_abi_kills(pool: Pool, number: int):
    done = run(pool, f"import ctypes\nctypes.CDLL(None).syscall(ctypes.c_long({number}))")
    assert (done.state, done.code) == (State.SIGNAL, 31)  # SIGSYS
    assert run(pool, "1 + 1").value == "2"


@x86_64
def test_a_32_bit_call_kills(pool: Pool):
    code = r"""
import ctypes, mmap
page = mmap.mmap(-1, 4096, prot=7)
page.write(b"\xb8\x14\x00\x00\x00\xcd\x80\xc3")  # mov eax, 20 (getpid); int 0x80; ret
ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(page)))()
"""
    done = run(pool, code)
    assert (done.state, done.code) in ((State.SIGNAL, 31), (State.SIGNAL, 11))  # 11: a kernel without 32-bit calls
    assert run(pool, "1 + 1").value == "2"


def test_a_crash_goes_to_no_handler_of_the_host(pool: Pool):
    """A core limit of 0 does not stop a core_pattern that is a pipe (apport, systemd-coredump); 1 does: core(5)."""
    assert run(pool, "import resource\nresource.getrlimit(resource.RLIMIT_CORE)").value == "(1, 1)"


# -- network ------------------------------------------------------------------------------------------

SOCKETS = {
    "inet": "socket.AF_INET, socket.SOCK_STREAM",
    "inet datagram": "socket.AF_INET, socket.SOCK_DGRAM",
    "inet6": "socket.AF_INET6, socket.SOCK_STREAM",
    "unix": "socket.AF_UNIX, socket.SOCK_STREAM",
    "unix datagram": "socket.AF_UNIX, socket.SOCK_DGRAM",
    "raw": "socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP",
    "ping": "socket.AF_INET, socket.SOCK_DGRAM, socket.IPPROTO_ICMP",
    "netlink": "16, socket.SOCK_RAW, 0",
    "packet": "17, socket.SOCK_RAW, 768",
    "vsock": "40, socket.SOCK_STREAM",
    "crypto": "38, socket.SOCK_SEQPACKET",
    "can": "29, socket.SOCK_RAW, 1",
    "xdp": "44, socket.SOCK_RAW",
}


@pytest.mark.parametrize("kind", SOCKETS.values(), ids=SOCKETS)
def test_no_socket_opens(pool: Pool, kind: str):
    assert run(pool, RAW + f"import socket\nrefused(socket.socket, {kind})").value == "'EPERM'"
    assert run(pool, "1 + 1").value == "2"


@pytest.mark.parametrize("lookup", ["getaddrinfo('example.com', 80)", "gethostbyname('example.com')"])
def test_no_name_resolves(pool: Pool, lookup: str):
    done = run(pool, f"import socket\nsocket.{lookup}")
    assert done.state is State.ERROR
    assert "socket.gaierror" in done.stderr
    assert run(pool, "1 + 1").value == "2"


def test_a_datagram_does_not_get_out(pool: Pool, tmp_path: Path):
    """A socket pair may be had, and it may name another address."""
    names = ["\0otcrl-attack", str(tmp_path / "socket")]
    servers = [socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) for _ in names]
    try:
        for server, name in zip(servers, names, strict=True):
            server.bind(name)
        code = f"one, _ = socket.socketpair(type=socket.SOCK_DGRAM)\n[refused(one.sendto, b'x', n) for n in {names!r}]"
        found = run(pool, RAW + "import socket\n" + code).value
        assert found in ("['ECONNREFUSED', 'ENOENT']", "['EPERM', 'ENOENT']"), found
        for server in servers:
            with pytest.raises(BlockingIOError):
                server.recv(1)
    finally:
        for server in servers:
            server.close()


# -- one call and the next ----------------------------------------------------------------------------

POISON = {
    "builtins": ("import builtins\nbuiltins.len = builtins.repr = lambda x: 'bad'", "len([])", "0"),
    "json": ("import json\njson.dumps = json.loads = None", "import json\njson.loads('[]')", "[]"),
    "os": ("import os\nos.getpid = lambda: 7", "import os\nos.getpid()", "1"),
    "a module": ("import sys\nsys.modules['json'] = sys.modules['re'] = None", "import json, re\nre.sub('a', '', 'a')",
                 "''"),
    "the sandbox": ("import sys\n[vars(m).clear() for n, m in list(sys.modules.items()) if 'otcrl' in n]", "7", "7"),
    "the path": ("import sys\nsys.path[:] = ['/tmp']\nopen('/tmp/json.py', 'w').write('x')",
                 "import json\njson.dumps(1)", "'1'"),
    "excepthook": ("import sys\nsys.excepthook = sys.displayhook = sys.settrace(lambda *a: 1 / 0)", "7", "7"),
    "five": ("import ctypes\nctypes.memset(id(5) + 24, 9, 1)", "5", "5"),
    "recursion limit": ("import sys\nsys.setrecursionlimit(50)", "import sys\nsys.getrecursionlimit()", "1000"),
    "decimals": ("import decimal\ndecimal.getcontext().prec = 2", "import decimal\ndecimal.Decimal(1) / 8",
                 "Decimal('0.125')"),
    "environment": ("import os\nos.environ['A'] = '1'; os.putenv('B', '1')", "import os\nos.environ.get('A')", ""),
    "a file": ("open('/tmp/a', 'w').write('x')", "import os\nos.listdir('/tmp')", "[]"),
    "working directory": ("import os\nos.chdir('/')", "import os\nos.getcwd()", "'/tmp'"),
    "mode of /tmp": ("import os\nos.chmod('/tmp', 0)", "import os\noct(os.stat('/tmp').st_mode)", "'0o40700'"),
    "umask": ("import os\nos.umask(0o777)", "import os\noct(os.umask(0))", "'0o22'"),
    "priority": ("import os\nos.setpriority(os.PRIO_USER, 0, 19)", "import os\nos.getpriority(os.PRIO_PROCESS, 0)",
                 "0"),
    "handlers": ("import signal\nsignal.signal(15, 1)", "import signal\nsignal.getsignal(15).name", "'SIG_DFL'"),
    "alarm": ("import signal\nsignal.alarm(1)", "import signal\nsignal.alarm(0)", "0"),
    "limits": ("import resource\nresource.setrlimit(resource.RLIMIT_NOFILE, (5, 5))",
               "import resource\nresource.getrlimit(resource.RLIMIT_NOFILE)", "(64, 64)"),
    "atexit": ("import atexit, os\natexit.register(os._exit, 3)", "7", "7"),
    "random": ("import random\nrandom.seed(99)", "import random\nrandom.random()", "0.8444218515250481"),
}  # fmt: skip


@pytest.mark.parametrize(("first", "then", "value"), POISON.values(), ids=POISON)
def test_one_call_does_not_poison_the_next(pool: Pool, first: str, then: str, value: str):
    run(pool, first)
    done = run(pool, then)
    assert (done.state, done.value) == (State.OK, value), done
    assert run(pool, "1 + 1").value == "2"


@pytest.mark.parametrize("secret", ["secrets.token_hex()", "os.urandom(8)", "uuid.uuid4()", "tempfile.mktemp()",
                                    "random.SystemRandom().random()"])  # fmt: skip
def test_no_two_calls_draw_the_same_secret(pool: Pool, secret: str):
    code = f"import os, random, secrets, tempfile, uuid\n{secret}"
    assert len({run(pool, code).value for _ in range(3)}) == 3


def test_a_big_message_takes_no_memory_from_later_calls():
    """What the zygote's own heap has grown by is no call's doing, however many processes share it."""
    pool = Pool(1, ["math"], "bubblewrap")
    try:
        share = "import time\nx = bytearray(b'x') * (100 << 20)\ntime.sleep(0.1)"  # most of what a call may have
        assert play(pool, share).state is State.OK
        play(pool, f"x = '{'é' * (5 << 20)}'")
        play(pool, "import os\nos.write(4, b'\\xff' * 4)\nwhile True: os.write(4, bytes(65536))", timeout_s=0.3)
        for _ in range(2):
            assert play(pool, share).state is State.OK
    finally:
        asyncio.run(pool.close())


def test_memory_of_an_earlier_call_is_not_there(pool: Pool):
    """All that has an address and fresh memory: both come from the interpreter's warm-up or from the kernel."""
    run(pool, "heap = [chr(110) + f'eedle{i}' for i in range(100_000)]\nopen('/tmp/x', 'w').write(str(heap))")
    code = """
import ctypes, gc
needle = "".join(["nee", "dle1"])
texts = [x for o in gc.get_objects() for x in gc.get_referents(o) if isinstance(x, str) and x is not needle]
seen = [x for x in texts if needle in x]
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
blocks = b"".join(ctypes.string_at(libc.malloc(size), size) for size in (64, 1024, 1 << 16, 1 << 20) for _ in range(20))
seen, needle.encode() in blocks
"""
    assert run(pool, code).value == "([], False)"


LOOK = """
import re
found = set()
def look(text): found.update(re.findall("mark" + "of[a-z]{4}[0-9]", text))
"""  # for marks; none stands in a spy's own source
EVERYTHING_IN_SIGHT = """
import gc, sys
own, frame = "".join(["mark", "ofspys", "0"]), sys._getframe()
while frame := frame.f_back:
    for it in frame.f_locals.values(): look(repr(it))
gc.enable()
for it in gc.get_objects():
    for text in gc.get_referents(it):
        if isinstance(text, (str, bytes)): look(str(text))
"""
ALL_MEMORY = """
import ctypes, os
libc, large, (there, here) = ctypes.CDLL(None), bytearray(b"".join([b"mark", b"ofspys", b"0"])) * 50_000, os.pipe()
libc.sbrk.restype = ctypes.c_void_p
resident, seen = (ctypes.c_ubyte * 1)(), set()
for spot in (id(object()), id(os), ctypes.addressof(ctypes.c_char.from_buffer(large)), libc.sbrk(0)):
    for step in (-4096, 4096):
        page, gap = spot & -4096, 0
        while gap < 4000:  # pages, to the next mapping
            if page not in seen:
                gap += 1
                if libc.mincore(ctypes.c_void_p(page), ctypes.c_size_t(1), resident) == 0:
                    gap = 0
                    seen.add(page)
                    if libc.write(here, ctypes.c_void_p(page), ctypes.c_size_t(4096)) == 4096:
                        look(os.read(there, 4096).decode("latin-1"))
            page += step
"""


def marked(number: int) -> dict[str, Any]:
    """A call with marks in all that travels; the file's own is the base64 of something."""
    return {
        "code": f"# markofcode{number}\nprint('mark' + 'ofouts{number}')\n'mark' + 'ofvals{number}'",
        "stdin": f"markoftext{number} " * 50,
        "files": {f"markofpath{number}": f"markoffile{number}x" * 20_000},
        "fetch": (f"markofpath{number}",),
    }


@pytest.mark.parametrize("spy", [EVERYTHING_IN_SIGHT, ALL_MEMORY], ids=["frames and objects", "memory"])
def test_a_program_finds_nothing_of_earlier_calls(spy: str):
    """Whatever is read on the way to one child must not be in the process of which the next ones are copies."""
    pool = Pool(1, ["math"], "bubblewrap")
    try:
        play(pool, "x = 1", session="markofname1")
        for number in range(2 * SPARES):
            done = play(pool, **marked(number))
            assert (done.stdout, done.value) == (f"markofouts{number}\n", f"'markofvals{number}'")
            assert done.files
            time.sleep(0.05)  # for the spares to be forked
        for _ in range(SPARES + 1):
            found = play(pool, LOOK + spy + "sorted(found)", timeout_s=60.0, memory_mb=512)
            assert found.value == "['markofspys0']", found  # which is its own
            time.sleep(0.05)
    finally:
        asyncio.run(pool.close())


# -- sessions -----------------------------------------------------------------------------------------


@pytest.fixture
def session(pool: Pool) -> Iterator[str]:
    yield "mine"
    asyncio.run(pool.end("mine"))


def test_a_session_sees_nothing_of_another(pool: Pool, session: str):
    play(pool, "x = 1\nopen('/tmp/x', 'w').write('1')\nimport math\nmath.pi = 3", session=session)
    look = "import math, os\n'x' in dir(), os.listdir('/tmp'), math.pi > 3.1, os.getpid()"
    assert play(pool, look, session="other").value == "(False, [], True, 1)"
    assert run(pool, look).value == "(False, [], True, 1)"
    assert play(pool, "x, open('/tmp/x').read(), math.pi", session=session).value == "(1, '1', 3)"
    asyncio.run(pool.end("other"))


def test_a_session_cannot_name_another(pool: Pool, session: str):
    """Closing or running another takes the pipe to the zygote, which no child has."""
    play(pool, "x = 1", session=session)
    run(pool, FORGE + f"""forge('{{"close": "{session}"}}')""")
    assert play(pool, "x", session=session).value == "1"


RESUMES = {
    "a thread": "",
    "a thread that wakes it": """
def wake():
    while True: os.kill(1, signal.SIGCONT)
threading.Thread(target=wake, daemon=True).start()
""",
    "a timer that wakes it": """
import ctypes
signal.signal(signal.SIGCONT, lambda *_: None)
timer, libc = ctypes.c_int(), ctypes.CDLL(None)
every = (ctypes.c_long * 4)(0, 10_000_000, 0, 10_000_000)
libc.timer_create(1, (ctypes.c_int * 16)(0, 0, signal.SIGCONT, 0), ctypes.byref(timer))
libc.timer_settime(timer, 0, every, None)
time.sleep(0.02)
""",
    "an alarm": "signal.signal(14, lambda *_: None)\nsignal.setitimer(signal.ITIMER_REAL, 0.01, 0.01)",
}


@pytest.mark.parametrize("resume", RESUMES.values(), ids=RESUMES)
def test_a_session_stands_still_between_its_calls(pool: Pool, session: str, resume: str):
    play(pool, TICKS + resume, session=session)
    time.sleep(0.4)
    done = play(pool, "time.sleep(0.02)\ngap > 0.3", session=session)
    assert done.fresh or done.value == "True"  # it stood still, or was ended for not doing so
    assert run(pool, "1 + 1").value == "2"


@pytest.mark.parametrize(
    ("death", "state"),
    [("import os\nos._exit(0)", State.OK), ("import ctypes\nctypes.string_at(0)", State.SIGNAL), (LOOP, State.TIMEOUT)],
    ids=["exit", "crash", "timeout"],
)
def test_a_session_that_died_starts_afresh_and_says_so(pool: Pool, session: str, death: str, state: State):
    assert play(pool, "x = 1", session=session).fresh
    assert not play(pool, "x", session=session).fresh
    assert play(pool, death, session=session, timeout_s=0.3).state is state
    after = play(pool, "'x' in dir()", session=session)
    assert (after.fresh, after.value) == (True, "False")


def test_a_session_killed_from_outside_starts_afresh_and_says_so(session: str):
    before = sandboxes()
    pool = Pool(1, ["math"], "bubblewrap")
    try:
        play(pool, "x = 1", session=session)
        deadline, stopped = time.monotonic() + 5, []
        while not stopped and time.monotonic() < deadline:  # it has been told to stop, which takes a moment
            stopped = [child for child in children_inside(sandboxes() - before) if state_of(child) == "T"]
        os.kill(stopped[0], 9)  # and not the one that waits for the next call, or both of two attempts fail
        after = play(pool, "'x' in dir()", session=session)
        assert (after.state, after.fresh, after.value) == (State.OK, True, "False")
    finally:
        asyncio.run(pool.close())


# -- from outside -------------------------------------------------------------------------------------


def children(pid: int) -> list[int]:
    """Those of a process, either of which may just be going."""
    found: list[int] = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        with suppress(OSError):
            found += map(int, task.read_text().split())
    return found


def sandboxes() -> set[int]:
    """The processes that this one started."""
    return set(children(os.getpid()))


def state_of(pid: int) -> str:
    """R, S, T, Z, ... of proc(5); "" if it is gone."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    return ""


def zygotes(bwraps: set[int]) -> list[int]:
    return [zygote for bwrap in bwraps for zygote in children(bwrap)]


def supervisors(bwraps: set[int]) -> list[int]:
    """The first child of each zygote."""
    return [child for zygote in zygotes(bwraps) for child in children(zygote)[:1]]


def children_inside(bwraps: set[int]) -> list[int]:
    return [child for zygote in zygotes(bwraps) for child in children(zygote)[1:]]


def kill_each(pids: list[int]) -> None:
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, 9)


@pytest.mark.parametrize("victim", ["children", "supervisors", "zygotes", "bwraps"])
def test_every_call_ends_when_processes_are_killed_under_load(victim: str):
    """Waiting and running children alike, while 20 calls are in flight on two interpreters."""
    before = sandboxes()
    find = {"children": children_inside, "supervisors": supervisors, "zygotes": zygotes, "bwraps": list}[victim]

    async def main() -> list[Execution]:
        two = Pool(2, ["math"], "bubblewrap")
        await two.start()
        code = "import time\ntime.sleep(0.05)\n1 + 1"
        calls = [asyncio.ensure_future(two.run(Program(code=code, **LIMITS))) for _ in range(20)]  # type: ignore[arg-type]
        for _ in range(5):
            await asyncio.sleep(0.06)
            kill_each(find(sandboxes() - before))
        done = await asyncio.gather(*calls)
        after = await asyncio.gather(*(two.run(Program(code="1 + 1", **LIMITS)) for _ in range(4)))  # type: ignore[arg-type]
        await two.close()
        assert [each.value for each in after] == ["2"] * 4
        return done

    done = asyncio.run(main())
    assert {(each.state, each.value) for each in done} <= {(State.OK, "2"), (State.KILLED, "")}
    assert sum(each.state is State.OK for each in done) >= 10
    assert sandboxes() == before


@pytest.mark.parametrize("isolation", ["bubblewrap", "none"])
@pytest.mark.parametrize("victim", ["supervisor", "zygote"])
def test_either_half_of_an_interpreter_that_dies_takes_all_of_it_along(victim: str, isolation: str):
    """In mid-call, which then runs in a new one; also where there is no pid namespace to end the rest."""
    before = sandboxes()

    async def main() -> Execution:
        pool = Pool(1, ["math"], isolation)
        await pool.start()
        [zygote] = zygotes(sandboxes() - before) if isolation == "bubblewrap" else sandboxes() - before
        halves = {"zygote": zygote, "supervisor": children(zygote)[0]}
        family = [zygote, *children(zygote)]
        code = "import time\nend = time.monotonic() + 1\nwhile time.monotonic() < end: pass\n1 + 1"
        call = asyncio.ensure_future(pool.run(Program(code=code, **LIMITS)))  # type: ignore[arg-type]
        await asyncio.sleep(0.4)
        os.kill(halves[victim], 9)
        done = await call
        assert [pid for pid in family if state_of(pid) not in ("", "Z")] == []
        await pool.close()
        return done

    done = asyncio.run(main())
    assert (done.state, done.value) == (State.OK, "2")
    assert sandboxes() == before


def mounts(pid: int) -> int:
    return Path(f"/proc/{pid}/mountinfo").read_bytes().count(b"\n")


def held_by(pids: list[int]) -> list[tuple[int, int, int]]:
    """(open files, mounts, children) of each process."""
    return [(open_files(pid), mounts(pid), len(children(pid))) for pid in pids]


def open_files(pid: int) -> int:
    """-1 for the zygote where only root may look."""
    try:
        return len(os.listdir(f"/proc/{pid}/fd"))
    except PermissionError:
        return -1


def settled(pool: Pool, pids: list[int]) -> list[tuple[int, int, int]]:
    """`held_by` when the zygote has, but for the supervisor, just its next children: the last one is reaped.

    Twice the same: when the children are there it still holds for a moment the pipes that it gives away.
    """
    deadline, found = time.monotonic() + 10, held_by(pids)
    while time.monotonic() < deadline:
        if found[1][2] != 1 + SPARES:
            run(pool, "1")
        time.sleep(0.05)
        before, found = found, held_by(pids)
        if found == before and found[1][2] == 1 + SPARES:
            break
    return found


def zombies() -> list[int]:
    return [pid for pid in sandboxes() if state_of(pid) == "Z"]


def test_nothing_leaks():
    """A quarter of the calls end by force; some leave files, some a session."""
    calls, before = 10_000 if os.environ.get("OTCRL_LONG") else 300, sandboxes()
    mark = f"otcrl-attack-{os.getpid()}"
    programs = [
        f"open('/tmp/{mark}', 'w').write('x')\n7",
        "import os\nos._exit(3)",
        "import threading, time\nthreading.Thread(target=time.sleep, args=(60,), daemon=True).start()",
        "import os\nos.abort()",
    ]
    pool = Pool(1, ["math"], "bubblewrap")
    try:
        for code in programs:
            run(pool, code)
        [bwrap] = sandboxes() - before
        processes = [os.getpid(), *zygotes({bwrap}), *supervisors({bwrap})]
        at_first = settled(pool, processes)
        for number in range(calls):
            name = f"s{number % 5}" if number % 10 == 0 else ""
            play(pool, programs[number % 4] if not name else "1", session=name)
            if name:
                asyncio.run(pool.end(name))
        assert settled(pool, processes) == at_first
        assert [os.getpid(), *zygotes({bwrap}), *supervisors({bwrap})] == processes  # never started anew
        assert zombies() == []
        assert not list(Path(tempfile.gettempdir()).glob(f"*{mark}*"))
    finally:
        asyncio.run(pool.close())
    assert sandboxes() == before


def test_without_isolation_no_folder_is_left():
    bare = Pool(1, ["math"], "none")
    try:
        folder = Path(run(bare, "import os\nopen('x', 'w').write('x')\nos.getcwd()").value.strip("'"))
        assert folder.is_relative_to(tempfile.gettempdir())
    finally:
        asyncio.run(bare.close())
    assert not folder.parent.exists()
