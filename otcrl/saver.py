"""Checkpoints are written while training goes on: `save` copies the state to main memory, a thread writes it.

With several ranks each writes the tensors whose turn it is, and says so with a note in the temporary directory; the
first rank waits for the notes, writes the manifest and gives the directory its name. No collective is needed outside
`save`, but the ranks must see one file system.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from otcrl import checkpoint, dist, sealed
from otcrl.checkpoint import Standing
from otcrl.errors import nearest
from otcrl.tell import tell
from otcrl.types import Metrics

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

    from otcrl.learner.learner import Learner

OTHERS_S = 1800.0  # how long the first rank waits for what the others write
NOTICE_S = 0.05  # how often it looks


@dataclass(frozen=True, kw_only=True)
class Copied:
    """A run's state at one moment, in main memory."""

    standing: Standing
    weights: Mapping[str, Tensor]  # of the policy; the first rank's alone
    state: Mapping[str, Tensor]  # of the learner, this rank's part
    about: Mapping[str, Any]


class Saver:
    """Writes checkpoints into `folder`, one at a time, and removes old ones. Whoever made it calls `close`.

    A failure is said and counted; training goes on with the checkpoint before. `logs` are on disk before a checkpoint
    that comes after them.
    """

    def __init__(
        self,
        folder: Path,
        *,
        keep: int,
        keep_best: str | None,
        about: Callable[[], Mapping[str, Any]],
        logs: Sequence[Path] = (),
        rank: int | None = None,
        ranks: int | None = None,
    ) -> None:
        self._folder, self._keep, self._about, self._logs = folder, keep, about, logs
        self.best = Best(keep_best)
        self._rank = dist.rank() if rank is None else rank
        self._ranks = dist.size() if ranks is None else ranks
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._writing: Future[Metrics] | None = None
        self._news: Metrics = {}
        self._failed = 0
        self.saved: int | None = None  # step of the last one, also if it could not be written
        self.lost = ""  # why the last one could not be written

    # -- what the training loop uses ------------------------------------------------------------------------

    def save(self, standing: Standing, learner: Learner, tokenizer: PreTrainedTokenizerBase) -> None:
        """Returns when the state has been copied. All ranks together, in the learner's thread."""
        begun = time.monotonic()
        self.wait()
        weights = {name: checkpoint.host(tensor) for name, tensor in learner.weights() if self._rank == 0}
        if self._rank == 0:
            weights |= checkpoint.own_buffers(learner.policy)
        numbered = enumerate(learner.state())
        state = {name: checkpoint.host(t) for i, (name, t) in numbered if i % self._ranks == self._rank}
        copied = Copied(standing=standing, weights=weights, state=state, about=self._about())
        self.saved = standing.step
        self._writing = self._pool.submit(self._write, copied, learner, tokenizer)
        self._news["checkpoint/blocked_s"] = time.monotonic() - begun

    def metrics(self) -> Metrics:
        """What there is to tell since the last time."""
        if self._writing is not None and self._writing.done():
            self.wait()
        news, self._news = self._news, {}
        return news

    def wait(self) -> None:
        """Until nothing is being written."""
        if self._writing is not None:
            self._news |= self._writing.result()
            self._writing = None

    def close(self) -> None:
        self._pool.shutdown()

    # -- in the thread ------------------------------------------------------------------------------------

    def _write(self, copied: Copied, learner: Learner, tokenizer: PreTrainedTokenizerBase) -> Metrics:
        begun = time.monotonic()
        final = self._folder / f"step-{copied.standing.step:06d}"
        temporary = final.with_name(f".writing-{final.name}")
        try:
            if self._rank == 0:
                for left in set(self._folder.glob(".writing-*")) - {temporary}:  # by ranks that failed after this one
                    shutil.rmtree(left, ignore_errors=True)
            temporary.mkdir(parents=True, exist_ok=True)
            hashes = self._write_part(temporary, copied.state)
            if self._rank == 0:
                model = checkpoint.write_model(temporary / "model", learner.policy, tokenizer, copied.weights)
                hashes |= {f"model/{name}": sha for name, sha in model.items()}
                checkpoint.write_run(temporary, copied.standing)
                hashes |= self._others(temporary)
                for log in self._logs:
                    if log.exists():
                        sealed.sync(log)
                about = {
                    "format": checkpoint.FORMAT,
                    "step": copied.standing.step,
                    "ranks": self._ranks,
                    **copied.about,
                }
                sealed.seal(temporary, about, hashes)
                sealed.publish(temporary, final)
                self._prune()
        except OSError as error:
            self._give_up(temporary, final, error)
            return {"checkpoint/failed": self._failed}
        self.lost = ""
        return {"checkpoint/write_s": time.monotonic() - begun}

    def _write_part(self, temporary: Path, state: Mapping[str, Tensor]) -> dict[str, str]:
        """This rank's tensors; the hash, by file name. The other ranks leave it in a note for the first."""
        name = f"state-{self._rank:05d}.safetensors"
        hashes = {name: checkpoint.write_tensors(temporary / name, state)}
        if self._rank:
            sealed.sync(temporary / name)
            sealed.write_whole(self._note(temporary, self._rank), json.dumps(hashes))
        return hashes

    def _note(self, temporary: Path, rank: int) -> Path:
        return temporary / f".rank-{rank:05d}.json"

    def _others(self, temporary: Path) -> dict[str, str]:
        """What the other ranks have written. Raises OSError when one has failed, or does not come."""
        hashes: dict[str, str] = {}
        deadline = time.monotonic() + OTHERS_S
        for rank in range(1, self._ranks):
            note = self._note(temporary, rank)
            while not note.exists():
                if time.monotonic() > deadline:
                    raise TimeoutError(f"rank {rank} has not written its part within {OTHERS_S:g} s")
                time.sleep(NOTICE_S)
            told = json.loads(note.read_text())
            if "failed" in told:
                raise OSError(f"rank {rank}: {told['failed']}")
            hashes |= told
            note.unlink()
        return hashes

    def _prune(self) -> None:
        """Only the last ones are left, and the best."""
        found = checkpoint.complete(self._folder)
        best = self.best.of([checkpoint.step_of(path) for path in found])
        for path in found[: -self._keep]:
            if checkpoint.step_of(path) != best:
                sealed.remove(path)

    def _give_up(self, temporary: Path, final: Path, error: OSError) -> None:
        why = reason(error)
        self._failed += 1
        self.lost = f"checkpoint {final.name} could not be written: {why}"
        if self._rank:
            (temporary / f"state-{self._rank:05d}.safetensors").unlink(missing_ok=True)  # that makes room for the note
            leave_note(self._note(temporary, self._rank), why)
            return
        shutil.rmtree(temporary, ignore_errors=True)
        left = checkpoint.complete(self._folder)
        holds = f"{left[-1].name} still holds" if left else "there is none yet"
        tell(f"FAILED: {self.lost}. Training goes on; {holds}")


def reason(error: OSError) -> str:
    return f"{error.strerror or error}" + (f" ({error.filename})" if error.filename else "")


def leave_note(note: Path, why: str) -> None:
    """For the first rank, if it can be written; if not, that one stops waiting in the end."""
    if not note.parent.exists():
        return  # it has given up already
    try:
        sealed.write_whole(note, json.dumps({"failed": why}))
    except OSError as error:
        tell(f"a part of a checkpoint could not be written: {why}, {error}")


class Best:
    """Which checkpoint is the best by a logged metric: `reward/value` the highest, `-calls/emitted` the lowest.

    A checkpoint is judged by the step that sampled from its weights, which is the one of its number.
    """

    def __init__(self, metric: str | None) -> None:
        self.metric = (metric or "").removeprefix("-")
        self._sign = -1 if (metric or "").startswith("-") else 1
        self._scores: dict[int, float] = {}
        self._said = False

    def hear(self, step: int, metrics: Mapping[str, float | None]) -> None:
        value = metrics.get(self.metric)
        is_missing = self.metric and self.metric not in metrics and "rollout/skipped" not in metrics
        if is_missing and not self._said and dist.is_first():
            self._said = True  # some are there now and then alone, which is no mistake; a wrong name is
            hint = nearest(self.metric, metrics)
            tell(f"step {step} has no {self.metric!r}, by which loop.keep_best chooses: it cannot be the best.{hint}")
        if value is not None and value == value:  # NaN is no score
            self._scores[step] = self._sign * value

    def of(self, steps: Sequence[int]) -> int | None:
        """None when none of them has been judged."""
        judged = [step for step in steps if step in self._scores]
        return max(judged, key=lambda step: (self._scores[step], step), default=None)
