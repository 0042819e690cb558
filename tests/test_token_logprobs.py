"""Log-probs of an output layer are those of a softmax over all its logits, which never exist at once."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from otcrl.models.policy import softmax_logprobs
from otcrl.models.token_logprobs import Entropy, Tile, linear_logprobs

N, D, V = 11, 6, 13
BIASED = pytest.mark.parametrize("biased", [False, True], ids=["no-bias", "bias"])
ENTROPY = pytest.mark.parametrize("entropy", ["skip", "measure", "train"])


def parts(biased: bool, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    torch.manual_seed(0)
    hidden, weight, bias = torch.randn(N, D), torch.randn(V, D), torch.randn(V)
    leaves = [x.to(dtype).requires_grad_() for x in (hidden, weight, bias)]
    return leaves[0], leaves[1], leaves[2] if biased else None, torch.randint(V, (N,))


@BIASED
@ENTROPY
@pytest.mark.parametrize("tile", [(1, 1), (4, 5), (100, 100)])
@pytest.mark.parametrize(
    ("dtype", "close"), [(torch.float64, 1e-12), (torch.float32, 1e-5)], ids=["float64", "float32"]
)
def test_values_and_gradients_are_those_of_log_softmax(biased, entropy: Entropy, tile: Tile, dtype, close):
    outcomes = []
    for fused in (True, False):
        hidden, weight, bias, chosen = parts(biased, dtype)
        if fused:
            logprobs, found = linear_logprobs(hidden, weight, bias, chosen, 0.7, entropy, tile)
        else:
            logits = torch.nn.functional.linear(hidden, weight, bias)
            logprobs, found = softmax_logprobs(logits, chosen, 0.7, entropy)
        uneven = torch.linspace(-1, 2, N, dtype=dtype)
        (logprobs * uneven + (found * uneven**2 if entropy == "train" else 0)).sum().backward()
        leaves = [hidden, weight, *([bias] if bias is not None else [])]
        outcomes.append([logprobs, found, *(x.grad for x in leaves)])
    for ours, plain in zip(*outcomes, strict=True):
        torch.testing.assert_close(ours, plain, atol=close, rtol=close)
    assert (outcomes[0][1] > 0).all() == (entropy != "skip")


@BIASED
def test_gradients_are_finite_differences(biased):
    hidden, weight, bias, chosen = parts(biased)
    leaves = (hidden, weight) if bias is None else (hidden, weight, bias)

    def trained(h: Tensor, w: Tensor, b: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return linear_logprobs(h, w, b, chosen, 1.3, "train", (4, 5))

    def measured(h: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
        return linear_logprobs(h, w, b, chosen, 1.3, "measure", (4, 5))[0]

    assert torch.autograd.gradcheck(trained, leaves)
    assert torch.autograd.gradcheck(measured, leaves)


def test_a_measured_entropy_has_no_gradient():
    hidden, weight, bias, chosen = parts(biased=False)
    assert not linear_logprobs(hidden, weight, bias, chosen, entropy="measure")[1].requires_grad


def test_a_frozen_weight_gets_no_gradient():
    hidden, weight, bias, chosen = parts(biased=True)
    linear_logprobs(hidden, weight.detach(), bias, chosen)[0].sum().backward()
    assert hidden.grad is not None
    assert weight.grad is None


def test_a_weight_tied_to_the_embedding_collects_both_gradients():
    outcomes = []
    for fused in (True, False):
        _, weight, _, chosen = parts(biased=False)
        hidden = torch.nn.functional.embedding(chosen.roll(1), weight).tanh()
        if fused:
            logprobs = linear_logprobs(hidden, weight, None, chosen)[0]
        else:
            logprobs = softmax_logprobs(hidden @ weight.T, chosen, 1.0, "skip")[0]
        logprobs.sum().backward()
        outcomes.append(weight.grad)
    torch.testing.assert_close(*outcomes, atol=1e-12, rtol=1e-12)


def test_no_tokens_no_log_probs():
    hidden, weight, bias, chosen = parts(biased=False)
    logprobs, entropy = linear_logprobs(hidden[:0], weight, bias, chosen[:0], entropy="train")
    assert (logprobs.shape, entropy.shape) == ((0,), (0,))
    logprobs.sum().backward()
    assert weight.grad is not None
    assert not weight.grad.any()


def test_under_autocast_products_are_coarse_and_the_softmax_is_not():
    hidden, weight, _, chosen = parts(biased=False, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        logprobs, _ = linear_logprobs(hidden, weight, None, chosen)
        plain = (hidden @ weight.T).float().log_softmax(-1).gather(-1, chosen[:, None]).squeeze(-1)
    assert logprobs.dtype == torch.float32
    torch.testing.assert_close(logprobs, plain, atol=1e-6, rtol=1e-6)
    logprobs.sum().backward()
    assert hidden.grad is not None
    assert weight.grad is not None
    assert hidden.grad.dtype == weight.grad.dtype == torch.float32


def test_likelihoods_far_below_any_float_are_still_exact():
    hidden, weight = torch.tensor([[1.0]]), torch.tensor([[0.0], [-500.0]])
    logprobs, entropy = linear_logprobs(hidden, weight, None, torch.tensor([1]), entropy="measure")
    assert logprobs.item() == pytest.approx(-500.0)
    assert entropy.item() == pytest.approx(0.0, abs=1e-30)


@pytest.mark.parametrize("grows", [1, -1], ids=["growing", "falling"])
def test_logits_that_dwarf_those_of_the_tile_before_lose_nothing(grows):
    logits = 300.0 * grows * torch.arange(12, dtype=torch.float64)[:, None]
    logits[3] = logits[4]  # likely words in two tiles
    logprobs, entropy = linear_logprobs(
        torch.ones(12, 1, dtype=torch.float64), logits, None, torch.arange(12), entropy="measure", tile=(5, 4)
    )
    expected = torch.distributions.Categorical(logits=logits[:, 0])
    torch.testing.assert_close(logprobs, expected.logits, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(entropy, expected.entropy().expand(12), atol=1e-12, rtol=1e-12)


class Sizes(TorchDispatchMode):
    """The most elements that any tensor made under it has."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        tensors = [x for x in tree_flatten(out)[0] if isinstance(x, Tensor)]
        self.largest = max([self.largest, *(x.numel() for x in tensors)])
        return out


def test_no_tensor_has_the_logits_of_all_tokens_nor_of_all_words():
    tokens, width, words, tile = 300, 4, 1000, (16, 320)
    hidden = torch.randn(tokens, width, requires_grad=True)
    weight = torch.randn(words, width, requires_grad=True)
    chosen = torch.randint(words, (tokens,))
    with Sizes() as forward:
        logprobs, entropy = linear_logprobs(hidden, weight, None, chosen, entropy="train", tile=tile)
    with Sizes() as backward:
        (logprobs.sum() + entropy.sum()).backward()
    assert forward.largest == backward.largest == 16 * 320
