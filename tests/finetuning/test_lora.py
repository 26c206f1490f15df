"""peft's targets are the modules of these names on this model; on transformers' own class, peft decides."""

import inspect
import warnings

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import ParamWrapper
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import transformers_weight_conversion

from deepseek_latent import (
    DeepseekV2Config,
    DeepseekV2ForCausalLM,
    DeepseekV2ForSequenceClassification,
    DeepseekV2ForTokenClassification,
    DeepseekV2Model,
    lora_config,
)
from deepseek_latent.compat.peft_changes import prevent_target_renaming
from deepseek_latent.experts.names import ROUTED_EXPERTS
from deepseek_latent.modeling_deepseek_v2 import DeepseekV2PreTrainedModel
from tests.support import LITE, NATIVE, V2, random_ids, relative_error, tiny_model

ATTENTION = {"q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"}
MLP = {"gate_proj", "up_proj", "down_proj"}
warns_of_patterns = "did not match any targeted module" in inspect.getsource(inspect.unwrap(BaseTuner.inject_adapter))


def adapted_names(model) -> set[str]:
    """The names of modules with an adapter, without the layer's number, and of experts' parameters with one."""
    names = set()
    for name, module in model.named_modules():
        if isinstance(module, ParamWrapper):
            names.add(f"experts.{module.parameter_name}")
        elif hasattr(module, "lora_A"):
            names.add(name.split(".layers.")[1].split(".", 1)[1])
    return names


def targets(names: set[str], *places: str) -> set[str]:
    return {f"{place}.{name}" for place in places for name in names}


DENSE_AND_SHARED = targets(MLP, "mlp", "mlp.shared_experts")
# peft 0.21.2 would take the first four for routed experts, and refuse the fifth
TARGETS = {
    "MLPs": (["gate_proj", "up_proj", "down_proj"], DENSE_AND_SHARED),
    "all-linear": ("all-linear", targets(ATTENTION, "self_attn") | DENSE_AND_SHARED),
    "shared experts": (r".*mlp\.shared_experts\.(gate|up|down)_proj", targets(MLP, "mlp.shared_experts")),
    "the dense layer": (r".*layers\.0\.mlp\..*_proj", targets(MLP, "mlp")),
    "one of two": (["q_b_proj", "up_proj"], {"self_attn.q_b_proj"} | targets({"up_proj"}, "mlp", "mlp.shared_experts")),
    "attention": (r".*self_attn.*proj.*", targets(ATTENTION, "self_attn")),
}


@pytest.mark.parametrize(("written", "expected"), TARGETS.values(), ids=TARGETS)
def test_targets_are_the_modules_of_these_names(written, expected):
    model = get_peft_model(tiny_model(), LoraConfig(target_modules=written))
    assert adapted_names(model) == expected
    ranks = {module.r["default"] for module in model.modules() if hasattr(module, "lora_A")}
    assert ranks == {8}


def test_routed_experts_are_targets_by_the_names_of_their_parameters():
    config = LoraConfig(target_modules=["up_proj"], target_parameters=["experts.gate_up_proj"])
    expected = {"experts.gate_up_proj", "mlp.up_proj", "mlp.shared_experts.up_proj"}
    assert adapted_names(get_peft_model(tiny_model(), config)) == expected


def test_a_saved_adapter_loads_on_the_modules_it_was_on(tmp_path):
    model = get_peft_model(tiny_model(), LoraConfig(target_modules=["down_proj"], init_lora_weights=False)).eval()
    model.save_pretrained(tmp_path)
    again = tiny_model()
    again.load_adapter(str(tmp_path))
    ids = random_ids(2, 20)
    with torch.no_grad():
        assert torch.equal(again.eval()(ids).logits, model(ids).logits)
        assert relative_error(model(ids).logits, tiny_model()(ids).logits) > 1e-3


def test_transformers_own_class_is_left_to_peft():
    config = NATIVE.DeepseekV2Config(**(V2 | {"rope_scaling": None}))
    native = get_peft_model(NATIVE.DeepseekV2ForCausalLM(config), LoraConfig(target_modules=sorted(MLP)))
    assert adapted_names(native) == {"experts.gate_up_proj", "experts.down_proj"}


def test_peft_is_changed_once():
    before = transformers_weight_conversion._convert_peft_config_moe
    prevent_target_renaming(DeepseekV2PreTrainedModel)
    assert transformers_weight_conversion._convert_peft_config_moe is before


@pytest.mark.parametrize("variant", [{}, LITE], ids=["V2", "Lite"])
def test_lora_config_targets_all_linear_layers_but_the_router(variant):
    model = tiny_model(**variant)
    queries = {"q_proj"} if variant else {"q_a_proj", "q_b_proj"}
    attention = targets(queries | {"kv_a_proj_with_mqa", "kv_b_proj", "o_proj"}, "self_attn")
    config = lora_config(model, r=9)
    assert adapted_names(get_peft_model(model, config)) == attention | DENSE_AND_SHARED


def test_routed_experts_get_r_divided_by_experts_per_token_and_the_same_scaling():
    model = get_peft_model(tiny_model(), lora_config(tiny_model(), r=9, routed_experts=True))
    wrappers = [module for module in model.modules() if isinstance(module, ParamWrapper)]
    assert {f"experts.{wrapper.parameter_name}" for wrapper in wrappers} == set(ROUTED_EXPERTS)
    # three experts per token
    assert {wrapper.r["default"] for wrapper in wrappers} == {3}
    assert {module.scaling["default"] for module in model.modules() if hasattr(module, "lora_A")} == {2.0}
    model = get_peft_model(tiny_model(), lora_config(tiny_model(), r=9, routed_experts=True, use_rslora=True))
    scalings = {module.scaling["default"] for module in model.modules() if hasattr(module, "lora_A")}
    assert all(scaling == pytest.approx(18 / 3) for scaling in scalings)
    assert not any("gate.weight" in name and "lora" in name for name, _ in model.named_parameters())


def test_lora_config_takes_the_options_of_peft():
    config = lora_config(DeepseekV2Config(**V2), r=4, lora_alpha=4, target_modules=["o_proj"], lora_dropout=0.1)
    assert (config.r, config.lora_alpha, config.target_modules, config.lora_dropout) == (4, 4, {"o_proj"}, 0.1)


def test_patterns_of_the_user_win_over_those_of_experts():
    patterns = {"rank_pattern": {"o_proj": 4}, "alpha_pattern": {"o_proj": 8}}
    config = lora_config(tiny_model(), r=9, routed_experts=True, **patterns)
    model = get_peft_model(tiny_model(), config)
    layer = model.base_model.model.model.layers[1]
    assert (layer.self_attn.o_proj.r, layer.self_attn.o_proj.scaling) == ({"default": 4}, {"default": 2.0})
    assert (layer.mlp.experts.r, layer.mlp.experts.scaling) == ({"default": 3}, {"default": 2.0})
    patterns = {"rank_pattern": {"layers.1.mlp.experts.down_proj": 5}}
    model = get_peft_model(tiny_model(), lora_config(tiny_model(), r=9, routed_experts=True, **patterns))
    ranks = [layer.mlp.experts.r["default"] for layer in model.base_model.model.model.layers[1:]]
    assert ranks == [5, 3]
    patterns = {"rank_pattern": {"experts.down_proj": 5}, "alpha_pattern": {"experts.down_proj": 15}}
    model = get_peft_model(tiny_model(), lora_config(tiny_model(), r=9, routed_experts=True, **patterns))
    down = model.base_model.model.model.layers[1].mlp.experts
    assert (down.parameter_name, down.r, down.scaling) == ("down_proj", {"default": 5}, {"default": 3.0})
    assert lora_config(tiny_model(), r=2, routed_experts=True).rank_pattern == dict.fromkeys(ROUTED_EXPERTS, 1)


def test_patterns_of_the_user_win_also_after_peft_saved_and_sorted_them(tmp_path):
    first = {"mlp.experts.gate_up_proj": 4, r"model\.layers\.2\.mlp\.experts\.down_proj": 2}
    config = lora_config(tiny_model(), r=3, routed_experts=True, rank_pattern=first, init_lora_weights=False)
    model = get_peft_model(tiny_model(), config)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny_model(), tmp_path)
    for i, ranks in ((1, {"gate_up_proj": 4, "down_proj": 1}), (2, {"gate_up_proj": 4, "down_proj": 2})):
        down = again.get_base_model().model.layers[i].mlp.experts
        found = {layer.parameter_name: layer.r["default"] for layer in (down, down.base_layer)}
        assert found == ranks


HEADS = {
    DeepseekV2ForCausalLM: "CAUSAL_LM",
    DeepseekV2ForSequenceClassification: "SEQ_CLS",
    DeepseekV2ForTokenClassification: "TOKEN_CLS",
    DeepseekV2Model: "FEATURE_EXTRACTION",
}


@pytest.mark.parametrize(("model_class", "task"), HEADS.items(), ids=HEADS.values())
def test_the_task_is_that_of_the_models_head(model_class, task):
    model = model_class(DeepseekV2Config(**V2))
    config = lora_config(model, r=6, routed_experts=True, rank_pattern={"layers.1.mlp.experts.down_proj": 5})
    assert config.task_type == task
    adapted = get_peft_model(model, config)
    ranks = [module.r["default"] for module in adapted.modules() if isinstance(module, ParamWrapper)]
    # the outer wrapper is that of down_proj
    assert ranks == [5, 2, 2, 2]
    has_own_head = any("score" in name and x.requires_grad for name, x in adapted.named_parameters())
    assert has_own_head == (task in ("SEQ_CLS", "TOKEN_CLS"))


def test_the_task_of_a_config_is_that_of_a_language_model_and_can_be_chosen():
    config = DeepseekV2Config(**V2)
    assert lora_config(config).task_type == "CAUSAL_LM"
    assert lora_config(config, task_type="SEQ_CLS").task_type == "SEQ_CLS"


# what each program applies, of docs/fine-tuning.md
SERVED = {
    "transformers": ATTENTION,
    "vllm": ATTENTION - {"kv_b_proj"} | MLP,
    "llama.cpp": {"o_proj"} | MLP,
    ("transformers", "vllm"): ATTENTION - {"kv_b_proj"},
    ("transformers", "vllm", "llama.cpp"): {"o_proj"},
}


@pytest.mark.parametrize(("programs", "expected"), SERVED.items(), ids=map(str, SERVED))
def test_targets_without_effect_in_the_programs_that_serve_are_left_out(programs, expected):
    assert lora_config(tiny_model(), serve_with=programs).target_modules == expected


def test_what_no_program_serves_is_refused():
    model = tiny_model()
    with pytest.raises(ValueError, match=r"serve_with takes 'transformers', 'vllm', 'llama.cpp', got 'ollama'"):
        lora_config(model, serve_with="ollama")
    with pytest.raises(ValueError, match="serve_with chooses the targets, and target_modules names others"):
        lora_config(model, serve_with="vllm", target_modules=["kv_b_proj"])
    with pytest.raises(ValueError, match=r"llama\.cpp refuses LoRA on routed experts"):
        lora_config(model, serve_with="llama.cpp", routed_experts=True)
    with pytest.raises(ValueError, match=r"llama\.cpp ignores the scaling of use_rslora"):
        lora_config(model, serve_with=["llama.cpp"], use_rslora=True)
    with pytest.raises(ValueError, match="vLLM cannot load DoRA; leave use_dora out, or merge the adapter"):
        lora_config(model, serve_with="vllm", use_dora=True)


def warnings_of_patterns(model, config) -> list[str]:
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        get_peft_model(model, config)
    return [str(warning.message) for warning in shown if "did not match" in str(warning.message)]


def test_peft_does_not_warn_of_patterns_that_match_experts(tmp_path):
    model = tiny_model()
    assert warnings_of_patterns(model, lora_config(model, r=6, routed_experts=True)) == []
    # filters that make errors of warnings do not make one of this
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        model = get_peft_model(tiny_model(), lora_config(tiny_model(), r=6, routed_experts=True))
        model.save_pretrained(tmp_path)
        PeftModel.from_pretrained(tiny_model(), tmp_path)


@pytest.mark.skipif(not warns_of_patterns, reason="peft before 0.21 warns of no patterns")
def test_peft_warns_of_patterns_that_match_nothing():
    config = lora_config(tiny_model(), r=6, routed_experts=True, rank_pattern={"layers.9.mlp.experts.down_proj": 5})
    (message,) = warnings_of_patterns(tiny_model(), config)
    assert "rank_pattern" in message
    assert "['layers.9.mlp.experts.down_proj']" in message
    # for other classes, peft decides
    native = NATIVE.DeepseekV2ForCausalLM(NATIVE.DeepseekV2Config(**(V2 | {"rope_scaling": None})))
    assert len(warnings_of_patterns(native, lora_config(tiny_model(), r=6, routed_experts=True))) == 2


@pytest.mark.skipif(not warns_of_patterns, reason="peft before 0.21 warns of no patterns")
def test_a_warning_that_is_an_error_is_raised_for_patterns_that_match_nothing():
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        with pytest.raises(RuntimeWarning, match="nothing_here"):
            get_peft_model(tiny_model(), lora_config(tiny_model(), rank_pattern={"nothing_here": 3}))


def test_models_ranks_and_options_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="expected a model with experts"):
        lora_config(tiny_model(n_routed_experts=None), routed_experts=True)
    with pytest.raises(TypeError, match="expected a DeepSeek-V2"):
        lora_config(transformers.LlamaConfig())
    with pytest.raises(TypeError, match=r"lora_config got .* 'routed_expert'; the nearest .* is 'routed_experts'"):
        lora_config(tiny_model(), routed_expert=True)
    for options in ({}, {"routed_experts": True}):
        with pytest.raises(ValueError, match="rank r must be at least 1, got 0"):
            lora_config(tiny_model(), r=0, **options)
    for options in ({"lora_dropout": 0.1}, {"use_dora": True}, {"init_lora_weights": "pissa"}):
        lora_config(tiny_model(), **options)
        with pytest.raises(ValueError, match="for linear layers only"):
            lora_config(tiny_model(), routed_experts=True, **options)
