"""Metrics as TensorBoard's event files: `tensorboard --logdir runs`. The only file that imports tensorboard."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from otcrl.compose import to_yaml
from otcrl.errors import ConfigError
from otcrl.loggers.jsonl import say_unwritten
from otcrl.types import Metrics

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


class TensorBoardLogger:
    """Writes to RUN/tensorboard, which is its name in TensorBoard. The config is a text of the run."""

    wired = frozenset({"folder", "config", "resume_step"})

    def __init__(
        self,
        *,
        flush_s: int,  # between two writes to disk
        folder: Path,
        config: Mapping[str, object],  # without secrets
        resume_step: int | None = None,  # where a resumed run goes on: TensorBoard hides what it had of later steps
    ) -> None:
        if flush_s < 1:
            raise ValueError(f"flush_s must be at least 1 second, got {flush_s}")
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ModuleNotFoundError as error:
            why = "tensorboard is not installed: pip install 'otcrl[tensorboard]', or choose logger=console"
            raise ConfigError(why) from error
        self._path = folder / "tensorboard"
        self._writer: SummaryWriter | None = SummaryWriter(str(self._path), purge_step=resume_step, flush_secs=flush_s)
        self._writer.add_text("config", "".join(f"    {line}\n" for line in to_yaml(dict(config)).splitlines()))

    def log(self, metrics: Metrics, step: int) -> None:
        if self._writer is None:
            return
        try:
            for name, value in metrics.items():
                self._writer.add_scalar(name, value, step)
        except OSError as error:  # of its thread, which is at its end: metrics.jsonl has everything
            say_unwritten(self._path, error, f"there is nothing in it from step {step} on")
            self._writer = None

    def close(self) -> None:
        if self._writer is not None:
            try:
                self._writer.close()
            except OSError as error:
                say_unwritten(self._path, error, "its last lines are not in it")
