"""A sealed directory is on disk as a whole or not at all, and knows the hash of every file in it."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from otcrl.errors import DataError

MANIFEST = "manifest.json"


class Corrupt(DataError):
    """A file is not what was written."""


@contextmanager
def whole(final: Path) -> Iterator[Path]:
    """A temporary directory that becomes `final` when it has been filled, in place of what was there."""
    temporary = final.with_name(f".writing-{final.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        publish(temporary, final)
    except BaseException:  # whatever it is goes on, and leaves nothing half written
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def publish(temporary: Path, final: Path) -> None:
    """Its files are on disk; now its name."""
    if final.exists():
        remove(final)
    temporary.rename(final)
    sync(final.parent)


def remove(path: Path) -> None:
    """Gone at once for whoever looks; what a kill leaves of it has a name that nobody reads."""
    gone = path.with_name(f".removing-{path.name}")
    shutil.rmtree(gone, ignore_errors=True)
    path.rename(gone)
    shutil.rmtree(gone, ignore_errors=True)


def clear(folder: Path) -> None:
    """Remove what a killed run was writing or removing."""
    for path in [*folder.glob(".writing-*"), *folder.glob(".removing-*")]:
        shutil.rmtree(path, ignore_errors=True)


def seal(folder: Path, about: Mapping[str, Any], known: Mapping[str, str] | None = None) -> None:
    """The manifest, and all of it on disk. `known` are hashes that need not be computed again."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    hashes = {str(path.relative_to(folder)): path for path in files}
    listed = {
        name: {"bytes": path.stat().st_size, "sha256": (known or {}).get(name) or digest(path)}
        for name, path in hashes.items()
    }
    content = {**about, "files": listed}
    text = json.dumps(content | {"sha256": own_digest(content)}, indent=1, ensure_ascii=False)
    (folder / MANIFEST).write_text(text, encoding="utf-8")
    for path in [*files, folder / MANIFEST, *{path.parent for path in files}, folder]:
        sync(path)


def check(folder: Path) -> dict[str, Any]:
    """The manifest of a sealed directory, whose files are as they were written. Raises Corrupt, naming what is not.

    Raises DataError where the file system fails: that says nothing about what was written, and may pass.
    """
    try:
        content = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        own, listed = content.pop("sha256"), content["files"]
    except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise Corrupt(f"{folder / MANIFEST} cannot be read: {error!r}") from error
    except OSError as error:
        raise DataError(f"{folder / MANIFEST} cannot be read: {error.strerror}") from error
    if own != own_digest(content):
        raise Corrupt(f"{folder / MANIFEST} has sha256 {own_digest(content)}, and it says {own}")
    for name, expected in listed.items():
        path = folder / name
        try:
            size = path.stat().st_size
            if size != expected["bytes"]:
                raise Corrupt(f"{path} has {size} bytes, and {expected['bytes']} were written")
            found = digest(path)
        except FileNotFoundError as error:
            raise Corrupt(f"{path} is gone") from error
        except OSError as error:
            raise DataError(f"{path} cannot be read: {error.strerror}") from error
        if found != expected["sha256"]:
            raise Corrupt(f"{path} has sha256 {found}, and what was written had {expected['sha256']}")
    return content


def digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def own_digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_whole(path: Path, text: str) -> None:
    """The file's new content, or the one it had."""
    beside = path.with_name(f".writing-{path.name}")
    try:
        beside.write_text(text, encoding="utf-8")
        sync(beside)
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)
