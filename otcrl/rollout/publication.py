"""New weights on their way to vLLM's workers, and the proof that they arrived.

A message names a method of the workers' extension (vllm_worker.py) and carries a digest for each parameter; each worker
reports what it has. Weights on a GPU that the worker sees too travel as handles, all others in a file in memory: also
those of a split model (ZeRO-3), of which a GPU never holds more than a layer. Its ranks all gather the layers, and one
file on each machine is enough for the engines of all.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from otcrl import dist
from otcrl.errors import EngineError, nearest
from otcrl.models.published import is_split, published
from otcrl.rollout.device_handles import Lender
from otcrl.rollout.snapshot import Manifest, Snapshot
from otcrl.rollout.vllm_worker import fingerprint, holds, module_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, slots=True)
class Message:
    """One publication, as plain values that travel to every worker."""

    method: str  # of `vllm_worker.Receiver`
    content: Mapping[str, Any]
    version: int
    all_changed: bool  # no parameter has the value it was published with before
    changed: Mapping[str, bool] = field(default_factory=dict)  # the same of each, in the engine's type; empty: unknown


class Publisher:
    def __init__(
        self, model: PreTrainedModel, *, by_handle: bool, folder: Path | None = None, dtype: torch.dtype | None = None
    ) -> None:
        """`model` has the names and shapes that every set of weights must have. `folder` null: main memory.

        `dtype`: the engine's, if it is not the model's.
        """
        self._model, self._folder = model, folder
        self._snapshot = None if by_handle else Snapshot(folder)
        self._manifest: Manifest | None = None  # of the last complete set, where it is in a file
        self._lender = Lender()
        self._dtype = dtype or model.dtype
        self._digests: dict[str, str] = {}  # of the weights prepared last
        self._rounded: dict[str, str] = {}  # the same in the engine's type, of those that it rounds
        self._version = 0

    def prepare(self, weights: Iterable[tuple[str, Tensor]], version: int) -> Message:
        """Of a split model on all ranks. Raises EngineError naming a missing, unknown or misshapen parameter."""
        checked = self._rounding(check_names(weights, self._model))
        before = self._digests and self._digests | self._rounded
        self._rounded, self._version = {}, version
        if self._snapshot is None and is_split(self._model):
            self._snapshot = Snapshot(self._folder)
        if self._snapshot is not None:
            self._manifest = None
            self._manifest = manifest = self._written(self._snapshot, checked, version)
            self._digests = {entry.name: entry.digest for entry in manifest.entries}
            method, content = "otcrl_load_file", manifest.plain()
        else:
            self._lender.take_back()  # of a publication that failed
            found = list(checked)
            self._digests = {name: fingerprint(tensor.detach()) for name, tensor in found}
            method, content = "otcrl_load_handles", self._handles(found, version)
        now = self._digests | self._rounded
        changed = {name: before.get(name) != digest for name, digest in now.items()} if before else {}
        return Message(method, content, version, bool(changed) and all(changed.values()), changed)

    def _written(self, file: Snapshot, weights: Iterable[tuple[str, Tensor]], version: int) -> Manifest:
        """Of a split model the first rank of each machine writes the file, and all of that machine read it."""
        if dist.size() == 1 or not is_split(self._model):
            return file.write(weights, version)
        what = f"publication of version {version}"
        dist.barrier(what)  # every engine has read what the file holds
        if dist.local_rank() == 0:
            mine = file.write(weights, version)
        else:
            mine = None
            deque(weights, maxlen=0)  # none is kept, but all are gathered, with this rank's part
        found = dist.gather(mine, what)[dist.rank() - dist.local_rank()]
        assert found is not None, "the launcher numbers the ranks of a machine one after the other"
        return found

    def _rounding(self, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """The same as they come. An update that is rounded away changes nothing in the engine."""
        for name, tensor in weights:
            if not holds(self._dtype, str(tensor.dtype).removeprefix("torch.")):
                self._rounded[name] = fingerprint(tensor.detach().to(self._dtype))
            yield name, tensor

    def again(self) -> Message | None:
        """The same weights for an engine that lost them; None when the learner has already changed them in place.

        They may change while the engine takes them: `is_current` says afterwards whether it has them.
        """
        if self._snapshot is not None:
            assert self._manifest is not None, "nothing is generated before the first publication"
            return Message("otcrl_load_file", self._manifest.plain(), self._version, False)
        found = self._found()
        if not self._same(found):
            return None
        return Message("otcrl_load_handles", self._handles(found, self._version), self._version, False)

    def is_current(self) -> bool:
        """Whether the weights prepared last are still what they were."""
        return self._snapshot is not None or self._same(self._found())

    def _found(self) -> list[tuple[str, Tensor]]:
        return [(weight.name, weight.value()) for weight in published(self._model)]

    def _same(self, found: Sequence[tuple[str, Tensor]]) -> bool:
        if {name: fingerprint(tensor.detach()) for name, tensor in found} == self._digests:
            return True
        self._digests = {}  # the engine may have some of the next weights already: then they will not change in it
        return False

    def _handles(self, weights: Sequence[tuple[str, Tensor]], version: int) -> dict[str, Any]:
        tensors = self._lender.handles(weights)  # the digests had to wait for the GPU, so who opens these need not
        return {"version": version, "tensors": tensors, "digests": self._digests}

    def delivered(self) -> None:
        """The last message has done its work: merged adapters are needed no more."""
        self._lender.take_back()

    def close(self) -> None:
        self._lender.close()
        if self._snapshot is not None:
            self._snapshot.close()


def check_names(weights: Iterable[tuple[str, Tensor]], model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """The same as they come. Raises EngineError unless they are the model's parameters, each once, in its shape."""
    own = {weight.name: weight.shape for weight in published(model)}
    missing = dict.fromkeys(own)
    for name, tensor in weights:
        if name not in own:
            raise EngineError(f"the engine's model has no parameter {name!r}.{nearest(name, own)}")
        if tensor.shape != own[name]:
            raise EngineError(
                f"parameter {name!r} has shape {list(tensor.shape)}, and the engine's is {list(own[name])}"
            )
        missing.pop(name, None)
        yield name, tensor
    if missing:
        raise EngineError(f"{len(missing)} parameters were not among the new weights: {', '.join([*missing][:5])}")


def check_delivery(reports: Sequence[Mapping[str, Any]], message: Message) -> None:
    """Raises EngineError unless every worker reports that it has the weights of `message`."""
    for number, report in enumerate(reports):
        if report["damaged"]:
            names = ", ".join(report["damaged"][:5])
            raise EngineError(f"weights of version {message.version} reached worker {number} damaged: {names}")
        if report["version"] != message.version:
            raise EngineError(
                f"worker {number} has weights of version {report['version']}, and {message.version} was published"
            )
        if blank := report.get("blank"):
            names = ", ".join(blank[:5])
            raise EngineError(f"worker {number} has not taken {names}: vLLM has no value there but a made up one")
    if not reports:
        return
    # of a parameter that is split among them each has a part, and that may well be what it was
    unchanged = set.intersection(*(set(report["unchanged"]) for report in reports))
    if kept := sorted(name for name in unchanged if must_change(name, message)):
        who, names = "worker 0" if len(reports) == 1 else "all workers", ", ".join(kept[:5])
        raise EngineError(f"{who} kept the old values of {names} when {message.version} was published")


def must_change(name: str, message: Message) -> bool:
    """Of the engine's parameter. vLLM joins some: a name that the learner has not changes if all of its module do."""
    if name in message.changed:
        return message.changed[name]
    module = module_of(module_of(name)) + "."
    parts = [changed for own, changed in message.changed.items() if own.startswith(module)]
    return all(parts) if parts else message.all_changed
