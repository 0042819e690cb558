"""`otcrl export`: a run's model as a Hugging Face directory. The run is only read."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from otcrl import checkpoint, sealed
from otcrl.compose import load
from otcrl.errors import ConfigError, DataError, nearest
from otcrl.jsonlines import read_json_lines
from otcrl.saver import Best
from otcrl.sealed import Corrupt


def export(run: Path, out: Path, step: str | None) -> str:
    """Copies weights, config, generation config, tokenizer and chat template to `out`; says what was copied.

    `step`: that of a checkpoint, or `best`; None: the finished run's model, else the newest checkpoint that is whole.
    Raises ConfigError for what is not there, Corrupt for what is damaged.
    """
    if not (run / "config.yaml").is_file():
        raise ConfigError(f"{run} is not a run directory: it has no config.yaml")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"out={out} is there already, and not an empty directory")
    if out.resolve() == Path.cwd():
        raise ConfigError(f"out={out} is the current directory: name a folder in it")
    source, what = find_model(run, step)
    try:
        with sealed.whole(out) as folder:
            for path in source.iterdir():
                if path.is_dir():  # a tokenizer may have further chat templates
                    shutil.copytree(path, folder / path.name)
                elif path.name != sealed.MANIFEST:
                    shutil.copy2(path, folder)
            for path in [*folder.rglob("*"), folder]:
                sealed.sync(path)
    except OSError as error:
        raise DataError(f"out={out} could not be written: {error.strerror or error}") from error
    return f"wrote {what} to {out}"


def find_model(run: Path, step: str | None) -> tuple[Path, str]:
    """The directory of a model whose hashes hold, and what it is."""
    saved = {checkpoint.step_of(path): path for path in checkpoint.complete(run / "checkpoints")}
    if step is not None:
        chosen = best(run, list(saved)) if step == "best" else int(step) if step.isdecimal() else step
        path = next((path for number, path in saved.items() if str(number) == str(chosen)), None)
        if path is None:
            raise ConfigError(f"step={step}: {run} has no such checkpoint.{nearest(step, map(str, saved))}")
        sealed.check(path)
        return path / "model", f"step {chosen} of {run}"
    finished = (run / "model" / sealed.MANIFEST).is_file()
    if finished and ((run / "summary.json").is_file() or not saved):
        sealed.check(run / "model")
        return run / "model", f"the model of {run}"
    for number in sorted(saved, reverse=True):
        try:
            sealed.check(saved[number])
        except Corrupt as error:
            print(f"otcrl: CORRUPT CHECKPOINT: {error}", file=sys.stderr)
        else:
            return saved[number] / "model", f"step {number} of {run}"
    raise ConfigError(f"{run} has no model yet, and no checkpoint that is whole")


def best(run: Path, steps: list[int]) -> int:
    """The step that `loop.keep_best` has kept. Raises ConfigError when there is none."""
    metric = load(run / "config.yaml")["loop"].get("keep_best")
    if not metric:
        raise ConfigError(f"step=best: {run} has no loop.keep_best, so nothing says which one that is")
    judge = Best(metric)
    for _, row in read_json_lines(run / "metrics.jsonl"):
        judge.hear(row["step"], row)  # pyright: ignore  # what JsonlLogger wrote
    if (found := judge.of(steps)) is None:
        raise ConfigError(f"step=best: no checkpoint of {run} has been judged by {metric} yet")
    return found
