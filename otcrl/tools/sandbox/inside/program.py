"""One child's life: wait for a program, run it, report; in a session, wait for the next. It runs inside.

What a child says about itself (its value, its files) is believed only as being its own: it cannot lie about another.
"""

from __future__ import annotations

import ast
import atexit
import base64
import contextlib
import linecache
import os
import resource
import sys
import threading
import traceback
import types
from collections.abc import Callable
from typing import Any

from otcrl.tools.sandbox.inside import channel
from otcrl.tools.sandbox.inside.confine import LAST_WORDS_BYTES

FILE = "<code>"  # the program's file name in its tracebacks
MOST_FETCHED = 8 << 20  # bytes of the files that a program leaves for its caller


def become_main() -> None:
    """The module in which programs run, empty."""
    sys.modules["__main__"] = types.ModuleType("__main__")
    sys.argv = [""]


def live(requests: int, reports: int, limit: Callable[[dict[str, Any]], None]) -> None:
    """Run what comes until nothing does; `limit` is called with the first request. Never returns."""
    code = 70
    try:
        namespace = vars(sys.modules["__main__"])
        request = channel.receive(requests)
        if request is not None:
            limit(request)
        while request is not None:
            code, report = run(request, namespace)
            channel.send(reports, report)
            request = channel.receive(requests) if request["session"] else None
    except BaseException:  # a copy of the zygote must end here, not go on in the zygote's loop
        traceback.print_exc()
    finally:
        os._exit(code)


def run(request: dict[str, Any], namespace: dict[str, Any]) -> tuple[int, dict[str, Any]]:
    """(exit code, report) of one program or cell."""
    allow_last_words(False)
    value = ""
    try:
        place(request)
        value = execute(request["code"], namespace)
        if not request["session"]:  # as the interpreter does at its end
            threading._shutdown()  # pyright: ignore[reportAttributeAccessIssue]
            atexit._run_exitfuncs()
        code = 0
    except SystemExit as end:
        if end.code is not None and not isinstance(end.code, int):
            print(end.code, file=sys.stderr)
        code = (end.code & 0xFF) if isinstance(end.code, int) else int(end.code is not None)
    except BaseException as error:  # whatever the program raised is its result
        code = 1
        allow_last_words(True)
        channel.write_all(2, users_traceback(error).encode(errors="replace"))
    allow_last_words(True)
    for name in ("stdout", "__stdout__", "stderr"):
        with contextlib.suppress(Exception):  # the program may have put anything there
            getattr(sys, name).flush()
    most = request["max_bytes"]
    cut = max(0, len(value) - 2 * most)
    shown = value[:most] + value[-most:] if cut else value
    return code, {"code": code, "value": shown, "cut": cut, "files": fetched(request["fetch"])}


def place(request: dict[str, Any]) -> None:
    """The caller's files beneath the working directory, and its text on standard input."""
    for name, content in request["files"].items():
        os.makedirs(os.path.dirname(os.path.join(".", name)), exist_ok=True)
        with open(name, "wb") as file:
            file.write(base64.b64decode(content))
    if request["stdin"]:
        fd = os.open(".", os.O_TMPFILE | os.O_RDWR)
        channel.write_all(fd, request["stdin"].encode(errors="surrogateescape"))
        os.lseek(fd, 0, os.SEEK_SET)
        os.dup2(fd, 0)
        os.close(fd)


def execute(source: str, namespace: dict[str, Any]) -> str:
    """Run it; the repr of its last expression, as a notebook would show it, "" if there is none or it is None."""
    linecache.cache[FILE] = (len(source), None, source.splitlines(keepends=True), FILE)
    tree = ast.parse(source, FILE)
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, FILE, "exec"), namespace)
    if not isinstance(last, ast.Expr):
        return ""
    value = eval(compile(ast.Expression(last.value), FILE, "eval"), namespace)
    return "" if value is None else repr(value)


def users_traceback(error: BaseException) -> str:
    """The traceback with the program's own frames only: no worker, no library, no chained exceptions."""
    report = traceback.TracebackException(type(error), error, error.__traceback__)
    own = [frame for frame in report.stack if frame.filename == FILE]
    for frame in own:
        frame.colno = frame.end_colno = None  # no carets
    report.stack = traceback.StackSummary.from_list(own)
    report.__cause__ = report.__context__ = None
    lines = list(report.format())
    return "".join(lines if own else lines[1:] if lines[0].startswith("Traceback") else lines)


def allow_last_words(allowed: bool) -> None:
    """A program out of memory may use what was kept back, to say so."""
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (hard if allowed else hard - LAST_WORDS_BYTES, hard))


def fetched(names: list[str]) -> dict[str, str]:
    """Those of the files that exist, in base64, as long as there is room."""
    found: dict[str, str] = {}
    room = MOST_FETCHED
    for name in names:
        with contextlib.suppress(OSError), open(name, "rb") as file:
            content = file.read(room + 1)
            if len(content) <= room:
                found[name] = base64.b64encode(content).decode()
                room -= len(content)
    return found
