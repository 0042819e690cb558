"""Metrics to Weights & Biases. The only file that imports wandb."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from otcrl.errors import ConfigError
from otcrl.types import Metrics


class WandbLogger:
    """One run per run directory: a resumed run goes on in the same W&B run."""

    wired = frozenset({"name", "folder", "config"})

    def __init__(
        self,
        *,
        project: str,
        entity: str | None,
        mode: Literal["online", "offline"],
        name: str,
        folder: Path,
        config: Mapping[str, object],
    ) -> None:
        try:
            wandb = importlib.import_module("wandb")
        except ModuleNotFoundError as error:
            raise ConfigError("wandb is not installed: pip install 'otcrl[wandb]', or choose logger=console") from error
        folder.mkdir(parents=True, exist_ok=True)
        self.run = wandb.init(
            project=project,
            entity=entity,
            mode=mode,
            name=name,
            id=run_id(folder),
            resume="allow",
            dir=str(folder),
            config=dict(config),
        )

    def log(self, metrics: Metrics, step: int) -> None:
        self.run.log(metrics, step=step)

    def close(self) -> None:
        self.run.finish()


def run_id(folder: Path) -> str:
    """The id that `folder` keeps for its W&B run, made on first use."""
    path = folder / "wandb_id"
    if not path.exists():
        import uuid

        path.write_text(uuid.uuid4().hex)
    return path.read_text().strip()
