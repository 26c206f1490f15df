"""Canaries: what compat/transformers.py uses of transformers is still as it expects.

A test here fails with what changed and which code uses it. It passes on all versions that pyproject.toml admits.
"""

import inspect
import json
from types import SimpleNamespace

import pytest
import torch
import transformers
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedModel
from transformers.cache_utils import DynamicLayer
from transformers.conversion_mapping import get_checkpoint_conversion_mapping
from transformers.core_model_loading import SkipParameters, WeightConverter, log_conversion_errors
from transformers.distributed import DistributedConfig, tensor_parallel
from transformers.generation import GenerationMixin
from transformers.integrations import moe
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GenericForSequenceClassification, GradientCheckpointingLayer

import deepseek_latent
from deepseek_latent.compat import transformers as compat
from deepseek_latent.compat.cache_name import CACHE
from tests.compat.helpers import linear, takes
from tests.model.published_configs import DEEPSEEK_V2
from tests.support import NATIVE, random_ids, tiny_model


def test_one_name_of_the_cache_goes_through_all_of_transformers():
    for user, function in {
        "DeepseekV2Model.forward": create_causal_mask,
        "the heads for classification": GenericForSequenceClassification.forward,
        "LatentGenerationMixin": GenerationMixin.prepare_inputs_for_generation,
        "no code here, but transformers' own class": NATIVE.DeepseekV2Model.forward,
    }.items():
        assert takes(function, CACHE), f"{function.__qualname__} no longer takes {CACHE}; used by {user}"
    for name in ("MoeModelOutputWithPast", "MoeCausalLMOutputWithPast", "SequenceClassifierOutputWithPast"):
        theirs = getattr(transformers.modeling_outputs, name)
        assert CACHE in theirs.__dataclass_fields__, f"{name} has no {CACHE}; used by compat/cache_name"
    source = inspect.getsource(inspect.getmodule(GradientCheckpointingLayer))
    assert f'"{CACHE}" in kwargs' in source, (
        "gradient checkpointing no longer removes the cache; used by DeepseekV2Model"
    )


def test_generate_makes_its_cache_in_the_method_that_is_overridden():
    hook = GenerationMixin._prepare_cache_for_generation
    assert takes(hook, "generation_config", "model_kwargs", "generation_mode"), "used by GenerationHooks"
    source = inspect.getsource(GenerationMixin.generate)
    assert "self._prepare_cache_for_generation(" in source, (
        "generate() makes its cache elsewhere; used by GenerationHooks"
    )
    made = {}
    model = tiny_model()
    model.choose_cache = lambda cache, *args: made.setdefault("cache", cache)
    model.generate(random_ids(1, 3), max_new_tokens=1, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert type(made["cache"]) is transformers.DynamicCache, (
        "the default cache has another class; used by LatentGenerationMixin"
    )


def test_the_length_of_a_dropped_mask_is_kept():
    seen = []
    model, ids = tiny_model(), random_ids(1, 7)
    model.prepare_cache_settings = lambda given, settings, mask: seen.append((mask, settings)) or settings
    model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=1, pad_token_id=0)
    mask, settings = seen[0]
    length = mask.shape[1] if mask is not None else compat.length_of_dropped_mask(settings)
    assert length == 7, "generate() no longer keeps the length of the mask; used by check_cache_for_generation"


def test_our_caches_have_the_attributes_of_the_classes_whose_constructors_they_skip():
    config = tiny_model().config
    ours = deepseek_latent.LatentCache(config)
    for theirs, own in ((DynamicLayer(), ours.layers[0]), (transformers.DynamicCache(config=config), ours)):
        missing = [name for name in vars(theirs) if not hasattr(own, name)]
        assert not missing, f"{type(theirs).__name__} has {missing} now; set it in {type(own).__name__}"


def test_the_config_has_the_names_of_implementations():
    config = tiny_model().config
    assert (compat.attention_name(config), compat.experts_name(config)) == (
        "sdpa",
        "grouped_mm",
    ), "attn_implementation or experts_implementation has another default or is stored elsewhere"
    model = tiny_model()
    model.set_attn_implementation("paged|eager")
    assert compat.is_paged(model.config), "continuous batching has another prefix; used by is_paged"


def test_experts_can_be_dispatched():
    theirs = inspect.getattr_static(PreTrainedModel, "_can_set_experts_implementation")
    assert isinstance(theirs, classmethod), (
        "transformers decides otherwise whether experts can be dispatched; used by LoadingHooks"
    )
    model = tiny_model()
    model.set_experts_implementation("eager")
    assert compat.experts_name(model.config) == "eager"


def test_grouped_products_take_rows_weights_and_ends():
    assert [*inspect.signature(moe._grouped_linear).parameters][:2] == ["input", "weight"], "used by grouped_linear"
    x, weight = torch.randn(5, 8), torch.randn(3, 16, 8)
    actual = compat.grouped_linear(x, weight, torch.tensor([2, 2, 5], dtype=torch.int32))
    torch.testing.assert_close(actual, torch.cat((x[:2] @ weight[0].T, x[2:] @ weight[2].T)))
    doubled = compat.grouped_linear(x.double(), weight.double(), torch.tensor([2, 2, 5]).int())
    assert doubled.dtype == torch.float64, "used for models in float64"


def test_loading_reports_missing_weights_before_it_initializes_them():
    hook = PreTrainedModel._adjust_missing_and_unexpected_keys
    assert [*inspect.signature(hook).parameters] == ["self", "loading_info"], "used by LoadingHooks"
    assert [*inspect.signature(PreTrainedModel._get_dtype_plan).parameters] == ["self", "dtype"], "used by LoadingHooks"
    reported = {"missing_keys", "mismatched_keys", "conversion_errors"}
    assert reported <= set(transformers.utils.loading_report.LoadStateDictInfo.__dataclass_fields__), (
        "used by LoadingHooks"
    )
    assert PreTrainedModel._hf_peft_config_loaded is False, "used by has_adapters_of_transformers"
    assert transformers.PreTrainedConfig._auto_class is None, "used by carries_its_code"


def test_pipelines_name_their_task_and_catch_value_errors():
    source = inspect.getsource(transformers.pipelines.base.load_model)
    assert 'model_kwargs["_from_pipeline"] = task' in source, "used by ConfigHooks"
    assert "except (OSError, ValueError, TypeError, RuntimeError):" in source, (
        "pipelines catch other errors; used by RefusedInPipelineError"
    )


def test_auto_classes_make_models_by_the_function_that_converts_configs():
    assert "model_class._from_config(config, **kwargs)" in inspect.getsource(AutoModel.from_config), (
        "used by backbone_of_native_config"
    )
    own = AutoModelForCausalLM._model_mapping._extra_content.get(NATIVE.DeepseekV2Config)
    assert own is deepseek_latent.DeepseekV2ForCausalLM, "used by take_native_configs"
    heads = inspect.getsource(transformers.modeling_layers.GenericForSequenceClassification.__init__)
    assert "AutoModel.from_config(config)" in heads, "used by backbone_of_native_config"


def test_failed_conversions_name_their_operation():
    def failed(operation: str, error: Exception) -> str:
        info, op = SimpleNamespace(conversion_errors={}), type(operation, (), {})()
        with pytest.raises(SkipParameters), log_conversion_errors("a.weight", info, (1, "a.weight"), op):
            raise error
        return info.conversion_errors["a.weight"]

    for operation, error, is_of_quantizer in (
        ("SomeQuantize", ValueError("bad"), True),
        ("MergeModulelist", ValueError("bad"), False),
        ("MergeModulelist", ImportError("no such library"), True),
        ("SomeDequantize", RuntimeError("an ImportError: not of this class"), False),
    ):
        text = failed(operation, error)
        assert compat.failed_in_quantizer(text) is is_of_quantizer, "used by failure_of_quantizer"
        assert compat.reason_of(text) == str(error), "used by failure_of_quantizer"


def test_converters_keep_what_checked_converters_read():
    for known in get_checkpoint_conversion_mapping("deepseek_v2"):
        for name in ("_original_source_patterns", "_original_target_patterns", "layer_targets", "operations"):
            assert hasattr(known, name), f"WeightConverter has no {name}; used by CheckedConverter"
    names = ["self", "layer_name", "model", "config", "hf_quantizer", "loading_info"]
    assert [*inspect.signature(WeightConverter.convert).parameters] == names, "used by CheckedConverter"
    text = inspect.getsource(transformers.core_model_loading)
    assert "\\nError: " in text, "failed conversions are reported otherwise; used by reason_of"


def test_tensor_parallelism_replaces_forward_as_local_rows_expects():
    styles = tensor_parallel.ParallelInterface._global_mapping
    assert type(styles["colwise"]).__name__ == "ColwiseParallel", "used by local_rows"
    layer = linear()
    styles["colwise"].install_forward(layer, None)
    forward = vars(layer)["forward"]
    assert forward.__module__ == "transformers.distributed.tensor_parallel", "used by local_rows"
    assert {"self", "original_forward"} <= set(forward.__code__.co_freevars), "used by local_rows"


def test_transformers_sums_the_rotary_keys_gradient_inside_of_a_projection():
    plan = NATIVE.DeepseekV2Config.base_model_tp_plan
    assert plan["layers.*.self_attn.kv_a_proj_with_mqa"] == "mla_kv_a_proj", (
        "transformers sums this gradient elsewhere; used by DeepseekV2Config.base_model_tp_plan"
    )
    assert takes(tensor_parallel.TensorParallelLayer.install_forward, "module", "mesh"), "used by SumsGradientsParallel"
    ours = deepseek_latent.DeepseekV2Config.base_model_tp_plan
    assert all(style in tensor_parallel.ALL_PARALLEL_STYLES for style in ours.values())


@pytest.mark.skipif(not hasattr(PreTrainedModel, "_resolve_parallel_plans"), reason="it has no such method")
def test_a_number_of_processes_that_does_not_divide_the_heads_is_refused():
    with pytest.raises(ValueError, match="expected a tp_size that divides 3 attention heads, got 2"):
        tiny_model()._resolve_parallel_plans(DistributedConfig(tp_size=2))


def test_trainer_resumes_with_a_class_that_cannot_read_a_published_config(tmp_path):
    source = inspect.getsource(transformers.Trainer._load_from_checkpoint)
    assert "PreTrainedConfig.from_json_file(" in source, (
        "Trainer resumes with another function; used by patch_base_config_reader"
    )
    file = tmp_path / "config.json"
    file.write_text(json.dumps(DEEPSEEK_V2))
    assert type(transformers.PreTrainedConfig.from_json_file(file)) is deepseek_latent.DeepseekV2Config
    with pytest.raises(AttributeError):
        # once this reads the file, patch_base_config_reader can be dropped
        transformers.PreTrainedConfig.from_json_file.__wrapped__(transformers.PreTrainedConfig, file)


def test_configs_of_other_models_are_read_as_before(tmp_path):
    transformers.LlamaConfig(hidden_size=32).save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    assert type(transformers.PreTrainedConfig.from_json_file(file)) is transformers.PreTrainedConfig
    assert type(transformers.LlamaConfig.from_json_file(file)) is transformers.LlamaConfig


def test_class_names_are_looked_up_in_the_module_transformers():
    for user, module in {"pipelines": "transformers.pipelines.base", "serve": None}.items():
        if module is not None:
            source = inspect.getsource(__import__(module, fromlist=["base"]))
            assert 'importlib.import_module("transformers")' in source, (
                f"{user} look classes up elsewhere; used by put_into_transformers"
            )
    assert transformers.DeepseekV2ForCausalLM is deepseek_latent.DeepseekV2ForCausalLM
    assert NATIVE.DeepseekV2ForCausalLM is not deepseek_latent.DeepseekV2ForCausalLM
