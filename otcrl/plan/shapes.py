"""How large a model is: layers, widths, vocabulary, and how many parameters that makes.

Names of common models are known here, so that planning needs neither a network nor weights.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from otcrl.errors import DataError, nearest

DENSE = ("llama", "qwen2", "qwen3", "mistral", "smollm3")  # model_type of config.json that the formulas describe


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """A decoder of the Llama family: RMSNorm, rotary and grouped-query attention, gated MLP."""

    name: str
    layers: int
    width: int  # of the residual stream
    heads: int
    kv_heads: int
    head_dim: int
    ff_width: int
    vocab: int
    tied: bool  # the output layer is the embedding
    bias: bool = False  # of the query, key and value projections (Qwen2)
    head_norm: bool = False  # of queries and keys (Qwen3)

    @property
    def query_width(self) -> int:
        return self.heads * self.head_dim

    @property
    def kv_width(self) -> int:
        return self.kv_heads * self.head_dim

    @property
    def layer_parameters(self) -> int:
        """One decoder layer: 2 w q + 2 w k in attention, 3 w f in the MLP, norms and biases."""
        attention = 2 * self.width * (self.query_width + self.kv_width)
        biases = (self.query_width + 2 * self.kv_width) * self.bias + 2 * self.head_dim * self.head_norm
        return attention + biases + 3 * self.width * self.ff_width + 2 * self.width

    @property
    def body_parameters(self) -> int:
        """What every token is multiplied by: all but embedding and output layer."""
        return self.layers * self.layer_parameters + self.width

    @property
    def head_parameters(self) -> int:
        return self.vocab * self.width

    @property
    def parameters(self) -> int:
        return self.body_parameters + self.head_parameters * (1 if self.tied else 2)

    def adapter_parameters(self, rank: int) -> int:
        """LoRA on every linear layer but the head: rank * (in + out) each. Hu et al. 2021, arXiv:2106.09685."""
        w, q, k, f = self.width, self.query_width, self.kv_width, self.ff_width
        return self.layers * rank * ((w + q) + 2 * (w + k) + (q + w) + 2 * (w + f) + (f + w))


def qwen2(name: str, layers: int, width: int, heads: int, kv_heads: int, ff: int, vocab: int, *, tied: bool) -> Shape:
    return llama(name, layers, width, heads, kv_heads, ff, vocab, tied=tied, bias=True)


def llama(
    name: str,
    layers: int,
    width: int,
    heads: int,
    kv_heads: int,
    ff: int,
    vocab: int,
    *,
    tied: bool,
    bias: bool = False,
    head_dim: int = 0,
    head_norm: bool = False,
) -> Shape:
    return Shape(
        name=name,
        layers=layers,
        width=width,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim or width // heads,
        ff_width=ff,
        vocab=vocab,
        tied=tied,
        bias=bias,
        head_norm=head_norm,
    )


# From each model's config.json on the Hugging Face hub; tests compare the sums with the published parameter counts.
KNOWN = {
    shape.name: shape
    for shape in (
        qwen2("Qwen2.5-0.5B", 24, 896, 14, 2, 4864, 151_936, tied=True),
        qwen2("Qwen2.5-1.5B", 28, 1536, 12, 2, 8960, 151_936, tied=True),
        qwen2("Qwen2.5-3B", 36, 2048, 16, 2, 11_008, 151_936, tied=True),
        qwen2("Qwen2.5-7B", 28, 3584, 28, 4, 18_944, 152_064, tied=False),
        qwen2("Qwen2.5-14B", 48, 5120, 40, 8, 13_824, 152_064, tied=False),
        qwen2("Qwen2.5-32B", 64, 5120, 40, 8, 27_648, 152_064, tied=False),
        qwen2("Qwen2.5-72B", 80, 8192, 64, 8, 29_568, 152_064, tied=False),
        llama("Qwen3-0.6B", 28, 1024, 16, 8, 3072, 151_936, tied=True, head_dim=128, head_norm=True),
        llama("Llama-3.2-1B", 16, 2048, 32, 8, 8192, 128_256, tied=True),
        llama("Llama-3.2-3B", 28, 3072, 24, 8, 8192, 128_256, tied=True),
        llama("Llama-3.1-8B", 32, 4096, 32, 8, 14_336, 128_256, tied=False),
        llama("Llama-3.1-70B", 80, 8192, 64, 8, 28_672, 128_256, tied=False),
        llama("SmolLM2-135M", 30, 576, 9, 3, 1536, 49_152, tied=True),
        llama("SmolLM2-360M", 32, 960, 15, 5, 2560, 49_152, tied=True),
        llama("SmolLM2-1.7B", 24, 2048, 32, 32, 8192, 49_152, tied=True),
    )
}


def find_shape(path: str) -> Shape:
    """Of a directory with a config.json, or by hub name. Raises DataError with the nearest name that is known."""
    folder = Path(path).expanduser()
    if (folder / "config.json").is_file():
        return read_shape(folder / "config.json")
    if folder.is_dir():
        raise DataError(f"{path} holds no model: there is no config.json in it")
    plain = family(path)
    known = {name.lower(): shape for name, shape in KNOWN.items()}
    if plain not in known:
        hint = nearest(plain, known)
        raise DataError(f"the shape of {path!r} is not known here: name a directory with its config.json.{hint}")
    return known[plain]


def family(path: str) -> str:
    """The size that a hub name means: "Qwen/Qwen2.5-7B-Instruct" -> "qwen2.5-7b"."""
    name = path.rstrip("/").rpartition("/")[2].lower().removeprefix("meta-")
    name = re.sub(r"-(instruct|base|chat|it|\d{4})\b", "", name)
    name = re.sub(r"^(qwen2\.5)-(?:math|coder)-", r"\1-", name)
    return re.sub(r"^llama-3(?:\.\d)?-(8b|70b)$", r"llama-3.1-\1", name)


def read_shape(path: Path) -> Shape:
    """Raises DataError for a config.json of a model that the formulas do not describe."""
    try:
        content = json.loads(path.read_text())
        return shape_of(content.get("text_config", content), path.parent.name)
    except (KeyError, ValueError, AttributeError) as error:
        raise DataError(f"{path} does not describe a dense language model: {error!r}") from error


def shape_of(config: Mapping[str, Any], name: str) -> Shape:
    kind = config["model_type"]
    if kind not in DENSE:
        raise DataError(f"{name}: plans are made for {', '.join(DENSE)}, and this is a {kind}")
    heads = config["num_attention_heads"]
    return Shape(
        name=name,
        layers=config["num_hidden_layers"],
        width=config["hidden_size"],
        heads=heads,
        kv_heads=config.get("num_key_value_heads") or heads,
        head_dim=config.get("head_dim") or config["hidden_size"] // heads,
        ff_width=config["intermediate_size"],
        vocab=config["vocab_size"],
        tied=config.get("tie_word_embeddings", False),
        bias=config.get("attention_bias", kind == "qwen2"),
        head_norm=kind == "qwen3",
    )
