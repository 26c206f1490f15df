"""Whatever wraps `kv_b_proj`, decoding gives the same as calling it as a module.

If its weight can be read, attention is absorbed. Otherwise the latents are expanded by calling it.
"""

import contextlib

import accelerate
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn.utils import parametrize

from deepseek_latent.attention import attention as latent_attention
from deepseek_latent.attention.read_linear import read_linear
from tests.support import random_ids, relative_error, tiny_model

CACHED, NEW = 9, 2


class EightBit(nn.Linear):
    """A linear layer after quantization: it has codes and scales, and no weight that can be read."""

    def __init__(self, linear: nn.Linear):
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.bias = linear.in_features, linear.out_features, None
        self.scale = nn.Parameter(linear.weight.abs().amax(-1, keepdim=True) / 127, requires_grad=False)
        self.weight = nn.Parameter((linear.weight / self.scale).round().to(torch.int8), requires_grad=False)

    def forward(self, x):
        return nn.functional.linear(x, self.weight.to(x.dtype) * self.scale)


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


def with_lora(model, *, adapters=("first",), **options):
    peft = None
    for name in adapters:
        config = LoraConfig(r=4, lora_alpha=8, target_modules=["kv_b_proj"], **options)
        if peft is None:
            peft = get_peft_model(model, config, adapter_name=name)
        else:
            peft.add_adapter(name, config)
    for name, parameter in peft.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.2)
    return peft.eval()


def every_kv_b_proj(model):
    return [(layer.self_attn, layer.self_attn.kv_b_proj) for layer in model.model.layers]


def plain_linear(model):
    pass


def lora(model):
    with_lora(model)


def lora_left_in_training_mode(model):
    with_lora(model)
    for _, linear in every_kv_b_proj(model):
        linear.train()


def rslora(model):
    with_lora(model, use_rslora=True)


def lora_with_idle_dropout(model):
    with_lora(model, lora_dropout=0.5)


def lora_switched_off(model):
    with_lora(model).base_model.disable_adapter_layers()


def lora_merged(model):
    with_lora(model).merge_adapter()


def lora_merged_and_unloaded(model):
    with_lora(model).merge_and_unload()


def two_adapters_at_once(model):
    with_lora(model, adapters=("first", "second")).base_model.set_adapter(["first", "second"])


def second_of_two_adapters(model):
    with_lora(model, adapters=("first", "second")).set_adapter("second")


def dora(model):
    with_lora(model, use_dora=True)


def lora_with_bias(model):
    peft = with_lora(model, lora_bias=True)
    for name, parameter in peft.named_parameters():
        if name.endswith("lora_B.first.bias"):
            nn.init.normal_(parameter)


def lora_merged_then_switched_off(model):
    peft = with_lora(model)
    peft.merge_adapter()
    peft.base_model.disable_adapter_layers()


def eight_bit(model):
    for attention, linear in every_kv_b_proj(model):
        attention.kv_b_proj = EightBit(linear)


def forward_hook(model):
    for _, linear in every_kv_b_proj(model):
        linear.register_forward_hook(lambda module, args, output: output * 1.5)


def forward_pre_hook(model):
    for _, linear in every_kv_b_proj(model):
        linear.register_forward_pre_hook(lambda module, args: (args[0] * 1.5,))


def hook_inside_lora(model):
    with_lora(model)
    for _, linear in every_kv_b_proj(model):
        linear.lora_A["first"].register_forward_hook(lambda module, args, output: output * 1.5)


def hook_around_lora(model):
    with_lora(model)
    for _, linear in every_kv_b_proj(model):
        linear.register_forward_hook(lambda module, args, output: output * 1.5)


def parametrization(model):
    for _, linear in every_kv_b_proj(model):
        parametrize.register_parametrization(linear, "weight", Doubled())


def replaced_forward(model):
    for _, linear in every_kv_b_proj(model):
        linear.forward = lambda x, linear=linear: nn.functional.linear(x, linear.weight) * 0.5


READABLE = [
    plain_linear,
    lora,
    lora_left_in_training_mode,
    rslora,
    lora_with_idle_dropout,
    lora_switched_off,
    lora_merged,
    lora_merged_and_unloaded,
    two_adapters_at_once,
    second_of_two_adapters,
]
OPAQUE = [
    dora,
    lora_with_bias,
    eight_bit,
    forward_hook,
    forward_pre_hook,
    hook_inside_lora,
    hook_around_lora,
    parametrization,
    replaced_forward,
]


@contextlib.contextmanager
def counting(monkeypatch, name):
    calls = []
    original = getattr(latent_attention, name)
    with monkeypatch.context() as patch:
        patch.setattr(latent_attention, name, lambda *args, **kwargs: calls.append(1) or original(*args, **kwargs))
        yield calls


@torch.no_grad()
def decode(model, ids):
    """Logits of the last NEW tokens after CACHED cached ones."""
    cache = model(ids[:, :CACHED], use_cache=True).cache
    return model(ids[:, CACHED:], cache=cache).logits


def by_calling_the_module(model, ids):
    """The same logits from the whole sequence at once with gradients on, where modules are called and not read."""
    return model(ids).logits[:, CACHED:].detach()


# peft unmerges at the first call, after which the weight can be read
EITHER = [lora_merged_then_switched_off]


@pytest.mark.parametrize("wrap", READABLE + OPAQUE + EITHER)
def test_decode_equals_calling_the_module(wrap, monkeypatch):
    model, ids = tiny_model(), random_ids(2, CACHED + NEW)
    plain = by_calling_the_module(model, ids)
    wrap(model)
    with counting(monkeypatch, "absorbed_attention") as absorbed:
        actual = decode(model, ids)
    expected = by_calling_the_module(model, ids)
    assert relative_error(actual, expected) < 1e-5
    if wrap not in EITHER:
        assert bool(absorbed) == (wrap in READABLE)
    if wrap not in (plain_linear, lora_switched_off, lora_merged_then_switched_off, eight_bit):
        assert relative_error(actual, plain) > 1e-2, "the wrapper has no effect, so this test cannot fail"


@pytest.mark.parametrize("wrap", READABLE)
def test_read_linear_returns_the_weight_that_the_module_applies(wrap):
    model = tiny_model()
    wrap(model)
    for _, linear in every_kv_b_proj(model):
        weight, factors = read_linear(linear)
        total = weight + sum((b @ a for b, a in factors), torch.zeros_like(weight))
        torch.testing.assert_close(total.T, linear(torch.eye(linear.in_features)), rtol=1e-5, atol=1e-5)


def test_bfloat16_model_with_float32_adapter_decodes_as_its_module_does():
    model, ids = tiny_model(torch.bfloat16), random_ids(2, CACHED + NEW)
    peft = with_lora(model)
    assert next(p for n, p in peft.named_parameters() if "lora_A" in n).dtype == torch.float32
    expected = by_calling_the_module(model, ids)
    model.set_experts_implementation("eager")  # grouped_mm has no float64
    exact = by_calling_the_module(model.double(), ids)
    model.to(torch.bfloat16)
    assert relative_error(decode(model, ids), exact) < 2 * relative_error(expected, exact) + 2**-7


def test_an_optimizer_step_between_two_generations_takes_effect_at_once():
    model, ids = tiny_model(), random_ids(2, CACHED + NEW)
    peft = with_lora(model)
    before = decode(model, ids)
    optimizer = torch.optim.SGD([p for p in peft.parameters() if p.requires_grad], lr=1.0)
    model(ids, labels=ids).loss.backward()
    optimizer.step()
    after = decode(model, ids)
    assert relative_error(after, before) > 1e-3
    assert relative_error(after, by_calling_the_module(model, ids)) < 1e-5


def test_switching_adapters_between_two_generations_takes_effect_at_once():
    model, ids = tiny_model(), random_ids(2, CACHED + NEW)
    peft = with_lora(model, adapters=("first", "second"))
    for adapter in ("first", "second", "first"):
        peft.set_adapter(adapter)
        assert relative_error(decode(model, ids), by_calling_the_module(model, ids)) < 1e-5


def test_nothing_is_absorbed_while_gradients_are_on(monkeypatch):
    model, ids = tiny_model(), random_ids(2, CACHED + NEW)
    cache = model(ids[:, :CACHED], use_cache=True).cache
    with counting(monkeypatch, "absorbed_attention") as absorbed:
        logits = model(ids[:, CACHED:], cache=cache).logits
    assert not absorbed
    logits.sum().backward()
    assert all(linear.weight.grad.abs().sum() > 0 for _, linear in every_kv_b_proj(model))


def test_active_dropout_inside_an_adapter_is_not_skipped():
    model, ids = tiny_model(), random_ids(2, CACHED + NEW)
    with_lora(model, lora_dropout=0.5)
    with torch.no_grad():
        cache = model(ids[:, :CACHED], use_cache=True).cache
        model.train()
        one, two = (model(ids[:, CACHED:], cache=cache).logits for _ in range(2))
    assert not torch.equal(one, two)


def test_weights_on_the_meta_device_are_not_read():
    assert read_linear(nn.Linear(4, 6, bias=False, device="meta")) is None


def test_offloaded_weights_are_fetched_by_calling_the_module(tmp_path):
    model, ids = tiny_model(), random_ids(2, CACHED + NEW)
    expected = by_calling_the_module(model, ids)
    accelerate.disk_offload(model, tmp_path, execution_device="cpu")
    assert read_linear(model.model.layers[0].self_attn.kv_b_proj) is None
    assert relative_error(decode(model, ids), expected) < 1e-5
