"""LoRA by peft: a configuration whose targets act on this model as their names say, with sensible defaults."""

from collections.abc import Iterable
from inspect import signature

from peft import LoraConfig, TaskType
from torch import nn
from transformers import PreTrainedModel

from ..compat.adapter_clients import CLIENTS
from ..compat.arguments import unknown_argument
from ..compat.other_classes import check_is_own_class
from ..compat.peft_config import value_for
from ..configuration_deepseek_v2 import DeepseekV2Config
from ..experts.names import ROUTED_EXPERTS
from ..modeling_deepseek_v2 import (
    DeepseekV2ForCausalLM,
    DeepseekV2ForSequenceClassification,
    DeepseekV2ForTokenClassification,
    DeepseekV2Model,
)

_TASKS = {
    DeepseekV2ForCausalLM: TaskType.CAUSAL_LM,
    DeepseekV2ForSequenceClassification: TaskType.SEQ_CLS,
    DeepseekV2ForTokenClassification: TaskType.TOKEN_CLS,
    DeepseekV2Model: TaskType.FEATURE_EXTRACTION,
}


def lora_config(
    model: PreTrainedModel | DeepseekV2Config,
    *,
    r: int = 16,
    lora_alpha: int | None = None,
    routed_experts: bool = False,
    serve_with: str | Iterable[str] = (),
    **options,
) -> LoraConfig:
    """A `LoraConfig` for all projections of attention, the dense layers' MLPs and the shared experts; never the router.

    With `routed_experts` it also targets these, at rank max(r // experts per token, 1), since that many experts act on
    a token. `lora_alpha` is 2 r unless given, and every module has the scaling lora_alpha / r. `options` are those of
    `LoraConfig`, such as `lora_dropout` or `use_dora`, which peft has for linear layers only.

    `serve_with` names one or several programs that are to load the adapter without merging it: "transformers" (with
    peft, where this package is not imported), "vllm", "llama.cpp". Targets that have no effect in one of them are left
    out: dense and shared MLPs in the first, `kv_b_proj` in the second, all but `o_proj` and MLPs in the third.

    `task_type` is that of the model's head, so peft also trains and saves the head of a classifier; for a config, it
    is "CAUSAL_LM".

    Raises:
        ValueError: for a rank below 1, for routed experts where no layer has any, or with options that peft does not
            have for them, and for an unknown program or what it does not load.
        TypeError: for anything but a DeepSeek-V2 of this package or its config, and for an unknown option.
    """
    config = model.config if isinstance(model, PreTrainedModel) else model
    check_is_own_class(model)
    if not isinstance(config, DeepseekV2Config):
        raise TypeError(f"expected a DeepSeek-V2 or its config, got {type(model).__name__}.")
    known = signature(LoraConfig).parameters
    unknown = next((name for name in options if name not in known), None)
    if unknown is not None:
        raise unknown_argument("lora_config", unknown, {"routed_experts", "serve_with"} | {*known})
    if r < 1:
        raise ValueError(f"the rank r must be at least 1, got {r}.")
    alpha = 2 * r if lora_alpha is None else lora_alpha
    queries = ["q_proj"] if config.q_lora_rank is None else ["q_a_proj", "q_b_proj"]
    modules = [*queries, "kv_a_proj_with_mqa", "kv_b_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    programs = [serve_with] if isinstance(serve_with, str) else [*serve_with]
    _check_programs(programs, routed_experts, options)
    dropped = {name for program in programs for name in CLIENTS[program].dropped}
    modules = [name for name in modules if name not in dropped]
    given = {"r": r, "lora_alpha": alpha, "target_modules": modules, "task_type": _task_of(model)}
    if routed_experts:
        _check_options_for_experts(config, options)
        rank = max(r // config.num_experts_per_tok, 1)
        given["target_parameters"] = list(ROUTED_EXPERTS)
        # all modules have one scaling, which is lora_alpha / sqrt(r) with use_rslora
        ratio = (rank / r) ** 0.5 if options.get("use_rslora") else rank / r
        for name, value in (("rank_pattern", rank), ("alpha_pattern", alpha * ratio)):
            patterns = options.pop(name, None) or {}
            prefix = "" if isinstance(model, DeepseekV2Model) else "model."
            given[name] = {**patterns} | _patterns_beside(patterns, config, value, prefix)
    return LoraConfig(**given | options)


def _task_of(model: PreTrainedModel | DeepseekV2Config) -> TaskType | None:
    """What peft calls the task of a model's head; None for a head of the user's own."""
    if not isinstance(model, nn.Module):
        return TaskType.CAUSAL_LM
    return next((task for kind, task in _TASKS.items() if isinstance(model, kind)), None)


def _check_programs(programs: list[str], routed_experts: bool, options: dict) -> None:
    """Refuses unknown programs, targets given beside them, and what vLLM and llama.cpp do not load."""
    unknown = [name for name in programs if name not in CLIENTS]
    if unknown:
        raise ValueError(f"serve_with takes {', '.join(map(repr, CLIENTS))}, got {unknown[0]!r}.")
    given = [name for name in ("target_modules", "target_parameters") if name in options]
    if programs and given:
        raise ValueError(f"serve_with chooses the targets, and {given[0]} names others; leave one of them out.")
    refusing = [CLIENTS[name].name for name in ("vllm", "llama.cpp") if name in programs]
    if refusing and options.get("use_dora"):
        raise ValueError(f"{' and '.join(refusing)} cannot load DoRA; leave use_dora out, or merge the adapter.")
    if "llama.cpp" in programs and routed_experts:
        raise ValueError("llama.cpp refuses LoRA on routed experts; leave routed_experts out, or merge the adapter.")
    if "llama.cpp" in programs and options.get("use_rslora"):
        raise ValueError("llama.cpp ignores the scaling of use_rslora; leave it out, or merge the adapter.")


def _patterns_beside(patterns: dict, config: DeepseekV2Config, value: float, prefix: str) -> dict[str, float]:
    """Patterns of `value` for the routed experts that none of the user's `patterns` names.

    No weight is named by both, because peft takes the first pattern that matches, but sorts them when it saves them.
    """
    made = {}
    for parameter in ROUTED_EXPERTS:
        places = [f"{prefix}layers.{i}.mlp.{parameter}" for i in config.moe_layers]
        left = [place for place in places if value_for(place, patterns, None) is None]
        made |= dict.fromkeys([parameter] if left == places else left, value)
    return made


def _check_options_for_experts(config: DeepseekV2Config, options: dict) -> None:
    """Refuses options that peft does not have for the stacked weights of routed experts."""
    if not config.moe_layers:
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
