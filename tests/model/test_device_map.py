"""Models that accelerate spread over devices (`device_map`): every layer has hooks, and does what it does without."""

import pytest
import torch
from accelerate import dispatch_model
from peft import get_peft_model
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, StaticCache

from deepseek_latent import LatentCache, lora_config
from deepseek_latent.finetuning.esft import finish_training, train_experts
from deepseek_latent.finetuning.expert_selection import ExpertSelection
from deepseek_latent.finetuning.packing import pack_experts
from deepseek_latent.kernels import optimize_for_inference
from tests.support import needs_compiler, random_ids, relative_error, tiny_model

CACHED = 300
IDS = random_ids(2, CACHED + 1)
GREEDY = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
CACHES = {
    "none": lambda config: LatentCache(config),
    "6 bits": lambda config: LatentCache(config, bits=6),
    "static": lambda config: StaticCache(config, max_cache_len=CACHED + 8),
}
EVERY_CACHE = pytest.mark.parametrize("make", CACHES.values(), ids=CACHES)


def with_hooks(folder, tmp_path):
    """All layers stay where they are, as on a machine whose devices hold the whole model."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    return dispatch_model(model, dict.fromkeys(("model", "lm_head"), "cpu"), force_hooks=True)


def partly_on_disk(folder, tmp_path):
    """The first layer is resident, the two others come from disk at each call."""
    places = dict.fromkeys(("model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb", "lm_head"), "cpu")
    places |= {"model.layers.1": "disk", "model.layers.2": "disk"}
    return AutoModelForCausalLM.from_pretrained(folder, device_map=places, offload_folder=tmp_path / "offloaded")


PLACES = pytest.mark.parametrize("place", [with_hooks, partly_on_disk])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    tiny_model(max_position_embeddings=512).save_pretrained(folder)
    return folder


def decoded(model, make) -> tuple[torch.Tensor, int]:
    """Logits of one token behind many, and the floating-point operations that it took."""
    cache = make(model.config)
    with torch.no_grad():
        model(IDS[:, :-1], cache=cache)
        with FlopCounterMode(display=False) as counter:
            logits = model(IDS[:, -1:], cache=cache).logits
    return logits, counter.get_total_flops()


@PLACES
@EVERY_CACHE
def test_a_token_costs_what_it_costs_without_hooks(place, make, folder, tmp_path):
    expected, flops = decoded(AutoModelForCausalLM.from_pretrained(folder), make)
    logits, flops_there = decoded(place(folder, tmp_path), make)
    assert flops_there <= 1.1 * flops
    assert relative_error(logits, expected) <= 1e-6


@PLACES
@pytest.mark.parametrize("options", [{}, {"cache_implementation": "static"}, {"num_beams": 2}], ids=str)
def test_the_same_tokens_are_written(place, options, folder, tmp_path):
    expected = AutoModelForCausalLM.from_pretrained(folder).generate(IDS[:, :20], **GREEDY, **options)
    assert torch.equal(place(folder, tmp_path).generate(IDS[:, :20], **GREEDY, **options), expected)


def test_offloaded_weights_are_gone_again_between_two_tokens(folder, tmp_path):
    model = partly_on_disk(folder, tmp_path)
    decoded(model, CACHES["none"])
    assert [layer.self_attn.kv_b_proj.weight.is_meta for layer in model.model.layers] == [False, True, True]


@PLACES
def test_adapters_act_on_every_layer(place, folder, tmp_path):
    def adapted(model):
        torch.manual_seed(5)
        config = lora_config(model, r=6, routed_experts=True, init_lora_weights=False)
        return get_peft_model(model, config).eval()

    plain = AutoModelForCausalLM.from_pretrained(folder)
    before, _ = decoded(plain, CACHES["none"])
    expected, _ = decoded(adapted(plain), CACHES["none"])
    logits, _ = decoded(adapted(place(folder, tmp_path)), CACHES["none"])
    assert relative_error(logits, expected) <= 1e-6
    assert relative_error(expected, before) > 1e-2


def test_experts_pack_and_train_where_hooks_move_nothing(folder, tmp_path):
    model, plain = with_hooks(folder, tmp_path), AutoModelForCausalLM.from_pretrained(folder)
    for each in (model, plain):
        pack_experts(each, bits=8)
    assert relative_error(model(IDS).logits, plain(IDS).logits) <= 1e-6
    model, plain = with_hooks(folder, tmp_path), AutoModelForCausalLM.from_pretrained(folder)
    for each in (model, plain):
        train_experts(each, ExpertSelection({1: [2, 3], 2: [0]}))
        each(IDS, labels=IDS).loss.backward()
        experts = each.model.layers[1].mlp.experts
        experts.trained_down_proj.data -= experts.trained_down_proj.grad
    finish_training(model)
    finish_training(plain)
    assert relative_error(model(IDS).logits, plain(IDS).logits) <= 1e-6


@needs_compiler
@pytest.mark.parametrize("weights", [None, "int8"])
def test_operators_compute_under_hooks_that_move_nothing(weights, folder, tmp_path):
    model, plain = with_hooks(folder, tmp_path), AutoModelForCausalLM.from_pretrained(folder)
    for each in (model, plain):
        optimize_for_inference(each, weights)
    expected, _ = decoded(plain, CACHES["none"])
    logits, _ = decoded(model, CACHES["none"])
    assert relative_error(logits, expected) <= 1e-6


@needs_compiler
def test_int8_is_refused_where_weights_are_elsewhere(folder, tmp_path):
    model = partly_on_disk(folder, tmp_path)
    with pytest.raises(ValueError, match=r"model\.layers\.1.*on disk"):
        optimize_for_inference(model, "int8")
    assert (
        relative_error(
            decoded(model, CACHES["none"])[0], decoded(AutoModelForCausalLM.from_pretrained(folder), CACHES["none"])[0]
        )
        <= 1e-6
    )
