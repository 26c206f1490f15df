"""`experts.weights`: every storage computes what it says it stores, and is exchanged without a change of class."""

import copy
import pickle

import pytest
import torch
from torch import nn

from deepseek_latent.experts.codec import pack
from deepseek_latent.experts.names import PROJECTIONS, STACKED, name_of_expert, parse_name_of_expert, split_projections
from deepseek_latent.experts.packed import PackedWeights
from deepseek_latent.experts.products import grouped_product
from deepseek_latent.experts.routed import DeepseekV2Experts
from deepseek_latent.experts.trained import TrainedWeights
from deepseek_latent.experts.weights import StackedWeights
from tests.support import relative_error, seeded, tiny_model

STORAGES = {
    "stacked": StackedWeights,
    "8 bits": lambda: PackedWeights(8),
    "8 bits by row": lambda: PackedWeights(8, None),
    "8 bits, saved dense": lambda: PackedWeights(8, saves_dense=True),
    "4 bits": lambda: PackedWeights(4),
    "trained": lambda: TrainedWeights([7, 2]),
}
E, D, F, K = 12, 72, 32, 3


def stored(storage: str, dtype=torch.float32) -> DeepseekV2Experts:
    experts = tiny_model(dtype).model.layers[1].mlp.experts
    experts.weights = STORAGES[storage]()
    return experts


def routed(dtype=torch.float32, num_tokens: int = 9):
    """Tokens [m d], three different experts of each [m k], and their weights [m k]."""
    x = torch.randn(num_tokens, D, generator=seeded(1)).to(dtype)
    experts = torch.rand(num_tokens, E, generator=seeded(2)).topk(K).indices
    return x, experts, torch.rand(num_tokens, K, generator=seeded(3))


def by_hand(experts: DeepseekV2Experts, x, chosen, weights):
    """One token and one expert at a time, in float64."""
    gate_up, down = (experts.weights.dense(name).double() for name in STACKED)
    total = torch.zeros_like(x, dtype=torch.float64)
    for token in range(len(x)):
        for expert, weight in zip(chosen[token].tolist(), weights[token].double()):
            gate, up = (gate_up[expert] @ x[token].double()).chunk(2)
            total[token] += weight * (down[expert] @ (nn.functional.silu(gate) * up))
    return total


@pytest.mark.parametrize("grad", [False, True], ids=["inference", "grad"])
@pytest.mark.parametrize("storage", STORAGES)
def test_experts_compute_what_dense_says_they_store(storage, grad):
    experts = stored(storage)
    with torch.set_grad_enabled(grad):
        assert relative_error(experts(*routed()), by_hand(experts, *routed())) < 1e-5


@pytest.mark.parametrize("storage", STORAGES)
@torch.no_grad()
def test_a_product_is_that_of_the_dense_weight(storage):
    experts = stored(storage)
    x, ends = torch.randn(8, D, generator=seeded(4)), torch.tensor([0, 2, 2, 3, 3, 3, 5, 8, 8, 8, 8, 8]).int()
    product = experts.weights.product(x, "gate_up_proj", ends)
    assert product.shape == (8, 2 * F)
    assert relative_error(product, grouped_product(x, experts.weights.dense("gate_up_proj"), ends)) < 1e-5


@pytest.mark.parametrize("storage", STORAGES)
@torch.no_grad()
def test_stacked_weights_come_back_as_they_were_stored(storage):
    experts = stored(storage)
    dense = {name: experts.weights.dense(name).clone() for name in STACKED}
    before, buffers = experts(*routed()), len([*stored("stacked").parameters()])
    experts.weights = StackedWeights()
    assert all(torch.equal(getattr(experts, name), dense[name]) for name in STACKED)
    assert relative_error(experts(*routed()), before) < 1e-5
    assert [name for name, _ in experts.named_parameters()] == [*STACKED]
    assert len([*experts.parameters(), *experts.buffers()]) == buffers


class Zeros:
    """`ExpertOperators` that show where they were used."""

    @staticmethod
    def forward(weights, x, top_k_index, top_k_weights):
        return torch.zeros_like(x)

    @staticmethod
    def product(weights, x, name, ends):
        return None


@pytest.mark.parametrize("storage", STORAGES)
@torch.no_grad()
def test_experts_stored_another_way_keep_their_operators(storage):
    experts = stored("stacked")
    experts.weights.operators = Zeros
    experts.weights = STORAGES[storage]()
    assert not experts(*routed()).any()
    experts.weights = StackedWeights()
    assert not experts(*routed()).any()
    experts.weights.operators = None
    assert experts(*routed()).any()


@pytest.mark.parametrize("storage", STORAGES)
def test_no_storage_changes_the_class_or_the_shapes_that_others_see(storage):
    experts = stored(storage)
    assert type(experts) is DeepseekV2Experts
    assert experts.gate_up_proj.shape == (E, 2 * F, D)
    assert experts.down_proj.shape == (E, D, F)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["copy", "pickle"])
@pytest.mark.parametrize("storage", STORAGES)
@torch.no_grad()
def test_a_copy_has_weights_of_its_own(storage, copied):
    experts = stored(storage)
    before = experts(*routed())
    other = copied(experts)
    assert type(other.weights) is type(experts.weights)
    assert other.weights.experts is other
    assert torch.equal(other(*routed()), before)
    other.weights = StackedWeights()
    nn.init.zeros_(other.down_proj)
    assert other(*routed()).abs().max() == 0
    assert torch.equal(experts(*routed()), before)


@pytest.mark.parametrize("storage", STORAGES)
@torch.no_grad()
def test_a_replica_for_data_parallel_reads_its_own_tensors(storage):
    experts = stored(storage)
    replica = experts._replicate_for_data_parallel()
    assert replica.weights.experts is replica
    assert replica.weights is not experts.weights
    # as torch puts a device's copies into a replica
    replica._parameters = {name: x.detach().clone() * 0 for name, x in experts._parameters.items()}
    replica._buffers = {name: x.clone() * 0 for name, x in experts._buffers.items()}
    if storage != "trained":
        assert replica(*routed()).abs().max() == 0
    assert experts(*routed()).abs().max() > 0


def test_a_state_dict_says_what_its_storage_promises():
    state = {storage: stored(storage).state_dict() for storage in STORAGES}
    plain = state["stacked"].keys()
    assert plain == {*STACKED}
    assert state["trained"].keys() == plain
    assert state["8 bits, saved dense"].keys() == plain
    assert state["8 bits, saved dense"]["down_proj"].dtype == torch.float32
    assert not state["4 bits"].keys() & plain


@pytest.mark.parametrize("storage", STORAGES)
def test_what_refuses_says_the_way_back(storage):
    weights = stored(storage).weights
    reasons = [weights.why_no_adapters, weights.why_no_saving]
    assert (weights.way_back is None) == (storage == "stacked")
    assert all(weights.way_back in reason for reason in reasons if reason is not None)
    assert weights.is_plain == (storage == "stacked")


@pytest.mark.parametrize("before", ["stacked", "4 bits", "trained"])
@torch.no_grad()
def test_experts_that_cannot_be_packed_stay_as_stacked_weights(before, monkeypatch):
    experts = stored(before)
    expected, packed_so_far = experts(*routed()), []

    def fail_at_the_second(*arguments):
        packed_so_far.append(arguments)
        if len(packed_so_far) == 2:
            raise MemoryError
        return pack(*arguments)

    monkeypatch.setattr("deepseek_latent.experts.packed.pack", fail_at_the_second)
    with pytest.raises(MemoryError):
        experts.weights = PackedWeights(8)
    assert type(experts.weights) is StackedWeights
    assert relative_error(experts(*routed()), expected) < 1e-5
    assert experts.state_dict().keys() == {*STACKED}
    monkeypatch.undo()
    experts.weights = PackedWeights(8)
    assert relative_error(experts(*routed()), by_hand(experts, *routed())) < 1e-5


@pytest.mark.parametrize(("storage", "says"), [("stacked", "stacked"), ("4 bits", "packed in 4 bits")])
def test_a_printed_model_says_how_experts_are_stored(storage, says):
    assert f"(12 experts of width 32, hidden size 72, {says}" in repr(stored(storage)).replace("\n  ", "")


def test_names_of_experts_lead_to_the_rows_that_hold_them():
    weight = torch.arange(12.0).view(1, 6, 2)
    for name, projections in PROJECTIONS.items():
        parts = split_projections(name, weight)
        assert [*parts] == [*projections]
        assert torch.equal(torch.cat([*parts.values()], dim=-2), weight)
        for projection in projections:
            assert parse_name_of_expert(name_of_expert(11, projection)) == (11, projection)
    assert parse_name_of_expert("11.gate_proj.bias") is None
    assert parse_name_of_expert("11.gate_proj.weight_scale_inv") is None
    assert parse_name_of_expert("gate_up_proj") is None


@pytest.mark.parametrize("place", ["", "model.layers.1", "model.layers.1.mlp", "model.layers.1.mlp.experts"])
def test_every_module_refuses_adapters_on_single_experts_from_load_state_dict(place):
    name = "model.layers.1.mlp.experts.3.up_proj.lora_A.weight"
    tensors = {name.removeprefix(place).removeprefix("."): torch.zeros(2, D)}
    with pytest.raises(ValueError, match="deepseek-latent convert adapter"):
        tiny_model().get_submodule(place).load_state_dict(tensors, strict=False)
