"""A causal language model from a Hugging Face directory or hub name."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from otcrl import dist
from otcrl.errors import DataError
from otcrl.models.rotary import exact_frequencies
from otcrl.models.tokenizer import HFTokenizer
from otcrl.tell import tell

if TYPE_CHECKING:
    from transformers import PreTrainedModel

DTYPES = ("float32", "bfloat16", "float16")
LOCAL = (".", "/", "~", "models/")  # nobody's name on the hub begins like this


@dataclass(frozen=True, kw_only=True)
class Pretrained:
    path: str  # directory or hub name
    dtype: str  # of the weights; float16 is for evaluation
    chat: bool | None  # wrap the prompt as a user message of the chat template; None: if the tokenizer has one
    device: str  # cpu, cuda, cuda:1 ...; auto: this rank's GPU when there is one
    gradient_checkpointing: bool

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {self.dtype!r}")

    def load(self, words: Sequence[str], seed: int) -> tuple[PreTrainedModel, HFTokenizer]:
        """The model and its tokenizer; raises DataError when they cannot be had. `words` are for tiny models only."""
        import torch
        from transformers import AutoModelForCausalLM

        device = self.device
        if device == "auto":
            device = f"cuda:{dist.own_gpu()}" if torch.cuda.is_available() else "cpu"
        try:
            usable = torch.device(device).type != "cuda" or torch.cuda.is_available()
        except RuntimeError as error:
            raise DataError(f"model.device must be auto, cpu, cuda or cuda:N, got {device!r}") from error
        if not usable:
            raise DataError(f"model.device is {device!r}, and torch sees no GPU: use cpu or auto")
        if Path(self.path).is_dir() and not (Path(self.path) / "config.json").is_file():
            raise DataError(f"model.path {self.path!r} holds no model: there is no config.json in it")
        tokenizer = self.load_tokenizer(words)
        with self._unreadable():
            model = AutoModelForCausalLM.from_pretrained(self.path, dtype=getattr(torch, self.dtype))
        exact_frequencies(model)
        make_writable(model)
        if getattr(model.config.get_text_config(), "attn_logit_softcapping", None):
            model.set_attn_implementation("eager")  # transformers leaves it out of the others, without a word
        if self.gradient_checkpointing:
            model.gradient_checkpointing_enable()
        model.to(device)  # pyright: ignore[reportArgumentType]  # its `self` is a protocol no model meets
        return model, tokenizer

    def load_tokenizer(self, words: Sequence[str]) -> HFTokenizer:
        """The tokenizer alone, for an engine that needs no weights here."""
        from transformers import AutoTokenizer

        self._check_path()
        with self._unreadable():
            tokenizer = AutoTokenizer.from_pretrained(self.path)
        chat = self.chat if self.chat is not None else bool(tokenizer.chat_template)
        return HFTokenizer(hf=tokenizer, chat=chat)

    def _check_path(self) -> None:
        """Raises DataError for a path that the hub would be asked for in vain."""
        path = Path(self.path)
        if self.path.startswith(LOCAL) and not path.is_dir():
            how = f": otcrl models smollm2 out={self.path} writes it" if path.name == "smollm2" else ""
            raise DataError(f"model.path {self.path!r} is not a directory{how}")
        if not path.is_dir() and dist.rank() == 0:  # a minute may pass before the hub is given up
            tell(f"model.path {self.path!r} is no directory here: taken from the Hugging Face hub, or its cache")

    @contextmanager
    def _unreadable(self) -> Iterator[None]:
        """Turns what transformers raises for a path that does not hold what it should into a DataError."""
        try:
            yield
        except (OSError, ValueError) as error:
            known = (
                "an existing directory" if Path(self.path).is_dir() else "neither a directory nor a hub model in reach"
            )
            raise DataError(f"model.path {self.path!r} is {known}: {str(error).splitlines()[0]}") from error


def make_writable(model: PreTrainedModel) -> None:
    """Mends settings of generation, which are not used here: transformers reads some that it then refuses to write."""
    config = model.generation_config
    if config is None:
        return
    mends: list[dict[str, Any]] = [{}, {"do_sample": True}, dict.fromkeys(("temperature", "top_p", "early_stopping"))]
    for mend in mends:
        for name, value in mend.items():
            setattr(config, name, value)
        try:
            config.validate(strict=True)
            return
        except ValueError as error:
            if not mend:
                tell(f"generation_config.json is mended: {str(error).splitlines()[0]}")
    kept = {name: getattr(config, name, None) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    model.generation_config = type(config)(**kept)
