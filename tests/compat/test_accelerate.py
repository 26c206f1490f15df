"""Canaries: what compat/accelerate.py uses of accelerate is still as it expects.

A test here fails with what changed and which code uses it. It passes on all versions that pyproject.toml admits.
"""

import torch
from accelerate import dispatch_model, hooks
from torch import nn

from deepseek_latent.compat import accelerate as compat
from tests.compat.helpers import linear


def test_hooks_have_the_attributes_that_show_what_they_do():
    layer = linear()
    plain = vars(layer).get("forward")
    assert plain is None
    for options, is_equivalent in (({}, True), ({"offload": True}, True), ({"io_same_device": True}, False)):
        layer = linear()
        hooks.add_hook_to_module(layer, hooks.AlignDevicesHook(execution_device="cpu", **options))
        assert compat.is_equivalent_inside_hooks(layer) == is_equivalent, (
            f"hooks with {options} differ; used by has_hooks"
        )
        assert compat.is_offloaded(layer) == ("offload" in options), "used by weights_here"
    other = linear()
    hooks.add_hook_to_module(other, hooks.ModelHook())
    assert not compat.is_equivalent_inside_hooks(other), "a hook of another class may do anything; used by has_hooks"
    hooks.remove_hook_from_module(other)
    assert compat.is_equivalent_inside_hooks(other)


def test_offloaded_weights_come_and_go():
    layer = linear()
    weight = layer.weight.detach().clone()
    hooks.add_hook_to_module(layer, hooks.AlignDevicesHook(execution_device="cpu", offload=True))
    assert layer.weight.is_meta
    assert str(layer._hf_hook.execution_device) == "cpu", "used by placeholder_weights"
    with compat.weights_here(layer):
        assert torch.equal(layer.weight, weight)
        layer.weight.data += 1
        compat.keep_fetched_weights(layer)
    assert layer.weight.is_meta
    with compat.weights_here(layer):
        assert torch.equal(layer.weight, weight + 1), "hooks fetch weights from elsewhere; used by keep_fetched_weights"


def test_a_device_map_puts_such_a_hook_on_every_layer():
    model = nn.Sequential(linear(), nn.Linear(6, 4))
    dispatch_model(model, {"0": "cpu", "1": "cpu"}, force_hooks=True)
    assert all(compat.is_equivalent_inside_hooks(layer) for layer in model), (
        "a device_map adds other hooks; used by has_hooks"
    )


def test_offloaded_weights_that_are_frozen_while_placeholders_stand_for_them_stay_frozen():
    layer = nn.Linear(4, 3)
    hooks.add_hook_to_module(layer, hooks.AlignDevicesHook(execution_device="cpu", offload=True))
    with compat.placeholder_weights(layer) as has_offloaded:
        assert has_offloaded
        assert layer.weight.isnan().all()
        layer.weight.requires_grad_(False)
    assert (layer.weight.is_meta, layer.weight.requires_grad) == (True, False)
    assert (layer.bias.is_meta, layer.bias.requires_grad) == (True, True)
