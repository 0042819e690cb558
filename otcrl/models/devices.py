"""Which GPU is the current one."""

from __future__ import annotations

import torch


def make_current(device: torch.device) -> None:
    """Of this thread, the current GPU; nothing on CPU. A new thread has GPU 0, whatever its parent has."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
