"""A folder of a process's own, for what it would leave behind when it is killed: vLLM's sockets, a model's weights."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path

OWNED = "owned"  # the file in it that its owner holds


class OwnFolder:
    """Gone at the end; what an owner that was killed has left is removed by the next one on the same machine."""

    def __init__(self, within: Path | None = None) -> None:
        """`within` null: the system's folder for temporary files."""
        within = within or Path(tempfile.gettempdir())
        remove_ownerless(within)
        self._folder = tempfile.TemporaryDirectory(prefix=prefix(), dir=within, ignore_cleanup_errors=True)
        self.path = Path(self._folder.name)
        self._held = (self.path / "new").open("w")  # until this process ends, however that comes about
        with suppress(OSError):  # a file system without locks: then nobody gets one, and all stays
            fcntl.flock(self._held, fcntl.LOCK_EX)
        (self.path / "new").rename(self.path / OWNED)  # there is no moment at which it is seen and not held

    def close(self) -> None:
        self._folder.cleanup()
        self._held.close()


def prefix() -> str:
    """With this machine's name: others may see the folder, and not see that somebody holds a file in it."""
    return f"otcrl-{os.uname().nodename}-"


def remove_ownerless(within: Path) -> None:
    """Best effort: folders whose owner has been killed."""
    for folder in within.glob(f"{prefix()}*"):
        with suppress(OSError), (folder / OWNED).open("r+") as held:  # another user's cannot be opened
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)
