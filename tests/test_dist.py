"""Several ranks compute what one does; real processes that torchrun starts, over gloo."""

from __future__ import annotations

import base64
import copy
import json
import os
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from otcrl import dist
from otcrl.checkpoint import Frontier
from otcrl.errors import ConfigError
from otcrl.learner.deepspeed_backend import use_gpu
from otcrl.models.critic import Critic
from otcrl.packing import common_prefix, shares
from otcrl.rollout.stream import Stream, joined
from otcrl.types import Problem
from tests import ranks
from tests.make import problem
from tests.test_learner import make_learner, ppo

ROOT = Path(__file__).parents[1]
LONG = pytest.mark.skipif("OTCRL_LONG" not in os.environ, reason="four ranks take minutes on two cores: OTCRL_LONG=1")


def torchrun(count: int, *words: str, seconds: int = 300, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(count), *words]
    own = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)} | environment
    return subprocess.run(command, env=own, cwd=ROOT, capture_output=True, text=True, timeout=seconds, check=False)


def alone(*words: str) -> subprocess.CompletedProcess[str]:
    """Python without a launcher."""
    own = {name: value for name, value in os.environ.items() if name not in dist.NAMES}
    own |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, *words]
    return subprocess.run(command, env=own, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)


# -- the learner ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=[2, pytest.param(4, marks=LONG)])
def together(request, tmp_path_factory) -> dict[str, Any]:
    """What several ranks have computed."""
    pytest.importorskip("deepspeed")
    path = tmp_path_factory.mktemp("ranks") / "found.pt"
    at_once = {"MALLOC_MMAP_THRESHOLD_": "65536"}  # freed tensors go back to the system: what is in use can be measured
    run = torchrun(request.param, "-m", "tests.ranks", str(path), seconds=600, **at_once)
    assert run.returncode == 0, run.stderr[-9000:]
    return torch.load(path, weights_only=False)


def close(found: Any, expected: Any, *, absolute: float, relative: float, where: str) -> None:
    """Tensors, numbers and what holds them agree."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys(), where
        for name in expected:
            close(found[name], expected[name], absolute=absolute, relative=relative, where=f"{where}/{name}")
    else:
        found, expected = (torch.as_tensor(value, dtype=torch.float64) for value in (found, expected))
        assert torch.allclose(found, expected, atol=absolute, rtol=relative), where


def test_ranks_packing_and_micro_batches_change_no_gradient_and_no_statistic(together):
    """In float64, to 1e-10 but for the log-probs that travel in float32."""
    for name in ranks.TORCH:
        algo = name.split("/")[1]
        expected = ranks.plain(f"torch/{algo}/padded/10000")
        found = together[name]
        for key in ("old 0", "ref 0", "values 0"):
            close(found[key], expected[key], absolute=1e-6, relative=0, where=f"{name}: {key}")
        close(found["state"], expected["state"], absolute=1e-7, relative=1e-5, where=name)
        close(found["metrics 1"], expected["metrics 1"], absolute=1e-5, relative=1e-4, where=name)


def test_zero_changes_no_gradient_and_no_statistic(together):
    with ranks.float32():
        alone = {algo: ranks.plain(f"torch/{algo}/shared/10000") for algo in ranks.ALGORITHMS}
    for name, (algo, stage, offload) in ranks.ZERO.items():
        found, expected = together[name], alone[algo]
        where = f"stage {stage}, offload {offload}, {algo}"
        for key in ("old 0", "ref 0", "values 0"):
            close(found[key], expected[key], absolute=1e-5, relative=0, where=f"{where}: {key}")
        close(found["state"], expected["state"], absolute=1e-6, relative=1e-4, where=where)
        close(found["metrics 0"], expected["metrics 0"], absolute=1e-4, relative=1e-3, where=where)
        assert found["weights"].keys() == expected["weights"].keys()
        assert [value.shape for value in found["weights"].values()] == [v.shape for v in expected["weights"].values()]
        assert len(found["says"]) == 5


def test_a_mini_batch_with_nothing_to_learn_moves_nothing(together):
    """And ranks go on: the update after it is the one that `restored` compares."""
    assert all(together[name]["still"] for name in ranks.ZERO)


def test_state_goes_from_one_learner_to_another_bit_for_bit(together):
    assert all(together[name]["restored"] for name in ranks.ZERO)


def test_training_begins_with_the_weights_that_there_are_and_the_reference_has_them(together):
    assert all(together[name]["begun"] for name in ranks.ZERO)


LONE = """
import torch
from otcrl.errors import DataError
from tests import ranks
from tests.test_learner import POLICY, random_batch, with_shared_prompts

POLICY.bfloat16()
settings = {"backend": "deepspeed", "deepspeed": ranks.zero(2, "none")}
learner, algo, batch = ranks.made("ppo", **settings), ranks.EVERY["ppo"], with_shared_prompts(random_batch(rows=4))
scores = learner.score(batch)
learner.update(0, batch, scores, algo.targets(batch, scores), algo)
values = learner.score(batch).values
assert values.dtype == torch.float32
assert not torch.equal(values, values.bfloat16().float()), "they go into GAE, and eight bits are too few"
assert ranks.restored("ppo", learner, settings)

state = dict(ranks.made("ppo").state())  # of torch's backend, whose value head has no second copy in float32

def read(name):
    if name not in state:
        raise DataError(name)
    return state[name].clone()

learner.load_state(read)
"""

SPLIT = """
import sys
import torch
from otcrl.learner.deepspeed_backend import made_split
from otcrl.models.critic import Critic
from otcrl.models.pretrained import Pretrained
from otcrl.models.twin import twin
from tests import ranks
from tests.test_learner import random_batch, with_shared_prompts
from tests.tiny import tiny_llama, tiny_tokenizer

tiny_llama(64).bfloat16().save_pretrained(sys.argv[1])
tiny_tokenizer().hf.save_pretrained(sys.argv[1])
source = Pretrained(path=sys.argv[1], dtype="bfloat16", chat=None, device="cpu", gradient_checkpointing=False)
whole, settings = source.load((), 0)[0], ranks.zero(3, "none")
with made_split(settings, torch.bfloat16):
    policy = source.load((), 0)[0]
    given = {"policy": policy, "reference": twin(policy).requires_grad_(False), "critic": Critic(policy)}
for model in (policy.model, given["reference"].model, given["critic"].body):
    assert torch.equal(model.rotary_emb.inv_freq, whole.model.rotary_emb.inv_freq), "positions are not rounded"
learner = ranks.make_learner(ranks.ppo(), **given, backend="deepspeed", deepspeed=settings)
algo, batch = ranks.ppo(), with_shared_prompts(random_batch(rows=4))
scores = learner.score(batch)
learner.update(0, batch, scores, algo.targets(batch, scores), algo)
"""


def test_a_process_alone_needs_no_launcher_and_its_values_keep_their_precision_in_bfloat16():
    """`scale=1gpu` is started without torchrun. What torch's backend has left it can go on from."""
    pytest.importorskip("deepspeed")
    run = alone("-c", LONE)
    assert run.returncode == 0, run.stderr[-9000:]


def test_a_split_model_in_bfloat16_has_the_positions_of_a_whole_one_and_a_critic(tmp_path):
    """`scale=8gpus`. While it is split, whatever it makes is rounded to its weights' type."""
    pytest.importorskip("deepspeed")
    run = alone("-c", SPLIT, str(tmp_path))
    assert run.returncode == 0, run.stderr[-9000:]


def test_deepspeeds_launcher_starts_a_run():
    """It says which rank a process is in words of its own, before those of the command."""
    pytest.importorskip("deepspeed")
    world = base64.urlsafe_b64encode(json.dumps({"localhost": [0]}).encode()).decode()
    launch = ["-m", "deepspeed.launcher.launch", f"--world_info={world}", "--module", "otcrl"]
    run = alone(*launch, "train", "conf=quickstart", "--cfg")
    assert run.returncode == 0, run.stderr[-9000:]
    assert "_target_: otcrl.tasks.atlas.Atlas" in run.stdout


@LONG
def test_what_lies_on_a_disk_changes_no_gradient_and_goes_from_one_learner_to_another(tmp_path):
    """DeepSpeed compiles its disk access first, once on a machine: minutes."""
    ops = pytest.importorskip("deepspeed.ops.op_builder")
    if not ops.AsyncIOBuilder().is_compatible():
        pytest.skip("libaio is not here: apt-get install libaio-dev g++ ninja-build")
    disk = tmp_path / "disk"
    disk.mkdir()
    run = torchrun(2, "-m", "tests.ranks", str(tmp_path / "found.pt"), str(disk), seconds=1800)
    assert run.returncode == 0, run.stderr[-9000:]
    together = torch.load(tmp_path / "found.pt", weights_only=False)
    assert sum(file.stat().st_size for file in disk.rglob("*.swp")) > 1e8, "moments and masters of policies and critics"
    for name, (algo, _) in ranks.DISK.items():
        found, expected = together[name], ranks.outcome(algo, ranks.made(algo))
        for key in ("old 0", "ref 0", "values 0"):
            close(found[key], expected[key], absolute=1e-5, relative=0, where=f"{name}: {key}")
        for kind in ("state", "weights"):
            assert found[kind].keys() == expected[kind].keys()
            for key, value in expected[kind].items():
                if kind == "weights" or "/weights/" in key:  # AdamW begins with a gradient's sign, tiny ones' too
                    assert (found[kind][key] - value).abs().mean() < 1e-7, f"{name}: {key}"
                else:
                    close(found[kind][key], value, absolute=1e-6, relative=1e-4, where=f"{name}: {key}")
        close(found["metrics 0"], expected["metrics 0"], absolute=1e-4, relative=1e-3, where=name)
        assert found["still"], name
        assert found["restored"], name
        assert found["begun"], name


def test_a_model_is_split_as_it_is_loaded_and_trains_as_a_whole_one(together):
    found, whole = together["from file"], ranks.large()
    critic = Critic(whole)
    expected = ranks.updated(make_learner(ppo(), policy=whole, reference=copy.deepcopy(whole), critic=critic))
    assert all(torch.equal(value, found["begun"][name]) for name, value in expected["begun"].items())
    for name in ("old_logprobs", "ref_logprobs", "values"):
        close(getattr(found["scores"], name), getattr(expected["scores"], name), absolute=1e-5, relative=0, where=name)
    close(found["metrics"], expected["metrics"], absolute=1e-4, relative=1e-3, where="metrics")


def test_no_rank_ever_has_the_whole_of_a_split_model(together):
    """Neither while it is loaded nor while its weights are handed out; of which one layer is there at a time."""
    found, parameters = together["from file"], dict(ranks.large().named_parameters())
    nbytes = sum(p.numel() for p in parameters.values()) * 4
    assert nbytes > 120e6
    assert found["loading"] < 0.75 * nbytes  # half of it for this rank, and what is under way
    layer = sum(p.numel() for name, p in parameters.items() if name.startswith("model.layers.0."))
    assert 0 < found["at once"] <= layer
    assert found["left"] == 0


def test_the_engines_of_a_machine_read_a_split_models_weights_from_one_file(together):
    """All ranks gather them; to write them down is for one. It waits for the slowest engine before the next set."""
    for first, second in zip(*together["from file"]["published"], strict=True):
        assert first["path"] == second["path"]
        assert first["arrived"]
        assert second["arrived"]
        assert first["again"]
        assert second["again"], "an engine that died gets them from there too"


# -- how work is split --------------------------------------------------------------------------------------

ROWS = st.lists(st.lists(st.integers(0, 3), max_size=12), max_size=12)


@given(rows=ROWS, count=st.integers(1, 5), share=st.booleans())
def test_each_row_is_read_by_one_rank_and_none_has_much_more_to_read(rows, count, share):
    import numpy as np

    arrays = [np.array(row, dtype=np.int64) for row in rows]
    own = shares(arrays, count, share=share)
    assert len(own) == count
    assert sorted(i for part in own for i in part) == list(range(len(rows)))
    order = [i for part in own for i in part]
    assert order == sorted(order, key=lambda i: (rows[i], i))  # neighbours stay together
    costs = {
        i: len(rows[i]) - (common_prefix(arrays[i], arrays[order[at - 1]]) if share and at else 0)
        for at, i in enumerate(order)
    }
    most = max(costs.values(), default=0)
    assert all(sum(costs[i] for i in part) <= sum(costs.values()) / count + most for part in own)


def numbered(step: int, count: int) -> list[Problem]:
    return [problem(f"nq/train/{step * count + i}") for i in range(count)]


@given(st.integers(1, 4), st.integers(1, 4), st.lists(st.integers(0, 6), min_size=4, max_size=4), st.data())
def test_a_run_goes_on_with_another_number_of_ranks_and_no_problem_is_lost_or_comes_twice(before, after, played, data):
    consumed: list[int] = []
    streams = [Stream(numbered, 12, rank, before) for rank in range(before)]
    frontiers = []
    for stream, count in zip(streams, played, strict=False):
        begun = [stream.next() for _ in range(count)]
        done = data.draw(st.lists(st.sampled_from(begun), unique=True)) if begun else []
        consumed += done
        frontiers.append(stream.frontier(set(begun) - set(done)))
    whole = joined(frontiers)
    streams = [Stream(numbered, 12, rank, after) for rank in range(after)]
    for stream in streams:
        stream.restore(whole)
    for _ in range(30):
        consumed += [stream.next() for stream in streams]
    assert len(consumed) == len(set(consumed))
    assert set(range(min(30, max(consumed)))) <= set(consumed)


def test_one_rank_plays_as_before():
    stream = Stream(numbered, 4)
    assert [stream.next() for _ in range(5)] == [0, 1, 2, 3, 4]
    assert joined([stream.frontier([3])]) == Frontier(cursor=5, pending=(3,))


# -- the whole run ------------------------------------------------------------------------------------------

SHORT = (
    *("conf=quickstart", "sft.steps=40", "sft.batch_size=24", "loop.steps=3", "loop.problems_per_step=6"),
    *("rollout.group_size=4", "evaluate.sampled=false", "logger=console", "learner.minibatch_size=10"),
    *(
        "engine.tool_patience_s=60",
        "task.entities=6",
        "task.large_sums=20",
        "model.width=32",
        "reward._target_=tests.ranks.ByLength",
    ),
)
TIMES = ("time/", "perf/", "checkpoint/")


def metrics(folder: Path) -> list[dict[str, float]]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith(TIMES)} for row in rows]


@pytest.mark.parametrize("backend", ["torch", "deepspeed"])
def test_two_ranks_train_as_one_does(tmp_path, backend):
    alone = [sys.executable, "-m", "otcrl", "train", *SHORT, f"run_dir={tmp_path / 'alone'}"]
    own = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    subprocess.run(alone, env=own, cwd=ROOT, check=True, capture_output=True, timeout=300)
    more = ["learner.backend=deepspeed", "learner.deepspeed.zero_stage=3"] if backend == "deepspeed" else []
    run = torchrun(2, "-m", "otcrl", "train", *SHORT, *more, f"run_dir={tmp_path / 'two'}")
    assert run.returncode == 0, run.stderr[-9000:]
    assert run.stdout.count("step     0") == 1  # one rank prints
    one, two = metrics(tmp_path / "alone"), metrics(tmp_path / "two")
    assert len(one) == len(two) == 4
    assert all(row["update/policy_grad_norm"] > 0 for row in one[:3])
    for a, b in zip(one, two, strict=True):
        assert a.keys() == b.keys()
        assert a == pytest.approx(b, rel=2e-3, abs=2e-4, nan_ok=True)
    assert (tmp_path / "two/model/model.safetensors").is_file()
    assert (tmp_path / "two/summary.json").is_file()


def test_a_rank_whose_others_do_not_come_ends_and_says_where_it_was(tmp_path):
    script = tmp_path / "late.py"
    script.write_text(
        "import time\n"
        "from otcrl import dist\n"
        "dist.start(dist.Ranks(timeout_s=3))\n"
        "if dist.rank() == 1: time.sleep(60)\n"
        "dist.gather(1, 'step 12: the other ranks\\' rollouts')\n"
    )
    run = torchrun(2, str(script))
    assert run.returncode != 0
    assert "step 12: the other ranks' rollouts" in run.stderr
    assert "rank 0 of 2" in run.stderr


def test_problems_that_ranks_cannot_share_are_refused(tmp_path):
    run = torchrun(2, "-m", "otcrl", "train", *SHORT, "loop.problems_per_step=5", f"run_dir={tmp_path / 'run'}")
    assert "loop.problems_per_step is 5, and 2 ranks cannot play as many each: use 4" in run.stderr


def test_a_launcher_that_says_half_of_it_is_not_believed():
    own = os.environ | {"WORLD_SIZE": "2", "PYTHONPATH": str(ROOT)}
    own.pop("RANK", None)
    words = [sys.executable, "-m", "otcrl", "train", "conf=quickstart"]
    run = subprocess.run(words, env=own, capture_output=True, text=True, cwd=ROOT, timeout=120, check=False)
    assert run.returncode == 2
    assert "WORLD_SIZE is 2 and RANK is not set: start the run with `torchrun" in run.stderr


@pytest.fixture
def machine(monkeypatch):
    """Says how many GPUs this process sees, and that it is rank 3 of 4 on its machine."""

    def sees(count: int) -> None:
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        launcher = {"WORLD_SIZE": "4", "RANK": "3", "LOCAL_RANK": "3", "MASTER_ADDR": "here", "MASTER_PORT": "1"}
        monkeypatch.setattr(dist, "LAUNCHER", launcher)

    return sees


@pytest.mark.parametrize(("count", "own"), [(4, 3), (8, 3), (1, 0)])
def test_a_rank_has_the_gpu_of_its_number_or_the_only_one_that_it_is_shown(count, own, machine):
    machine(count)
    assert dist.own_gpu() == own


def test_more_ranks_than_gpus_are_told_what_to_do(machine):
    machine(2)
    with pytest.raises(ConfigError, match=r"rank 3 is number 3 of its machine, from 0, and torch sees 2 GPUs there"):
        dist.own_gpu()


def test_deepspeed_is_told_which_gpu_the_model_is_on(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "3")
    for place, expected in (("cpu", "3"), ("cuda:1", "1")):
        weight = SimpleNamespace(device=torch.device(place))
        use_gpu(cast(torch.nn.Module, SimpleNamespace(parameters=lambda weight=weight: iter([weight]))))
        assert os.environ["LOCAL_RANK"] == expected


def test_a_rank_that_waits_on_its_gpu_waits_within_the_deadline(monkeypatch):
    """A collective of NCCL returns at once; who waits for it later, elsewhere, is ended without a word."""
    order = []

    @contextmanager
    def deadline(what):
        order.append(f"begin {what}")
        yield
        order.append("end")

    monkeypatch.setattr(dist, "size", lambda: 2)
    monkeypatch.setattr(dist, "deadline", deadline)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda tensor, group: order.append("asked"))
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: order.append("done"))
    dist.add([torch.zeros(1)], "gradients")
    assert order == ["begin gradients", "asked", "done", "end"]
