"""Canaries: each thing that we lean on in other libraries is still what the compat modules take it for.

A test here fails with what moved and who uses it. The versions it passes on are those that pyproject.toml admits.
"""

import inspect
import warnings

import torch
import transformers
from accelerate import dispatch_model, hooks
from peft import LoraConfig, PeftMixedModel, PeftModel, get_peft_model
from peft.tuners.lora import layer as peft_lora
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import transformers_weight_conversion
from torch import nn
from torch.nn.attention.flex_attention import create_block_mask
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicLayer
from transformers.conversion_mapping import get_checkpoint_conversion_mapping
from transformers.core_model_loading import WeightConverter
from transformers.distributed import tensor_parallel
from transformers.generation import GenerationMixin
from transformers.generation.configuration_utils import ContinuousBatchingConfig
from transformers.generation.continuous_batching import ContinuousBatchingManager, PagedAttentionCache
from transformers.integrations import moe
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GenericForSequenceClassification, GradientCheckpointingLayer

import deepseek_latent
from deepseek_latent.compat import accelerate as compat_accelerate
from deepseek_latent.compat import bound_functions
from deepseek_latent.compat import peft as compat_peft
from deepseek_latent.compat import torch as compat_torch
from deepseek_latent.compat import transformers as compat_transformers
from deepseek_latent.compat.cache_name import CACHE
from tests.support import NATIVE, random_ids, tiny_model


def takes(function, *names: str) -> bool:
    return set(names) <= set(inspect.signature(function).parameters)


def linear() -> nn.Linear:
    return nn.Linear(4, 6, bias=False)


# ---- transformers ----------------------------------------------------------------------------------------------------


def test_one_name_of_the_cache_goes_through_all_of_transformers():
    for user, function in {
        "DeepseekV2Model.forward": create_causal_mask,
        "the heads for classification": GenericForSequenceClassification.forward,
        "LatentGenerationMixin": GenerationMixin.prepare_inputs_for_generation,
        "nobody here, but transformers' own class": NATIVE.DeepseekV2Model.forward,
    }.items():
        assert takes(function, CACHE), f"{function.__qualname__} no longer takes {CACHE}; used by {user}"
    for name in ("MoeModelOutputWithPast", "MoeCausalLMOutputWithPast", "SequenceClassifierOutputWithPast"):
        theirs = getattr(transformers.modeling_outputs, name)
        assert CACHE in theirs.__dataclass_fields__, f"{name} has no {CACHE}; used by compat_transformers"
    source = inspect.getsource(inspect.getmodule(GradientCheckpointingLayer))
    assert f'"{CACHE}" in kwargs' in source, "recomputed layers no longer lose their cache; used by DeepseekV2Model"


def test_generate_makes_its_cache_where_we_look():
    hook = GenerationMixin._prepare_cache_for_generation
    assert takes(hook, "generation_config", "model_kwargs", "generation_mode"), "used by GenerationHooks"
    source = inspect.getsource(GenerationMixin.generate)
    assert "self._prepare_cache_for_generation(" in source, "generate() makes its cache elsewhere; GenerationHooks"
    made = {}
    model = tiny_model()
    model.cache_to_use = lambda cache, *args: made.setdefault("cache", cache)
    model.generate(random_ids(1, 3), max_new_tokens=1, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert type(made["cache"]) is transformers.DynamicCache, "the default cache is another; LatentGenerationMixin"


def test_a_mask_of_ones_is_dropped_and_its_length_noted():
    seen = []
    model, ids = tiny_model(), random_ids(1, 7)
    model.settings_for_cache = lambda given, settings, mask: seen.append((mask, settings)) or settings
    model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=1, pad_token_id=0)
    mask, settings = seen[0]
    length = mask.shape[1] if mask is not None else compat_transformers.length_of_dropped_mask(settings)
    assert length == 7, "generate() no longer says how long the mask was; used by check_cache_for_generation"


def test_pages_are_made_and_written_as_paged_latents_expects():
    assert takes(PagedAttentionCache.update, "key_states", "value_states", "layer_idx"), "used by update_pages"
    rest = ("kwargs",) if compat_transformers._pages_take_all_arguments() else ("read_index", "write_index")
    assert takes(PagedAttentionCache.update, *rest), "used by update_pages"
    source = inspect.getsource(ContinuousBatchingManager)
    assert "self._create_batch_processor()" in source, "managers make pages elsewhere; used by with_pages_for"
    assert "self.model.config" in inspect.getsource(ContinuousBatchingManager._create_batch_processor), (
        "managers no longer ask their model for its config; used by with_pages_for"
    )


def test_continuous_batching_gives_its_pages_as_cache():
    given = {}
    model = tiny_model()
    forward = model.model.forward
    model.model.forward = lambda *args, **kwargs: given.update(kwargs) or forward(*args, **kwargs)
    settings = transformers.GenerationConfig(max_new_tokens=2, do_sample=False, eos_token_id=1)
    few = ContinuousBatchingConfig(num_blocks=8, max_batch_tokens=8)
    model.generate_batch([[5, 6, 7]], generation_config=settings, continuous_batching_config=few)
    assert isinstance(given["cache"], PagedAttentionCache), "pages come by another name or type; DeepseekV2Model"
    wanted = {"block_table", "cu_seq_lens_q", "cu_seq_lens_k", "read_index", "write_index"}
    assert wanted <= set(given), f"pages come without {wanted - set(given)}; used by PagedLatents"


def test_caches_of_ours_have_what_those_have_whose_constructors_they_skip():
    config = tiny_model().config
    ours = deepseek_latent.LatentCache(config)
    for theirs, own in ((DynamicLayer(), ours.layers[0]), (transformers.DynamicCache(config=config), ours)):
        missing = [name for name in vars(theirs) if not hasattr(own, name)]
        assert not missing, f"{type(theirs).__name__} has {missing} now; set it in {type(own).__name__}"


def test_names_of_implementations_are_where_we_read_them():
    config = tiny_model().config
    assert (compat_transformers.attention_name(config), compat_transformers.experts_name(config)) == (
        "sdpa",
        "grouped_mm",
    ), "defaults of attn_implementation or experts_implementation changed, or are kept elsewhere"
    model = tiny_model()
    model.set_attn_implementation("paged|eager")
    assert compat_transformers.is_paged(model.config), "continuous batching marks its names otherwise"


def test_experts_can_be_dispatched():
    theirs = inspect.getattr_static(PreTrainedModel, "_can_set_experts_implementation")
    assert isinstance(theirs, classmethod), "transformers asks otherwise whether experts dispatch; LoadingHooks"
    model = tiny_model()
    model.set_experts_implementation("eager")
    assert compat_transformers.experts_name(model.config) == "eager"


def test_grouped_products_take_rows_weights_and_ends():
    assert [*inspect.signature(moe._grouped_linear).parameters][:2] == ["input", "weight"], "used by grouped_linear"
    x, weight = torch.randn(5, 8), torch.randn(3, 16, 8)
    actual = compat_transformers.grouped_linear(x, weight, torch.tensor([2, 2, 5], dtype=torch.int32))
    torch.testing.assert_close(actual, torch.cat((x[:2] @ weight[0].T, x[2:] @ weight[2].T)))
    doubled = compat_transformers.grouped_linear(x.double(), weight.double(), torch.tensor([2, 2, 5]).int())
    assert doubled.dtype == torch.float64, "used for models in float64"


def test_what_a_checkpoint_lacks_is_told_before_it_is_initialised():
    hook = PreTrainedModel._adjust_missing_and_unexpected_keys
    assert [*inspect.signature(hook).parameters] == ["self", "loading_info"], "used by LoadingHooks"
    assert [*inspect.signature(PreTrainedModel._get_dtype_plan).parameters] == ["self", "dtype"], "used by LoadingHooks"
    told = {"missing_keys", "mismatched_keys", "conversion_errors"}
    assert told <= set(transformers.utils.loading_report.LoadStateDictInfo.__dataclass_fields__), "used by LoadingHooks"
    assert PreTrainedModel._hf_peft_config_loaded is False, "used by has_adapters_of_transformers"
    assert transformers.PreTrainedConfig._auto_class is None, "used by carries_its_code"


def test_converters_keep_what_checked_converters_read():
    for known in get_checkpoint_conversion_mapping("deepseek_v2"):
        for name in ("_original_source_patterns", "_original_target_patterns", "layer_targets", "operations"):
            assert hasattr(known, name), f"WeightConverter has no {name}; used by CheckedConverter"
    names = ["self", "layer_name", "model", "config", "hf_quantizer", "loading_info"]
    assert [*inspect.signature(WeightConverter.convert).parameters] == names, "used by CheckedConverter"
    text = inspect.getsource(transformers.core_model_loading)
    assert "\\nError: " in text, "failed conversions are told in other words; used by reason_of"


def test_tensor_parallelism_replaces_forward_as_local_rows_reads_it():
    styles = tensor_parallel.ParallelInterface._global_mapping
    assert type(styles["colwise"]).__name__ == "ColwiseParallel", "used by local_rows"
    layer = linear()
    styles["colwise"].install_forward(layer, None)
    forward = vars(layer)["forward"]
    assert forward.__module__ == "transformers.distributed.tensor_parallel", "used by local_rows"
    assert {"self", "original_forward"} <= set(forward.__code__.co_freevars), "used by local_rows"


def test_class_names_are_taken_from_the_module_transformers():
    for user, module in {"pipelines": "transformers.pipelines.base", "serve": None}.items():
        if module is not None:
            source = inspect.getsource(__import__(module, fromlist=["base"]))
            assert 'importlib.import_module("transformers")' in source, f"{user} look for classes elsewhere"
    assert transformers.DeepseekV2ForCausalLM is deepseek_latent.DeepseekV2ForCausalLM
    assert NATIVE.DeepseekV2ForCausalLM is not deepseek_latent.DeepseekV2ForCausalLM


# ---- peft ------------------------------------------------------------------------------------------------------------


def adapted(**options) -> nn.Module:
    model = nn.Sequential(linear())
    options = {"target_modules": ["0"], "init_lora_weights": False} | options
    return get_peft_model(model, LoraConfig(r=2, **options)).base_model.model[0]


def test_lora_layers_are_told_by_their_classes():
    assert compat_peft.is_lora_linear(adapted()), "used by effective_weight"
    assert peft_lora.ParamWrapper.__module__ == "peft.tuners.lora.layer", "used by expert_lora.unwrapped"
    assert not compat_peft.is_lora_linear(linear())
    assert compat_peft.is_adapted(adapted()), "used by fingerprints and by ESFT"


def test_lora_layers_keep_what_is_read_of_them():
    layer = adapted().eval()
    for name in ("lora_A", "lora_B", "scaling", "lora_variant", "merged", "disable_adapters", "active_adapters"):
        assert hasattr(layer, name), f"LoRA layers have no {name}; used by acting_adapters"
    (adapter,) = compat_peft.acting_adapters(layer)
    x = torch.randn(3, 4)
    added = adapter.b(adapter.a(x)) * adapter.scaling
    torch.testing.assert_close(layer(x), layer.base_layer(x) + added)
    assert compat_peft.acting_adapters(adapted(use_dora=True)) is None, "variants are no longer in lora_variant"
    for name in ("other_param_names", "active_adapter", "merged_adapters"):
        assert hasattr(layer, name), f"LoRA layers have no {name}; used by adapter_state"


def test_factors_of_stacked_parameters_lie_as_they_are_read():
    model = nn.Sequential(nn.Module())
    model[0].weight = nn.Parameter(torch.zeros(3, 5, 4))
    config = LoraConfig(r=2, target_modules=[], target_parameters=["0.weight"], init_lora_weights=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapper = get_peft_model(model, config).base_model.model[0]
    assert compat_peft.is_lora_parameter(wrapper)
    assert wrapper.parameter_name == "weight", "used by expert_lora.unwrapped"
    (adapter,) = compat_peft.acting_adapters(wrapper)
    a, b = compat_peft.stacked_factors(wrapper, adapter)
    torch.testing.assert_close(b @ a * adapter.scaling, wrapper.get_delta_weight("default"))


def test_the_function_of_peft_that_is_replaced_is_where_it_is_replaced():
    """Where peft no longer has it, `keep_targets_of` and the tests of targets say whether it is still needed."""
    ours = transformers_weight_conversion._convert_peft_config_moe
    assert [*inspect.signature(ours).parameters] == ["peft_config", "model"], "used by keep_targets_of"
    assert ours.__wrapped__.__module__ == "peft.utils.transformers_weight_conversion"


def test_the_functions_of_peft_that_attach_and_merge_are_where_they_are_wrapped():
    inject = BaseTuner.inject_adapter
    assert [*inspect.signature(inject).parameters][:3] == ["self", "model", "adapter_name"], "used by adapt_offloaded"
    assert inject.__wrapped__.__module__ == "peft.tuners.tuners_utils"
    for method in (peft_lora.ParamWrapper.merge, peft_lora.ParamWrapper.unmerge):
        assert method.__wrapped__.__module__ == "peft.tuners.lora.layer", "used by adapt_offloaded"
    assert hasattr(peft_lora.ParamWrapper, "get_param"), "used by adapt_offloaded"
    for kind in (PeftModel, PeftMixedModel):
        load = kind.from_pretrained.__func__
        assert [*inspect.signature(load).parameters][:3] == ["cls", "model", "model_id"], "used by adapt_offloaded"
        assert load.__wrapped__.__module__.startswith("peft."), "used by adapt_offloaded"
    assert takes(PeftModel.load_adapter, "model_id", "adapter_name"), "used by adapt_offloaded"
    config = LoraConfig()
    assert (config.peft_type, config.use_dora, config.init_lora_weights) == ("LORA", False, True), "adapt_offloaded"


def test_activated_adapters_are_told_by_their_variant():
    layer = adapted(alora_invocation_tokens=[1])
    assert compat_peft.acts_on_some_tokens(layer), "aLoRA is kept otherwise; used by DeepseekV2Attention"
    assert not compat_peft.acts_on_some_tokens(adapted())


# ---- accelerate ------------------------------------------------------------------------------------------------------


def test_hooks_of_accelerate_are_told_by_what_they_keep():
    layer = linear()
    plain = vars(layer).get("forward")
    assert plain is None
    for options, keeps in (({}, True), ({"offload": True}, True), ({"io_same_device": True}, False)):
        layer = linear()
        hooks.add_hook_to_module(layer, hooks.AlignDevicesHook(execution_device="cpu", **options))
        assert compat_accelerate.keeps_its_meaning(layer) == keeps, f"hooks with {options}; used by has_hooks"
        assert compat_accelerate.is_offloaded(layer) == ("offload" in options), "used by weights_here"
    other = linear()
    hooks.add_hook_to_module(other, hooks.ModelHook())
    assert not compat_accelerate.keeps_its_meaning(other), "another hook may do anything"
    hooks.remove_hook_from_module(other)
    assert compat_accelerate.keeps_its_meaning(other)


def test_offloaded_weights_come_and_go():
    layer = linear()
    weight = layer.weight.detach().clone()
    hooks.add_hook_to_module(layer, hooks.AlignDevicesHook(execution_device="cpu", offload=True))
    assert layer.weight.is_meta
    assert str(layer._hf_hook.execution_device) == "cpu", "used by stand_ins"
    with compat_accelerate.weights_here(layer):
        assert torch.equal(layer.weight, weight)
        layer.weight.data += 1
        compat_accelerate.keep_changed(layer)
    assert layer.weight.is_meta
    with compat_accelerate.weights_here(layer):
        assert torch.equal(layer.weight, weight + 1), "hooks fetch weights from elsewhere; used by keep_changed"


def test_dispatched_models_have_a_hook_of_that_kind_on_every_layer():
    model = nn.Sequential(linear(), nn.Linear(6, 4))
    dispatch_model(model, {"0": "cpu", "1": "cpu"}, force_hooks=True)
    assert all(compat_accelerate.keeps_its_meaning(layer) for layer in model), "device_map hooks are others now"


# ---- torch -----------------------------------------------------------------------------------------------------------


def test_modules_keep_their_hooks_and_parameters_where_we_look():
    layer = linear()
    assert not compat_torch.has_forward_hooks(layer)
    for register in (layer.register_forward_hook, layer.register_forward_pre_hook):
        handle = register(lambda *args: None)
        assert compat_torch.has_forward_hooks(layer), "used by has_hooks"
        handle.remove()
    assert [*compat_torch.take_out(layer, ["weight"])] == ["weight"]
    assert not [*layer.parameters()], "used by packed and trained experts"


def test_a_bound_function_acts_for_those_who_keep_a_forward():
    @bound_functions.replaces_method()
    def doubled(module, x):
        return 2 * nn.Linear.forward(module, x)

    layer, x = linear(), torch.randn(2, 4)
    expected = 2 * layer(x)
    hooks.add_hook_to_module(layer, hooks.AlignDevicesHook(execution_device="cpu"))
    bound_functions.bind(layer, {"forward": doubled})
    assert torch.equal(layer(x), expected), "hooks keep forward elsewhere; used by optimize_for_inference"
    hooks.remove_hook_from_module(layer)
    assert torch.equal(layer(x), expected)
    bound_functions.unbind(layer)
    assert torch.equal(2 * layer(x), expected)


def test_changes_in_place_are_counted():
    tensor = torch.zeros(3)
    before = compat_torch.version_of(tensor)
    tensor.add_(1)
    assert compat_torch.version_of(tensor) > before, "used by PromptCache and trained experts"
    with torch.inference_mode():
        assert compat_torch.version_of(torch.zeros(3)) is None


def test_the_methods_of_modules_that_experts_override_are_called():
    for name, parameters in {
        "_apply": ["self", "fn", "recurse"],
        "_save_to_state_dict": ["self", "destination", "prefix", "keep_vars"],
    }.items():
        assert [*inspect.signature(getattr(nn.Module, name)).parameters] == parameters, f"{name}: moe, packed, trained"
    given = ["self", "state_dict", "prefix", "local_metadata", "strict", "missing_keys"]
    assert [*inspect.signature(nn.Module._load_from_state_dict).parameters][:6] == given, "moe, packed, trained"


def test_block_masks_know_their_device():
    mask = create_block_mask(lambda b, h, q, k: q >= k, 1, 1, 8, 8, device="cpu")
    assert compat_torch.device_of(mask).type == "cpu", "used by dense_mask"
