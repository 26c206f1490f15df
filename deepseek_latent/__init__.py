"""DeepSeek-V2 for transformers, attending to compressed latents. Importing registers it with every Auto class."""

from .compat.tested_versions import warn_of_untested_versions  # noqa: F401  (says it now, before an import may fail)

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
from .compat.peft import adapt_offloaded, keep_targets_of
from .compat.transformers import lead_names_to
from .configuration_deepseek_v2 import DeepseekFirstUploadConfig, DeepseekV2Config
from .experts.routed import DeepseekV2Experts
from .finetuning.lora import lora_config
from .modeling_deepseek_v2 import (
    DeepseekV2ForCausalLM,
    DeepseekV2ForSequenceClassification,
    DeepseekV2ForTokenClassification,
    DeepseekV2Model,
    DeepseekV2PreTrainedModel,
)

__version__ = "0.1.0"
__all__ = [
    "DeepseekV2Config",
    "DeepseekV2ForCausalLM",
    "DeepseekV2ForSequenceClassification",
    "DeepseekV2ForTokenClassification",
    "DeepseekV2Model",
    "LatentCache",
    "PromptCache",
    "lora_config",
]

AutoConfig.register("deepseek_v2", DeepseekV2Config, exist_ok=True)
AutoConfig.register("deepseek", DeepseekFirstUploadConfig, exist_ok=True)
AutoModel.register(DeepseekV2Config, DeepseekV2Model, exist_ok=True)
AutoModelForCausalLM.register(DeepseekV2Config, DeepseekV2ForCausalLM, exist_ok=True)
AutoModelForSequenceClassification.register(DeepseekV2Config, DeepseekV2ForSequenceClassification, exist_ok=True)
AutoModelForTokenClassification.register(DeepseekV2Config, DeepseekV2ForTokenClassification, exist_ok=True)

lead_names_to(
    DeepseekV2Config,
    DeepseekV2PreTrainedModel,
    DeepseekV2Model,
    DeepseekV2ForCausalLM,
    DeepseekV2ForSequenceClassification,
    DeepseekV2ForTokenClassification,
)
keep_targets_of(DeepseekV2PreTrainedModel)
adapt_offloaded(DeepseekV2PreTrainedModel, DeepseekV2Experts)
