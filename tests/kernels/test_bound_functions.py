"""Kernels are bound to single modules: classes never change, and copies, files and hooks keep what was bound."""

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate import hooks
from peft import LoraConfig, get_peft_model
from torch import nn

from deepseek_latent import LatentCache
from deepseek_latent.compat.accelerate import is_equivalent_inside_hooks
from deepseek_latent.compat.bound_functions import has_bound_functions, is_bound
from deepseek_latent.compat.hooks import has_own_forward
from deepseek_latent.kernels import optimize_for_inference
from tests.support import needs_compiler, random_ids, relative_error, tiny_model

pytestmark = needs_compiler
WEIGHTS = pytest.mark.parametrize("weights", [None, "int8"], ids=str)


def optimized(weights=None, **overrides):
    model = tiny_model(**overrides)
    optimize_for_inference(model, weights)
    return model


@WEIGHTS
def test_no_class_changes(weights):
    model = tiny_model()
    classes = [type(module) for module in model.modules()]
    done = optimize_for_inference(model, weights)
    assert [type(module) for module in model.modules()] == classes
    assert sum(map(has_bound_functions, model.modules())) == len(done.modules) - len(model.model.layers[1:])


@WEIGHTS
@torch.no_grad()
def test_a_deepcopy_computes_with_its_own_weights(weights):
    model, ids = optimized(weights), random_ids(1, 3)
    expected = model(ids).logits
    copied = copy.deepcopy(model)
    for module in copied.modules():
        assert all(value.args == (module,) for value in vars(module).values() if is_bound(value))
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.stride(-1 if tensor.dim() else None):
            tensor.zero_()
    assert torch.equal(copied(ids).logits, expected)
    assert not torch.equal(model(ids).logits, expected)


@torch.no_grad()
def test_a_shallow_copy_is_not_taken_for_what_it_calls():
    linear = optimized().lm_head
    assert not has_own_forward(linear)
    assert has_own_forward(copy.copy(linear))


@WEIGHTS
@torch.no_grad()
def test_a_saved_model_loads_and_computes_in_another_process(weights, tmp_path):
    model, ids = optimized(weights), random_ids(1, 3)
    torch.save((model, ids, model(ids).logits), tmp_path / "model.pt")
    program = f"""
import torch
model, ids, expected = torch.load({str(tmp_path / "model.pt")!r}, weights_only=False)
with torch.no_grad():
    torch.testing.assert_close(model(ids).logits, expected)
assert type(model.lm_head) is torch.nn.Linear and model.lm_head.forward.args == (model.lm_head,)
"""
    subprocess.run([sys.executable, "-c", program], check=True, cwd=Path(__file__).parent.parent.parent)


def aligning_hook(**options):
    return hooks.AlignDevicesHook(execution_device="cpu", **options)


@pytest.mark.parametrize("hooks_first", [True, False])
@torch.no_grad()
def test_hooks_of_a_device_map_call_kernels_whichever_comes_first(hooks_first):
    model, ids = tiny_model(), random_ids(1, 1)
    expected = model(ids).logits
    linear = model.model.layers[0].mlp.up_proj
    if hooks_first:
        hooks.add_hook_to_module(model, aligning_hook())
        for module in model.modules():
            hooks.add_hook_to_module(module, aligning_hook())
    done = optimize_for_inference(model)
    if not hooks_first:
        for module in model.modules():
            hooks.add_hook_to_module(module, aligning_hook())
    assert is_bound(linear._old_forward)
    assert is_equivalent_inside_hooks(linear)
    assert relative_error(model(ids).logits, expected) < 1e-5
    done.undo()
    assert not any(map(has_bound_functions, model.modules()))
    assert torch.equal(model(ids).logits, expected)
    hooks.remove_hook_from_module(model, recurse=True)
    assert torch.equal(model(ids).logits, expected)


@torch.no_grad()
def test_hooks_that_are_removed_leave_the_kernels():
    linear, x = optimized().lm_head, torch.randn(1, 72)
    expected = linear(x)
    hooks.add_hook_to_module(linear, aligning_hook())
    hooks.remove_hook_from_module(linear)
    assert is_bound(linear.forward)
    assert torch.equal(linear(x), expected)


@torch.no_grad()
def test_a_forward_that_was_replaced_before_is_left_alone():
    model = tiny_model()
    model.lm_head.forward = lambda x: x + 1
    optimize_for_inference(model)
    x = torch.randn(1, 72)
    assert torch.equal(model.lm_head(x), x + 1)
    with pytest.raises(ValueError, match="its forward was replaced before"):
        optimize_for_inference(model, weights="int8")


@torch.no_grad()
def test_int8_layers_do_not_pass_for_their_weights():
    linear = optimized("int8").lm_head
    assert has_own_forward(linear)
    assert linear.weight.isnan().all()


@torch.no_grad()
def test_absorption_reads_an_adapter_over_an_optimized_model():
    config = LoraConfig(r=3, target_modules=["kv_b_proj"], init_lora_weights=False)
    model = get_peft_model(optimized(), config).eval()
    calls = []
    attention = model.base_model.model.model.layers[0].self_attn
    attention.kv_b_proj.base_layer.forward = nn.Linear.forward.__get__(attention.kv_b_proj.base_layer)
    attention.kv_b_proj.lora_A["default"].register_forward_hook(lambda *args: calls.append(args))
    assert attention.up_projections() is None
    attention.kv_b_proj.lora_A["default"]._forward_hooks.clear()
    assert attention.up_projections() is not None
    model(input_ids=random_ids(1, 5))
    assert not calls


@WEIGHTS
@torch.no_grad()
def test_the_short_way_of_experts_is_compiled_too(weights):
    model, ids = optimized(weights), random_ids(1, 1)
    cache = LatentCache(model.config, max_cache_len=8)
    calls = []

    def backend(graph, inputs):
        calls.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph.forward

    compiled = torch.compile(model, fullgraph=True, backend=backend)
    expected = model(ids, cache=LatentCache(model.config, max_cache_len=8)).logits
    assert relative_error(compiled(ids, cache=cache).logits, expected) < 1e-5
    # a layer projects in one call, and computes routed and shared experts in one call
    num_calls = {name: calls.count(f"deepseek_latent.{name}") for name in ("project", "experts", "mlp")}
    assert num_calls == {"project": 3, "experts": 2, "mlp": 1}, calls
