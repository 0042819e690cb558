"""The `otcrl` command. It imports what a command needs only when that command runs, so `--help` is instant."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from otcrl import __version__
from otcrl.errors import ConfigError, OtcrlError, nearest
from otcrl.manual import COMMANDS, SWEEP, manual, overview
from otcrl.presets import find_preset, options, presets
from otcrl.tell import tell

if TYPE_CHECKING:
    from otcrl.compose import Config


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code: 0, 1 when a run failed, 2 when it could not be built, 130 when interrupted."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    words = [word for word in words if not word.startswith("--local_rank=")]  # DeepSpeed's launcher; LOCAL_RANK has it
    if not words or words[0] in ("-h", "--help"):
        print(overview())
        return 0
    if words[0] == "--version":
        print(f"otcrl {__version__}")
        return 0
    sys.path.append(os.getcwd())  # `_target_: my_pkg.MyReward` may name a package in the current directory
    try:
        return dispatch(words[0], words[1:])
    except OtcrlError as error:
        if os.environ.get("OTCRL_TRACEBACK") == "1":
            traceback.print_exc()
        print(f"otcrl: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        where = f" ({error.filename})" if error.filename else ""
        tell(f"error: {error.strerror}{where}: make room; a run goes on by the same command")
        return 1
    except KeyboardInterrupt:
        print("otcrl: interrupted", file=sys.stderr)
        return 130


def dispatch(name: str, words: list[str]) -> int:
    if name not in COMMANDS:
        raise ConfigError(f"there is no command {name!r}.{nearest(name, COMMANDS)}")
    command = COMMANDS[name]
    flags = frozenset(word for word in words if word.startswith("-"))
    if flags & {"-h", "--help"}:
        print(manual(name, command))
        return 0
    for flag in flags - command.flags.keys():
        raise ConfigError(f"otcrl {name} has no option {flag}.{nearest(flag, command.flags)}")
    return RUN[name]([word for word in words if word not in flags], flags)


# -- train, sft, eval -------------------------------------------------------------------------------


def train(settings: list[str], flags: frozenset[str]) -> int:
    def start(config: Config) -> None:
        from otcrl.build import run_train

        run_train(config)

    return sweep("train", settings, flags) if flags & SWEEP.keys() else launch(start, run_config(settings), flags)


def sft(settings: list[str], flags: frozenset[str]) -> int:
    def start(config: Config) -> None:
        from otcrl.build import run_sft

        run_sft(config)

    return sweep("sft", settings, flags) if flags & SWEEP.keys() else launch(start, run_config(settings), flags)


def evaluate(settings: list[str], flags: frozenset[str]) -> int:
    def start(config: Config) -> None:
        from otcrl.build import run_eval

        run_eval(config)

    return launch(start, eval_config(settings), flags)


def launch(start: Callable[[Config], None], config: Config, flags: frozenset[str]) -> int:
    if "--cfg" in flags:
        from otcrl.compose import to_yaml

        print(to_yaml(config), end="")
    else:
        start(config)
    return 0


def run_config(settings: list[str]) -> Config:
    """The config of a training run. `resume=DIR` without `conf=` takes the one that DIR was started with."""
    from otcrl.compose import compose

    named, overrides = take(settings, "conf", "resume")
    if "conf" in named:
        config = compose(overrides, preset=find_preset(named["conf"]))
    elif named.get("resume", "auto") not in ("auto", "never", ""):
        config = compose(overrides, run=Path(named["resume"]))
    else:
        raise no_preset()
    return config | {"resume": named["resume"]} if "resume" in named else config


def no_preset() -> ConfigError:
    return ConfigError(f"add conf=NAME or conf=FILE.yaml.{nearest('', (preset.name for preset in presets()))}")


def eval_config(settings: list[str]) -> Config:
    """A config with five more keys: `run` (directory or None), `checkpoint` (what `model=` named, or None), `data`,
    `step` (of the run's checkpoint; None: its last model) and `as` (the folder of the results, inside eval/)."""
    from otcrl.compose import OF_FILES, compose

    named, overrides = take(settings, "conf", "run", "model", "data", "step", "as")
    run, model, conf, step = (named.get(name) or None for name in ("run", "model", "conf", "step"))
    if step is not None and (run is None or not step.isdecimal()):
        raise ConfigError(f"step={step} must be the number of a checkpoint of run=DIR")
    folder = named.get("as", "" if step is None else f"step-{int(step):06d}")
    if folder and (Path(folder).name != folder or folder == ".."):
        raise ConfigError(f"as={folder} must be the name of a folder")
    if (run is None) == (model is None and conf is None):
        raise ConfigError("add either run=DIR or model=NAME_OR_PATH (with conf=NAME or the groups that it needs)")
    if model in options("model"):
        overrides, model = [*overrides, f"model={model}"], None
    config = compose(overrides, preset=find_preset(conf) if conf else None, run=Path(run) if run else None)
    data = [item for item in named.get("data", "").split(",") if item]
    typed = {override.partition("=")[0].lstrip("+") for override in overrides}
    if data:  # what the config says of its own files says nothing of these, unless it is typed beside them
        config["task"] = {k: v for k, v in config["task"].items() if k not in OF_FILES or f"task.{k}" in typed}
    return config | {
        "run_dir": config["run_dir"] if "run_dir" in typed or run is None else run,  # it may have been moved since
        "run": run,
        "checkpoint": model,
        "data": data,
        "step": step,
        "as": folder,
    }


def take(settings: Sequence[str], *names: str) -> tuple[dict[str, str], list[str]]:
    """Settings that are the command's own, by name, and the rest, which are overrides of the config."""
    pairs = [(setting.partition("="), setting) for setting in settings]
    own = {name: value for (name, _, value), _ in pairs if name in names}
    return own, [setting for (name, _, _), setting in pairs if name not in names]


def sweep(command: str, settings: list[str], flags: frozenset[str]) -> int:
    """One run after the other, each in a process and a directory of its own."""
    from otcrl.compose import expand, quoted

    named, overrides = take(settings, "conf", "resume")
    presets = [f"conf={conf}" for conf in named.get("conf", "").split(",") if conf]
    if not presets:
        raise no_preset()
    if named.get("resume", "auto") not in ("auto", "never"):
        raise ConfigError("a sweep cannot be resumed as one: the same command goes on with each run that is unfinished")
    how = [f"resume={named['resume']}"] if "resume" in named else []
    jobs = [[conf, *job] for conf in presets for job in expand(overrides)]
    configs = [run_config(job) for job in jobs]  # so that a typo stops the sweep before its first run
    failed: list[str] = []
    for index, (job, config) in enumerate(zip(jobs, configs, strict=True)):
        directory = f"{config['run_dir']}/{index}"
        name = f"{config['name']}/{index}"
        own = [f"name={quoted(name)}", f"run_dir={quoted(directory)}", *how]
        varied = " ".join(setting for setting in job if setting not in settings)
        goes_on = flags <= SWEEP.keys() and named.get("resume") != "never"
        is_done = goes_on and finished_as(run_config([*job, *own]), Path(directory))
        what = f"{varied} -> {directory}{', which is finished' if is_done else ''}"
        print(f"otcrl: run {index + 1} of {len(jobs)}: {what}", file=sys.stderr, flush=True)
        if is_done:
            continue
        kept = sorted(flags - SWEEP.keys())
        code, is_last = in_process([sys.executable, "-m", "otcrl.cli", command, *job, *own, *kept])
        failed += [f"{directory} (exit {code})"] if code else []
        outcome = f", {len(failed)} failed: {', '.join(failed)}" if failed else ""
        if is_last and (code or index + 1 < len(jobs)):
            print(f"otcrl: the sweep ends{outcome}; the same command goes on with it", file=sys.stderr)
            return code or int(bool(failed))
    outcome = f", {len(failed)} failed: {', '.join(failed)}" if failed else ""
    print(f"otcrl: {len(jobs)} runs, {len(jobs) - len(failed)} done{outcome}", file=sys.stderr)
    return 1 if failed else 0


def finished_as(config: Mapping[str, Any], directory: Path) -> bool:
    """Whether a run with this config has come to its end there."""
    if not (directory / "summary.json").is_file():
        return False
    from otcrl.compose import load
    from otcrl.resume import changes

    return not changes(load(directory / "config.yaml"), config)


def in_process(command: Sequence[str]) -> tuple[int, bool]:
    """Its exit code, and whether it was asked to end: SIGTERM is handed on, and both wait for it to end well."""
    asked: list[int] = []
    process = subprocess.Popen(command)

    def hand_on(number: int, frame: object) -> None:
        asked.append(number)
        process.send_signal(number)

    before = signal.signal(signal.SIGTERM, hand_on)
    try:
        while True:
            try:
                return process.wait(), bool(asked)
            except KeyboardInterrupt:  # the terminal has sent it to the run, too
                asked.append(signal.SIGINT)
    finally:
        signal.signal(signal.SIGTERM, before)


# -- compare, table ------------------------------------------------------------------------------------------


def compare(settings: list[str], flags: frozenset[str]) -> int:
    from otcrl.evaluate.compare import run

    return run(settings)


def table(settings: list[str], flags: frozenset[str]) -> int:
    from otcrl.evaluate.table import run

    return run(settings)


# -- plan ---------------------------------------------------------------------------------------------------


def plan(settings: list[str], flags: frozenset[str]) -> int:
    from otcrl.plan.command import OWN, plan

    named, overrides = take(settings, *OWN)
    model, rest = take(overrides, "model")
    if "model" in model and model["model"] not in options("model"):
        from otcrl.compose import quoted

        overrides = [*rest, "model=pretrained", f"model.path={quoted(model['model'])}"]
    plan(run_config(overrides), named)
    return 0


# -- report, watch --------------------------------------------------------------------------------------------


def report(settings: list[str], flags: frozenset[str]) -> int:
    from otcrl.report.command import OWN, report

    named, rest = take(settings, *OWN)
    report(paths("report", rest, OWN), named)
    return 0


def watch(settings: list[str], flags: frozenset[str]) -> int:
    from otcrl.watch import OWN, watch

    named, rest = take(settings, *OWN)
    watch(paths("watch", rest, OWN), every=named.get("every", "2"), once="--once" in flags)
    return 0


def paths(command: str, words: Sequence[str], own: Sequence[str]) -> list[str]:
    """Words that are no settings. Raises ConfigError for a setting that the command does not have."""
    for word in words:
        name, is_setting, _ = word.partition("=")
        if is_setting and not Path(word).exists():
            raise ConfigError(f"otcrl {command} has no setting {name!r}.{nearest(name, own)}")
    return [*words]


# -- export ----------------------------------------------------------------------------------------------


def export(settings: list[str], flags: frozenset[str]) -> int:
    from otcrl.export import export

    named, rest = take(settings, "out", "step")
    if len(paths("export", rest, ("out", "step"))) != 1:
        raise ConfigError(f"otcrl export needs one run directory and out=DIR, got {' '.join(rest) or 'none'}")
    require("export", named, "out")
    print(f"otcrl: {export(Path(rest[0]), Path(named['out']), named.get('step'))}")
    return 0


# -- serve, index, models ----------------------------------------------------------------------------------


def serve(settings: list[str], flags: frozenset[str]) -> int:
    from otcrl.serve import serve

    return serve(settings)


def index(settings: list[str], flags: frozenset[str]) -> int:
    from otcrl.indexing import run

    return run(settings)


def data(settings: list[str], flags: frozenset[str]) -> int:
    from otcrl.data import run

    return run(settings)


def models(settings: list[str], flags: frozenset[str]) -> int:
    name, *rest = settings or [""]
    if name != "smollm2":
        raise ConfigError(f"otcrl models has no model {name!r}.{nearest(name, ['smollm2'])}")
    named, unknown = take(rest, "out", "dtype")
    for setting in unknown:
        raise ConfigError(f"otcrl models smollm2 has no setting {setting!r}. Choose from: dtype, out.")
    require("models smollm2", named, "out")
    from otcrl.smollm2 import write_checkpoint

    print(f"otcrl: wrote {write_checkpoint(Path(named['out']), dtype=named.get('dtype', 'float32'))}")
    return 0


def require(command: str, named: Mapping[str, str], *names: str) -> None:
    for name in names:
        if not named.get(name):
            raise ConfigError(f"otcrl {command} needs {name}=...")


# -- doctor, completion --------------------------------------------------------------------------------------


def doctor(settings: list[str], flags: frozenset[str]) -> int:
    from otcrl.doctor import doctor

    for setting in settings:
        raise ConfigError(f"otcrl doctor has no setting {setting!r}")
    return doctor(as_json="--json" in flags)


def completion(settings: list[str], flags: frozenset[str]) -> int:
    from otcrl.completion import run

    return run(settings)


RUN: dict[str, Callable[[list[str], frozenset[str]], int]] = {  # (settings, flags) -> exit code
    "train": train,
    "sft": sft,
    "eval": evaluate,
    "compare": compare,
    "table": table,
    "export": export,
    "plan": plan,
    "report": report,
    "watch": watch,
    "serve": serve,
    "index": index,
    "data": data,
    "models": models,
    "doctor": doctor,
    "completion": completion,
}


if __name__ == "__main__":
    sys.exit(main())
