"""Experts in 8 and 4 bits compute what their rounded weights compute, take adapters, and take less memory."""

import copy
import pickle
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from deepseek_latent import lora_config
from deepseek_latent.conversion.calibration import perplexity
from deepseek_latent.conversion.text import split_into_windows
from deepseek_latent.experts.codec import NF4, pack
from deepseek_latent.experts.packed import PackedWeights
from deepseek_latent.finetuning.packing import pack_experts, unpack_experts
from deepseek_latent.kernels import optimize_for_inference
from tests.support import needs_compiler, needs_its_peft, random_ids, relative_error, tiny_model

PYDOC = Path(__file__).parents[2] / "examples" / "pydoc-tiny"
GREEDY = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
WIDTHS = {"hidden_size": 128, "moe_intermediate_size": 64}


def packed(bits: int, dtype=torch.float32, **variant):
    model = tiny_model(dtype, **variant)
    pack_experts(model, bits)
    return model


def rounded(bits: int, dtype=torch.float32, **variant):
    """The model whose stacked weights have the values that packing rounds to."""
    model = packed(bits, dtype, **variant)
    unpack_experts(model)
    return model


def adapted(model, seed: int = 3):
    torch.manual_seed(seed)
    return get_peft_model(model, lora_config(model, r=6, routed_experts=True, init_lora_weights=False))


def test_the_values_of_4_bits_are_those_of_nf4():
    # QLoRA, appendix E
    published = [-1.0, -0.6961928, -0.5250731, -0.3949175, -0.2844414, -0.1847734, -0.0910500, 0.0]
    published += [0.0795803, 0.1609302, 0.2461123, 0.3379152, 0.4407098, 0.5626170, 0.7229568, 1.0]
    torch.testing.assert_close(NF4, torch.tensor(published), rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("bits", [8, 4])
def test_every_element_is_rounded_to_the_nearest_value_of_its_group(bits, dtype):
    torch.manual_seed(0)
    weight = (torch.randn(3, 10, 192) * torch.rand(3, 10, 1)).to(dtype)
    weight[0, 0, :64] = 0
    stored = pack(weight, bits)
    assert stored.codes.shape == (3, 10, 192 if bits == 8 else 96)
    assert stored.scales.shape == (3, 10, 3)
    values = torch.arange(-127, 128).float() if bits == 8 else NF4
    grid = values * stored.scales.float()[..., None]
    groups = weight.float().unflatten(-1, (3, 64))
    nearest = (groups[..., None] - grid[..., None, :]).abs().amin(dim=-1)
    error = (stored.unpacked().float().unflatten(-1, (3, 64)) - groups).abs()
    # a product of a code and a scale is rounded to the dtype
    slack = torch.finfo(dtype).eps * groups.abs().amax(dim=-1, keepdim=True)
    assert (error <= nearest + slack).all()
    assert stored.unpacked()[0, 0, :64].abs().max() == 0


@pytest.mark.parametrize("bits", [8, 4])
def test_the_largest_element_of_a_group_keeps_its_value(bits):
    groups = torch.randn(3, 10, 192).unflatten(-1, (3, 64))
    read = pack(groups.flatten(-2), bits).unpacked().unflatten(-1, (3, 64))
    largest = groups.abs().argmax(dim=-1, keepdim=True)
    # a code of 8 bits has values from -127 to 127, and NF4's least and greatest are -1 and 1
    torch.testing.assert_close(read.gather(-1, largest), groups.gather(-1, largest), rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bits", [8, 4])
@torch.no_grad()
def test_packed_experts_compute_what_their_rounded_weights_compute(bits, dtype):
    ids, model, plain = random_ids(2, 20), packed(bits, dtype), rounded(bits, dtype)
    assert relative_error(model(ids).logits, plain(ids).logits) < (1e-5 if dtype == torch.float32 else 2**-6)
    assert relative_error(model(ids).logits, tiny_model(dtype)(ids).logits) > 1e-3
    if dtype == torch.float32:
        assert torch.equal(model.generate(ids, **GREEDY), plain.generate(ids, **GREEDY))


@pytest.mark.parametrize("bits", [8, 4])
def test_loss_and_gradients_equal_those_of_the_rounded_weights(bits):
    ids = random_ids(3, 30)
    found = []
    for model in (packed(bits), rounded(bits)):
        model = adapted(model).train()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        found.append((loss.item(), {name: x.grad for name, x in model.named_parameters() if x.requires_grad}))
    (loss, gradients), (expected_loss, expected) = found
    assert loss == pytest.approx(expected_loss, rel=1e-6)
    assert gradients.keys() == expected.keys()
    assert sum("experts" in name and "shared" not in name for name in gradients) == 8
    for name, gradient in gradients.items():
        assert relative_error(gradient, expected[name]) < 1e-4, name
        assert gradient.abs().max() > 0, name


@pytest.mark.parametrize(("bits", "fraction"), [(8, 0.52), (4, 0.27)])
def test_packed_experts_take_0_52_or_0_27_of_their_memory_in_bfloat16(bits, fraction):
    model = packed(bits, torch.bfloat16, **WIDTHS)
    before = sum(
        x.numel() * 2 for layer in tiny_model(**WIDTHS).model.layers[1:] for x in layer.mlp.experts.parameters()
    )
    after = 0
    for layer in model.model.layers[1:]:
        tensors = [*layer.mlp.experts.parameters(), *layer.mlp.experts.buffers()]
        after += sum({x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}.values())
    assert after / before == pytest.approx(fraction, abs=0.005)


@pytest.mark.parametrize("bits", [8, 4])
def test_nothing_of_the_size_of_experts_is_kept_for_the_backward_pass(bits):
    model = packed(bits, **WIDTHS).train()
    adapted(model)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        ids = random_ids(2, 10)
        loss = model(ids, labels=ids).loss
    e, _, d = model.model.layers[1].mlp.experts.base_layer.base_layer.gate_up_proj.shape
    floats = [x for x in kept if x.is_floating_point() and x.dim() == 3 and x.shape[0] == e]
    # only factors of adapters and scales are kept, never a weight
    assert max(x.numel() for x in floats) < e * d * 64
    loss.backward()


def test_adapters_train_save_load_and_merge_after_unpacking(tmp_path):
    class Rows(torch.utils.data.Dataset):
        def __len__(self):
            return 32

        def __getitem__(self, index):
            return {"input_ids": random_ids(1, 16, seed=3)[0], "labels": random_ids(1, 16, seed=3)[0]}

    model = prepare_model_for_kbit_training(packed(4, torch.bfloat16))
    model = get_peft_model(model, lora_config(model, r=6, routed_experts=True))
    arguments = TrainingArguments(
        str(tmp_path), max_steps=8, learning_rate=1e-2, report_to="none", save_strategy="no", logging_steps=1
    )
    trainer = Trainer(model, arguments, train_dataset=Rows())
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0] - 0.3
    model.save_pretrained(tmp_path / "adapter")
    ids = random_ids(2, 20)
    with torch.no_grad():
        expected = model.eval()(ids).logits
        again = packed(4, torch.bfloat16)
        # as in training, the weights that are not packed are in float32
        again = PeftModel.from_pretrained(prepare_model_for_kbit_training(again), tmp_path / "adapter").eval()
        assert torch.equal(again(ids).logits, expected)
        unpack_experts(again)
        # in bfloat16, adapters of experts are rounded when they are merged
        assert relative_error(again.merge_and_unload()(ids).logits, expected) < 2**-4


def test_packing_twice_in_other_bits_or_without_experts_and_saving_are_refused(tmp_path):
    with pytest.raises(ValueError, match="packed in 8 or 4 bits, got 2"):
        pack_experts(tiny_model(), 2)
    with pytest.raises(ValueError, match="expected a model with experts"):
        pack_experts(tiny_model(n_routed_experts=None))
    with pytest.raises(
        ValueError, match=r"expected plain routed experts, and they are packed in 8 bits; unpack_experts\(model\)"
    ):
        pack_experts(packed(8), 4)
    with pytest.raises(ValueError, match=r"packed in 4 bits; call unpack_experts\(model\) .* save the adapter alone"):
        packed(4).save_pretrained(tmp_path / "model")
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize("safe_merge", [False, True])
@pytest.mark.parametrize("merge", ["merge_and_unload", "merge_adapter"])
@torch.no_grad()
def test_merging_an_adapter_unpacks_the_experts(merge, safe_merge):
    model, ids = adapted(packed(4)).eval(), random_ids(2, 20)
    expected = model(input_ids=ids).logits
    merged = getattr(model, merge)(safe_merge=safe_merge) or model
    assert relative_error(merged(input_ids=ids).logits, expected) < 1e-5
    unpacked_first = adapted(rounded(4))
    unpacked_first = getattr(unpacked_first, merge)(safe_merge=safe_merge) or unpacked_first
    for name, parameter in unpacked_first.named_parameters():
        torch.testing.assert_close(merged.get_parameter(name), parameter, rtol=0, atol=0)
    if merge == "merge_adapter":
        model.unmerge_adapter()
        assert relative_error(model(input_ids=ids).logits, expected) < 1e-5
        with model.disable_adapter():
            assert relative_error(model(input_ids=ids).logits, rounded(4)(ids).logits) < 1e-5


def test_experts_that_are_merged_copied_or_watched_are_not_packed():
    merged = adapted(tiny_model())
    merged.merge_adapter()
    with pytest.raises(ValueError, match="expected experts without merged adapters; call unmerge_adapter"):
        pack_experts(merged)
    merged.unmerge_adapter()
    pack_experts(merged)
    for name in ("experts", "mlp"):
        copied = get_peft_model(tiny_model(), LoraConfig(target_modules=["o_proj"], modules_to_save=[name]))
        with pytest.raises(ValueError, match="peft trains a copy of them"):
            pack_experts(copied)
    hooked = tiny_model()
    hooked.model.layers[2].mlp.experts.register_forward_hook(lambda *seen: None)
    with pytest.raises(ValueError, match="offloaded or watched by hooks"):
        pack_experts(hooked)
    # nor are those of the layer before
    assert hooked.model.layers[1].mlp.experts.weights.way_back is None


def test_experts_without_values_are_not_packed():
    empty = tiny_model().to("meta")
    with pytest.raises(ValueError, match="expected plain routed experts, and they are sharded, quantized, offloaded"):
        pack_experts(empty)
    assert empty.model.layers[1].mlp.experts.weights.way_back is None


@needs_its_peft
def test_an_adapter_added_by_transformers_is_saved_from_a_packed_model(tmp_path):
    model = packed(4)
    model.add_adapter(lora_config(model, r=6, routed_experts=True, init_lora_weights=False))
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(packed(4), tmp_path)
    ids = random_ids(2, 9)
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)


def test_a_copy_is_packed_and_independent():
    model = packed(4)
    other = copy.deepcopy(model)
    experts = other.model.layers[1].mlp.experts
    assert experts.gate_up_proj.untyped_storage().nbytes() == 1
    assert experts.gate_up_proj is not model.model.layers[1].mlp.experts.gate_up_proj
    ids = random_ids(2, 9)
    with torch.no_grad():
        assert torch.equal(other(ids).logits, model(ids).logits)
        assert torch.equal(pickle.loads(pickle.dumps(other))(ids).logits, model(ids).logits)
        unpack_experts(other)
        assert torch.equal(other(ids).logits, rounded(4)(ids).logits)
    assert isinstance(model.model.layers[1].mlp.experts.weights, PackedWeights)
    assert model.to("meta").model.layers[1].mlp.experts.gate_up_proj.is_meta


@torch.no_grad()
def test_hooks_that_would_leave_adapters_out_are_refused():
    model, ids = adapted(packed(4)).eval(), random_ids(2, 9)
    wrapped = model.base_model.model.model.layers[1].mlp.experts
    for experts in (wrapped, wrapped.get_base_layer()):
        handle = experts.register_forward_hook(lambda *seen: None)
        with pytest.raises(ValueError, match="which hooks on the experts"):
            model(input_ids=ids)
        handle.remove()
        model(input_ids=ids)


@torch.no_grad()
def test_a_state_dict_holds_packed_experts_as_they_are():
    model, other, ids = packed(4), packed(4, seed=5), random_ids(2, 9)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(ids).logits, model(ids).logits)
    unpack_experts(other)
    assert not any(x.requires_grad for layer in other.model.layers[1:] for x in layer.mlp.experts.parameters())


@needs_compiler
@torch.no_grad()
def test_experts_stay_packed_under_kernels_and_casts():
    model, ids = packed(4), random_ids(2, 9)
    expected = model.generate(ids, **GREEDY)
    optimize_for_inference(model)
    assert {type(layer.mlp.experts.weights) for layer in model.model.layers[1:]} == {PackedWeights}
    assert torch.equal(model.generate(ids, **GREEDY), expected)
    moved = packed(4).to(torch.bfloat16)
    assert moved.model.layers[1].mlp.experts.weights.dtype == torch.bfloat16
    assert moved(ids).logits.dtype == torch.bfloat16
    assert moved.model.layers[1].mlp.experts.gate_up_proj.untyped_storage().nbytes() == 1


# rows of whole groups of 64, and rows whose groups have 8 and 32 elements
@needs_compiler
@pytest.mark.parametrize("with_adapter", [False, True])
@pytest.mark.parametrize("widths", [WIDTHS, {}], ids=["groups of 64", "other groups"])
@torch.no_grad()
def test_kernels_multiply_by_experts_in_8_bits_as_torch_does(widths, with_adapter, monkeypatch):
    model, ids = packed(8, **widths), random_ids(2, 9)
    model = adapted(model).eval() if with_adapter else model
    expected, text = model(input_ids=ids).logits, model.generate(input_ids=ids, **GREEDY)
    done = optimize_for_inference(model)
    assert "2 int8 Experts" in repr(done)
    monkeypatch.setattr(PackedWeights, "plain_product", lambda *args: pytest.fail("computed by torch"))
    assert relative_error(model(input_ids=ids).logits, expected) < 1e-5
    assert torch.equal(model.generate(input_ids=ids, **GREEDY), text)
    monkeypatch.undo()
    done.undo()
    assert torch.equal(model(input_ids=ids).logits, expected)


@torch.no_grad()
def test_a_trained_model_keeps_its_perplexity_when_it_is_packed():
    model = AutoModelForCausalLM.from_pretrained(PYDOC, dtype=torch.float32).eval()
    _, windows = split_into_windows(PYDOC, (PYDOC / "held_out.txt").read_text(encoding="utf-8"))
    plain = perplexity(model, windows)
    for bits, max_ratio in ((8, 1.001), (4, 1.02)):
        other = copy.deepcopy(model)
        pack_experts(other, bits)
        assert perplexity(other, windows) / plain < max_ratio
