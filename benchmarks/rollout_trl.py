"""One whole training step against TRL's GRPOTrainer: generation, tools, rewards, loss, backward and optimizer.

Both sides train SmolLM2-135M in float32 on the same 8 prompts x 8 trajectories, each in a process of its own with the
same number of threads, and both generate with transformers in that process: TRL by `model.generate`, we by the embedded
engine. All completions have the same fixed length, which spares `generate` the padding that it would have in practice.
TRL is not a part of otcrl's environment; without it this part says how to get it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import Row
from rollout_parts import row
from rollout_work import Endless, passage, question
from transformers import AutoTokenizer

HERE = Path(__file__).parent
INSTALL = "python -m pip install --no-deps --target {} 'trl==1.16.*'"
# Both sides show a tool's result in the same tokens: TRL finds them behind the last end-of-text of a conversation.
TEMPLATE = """{% for m in messages %}{% if m.role == 'user' %}<|im_start|>user
{{ m.content }}<|im_end|>
<|im_start|>assistant
{% elif m.role == 'assistant' %}{{ m.content }}{% for call in m.tool_calls or [] %}\
{{ call.function.name }} {{ call.function.arguments | tojson }}{% endfor %}<|im_end|>\
{% else %}<tool_response>
{{ m.content }}
</tool_response>
{% endif %}{% endfor %}"""


@dataclass(frozen=True, kw_only=True)
class Step:
    """The work of one step."""

    model: str
    calls: int  # of a trajectory, before its last turn
    turn_tokens: int
    problems: int = 8
    group: int = 8
    question_words: int = 80
    observation_tokens: int = 100
    latency_s: float = 0.3
    micro_rows: int = 8  # trajectories in a forward and backward pass

    def spec(self, steps: int, threads: int) -> dict[str, Any]:
        """As both sides read it."""
        tokenizer = Endless(hf=AutoTokenizer.from_pretrained(self.model), chat=False)
        observation = passage(self.observation_tokens, tokenizer)
        questions = [question(number, self.question_words) for number in range(steps * self.problems)]
        completion = (self.calls + 1) * self.turn_tokens + self.calls * (self.observation_tokens + 40)
        prompt = max(len(tokenizer.encode(text)) for text in questions) + 20
        more = {"steps": steps, "threads": threads, "chat_template": TEMPLATE, "observation": observation}
        more |= {"questions": questions, "completion_tokens": completion, "longest": prompt + completion}
        return {**{name: getattr(self, name) for name in self.__dataclass_fields__}, **more}


def run_side(script: str, spec: dict[str, Any], packages: Path | None) -> dict[str, Any]:
    """What the script writes about the steps of `spec`."""
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder, "spec.json"), Path(folder, "result.json")
        source.write_text(json.dumps(spec))
        environment = {**os.environ, "OMP_NUM_THREADS": str(spec["threads"]), "TOKENIZERS_PARALLELISM": "false"}
        if packages is not None:
            environment["PYTHONPATH"] = str(packages)
        done = subprocess.run(
            [sys.executable, str(HERE / script), str(source), str(target)],
            env=environment, text=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, check=False,
        )  # fmt: skip
        if done.returncode:
            sys.exit(f"{script} failed:\n{done.stderr[-3000:]}")
        return json.loads(target.read_text())


def measure(name: str, step: Step, steps: int, threads: int, packages: Path) -> tuple[list[Row], float]:
    """Rows, and how many times faster we are. The last of the steps counts."""
    if not (packages / "trl").is_dir():
        sys.exit(f"TRL is not in {packages}: {INSTALL.format(packages)}")
    spec = step.spec(steps, threads)
    found = {
        "otcrl": run_side("rollout_trl_ours.py", spec, None),
        "trl": run_side("rollout_trl_peer.py", spec, packages),
    }
    last = {side: result["steps"][-1] for side, result in found.items()}
    for count in ("prompt_tokens", "sampled_tokens", "observation_tokens", "calls"):
        ours, theirs = (last[side].get(count, 0) for side in ("otcrl", "trl"))
        assert ours == theirs, f"the sides did different work: {count} {ours} and {theirs}"
    rows: list[Row] = []
    for side, numbers in last.items():
        for what, value in numbers.items():
            unit = "s" if what.endswith("_s") else "calls" if what == "calls" else "tokens"
            rows.append(row("trl", f"{name}, {side}: {what.removesuffix('_s').replace('_', ' ')}", value, unit))
        print(
            f"{name}: {side} {found[side]['version']} {[round(s['step_s'], 1) for s in found[side]['steps']]} s a step"
        )
    return rows, last["trl"]["step_s"] / last["otcrl"]["step_s"]
