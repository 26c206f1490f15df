"""Canaries: what compat/torch.py uses of torch is still as it expects.

A test here fails with what changed and which code uses it. It passes on all versions that pyproject.toml admits.
"""

import inspect

import torch
from accelerate import hooks
from torch import nn
from torch.nn.attention.flex_attention import create_block_mask

from deepseek_latent.compat import bound_functions
from deepseek_latent.compat import torch as compat
from tests.compat.helpers import linear


def test_modules_keep_hooks_and_parameters_in_the_dicts_that_are_read():
    layer = linear()
    assert not compat.has_forward_hooks(layer)
    for register in (layer.register_forward_hook, layer.register_forward_pre_hook):
        handle = register(lambda *args: None)
        assert compat.has_forward_hooks(layer), "used by has_hooks"
        handle.remove()
    assert [*compat.take_out(layer, ["weight"])] == ["weight"]
    assert not [*layer.parameters()], "used by packed and trained experts"


def test_a_bound_function_acts_for_those_who_keep_a_forward():
    @bound_functions.replaces_method()
    def doubled(module, x):
        return 2 * nn.Linear.forward(module, x)

    layer, x = linear(), torch.randn(2, 4)
    expected = 2 * layer(x)
    hooks.add_hook_to_module(layer, hooks.AlignDevicesHook(execution_device="cpu"))
    bound_functions.bind(layer, {"forward": doubled})
    assert torch.equal(layer(x), expected), "hooks keep forward elsewhere; used by optimize_for_inference"
    hooks.remove_hook_from_module(layer)
    assert torch.equal(layer(x), expected)
    bound_functions.unbind(layer)
    assert torch.equal(2 * layer(x), expected)


def test_changes_in_place_are_counted():
    tensor = torch.zeros(3)
    before = compat.version_of(tensor)
    tensor.add_(1)
    assert compat.version_of(tensor) > before, "used by PromptCache and trained experts"
    with torch.inference_mode():
        assert compat.version_of(torch.zeros(3)) is None


def test_the_methods_of_modules_that_experts_override_have_the_same_parameters():
    for name, parameters in {
        "_apply": ["self", "fn", "recurse"],
        "_save_to_state_dict": ["self", "destination", "prefix", "keep_vars"],
    }.items():
        assert [*inspect.signature(getattr(nn.Module, name)).parameters] == parameters, f"{name}: moe, packed, trained"
    given = ["self", "state_dict", "prefix", "local_metadata", "strict", "missing_keys"]
    assert [*inspect.signature(nn.Module._load_from_state_dict).parameters][:6] == given, "moe, packed, trained"


def test_block_masks_know_their_device():
    mask = create_block_mask(lambda b, h, q, k: q >= k, 1, 1, 8, 8, device="cpu")
    assert compat.device_of(mask).type == "cpu", "used by dense_mask"
