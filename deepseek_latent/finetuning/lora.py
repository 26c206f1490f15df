"""LoRA by peft: targets that mean what they say on this model, and sensible ones to begin with."""

from peft import LoraConfig
from transformers import PreTrainedModel

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

    With `routed_experts` also for these, at rank max(r // experts per token, 1), since as many of them act on a token.
    `lora_alpha` is 2 r unless given, and every module has the scaling lora_alpha / r. `options` are those of
    `LoraConfig`, such as `lora_dropout` or `use_dora`, which peft has for linear layers alone. peft warns that patterns
    of routed experts did not match; they do. Without this package imported, peft leaves dense and shared MLPs out of a
    saved adapter: merge it first.

    Raises:
        ValueError: for a rank below 1, and for routed experts where no layer has any, or with options that peft does
            not have for them.
        TypeError: for what is no DeepSeek-V2.
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
        if not any(config.is_moe_layer(i) for i in range(config.num_hidden_layers)):
            raise ValueError(
                "expected a model with experts, and no layer of this one has any; leave routed_experts out."
            )
        refused = [name for name in ("lora_dropout", "use_dora", "lora_bias") if options.get(name)]
        initial = options.get("init_lora_weights")
        if isinstance(initial, str) and initial != "gaussian":
            refused.append(f"init_lora_weights={initial!r}")
        if refused:
            raise ValueError(
                f"peft has {' and '.join(refused)} for linear layers alone, not for the stacked weights of routed "
                "experts; leave it or routed_experts out."
            )
        rank = max(r // config.num_experts_per_tok, 1)
        given["target_parameters"] = list(ROUTED_EXPERTS)
        share = rank / r
        # so that all have one scaling, which is lora_alpha / sqrt(r) with use_rslora
        share = share**0.5 if options.get("use_rslora") else share
        for name, value in (("rank_pattern", rank), ("alpha_pattern", alpha * share)):
            # peft takes the first that matches
            given[name] = {**(options.pop(name, None) or {})}
            for parameter in ROUTED_EXPERTS:
                given[name].setdefault(parameter, value)
    return LoraConfig(**given | options)
