"""A batch's rows as forward passes: this rank's share, as many passes as the others make where that matters."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from otcrl import dist
from otcrl.learner.backend import Backend
from otcrl.learner.thread import stop_if_cancelled
from otcrl.models.reader import Micro, Reader


def passes(
    reader: Reader, backend: Backend, token_ids_BT: Tensor, mask_BT: Tensor, max_tokens: int
) -> Iterator[tuple[Micro, bool]]:
    """(a pass, whether it counts); what does not count has the first two tokens of row 0, see `idle_mask`."""
    micros = reader.micros(token_ids_BT, mask_BT, max_tokens, dist.rank(), dist.size())
    most = 0
    if backend.in_step:
        micros = list(micros)
        most = max(1, dist.largest(len(micros), "counting forward passes"))
    count = 0
    for micro in micros:
        stop_if_cancelled()
        count += 1
        yield micro, True
    for _ in range(most - count):
        (micro,) = reader.micros(token_ids_BT[:1, :2], idle_mask(), 2)
        yield micro, False


def idle_mask() -> Tensor:
    """[1, 2]: what the model says about one token is asked for, and not used."""
    return torch.tensor([[False, True]])
