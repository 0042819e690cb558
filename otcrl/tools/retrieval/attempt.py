"""An index directory in the making: it lies in `.NAME.building` beside its place until it is whole.

What is encoded outlives an attempt, for the next one; all else is made anew.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from otcrl.errors import DataError
from otcrl.tools.retrieval.encode import Encoder
from otcrl.tools.retrieval.index import Manifest, manifest_files

VECTORS, ENCODING = WORKING = ("vectors.bin", "encoding.json")  # of no use once the index is whole


def building(directory: Path) -> Path:
    """Where it lies until it is whole."""
    return directory.with_name(f".{directory.name}.building")


def refuse_existing(directory: Path) -> None:
    if directory.exists():
        raise DataError(f"index directory {directory} is there already: delete it or name another")


@contextlib.contextmanager
def unfinished(directory: Path, *, encodes: bool) -> Iterator[Path]:
    """Where to work; it becomes `directory` if it then has a manifest, and stays for the next attempt if not.

    Raises DataError where vectors of an earlier attempt lie there and this one `encodes` nothing.
    """
    refuse_existing(directory)
    work = building(directory)
    try:
        work.mkdir(parents=True, exist_ok=True)
        lock = os.open(work, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if directory.exists():  # whoever had the lock was done just now
                with contextlib.suppress(OSError):
                    work.rmdir()  # as it was made above, empty; one that holds vectors stays
                refuse_existing(directory)
            if not encodes and (work / VECTORS).exists():
                raise DataError(
                    f"{work} holds the vectors of an unfinished build: finish it with the same settings, or delete it"
                )
            clear_but_encoding(work)
            yield work
            if (work / "manifest.json").exists():
                work.rename(directory)
                for name in WORKING:  # only now: until the index is there they are all that hours of work have left
                    (directory / name).unlink(missing_ok=True)
        except BlockingIOError as error:
            raise DataError(f"index {directory}: another process is building it") from error
        finally:
            os.close(lock)
    except OSError as error:
        raise DataError(f"index {directory} cannot be written: {error.strerror or error}. {kept(work)}") from error


def clear_but_encoding(work: Path) -> None:
    """Without the rest of an earlier attempt, which may have been for another kind, and as good as finished."""
    for path in work.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name not in WORKING:
            path.unlink()


def write_manifest(work: Path, manifest: Manifest) -> None:
    text = json.dumps(asdict(manifest) | {"files": manifest_files(work, but=WORKING)}, indent=2)
    (work / "manifest.json").write_text(text + "\n")


def kept(work: Path) -> str:
    has = (work / VECTORS).exists()
    return f"What is encoded is kept in {work}: the same command goes on from there" if has else "Nothing was encoded"


def mark_encoding(work: Path, encoder: Encoder | None, sha256: str) -> None:
    """Whose vectors lie in `work`. Raises DataError if they are another's."""
    assert encoder is not None
    mark, path = {"encoder": encoder.name, "corpus_sha256": sha256}, work / ENCODING
    if not path.exists():
        (work / VECTORS).unlink(missing_ok=True)
        half = path.with_suffix(".half")
        half.write_text(json.dumps(mark))
        half.rename(path)  # a disk that is full leaves no half of it
    elif (found := json.loads(path.read_text())) != mark:
        other = next(key for key in mark if found.get(key) != mark[key])
        raise DataError(
            f"{work} holds an unfinished build with {other} {found.get(other)!r}, but this one has {mark[other]!r}: "
            "finish it with the same settings, or delete it"
        )
