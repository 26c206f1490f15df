"""Kernels and captured steps inside a model, which only a CUDA device can run. `make gpu` runs these tests."""

import copy
import functools

import peft
import pytest
import torch

from deepseek_latent import LatentCache, lora_config
from deepseek_latent.kernels import optimize_for_inference
from tests.support import LITE, random_ids, relative_error, tiny_model

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")

NEW = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
PADDED = torch.ones(2, 11, dtype=torch.long)
PADDED[0, :4] = 0
DTYPES = {torch.float32: 1e-5, torch.bfloat16: 4e-2}


@functools.cache
def plain(dtype: torch.dtype = torch.float32, lite: bool = False):
    return tiny_model(dtype, **(LITE if lite else {})).cuda()


def optimized(graphs: bool, dtype: torch.dtype = torch.float32, lite: bool = False):
    model = copy.deepcopy(plain(dtype, lite))
    optimize_for_inference(model, graphs=graphs)
    return model


def ids(length: int = 11, batch: int = 2) -> torch.Tensor:
    return random_ids(batch, length).cuda()


@torch.no_grad()
@pytest.mark.parametrize("lite", [False, True], ids=["V2", "Lite"])
@pytest.mark.parametrize("padded", [False, True], ids=["", "padded"])
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_step_of_kernels_gives_the_logits_of_the_modules(dtype, batch, padded, lite):
    sides = plain(dtype, lite), optimized(False, dtype, lite)
    logits = []
    for model in sides:
        cache, outputs = LatentCache(model.config), []
        for first, last in ((0, 11), (11, 12), (12, 15), (15, 16)):
            mask = torch.ones(batch, last, dtype=torch.long, device="cuda")
            if padded:
                mask[0, :4] = 0
            outputs.append(model(ids(16, batch)[:, first:last], cache=cache, attention_mask=mask).logits[:, -1])
        logits.append(torch.stack(outputs))
    assert logits[1].isfinite().all()
    assert relative_error(logits[1], logits[0]) < DTYPES[dtype]


@pytest.mark.parametrize("cache_dtype", [None, "int8", "int6", "int4", "fp8"])
@pytest.mark.parametrize("padded", [False, True], ids=["", "padded"])
def test_replayed_steps_give_the_same_tokens(padded, cache_dtype):
    mask = {"attention_mask": PADDED.cuda()} if padded else {}
    model = optimized(True)
    expected = optimized(False).generate(ids(), **NEW, **mask, cache=LatentCache(model.config, cache_dtype=cache_dtype))
    cache = LatentCache(model.config, cache_dtype=cache_dtype, max_cache_len=40)
    assert torch.equal(model.generate(ids(), **NEW, **mask, cache=cache), expected)
    assert cache.get_seq_length() == 22


def test_graphs_take_a_static_cache_by_themselves_and_sample_alike():
    sampling = NEW | {"do_sample": True, "top_k": 20, "return_dict_in_generate": True}
    outputs = []
    for model in (plain(), optimized(True)):
        torch.manual_seed(3)
        outputs.append(model.generate(ids(), **sampling))
    assert outputs[1].cache.is_static
    assert torch.equal(outputs[0].sequences, outputs[1].sequences)


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"prompt_lookup_num_tokens": 3}, {"use_cache": False}], ids=str)
def test_what_cannot_be_replayed_is_computed(options):
    actual, expected = (model.generate(ids(batch=1), **NEW, **options) for model in (optimized(True), plain()))
    assert torch.equal(actual, expected)


def test_every_call_uses_the_adapters_that_are_active_then():
    model, expected = optimized(True, lite=True), copy.deepcopy(plain(lite=True))
    adapted = [peft.get_peft_model(x, lora_config(x.config, routed_experts=True)).eval() for x in (model, expected)]
    for one in adapted:
        for i, (name, parameter) in enumerate(sorted(one.named_parameters())):
            if "lora_" in name:
                torch.manual_seed(i)
                torch.nn.init.normal_(parameter, std=0.3)
    with_adapter, right = (one.generate(input_ids=ids(), **NEW) for one in adapted)
    assert torch.equal(with_adapter, right)
    with adapted[0].disable_adapter():
        without = adapted[0].generate(input_ids=ids(), **NEW)
    assert torch.equal(without, plain(lite=True).generate(ids(), **NEW))
    assert not torch.equal(without, with_adapter)
    assert torch.equal(adapted[0].generate(input_ids=ids(), **NEW), with_adapter)


@pytest.mark.filterwarnings("error:steps are computed")
def test_adapters_on_routed_experts_are_replayed_in_bfloat16():
    tokens = []
    for graphs in (True, False):
        torch.manual_seed(7)
        model = optimized(graphs, torch.bfloat16, lite=True)
        adapted = peft.get_peft_model(model, lora_config(model.config, routed_experts=True, init_lora_weights=False))
        tokens.append(adapted.eval().generate(input_ids=ids(), **NEW))
    assert torch.equal(*tokens)


def test_undo_gives_the_methods_back():
    model = copy.deepcopy(plain())
    attributes = [{**vars(module)} for module in model.model.modules()]
    done = optimize_for_inference(model, graphs=True)
    assert "3 DecoderLayer" in repr(done)
    assert [vars(module) for module in model.model.modules()] != attributes
    done.undo()
    assert [vars(module) for module in model.model.modules()] == attributes
    assert model.replayed_steps is None


@torch.no_grad()
def test_padding_in_half_precision_leaves_no_trace():
    # without a router, which may choose other experts near a tie
    model = tiny_model(torch.bfloat16, n_routed_experts=None).cuda()
    alone = model(ids()[:1, 4:], use_cache=False).logits
    padded = model(ids(), attention_mask=PADDED.cuda(), use_cache=False).logits
    assert padded.isfinite().all()
    assert relative_error(padded[:1, 4:], alone) < 4e-2


def test_int8_weights_and_other_dtypes_are_refused():
    with pytest.raises(ValueError, match="for models on the CPU"):
        optimize_for_inference(copy.deepcopy(plain()), weights="int8")
    with pytest.raises(ValueError, match=r"torch\.float64"):
        optimize_for_inference(copy.deepcopy(plain()).double())
