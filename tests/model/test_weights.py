"""Checkpoints load from official files and save to them again."""

import copy
import json
import shutil

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedModel,
)

from deepseek_latent import (
    DeepseekV2Config,
    DeepseekV2ForCausalLM,
    DeepseekV2ForSequenceClassification,
    DeepseekV2Model,
)
from deepseek_latent.commands.__main__ import main
from tests.model.official_checkpoints import (
    CLASSES,
    assert_same_tensors,
    every_class,
    every_dtype,
    every_variant,
    files_of,
    logits_of,
    official_tensors,
    write_checkpoint,
)
from tests.support import LITE, NATIVE, V2, official_state_dict, random_ids, relative_error, tiny_model


@every_class
@every_variant
def test_official_checkpoint_loads_completely(fields, auto_class, tmp_path):
    config = DeepseekV2Config(**fields)
    tensors = official_tensors(config, torch.float32)
    folder = write_checkpoint(tmp_path, config, tensors)
    model, info = auto_class.from_pretrained(folder, output_loading_info=True)
    new, left_over = CLASSES[auto_class]
    assert (info["missing_keys"], info["unexpected_keys"], info["mismatched_keys"]) == (new, left_over, set())
    assert type(model).__module__.startswith("deepseek_latent")
    backbone = model.base_model.state_dict()
    assert torch.equal(
        backbone["layers.0.self_attn.kv_b_proj.weight"], tensors["model.layers.0.self_attn.kv_b_proj.weight"]
    )
    moe_layers = [layer for layer in range(config.num_hidden_layers) if config.is_moe_layer(layer)]
    for layer, expert in [(layer, expert) for layer in moe_layers for expert in (0, 2, 11)]:
        ff, f = f"layers.{layer}.mlp.experts", config.moe_intermediate_size
        gate, up, down = (tensors[f"model.{ff}.{expert}.{x}_proj.weight"] for x in ("gate", "up", "down"))
        assert torch.equal(backbone[f"{ff}.gate_up_proj"][expert, :f], gate)
        assert torch.equal(backbone[f"{ff}.gate_up_proj"][expert, f:], up)
        assert torch.equal(backbone[f"{ff}.down_proj"][expert], down)


@pytest.mark.parametrize("shard_size", [None, "40KB"], ids=["one file", "sharded"])
@every_dtype
@every_variant
def test_saving_writes_the_official_files_again(fields, dtype, shard_size, tmp_path):
    config = DeepseekV2Config(**fields)
    tensors = official_tensors(config, dtype)
    write_checkpoint(tmp_path / "official", config, tensors)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "official", dtype="auto")
    model.save_pretrained(tmp_path / "saved", **({} if shard_size is None else {"max_shard_size": shard_size}))
    assert_same_tensors(files_of(tmp_path / "saved"), tensors)
    index = tmp_path / "saved/model.safetensors.index.json"
    assert index.exists() == (shard_size is not None)
    if shard_size is not None:
        weight_map = json.loads(index.read_text())["weight_map"]
        assert weight_map.keys() == tensors.keys()
        assert len(set(weight_map.values())) > 3
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype="auto")
        assert torch.equal(logits_of(again), logits_of(model))


def test_model_that_was_never_loaded_saves_official_names(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path)
    assert files_of(tmp_path).keys() == official_tensors(model.config, torch.float32).keys()


@pytest.mark.parametrize(
    ("model_class", "new"),
    [(DeepseekV2Model, set()), (DeepseekV2ForSequenceClassification, {"score.weight"})],
)
def test_backbone_saved_alone_loads_into_every_class_that_may_have_a_new_head(model_class, new, tmp_path):
    whole = tiny_model()
    whole.model.save_pretrained(tmp_path)
    model, info = model_class.from_pretrained(tmp_path, output_loading_info=True)
    assert info["missing_keys"] == new
    assert not info["unexpected_keys"]
    ids = random_ids(1, 7)
    assert torch.equal(model.base_model(ids).last_hidden_state, whole.model(ids).last_hidden_state)


@pytest.mark.parametrize(
    "auto_class", [AutoModelForSequenceClassification, AutoModelForTokenClassification], ids=lambda c: c.__name__
)
def test_classifier_saves_and_loads_itself(auto_class, checkpoint, tmp_path):
    model = auto_class.from_pretrained(checkpoint(), num_labels=5)
    model.save_pretrained(tmp_path / "saved")
    again, info = auto_class.from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert torch.equal(again.eval()(random_ids(1, 7)).logits, model.eval()(random_ids(1, 7)).logits)


# transformers' own class


NATIVE_VARIANTS = {"V2": V2, "Lite": LITE}


@pytest.mark.parametrize("fields", NATIVE_VARIANTS.values(), ids=NATIVE_VARIANTS.keys())
def test_transformers_own_class_opens_what_we_save(fields, tmp_path):
    model = tiny_model(**fields)
    model.save_pretrained(tmp_path)
    native, info = NATIVE.DeepseekV2ForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert type(native).__module__.startswith("transformers.")
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert relative_error(logits_of(model), logits_of(native)) < 1e-5


@pytest.mark.parametrize("fields", NATIVE_VARIANTS.values(), ids=NATIVE_VARIANTS.keys())
def test_we_open_what_transformers_own_class_saves(fields, tmp_path):
    fields = fields | {"rope_scaling": V2["rope_scaling"] | {"rope_type": "yarn"}}
    native = NATIVE.DeepseekV2ForCausalLM(NATIVE.DeepseekV2Config(**copy.deepcopy(fields)))
    native.save_pretrained(tmp_path)
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert type(model) is DeepseekV2ForCausalLM
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert relative_error(logits_of(model), logits_of(native)) < 1e-5


def test_tied_embeddings_are_stored_once(tmp_path):
    model = tiny_model(tie_word_embeddings=True)
    model.save_pretrained(tmp_path)
    assert "lm_head.weight" not in files_of(tmp_path)
    again, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert again.lm_head.weight is again.model.embed_tokens.weight
    assert torch.equal(logits_of(again), logits_of(model))


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("size", [104, 80])
def test_resized_embeddings_are_saved_and_loaded(size, tied, tmp_path):
    model = tiny_model(tie_word_embeddings=tied)
    old = model.model.embed_tokens.weight.detach().clone()
    model.resize_token_embeddings(size)
    model.save_pretrained(tmp_path)
    again, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert again.config.vocab_size == size
    assert again.lm_head.weight.shape == again.model.embed_tokens.weight.shape == (size, 72)
    kept = min(size, len(old))
    assert torch.equal(again.model.embed_tokens.weight[:kept], old[:kept])
    ids = random_ids(1, 6) % kept
    assert torch.equal(again(ids).logits, model(ids).logits)


def test_the_hub_is_written_by_transformers_own_methods(tmp_path):
    # ours only adds a check for weights that no file can hold
    assert DeepseekV2ForCausalLM.save_pretrained.__wrapped__ is PreTrainedModel.save_pretrained
    for name in ("push_to_hub", "from_pretrained"):
        assert name not in {
            key for cls in DeepseekV2ForCausalLM.__mro__ if "deepseek" in cls.__module__ for key in vars(cls)
        }
        assert callable(getattr(DeepseekV2ForCausalLM, name))


def test_a_saved_folder_loads_after_it_is_moved(checkpoint, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(checkpoint())
    model.save_pretrained(tmp_path / "saved")
    shutil.copytree(tmp_path / "saved", tmp_path / "moved")
    shutil.rmtree(tmp_path / "checkpoint")
    shutil.rmtree(tmp_path / "saved")
    assert torch.equal(logits_of(AutoModelForCausalLM.from_pretrained(tmp_path / "moved")), logits_of(model))


@pytest.mark.parametrize("strict", [True, False])
def test_load_state_dict_takes_the_names_in_files(strict):
    source, target = tiny_model(), tiny_model(seed=5)
    target.load_state_dict(official_state_dict(source), strict=strict)
    for (name, ours), theirs in zip(target.named_parameters(), source.parameters()):
        assert torch.equal(ours, theirs), name


def test_load_state_dict_takes_one_shard_after_another():
    source, target = tiny_model(), tiny_model(seed=5)
    tensors = list(official_state_dict(source).items())
    for shard in (tensors[:20], tensors[20:50], tensors[50:]):
        target.load_state_dict(dict(shard), strict=False)
    for (name, ours), theirs in zip(target.named_parameters(), source.parameters()):
        assert torch.equal(ours, theirs), name


def routers(model) -> list[torch.Tensor]:
    return [parameter for name, parameter in model.named_parameters() if name.endswith("mlp.gate.weight")]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_router_in_float32_keeps_its_dtype_through_loading_and_saving(dtype, tmp_path):
    """transformers 5.24 trains routers in float32; rounded to 16 bits, they would choose other experts."""
    model = tiny_model(dtype)
    for weight in routers(model):
        weight.data = weight.data.float() + 1e-4
    model.save_pretrained(tmp_path / "first")
    DeepseekV2ForCausalLM.from_pretrained(tmp_path / "first", dtype=dtype).save_pretrained(tmp_path / "second")
    again = DeepseekV2ForCausalLM.from_pretrained(tmp_path / "second", dtype="auto").eval()
    assert {weight.dtype for weight in routers(again)} == {torch.float32}
    assert {x.dtype for x in again.parameters()} == {torch.float32, dtype}
    assert all(torch.equal(one, other) for one, other in zip(routers(again), routers(model)))
    ids = random_ids(2, 9)
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)


def test_a_router_in_bfloat16_is_computed_and_saved_unchanged(tmp_path):
    model, ids = tiny_model(torch.bfloat16), random_ids(2, 9)
    model.save_pretrained(tmp_path)
    again = DeepseekV2ForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    assert {x.dtype for x in again.parameters()} == {torch.bfloat16}
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)
    wide = DeepseekV2ForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert {x.dtype for x in wide.parameters()} == {torch.float32}


def test_inspect_accepts_a_router_in_float32(tmp_path, capsys):
    model = tiny_model(torch.bfloat16)
    for weight in routers(model):
        weight.data = weight.data.float()
    model.save_pretrained(tmp_path)
    assert main(["inspect", str(tmp_path)]) == 0, capsys.readouterr().out
