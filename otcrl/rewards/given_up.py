"""Answers whose judging was given up: too slow, or too large. They count as wrong, which must not go unseen."""

from __future__ import annotations

import logging
import threading

log = logging.getLogger(__name__)
SHOWN = 80  # characters of an answer in a warning


class GivenUp:
    """How many there were in this process; mutable, and safe to share between threads."""

    def __init__(self) -> None:
        self._lock, self._count = threading.Lock(), 0

    @property
    def count(self) -> int:
        return self._count

    def add(self, answer: str, why: str) -> None:
        """Warns of the first; the others show in the metric."""
        with self._lock:
            self._count += 1
            is_first = self._count == 1
        if is_first:
            shown = f"{answer[:SHOWN]!r}{'...' if len(answer) > SHOWN else ''}"
            log.warning("the answer %s counts as wrong: its judge %s (reward/judge_timeouts counts them)", shown, why)


GIVEN_UP = GivenUp()
