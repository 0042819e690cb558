"""A checkpoint is complete or absent, holds all that a run needs to go on, and is written while training goes on."""

from __future__ import annotations

import errno
import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from otcrl import checkpoint, saver, sealed
from otcrl.algos.ppo import PPO
from otcrl.checkpoint import DTYPES, Checkpoint, Frontier, Standing, newest, write_tensors
from otcrl.errors import DataError
from otcrl.learner.learner import Learner
from otcrl.models.lora import Lora
from otcrl.saver import Best, Saver
from otcrl.sealed import Corrupt
from tests.test_learner import grpo, make_learner, ppo, random_batch
from tests.tiny import tiny_llama, tiny_tokenizer

TOKENIZER = tiny_tokenizer().hf
STANDING = Standing(
    step=3, reward_state={"atlas/1": 2}, frontier=Frontier(cursor=9, pending=(4, 7), since=((4, 0), (7, 2))), version=2
)


def learned(learner: Learner, algo: PPO, steps: Sequence[int]) -> Learner:
    for step in steps:
        batch = random_batch(seed=step)
        scores = learner.score(batch)
        learner.update(step, batch, scores, algo.targets(batch, scores), algo)
    return learner


def everything(learner: Learner) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in [*learner.weights(), *learner.state()]}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def new_saver(folder: Path, **other) -> Saver:
    about = lambda: {"versions": {}, "tools": {}, "config": {"seed": 0}}  # noqa: E731
    return Saver(folder, **{"keep": 2, "keep_best": None, "about": about, "rank": 0, "ranks": 1} | other)


def saved(folder: Path, learner: Learner, step: int = 3, **other) -> Checkpoint:
    writer = new_saver(folder, **other)
    writer.save(Standing(step=step, reward_state={}, frontier=Frontier(cursor=step), version=step), learner, TOKENIZER)
    writer.wait()
    writer.close()
    found = newest(folder, pytest.fail)
    assert found is not None
    return found


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# -- tensors ----------------------------------------------------------------------------------------------

SHAPES = st.lists(st.integers(0, 4), max_size=3)


@given(
    st.dictionaries(
        st.text(min_size=1).filter(lambda n: n != "__metadata__"), st.tuples(SHAPES, st.sampled_from(sorted(DTYPES)))
    ),
    st.integers(0, 2**32),
)
def test_any_tensors_are_read_back_by_safetensors_bit_for_bit(tmp_path_factory, layout, seed):
    torch.manual_seed(seed)
    tensors = {name: (100 * torch.randn(shape)).to(getattr(torch, dtype)) for name, (shape, dtype) in layout.items()}
    path = tmp_path_factory.mktemp("tensors") / "x.safetensors"
    assert write_tensors(path, tensors) == sealed.digest(path)
    found = load_file(path)
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert found[name].shape == tensor.shape
        assert found[name].reshape(-1).view(torch.uint8).tolist() == tensor.reshape(-1).view(torch.uint8).tolist()


# -- all state --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("algo", [grpo(), ppo()], ids=["grpo", "ppo"])
def test_a_restored_learner_goes_on_to_the_last_bit(algo, tmp_path):
    whole = learned(make_learner(algo), algo, [0, 1])
    found = saved(tmp_path, whole)
    again = make_learner(algo)
    assert not same(everything(again), everything(whole))
    checkpoint.restore(found, again)
    assert same(everything(again), everything(whole))
    assert same(everything(learned(again, algo, [2, 3])), everything(learned(whole, algo, [2, 3])))


def test_a_learner_that_has_not_learned_yet_is_saved_too(tmp_path):
    algo = ppo()
    whole, again = make_learner(algo), make_learner(algo)
    checkpoint.restore(saved(tmp_path, whole), again)
    assert same(everything(learned(again, algo, [0])), everything(learned(whole, algo, [0])))


def test_state_has_names_that_say_nothing_of_how_the_work_is_split():
    names = [name for name, _ in make_learner(ppo()).state()]
    assert len(names) == len(set(names))
    assert "policy/exp_avg/model.embed_tokens.weight" in names
    assert {"critic/weights/head.bias", "critic/exp_avg_sq/head.bias", "critic/step/head.bias"} <= set(names)


def test_where_the_run_stands_is_read_back(tmp_path):
    writer = new_saver(tmp_path)
    writer.save(STANDING, make_learner(grpo()), TOKENIZER)
    writer.wait()
    found = newest(tmp_path, pytest.fail)
    assert found is not None
    assert found.standing == STANDING
    assert found.about["config"] == {"seed": 0}


def test_a_checkpoint_of_another_algorithm_is_refused(tmp_path):
    found = saved(tmp_path, make_learner(grpo()))
    with pytest.raises(DataError, match="was written without a critic: resume with the algo it was made with"):
        checkpoint.restore(found, make_learner(ppo()))


# -- corrupt checkpoints ----------------------------------------------------------------------------------


def cut_short(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


DAMAGE = {
    "truncated weights": (cut_short, "model/model.safetensors", r"has \d+ bytes, and \d+ were written"),
    "a flipped bit": (flip, "state-00000.safetensors", "has sha256 [0-9a-f]{64}, and what was written had [0-9a-f]"),
    "a file that is gone": (Path.unlink, "run.json", "is gone"),
    "a truncated manifest": (cut_short, "manifest.json", "cannot be read"),
    "a changed manifest": (
        lambda file: file.write_text(file.read_text().replace('"step": 2', '"step": 1')), "manifest.json", "it says"
    ),
    "no manifest": (Path.unlink, "manifest.json", "cannot be read"),
}  # fmt: skip


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path], Path]:
    """Puts two checkpoints into a folder."""
    folder = tmp_path_factory.mktemp("pair")
    writer = new_saver(folder)
    for step in (1, 2):
        writer.save(
            Standing(step=step, reward_state={}, frontier=Frontier(cursor=step), version=step),
            make_learner(grpo()),
            TOKENIZER,
        )
    writer.wait()

    def copy(to: Path) -> Path:
        import shutil

        return shutil.copytree(folder, to)

    return copy


@pytest.mark.parametrize(("damage", "name", "message"), DAMAGE.values(), ids=DAMAGE.keys())
def test_the_one_before_is_used_loudly_when_a_file_is_not_what_was_written(damage, name, message, pair, tmp_path):
    folder, told = pair(tmp_path / "checkpoints"), []
    damage(folder / "step-000002" / name)
    found = newest(folder, told.append)
    assert found is not None
    assert found.standing.step == 1
    (line,) = told
    assert line.startswith(f"CORRUPT CHECKPOINT: {folder / 'step-000002' / name} ")
    with pytest.raises(Corrupt, match=message):
        sealed.check(folder / "corrupt-step-000002")
    assert names(folder) == ["corrupt-step-000002", "step-000001"]


@given(data=st.data())
def test_no_damage_to_any_file_goes_unseen(data, pair, tmp_path_factory):
    folder = pair(tmp_path_factory.mktemp("damage") / "checkpoints") / "step-000002"
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    file = data.draw(st.sampled_from(files))
    content = bytearray(file.read_bytes())
    if data.draw(st.booleans()):
        content = content[: data.draw(st.integers(0, len(content) - 1))]
    else:
        content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
    file.write_bytes(content)
    with pytest.raises(Corrupt):
        sealed.check(folder)


def test_when_none_is_whole_nothing_is_begun_over_unasked(pair, tmp_path):
    folder = pair(tmp_path / "checkpoints")
    for step in (1, 2):
        flip(folder / f"step-00000{step}" / "run.json")
    with pytest.raises(DataError, match="held 2 checkpoints, and all of them are corrupt: begin anew, resume=never"):
        newest(folder, lambda line: None)


def test_a_file_system_that_fails_says_nothing_about_what_was_written(pair, tmp_path, monkeypatch):
    """A stale handle passes: were the checkpoints taken for corrupt, the next start would find none."""
    folder = pair(tmp_path / "checkpoints")

    def stale(path: Path) -> str:
        raise OSError(errno.ESTALE, "Stale file handle")

    monkeypatch.setattr(sealed, "digest", stale)
    with pytest.raises(DataError, match=r"step-000002/.* cannot be read: Stale file handle"):
        newest(folder, pytest.fail)
    assert names(folder) == ["step-000001", "step-000002"]


def test_checkpoints_are_told_by_their_names_and_in_their_order(tmp_path):
    for name in ("step-999999", "step-1000000", "step-000010.bak", "step-x", "corrupt-step-000001"):
        (tmp_path / name).mkdir()
    (tmp_path / "step-000011").touch()
    assert [path.name for path in checkpoint.complete(tmp_path)] == ["step-999999", "step-1000000"]


def test_what_a_kill_left_half_written_is_no_checkpoint_and_is_cleared(pair, tmp_path):
    folder = pair(tmp_path / "checkpoints")
    (folder / "step-000002").rename(folder / ".writing-step-000003")
    found = newest(folder, pytest.fail)
    assert found is not None
    assert found.standing.step == 1
    sealed.clear(folder)
    assert names(folder) == ["step-000001"]


# -- writing while training goes on ---------------------------------------------------------------------


class Slow:
    """Writing that waits for a word."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.go, self.writes = threading.Event(), 0
        real = checkpoint.write_tensors

        def write(path: Path, tensors: dict[str, Tensor]) -> str:
            self.writes += 1
            assert self.go.wait(20)
            return real(path, tensors)

        monkeypatch.setattr(checkpoint, "write_tensors", write)


def test_training_goes_on_and_what_it_changes_is_not_what_is_written(tmp_path, monkeypatch):
    algo = ppo()
    learner, slow, writer = learned(make_learner(algo), algo, [0]), Slow(monkeypatch), new_saver(tmp_path)
    then = everything(learner)
    writer.save(STANDING, learner, TOKENIZER)
    learned(learner, algo, [1])  # before a byte has been written
    assert not list(tmp_path.glob("step-*"))
    slow.go.set()
    writer.wait()
    again = make_learner(algo)
    found = newest(tmp_path, pytest.fail)
    assert found is not None
    checkpoint.restore(found, again)
    assert same(everything(again), then)
    metrics = writer.metrics()
    assert set(metrics) == {"checkpoint/blocked_s", "checkpoint/write_s"}
    assert writer.metrics() == {}


def test_one_is_written_at_a_time(tmp_path, monkeypatch):
    learner, slow, writer = make_learner(grpo()), Slow(monkeypatch), new_saver(tmp_path)
    writer.save(STANDING, learner, TOKENIZER)
    threading.Timer(0.2, slow.go.set).start()
    writer.save(Standing(step=4, reward_state={}, frontier=Frontier(cursor=9), version=4), learner, TOKENIZER)
    assert names(tmp_path)[0] == "step-000003" or names(tmp_path)[1] == "step-000003"  # the second may have begun
    assert writer.metrics()["checkpoint/blocked_s"] > 0.15
    writer.wait()


def test_a_mistake_in_the_program_is_not_taken_for_a_full_disk(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "write_run", lambda *_: 1 / 0)
    writer = new_saver(tmp_path)
    writer.save(STANDING, make_learner(grpo()), TOKENIZER)
    with pytest.raises(ZeroDivisionError):
        writer.wait()


def test_a_config_that_transformers_does_not_write_costs_the_checkpoint_and_not_the_run(tmp_path, capsys):
    learner = make_learner(grpo())
    learner.policy.generation_config.temperature = 0.5  # without do_sample
    writer = new_saver(tmp_path)
    writer.save(STANDING, learner, TOKENIZER)
    writer.wait()
    assert "the model's config: " in writer.lost
    assert list(tmp_path.iterdir()) == []


def test_pythons_lock_is_free_while_a_large_file_is_written(tmp_path):
    """Safetensors' own writer holds it to the end (0.26 s at a time for 240 MB)."""
    tensors, longest, done = {"x": torch.ones(25_000_000)}, 0.0, threading.Event()

    def write() -> None:
        write_tensors(tmp_path / "x", tensors)
        done.set()

    last, thread = time.monotonic(), threading.Thread(target=write)
    thread.start()
    while not done.is_set():
        time.sleep(0.001)
        last, longest = time.monotonic(), max(longest, time.monotonic() - last)
    thread.join()
    assert longest < 0.1


# -- what is kept -----------------------------------------------------------------------------------------


def steps_kept(folder: Path, keep: int, keep_best: str | None, rewards: dict[int, float]) -> list[str]:
    learner, writer = make_learner(grpo()), new_saver(folder, keep=keep, keep_best=keep_best)
    for step in range(1, 7):
        writer.save(Standing(step=step, reward_state={}, frontier=Frontier(cursor=0), version=step), learner, TOKENIZER)
        writer.wait()
        writer.best.hear(step, {"reward/value": rewards[step]})
    return [str(int(name[-2:])) for name in names(folder)]


REWARDS = {1: 0.1, 2: 0.9, 3: 0.4, 4: 0.0, 5: float("nan"), 6: 0.5}


def test_the_last_ones_are_kept_and_the_best(tmp_path):
    assert steps_kept(tmp_path / "a", 2, None, REWARDS) == ["5", "6"]
    assert steps_kept(tmp_path / "b", 2, "reward/value", REWARDS) == ["2", "5", "6"]
    assert steps_kept(tmp_path / "c", 1, "-reward/value", REWARDS) == ["4", "6"]


def test_the_best_is_the_newest_of_equals_among_those_that_were_judged():
    best = Best("a/b")
    for step, value in ((1, 0.5), (2, 0.7), (3, 0.7), (4, 0.9)):
        best.hear(step, {"a/b": value})
    assert best.of([1, 2, 3, 5]) == 3
    assert best.of([5]) is None


# -- several ranks ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_write_a_checkpoint_together_that_any_number_of_them_reads(ranks, tmp_path):
    algo = ppo()
    learner = learned(make_learner(algo), algo, [0])
    writers = [new_saver(tmp_path, rank=rank, ranks=ranks) for rank in range(ranks)]
    for writer in writers:
        writer.save(STANDING, learner, TOKENIZER)
    for writer in writers:
        writer.wait()
    found = newest(tmp_path, pytest.fail)
    assert found is not None
    assert found.about["ranks"] == ranks
    parts = sorted(found.path.glob("state-*"))
    assert len(parts) == ranks
    sizes = [len(load_file(part)) for part in parts]
    assert max(sizes) - min(sizes) <= 1
    assert not [name for name in names(found.path) if name.startswith(".")]
    again = make_learner(algo)
    checkpoint.restore(found, again)
    assert same(everything(again), everything(learner))


def test_a_rank_that_cannot_write_its_part_leaves_no_checkpoint_and_says_why(tmp_path, monkeypatch, capsys):
    learner = make_learner(grpo())
    writers = [new_saver(tmp_path, rank=rank, ranks=2) for rank in range(2)]
    real = checkpoint.write_tensors

    def write(path: Path, tensors: dict[str, Tensor]) -> str:
        if path.name == "state-00001.safetensors":
            raise OSError(28, "No space left on device", str(path))
        return real(path, tensors)

    monkeypatch.setattr(checkpoint, "write_tensors", write)
    for writer in reversed(writers):
        writer.save(STANDING, learner, TOKENIZER)
    for writer in writers:
        writer.wait()
    assert names(tmp_path) == []
    assert writers[0].metrics()["checkpoint/failed"] == 1
    said = capsys.readouterr().err
    assert "FAILED: checkpoint step-000003 could not be written: rank 1: No space left on device" in said


def test_what_a_rank_wrote_after_the_first_one_had_failed_is_gone_at_the_next_checkpoint(tmp_path, monkeypatch):
    """On a full disk it would keep the disk full."""
    learner, real = make_learner(grpo()), checkpoint.write_tensors
    full = [True]

    def write(path: Path, tensors: Any) -> str:
        if full and path.name == "state-00000.safetensors":
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(path, tensors)

    monkeypatch.setattr(checkpoint, "write_tensors", write)
    for rank in (0, 1):
        writer = new_saver(tmp_path, rank=rank, ranks=2)
        writer.save(STANDING, learner, TOKENIZER)
        writer.wait()
    assert [path.name for path in tmp_path.iterdir()] == [".writing-step-000003"]
    full.clear()
    writer = new_saver(tmp_path)
    writer.save(replace(STANDING, step=4), learner, TOKENIZER)
    writer.wait()
    assert [path.name for path in tmp_path.iterdir()] == ["step-000004"]


def test_a_rank_that_never_comes_is_not_waited_for_for_ever(tmp_path, monkeypatch):
    monkeypatch.setattr(saver, "OTHERS_S", 0.2)
    writer = new_saver(tmp_path, ranks=2)
    writer.save(STANDING, make_learner(grpo()), TOKENIZER)
    writer.wait()
    assert writer.lost.endswith("rank 1 has not written its part within 0.2 s")


# -- the model's directory --------------------------------------------------------------------------------


def holding(model: Any) -> Learner:
    return make_learner(grpo(kl_coef=0.0), policy=model)


def back(path: Path, model: Any) -> dict[str, Tensor]:
    """Every parameter and buffer of `model` after it has been given what is saved."""
    learner = holding(model)
    learner.load_weights(checkpoint.read_weights(path, learner))
    return dict(model.state_dict())


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_a_saved_model_is_what_transformers_saves(tied, tmp_path):
    model = tiny_llama(30, tied=tied)
    checkpoint.save_model(tmp_path / "ours", holding(model), TOKENIZER)
    model.save_pretrained(tmp_path / "theirs")
    TOKENIZER.save_pretrained(tmp_path / "theirs")
    assert set(names(tmp_path / "ours")) - {"manifest.json"} == set(names(tmp_path / "theirs"))
    for name in names(tmp_path / "theirs"):
        if name != "model.safetensors":
            assert (tmp_path / "ours" / name).read_text() == (tmp_path / "theirs" / name).read_text(), name
    assert same(load_file(tmp_path / "ours/model.safetensors"), load_file(tmp_path / "theirs/model.safetensors"))
    assert same(back(tmp_path / "ours", tiny_llama(30, tied=tied, seed=1)), dict(model.state_dict()))


def experts(seed: int) -> Qwen3MoeForCausalLM:
    torch.manual_seed(seed)
    settings: dict[str, Any] = {
        "vocab_size": 30,
        "hidden_size": 16,
        "intermediate_size": 16,
        "moe_intermediate_size": 8,
    }
    settings |= {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**settings, num_experts=4, num_experts_per_tok=2))


def test_a_mixture_of_experts_keeps_the_names_of_the_hub_and_comes_back(tmp_path):
    model = experts(0)
    checkpoint.save_model(tmp_path / "moe", holding(model), TOKENIZER)
    assert any("experts.3.down_proj.weight" in name for name in load_file(tmp_path / "moe/model.safetensors"))
    assert same(back(tmp_path / "moe", experts(1)), dict(model.state_dict()))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "moe")
    assert same(dict(loaded.state_dict()), dict(model.state_dict()))


def test_a_buffer_that_belongs_to_the_weights_is_saved_with_them(tmp_path):
    model = tiny_llama(30)
    model.register_buffer("scale", torch.arange(3.0))
    checkpoint.save_model(tmp_path / "model", holding(model), TOKENIZER)
    assert load_file(tmp_path / "model/model.safetensors")["scale"].tolist() == [0, 1, 2]
    again = tiny_llama(30, seed=1)
    again.register_buffer("scale", torch.arange(3.0))
    assert same(back(tmp_path / "model", again), dict(model.state_dict()))


def test_another_model_is_refused_by_the_name_of_a_weight(tmp_path):
    checkpoint.save_model(tmp_path / "model", holding(tiny_llama(30)), TOKENIZER)
    with pytest.raises(DataError, match=r"weight is \[30, 32\], and the config's model has \[31, 32\]"):
        back(tmp_path / "model", tiny_llama(31))
    with pytest.raises(DataError, match="is no weight of the config's model"):
        back(tmp_path / "model", tiny_llama(30, tied=True))


def test_adapters_and_what_they_adapt_come_back(tmp_path):
    pytest.importorskip("peft")
    algo, lora = ppo(), {"lora": Lora(rank=2, alpha=4, targets="all-linear")}
    whole = learned(make_learner(algo, **lora), algo, [0, 1])
    found, again = saved(tmp_path, whole), make_learner(algo, **lora)
    checkpoint.restore(found, again)
    assert same(everything(learned(again, algo, [2])), everything(learned(whole, algo, [2])))


def test_a_step_without_the_metric_that_chooses_the_best_ends_no_run_and_is_said_once(capsys):
    """Some are there now and then: proofs of weights, what is measured where something is learned."""
    best = Best("-sync/logprob_gap_mean")
    best.hear(0, {"sync/logprob_gap_max": 1.0})
    best.hear(1, {"sync/logprob_gap_mean": 0.5})
    best.hear(2, {"sync/logprob_gap_max": 1.0})
    assert best.of([0, 1, 2]) == 1
    said = capsys.readouterr().err
    assert said.count("step 0 has no 'sync/logprob_gap_mean', by which loop.keep_best chooses") == 1
    assert "Did you mean 'sync/logprob_gap_max'" in said
    assert "step 2" not in said


def test_a_file_is_replaced_as_a_whole(tmp_path):
    path = tmp_path / "config.yaml"
    for text in ("a: 1\n", "b: 2\n"):
        sealed.write_whole(path, text)
        assert path.read_text() == text
    assert names(tmp_path) == ["config.yaml"]


def test_a_directory_that_could_not_be_filled_leaves_nothing(tmp_path):
    def fill() -> None:
        with sealed.whole(tmp_path / "model") as folder:
            (folder / "x").write_text("x")
            raise OSError("full")

    with pytest.raises(OSError, match="full"):
        fill()
    assert names(tmp_path) == []


def manifest(path: Path) -> dict:
    return json.loads((path / "manifest.json").read_text())


def every_file(path: Path) -> Iterator[str]:
    yield from (str(file.relative_to(path)) for file in path.rglob("*") if file.is_file())


def test_the_manifest_lists_every_file(tmp_path):
    found = saved(tmp_path, make_learner(grpo()))
    assert {*manifest(found.path)["files"], "manifest.json"} == set(every_file(found.path))
