"""The sandbox against programs that try to get out, stay, or take everything. All real: nothing is simulated."""

import asyncio
import json
import os
import subprocess
import sys
import sysconfig
import time
from base64 import b64decode, b64encode
from collections.abc import Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path

import pytest

from otcrl.errors import ConfigError, ToolUnavailable
from otcrl.tools.sandbox import jail
from otcrl.tools.sandbox.execution import Execution, Program, State
from otcrl.tools.sandbox.inside import channel, heap
from otcrl.tools.sandbox.jail import START
from otcrl.tools.sandbox.pool import Pool

ROOT = Path(__file__).parents[1]
LIMITS = {"timeout_s": 5.0, "memory_mb": 128, "max_bytes": 8000}


@cache
def has_bubblewrap() -> bool:
    try:
        pool = Pool(1, ["math"], "bubblewrap")
    except ConfigError:
        return False
    try:
        asyncio.run(pool.start())
    except ToolUnavailable:
        return False
    finally:
        asyncio.run(pool.close())
    return True


pytestmark = pytest.mark.skipif(not has_bubblewrap(), reason="bubblewrap cannot make namespaces here")


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    shared = Pool(1, ["math"], "bubblewrap")
    yield shared
    asyncio.run(shared.close())


def run(pool: Pool, code: str, **more: object) -> Execution:
    return asyncio.run(pool.run(Program(code=code, **LIMITS | more)))  # type: ignore[arg-type]


def fails(pool: Pool, code: str, state: State = State.ERROR) -> str:
    """Its error message; the program must fail."""
    done = run(pool, code)
    assert done.state is state, done
    return done.stderr


# -- what a program sees ------------------------------------------------------------------------------


def test_what_is_printed_comes_back(pool: Pool):
    assert run(pool, "print('héllo')").stdout == "héllo\n"


def test_the_last_expression_is_the_value(pool: Pool):
    assert run(pool, "x = 6\nx * 7").value == "42"


def test_none_is_no_value(pool: Pool):
    assert run(pool, "None").value == ""


def test_a_traceback_shows_the_programs_frames_only(pool: Pool):
    assert run(pool, "import json\ndef f():\n    json.loads('{')\nf()").stderr == (
        "Traceback (most recent call last):\n"
        '  File "<code>", line 4, in <module>\n    f()\n'
        "  File \"<code>\", line 3, in f\n    json.loads('{')\n"
        "json.decoder.JSONDecodeError: "
        "Expecting property name enclosed in double quotes: line 1 column 2 (char 1)\n"
    )


def test_a_syntax_error_names_the_line(pool: Pool):
    assert 'File "<code>", line 2' in fails(pool, "x = 1\ny = = 2")


@pytest.mark.parametrize(("code", "state"), [("exit()", State.OK), ("exit(0)", State.OK), ("exit(3)", State.ERROR)])
def test_exit_codes_decide(pool: Pool, code: str, state: State):
    assert run(pool, code).state is state


def test_input_finds_an_empty_stdin(pool: Pool):
    assert "EOFError" in fails(pool, "input()")


def test_threads_are_waited_for(pool: Pool):
    code = "import threading, time\nthreading.Thread(target=lambda: (time.sleep(0.1), print('late'))).start()"
    assert run(pool, code).stdout == "late\n"


def test_the_same_program_prints_the_same(pool: Pool):
    code = "import random\nprint(random.random(), {'a', 'b', 'c', 'd'})"
    assert run(pool, code).stdout == run(pool, code).stdout


def test_only_the_ends_of_a_flood_are_kept(pool: Pool):
    done = run(pool, "print('first'); print('x' * 10_000_000); print('last')", max_bytes=1000)
    assert done.stdout.startswith("first\n")
    assert done.stdout.endswith("x\nlast\n")
    assert len(done.stdout) == 2000
    assert done.dropped == 6 + 10_000_001 + 5 - 2000


# -- what it cannot see -------------------------------------------------------------------------------


def test_there_is_no_network(pool: Pool):
    assert "Operation not permitted" in fails(pool, "import socket\nsocket.create_connection(('1.1.1.1', 53), 2)")


def test_the_hosts_loopback_is_another_one(pool: Pool):
    import socket

    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert "not permitted" in fails(pool, f"import socket\nsocket.create_connection(('127.0.0.1', {port}), 2)")


@pytest.mark.parametrize("path", ["/etc/shadow", "/etc/passwd", __file__, str(Path.home()), "/home", "/var", "/sys"])
def test_host_files_are_not_there(pool: Pool, path: str):
    assert "FileNotFoundError" in fails(pool, f"import os\nos.stat({path!r})")


@pytest.mark.parametrize("path", ["/x", "/usr/lib/x", "/python/lib/x", "/dev/x", "/packages/x", "/proc/sys/x"])
def test_nothing_outside_tmp_is_writable(pool: Pool, path: str):
    message = fails(pool, f"open({path!r}, 'w')")
    assert "Read-only" in message or "No such file" in message


def test_nothing_of_the_kernel_is_writable(pool: Pool):
    """Owned by root, so open to a sandbox that root started, were it not masked."""
    code = """
import os
for folder, folders, files in os.walk("/proc"):
    folders[:] = [f for f in folders if not f.isdigit() and "self" not in f]
    for name in files:
        try:
            os.close(os.open(os.path.join(folder, name), os.O_WRONLY))
            print(folder, name)
        except OSError:
            pass
"""
    assert run(pool, code).stdout == ""


def test_the_environment_holds_nothing_of_the_host(pool: Pool):
    names = set(run(pool, "import os\nprint(*os.environ)").stdout.split())
    threads = {"OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "MALLOC_ARENA_MAX"}
    assert names - threads == {
        "PATH", "HOME", "LANG", "PWD", "LD_LIBRARY_PATH", "PYTHONHASHSEED", "PYTHONDONTWRITEBYTECODE",
    }  # fmt: skip


def test_other_processes_are_out_of_sight(pool: Pool):
    assert run(pool, "import os\nprint(os.getpid(), os.getppid(), os.listdir('/proc'))").stdout == "1 0 []\n"


def test_there_is_no_shell(pool: Pool):
    assert "FileNotFoundError" in fails(pool, "import os\nos.stat('/bin/sh')")


def test_every_lock_is_on_as_the_host_sees_it(pool: Pool):
    """Read from outside, of the child that waits for the next program: it cannot lie."""
    run(pool, "1")
    waiting, status, deadline = 0, {"Seccomp": "0", "State": ""}, time.monotonic() + 5
    while (status["Seccomp"] == "0" or status["State"][0] != "S") and time.monotonic() < deadline:
        with suppress(ValueError, FileNotFoundError):  # the last call's child is just going, this one's just coming
            *_, waiting = [leaf for sandbox in sandboxes() for leaf in leaves(sandbox) if leaf != sandbox]
            status = dict(line.split(":\t", 1) for line in Path(f"/proc/{waiting}/status").read_text().splitlines())
    assert {value for name, value in status.items() if name.startswith("Cap")} == {"0" * 16}
    assert (status["NoNewPrivs"], status["Seccomp"], status["NSpid"].split()[-1]) == ("1", "2", "1")
    zygote = int(status["PPid"])
    for kind in ("user", "pid", "mnt", "ipc", "uts", "net"):
        of_the_call = os.readlink(f"/proc/{waiting}/ns/{kind}")
        assert of_the_call != os.readlink(f"/proc/self/ns/{kind}")
        assert (of_the_call == os.readlink(f"/proc/{zygote}/ns/{kind}")) == (kind in ("user", "net"))


def test_the_supervisor_has_no_capability_either(pool: Pool):
    run(pool, "1")
    sandboxes = [zygote._process.pid for zygote in pool._zygotes if zygote._process is not None]
    assert sandboxes
    for supervisor in (leaves(sandbox)[0] for sandbox in sandboxes):
        lines = Path(f"/proc/{supervisor}/status").read_text().splitlines()
        assert {line.split()[1] for line in lines if line.startswith("Cap")} == {"0" * 16}


def test_no_new_user_namespace_can_be_made(pool: Pool):
    assert run(pool, "import ctypes\nprint(ctypes.CDLL(None).unshare(0x10000000))").stdout == "-1\n"


def test_only_preloaded_packages_exist():
    numpy = Pool(1, ["numpy"], "bubblewrap")
    try:
        assert run(numpy, "import numpy\nprint(numpy.arange(3).sum())").stdout == "3\n"
        assert "ModuleNotFoundError" in fails(numpy, "import torch")
    finally:
        asyncio.run(numpy.close())


def test_packages_are_found_in_an_environment_that_is_reached_by_a_link(tmp_path: Path):
    """A home directory on another disk: the kernel names files by where they are, Python by how it was called."""
    (tmp_path / "env").symlink_to(sys.prefix)
    python = tmp_path / "env" / Path(sys.executable).relative_to(sys.prefix)
    show = "from otcrl.tools.sandbox.jail import package_paths; print(*package_paths(['packaging.version']))"
    done = subprocess.run([python, "-c", show], cwd=ROOT, capture_output=True, text=True, check=True)
    site = Path(sysconfig.get_path("purelib")).resolve()
    assert done.stdout.split() == [str(site / "packaging")]  # pure Python: no library of it is mapped


# -- what it cannot take ------------------------------------------------------------------------------


def test_an_endless_loop_ends_at_the_limit(pool: Pool):
    start = time.monotonic()
    done = run(pool, "print('before')\nwhile True: pass", timeout_s=0.5)
    assert done.state is State.TIMEOUT
    assert done.stdout == "before\n"
    assert time.monotonic() - start < 3
    assert run(pool, "1 + 1").value == "2"


def test_catching_everything_does_not_outlive_the_limit(pool: Pool):
    code = (
        "import signal\nfor s in range(1, 32):\n    try: signal.signal(s, lambda *a: None)\n    except OSError: pass\n"
    )
    assert run(pool, code + "while True: pass", timeout_s=0.3).state is State.TIMEOUT


def test_a_memory_hog_gets_a_memory_error(pool: Pool):
    for more in ("bytearray(1 << 20)", "[]"):
        assert fails(pool, f"x = []\nwhile True: x.append({more})", State.MEMORY).endswith("MemoryError\n")
    assert run(pool, "1 + 1").value == "2"


@pytest.mark.parametrize(
    "start", ["os.fork()", "os.posix_spawn('/python/bin/python3', ['x'], {})", "os.execv('/python/bin/python3', ['x'])"]
)
def test_a_program_is_one_process(pool: Pool, start: str):
    assert "PermissionError: [Errno 1] Operation not permitted" in fails(pool, f"import os\n{start}")


def test_a_program_may_have_threads_but_not_any_number(pool: Pool):
    code = "import threading, time\nfor _ in range({n}): threading.Thread(target=time.sleep, args=(1,)).start()"
    assert run(pool, code.format(n=30), memory_mb=512).state is State.OK
    stack = "import threading\nthreading.stack_size(32768)\n"
    assert run(pool, stack + code.format(n=5000), memory_mb=512).state in (State.THREADS, State.ERROR)  # root, others
    assert run(pool, "1 + 1").value == "2"


def test_a_full_tmp_stays_a_programs_own_problem(pool: Pool):
    code = "for i in range(99): open(f'/tmp/{i}', 'wb').write(bytes(1 << 20))"
    assert "No space left" in fails(pool, code)
    assert run(pool, "open('/tmp/x', 'wb').write(bytes(1 << 20))").state is State.OK


def test_a_crash_of_the_interpreter_is_told(pool: Pool):
    done = run(pool, "import os\nos.abort()")
    assert (done.state, done.code) == (State.SIGNAL, 11)  # pid 1 does not hear its own SIGABRT, so abort() faults


def test_the_zygote_cannot_be_killed(pool: Pool):
    code = (
        "import os\nfor s in range(1, 65):\n    try: os.kill(os.getppid(), s)\n    except OSError: pass\nprint('alive')"
    )
    assert run(pool, code).stdout == "alive\n"
    assert run(pool, "1 + 1").value == "2"


def test_the_zygote_cannot_be_read(pool: Pool):
    assert "FileNotFoundError" in fails(pool, "open('/proc/1/mem', 'rb')")
    assert run(pool, "import ctypes\nprint(ctypes.CDLL(None).ptrace(16, 1, 0, 0))").stdout == "-1\n"


# -- what it cannot leave -----------------------------------------------------------------------------


def test_tmp_is_wiped(pool: Pool):
    run(pool, "import os\nos.makedirs('/tmp/a/b')\nopen('/tmp/a/b/c', 'w').write('x')\nos.symlink('/', '/tmp/root')")
    run(pool, "open('/tmp/.hidden', 'w')")
    assert run(pool, "import os\nprint(os.listdir('/tmp'))").stdout == "[]\n"


@pytest.mark.parametrize(
    "code",
    [
        "import os\nos.makedirs('/tmp/a/b')\nos.chmod('/tmp/a', 0)",
        "import os\nfor _ in range(3000): os.mkdir('d'); os.chdir('d')",
        "import os\nos.chmod('/tmp', 0)",
        "import ctypes\nprint(ctypes.CDLL(None).shmget(1, 4096, 0o1600))",
    ],
    ids=["locked directory", "deep directories", "locked tmp", "System V memory"],
)
def test_what_is_hard_to_wipe_is_gone_as_well(pool: Pool, code: str):
    assert run(pool, code).state is State.OK
    assert run(pool, "import os\nprint(os.listdir('/tmp'))").stdout == "[]\n"


def test_a_background_thread_dies_with_its_call(pool: Pool):
    code = "import threading, time\nthreading.Thread(target=time.sleep, args=(60,), daemon=True).start()"
    start = time.monotonic()
    assert run(pool, code).state is State.OK
    assert time.monotonic() - start < 3
    test_other_processes_are_out_of_sight(pool)


def test_no_variable_survives(pool: Pool):
    run(pool, "import math\nmath.pi = 3\nx = 1")
    assert run(pool, "import math\nprint(math.pi > 3.1, 'x' in dir())").stdout == "True False\n"


# -- sessions and files ---------------------------------------------------------------------------------


def test_simultaneous_calls_of_a_new_session_share_it():
    async def main() -> list[Execution]:
        two = Pool(2, ["math"], "bubblewrap")
        try:
            code = "try: n += 1\nexcept NameError: n = 1\nn"
            programs = [Program(code=code, session="a", **LIMITS) for _ in range(6)]  # type: ignore[arg-type]
            return await asyncio.gather(*map(two.run, programs))
        finally:
            await two.close()

    assert sorted(done.value for done in asyncio.run(main())) == list("123456")


def test_only_so_many_sessions_are_kept_and_the_oldest_goes(pool: Pool, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("otcrl.tools.sandbox.pool.MAX_SESSIONS", 2)
    for name in "abc":
        assert run(pool, "x = 1", session=name).fresh
    assert [run(pool, "1", session=name).fresh for name in "cb"] == [False, False]
    assert run(pool, "1", session="a").fresh


def test_files_and_stdin_go_in_and_files_come_out(pool: Pool):
    code = "text = open('in/a.txt').read() + input()\nopen('out.txt', 'w').write(text)"
    given = {"files": {"in/a.txt": b64encode(b"from a file, ").decode()}, "stdin": "from stdin\n"}
    done = run(pool, code, **given, fetch=["out.txt", "none.txt"])
    assert done.state is State.OK
    assert {name: b64decode(content) for name, content in done.files.items()} == {"out.txt": b"from a file, from stdin"}


def test_a_file_that_cannot_be_placed_is_an_error_in_any_call(pool: Pool):
    assert run(pool, "1", files={"d/x": ""}, session="placing").state is State.OK
    done = run(pool, "1", files={"d": ""}, session="placing")
    assert (done.state, done.stderr) == (State.ERROR, "IsADirectoryError: [Errno 21] Is a directory: 'd'\n")


@pytest.mark.parametrize(
    "report", [b"[]", b'{"code": Infinity, "value": "", "cut": 0, "files": {}}', b"\xff" * 9, b"[" * 9999]
)
def test_a_forged_report_is_a_programs_own_affair(pool: Pool, report: bytes):
    run(pool, "x = 1", session="bystander")
    run(pool, f"import os\nos.write(4, {len(report).to_bytes(4, 'big') + report!r})\nwhile True: pass")
    assert run(pool, "x", session="bystander").value == "1"


# -- the pool -----------------------------------------------------------------------------------------


def test_fifty_concurrent_calls_are_not_mixed_up():
    async def main() -> list[Execution]:
        two = Pool(2, ["math"], "bubblewrap")
        try:
            return await asyncio.gather(*(two.run(Program(code=f"print({i})", **LIMITS)) for i in range(50)))  # type: ignore[arg-type]
        finally:
            await two.close()

    assert [done.stdout for done in asyncio.run(main())] == [f"{i}\n" for i in range(50)]


def sandboxes() -> set[int]:
    """The processes that this one started."""
    found: set[int] = set()
    for children in Path(f"/proc/{os.getpid()}/task").glob("*/children"):
        with suppress(FileNotFoundError):  # a thread that has just ended
            found |= {int(pid) for pid in children.read_text().split()}
    return found


def leaves(pid: int) -> list[int]:
    """The processes below this one that have none below them."""
    below = [int(child) for task in Path(f"/proc/{pid}/task").glob("*/children") for child in task.read_text().split()]
    return [leaf for child in below for leaf in leaves(child)] or [pid]


def test_close_leaves_no_process_and_no_zombie():
    before = sandboxes()

    async def main() -> None:
        two = Pool(2, ["math"], "bubblewrap")
        await two.start()
        assert len(sandboxes() - before) == 2
        endless = asyncio.ensure_future(
            two.run(Program(code="while True: pass", timeout_s=60, memory_mb=64, max_bytes=100))
        )
        await asyncio.sleep(0.2)
        await two.close()
        with pytest.raises(ToolUnavailable):
            await endless

    asyncio.run(main())
    assert sandboxes() == before


def test_a_sandbox_that_dies_is_replaced():
    """Its own program cannot kill it, so the test does, from outside and in mid-call, twice."""
    before = sandboxes()

    async def main() -> list[Execution]:
        one = Pool(1, ["math"], "bubblewrap")
        await one.start()
        call = asyncio.ensure_future(one.run(Program(code="import time\ntime.sleep(1)", **LIMITS)))  # type: ignore[arg-type]
        for _ in range(2):
            await asyncio.sleep(0.6)
            for pid in sandboxes() - before:
                os.kill(pid, 9)
        killed = await call
        works = await one.run(Program(code="1 + 1", **LIMITS))  # type: ignore[arg-type]
        await one.close()
        return [killed, works]

    killed, works = asyncio.run(main())
    assert killed.state is State.KILLED
    assert works.value == "2"


def test_constructing_starts_nothing():
    before = sandboxes()
    idle = Pool(2, ["math"], "bubblewrap")
    assert sandboxes() == before
    asyncio.run(idle.close())


def test_without_bubblewrap_it_refuses():
    with pytest.raises(ConfigError, match=r"'/nowhere/bwrap', which is not there.*pip install.*isolation: none"):
        Pool(1, ["math"], "bubblewrap", bwrap="/nowhere/bwrap")


def test_where_namespaces_are_forbidden_it_refuses(tmp_path: Path):
    refusing = tmp_path / "bwrap"
    refusing.write_text("#!/bin/sh\necho 'bwrap: No permissions to create new namespace' >&2; exit 1\n")
    refusing.chmod(0o755)
    pool = Pool(1, ["math"], "bubblewrap", bwrap=str(refusing))
    with pytest.raises(ToolUnavailable, match=r"No permissions to create new namespace.*isolation: none"):
        run(pool, "1")
    asyncio.run(pool.close())


def test_a_preload_that_leaves_a_thread_running_is_refused_as_a_fork_would_lose_it(tmp_path: Path):
    (tmp_path / "busy.py").write_text("import threading, time\nthreading.Thread(target=time.sleep, args=(60,)).start()")
    config = {"isolated": False, "preload": ["math", "busy"], "paths": [str(tmp_path)], "scratch": {str(tmp_path): 1}}
    zygote = subprocess.Popen([sys.executable, "-c", START, json.dumps(config)], stdout=subprocess.PIPE)
    assert zygote.stdout is not None
    hello = channel.receive(zygote.stdout.fileno())
    zygote.kill()
    zygote.communicate()
    assert hello == {"ready": False, "why": "cannot fork once 'busy' is loaded: it leaves a thread running"}


def test_what_is_allocated_after_settling_does_not_lie_in_the_holes_of_what_was_loaded():
    loaded = [heap.block(64) for _ in range(100_000)]
    holes = {id(block) for block in loaded[::100]}
    del loaded[::100]
    heap.fill_pools(64)
    kept = [heap.block(64) for _ in range(300)]
    new = set(map(id, kept))
    assert not new & holes


def test_a_preload_that_takes_too_long_to_import_is_no_traceback(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(jail, "PROBE_S", 0.01)
    with pytest.raises(ToolUnavailable, match=r"preload: to import \['packaging.version'\] took more than 0.01 s here"):
        jail.package_paths(["packaging.version"])


def test_a_preload_that_does_not_exist_is_refused():
    with pytest.raises(ConfigError, match="no module 'numppy'"):
        Pool(1, ["numppy"], "bubblewrap")


def test_isolation_is_given_up_by_name_only():
    with pytest.raises(ConfigError, match="isolation must be bubblewrap or none, got 'off'"):
        Pool(1, ["math"], "off")
    bare = Pool(1, ["math"], "none", bwrap="/nowhere/bwrap")
    try:
        assert run(bare, "import os\nopen('x', 'w')\nprint(os.listdir('.'))").stdout == "['x']\n"
        assert run(bare, "import os\nprint(os.listdir('.'))").stdout == "[]\n"
        assert run(bare, "while True: pass", timeout_s=0.3).state is State.TIMEOUT
        code = "import os, time\npid = os.fork()\nif pid == 0: os.setsid(); time.sleep(60)\nprint(pid)"
        orphan = int(run(bare, code).stdout)
        assert subprocess.run(["kill", "-0", str(orphan)], capture_output=True, check=False).returncode == 1
    finally:
        asyncio.run(bare.close())
