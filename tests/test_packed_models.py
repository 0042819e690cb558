"""However rows are packed, a model says about every action what it says of the row alone, and learns the same."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from itertools import pairwise
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    FalconConfig,
    Gemma2Config,
    GPTNeoXConfig,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from otcrl.errors import ConfigError
from otcrl.models.critic import Critic
from otcrl.models.lora import Lora
from otcrl.models.packed_attention import Packed, by_buckets, of_rows, takes_flash
from otcrl.models.policy import recomputing, token_logprobs
from otcrl.models.pretrained import Pretrained
from otcrl.models.reader import Packing, Reader
from otcrl.models.token_logprobs import Entropy
from otcrl.packing import lay_out
from tests.test_token_logprobs import Sizes
from tests.tiny import tiny_llama, tiny_tokenizer

V = 11
CONFIGS: dict[str, Any] = {
    "llama": LlamaConfig,
    "qwen2": Qwen2Config,
    "qwen3": Qwen3Config,
    "mistral": MistralConfig,
    "gpt_neox": GPTNeoXConfig,
    "granite": GraniteConfig,
}
Rows = list[tuple[list[int], list[bool]]]  # token ids, action mask


def tiny(family: str, *, exact: bool = True, **other: object) -> PreTrainedModel:
    """Two layers with grouped heads. `exact`: float64 throughout, where transformers' own norms compute in float32."""
    settings = {
        "vocab_size": V, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 4, "initializer_range": 0.4, "max_position_embeddings": 64,
        "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0,
    }  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[family](**settings | other)).eval()
    if exact:
        model = model.double()
        for module in list(model.modules()):
            for name, child in module.named_children():
                if "RMSNorm" in type(child).__name__:
                    norm = nn.RMSNorm(child.weight.shape, eps=1e-6, dtype=torch.float64)
                    setattr(module, name, norm)
    return model


MODELS = {family: tiny(family) for family in ("llama", "qwen2", "qwen3", "gpt_neox")}
MODELS |= {"windowed": tiny("mistral", sliding_window=3), "tied": tiny("llama", tie_word_embeddings=True)}
MODELS |= {"scaled": tiny("granite", logits_scaling=3.0)}  # its head is not plain


@st.composite
def shared_rows(draw: st.DrawFn) -> Rows:
    """Rows that begin like an earlier one, or not at all; some have no action."""
    tokens = st.lists(st.integers(0, V - 1), min_size=1, max_size=6)
    rows: Rows = []
    for _ in range(draw(st.integers(1, 6))):
        earlier = draw(st.sampled_from(rows))[0] if rows and draw(st.booleans()) else []
        ids = earlier[: draw(st.integers(0, len(earlier)))] + draw(tokens)
        mask = [False, *draw(st.lists(st.booleans(), min_size=len(ids) - 1, max_size=len(ids) - 1))]
        rows.append((ids, mask))
    return rows


def tensors(rows: Rows) -> tuple[Tensor, Tensor]:
    longest = max(len(ids) for ids, _ in rows)
    ids_BT = torch.tensor([ids + [0] * (longest - len(ids)) for ids, _ in rows])
    return ids_BT, torch.tensor([mask + [False] * (longest - len(mask)) for _, mask in rows])


def gradient(*modules: nn.Module) -> Tensor:
    parameters = [p for module in modules for p in module.parameters()]
    return torch.cat([(p.grad if p.grad is not None else torch.zeros_like(p)).flatten() for p in parameters])


def read(
    model: PreTrainedModel, critic: Critic, packing: Packing, rows: Rows, max_tokens: int, entropy: Entropy = "train"
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Log-probs, entropies, values, and the gradient of an uneven sum of all of them."""
    ids_BT, mask_BT = tensors(rows)
    reader = Reader.of(model, packing)
    assert reader.packing == packing, reader.why_padded
    reader.prepare(critic.body)
    found = torch.zeros(3, *ids_BT.shape, dtype=model.dtype)
    uneven_BT = torch.linspace(-1, 2, ids_BT.numel(), dtype=model.dtype).view_as(ids_BT)
    for each in (model, critic):
        each.zero_grad()
    for micro in reader.micros(ids_BT, mask_BT, max_tokens):
        ids, mask = ids_BT[micro.rows, : micro.width], mask_BT[micro.rows, : micro.width]
        logprobs, entropies = reader.logprobs(ids, mask, micro.packed, 0.8, entropy)
        values = critic(ids, micro.packed) * mask
        seen = torch.stack([logprobs, entropies, values])
        found[:, micro.rows, : micro.width] = seen.detach()
        if seen.requires_grad:
            (seen.sum(0) * uneven_BT[micro.rows, : micro.width] + 0.1 * seen.prod(0)).sum().backward()
    return found[0], found[1], found[2], gradient(model, critic)


def one_by_one(model: PreTrainedModel, critic: Critic, rows: Rows) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The same by a plain softmax over all logits of each row alone, attention as transformers has it."""
    ids_BT, _ = tensors(rows)
    found = torch.zeros(3, *ids_BT.shape, dtype=model.dtype)
    uneven_BT = torch.linspace(-1, 2, ids_BT.numel(), dtype=model.dtype).view_as(ids_BT)
    total = torch.zeros((), dtype=model.dtype)
    for b, (ids, mask) in enumerate(rows):
        row_1L, values_1L = torch.tensor([ids]), critic(torch.tensor([ids]))
        log_LV = (model(row_1L).logits[0] / 0.8).log_softmax(-1)
        for t in range(1, len(ids)):
            if mask[t]:
                said = log_LV[t - 1]
                seen = torch.stack([said[ids[t]], -(said.exp() * said).sum(), values_1L[0, t]])
                found[:, b, t] = seen.detach()
                total = total + uneven_BT[b, t] * seen.sum() + 0.1 * seen.prod()
    if total.requires_grad:
        total.backward()
    return found[0], found[1], found[2], gradient(model, critic)


def both(family: str, dtype: torch.dtype = torch.float64) -> tuple[PreTrainedModel, Critic]:
    model = copy.deepcopy(MODELS[family]).to(dtype)  # pyright: ignore[reportArgumentType]
    critic = Critic(model)
    torch.manual_seed(1)
    nn.init.normal_(critic.head.weight)
    return model, critic


@pytest.mark.parametrize("family", MODELS)
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    rows=shared_rows(), packing=st.sampled_from(["shared", "packed", "padded"]), max_tokens=st.sampled_from([1, 9, 99])
)
def test_packing_changes_nothing_in_float64(family: str, rows: Rows, packing: Packing, max_tokens: int):
    expected = one_by_one(*both(family), rows)
    for ours, plain in zip(read(*both(family), packing, rows, max_tokens), expected, strict=True):
        torch.testing.assert_close(ours, plain, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "tied"])
@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(rows=shared_rows(), max_tokens=st.sampled_from([9, 99]))
def test_packing_changes_nothing_in_float32(family: str, rows: Rows, max_tokens: int):
    outcomes = [read(*both(family, torch.float32), packing, rows, max_tokens) for packing in ("shared", "padded")]
    for ours, plain in zip(*outcomes, strict=True):
        assert (ours - plain).norm() <= 1e-5 * max(1.0, plain.norm().item())


@settings(max_examples=30, deadline=None)
@given(rows=shared_rows(), share=st.booleans(), window=st.sampled_from([None, 1, 3]))
def test_a_kernel_of_variable_lengths_is_given_the_same_attention(rows: Rows, share: bool, window: int | None):
    packed = Packed(lay_out([np.array(ids) for ids, _ in sorted(rows)], share=share), torch.device("cpu"))
    query, key, value = torch.randn(3, len(packed.layout.token_ids_U), 2, 4, dtype=torch.float64)
    expected = by_buckets(query, key, value, packed, None, window)
    keys, values = of_rows(key, value, packed)
    ends = zip(pairwise(packed.query_ends.tolist()), pairwise(packed.key_ends.tolist()), strict=True)
    for (q, q_end), (s, s_end) in ends:
        back = torch.arange(s_end - s)[-(q_end - q) :, None] - torch.arange(
            s_end - s
        )  # the last query sees the last key
        mask = (back >= 0) & (back < (window or 1000))
        alone = [x.transpose(0, 1) for x in (query[q:q_end], keys[s:s_end], values[s:s_end])]
        found = nn.functional.scaled_dot_product_attention(*alone, attn_mask=mask).transpose(0, 1)
        torch.testing.assert_close(found, expected[q:q_end], atol=1e-12, rtol=1e-12)


@settings(max_examples=30, deadline=None)
@given(rows=shared_rows())
def test_a_pass_holds_each_prefix_that_an_action_depends_on_once(rows: Rows):
    reader = Reader.of(MODELS["llama"], "shared")
    needed = set()
    for ids, mask in rows:
        last = max((t for t, acts in enumerate(mask) if acts), default=0)
        needed |= {tuple(ids[: end + 1]) for end in range(last)}
    micros = list(reader.micros(*tensors(rows), 10_000))
    assert sum(len(micro.packed.layout.token_ids_U) for micro in micros if micro.packed) == len(needed)
    assert sorted(row for micro in micros for row in micro.rows) == [b for b, (_, mask) in enumerate(rows) if any(mask)]


def first_layer(model: PreTrainedModel) -> Any:
    layers: Any = model.get_decoder().layers
    return layers[0]


def group(prompt: int, lengths: Sequence[int]) -> Rows:
    rng = torch.Generator().manual_seed(0)
    start = torch.randint(V, (prompt,), generator=rng).tolist()
    return [
        (start + torch.randint(V, (length,), generator=rng).tolist(), [False] * prompt + [True] * length)
        for length in lengths
    ]


@pytest.mark.parametrize(
    ("size", "values", "dtype", "capability", "takes"),
    [
        (128, 128, torch.bfloat16, (9, 0), True),
        (256, 256, torch.float16, (8, 0), True),
        (128, 128, torch.float32, (9, 0), False),
        (512, 512, torch.bfloat16, (9, 0), False),  # Gemma 4
        (192, 128, torch.bfloat16, (9, 0), False),
        (100, 100, torch.bfloat16, (9, 0), False),
        (128, 128, torch.float16, (7, 5), False),  # T4
    ],
)
def test_flash_attention_is_asked_for_what_it_has_kernels_for(monkeypatch, size, values, dtype, capability, takes):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    query, value = (
        SimpleNamespace(is_cuda=True, dtype=dtype, device="cuda:0", shape=(1, 4, 7, n)) for n in (size, values)
    )
    assert takes_flash(cast(Tensor, query), cast(Tensor, value)) is takes


def test_the_model_computes_a_groups_prompt_once():
    model, seen = copy.deepcopy(MODELS["llama"]), []
    first_layer(model).mlp.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].shape[:2].numel()))
    rows = group(20, [5, 7, 6])
    sizes = {}
    for packing in ("padded", "packed", "shared"):
        reader = Reader.of(model, packing)
        (micro,) = reader.micros(*tensors(rows), 1000)
        seen.clear()
        ids_BT, mask_BT = tensors(rows)
        reader.logprobs(ids_BT[micro.rows], mask_BT[micro.rows], micro.packed)
        sizes[packing] = sum(seen)
    # the last token of a row says nothing about an action, so it is left out; padded rows keep it
    assert sizes == {"padded": 3 * 27, "packed": 24 + 26 + 25, "shared": 20 + 4 + 6 + 5}


def test_no_tensor_has_the_logits_of_all_actions_nor_a_mask_of_all_tokens():
    words, rows = 500, group(20, [30, 30, 30])
    model = tiny("llama", vocab_size=words, hidden_size=8, intermediate_size=8)
    reader = Reader.of(model, "shared")
    ids_BT, mask_BT = tensors(rows)
    (micro,) = reader.micros(ids_BT, mask_BT, 1000)
    with Sizes() as sizes:
        logprobs, entropy = reader.logprobs(ids_BT[micro.rows], mask_BT[micro.rows], micro.packed, entropy="train")
        (logprobs.sum() + entropy.sum()).backward()
    assert sizes.largest <= 128 * words < 90 * 2 * words  # a chunk holds all 90 actions here, twice that is never made


@pytest.mark.parametrize("packing", ["shared", "padded"])
def test_gradient_checkpointing_computes_layers_again_and_the_same_gradient(packing: Packing):
    rows = group(5, [3, 4])
    model, critic = both("llama")
    plain = read(model, critic, packing, rows, 100)[3]
    for each in (model, critic.body):
        each.gradient_checkpointing_enable()
    passes = []
    first_layer(model).mlp.register_forward_pre_hook(lambda *_: passes.append(1))
    with recomputing(model, critic):
        again = read(model, critic, packing, rows, 100)[3]
    probes = 1 + (4 if packing == "shared" else 0)
    assert len(passes) - probes == 2
    assert not first_layer(model).training
    torch.testing.assert_close(again, plain, atol=1e-12, rtol=1e-12)


# -- which models can be packed ------------------------------------------------------------------------


def test_a_model_whose_attention_is_capped_computes_with_the_cap(tmp_path):
    """transformers chooses a kernel that leaves it out, and both the learner and the engine would."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "head_dim": 8}
    config = Gemma2Config(vocab_size=V, num_hidden_layers=2, num_key_value_heads=1, query_pre_attn_scalar=8, **sizes)
    made = AutoModelForCausalLM.from_config(config)
    for name, weight in made.named_parameters():
        weight.data *= 30 if "q_proj" in name or "k_proj" in name else 1
    made.save_pretrained(tmp_path)
    tiny_tokenizer().hf.save_pretrained(tmp_path)
    loaded, _ = Pretrained(
        path=str(tmp_path), dtype="float32", chat=None, device="cpu", gradient_checkpointing=False
    ).load((), 0)
    ids = torch.tensor([[1, 2, 3, 4, 5, 6, 7, 8]])
    made.set_attn_implementation("eager")
    assert torch.allclose(loaded(ids).logits, made(ids).logits, atol=1e-5)
    assert "its attention is 'eager'" in Reader.of(loaded, "shared").why_padded


@pytest.mark.parametrize(
    "settings", [{"temperature": 0.6, "do_sample": False}, {"temperature": 0.9, "top_p": 0.6}, {"early_stopping": True}]
)
def test_settings_of_generation_that_transformers_would_not_write_are_mended_when_they_are_read(
    settings, tmp_path, capsys
):
    tiny_llama(V).save_pretrained(tmp_path)
    tiny_tokenizer().hf.save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": 1} | settings))
    loaded, _ = Pretrained(
        path=str(tmp_path), dtype="float32", chat=None, device="cpu", gradient_checkpointing=False
    ).load((), 0)
    loaded.save_pretrained(tmp_path / "again")
    assert loaded.generation_config.eos_token_id == 1
    assert "generation_config.json is mended" in capsys.readouterr().err


def test_a_model_that_fails_at_packed_rows_is_padded(tmp_path):
    config = FalconConfig(vocab_size=V, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, alibi=True)
    assert Reader.of(AutoModelForCausalLM.from_config(config), "shared").why_padded


@pytest.mark.parametrize(
    ("targets", "why"),
    [("all-linear", "is no linear layer"), (("q_proj", "lm_head"), "shares its weight with 'model.embed_tokens'")],
)
def test_adapters_that_could_not_be_merged_are_refused(targets, why):
    pytest.importorskip("peft")
    if targets == "all-linear":
        sizes: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 24, "moe_intermediate_size": 8, "head_dim": 8}
        heads: dict[str, Any] = {"num_attention_heads": 2, "num_key_value_heads": 1, "num_hidden_layers": 1}
        model = Qwen3MoeForCausalLM(
            Qwen3MoeConfig(vocab_size=V, num_experts=4, num_experts_per_tok=2, **sizes, **heads)
        )
    else:
        model = tiny_llama(V, tied=True)
    with pytest.raises(ConfigError, match=why):
        Lora(rank=2, alpha=4, targets=targets).adapt(model, 0)


def test_a_head_that_is_only_a_matrix_is_told_from_one_that_is_more():
    assert Reader.of(MODELS["llama"], "shared").head is MODELS["llama"].get_output_embeddings()
    assert Reader.of(MODELS["scaled"], "shared").head is None
    assert Reader.of(tiny("granite", logits_scaling=1.0), "shared").head is not None


@pytest.mark.parametrize(
    ("model", "why"),
    [
        (tiny("llama", attn_implementation="eager"), "its attention is 'eager'"),
        (
            tiny("llama", rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}),
            "its dynamic positions",
        ),
    ],
    ids=["eager", "dynamic-rope"],
)
def test_a_model_that_cannot_be_packed_is_padded_and_says_why(model: PreTrainedModel, why: str):
    own = model.config._attn_implementation
    reader = Reader.of(model, "shared")
    assert reader.packing == "padded"
    assert why in reader.why_padded
    assert model.config._attn_implementation == own


def test_finding_out_what_a_model_can_do_leaves_it_as_it_was():
    model = tiny("llama", attention_dropout=0.5).train()
    first_layer(model).mlp.eval()
    reader = Reader.of(model, "shared")
    assert reader.packing == "shared"  # dropout did not confuse it
    assert model.training
    assert not first_layer(model).mlp.training
    assert all(p.grad is None for p in model.parameters())


def test_positions_that_only_look_ordinary_are_found_out():
    model = tiny("llama")

    class Shifted(nn.Module):  # a model that numbers tokens itself
        def __init__(self, own: Any) -> None:
            super().__init__()
            self.own = own

        def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
            return self.own(x, position_ids=torch.arange(x.shape[1])[None])

    decoder = model.get_decoder()
    decoder.rotary_emb = Shifted(decoder.rotary_emb)
    reader = Reader.of(model, "shared")
    assert reader.packing == "padded"
    assert "it changes hidden states by" in reader.why_padded


def test_a_packed_model_still_reads_padded_rows_and_masks_as_before():
    model = copy.deepcopy(MODELS["qwen2"])
    ids, mask = torch.tensor([[1, 2, 3, 4], [5, 6, 0, 0]]), torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    before = model(ids, attention_mask=mask).logits
    Reader.of(model, "shared")
    assert torch.equal(model(ids, attention_mask=mask).logits, before)


def test_a_packed_model_is_saved_without_a_trace(tmp_path):
    model = tiny_llama(V)
    Reader.of(model, "shared")
    model.save_pretrained(tmp_path)
    assert "otcrl" not in (tmp_path / "config.json").read_text()
    assert AutoModelForCausalLM.from_pretrained(tmp_path).config._attn_implementation == "sdpa"


def test_under_autocast_packing_differs_by_rounding_alone():
    rows = group(20, [10, 12])
    model = tiny("llama", exact=False, initializer_range=0.1)
    ids_BT, mask_BT = tensors(rows)
    said = []
    for packing in ("padded", "shared"):
        reader = Reader.of(model, packing)
        (micro,) = reader.micros(ids_BT, mask_BT, 1000)
        said.append(torch.zeros(ids_BT.shape))
        inputs = (ids_BT[micro.rows], mask_BT[micro.rows], micro.packed)
        said[-1][micro.rows] = reader.logprobs(*inputs, half="bfloat16")[0]
        said[-1].sum().backward()
    exact = token_logprobs(model, ids_BT, mask_BT)[0]
    assert said[1].dtype == torch.float32
    torch.testing.assert_close(said[1], said[0], atol=0.02, rtol=0)
    torch.testing.assert_close(said[1], exact, atol=0.02, rtol=0)
    assert not torch.equal(said[1], exact)
