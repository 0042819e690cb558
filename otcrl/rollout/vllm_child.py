"""What the workers of a trainer's own vLLM import: `Receiver`, and that they end when the trainer does.

Otherwise vLLM outlives a trainer that is killed and keeps its GPU, and the run cannot be started again.
"""

from __future__ import annotations

import os
import select
import threading

from otcrl.rollout.vllm_launch import TRAINER
from otcrl.rollout.vllm_worker import Receiver

__all__ = ["Receiver"]  # vLLM finds it here


def end_with(process: int) -> None:
    """From now on this process does not outlive that one. vLLM ends when one of its workers has ended."""
    try:
        trainer = os.pidfd_open(process)
    except ProcessLookupError:
        os._exit(1)

    def watch() -> None:
        select.select([trainer], [], [])
        os._exit(1)

    threading.Thread(target=watch, name="ends with the trainer", daemon=True).start()


if number := os.environ.get(TRAINER):  # only such a worker imports this module
    end_with(int(number))
