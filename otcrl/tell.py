"""What a run says about itself, on stderr unless a caller wants it elsewhere."""

from __future__ import annotations

import sys
from contextlib import suppress
from typing import TextIO


def tell(text: str, to: TextIO | None = None) -> None:
    """One line. That it cannot be written (its disk is full) is no reason to end what it is about."""
    with suppress(OSError):
        print(f"otcrl: {text}", file=to or sys.stderr, flush=True)
