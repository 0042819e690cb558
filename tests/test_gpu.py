"""The same promises on CUDA. Deselected where there is none: `pytest -m gpu` runs them."""

from __future__ import annotations

import asyncio
import copy
import multiprocessing
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from otcrl.learner.torch_backend import TorchBackend
from otcrl.models.policy import token_logprobs
from otcrl.models.reader import Reader
from otcrl.models.tiny import TinyLlama
from otcrl.rollout.device_handles import Lender, opened
from otcrl.rollout.hf_engine import HFEngine
from otcrl.sft import train_sft
from otcrl.tools.retrieval.dense import Dense, build, exact, tune
from tests.test_packed_models import group, tensors
from tests.test_sft import CONFIG, DIALECT, Fixed
from tests.tiny import tiny_llama

pytestmark = pytest.mark.gpu
WORDS = "q ? <search> </search> <answer> </answer> <information> </information> a b c d".split()


@pytest.fixture
def cuda() -> torch.device:
    if not torch.cuda.is_available():
        pytest.fail("pytest -m gpu was asked for, and there is no CUDA device")
    return torch.device("cuda")


def test_the_engines_log_probs_are_the_learners(cuda):
    model, tokenizer = TinyLlama(width=64, layers=2, heads=4, ff_width=96, context=64).load(WORDS, seed=0)
    model = model.to(cuda)  # pyright: ignore[reportArgumentType]
    engine = HFEngine(model=copy.deepcopy(model), tokenizer=tokenizer, max_sequences=8, context=64, batch_tokens=256)

    async def sample() -> None:
        prompt = tokenizer.prompt_ids("q ?")
        names = [f"{i}" for i in range(16)]
        sampling = [
            engine.generate(prompt, stop=[], max_tokens=20, temperature=0.8, seed=i, session=name)
            for i, name in enumerate(names)
        ]
        done = await asyncio.gather(*sampling)
        for completion in done:
            ids = torch.tensor([[*prompt, *completion.token_ids]], device=cuda)
            mask = torch.zeros(ids.shape, dtype=torch.bool, device=cuda)
            mask[:, len(prompt) :] = True
            logprobs, _ = token_logprobs(model, ids, mask, temperature=0.8)
            found = torch.tensor(completion.logprobs)
            assert torch.allclose(logprobs[0, len(prompt) :].cpu(), found, atol=1e-3)
        await engine.close()

    asyncio.run(sample())


def test_the_cold_start_learns(cuda):
    model, tokenizer = TinyLlama(width=16, layers=1, heads=2, ff_width=24, context=64).load(WORDS, seed=0)
    losses: list[float] = []
    config = replace(CONFIG, steps=30)
    moved = model.to(cuda)  # pyright: ignore[reportArgumentType]
    reader = Reader.of(moved, "shared")
    policy = TorchBackend(moved, reader.logprobs, config.optimizer, config.max_grad_norm)
    train_sft(policy, reader, tokenizer, Fixed("c", "d"), DIALECT, config, lambda _, m: losses.append(m["sft/loss"]))
    assert losses[-1] < 0.3 * losses[0]


@pytest.mark.parametrize(
    ("dtype", "close"), [(torch.float32, 1e-3), (torch.bfloat16, 0.1)], ids=["float32", "bfloat16"]
)
@pytest.mark.parametrize("packing", ["packed", "shared"])
def test_packed_rows_say_and_learn_what_padded_ones_do(cuda, packing, dtype, close):
    rows = group(50, [7, 40, 23, 40])
    ids_BT, mask_BT = tensors(rows)
    outcomes = []
    for way in ("padded", packing):
        model = tiny_llama(64, heads=(4, 2)).to(cuda, dtype)  # pyright: ignore[reportArgumentType]
        reader = Reader.of(model, way)
        assert reader.packing == way
        (micro,) = reader.micros(ids_BT, mask_BT, 1000)
        ids, mask = ids_BT[micro.rows, : micro.width].to(cuda), mask_BT[micro.rows, : micro.width].to(cuda)
        said = torch.zeros(ids_BT.shape)
        logprobs = reader.logprobs(ids, mask, micro.packed)[0]
        said[micro.rows, : micro.width] = logprobs.detach().cpu()
        logprobs.sum().backward()
        gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).float()
        outcomes.append((said, gradient))
    (plain, plain_gradient), (ours, our_gradient) = outcomes
    assert torch.allclose(plain, ours, atol=close)
    assert (plain_gradient - our_gradient).norm() < close * plain_gradient.norm()


@pytest.mark.parametrize("kind", ["flat", "ivf"])
def test_an_index_that_is_built_on_the_gpu_finds_what_one_built_on_the_cpu_does(cuda, kind: str):
    faiss = pytest.importorskip("faiss")
    if not hasattr(faiss, "index_cpu_to_all_gpus") or not faiss.get_num_gpus():
        pytest.skip("this faiss is built without CUDA")
    vectors_ND = np.random.default_rng(0).standard_normal((20_000, 64)).astype(np.float32)
    settings = Dense(kind=kind, lists=64, effort=64)  # all lists: the search is exact
    index = build(settings, vectors_ND)
    assert tune(index, settings, vectors_ND, vectors_ND[:100]) in ({}, {"effort": 64, "recall_at_10": 1.0})
    np.testing.assert_array_equal(index.search(vectors_ND[:100], 10)[1], exact(vectors_ND, vectors_ND[:100], "ip"))  # pyright: ignore[reportCallIssue]


def reader(asked: Any, answers: Any) -> None:
    """Another process: sums of the tensors that it is given handles of."""
    for handles in iter(asked.get, None):
        answers.put([tensor.sum().item() for _, tensor in opened(handles)])


def test_lent_memory_is_shared_once_read_anew_and_free_when_it_is_gone(cuda):
    context = multiprocessing.get_context("spawn")
    asked, answers = context.SimpleQueue(), context.SimpleQueue()
    process = context.Process(target=reader, args=(asked, answers), daemon=True)
    process.start()
    lender, before = Lender(), torch.cuda.memory_allocated()
    flat = torch.zeros(1 << 20, device=cuda)
    handles = [lender.handles([("a", flat[:2]), ("b", flat[2:])])]
    for number in range(1, 4):
        flat.fill_(number)
        torch.cuda.synchronize()
        handles.append(lender.handles([("a", flat[:2]), ("b", flat[2:])]))
        asked.put(handles[-1])
        assert answers.get() == [2 * number, (flat.numel() - 2) * number]
    assert all(handle == handles[0] for handle in handles)
    lent = lender.handles([("merged", torch.full((1 << 20,), 2.0, device=cuda))])
    for _ in range(2):  # as when the first who had opened it died of something
        asked.put(lent)
        assert answers.get() == [2 << 20]
    asked.put(None)
    process.join()
    del flat
    lender.take_back()
    torch.cuda.ipc_collect()
    assert torch.cuda.memory_allocated() == before


def test_vllm_on_the_learners_gpu_gets_weights_by_handle_sleeps_and_samples_from_them(cuda):
    """Colocated: nothing is copied to hand the weights over, and asleep vLLM leaves its memory to the learner."""
    pytest.importorskip("vllm")
    from tests.test_vllm_engine import PROMPT, apart, fresh_model, make

    def free() -> int:
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info()[0]

    async def main() -> None:
        model = fresh_model().to(cuda)  # pyright: ignore[reportArgumentType]
        engine = make(model, gpu_memory=0.2, dtype="float32")
        assert engine._publisher.prepare(model.named_parameters(), 0).method == "otcrl_load_handles"
        for version in range(3):
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(0.01 * version)
            await engine.load_weights(model.named_parameters(), version)
            awake = free()
            done = await engine.generate(PROMPT, stop=(), max_tokens=24, temperature=1.0, seed=version, session="s")
            ids = torch.tensor([PROMPT + done.token_ids], device=cuda)
            mask = torch.arange(ids.shape[1], device=cuda)[None] >= len(PROMPT)
            expected = token_logprobs(model, ids, mask)[0][0, len(PROMPT) :].tolist()
            assert apart(done.logprobs, expected) < 5e-3
            await engine.sleep()
            assert free() - awake > 0.1 * torch.cuda.mem_get_info()[1], "its K/V cache and weights are the learner's"
        await engine.close()

    asyncio.run(asyncio.wait_for(main(), 400))
