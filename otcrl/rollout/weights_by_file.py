"""New weights for rollout servers through a file: in memory for those on this machine, in a folder for others."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from otcrl.errors import EngineError
from otcrl.rollout.fleet import Fleet, Server, named
from otcrl.rollout.publication import Message, Publisher, check_delivery

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class WeightsByFile:
    keeps = True  # the weights sent last can be brought to a server that comes later

    def __init__(
        self,
        fleet: Fleet,
        model: PreTrainedModel,
        folder: str | None,
        timeout_s: float,
        dtype: torch.dtype | None = None,  # the servers'; None: the model's
    ) -> None:
        self._fleet, self._folder = fleet, folder
        self._load_s = 0.8 * timeout_s  # a server that takes most of the time is left out, and ends no publication
        self._publisher = Publisher(model, by_handle=False, folder=Path(folder) if folder else None, dtype=dtype)
        self._message: Message | None = None

    def prepare(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Raises EngineError naming a parameter that is missing, unknown or of another shape."""
        self._message = self._publisher.prepare(weights, version)

    async def bring(self, servers: Sequence[Server], *, again: bool = False) -> list[Server]:
        """Those that have the weights prepared last. Raises EngineError naming a parameter that did not arrive."""
        message = self._publisher.again() if again else self._message
        assert message is not None, "weights are prepared before they are brought"

        async def load(server: Server) -> None:
            try:
                reports = await self._fleet.rpc(server, message.method, message.content, timeout_s=self._load_s)
            except EngineError as error:
                if self._folder is not None or "Errno" not in str(error):
                    raise
                raise EngineError(
                    f"{error}. What is in this process's memory can only be read on this machine and by its user: "
                    "name a folder that the servers see too, engine.weights_dir"
                ) from error
            with named(server):
                check_delivery(reports, message)

        return await self._fleet.each(servers, load)

    async def close(self) -> None:
        self._publisher.close()
