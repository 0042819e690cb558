"""A program to run, and what became of it: the same for a pool here and for servers elsewhere."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum


class State(StrEnum):
    """How a program ended."""

    OK = "ok"
    ERROR = "error"  # an exception, a syntax error or a non-zero exit
    TIMEOUT = "timeout"
    MEMORY = "memory"
    THREADS = "threads"
    OUTPUT = "output"
    SIGNAL = "signal"  # it crashed its interpreter
    KILLED = "killed"  # twice over, something outside ended it or its sandbox: the machine is out of memory


@dataclass(frozen=True, slots=True, kw_only=True)
class Program:
    """What to run, and within what."""

    code: str
    timeout_s: float
    memory_mb: int  # on top of the warmed interpreter
    max_bytes: int  # of each stream's head, and as much of its tail
    stdin: str = ""
    files: Mapping[str, str] = field(default_factory=dict)  # path beneath the working directory -> base64
    fetch: Sequence[str] = ()  # files to bring back
    session: str = ""  # variables live on from one call of a session to the next; "": none do


@dataclass(frozen=True, slots=True)
class Execution:
    """What one program did. `stdout`, `stderr`, `value`: their first and last bytes, up to the limit."""

    state: State
    code: int = 0  # exit code; the signal's number for SIGNAL
    stdout: str = ""
    stderr: str = ""  # with the traceback, if it raised
    value: str = ""  # repr of the last expression, "" if None
    files: Mapping[str, str] = field(default_factory=dict)  # those of `fetch` that exist, base64
    dropped: int = 0  # bytes cut from the middle of the longest of the three
    seconds: float = 0.0
    fresh: bool = True  # False: the session was there already
