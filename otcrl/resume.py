"""Whether a run goes on from an earlier one or begins anew (docs/checkpoints.md).

`resume: auto` looks into run_dir: an unfinished run of the same config goes on, a finished one is moved aside.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import socket
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import Any

from otcrl import checkpoint, dist, sealed
from otcrl.checkpoint import Checkpoint
from otcrl.compose import load, to_yaml
from otcrl.errors import ConfigError, DataError
from otcrl.loggers.jsonl import drop_from, whole_lines
from otcrl.settings import leaves
from otcrl.tell import tell

Config = Mapping[str, Any]
KEYWORDS = ("auto", "never")
FREE = (  # settings that change no weight: where, how often and to whom a run tells what, and when it gives up
    *("resume", "resume_changed", "name", "run_dir", "logger.*"),
    *("loop.checkpoint_every", "loop.keep_checkpoints", "loop.keep_best", "loop.transcripts_every"),
    *("loop.max_void_share", "loop.max_logprob_gap", "sync.*", "health.*", "ranks.*"),
    *("tools.*.urls", "tools.*.shards", "tools.*.token"),  # what they serve is compared itself: `check_tools`
)
MISSING = object()
WHY = {"loop.steps": ", over which learning rates decay"}


@dataclass(frozen=True, kw_only=True)
class Start:
    """Where a run begins."""

    folder: Path
    goes_on: bool = False  # the folder's run is this one; otherwise what is there is moved aside
    checkpoint: Checkpoint | None = None
    cold: Path | None = None  # the model after the cold start, where that is done

    @property
    def step(self) -> int:
        return self.checkpoint.standing.step if self.checkpoint is not None else 0

    @contextmanager
    def prepared(self, cfg: Config) -> Iterator[None]:
        """The run directory with the config in it. What is there of another run is renamed, never lost. All ranks.

        If the body fails, a directory that was made for it goes, and the run that made room comes back.
        """
        old = dist.decided_by_first(partial(self._prepare, cfg), "making the run's directory")
        try:
            yield
        except BaseException:  # whatever it is goes on, and finds everything as it was
            if dist.is_first() and not self.goes_on:
                shutil.rmtree(self.folder)
                if old is not None:
                    old.rename(self.folder)
            raise
        if old is not None and dist.is_first():
            tell(f"{self.folder} held {'an earlier run' if is_run(old) else 'files of no run'}, now {old}", sys.stdout)

    def _prepare(self, cfg: Config) -> Path | None:
        if not self.goes_on:
            return new_folder(self.folder, cfg)
        sealed.clear(self.folder)
        sealed.clear(self.folder / "checkpoints")
        return None

    def settle(self, cfg: Config) -> None:
        """The run goes on, now that nothing refuses to: it is not finished, and this is its config. All ranks."""

        def settle() -> None:
            if self.goes_on:
                with unwritable(self.folder):
                    (self.folder / "summary.json").unlink(missing_ok=True)
                keep_config(self.folder, cfg, self.step)

        dist.decided_by_first(settle, "the run's config")


@contextmanager
def alone(cfg: Config) -> Iterator[None]:
    """Nobody else takes up the run meanwhile. All ranks. Raises ConfigError naming who has it."""
    folder = Path(cfg["run_dir"] if cfg["resume"] in KEYWORDS else cfg["resume"])
    with ExitStack() as held:
        dist.decided_by_first(lambda: held.enter_context(locked(folder)), "the run's directory")
        yield


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """A lock beside the directory, which may be renamed; the kernel frees it however this process ends."""
    path = folder.absolute().with_name(f".{folder.absolute().name}.lock")
    with unwritable(folder):
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a+")
    with file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # unlike flock's, no child that outlives us has it
        except (BlockingIOError, PermissionError) as error:  # either, says POSIX
            file.seek(0)
            raise ConfigError(f"run_dir: {folder} is being written by {file.read().strip() or 'another run'}: wait for "
                              "it, end it, or choose another run_dir") from error  # fmt: skip
        except OSError as error:  # a file system without locks
            tell(f"{folder} cannot be locked ({error.strerror}): see to it that no other run writes there")
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def is_done(cfg: Config) -> bool:
    """Whether torchrun has restarted a run that is finished: something failed after its end. All ranks."""

    def decide() -> bool:
        is_again = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0
        return is_again and cfg["resume"] == "auto" and is_finished(Path(cfg["run_dir"]))

    return dist.decided_by_first(decide, "whether the run is finished")


def find_start(cfg: Config) -> Start:
    """On all ranks. Raises ConfigError for a run that cannot go on like this."""
    return dist.decided_by_first(partial(decide, cfg), "where to begin")


def decide(cfg: Config) -> Start:
    mode, folder = cfg["resume"], Path(cfg["run_dir"])
    if mode == "never" or (mode == "auto" and (is_finished(folder) or not is_run(folder))):
        return Start(folder=folder)
    if mode != "auto":
        folder = Path(mode)
        if not is_run(folder):
            raise ConfigError(f"{folder} is not a run directory: it has no config.yaml")
    changed = changes(load(folder / "config.yaml"), cfg)
    saved = checkpoint.complete(folder / "checkpoints")
    cold = folder / "sft" if (folder / "sft" / sealed.MANIFEST).is_file() else None
    if not saved and (corrupt := sorted((folder / "checkpoints").glob("corrupt-step-*"))):
        raise ConfigError(f"the checkpoints of {folder} are corrupt, {corrupt[-1].name} the last: mend one and give "
                          "it its name back, or begin anew, resume=never")  # fmt: skip
    if not saved and not cold:
        has_model = (folder / "model").is_dir()  # of `otcrl sft`: it would be written over
        if mode == "auto" and (changed or has_model):
            return Start(folder=folder)  # nothing is there that could go on
        if has_model:
            raise ConfigError(f"{folder} has a model and no checkpoint, so there is nothing to go on from")
    check_changes(folder, changed, cfg)
    found = checkpoint.newest(folder / "checkpoints", tell)
    if found is not None and found.standing.step > cfg["loop"]["steps"]:
        raise ConfigError(f"{folder} is at step {found.standing.step} already, and loop.steps={cfg['loop']['steps']}")
    if cold is not None:
        sealed.check(cold)
        if found is None and cfg["learner"]["lora"]["rank"]:
            cold = None  # the adapters that it has trained are not in it
    where = f"from step {found.standing.step}" if found else "after its cold start" if cold else "from its beginning"
    tell(f"the run in {folder} goes on {where}")
    if found is not None:
        tell_differences(found)
    return Start(folder=folder, goes_on=True, checkpoint=found, cold=cold)


def is_run(folder: Path) -> bool:
    return (folder / "config.yaml").is_file()


def is_finished(folder: Path) -> bool:
    return (folder / "summary.json").is_file()


# -- what has changed -----------------------------------------------------------------------------------


def changes(old: Config, new: Config) -> list[str]:
    """`key: old -> new` for each setting that differs and may change what is learned."""
    before, after = dict(leaves(old)), dict(leaves(new))
    differing = [key for key in {**before, **after} if before.get(key, MISSING) != after.get(key, MISSING)]
    return [
        f"{key}: {shown(before.get(key, MISSING))} -> {shown(after.get(key, MISSING))}{WHY.get(key, '')}"
        for key in differing
        if not is_free(key, old, new)
    ]


def is_free(key: str, old: Config, new: Config) -> bool:
    if key == "loop.steps":  # learning rates that decay over the run depend on how long it is
        return all(is_constant(config) for config in (old, new))
    return any(fnmatch(key, free) for free in FREE)


def is_constant(config: Config) -> bool:
    rates = [config["learner"].get(f"{name}_optimizer", {}) for name in ("policy", "critic")]
    return all(rate.get("final_lr_share") == 1 for rate in rates)


def check_changes(folder: Path, changed: list[str], cfg: Config) -> None:
    """Shows them. Raises ConfigError unless they are wanted."""
    if not changed:
        return
    for line in changed:
        tell(f"  {line}")
    if not cfg["resume_changed"]:
        raise ConfigError(
            f"the run in {folder} has another config, as shown above. Add resume_changed=true to go on with the new "
            "one, or begin anew, conf=... resume=never (the run that is there is moved aside)"
        )
    tell(f"the config of {folder} has changed as shown above, and resume_changed=true")


def tell_differences(found: Checkpoint) -> None:
    """Other libraries, another number of ranks: the same up to rounding."""
    before, now = found.about["versions"], checkpoint.versions()
    differing = [f"{name} {before.get(name)} -> {now.get(name)}" for name in {**before, **now}]
    differing = [
        text for text, name in zip(differing, {**before, **now}, strict=True) if before.get(name) != now.get(name)
    ]
    if found.about["ranks"] != dist.size():
        differing.append(f"ranks {found.about['ranks']} -> {dist.size()}")
    if differing:
        tell(f"from here on the same up to rounding: {', '.join(differing)}")


def shown(value: object) -> str:
    return "(not there)" if value is MISSING else repr(value)


# -- the run directory ------------------------------------------------------------------------------------


def new_folder(folder: Path, cfg: Config) -> Path | None:
    """An empty run directory with the config in it; where the run is now that was there."""
    old: Path | None = None
    if folder.resolve() == Path.cwd():
        raise ConfigError("run_dir is the current directory, which cannot be moved aside: name a folder in it")
    with unwritable(folder):
        if folder.exists() and any(folder.iterdir()):
            number = 1
            while (old := folder.with_name(f"{folder.name}.{number}")).exists():
                number += 1
            folder.rename(old)
        folder.mkdir(parents=True, exist_ok=True)
        sealed.write_whole(folder / "config.yaml", as_kept(cfg))
    return old


def keep_config(folder: Path, cfg: Config, step: int) -> None:
    """The config that the run goes on with; the one before is kept beside it if they differ."""
    with unwritable(folder):
        path, now = folder / "config.yaml", as_kept(cfg)
        if (before := path.read_text()) != now:
            number, kept = 1, folder / f"config.before-step-{step:06d}.yaml"
            while kept.exists():
                number, kept = number + 1, folder / f"config.before-step-{step:06d}.{number}.yaml"
            sealed.write_whole(kept, before)
            sealed.write_whole(path, now)


def as_kept(cfg: Config) -> str:
    """Without what was asked of this start alone."""
    return to_yaml(dict(cfg) | {"resume": "auto", "resume_changed": False})


def earlier_steps(folder: Path, step: int) -> list[dict[str, Any]]:
    """What metrics.jsonl has of the steps before `step`. A resumed run writes the later ones again. All ranks."""
    if dist.is_first():
        for name in ("metrics.jsonl", "transcripts.jsonl", "spikes.jsonl"):
            drop_from(folder / name, step)
    dist.barrier("the run's directory")
    metrics = folder / "metrics.jsonl"
    return [json.loads(line) for line in whole_lines(metrics)] if metrics.is_file() else []


@contextmanager
def unwritable(folder: Path) -> Iterator[None]:
    """Turns what the file system refuses into a ConfigError."""
    try:
        yield
    except OSError as error:
        raise ConfigError(f"run_dir: cannot write in {folder}: {error.strerror or error}") from error


# -- tools ------------------------------------------------------------------------------------------------


def identities(tools: Mapping[str, Any]) -> dict[str, str]:
    """What a tool answers from, where its settings do not say it: the index of a search."""
    known = {name: getattr(tool, "identity", None) for name, tool in tools.items()}
    return {name: identity for name, identity in known.items() if identity}


async def check_tools(found: Checkpoint, tools: Mapping[str, Any], is_wanted: bool) -> None:
    """Raises DataError when a tool answers from something else than before the restart."""
    for name, before in found.about["tools"].items():
        tool = tools.get(name)
        if tool is None or not hasattr(tool, "start"):
            continue
        await tool.start()
        now = identities({name: tool}).get(name)
        if now == before:
            continue
        tell(f"  tools.{name} answers from {before} -> {now}")
        if not is_wanted:
            raise DataError(
                f"tools.{name} answers from {now}, and the run's answered from {before}: another index, other answers. "
                "Serve that one, or add resume_changed=true"
            )
