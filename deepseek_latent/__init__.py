"""DeepSeek-V2 for transformers, with attention to compressed latents. Importing it registers it with the Auto classes.

Every public name is here. The names that the model itself does not need are imported at their first use.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

# this import warns of untested versions, before one of the imports below fails because of them
from .compat.tested_versions import warn_of_untested_versions  # noqa: F401

# isort: split
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from .cache.latent_cache import LatentCache
from .cache.prompt_cache import PromptCache
from .compat.expert_parallel import register_implementation
from .compat.peft_card import describe_targets
from .compat.peft_changes import (
    prevent_target_renaming,
    refuse_single_experts,
    remove_refused_adapters,
    support_offloading,
)
from .compat.peft_processes import support_several_processes
from .compat.peft_warnings import correct_pattern_warnings
from .compat.registration import (
    backbone_of_native_config,
    patch_base_config_reader,
    put_into_transformers,
    take_native_configs,
)
from .configuration_deepseek_v2 import DeepseekFirstUploadConfig, DeepseekV2Config, NativeConfig
from .experts.device_limited import DeviceLimitedEP
from .experts.routed import DeepseekV2Experts
from .modeling_deepseek_v2 import (
    DeepseekV2ForCausalLM,
    DeepseekV2ForSequenceClassification,
    DeepseekV2ForTokenClassification,
    DeepseekV2Model,
    DeepseekV2PreTrainedModel,
)

if TYPE_CHECKING:
    from .finetuning.activity import Activity, activity_of
    from .finetuning.esft import finish_training, load_experts, save_experts, train_experts
    from .finetuning.expert_selection import ExpertSelection, expert_scores, select_experts
    from .finetuning.lora import lora_config
    from .finetuning.packing import pack_experts, unpack_experts
    from .finetuning.router_callback import RouterStatistics
    from .kernels import Optimized, optimize_for_inference
    from .plugin_state import can_absorb, is_active

__version__ = "0.2.0"
__all__ = [
    "Activity",
    "DeepseekV2Config",
    "DeepseekV2ForCausalLM",
    "DeepseekV2ForSequenceClassification",
    "DeepseekV2ForTokenClassification",
    "DeepseekV2Model",
    "DeepseekV2PreTrainedModel",
    "ExpertSelection",
    "LatentCache",
    "Optimized",
    "PromptCache",
    "RouterStatistics",
    "activity_of",
    "can_absorb",
    "expert_scores",
    "finish_training",
    "is_active",
    "load_experts",
    "lora_config",
    "optimize_for_inference",
    "pack_experts",
    "save_experts",
    "select_experts",
    "train_experts",
    "unpack_experts",
]

# names that are imported at their first use, and their modules; the TYPE_CHECKING block has the same
_MODULES = {
    "Activity": "finetuning.activity",
    "ExpertSelection": "finetuning.expert_selection",
    "Optimized": "kernels",
    "RouterStatistics": "finetuning.router_callback",
    "activity_of": "finetuning.activity",
    "can_absorb": "plugin_state",
    "expert_scores": "finetuning.expert_selection",
    "finish_training": "finetuning.esft",
    "is_active": "plugin_state",
    "load_experts": "finetuning.esft",
    "lora_config": "finetuning.lora",
    "optimize_for_inference": "kernels",
    "pack_experts": "finetuning.packing",
    "save_experts": "finetuning.esft",
    "select_experts": "finetuning.expert_selection",
    "train_experts": "finetuning.esft",
    "unpack_experts": "finetuning.packing",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_MODULES[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*__all__, *(name for name in globals() if name.startswith("__"))})


AutoConfig.register("deepseek_v2", DeepseekV2Config, exist_ok=True)
AutoConfig.register("deepseek", DeepseekFirstUploadConfig, exist_ok=True)
AutoModel.register(DeepseekV2Config, DeepseekV2Model, exist_ok=True)
AutoModelForCausalLM.register(DeepseekV2Config, DeepseekV2ForCausalLM, exist_ok=True)
AutoModelForSequenceClassification.register(DeepseekV2Config, DeepseekV2ForSequenceClassification, exist_ok=True)
AutoModelForTokenClassification.register(DeepseekV2Config, DeepseekV2ForTokenClassification, exist_ok=True)
take_native_configs(
    NativeConfig,
    {
        AutoModel: backbone_of_native_config(DeepseekV2Model),
        AutoModelForCausalLM: DeepseekV2ForCausalLM,
        AutoModelForSequenceClassification: DeepseekV2ForSequenceClassification,
        AutoModelForTokenClassification: DeepseekV2ForTokenClassification,
    },
)
put_into_transformers(
    DeepseekV2Config,
    DeepseekV2PreTrainedModel,
    DeepseekV2Model,
    DeepseekV2ForCausalLM,
    DeepseekV2ForSequenceClassification,
    DeepseekV2ForTokenClassification,
)
patch_base_config_reader(DeepseekV2Config)
# these import peft, which is a twentieth of our import time and has no hook that would let us defer this
prevent_target_renaming(DeepseekV2PreTrainedModel)
support_offloading(DeepseekV2PreTrainedModel, DeepseekV2Experts)
remove_refused_adapters(DeepseekV2PreTrainedModel)
correct_pattern_warnings(DeepseekV2PreTrainedModel)
describe_targets(DeepseekV2PreTrainedModel)
refuse_single_experts(DeepseekV2PreTrainedModel, DeepseekV2Experts)
support_several_processes(DeepseekV2PreTrainedModel)
register_implementation("device_limited", DeviceLimitedEP)
