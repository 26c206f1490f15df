"""Weights in int8 compute what the values do that they were rounded to."""

import copy

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from deepseek_latent import ExpertSelection, LatentCache, train_experts
from deepseek_latent.experts.weights import StackedWeights
from deepseek_latent.kernels import optimize_for_inference
from tests.kernels.support import GREEDY, packed_by_rows
from tests.support import needs_compiler, random_ids, relative_error, tiny_model

pytestmark = needs_compiler


# in bfloat16 without experts: a router near a tie may choose others
@pytest.mark.parametrize(
    ("dtype", "variant"), [(torch.float32, {}), (torch.bfloat16, {"n_routed_experts": None})], ids=str
)
@torch.no_grad()
def test_int8_weights_compute_what_the_rounded_weights_do(dtype, variant):
    model, ids = tiny_model(dtype, **variant), random_ids(2, 9)
    fast, by_hand = copy.deepcopy(model), copy.deepcopy(model).float()
    done = optimize_for_inference(fast, weights="int8")
    assert " int8 Linear" in repr(done)
    assert ("2 int8 Experts" in repr(done)) == (not variant)
    for name, parameter in by_hand.named_parameters():
        if "norm" in name or "gate.weight" in name or "embed" in name or "kv_b_proj" in name:
            continue
        codes, scales = packed_by_rows(parameter)
        assert ((codes * scales - parameter).abs() <= 1.001 * scales / 2).all()
        parameter.copy_(codes * scales)
    exact = copy.deepcopy(model).float()
    for cached in (0, 5):
        past, results = random_ids(2, cached, seed=3), []
        for each in (fast, by_hand, model, exact):
            cache = LatentCache(each.config)
            if cached:
                each(past, cache=cache)
            results.append(each(ids, cache=cache).logits.double())
        if dtype == torch.float32:
            assert relative_error(*results[:2]) < 1e-5
        else:
            assert (results[0] - results[1]).abs().mean() < 2 * (results[2] - results[3]).abs().mean()


def test_int8_weights_take_half_the_memory_and_adapters_act_on_them():
    model = tiny_model(torch.bfloat16, hidden_size=256, moe_intermediate_size=128)
    held = sum(x.nbytes for x in model.parameters())
    untouched = sum(p.nbytes for n, p in model.named_parameters() if "embed" in n or "kv_b" in n or "norm" in n)
    optimize_for_inference(model, weights="int8")
    now = sum(x.untyped_storage().nbytes() for x in (*model.parameters(), *model.buffers()))
    assert now < untouched + 0.53 * (held - untouched)
    ids = random_ids(1, 9)
    before = model.generate(ids, **GREEDY)
    config = LoraConfig(r=3, target_modules=["q_b_proj", "o_proj"], init_lora_weights=False)
    assert not torch.equal(get_peft_model(model, config).generate(input_ids=ids, **GREEDY), before)


@pytest.mark.parametrize("int8_first", [True, False])
def test_adapters_act_on_int8_weights_whichever_comes_first(int8_first, tmp_path):
    config = LoraConfig(r=3, target_modules=["q_b_proj", "kv_b_proj", "o_proj"], init_lora_weights=False)
    ids = random_ids(2, 9)

    def adapted(model):
        torch.manual_seed(1)
        return get_peft_model(model, config).eval()

    with torch.no_grad():
        by_hand = tiny_model()
        optimize_for_inference(by_hand, weights="int8")
        rounded_model = tiny_model()
        rounded_model.load_state_dict(by_hand.state_dict())
        expected = adapted(rounded_model)(input_ids=ids).logits
        model = tiny_model()
        if int8_first:
            optimize_for_inference(model, weights="int8")
        peft_model = adapted(model)
        if not int8_first:
            optimize_for_inference(peft_model, weights="int8")
        assert relative_error(peft_model(input_ids=ids).logits, expected) < 1e-4
        peft_model.save_pretrained(tmp_path)
        bare = tiny_model()
        optimize_for_inference(bare, weights="int8")
        loaded = PeftModel.from_pretrained(bare, tmp_path)
        assert relative_error(loaded(input_ids=ids).logits, expected) < 1e-4


def test_an_int8_model_is_saved_as_what_it_was_rounded_to(tmp_path):
    model, ids = tiny_model(torch.bfloat16), random_ids(1, 80)
    optimize_for_inference(model, weights="int8")
    model.save_pretrained(tmp_path / "model")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    for name, weight in again.state_dict().items():
        assert torch.equal(weight, model.state_dict()[name]), name
        assert weight.isfinite().all()
    # a cache of it carries the fingerprint of the rounded weights
    cache = LatentCache(model.config)
    with torch.no_grad():
        model(ids, cache=cache)
    cache.save(tmp_path / "cache.safetensors", tokens=ids, model=model)
    LatentCache.load(tmp_path / "cache.safetensors", model=model)
    with pytest.raises(ValueError, match="other weights"):
        LatentCache.load(tmp_path / "cache.safetensors", model=tiny_model(torch.bfloat16))


def test_what_int8_weights_cannot_do_is_refused():
    model, ids = tiny_model(), random_ids(1, 4)
    done = optimize_for_inference(model, weights="int8")
    with pytest.raises(ValueError, match=r"int8 weights carry no gradient: .*no_grad\(\), and to train, load"):
        model(ids)
    with pytest.raises(RuntimeError, match="single memory location"):
        model.load_state_dict(tiny_model().state_dict())
    with pytest.raises(ValueError, match=r"cannot be undone; load the model again\.$"):
        done.undo()
    with pytest.raises(ValueError, match=r"weights must be None \(as they are\) or 'int8', got 'int4'"):
        optimize_for_inference(tiny_model(), weights="int4")
    merged = get_peft_model(model, LoraConfig(r=3, target_modules=["o_proj"], init_lora_weights=False)).eval()
    with pytest.raises(ValueError, match="expected a weight to merge into, and this layer's was rounded to int8"):
        merged.merge_adapter()
    model.lm_head.weight.data = model.lm_head.weight.data.clone()
    with torch.no_grad(), pytest.raises(ValueError, match="changed since it was rounded to int8"):
        model(ids)


def test_experts_in_training_are_not_rounded():
    model = tiny_model()
    before = copy.deepcopy(model.state_dict())
    train_experts(model, ExpertSelection({1: [2]}))
    with pytest.raises(ValueError, match=r"they are in training by ESFT; finish_training\(model\) makes them plain"):
        optimize_for_inference(model, weights="int8")
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    assert not any("weight_codes" in name for name, _ in model.named_buffers())


@pytest.mark.parametrize("length", [1, 20])
@torch.no_grad()
def test_lora_acts_on_routed_experts_in_int8_and_merging_unpacks_them(length):
    config = LoraConfig(r=2, target_modules=[], target_parameters=["mlp.experts.down_proj"], init_lora_weights=False)
    ids = random_ids(1, length)

    def adapted(model):
        torch.manual_seed(1)
        return get_peft_model(model, config).eval()

    in_codes, rounded = tiny_model(), tiny_model()
    optimize_for_inference(in_codes, weights="int8")
    rounded.load_state_dict(in_codes.state_dict())
    without = rounded(ids).logits
    in_codes, rounded = adapted(in_codes), adapted(rounded)
    expected = rounded(input_ids=ids).logits
    assert relative_error(expected, without) > 1e-2
    assert relative_error(in_codes(input_ids=ids).logits, expected) < 1e-5
    merged = in_codes.merge_and_unload()
    assert relative_error(merged(ids).logits, expected) < 1e-5
    assert all(type(layer.mlp.experts.weights) is StackedWeights for layer in merged.model.layers[1:])


def test_optimizing_twice_is_optimizing_once_and_int8_may_come_second():
    model, ids = tiny_model(), random_ids(1, 4)
    once = repr(optimize_for_inference(model))
    again = optimize_for_inference(model)
    assert repr(again) == once
    assert repr(optimize_for_inference(model, weights="int8")) == repr(
        optimize_for_inference(tiny_model(), weights="int8")
    )
    assert model.generate(ids, **GREEDY).shape == (1, 16)
    other = tiny_model()
    optimize_for_inference(other)
    optimize_for_inference(other).undo()
    assert [type(module) for module in other.modules()] == [type(module) for module in tiny_model().modules()]


def test_a_tied_head_is_left_to_the_embeddings():
    model = tiny_model(tie_word_embeddings=True)
    optimize_for_inference(model, weights="int8")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.generate(random_ids(1, 3), **GREEDY).shape == (1, 15)
