"""Which GPU is the current one."""

from __future__ import annotations

import torch


def use(device: torch.device) -> None:
    """Makes it the current GPU of this thread; nothing on CPU. A new thread has GPU 0, whatever its parent has."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
