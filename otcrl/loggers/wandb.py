"""Metrics and whole trajectories to Weights & Biases. The only file that imports wandb.

Charts are over `step`, a metric of its own: W&B drops what is logged of a step below its own count, and a run that was
killed logs the steps after its last checkpoint again.
"""

from __future__ import annotations

import importlib
import sys
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from otcrl.errors import ConfigError
from otcrl.loggers.jsonl import say_unwritten
from otcrl.secrets import told
from otcrl.types import Metrics

COLUMNS = {  # of the table: name -> what it shows of a transcript
    "id": lambda row: row["id"],
    "question": lambda row: row["question"],
    "response": lambda row: row["response"],
    "answer": lambda row: row["answer"],
    "correct": lambda row: row["correct"],
    "reward": lambda row: row["reward"],
    "calls": lambda row: len(row["calls"]),
    "optimal_calls": lambda row: row["optimal_calls"],
    "tokens": lambda row: row["tokens"]["sampled"],
    "stop": lambda row: str(row["stop"]),
}


class WandbLogger:
    """One run per run directory: a resumed run goes on in the same W&B run."""

    wired = frozenset({"name", "folder", "config"})

    def __init__(
        self,
        *,
        project: str,
        entity: str | None,
        mode: Literal["online", "offline"],
        trajectories: int,  # rows of the table of a step that has transcripts; 0: no table
        name: str,
        folder: Path,
        config: Mapping[str, object],  # without secrets
    ) -> None:
        if trajectories < 0:
            raise ValueError(f"trajectories must be at least 0, got {trajectories}")
        try:
            self._wandb: Any = importlib.import_module("wandb")
        except ModuleNotFoundError as error:
            raise ConfigError("wandb is not installed: pip install 'otcrl[wandb]', or choose logger=console") from error
        folder.mkdir(parents=True, exist_ok=True)
        self._most, self._folder = trajectories, folder
        try:
            self.run = self._wandb.init(
                project=project,
                entity=entity,
                mode=mode,
                name=name,
                id=run_id(folder),
                resume="allow",
                dir=str(folder),
                config=dict(config),
                # of the machine and the command line, which a secret may be in
                settings=self._wandb.Settings(x_disable_meta=told(sys.argv)),
            )
        except self._wandb.errors.Error as error:  # no login, or no network
            why = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise ConfigError(
                f"wandb cannot begin a run: {why}. `wandb login` or WANDB_API_KEY, or logger.wandb.mode=offline"
            ) from error
        self.run.define_metric("step")
        self.run.define_metric("*", step_metric="step")

    def log(self, metrics: Metrics, step: int) -> None:
        self.run.log({"step": step, **metrics})

    def read(self, transcripts: Sequence[Mapping[str, Any]], step: int) -> None:
        if self._most:
            rows = [[show(row) for show in COLUMNS.values()] for row in transcripts[: self._most]]
            table = self._wandb.Table(columns=list(COLUMNS), data=rows, allow_mixed_types=True)
            try:
                self.run.log({"step": step, "trajectories": table})  # by way of a file
            except OSError as error:
                say_unwritten(self._folder / "wandb", error, f"there is no table of step {step}")

    def close(self) -> None:
        self.run.finish()


def run_id(folder: Path) -> str:
    """The id that `folder` keeps for its W&B run, made on first use."""
    path = folder / "wandb_id"
    if not path.exists():
        path.write_text(uuid.uuid4().hex)
    return path.read_text().strip()
