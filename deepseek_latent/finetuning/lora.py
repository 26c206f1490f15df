"""LoRA by peft: a configuration whose targets act on this model as their names say, with sensible defaults."""

from peft import LoraConfig
from transformers import PreTrainedModel

from ..compat.peft_config import value_for
from ..configuration_deepseek_v2 import DeepseekV2Config
from ..experts.names import ROUTED_EXPERTS


def lora_config(
    model: PreTrainedModel | DeepseekV2Config,
    *,
    r: int = 16,
    lora_alpha: int | None = None,
    routed_experts: bool = False,
    **options,
) -> LoraConfig:
    """A `LoraConfig` for all projections of attention, the dense layers' MLPs and the shared experts; never the router.

    With `routed_experts` it also targets these, at rank max(r // experts per token, 1), since that many experts act on
    a token. `lora_alpha` is 2 r unless given, and every module has the scaling lora_alpha / r. `options` are those of
    `LoraConfig`, such as `lora_dropout` or `use_dora`, which peft has for linear layers only. peft warns that the
    patterns of routed experts did not match; they do. Where this package is not imported, peft drops dense and shared
    MLPs from a saved adapter, so merge the adapter first.

    Raises:
        ValueError: for a rank below 1, and for routed experts where no layer has any, or with options that peft does
            not have for them.
        TypeError: for anything but a DeepSeek-V2 or its config.
    """
    config = model.config if isinstance(model, PreTrainedModel) else model
    if not isinstance(config, DeepseekV2Config):
        raise TypeError(f"expected a DeepSeek-V2 or its config, got {type(model).__name__}.")
    if r < 1:
        raise ValueError(f"the rank r must be at least 1, got {r}.")
    alpha = 2 * r if lora_alpha is None else lora_alpha
    queries = ["q_proj"] if config.q_lora_rank is None else ["q_a_proj", "q_b_proj"]
    modules = [*queries, "kv_a_proj_with_mqa", "kv_b_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    given = {"r": r, "lora_alpha": alpha, "target_modules": modules, "task_type": "CAUSAL_LM"}
    if routed_experts:
        _check_options_for_experts(config, options)
        rank = max(r // config.num_experts_per_tok, 1)
        given["target_parameters"] = list(ROUTED_EXPERTS)
        # all modules have one scaling, which is lora_alpha / sqrt(r) with use_rslora
        ratio = (rank / r) ** 0.5 if options.get("use_rslora") else rank / r
        for name, value in (("rank_pattern", rank), ("alpha_pattern", alpha * ratio)):
            patterns = options.pop(name, None) or {}
            given[name] = {**patterns} | _patterns_beside(patterns, config, value)
    return LoraConfig(**given | options)


def _patterns_beside(patterns: dict, config: DeepseekV2Config, value: float) -> dict[str, float]:
    """Patterns of `value` for the routed experts that none of the user's `patterns` names.

    No weight is named by both, because peft takes the first pattern that matches, but sorts them when it saves them.
    """
    layers = [i for i in range(config.num_hidden_layers) if config.is_moe_layer(i)]
    made = {}
    for parameter in ROUTED_EXPERTS:
        places = [f"model.layers.{i}.mlp.{parameter}" for i in layers]
        left = [place for place in places if value_for(place, patterns, None) is None]
        made |= dict.fromkeys([parameter] if left == places else left, value)
    return made


def _check_options_for_experts(config: DeepseekV2Config, options: dict) -> None:
    """Refuses options that peft does not have for the stacked weights of routed experts."""
    if not any(config.is_moe_layer(i) for i in range(config.num_hidden_layers)):
        raise ValueError("expected a model with experts, and no layer of this one has any; leave routed_experts out.")
    refused = [name for name in ("lora_dropout", "use_dora", "lora_bias") if options.get(name)]
    initial = options.get("init_lora_weights")
    if isinstance(initial, str) and initial != "gaussian":
        refused.append(f"init_lora_weights={initial!r}")
    if refused:
        raise ValueError(
            f"peft has {' and '.join(refused)} for linear layers only, not for the stacked weights of routed "
            "experts; leave it or routed_experts out."
        )
