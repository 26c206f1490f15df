"""The fingerprint of a model changes with everything that its cache depends on, and with nothing else."""

import os
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch.testing._internal.two_tensor import TwoTensor
from transformers import PreTrainedConfig

from deepseek_latent import DeepseekV2Config, DeepseekV2ForCausalLM
from deepseek_latent.cache.fingerprint import fingerprint
from tests.support import V2, tiny_model

# changes that must not change it


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_model_and_its_reload_have_the_same_fingerprint(dtype, tied, tmp_path):
    model = tiny_model(dtype, tie_word_embeddings=tied)
    before = fingerprint(model)
    model.save_pretrained(tmp_path)
    assert fingerprint(DeepseekV2ForCausalLM.from_pretrained(tmp_path, dtype=dtype)) == before == fingerprint(model)


def test_the_fingerprint_is_the_same_in_another_process():
    program = "from tests.support import tiny_model; from deepseek_latent.cache.fingerprint import fingerprint as f"
    done = subprocess.run(
        [sys.executable, "-c", f"{program}; print(f(tiny_model()))"],
        cwd=Path(__file__).parents[2],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    assert done.stdout.split()[-1] == fingerprint(tiny_model())


def test_tied_and_untied_models_with_equal_weights_have_the_same_fingerprint():
    untied, tied = tiny_model(), tiny_model(tie_word_embeddings=True)
    untied.load_state_dict(tied.state_dict())
    assert fingerprint(untied) == fingerprint(tied)


def test_settings_that_no_cached_number_depends_on_do_not_change_the_fingerprint():
    model = tiny_model()
    before = fingerprint(model)
    model.set_attn_implementation("eager")
    model.config.name_or_path = "elsewhere"
    model.config.problem_type = "regression"
    model.generation_config.temperature = 0.1
    model.train()
    # not persistent, since it is computed from the configuration
    model.model.rotary_emb.inv_freq.mul_(2)
    assert fingerprint(model) == before


# changes that must change it

NEUTRAL = {
    "attention_dropout",
    "aux_loss_alpha",
    "bos_token_id",
    "classifier_dropout",
    "eos_token_id",
    "ep_size",
    "initializer_range",
    "output_router_logits",
    "pad_token_id",
    "pretraining_tp",
    "seq_aux",
    "tie_word_embeddings",
    "use_cache",
}
GENERIC = {field.name for field in fields(PreTrainedConfig)}
OWN_FIELDS = [field.name for field in fields(DeepseekV2Config) if field.name not in GENERIC]


@pytest.mark.parametrize("name", OWN_FIELDS)
def test_a_config_field_enters_the_fingerprint_unless_no_cached_number_depends_on_it(name):
    model = torch.nn.Linear(1, 1)
    # a stand-in, since no field of a valid configuration can take every value
    values = dict.fromkeys(OWN_FIELDS, 1)
    model.config = type("Config", (), {"to_dict": lambda self: values})()
    before = fingerprint(model)
    values[name] = 2
    assert (fingerprint(model) == before) == (name in NEUTRAL)


def negate(weight):
    weight.neg_()


def swap_experts(weight):
    weight[[2, 5]] = weight[[5, 2]]


def flip_one_bit(weight):
    weight.view(-1).view(torch.uint8)[-1] ^= 1


def permute_rows(weight):
    weight.copy_(weight.flip(-2))


def permute_columns(weight):
    weight.copy_(weight.roll(1, dims=-1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("change", [negate, swap_experts, flip_one_bit, permute_rows, permute_columns])
def test_a_changed_weight_changes_the_fingerprint(change, dtype):
    model = tiny_model(dtype)
    before = fingerprint(model)
    with torch.no_grad():
        change(model.model.layers[1].mlp.experts.gate_up_proj.data)
    assert fingerprint(model) != before


def test_every_weight_enters_the_fingerprint():
    model = tiny_model()
    seen = {fingerprint(model)}
    for parameter in model.parameters():
        parameter.data.view(-1)[-1] += 1
        seen.add(fingerprint(model))
    assert len(seen) == 1 + len(list(model.parameters()))


def test_another_dtype_changes_the_fingerprint():
    assert fingerprint(tiny_model().half()) != fingerprint(tiny_model().bfloat16())


def test_other_rope_scaling_changes_the_fingerprint():
    other = V2["rope_scaling"] | {"factor": 8.0}
    assert fingerprint(tiny_model(rope_scaling=other)) != fingerprint(tiny_model())


def test_a_persistent_buffer_enters_the_fingerprint():
    model = tiny_model()
    model.register_buffer("bias", torch.zeros(3))
    before = fingerprint(model)
    model.bias[1] = 1
    assert fingerprint(model) != before


def test_weights_on_the_meta_device_are_refused():
    with pytest.raises(ValueError, match=r"model\.embed_tokens\.weight is on the meta device; load it"):
        fingerprint(tiny_model().to("meta"))


def test_a_sharded_weight_has_the_fingerprint_of_the_whole_weight():
    from torch.distributed.tensor import DeviceMesh, Shard, distribute_tensor

    model = tiny_model()
    before = fingerprint(model)
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        mesh = DeviceMesh("cpu", [0])
        model.lm_head.weight = torch.nn.Parameter(distribute_tensor(model.lm_head.weight.data, mesh, [Shard(0)]))
        assert fingerprint(model) == before
    finally:
        torch.distributed.destroy_process_group()


def test_a_tensor_subclass_enters_the_fingerprint_by_its_inner_tensors():
    def made_of(scale):
        model = tiny_model()
        model.lm_head.weight = torch.nn.Parameter(TwoTensor(torch.ones(4), torch.full((4,), scale)))
        return fingerprint(model)

    assert made_of(2.0) == made_of(2.0)
    assert made_of(2.0) != made_of(3.0)


# adapters


@pytest.fixture
def adapted():
    torch.manual_seed(1)
    config = LoraConfig(r=4, target_modules=["q_b_proj", "kv_b_proj"], init_lora_weights=False)
    return get_peft_model(tiny_model(), config).eval()


def scaled(model: torch.nn.Module, factor: float) -> None:
    for layer in model.modules():
        if isinstance(layer, LoraLayer):
            layer.scaling["default"] *= factor


def test_an_adapter_changes_the_fingerprint_whether_active_merged_disabled_or_rescaled(adapted):
    seen = [fingerprint(tiny_model()), fingerprint(adapted)]
    with adapted.disable_adapter():
        seen.append(fingerprint(adapted))
    scaled(adapted, 2.0)
    seen.append(fingerprint(adapted))
    scaled(adapted, 0.5)
    adapted.merge_adapter()
    seen.append(fingerprint(adapted))
    adapted.unmerge_adapter()
    assert len(set(seen)) == len(seen)


def test_a_second_adapter_changes_the_fingerprint_when_it_becomes_active(adapted):
    torch.manual_seed(2)
    adapted.add_adapter("second", LoraConfig(r=2, target_modules=["q_b_proj"], init_lora_weights=False))
    first = fingerprint(adapted)
    adapted.set_adapter("second")
    assert fingerprint(adapted) != first
    adapted.set_adapter("default")
    assert fingerprint(adapted) == first
    adapted.delete_adapter("second")


def test_a_reloaded_adapter_has_the_fingerprint_of_the_saved_one(adapted, tmp_path):
    adapted.save_pretrained(tmp_path)
    assert fingerprint(PeftModel.from_pretrained(tiny_model(), tmp_path)) == fingerprint(adapted)
