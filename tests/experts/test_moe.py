"""The router and the experts, against the paper's equations in float64 and transformers' own classes."""

import pytest
import torch
from transformers.models.deepseek_v2 import modeling_deepseek_v2 as native

from deepseek_latent import DeepseekV2Config
from deepseek_latent.experts.moe import DeepseekV2MoE
from deepseek_latent.experts.router import DeepseekV2MoEGate
from tests import reference
from tests.support import (
    V2,
    assert_within_rounding,
    native_twin,
    official_state_dict,
    random_ids,
    relative_error,
    tiny_model,
)

ROUTERS = {
    "greedy": {"topk_method": "greedy"},
    "greedy, one expert": {"topk_method": "greedy", "num_experts_per_tok": 1, "norm_topk_prob": True},
    "grouped": {},
    "grouped, one group kept": {"topk_group": 1},
    "grouped, groups of one": {"n_group": 12, "topk_group": 5},
    "normalised": {"norm_topk_prob": True},
    "scaled by 2.5": {"routed_scaling_factor": 2.5},
}


def gate(**overrides) -> DeepseekV2MoEGate:
    module = DeepseekV2MoEGate(DeepseekV2Config(**(V2 | overrides)))
    torch.nn.init.normal_(module.weight, std=0.3)
    return module


@pytest.mark.parametrize("router", ROUTERS)
def test_gate_chooses_and_weighs_as_the_paper_does(router):
    module = gate(**ROUTERS[router])
    tokens = torch.randn(50, V2["hidden_size"])
    _, weights, experts = module(tokens)
    for token, weight, expert in zip(tokens, weights, experts):
        expected = reference.route(DeepseekV2Config(**(V2 | ROUTERS[router])), module.weight, token)
        assert set(expert.tolist()) == set(expected)
        torch.testing.assert_close(
            weight.double(), torch.stack([expected[e] for e in expert.tolist()]), rtol=1e-5, atol=1e-6
        )


def test_device_limited_routing_ranks_a_group_by_its_best_expert_not_by_its_best_two():
    module = gate(n_group=4, topk_group=1, num_experts_per_tok=2)
    logits = torch.full((1, 12), -9.0)
    logits[0, 0] = 3.0  # group 0: one star
    logits[0, 3:6] = 2.5  # group 1: three good ones
    with torch.no_grad():
        module.weight.zero_()
        module.weight[:, 0] = logits[0]
    token = torch.zeros(1, V2["hidden_size"])
    token[0, 0] = 1.0
    _, _, experts = module(token)
    assert 0 in experts[0]
    assert all(expert < 3 for expert in experts[0].tolist())


def test_router_stays_in_float32_for_a_bfloat16_model():
    module = gate()
    tokens = torch.randn(64, V2["hidden_size"]).bfloat16()
    with torch.no_grad():
        module.weight.copy_(module.weight.bfloat16())
    exact_logits, exact_weights, exact_experts = module(tokens.float())
    logits, weights, experts = module.bfloat16()(tokens)
    assert logits.dtype == weights.dtype == torch.float32
    assert torch.equal(logits, exact_logits)
    assert torch.equal(experts, exact_experts)
    assert torch.equal(weights, exact_weights)


def test_router_stays_in_float32_under_autocast():
    module = gate()
    tokens = torch.randn(64, V2["hidden_size"]).bfloat16()
    exact_logits, exact_weights, _ = module(tokens)
    with torch.autocast("cpu", torch.bfloat16):
        logits, weights, _ = module(tokens)
    assert torch.equal(logits, exact_logits)
    assert torch.equal(weights, exact_weights)


def moe(dtype=torch.float32, implementation="grouped_mm", **overrides) -> DeepseekV2MoE:
    module = DeepseekV2MoE(DeepseekV2Config(**(V2 | overrides), experts_implementation=implementation))
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return module.to(dtype)


def official(module: DeepseekV2MoE) -> dict[str, torch.Tensor]:
    weights = {k: v for k, v in module.state_dict().items() if not k.startswith("experts.")}
    for e, (gate_up, down) in enumerate(zip(module.experts.gate_up_proj, module.experts.down_proj)):
        gate_proj, up_proj = gate_up.chunk(2)
        weights |= {
            f"experts.{e}.gate_proj.weight": gate_proj,
            f"experts.{e}.up_proj.weight": up_proj,
            f"experts.{e}.down_proj.weight": down,
        }
    return {k: v.detach() for k, v in weights.items()}


@pytest.mark.parametrize("grad", [False, True], ids=["no grad", "grad"])
@pytest.mark.parametrize("overrides", [{}, {"n_shared_experts": None}, {"n_shared_experts": 3}], ids=str)
@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_experts_compute_the_paper(dtype, implementation, overrides, grad):
    module = moe(dtype, implementation, **overrides)
    hidden = torch.randn(2, 7, V2["hidden_size"]).to(dtype)
    exact = reference.moe(module.experts.config, official(module), hidden)
    with torch.set_grad_enabled(grad):
        actual = module(hidden)
        module.experts.config._experts_implementation = "eager"
        yardstick = module(hidden)
    assert actual.dtype == dtype
    assert_within_rounding(actual, exact, yardstick)


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
def test_blocks_of_tokens_change_nothing(implementation, monkeypatch):
    module = moe(implementation=implementation)
    hidden = torch.randn(2, 9, V2["hidden_size"])
    with torch.no_grad():
        whole = module(hidden)
        monkeypatch.setattr("deepseek_latent.experts.moe.ROWS_PER_BLOCK", 3 * 5)
        assert relative_error(module(hidden), whole) < 1e-6


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
def test_experts_run_under_autocast(implementation):
    module, hidden = moe(implementation=implementation), torch.randn(2, 7, V2["hidden_size"])
    exact = reference.moe(module.experts.config, official(module), hidden)
    with torch.autocast("cpu", torch.bfloat16):
        actual = module(hidden)
    # as far off as the same module is in bfloat16 throughout
    module.experts.config._experts_implementation = "eager"
    assert_within_rounding(actual.float(), exact, module.bfloat16()(hidden.bfloat16()))


def test_every_used_expert_and_the_router_get_gradients_equal_across_implementations():
    gradients = []
    for implementation in ("eager", "grouped_mm", "batched_mm"):
        torch.manual_seed(0)
        module = moe(implementation=implementation)
        module(torch.randn(2, 20, V2["hidden_size"])).square().sum().backward()
        gradients.append([p.grad for p in module.parameters()])
    assert all((g != 0).any() for g in gradients[0])
    for other in gradients[1:]:
        for a, b in zip(gradients[0], other):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * a.abs().max().item())


def test_the_class_can_be_told_how_to_multiply_experts():
    model, ids = tiny_model(), random_ids(2, 5)
    assert model.config._experts_implementation == "grouped_mm"
    logits = model(ids).logits
    model.set_experts_implementation("eager")
    assert model.config._experts_implementation == "eager"
    assert relative_error(model(ids).logits, logits) < 1e-5


def test_router_logits_are_recorded_per_moe_layer_and_equal_native():
    model, ids = tiny_model(), random_ids(2, 5)
    recorded = model(ids, output_router_logits=True).router_logits
    assert [tuple(x.shape) for x in recorded] == [(10, 12)] * 2
    theirs = native_twin(model)
    captured = []
    for module in theirs.modules():
        if isinstance(module, native.DeepseekV2TopkRouter):
            module.register_forward_hook(lambda m, args, output: captured.append(output[0]))
    theirs(ids)
    for a, b in zip(recorded, captured, strict=True):
        assert relative_error(a, b) < 1e-5
    assert model(ids).router_logits is None


@pytest.mark.parametrize(("freq", "first", "expected"), [(1, 1, [1, 2, 3, 4]), (2, 0, [0, 2, 4]), (2, 1, [2, 4])])
def test_moe_layers_are_those_of_the_release(freq, first, expected):
    model = tiny_model(num_hidden_layers=5, moe_layer_freq=freq, first_k_dense_replace=first)
    assert [i for i, layer in enumerate(model.model.layers) if isinstance(layer.mlp, DeepseekV2MoE)] == expected
    ids = random_ids(1, 6)
    expected_logits = reference.logits(model.config, official_state_dict(model), ids)
    assert relative_error(model(ids).logits, expected_logits) < 1e-5


def test_experts_a_parallel_rank_does_not_own_add_nothing():
    module = moe(implementation="eager")
    tokens = torch.randn(4, V2["hidden_size"])
    index = torch.tensor([[0, 12], [12, 12], [3, 5], [12, 1]])
    weights = torch.rand(4, 2)
    only_owned = torch.where(index == 12, 0, index), torch.where(index == 12, 0.0, weights)
    torch.testing.assert_close(module.experts(tokens, index, weights), module.experts(tokens, *only_owned))
