"""The process that compares mathematical expressions, and the handle that the trainer holds on it.

math-verify limits its own time with `signal.alarm`. That works in the main thread only, replaces other
people's timers there, and cannot interrupt one long C call (`9**9**9`). So it runs as the main thread
of a process of its own, under a limit of CPU time, as a busy machine must not make right answers wrong; and when that
does not end it, the process is killed.
"""

from __future__ import annotations

import atexit
import json
import os
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from otcrl.errors import ConfigError
from otcrl.rewards.given_up import GIVEN_UP

DEADLINE_S = 10.0  # for one comparison, all of it; then it is given up and the process is replaced
_START_S = 120.0  # importing the algebra system on a busy machine
_MEMORY_BYTES = 4 * 2**30  # address space of the process
_CPU_S = 6.0  # of one comparison


class MathWorker:
    """One helper process, started at the first question; mutable, and safe to share between threads."""

    def __init__(self, deadline_s: float = DEADLINE_S) -> None:
        self._deadline_s = deadline_s
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        atexit.register(self.close)
        os.register_at_fork(after_in_child=self._forget)  # two processes on one pipe would swap verdicts

    def equal(self, answer: str, gold: str) -> bool:
        """Whether they mean the same; False, and one of `GIVEN_UP`, when that took too long or too much memory.

        Raises ConfigError when the process cannot start: a broken checker must not look like wrong answers.
        """
        with self._lock:
            # a process that dies may have died of something else; one that dies twice died of the expression
            reply = self._reply([answer, gold]) or self._reply([answer, gold])
        if reply not in ("equal", "different"):
            GIVEN_UP.add(answer, f"{'took too long' if reply else 'died'} when it was compared with {gold!r}")
        return reply == "equal"

    def _reply(self, question: list[str]) -> str | None:
        """equal, different or late; None when the process died."""
        process = self._running()
        try:
            _write(process, question)
            reply = _read(process, self._deadline_s)
        except BrokenPipeError:  # it was dead already
            reply = None
        except TimeoutError:
            self._stop()
            return "late"
        if reply is None:
            self._stop()
        return reply

    def close(self) -> None:
        with self._lock:
            self._stop()

    def _forget(self) -> None:
        self._lock, self._process = threading.Lock(), None

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is not None and self._process.poll() is None:
            return self._process
        self._process = process = subprocess.Popen(
            [sys.executable, "-P", "-m", "otcrl.rewards.math_worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},  # whatever made otcrl importable here
        )
        try:
            reply = _read(process, _START_S)
        except TimeoutError:
            reply = None
        if reply == "ready":
            return process
        self._stop()
        if reply == "missing":
            raise ConfigError("checking mathematics needs math-verify: pip install 'otcrl[math]'")
        raise ConfigError(f"the process that checks mathematics did not start (it said {reply!r})")

    def _stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()  # reaps it and closes its pipes
            self._process = None


def _write(process: subprocess.Popen[bytes], question: list[str]) -> None:
    assert process.stdin is not None
    process.stdin.write(json.dumps(question).encode() + b"\n")
    process.stdin.flush()


def _read(process: subprocess.Popen[bytes], deadline_s: float) -> str | None:
    """The next line the process writes; None when it ends. Raises TimeoutError when it says nothing in time."""
    assert process.stdout is not None
    watch = select.poll()
    watch.register(process.stdout, select.POLLIN | select.POLLHUP)
    if not watch.poll(deadline_s * 1000):
        raise TimeoutError
    return process.stdout.readline().decode().strip() or None


# -- inside the process ------------------------------------------------------------------------------


def _serve() -> None:
    """Answer questions, one JSON line `[answer, gold]` each, until the input ends."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints must not pass for a reply

    def reply(text: str) -> None:
        print(text, file=replies, flush=True)

    try:
        import math_verify  # noqa: F401
    except ImportError:
        return reply("missing")
    _limit_memory()
    _equal(r"\frac{1}{2}", "0.5")  # loads the rest: the first question is not to pay for it
    reply("ready")
    for line in sys.stdin:
        answer, gold = json.loads(line)
        is_equal = False
        with _limited(_CPU_S) as late:
            is_equal = _equal(answer, gold)
        reply("equal" if is_equal else "late" if late else "different")


def _equal(answer: str, gold: str) -> bool:
    """math-verify's verdict. It treats what it cannot parse, or not in time, as "different"."""
    from math_verify import parse, verify

    parsed_gold, parsed_answer = (parse(_latex(text), parsing_timeout=0) for text in (gold, answer))
    return bool(verify(parsed_gold, parsed_answer, timeout_seconds=0))


@contextmanager
def _limited(seconds: float) -> Iterator[list[float]]:
    """TimeoutError is raised where the body is when it has used that much CPU time, and again until it has ended.

    Gives a list that is empty while there was time: math-verify may take the error for its own.
    """
    late: list[float] = []

    def out_of_time(number: int, frame: object) -> None:
        late.append(seconds)
        raise TimeoutError

    signal.signal(signal.SIGPROF, out_of_time)
    signal.setitimer(signal.ITIMER_PROF, seconds, 1.0)
    try:
        with suppress(TimeoutError):
            yield late
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def _latex(text: str) -> str:
    return f"\\boxed{{{text}}}"  # says "all of this is the expression"; bare text would be searched for one


def _limit_memory() -> None:
    import resource

    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = _MEMORY_BYTES if hard == resource.RLIM_INFINITY else min(_MEMORY_BYTES, hard)
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))


if __name__ == "__main__":
    _serve()
