"""Where metrics go. A logger writes down and decides nothing; the names are the same everywhere."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from otcrl.protocols import Logger
from otcrl.types import Metrics


@dataclass(frozen=True, slots=True)
class Loggers:
    """Several loggers as one."""

    loggers: Sequence[Logger]

    def log(self, metrics: Metrics, step: int) -> None:
        for logger in self.loggers:
            logger.log(metrics, step)

    def close(self) -> None:
        for logger in self.loggers:
            logger.close()
