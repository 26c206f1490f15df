"""Our class computes the same as transformers' own class on the same weights, and as the paper in float64."""

import pytest
import torch

from deepseek_latent.compat.cache_name import CACHE
from tests import reference
from tests.support import LITE, V2, YARN, native_twin, official_state_dict, random_ids, relative_error, tiny_model

VARIANTS = {
    "V2": V2,
    "Lite": LITE,
    "V2.5, mscale 1.0": V2 | {"rope_scaling": YARN | {"mscale": 1.0, "mscale_all_dim": 1.0}},
    "different mscales": V2 | {"rope_scaling": YARN | {"mscale": 1.0, "mscale_all_dim": 0.5}},
    "YaRN, untruncated": LITE | {"rope_scaling": YARN | {"truncate": False, "original_max_position_embeddings": 50}},
    "no YaRN": LITE | {"rope_scaling": None},
    "linear RoPE": LITE | {"rope_scaling": {"type": "linear", "factor": 4.0}},
    "scaling 16": LITE | {"routed_scaling_factor": 16.0},
    "biases": V2 | {"attention_bias": True},
    "tied embeddings": V2 | {"tie_word_embeddings": True},
    "other eps": V2 | {"rms_norm_eps": 1e-3},
    "wide values": V2 | {"v_head_dim": 40},
    "narrow latent": V2 | {"kv_lora_rank": 16},
}
# here transformers' own class differs from the release (docs/paper-and-release.md), so only the paper is compared
BEYOND_NATIVE = {
    "normalized gate values": V2 | {"norm_topk_prob": True},
    "every second layer": V2 | {"moe_layer_freq": 2, "num_hidden_layers": 4},
    "dense": V2 | {"n_routed_experts": None, "n_shared_experts": None, "num_experts_per_tok": None},
    "no shared experts": V2 | {"n_shared_experts": None},
    "only one mscale given": V2 | {"rope_scaling": {k: v for k, v in YARN.items() if k != "mscale_all_dim"}},
}
OTHER_ROPE = ("linear RoPE", "YaRN, untruncated")
# the other RoPE types are transformers' own code
IN_THE_PAPER = {name: VARIANTS[name] for name in VARIANTS if name not in OTHER_ROPE} | BEYOND_NATIVE


def decode_token_by_token(model, ids):
    """The logits of every position when each token is fed alone."""
    cache, logits = None, []
    for token in ids.split(1, dim=1):
        output = model(token, use_cache=True, **{CACHE: cache})
        cache = output[CACHE]
        logits.append(output.logits)
    return torch.cat(logits, dim=1)


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_logits_and_64_greedy_tokens_equal_native(variant):
    model, ids = tiny_model(**VARIANTS[variant]), random_ids(2, 19)
    native = native_twin(model)
    assert relative_error(model(ids).logits, native(ids).logits) < 1e-5
    options = {"max_new_tokens": 64, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    assert torch.equal(model.generate(ids, **options), native.generate(ids, **options))


@pytest.mark.parametrize("variant", IN_THE_PAPER)
@torch.no_grad()
def test_both_paths_equal_the_paper_through_the_whole_model(variant):
    model, ids = tiny_model(**IN_THE_PAPER[variant]), random_ids(1, 9)
    exact = reference.logits(model.config, official_state_dict(model), ids)
    assert relative_error(model(ids).logits, exact) < 1e-5
    assert relative_error(decode_token_by_token(model, ids), exact) < 1e-5


@torch.no_grad()
def test_in_bfloat16_both_paths_are_as_close_to_the_paper_as_native():
    # the model is dense, since in this precision a router near a tie may choose another expert
    model, ids = tiny_model(torch.bfloat16, n_routed_experts=None, n_shared_experts=None), random_ids(4, 24)
    exact = reference.logits(model.config, official_state_dict(model), ids)
    # native has no dense model, so the yardstick is our class with eager attention, which computes as native does
    model.set_attn_implementation("eager")
    yardstick = relative_error(model(ids, output_attentions=True).logits, exact)
    model.set_attn_implementation("sdpa")
    assert relative_error(model(ids).logits, exact) < 1.5 * yardstick
    assert relative_error(decode_token_by_token(model, ids), exact) < 1.5 * yardstick


def test_loss_and_gradients_equal_native():
    model, ids = tiny_model(), random_ids(2, 19)
    native = native_twin(model)
    ours, theirs = model(ids, labels=ids), native(ids, labels=ids)
    assert relative_error(ours.loss, theirs.loss) < 1e-6
    ours.loss.backward()
    theirs.loss.backward()
    gradients = dict(native.named_parameters())
    for name, parameter in model.named_parameters():
        assert relative_error(parameter.grad, gradients[name].grad) < 1e-4, name


@torch.no_grad()
def test_cached_latents_can_be_exchanged_with_native_ones():
    model, ids = tiny_model(), random_ids(2, 12)
    native = native_twin(model)
    cache, their_cache = (native(ids[:, :8], use_cache=True)[CACHE] for _ in range(2))
    theirs = native(ids[:, 8:], **{CACHE: their_cache}).logits
    assert relative_error(model(ids[:, 8:], cache=cache).logits, theirs) < 1e-5


def test_parallel_plans_equal_native_ones_but_for_gradients_of_what_processes_share():
    model = tiny_model()
    native = native_twin(model)
    differs = {"self_attn", "kv_a_proj_with_mqa", "mlp"}
    ours, theirs = (
        {name: style for name, style in plan.items() if name.rpartition(".")[2] not in differs}
        for plan in (model._tp_plan, native._tp_plan)
    )
    assert ours == theirs
    assert len(model._tp_plan) == len(ours) + 2
    assert model._ep_plan == native._ep_plan
    assert model._pp_plan == native._pp_plan
    assert type(model)._fsdp_plan == type(native)._fsdp_plan
