"""The ranks of a run: as many processes as torchrun or the deepspeed launcher has started, one for each GPU.

Every rank plays its share of a step's problems and reads its share of the step's tokens; what they have found is
exchanged, so that each rank sees the whole step. A lone process is rank 0 of 1, and none of this costs it anything.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar, cast

from otcrl.errors import ConfigError, OtcrlError

if TYPE_CHECKING:  # torch takes seconds to import
    from torch import Tensor

T = TypeVar("T")
GAVE_UP = 75  # exit code of a rank whose others did not come (EX_TEMPFAIL)
GRACE_S = 60.0  # in which `deadline` says where a rank has waited, before torch's own watchdog ends it
NAMES = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
# What the launcher said. Read once: while vLLM starts beside the learner, the environment lacks it (vllm_launch.py).
LAUNCHER = {name: os.environ[name] for name in NAMES if name in os.environ}


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """How the ranks of a run wait for each other."""

    timeout_s: float  # for the slowest rank, whatever it is busy with; then the run ends

    def __post_init__(self) -> None:
        if not self.timeout_s > 0:
            raise ValueError(f"timeout_s must be above 0, got {self.timeout_s}")


class _State:
    """Of this process: who the others are, and how long they are waited for."""

    timeout_s: float = 0.0
    host_group: Any = None  # of gloo, for what lies in main memory


# -- who we are -------------------------------------------------------------------------------------------


def launched() -> int:
    """The number of processes that a launcher has started, 1 without one. Raises ConfigError when it cannot be told."""
    given = LAUNCHER.get("WORLD_SIZE", "1")
    if not given.isdecimal() or int(given) < 1:
        raise ConfigError(f"the launcher set WORLD_SIZE={given!r}, and it must be the number of processes")
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in LAUNCHER]
    if int(given) > 1 and missing:
        raise ConfigError(
            f"WORLD_SIZE is {given} and {missing[0]} is not set: start the run with "
            "`torchrun --nproc_per_node N -m otcrl train ...`"
        )
    return int(given)


def rank() -> int:
    """0 for the first process, and the only one that prints, logs and names files."""
    return int(LAUNCHER.get("RANK", "0")) if launched() > 1 else 0


def local_rank() -> int:
    """The number of this process on its machine."""
    return int(LAUNCHER.get("LOCAL_RANK", "0")) if launched() > 1 else 0


def own_gpu() -> int:
    """The number of this rank's GPU among those that it sees: its own number, or 0 where it is shown one alone, as by
    `srun --gpus-per-task=1`. Raises ConfigError when there is no such GPU."""
    import torch

    seen = torch.cuda.device_count()
    number = local_rank() if seen != 1 else 0
    if number >= seen:
        raise ConfigError(
            f"rank {rank()} is number {number} of its machine, from 0, and torch sees {seen} GPUs there: start as many "
            "ranks as there are GPUs, or set model.device=cpu"
        )
    return number


def size() -> int:
    """The number of processes."""
    return launched()


def is_first() -> bool:
    return rank() == 0


def start(ranks: Ranks) -> None:
    """Meets the other ranks. Raises ConfigError when they do not come."""
    _State.timeout_s = ranks.timeout_s
    if size() == 1 or _State.host_group is not None:
        return
    import torch
    from torch import distributed

    has_gpu = torch.cuda.is_available()
    with suppress(ConfigError):  # of more ranks than GPUs: then only the CPU may be the models'
        if has_gpu:
            torch.cuda.set_device(own_gpu())
    try:
        if not distributed.is_initialized():
            backend = "cpu:gloo,cuda:nccl" if has_gpu else "gloo"
            distributed.init_process_group(backend, timeout=timedelta(seconds=ranks.timeout_s + GRACE_S))
        _State.host_group = distributed.new_group(backend="gloo", timeout=timedelta(seconds=ranks.timeout_s))
    except (RuntimeError, ValueError) as error:  # torch's DistStoreError and DistNetworkError are RuntimeErrors
        raise ConfigError(f"rank {rank()} of {size()} did not meet the others: {error}") from error


def stop() -> None:
    """Takes leave of the other ranks."""
    if _State.host_group is not None:
        from torch import distributed

        _State.host_group = None
        distributed.destroy_process_group()


# -- what they exchange -----------------------------------------------------------------------------------


@contextmanager
def deadline(what: str) -> Iterator[None]:
    """Ends this process when the work inside, which needs all ranks, is not done in time.

    A collective that waits for a rank that died or went another way cannot be interrupted; the launcher ends the
    other ranks when one has ended.
    """
    if size() == 1:
        yield
        return
    timer = threading.Timer(_State.timeout_s, _give_up, [what])
    timer.daemon = True
    timer.start()
    try:
        yield
    except RuntimeError as error:
        if "gloo" in str(error) or "NCCL" in str(error) or "onnection closed" in str(error):
            error.add_note(f"rank {rank()} of {size()} was at: {what}. Another rank has failed, or is far behind")
        raise
    finally:
        timer.cancel()


def _give_up(what: str) -> None:
    import faulthandler

    print(
        f"otcrl: rank {rank()} of {size()} has waited {_State.timeout_s:g} s (ranks.timeout_s) for the others. "
        f"It was at: {what}. Which rank is missing, its own last lines tell; this one ends",
        file=sys.stderr,
        flush=True,
    )
    faulthandler.dump_traceback(all_threads=True)
    os._exit(GAVE_UP)


def barrier(what: str) -> None:
    """Returns when all ranks have come here."""
    if size() > 1:
        from torch import distributed

        with deadline(what):
            distributed.barrier(group=_State.host_group)


def gather(mine: T, what: str) -> list[T]:
    """What each rank has, by rank; anything that pickle takes."""
    if size() == 1:
        return [mine]
    from torch import distributed

    found: list[Any] = [None] * size()
    with deadline(what):
        distributed.all_gather_object(found, mine, group=_State.host_group)
    return found


def from_first(value: T, what: str) -> T:
    """What rank 0 has."""
    if size() == 1:
        return value
    from torch import distributed

    box = [value]
    with deadline(what):
        distributed.broadcast_object_list(box, src=0, group=_State.host_group)
    return box[0]


def decided_by_first(decide: Callable[[], T], what: str) -> T:
    """What the first rank's call has returned, or raised."""
    found: T | None = None
    error: OtcrlError | None = None
    if is_first():
        try:
            found = decide()
        except OtcrlError as caught:
            error = caught
    found, error = from_first((found, error), what)
    if error is not None:
        raise error
    return cast(T, found)


def add(tensors: Sequence[Tensor], what: str) -> None:
    """Each tensor becomes the sum of all ranks' own, in place; where it lies, in main memory or on the GPU."""
    if size() > 1:
        from torch import distributed

        with deadline(what):
            for tensor in tensors:
                group = _State.host_group if tensor.device.type == "cpu" else None
                distributed.all_reduce(tensor, group=group)
            settle()


def settle() -> None:
    """Returns when this thread's GPU has done what it was asked to: a collective there has only begun when its call
    returns, and it is then that a missing rank is waited for."""
    import torch

    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def largest(value: int, what: str) -> int:
    """The largest of all ranks' values."""
    return max(gather(value, what))


# -- how work is split -------------------------------------------------------------------------------------


def share(items: Sequence[T]) -> Sequence[T]:
    """This rank's part of what all ranks have: every `size`-th."""
    return items[rank() :: size()]


def together(mine: Sequence[T], what: str) -> list[T]:
    """What `share` has split, in the order it had."""
    parts = gather(list(mine), what)
    return [parts[i % size()][i // size()] for i in range(sum(map(len, parts)))]
