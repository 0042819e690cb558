"""Reading .jsonl and .jsonl.gz, the form of data sets and corpora alike."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path

from otcrl.errors import DataError


def read_json_lines(path: str | Path) -> Iterator[tuple[str, object]]:
    """(`path, line 7`, what the line holds) for each line that is not blank, one at a time.

    Raises DataError naming the line for what is not JSON in UTF-8, and for a file that cannot be read or
    ends too soon.
    """
    number = 0
    try:
        with gzip.open(path, "rb") if str(path).endswith(".gz") else open(path, "rb") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    where = f"{path}, line {number}"
                    yield where, _parsed(line, where)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{path} is not a whole gzip file, it ends after line {number}: {error}") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from error


def _parsed(line: bytes, where: str) -> object:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:  # not JSON, not UTF-8, or too deep
        raise DataError(f"{where}: expected one JSON object per line, got {line[:60]!r}: {error}") from error
