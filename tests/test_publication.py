"""Weights on their way to an engine: whole, each by its name, or an error that says which one is not."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from otcrl.errors import EngineError
from otcrl.models.published import Layers, published
from otcrl.rollout.device_handles import Lender, Loan
from otcrl.rollout.publication import Message, Publisher, check_delivery
from otcrl.rollout.snapshot import Manifest, Snapshot, damaged, mapped, read
from otcrl.rollout.vllm_worker import Receiver
from tests.tiny import tiny_llama

WEIGHTS = {
    "a": torch.arange(6.0).view(2, 3),
    "b": torch.tensor(7, dtype=torch.int64),
    "c": torch.randn(5, 7).to(torch.bfloat16),
    "empty": torch.empty(0, 4),
    "d": torch.randn(3, 4).t(),  # not contiguous
}


@pytest.fixture
def snapshot():
    made = Snapshot()
    yield made
    made.close()


def flip(manifest: Manifest, name: str) -> None:
    """One bit of one parameter changes on its way."""
    entry = next(entry for entry in manifest.entries if entry.name == name)
    mapped(Path(manifest.path), manifest.nbytes)[entry.offset] ^= 1


def test_what_is_read_is_what_was_written(snapshot):
    manifest = Manifest.of(snapshot.write(WEIGHTS.items(), version=3).plain())
    found = dict(read(manifest))
    assert manifest.version == 3
    assert list(found) == list(WEIGHTS)
    assert damaged(manifest) == []
    for name, tensor in WEIGHTS.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


def test_one_flipped_bit_is_found_and_named(snapshot):
    manifest = snapshot.write(WEIGHTS.items(), version=0)
    flip(manifest, "c")
    assert damaged(manifest) == ["c"]


def test_a_later_set_replaces_the_earlier_one_whatever_their_sizes(snapshot):
    for size in (10, 1000, 3):
        manifest = snapshot.write([("x", torch.full((size,), float(size)))], version=size)
        assert torch.equal(dict(read(manifest))["x"], torch.full((size,), float(size)))


def test_the_file_is_gone_with_its_owner(tmp_path):
    in_memory, in_folder = Snapshot(), Snapshot(tmp_path)
    assert len(list(tmp_path.iterdir())) == 1
    in_memory.close()
    in_folder.close()
    assert not in_memory.path.exists()
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written_is_an_error_that_names_it(tmp_path):
    with pytest.raises(EngineError, match="nowhere"):
        Snapshot(tmp_path / "nowhere")


# -- lent memory, without a GPU ---------------------------------------------------------------------------


class Memory:
    """Counts what torch would count on a GPU."""

    def __init__(self) -> None:
        self.lent: list[int] = []  # addresses
        self.back: list[int] = []

    def lend(self, storage: torch.UntypedStorage) -> Loan:
        self.lent.append(storage.data_ptr())
        return Loan("GPU-0", b"handle", storage.nbytes(), 0, b"/counter", storage.data_ptr(), b"event")

    def take_back(self, loan: Loan) -> None:
        self.back.append(loan.counter_offset)

    def lender(self) -> Lender:
        return Lender(self.lend, self.take_back)


def test_a_storage_is_shared_once_however_often_and_in_how_many_parts_it_is_handed_over():
    memory, flat, alone = Memory(), torch.zeros(6), torch.zeros(3)
    lender = memory.lender()
    found = [lender.handles([("a", flat[:4]), ("b", flat[4:]), ("c", alone)]) for _ in range(3)]
    assert memory.lent == [flat.data_ptr(), alone.data_ptr()]
    assert found[0] == found[1] == found[2]
    assert found[0]["a"] != found[0]["b"], "the parts lie elsewhere in it"
    lender.take_back()
    assert memory.back == [], "they are still there"
    lender.close()
    assert sorted(memory.back) == sorted(memory.lent), "else torch would keep them when they are gone"


def test_a_storage_that_is_gone_or_has_other_memory_is_given_back_and_shared_anew():
    memory, model = Memory(), torch.nn.Linear(2, 2, bias=False)
    lender = memory.lender()
    lender.handles(model.named_parameters())
    first = model.weight.data_ptr()
    kept = model.weight.data
    model.weight.data = torch.ones(2, 2)
    lender.handles(model.named_parameters())
    assert memory.lent == [first, model.weight.data_ptr()]
    lender.take_back()
    assert memory.back == [], "somebody has it still"
    kept.untyped_storage().resize_(4096)
    lender.handles([("weight", kept)])
    assert memory.back == [first]
    del kept
    lender.take_back()
    assert len(memory.back) == 2


def test_merged_adapters_can_be_opened_until_they_are_delivered():
    memory = Memory()
    lender = memory.lender()
    lender.handles([("merged", torch.ones(2) + 1)])
    lender.handles([("merged", torch.ones(3) + 1)])
    assert len(memory.lent) == 2
    assert memory.back == []
    lender.take_back()
    assert memory.back == memory.lent


# -- from a learner to a worker ------------------------------------------------------------------------


class Runner:
    """The part of vLLM's model runner that a receiver uses, over a transformers model."""

    def __init__(self) -> None:
        self.model = tiny_llama(32, seed=1)

    def get_model(self) -> torch.nn.Module:
        return self.model


class Worker(Receiver):
    """vLLM's worker with the extension; it does not take the parameter `keep`."""

    def __init__(self, keep: str = "", load_format: str = "auto", dtype: torch.dtype = torch.float32) -> None:
        self.model_runner, self.keep = Runner(), keep
        self.model_runner.model.to(dtype)
        self.vllm_config = SimpleNamespace(
            load_config=SimpleNamespace(load_format=load_format), model_config=SimpleNamespace(dtype=dtype)
        )

    def reload_weights(self, weights_iterator: Iterable[tuple[str, Tensor]]) -> None:
        own = dict(self.model_runner.model.named_parameters())
        for name, tensor in weights_iterator:
            if name != self.keep:
                own[name].data.copy_(tensor)


def deliver(message: Message, to: Receiver) -> None:
    check_delivery([getattr(to, message.method)(message.content)], message)


def moved(model: torch.nn.Module, by: float) -> list[tuple[str, Tensor]]:
    return [(name, p.detach() + by) for name, p in model.named_parameters()]


@pytest.fixture
def learner():
    return tiny_llama(32, seed=2)


@pytest.fixture
def publisher(learner):
    made = Publisher(learner, by_handle=False)
    yield made
    made.close()


def test_a_worker_ends_with_the_learners_weights_and_their_version(learner, publisher):
    here = Worker()
    for version in range(3):
        deliver(publisher.prepare(moved(learner, version), version), here)
        assert here.otcrl_state() == {"version": version}
        for name, parameter in here.model_runner.model.named_parameters():
            assert torch.equal(parameter, learner.get_parameter(name) + version)


def test_a_damaged_parameter_is_named_and_nothing_is_loaded(learner, publisher):
    here = Worker()
    deliver(publisher.prepare(learner.named_parameters(), 0), here)
    message = publisher.prepare(moved(learner, 1), 1)
    flip(Manifest.of(message.content), "model.layers.1.mlp.up_proj.weight")
    with pytest.raises(EngineError, match=r"version 1 .* damaged: model\.layers\.1\.mlp\.up_proj\.weight$"):
        deliver(message, here)
    assert here.otcrl_state() == {"version": 0}


def test_a_missing_parameter_is_named_before_anything_travels(learner, publisher):
    weights = [(name, p) for name, p in learner.named_parameters() if "layers.0.self_attn.v_proj" not in name]
    with pytest.raises(
        EngineError, match=r"1 parameters were not among .* model\.layers\.0\.self_attn\.v_proj\.weight"
    ):
        publisher.prepare(weights, 1)


def test_an_unknown_parameter_and_another_shape_are_named(learner, publisher):
    with pytest.raises(EngineError, match=r"no parameter 'model.norms.weight'. Did you mean 'model.norm.weight'"):
        publisher.prepare([*learner.named_parameters(), ("model.norms.weight", torch.ones(1))], 1)
    with pytest.raises(EngineError, match=r"'model.norm.weight' has shape \[3\], and the engine's is \[32\]"):
        publisher.prepare([*learner.named_parameters(), ("model.norm.weight", torch.ones(3))], 1)


def test_a_parameter_that_the_engine_did_not_take_is_named(learner, publisher):
    here = Worker(keep="model.layers.1.self_attn.o_proj.weight")
    deliver(publisher.prepare(learner.named_parameters(), 0), here)
    with pytest.raises(EngineError, match=r"kept the old values of model\.layers\.1\.self_attn\.o_proj\.weight when 1"):
        deliver(publisher.prepare(moved(learner, 1), 1), here)


def test_a_parameter_that_was_never_taken_is_named_at_the_first_publication_already(learner, publisher):
    """vLLM has made it up, or dropped it to sleep; nothing is known yet about what the learner changed."""
    name = "model.layers.1.self_attn.o_proj.weight"
    here = Worker(keep=name, load_format="dummy")
    message = publisher.prepare(moved(learner, 1), 0)
    for _ in range(2):  # also when it is tried again
        with pytest.raises(EngineError, match=f"worker 0 has not taken {name.replace('.', '[.]')}: vLLM has no value"):
            deliver(message, here)
    here.keep = ""
    deliver(message, here)
    here.keep = name
    deliver(publisher.prepare(moved(learner, 1), 1), here)  # the same as before
    here.otcrl_forget()
    with pytest.raises(EngineError, match=f"worker 0 has not taken {name.replace('.', '[.]')}: vLLM has no value"):
        deliver(publisher.prepare(moved(learner, 1), 2), here)


def test_a_value_that_vllm_has_made_up_may_be_the_true_one(learner, publisher):
    """As for norms, which vLLM 0.33 makes up as 1, and which a model that was never trained has so too."""
    here, keeping = (Worker(load_format="dummy", keep=keep) for keep in ("", "model.norm.weight"))
    for worker in (here, keeping):
        worker.model_runner.model.load_state_dict(learner.state_dict())
    deliver(publisher.prepare(learner.named_parameters(), 0), here)
    with pytest.raises(EngineError, match=r"worker 0 has not taken model\.norm\.weight"):
        deliver(publisher.prepare(learner.named_parameters(), 0), keeping)


def test_a_made_up_parameter_of_one_byte_that_was_never_taken_is_named_too(learner, publisher):
    name = "model.layers.1.self_attn.o_proj.weight"
    here = Worker(load_format="dummy", keep=name)
    narrow = here.model_runner.model.get_parameter(name)
    narrow.data = narrow.data.to(torch.float8_e4m3fn)
    with pytest.raises(EngineError, match=f"worker 0 has not taken {name.replace('.', '[.]')}: vLLM has no value"):
        deliver(publisher.prepare(learner.named_parameters(), 0), here)


def test_a_parameter_that_the_learner_did_not_change_may_stay(learner, publisher):
    here = Worker()
    deliver(publisher.prepare(learner.named_parameters(), 0), here)
    deliver(publisher.prepare(learner.named_parameters(), 1), here)


def test_an_update_too_small_for_the_engines_type_is_no_parameter_that_was_kept(learner):
    """A learner in float32 moves its weights by less than bfloat16 can tell; a larger update must still arrive."""
    name = "model.layers.1.self_attn.o_proj.weight"
    publisher = Publisher(learner, by_handle=False, dtype=torch.bfloat16)
    here, keeping = (Worker(keep=keep, dtype=torch.bfloat16) for keep in ("", name))
    for version, by in enumerate((0.0, 1e-9, 1.0)):
        message = publisher.prepare(moved(learner, by), version)
        deliver(message, here)
        if version < 2:
            deliver(message, keeping)
        else:
            with pytest.raises(EngineError, match=f"worker 0 kept the old values of {name} when 2 was published"):
                deliver(message, keeping)
    publisher.close()


def test_each_parameter_that_changed_must_change_in_the_engine_though_others_did_not(learner, publisher):
    """Such as norms, which an update moves by less than their type can tell."""
    name = "model.layers.1.self_attn.o_proj.weight"
    here = Worker(keep=name)
    deliver(publisher.prepare(learner.named_parameters(), 0), here)
    some = [(own, p + 1 if own in (name, "model.norm.weight") else p) for own, p in learner.named_parameters()]
    with pytest.raises(EngineError, match=f"worker 0 kept the old values of {name} when 1 was published"):
        deliver(publisher.prepare(some, 1), here)


def test_what_vllm_joins_changes_when_its_parts_have_and_a_part_of_a_split_one_may_stay():
    parts = {f"layers.0.mlp.{name}_proj.weight": True for name in ("gate", "up", "down")}
    joined = "layers.0.mlp.gate_up_proj.weight"
    report = {"version": 1, "damaged": [], "unchanged": [joined, "norm.weight"]}
    with pytest.raises(EngineError, match=f"all workers kept the old values of {joined} when 1 was published"):
        check_delivery([report] * 2, Message("", {}, 1, False, {**parts, "norm.weight": False}))
    some = Message("", {}, 1, False, {**parts, "norm.weight": False, "layers.0.mlp.up_proj.weight": False})
    check_delivery([report] * 2, some)
    check_delivery([report, {**report, "unchanged": []}], Message("", {}, 1, True, parts))


def test_weights_in_eight_bits_may_stay_and_so_may_their_scales(learner, publisher):
    """vLLM quantizes as it loads; the largest weight, and with it the scale, may round to what it was."""
    here = Worker()
    norm = here.model_runner.model.model.norm
    norm.weight = torch.nn.Parameter(norm.weight.detach().to(torch.float8_e4m3fn), requires_grad=False)
    norm.weight_scale = torch.nn.Parameter(torch.ones(1))
    for version, by in enumerate((0.0, 1e-6)):
        deliver(publisher.prepare(moved(learner, by), version), here)


def test_a_worker_that_answers_before_it_has_loaded_is_found_out(learner, publisher):
    class Late(Worker):
        def _otcrl_load(self, weights, version, types):
            return {"version": self.otcrl_version, "damaged": [], "unchanged": []}

    here = Late()
    here.otcrl_version = 0
    with pytest.raises(EngineError, match="worker 0 has weights of version 0, and 1 was published"):
        deliver(publisher.prepare(learner.named_parameters(), 1), here)


def test_the_file_of_an_earlier_version_is_not_taken_for_the_new_one(learner, publisher):
    here, old = Worker(), Publisher(learner, by_handle=False)
    stale = old.prepare(learner.named_parameters(), 1)
    fresh = publisher.prepare(moved(learner, 1), 2)
    with pytest.raises(EngineError, match="version 2 reached worker 0 damaged: model"):
        deliver(Message(fresh.method, {**fresh.content, "path": stale.content["path"]}, 2, False), here)
    old.close()


def test_a_split_model_goes_by_file_and_no_more_than_a_layer_of_it_is_whole(learner):
    whole = {name: parameter.detach().clone() for name, parameter in learner.named_parameters()}
    at_once: list[set[str]] = []
    for name, parameter in learner.named_parameters():
        parameter.data, parameter.ds_shape = torch.empty(0), whole[name].shape

    @contextmanager
    def gather(parameters: Sequence[Tensor]) -> Iterator[None]:
        names = {name for name, own in learner.named_parameters() if any(own is p for p in parameters)}
        for name in names:
            learner.get_parameter(name).data = whole[name]
        at_once.append({name for name, parameter in learner.named_parameters() if parameter.numel()})
        yield
        for name in names:
            learner.get_parameter(name).data = torch.empty(0)

    publisher, here = Publisher(learner, by_handle=True), Worker()
    deliver(publisher.prepare(Layers(list(published(learner)), gather), 3), here)
    assert all(torch.equal(p, whole[name]) for name, p in here.model_runner.model.named_parameters())
    assert max(map(len, at_once)) == 9  # what a layer of this model has
    assert publisher.again() is not None
    publisher.close()


def test_an_engine_that_lost_its_weights_gets_them_again_though_the_learner_went_on(learner, publisher):
    deliver(publisher.prepare(learner.named_parameters(), 4), Worker())
    published = [p.clone() for p in learner.parameters()]
    for parameter in learner.parameters():
        parameter.data += 1
    here, message = Worker(), publisher.again()
    assert message is not None
    deliver(message, here)
    assert here.otcrl_state() == {"version": 4}
    assert all(torch.equal(a, b) for a, b in zip(here.model_runner.model.parameters(), published, strict=True))


def test_weights_by_handle_that_the_learner_changes_are_no_longer_the_published_ones(learner):
    publisher = Publisher(learner, by_handle=True)
    publisher._lender = Memory().lender()
    publisher.prepare(learner.named_parameters(), 4)
    message = publisher.again()
    assert message is not None
    assert message.version == 4
    assert publisher.is_current()
    next(learner.parameters()).data += 1
    assert not publisher.is_current()
    assert publisher.again() is None
    for parameter in learner.parameters():
        parameter.data += 1
    assert not publisher.prepare(learner.named_parameters(), 5).all_changed, "the engine may have read some before"
