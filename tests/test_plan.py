"""`otcrl plan`: its formulas against published and hand-computed numbers, and what it says when a run cannot fit."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from otcrl import cli
from otcrl.cli import run_config
from otcrl.errors import ConfigError, DataError
from otcrl.learner.torch_backend import TorchBackend
from otcrl.models.critic import Critic, SharedCritic
from otcrl.plan import activations, memory, states
from otcrl.plan.changes import applied, is_possible, obstacle, proposal
from otcrl.plan.gpus import GIB, GPUS, find_gpu
from otcrl.plan.read import read_settings, read_work
from otcrl.plan.shapes import KNOWN, Shape, find_shape, llama, qwen2
from tests.plans import LARGE, job
from tests.test_learner import grpo, make_learner, ppo, random_batch

PUBLISHED = {  # parameters: safetensors headers of the hub's checkpoints
    "Qwen2.5-0.5B": 494_032_768,
    "Qwen2.5-1.5B": 1_543_714_304,
    "Qwen2.5-3B": 3_085_938_688,
    "Qwen2.5-7B": 7_615_616_512,
    "Qwen2.5-14B": 14_770_033_664,
    "Qwen2.5-32B": 32_763_876_352,
    "Qwen2.5-72B": 72_706_203_648,
    "Qwen3-0.6B": 596_049_920,
    "Llama-3.2-1B": 1_235_814_400,
    "Llama-3.2-3B": 3_212_749_824,
    "Llama-3.1-8B": 8_030_261_248,
    "Llama-3.1-70B": 70_553_706_496,
    "SmolLM2-135M": 134_515_008,
    "SmolLM2-360M": 361_821_120,
    "SmolLM2-1.7B": 1_711_376_384,
}


# -- models and GPUs ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", KNOWN)
def test_a_shape_has_the_published_number_of_parameters(name: str):
    assert KNOWN[name].parameters == PUBLISHED[name]


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("Qwen/Qwen2.5-7B", "Qwen2.5-7B"),
        ("Qwen/Qwen2.5-7B-Instruct", "Qwen2.5-7B"),
        ("Qwen/Qwen2.5-Math-1.5B", "Qwen2.5-1.5B"),
        ("Qwen/Qwen2.5-Coder-32B-Instruct", "Qwen2.5-32B"),
        ("meta-llama/Meta-Llama-3-8B-Instruct", "Llama-3.1-8B"),
        ("meta-llama/Llama-3.3-70B-Instruct", "Llama-3.1-70B"),
        ("HuggingFaceTB/SmolLM2-135M-Instruct", "SmolLM2-135M"),
    ],
)
def test_hub_names_of_one_family_mean_one_shape(path: str, name: str):
    assert find_shape(path).name == name


def test_a_directory_is_read_from_its_config_json(tmp_path: Path):
    from transformers import Qwen3Config

    Qwen3Config(
        hidden_size=1024,
        intermediate_size=3072,
        num_hidden_layers=28,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        vocab_size=151_936,
        tie_word_embeddings=True,
    ).save_pretrained(tmp_path)
    assert replace(find_shape(str(tmp_path)), name="Qwen3-0.6B") == KNOWN["Qwen3-0.6B"]


def test_what_is_not_known_is_refused_with_the_nearest_name(tmp_path: Path):
    with pytest.raises(DataError, match=r"Did you mean 'qwen2.5-7b'\?"):
        find_shape("Qwen/Qwen2.5-8B")
    with pytest.raises(ConfigError, match=r"gpu=h10-80gb is not known. Did you mean 'h100-80gb'\?"):
        find_gpu("h10-80gb")
    with pytest.raises(ConfigError, match=r"gpu=a100 is several. Did you mean 'a100-\d0gb'\?"):
        find_gpu("a100")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen3_moe"}))
    with pytest.raises(DataError, match=r"plans are made for llama, .*, and this is a qwen3_moe"):
        find_shape(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(DataError, match="does not describe a dense language model"):
        find_shape(str(tmp_path))


def test_a_gpu_is_found_by_its_number_where_that_is_enough():
    assert find_gpu("H100") is GPUS["h100-80gb"]
    assert find_gpu("rtx4090") is GPUS["rtx4090-24gb"]
    assert find_gpu("cpu").name == "cpu"


# -- memory ------------------------------------------------------------------------------------------


def test_the_cache_of_a_token_of_qwen_7b_is_57344_bytes():
    shape = KNOWN["Qwen2.5-7B"]
    assert memory.kv_bytes(shape, 2) == 2 * 28 * 4 * 128 * 2 == 57_344
    assert memory.kv_bytes(shape, 2, tp=2) == 57_344 / 2
    assert memory.kv_bytes(shape, 2, tp=7) == 57_344 / 4, "a K/V head is never split"


@pytest.mark.parametrize(("stage", "gigabytes"), [(0, 120), (1, 31.4), (2, 16.6), (3, 1.9)])
def test_zero_partitions_as_in_its_paper(stage: int, gigabytes: float):
    """Rajbhandari et al. 2020, figure 1: 7.5 B parameters on 64 GPUs, K = 12."""
    kept = states.zero_states(7.5e9, 7.5e9, 64, stage, weight=2, gradient=2, optimizer=12)
    assert round(kept.total / 1e9, 1) == gigabytes


@pytest.mark.parametrize("critic", [None, "own", "shared"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_what_lasts_is_what_a_learner_keeps(precision: str, critic: str | None, monkeypatch: pytest.MonkeyPatch):
    """Weights, moments, float32 masters and gradients, counted in a real one."""
    shape = llama("small", 2, 64, 4, 2, 128, 256, tied=True)
    planned = job(zero=0, precision=precision, critic=critic)
    planned = replace(planned, shape=shape, training=replace(planned.training, backend="torch"))
    lasting, gradients = kept_by_learner(shape, precision, critic, monkeypatch)
    before, within = (sum(memory.resident(planned, updating=updating).values()) for updating in (False, True))
    assert lasting == pytest.approx(before, rel=0.01)
    assert gradients == pytest.approx(within - before, rel=0.01)


def kept_by_learner(
    shape: Shape, precision: str, critic: str | None, monkeypatch: pytest.MonkeyPatch
) -> tuple[int, int]:
    """Bytes that lie between two updates, and of gradients when AdamW begins."""
    policy = built("llama", shape).to(getattr(torch, precision))
    own = {None: None, "own": Critic, "shared": SharedCritic}[critic]
    algo, step, gradients = (ppo() if critic else grpo(kl_coef=0.0)), TorchBackend.step, []

    def counting(backend: TorchBackend, rate: float, what: str) -> float:
        gradients.append(sum(p.grad.nbytes for p in backend._updated.values() if p.grad is not None))
        return step(backend, rate, what)

    monkeypatch.setattr(TorchBackend, "step", counting)
    trunk = {"critic": own(policy) if own else None, "critic_trunk": critic or "own"}
    learner = make_learner(algo, policy=policy, reference=None, **trunk)
    batch = random_batch()
    scores = learner.score(batch)
    learner.update(0, batch, scores, algo.targets(batch, scores), algo)
    modules = [policy, *([learner.critic] if learner.critic is not None else [])]
    kept = [*(p for module in modules for p in module.parameters()), *(value for _, value in learner.state())]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in kept}.values()), sum(gradients)


def test_lora_trains_rank_times_in_and_out_of_every_layer_and_needs_no_reference():
    shape = llama("tiny", 2, 8, 2, 1, 16, 100, tied=True)  # q: 8 -> 8, k and v: 8 -> 4, o: 8 -> 8, MLP 8 <-> 16
    assert shape.adapter_parameters(3) == 2 * 3 * ((8 + 8) + 2 * (8 + 4) + (8 + 8) + 3 * (8 + 16))
    whole = job(reference=True)
    assert states.reference_bytes(whole) == whole.shape.parameters * 2
    adapted = replace(whole, training=replace(whole.training, lora=16))
    assert states.reference_bytes(adapted) == 0
    assert memory.resident(adapted, updating=True)["optimizer"] < memory.resident(whole, updating=True)["optimizer"] / 9


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "autocast"])
@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
def test_the_activations_of_a_layer_are_what_autograd_keeps(kind: str, precision: str):
    tokens, layers = 64, 2
    shape = {
        "llama": llama("", layers, 256, 8, 4, 688, 64, tied=True),
        "qwen2": qwen2("", layers, 256, 8, 2, 512, 64, tied=True),
        "qwen3": llama("", layers, 256, 4, 2, 512, 64, tied=True, head_dim=128, head_norm=True),
    }[kind]
    kept = layers * activations.saved_by_layer(shape, precision) + activations.saved_once(shape, precision)
    kept = kept * tokens + activations.cast_weights(shape.body_parameters, precision)
    assert saved_bytes(kind, shape, precision, tokens) == pytest.approx(kept, rel=0.01)


def saved_bytes(kind: str, shape: Shape, precision: str, tokens: int) -> int:
    """Bytes that a forward pass of the body leaves for the backward pass, weights themselves not counted."""
    model = built(kind, shape)
    if precision == "bfloat16":
        model.to(torch.bfloat16)
    own = {weight.data_ptr() for weight in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    half = torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast")
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), half:
        model.model(input_ids=torch.zeros(1, tokens, dtype=torch.int64), use_cache=False)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def built(kind: str, shape: Shape) -> Any:
    import transformers

    config = getattr(transformers, f"{kind.title()}Config")(
        vocab_size=shape.vocab,
        hidden_size=shape.width,
        intermediate_size=shape.ff_width,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        tie_word_embeddings=shape.tied,
    )
    model: Any = getattr(transformers, f"{kind.title()}ForCausalLM")(config)
    assert sum(weight.numel() for weight in model.parameters()) == shape.parameters
    return model


def test_shared_prompts_count_once_and_their_keys_for_every_row():
    shared = job(prompt=100, max_tokens=50, group=4, micro_tokens=300)
    assert shared.rows == 4  # 100 + 4 * 50
    assert shared.keys == 4 * 150 / 300
    assert shared.acting_tokens == 300 * 200 / 300
    apart = replace(shared, training=replace(shared.training, shared_prefix=False))
    assert (apart.rows, apart.keys, apart.acting_tokens) == (1, 1, 100)


SIZES = st.builds(
    job,
    model=st.sampled_from(sorted(KNOWN)),
    nodes=st.sampled_from([1, 2, 8]),
    gpus=st.sampled_from([1, 2, 8]),
    zero=st.integers(0, 3),
    precision=st.sampled_from(["float32", "bfloat16"]),
    checkpointing=st.booleans(),
    critic=st.sampled_from([None, "own", "shared"]),
    reference=st.booleans(),
    lora=st.sampled_from([0, 16]),
    engine=st.sampled_from(["vllm", "embedded", "servers"]),
    micro_tokens=st.sampled_from([2048, 8192, 65_536]),
)


@given(SIZES)
def test_more_gpus_never_need_more_memory_each(small: Any):
    for before, after in zip(memory.phases(small), memory.phases(replace(small, nodes=2 * small.nodes)), strict=True):
        assert after.total <= before.total * (1 + 1e-9)


@given(SIZES)
def test_a_higher_stage_never_keeps_more_states(any_job: Any):
    totals = []
    for stage in range(4):
        staged = replace(any_job, training=replace(any_job.training, zero=stage))
        parts = memory.resident(staged, updating=True)
        totals.append(sum(size for name, size in parts.items() if name != "buffers"))
    assert totals == sorted(totals, reverse=True)


@given(SIZES)
def test_checkpointing_and_smaller_passes_never_need_more(any_job: Any):
    plain = replace(any_job, training=replace(any_job.training, checkpointing=False))
    total = memory.usage("update", plain).total
    fewer = replace(plain.training, micro_tokens=plain.training.micro_tokens // 2)
    for training in (fewer, replace(plain.training, checkpointing=True)):
        assert memory.usage("update", replace(plain, training=training)).total <= total


def test_what_sleeps_leaves_the_update_its_memory():
    parts = {level: memory.usage("update", job(sleep_level=level)).parts for level in (0, 1, 2)}
    assert parts[0]["KV cache"] > 0
    assert "KV cache" not in parts[1]
    assert memory.host_bytes(job(sleep_level=1)) == job().copies * KNOWN["Qwen2.5-7B"].parameters * 2
    assert memory.host_bytes(job(sleep_level=2)) == 0


def test_offloading_moves_states_to_main_memory():
    away = job(zero=3, gpus=8, offload="cpu", offload_params="cpu")
    parts = memory.resident(away, updating=True)
    assert (parts["weights"], parts["gradients"], parts["optimizer"]) == (0, 0, 0)
    parameters = away.shape.parameters
    assert memory.host_bytes(away) == parameters * (12 + 4) + parameters * 2
    assert memory.host_bytes(replace(away, nodes=2)) == memory.host_bytes(away) / 2
    assert memory.host_bytes(job(zero=3, gpus=8, offload="nvme")) == 0
    frozen = replace(away, training=replace(away.training, reference=not away.training.reference))
    assert abs(memory.host_bytes(frozen) - memory.host_bytes(away)) == parameters * 2, "the reference waits there too"
    two = replace(away, training=replace(away.training, critic="own"))
    held, trained = states.critic_parameters(two)
    assert memory.host_bytes(two) - memory.host_bytes(away) == held * 2 + trained * (12 + 4)


# -- refusals and proposals ----------------------------------------------------------------------------


@pytest.mark.parametrize("case", LARGE, ids=str)
def test_a_proposal_fits_and_none_of_its_changes_can_be_left_out(case: dict[str, Any]):
    refused = job(**case)
    assert obstacle(refused) is not None
    found = proposal(refused)
    assert found is not None
    assert obstacle(found.job) is None
    for left_out in found.changes:
        rest = applied([change for change in found.changes if change is not left_out], refused)
        assert not is_possible(rest) or obstacle(rest) is not None, f"{left_out.text} is not needed"


def test_the_obstacle_names_phase_gpu_and_size():
    said = obstacle(job(model="Qwen2.5-72B"))
    assert said is not None
    usage = max(memory.phases(job(model="Qwen2.5-72B")), key=lambda usage: usage.over)
    assert said.startswith(f"{usage.phase} needs {usage.total / GIB:.1f} GiB on each h100-80gb, which has 79.1: ")
    assert said.endswith(f"{usage.over / GIB:.1f} GiB too much")


def test_a_cache_without_room_for_one_trajectory_is_an_obstacle():
    tight = job(gpus=8, gpu_memory=0.2)  # 15.8 GiB, of which weights take 14.2
    assert obstacle(tight) is not None
    assert "has no room for the K/V cache of one trajectory" in str(obstacle(tight))
    found = proposal(tight)
    assert found is not None
    assert [setting.partition("=")[0] for setting in found.settings] == ["engine.gpu_memory"]


def test_main_memory_is_an_obstacle_where_its_size_is_given():
    away = job(zero=3, gpus=8, offload="cpu")
    assert obstacle(away) is None
    assert (
        obstacle(away, host_gib=100)
        == "main memory of each node: 13 GiB more than host_gib=100 would be offloaded there"
    )


def test_a_model_that_no_machine_here_holds_gets_no_proposal():
    from otcrl.plan.gpus import this_cpu

    huge = replace(job(model="Qwen2.5-72B", engine="embedded"), gpu=replace(this_cpu(), memory=1 * GIB))
    assert proposal(huge) is None


# -- the command ---------------------------------------------------------------------------------------

WORDS = ("plan", "conf=smollm2_search", "engine=vllm", "model=Qwen/Qwen2.5-3B-Instruct", "model.dtype=bfloat16")


def test_a_plan_is_printed_and_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    file = tmp_path / "plan.json"
    assert cli.main([*WORDS, "gpus=8", "price=2", f"json={file}"]) == 0
    out = capsys.readouterr().out
    assert "Qwen2.5-3B, 3.09 B parameters, bfloat16 · 1 x 8 h100-80gb · deepspeed ZeRO-2 · engine vllm" in out
    assert "36,864 bytes per token" in out
    plan = json.loads(file.read_text())
    assert plan["fits"] is True
    assert plan["kv_bytes_per_token"] == 36_864
    assert set(plan["memory_bytes"]) == set(plan["seconds"]) - {"step"} == {"rollout", "score", "update", "publication"}
    assert plan["cost_per_1000_steps"] == pytest.approx(2 * plan["gpu_hours_per_1000_steps"])


def test_what_the_config_lacks_of_the_plan_is_said(capsys: pytest.CaptureFixture[str]):
    """Its own backend keeps everything on every GPU: what fits here would not fit there."""
    assert cli.main([*WORDS, "gpus=8", "zero=3", "offload=cpu"]) == 0
    deepspeed = ["learner.backend=deepspeed", "learner.deepspeed.zero_stage=3", "learner.deepspeed.offload=cpu"]
    assert f"to train as it is planned here, add: {' '.join(deepspeed)}\n" in capsys.readouterr().out
    assert cli.main([*WORDS, "gpus=8", *deepspeed]) == 0
    assert "to train as it is planned" not in capsys.readouterr().out


def test_what_deepspeed_refuses_is_not_planned(capsys: pytest.CaptureFixture[str]):
    assert cli.main([*WORDS, "gpus=8", "offload=nvme"]) == 2
    assert "offload=nvme needs zero=3, got 2" in capsys.readouterr().err
    assert cli.main([*WORDS, "gpus=1", "gpu=h200", "offload=cpu"]) == 0
    assert "deepspeed ZeRO-2" in capsys.readouterr().out, "there is no stage 0"


def test_deepspeed_keeps_a_master_of_float32_weights_too():
    training = job(precision="float32").training
    assert [states.optimizer_bytes(replace(training, backend=b)) for b in ("torch", "deepspeed")] == [8, 12]


def test_without_a_price_there_is_no_cost(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert cli.main([*WORDS, "gpus=4", f"json={tmp_path / 'plan.json'}"]) == 0
    assert "per GPU-hour" not in capsys.readouterr().out
    assert json.loads((tmp_path / "plan.json").read_text())["cost_per_1000_steps"] is None


def test_what_cannot_fit_is_refused_with_the_least_change_that_does(capsys: pytest.CaptureFixture[str]):
    words = [*WORDS, "model=Qwen/Qwen2.5-7B", "gpu=rtx4090", "gpus=8"]
    words.remove("model=Qwen/Qwen2.5-3B-Instruct")
    assert cli.main(words) == 2
    captured = capsys.readouterr()
    assert "together" in captured.out, "the table is shown all the same"
    said = captured.err.strip()
    assert "\n" not in said
    assert "GiB too much. Least change that fits: " in said
    changes = said.partition("Least change that fits: ")[2].partition(" (")[0].split()
    assert cli.main([*words, *changes]) == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["gpu=h10"], "gpu=h10 is not known. Did you mean 'h100-80gb'?"),
        (["model=Qwen/Qwen2.5-4B"], "the shape of 'Qwen/Qwen2.5-4B' is not known here"),
        (["zero=4"], "zero must be 0, 1, 2 or 3, got 4"),
        (["gpus=eight"], "gpus must be a number, got 'eight'"),
        (["offload=disk"], "offload must be none, cpu, nvme, got 'disk'."),
        (["offload_params=cpu"], "offload_params=cpu needs zero=3, got 0"),
        (["tp=3", "gpus=3"], "tp=3 does not divide the 16 attention heads of Qwen2.5-3B"),
        (["tp=8", "gpus=4"], "tp=8 does not divide the 4 GPUs of a node"),
        (["engine=hf", "tp=2"], "tp=2: the embedded engine runs on one GPU; choose engine=vllm"),
        (["mfu=40"], "mfu must be a share above 0 and at most 1, got 40.0"),
        (["gpu=cpu"], "gpu=cpu is planned with the embedded engine: choose engine=hf"),
        (["json=no/such/dir/plan.json"], "json=no/such/dir/plan.json: No such file or directory"),
        (["nods=2"], "nods is not a setting."),
        (["rollout.group_size=0"], "rollout.group_size must be at least 1, got 0"),
        (["rollout.limits=null"], "rollout.limits must be a section of settings, got None"),
        (["learner=null"], "learner must be a section of settings, got None"),
        (["prompt_tokens=inf"], "prompt_tokens must be "),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_wrong_setting_is_one_line(words: list[str], message: str, capsys: pytest.CaptureFixture[str]):
    own = [word for word in WORDS if not any(word.startswith(other.partition("=")[0] + "=") for other in words)]
    assert cli.main([*own, *words]) == 2
    assert capsys.readouterr().err.startswith(f"otcrl: error: {message}")


def test_the_quickstart_fits_on_this_machine(capsys: pytest.CaptureFixture[str]):
    assert cli.main(["plan", "conf=quickstart", "gpu=cpu"]) == 0
    assert capsys.readouterr().out.startswith("tiny, 0.5 M parameters, float32 · 1 x 1 cpu · torch")


def test_settings_are_numbers_where_numbers_are_meant():
    assert read_settings({"gpus": "8", "price": "2.5", "gpu": "h200"}).price == 2.5


def test_a_trajectory_is_as_long_as_the_engine_lets_it_be():
    """The quickstart's engine takes 128 tokens, and its prompts are shorter than those of real tasks."""
    work = read_work(run_config(["conf=quickstart"]), read_settings({"gpu": "cpu"}))
    assert work.longest == 128
    assert work.tokens <= 128
    assert (work.prompt, work.max_tokens) == (64, 64)
