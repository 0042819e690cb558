"""Where metrics go. A logger writes down and decides nothing; the names are the same everywhere (docs/metrics.md)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from otcrl.protocols import Logger, Reads
from otcrl.types import Metrics


@dataclass(frozen=True, slots=True)
class Loggers:
    """Several loggers as one."""

    loggers: Sequence[Logger]

    def log(self, metrics: Metrics, step: int) -> None:
        for logger in self.loggers:
            logger.log(metrics, step)

    def read(self, transcripts: Sequence[Mapping[str, Any]], step: int) -> None:
        """Trajectories of the step, as transcripts.jsonl has them, for those loggers that show any."""
        for logger in self.loggers:
            if isinstance(logger, Reads):
                logger.read(transcripts, step)

    def close(self) -> None:
        with ExitStack() as closing:  # one that cannot keeps none of the others from it
            for logger in reversed(self.loggers):
                closing.callback(logger.close)
