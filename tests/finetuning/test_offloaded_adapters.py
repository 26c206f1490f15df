"""LoRA on a model with layers on disk gives the results of the model in memory, or is refused with an error."""

import pytest
import torch
from accelerate import disk_offload
from peft import LoraConfig, PeftModel, get_peft_model

from deepseek_latent import DeepseekV2ForCausalLM, lora_config
from tests.support import random_ids, relative_error, tiny_model

IDS = random_ids(2, 9)
# decoding reads the weight of kv_b_proj, and calls all other modules
KINDS = {
    "linear layers": {},
    "kv_b_proj alone": {"target_modules": ["kv_b_proj"]},
    "experts": {"routed_experts": True, "target_modules": []},
    "one parameter of experts": {"target_parameters": ["experts.gate_up_proj"], "target_modules": []},
    "all": {"routed_experts": True},
}
each_kind = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    tiny_model().save_pretrained(path)
    return path


def on_disk(folder, tmp_path, **options):
    """Layer 0 in memory, 1 and 2 on disk."""
    places = {f"model.layers.{i}": "disk" if i else "cpu" for i in range(3)}
    places |= dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"), "cpu")
    return DeepseekV2ForCausalLM.from_pretrained(
        folder, device_map=places, offload_folder=tmp_path / "offloaded", **options
    ).eval()


def in_memory(folder):
    return DeepseekV2ForCausalLM.from_pretrained(folder).eval()


def adapted(model, kind: str):
    torch.manual_seed(5)
    return get_peft_model(model, lora_config(model, r=9, init_lora_weights=False, **KINDS[kind])).eval()


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


@each_kind
def test_an_adapter_created_on_layers_on_disk_acts_as_in_memory(folder, tmp_path, kind):
    expected = logits(adapted(in_memory(folder), kind))
    assert relative_error(expected, logits(in_memory(folder))) > 1e-1
    assert relative_error(logits(adapted(on_disk(folder, tmp_path), kind)), expected) < 1e-5


@each_kind
def test_an_adapter_that_transformers_loads_on_layers_on_disk_acts_as_in_memory(folder, tmp_path, kind):
    made = adapted(in_memory(folder), kind)
    made.save_pretrained(tmp_path / "adapter")
    model = on_disk(folder, tmp_path)
    placed = dict(model.hf_device_map)
    model.load_adapter(str(tmp_path / "adapter"))
    assert relative_error(logits(model.eval()), logits(made)) < 1e-5
    assert model.hf_device_map == placed


@pytest.mark.parametrize("implementation", ["eager", "batched_mm"])
def test_adapters_on_experts_on_disk_act_under_every_experts_implementation(folder, tmp_path, implementation):
    model = on_disk(folder, tmp_path)
    model.set_experts_implementation(implementation)
    assert relative_error(logits(adapted(model, "all")), logits(adapted(in_memory(folder), "all"))) < 1e-5


def test_gradients_through_layers_on_disk_equal_those_in_memory(folder, tmp_path):
    models = [adapted(model, "all").train() for model in (in_memory(folder), on_disk(folder, tmp_path))]
    gradients = []
    for model in models:
        model(input_ids=IDS, labels=IDS).loss.backward()
        gradients.append({name: x.grad for name, x in model.named_parameters() if x.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    assert all(relative_error(gradients[1][name], gradient) < 1e-5 for name, gradient in gradients[0].items())


@each_kind
def test_weights_on_disk_keep_a_merged_adapter(folder, tmp_path, kind):
    expected = logits(adapted(in_memory(folder), kind))
    model = adapted(on_disk(folder, tmp_path), kind)
    model.merge_adapter()
    assert relative_error(logits(model), expected) < 1e-5
    model.unmerge_adapter()
    merged = model.merge_and_unload()
    assert relative_error(logits(merged), expected) < 1e-5
    merged.save_pretrained(tmp_path / "merged")
    assert relative_error(logits(in_memory(tmp_path / "merged")), expected) < 1e-5


def test_disabling_merged_adapters_of_experts_on_disk_is_refused(folder, tmp_path):
    model = adapted(on_disk(folder, tmp_path), "all")
    model.merge_adapter()
    with model.disable_adapter(), pytest.raises(ValueError, match=r"offloaded (routed experts|layer)"):
        logits(model)


@each_kind
def test_an_adapter_that_peft_loads_on_layers_on_disk_acts_as_in_memory(folder, tmp_path, kind):
    made = adapted(in_memory(folder), kind)
    made.save_pretrained(tmp_path / "adapter")
    model = on_disk(folder, tmp_path)
    placed = dict(model.hf_device_map)
    loaded = PeftModel.from_pretrained(model, tmp_path / "adapter").eval()
    assert relative_error(logits(loaded), logits(made)) < 1e-5
    assert model.hf_device_map == placed
    for name in ("second", "default"):
        loaded.load_adapter(tmp_path / "adapter", name)
        loaded.set_adapter(name)
        assert relative_error(logits(loaded.eval()), logits(made)) < 1e-5
    merged = loaded.merge_and_unload()
    assert relative_error(logits(merged), logits(made)) < 1e-5


@pytest.mark.parametrize("options", [{"use_dora": True}, {"init_lora_weights": "pissa"}])
def test_adapters_that_read_weights_are_refused_on_layers_on_disk(folder, tmp_path, options):
    with pytest.raises(ValueError, match="load the model with a device_map that offloads none"):
        get_peft_model(on_disk(folder, tmp_path), LoraConfig(target_modules=["q_b_proj"], **options))


def test_modules_to_save_are_refused_on_disk_and_trained_in_memory(folder, tmp_path):
    config = {"target_modules": ["q_b_proj"], "modules_to_save": ["down_proj"]}
    with pytest.raises(ValueError, match=r"modules_to_save that are in memory, and model\.layers\.1\..*down_proj is"):
        get_peft_model(on_disk(folder, tmp_path), LoraConfig(**config))
    model = get_peft_model(on_disk(folder, tmp_path), LoraConfig(**config | {"modules_to_save": ["lm_head"]}))
    model.train()(input_ids=IDS, labels=IDS).loss.backward()
    assert all(x.grad is not None for name, x in model.named_parameters() if "modules_to_save" in name)


def test_disabling_a_merged_adapter_on_disk_is_refused_and_leaves_it_merged(folder, tmp_path):
    """peft would unmerge it at the next call, before the weight is loaded from disk."""
    expected = logits(adapted(in_memory(folder), "linear layers"))
    model = adapted(on_disk(folder, tmp_path), "linear layers")
    model.merge_adapter()
    with model.disable_adapter(), pytest.raises(ValueError, match="use the methods of peft's model"):
        logits(model)
    assert relative_error(logits(model), expected) < 1e-5
    model.unmerge_adapter()
    assert relative_error(logits(model), expected) < 1e-5


def test_adapters_are_refused_where_preload_module_classes_fetches_whole_blocks(folder, tmp_path):
    model = in_memory(folder)
    disk_offload(model, tmp_path / "offloaded", execution_device="cpu", preload_module_classes=["DeepseekV2Attention"])
    assert relative_error(logits(model), logits(in_memory(folder))) < 1e-6
    with pytest.raises(ValueError, match="dispatch the model without preload_module_classes"):
        adapted(model, "linear layers")


def test_an_adapter_can_be_added_to_a_model_on_the_meta_device(folder):
    with torch.device("meta"):
        model = DeepseekV2ForCausalLM(tiny_model().config)
    shapes = {name: x.shape for name, x in adapted(model, "all").named_parameters()}
    assert shapes == {name: x.shape for name, x in adapted(tiny_model(), "all").named_parameters()}
