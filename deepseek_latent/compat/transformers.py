"""What this package uses of transformers beyond its documented interface, each thing once (transformers 5.17 to 5.24).

Every entry says what it is for, which versions have it and when it can be dropped. tests/compat/test_transformers.py
has a test for each, which fails when a release changes a name, a signature or a behavior, and says what changed and
which code uses it here.
"""

import functools
import re

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.configuration_utils import PreTrainedConfig
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.core_model_loading import WeightConverter
from transformers.generation import GenerationConfig, GenerationMixin, GenerationMode
from transformers.integrations.moe import _grouped_linear

from .bound_functions import is_equivalent_forward
from .cache_name import CACHE, with_both_cache_names, with_cache_named
from .torch import has_forward_hooks

# ---- Generation ------------------------------------------------------------------------------------------------------


class GenerationHooks(GenerationMixin):
    """generate() with both names of the cache, and with methods that decide which cache it makes.

    `_prepare_cache_for_generation` is the one place in GenerationMixin (5.17 to 5.24) that makes a default cache.
    TODO: drop it when transformers has a registry of default caches.
    """

    @functools.wraps(GenerationMixin.generate)
    def generate(self, *args, **kwargs):
        return with_both_cache_names(super().generate(*args, **with_cache_named(CACHE, kwargs)))

    def prepare_cache_settings(self, given: Cache | None, settings: GenerationConfig, mask: Tensor | None):
        """Returns the settings with which transformers makes a cache, unless the user has `given` one.

        `mask` [b t] covers the tokens in that cache and the new ones.
        """
        return settings

    def choose_cache(self, made: Cache, given: Cache | None, settings: GenerationConfig, mode: GenerationMode) -> Cache:
        """Returns the cache to generate with; `made` is the one that transformers would use."""
        return made

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, generation_mode, *args, **kwargs):
        given = model_kwargs.get(CACHE)
        settings = self.prepare_cache_settings(given, generation_config, model_kwargs.get("attention_mask"))
        super()._prepare_cache_for_generation(settings, model_kwargs, generation_mode, *args, **kwargs)
        if model_kwargs.get(CACHE) is not None:
            model_kwargs[CACHE] = self.choose_cache(model_kwargs[CACHE], given, generation_config, generation_mode)


def length_of_dropped_mask(settings: GenerationConfig) -> int:
    """The length of an all-ones mask that generate() has dropped; -1 if it dropped none.

    `_mask_length` is set since 5.19. With it, a prompt is checked against the cache that it continues.
    """
    return getattr(settings, "_mask_length", -1)


# ---- Names of implementations ----------------------------------------------------------------------------------------

_PAGED = "paged|"


def attention_name(config: PreTrainedConfig) -> str:
    """`attn_implementation` as the user set it, without the prefix that continuous batching puts before some names."""
    return config._attn_implementation.removeprefix(_PAGED)


def is_paged(config: PreTrainedConfig) -> bool:
    """Whether `attn_implementation` has the prefix of continuous batching, for which transformers makes no mask."""
    return config._attn_implementation.startswith(_PAGED)


def experts_name(config: PreTrainedConfig) -> str:
    """`experts_implementation` as the user set it."""
    return config._experts_implementation


def grouped_linear(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """Multiplies rows x [m in], sorted by expert, by weights [e out in]; an expert's rows end at `ends` [e].

    transformers (5.17 to 5.24) chooses between torch's grouped product and a fallback by device and dtype, also when
    compiled. In float64, which torch's product does not support, the fallback is called by name.
    TODO: use a public name when transformers has one.
    """
    if weight.dtype == torch.float64:
        return torch.ops.transformers.grouped_mm_fallback(x.to(weight.dtype), weight.transpose(1, 2), ends)
    return _grouped_linear(x, weight, ends)


# ---- Tensor parallelism ----------------------------------------------------------------------------------------------


def local_rows(linear: nn.Linear) -> Tensor | None:
    """The local rows of a weight that a plan for tensor parallelism splits by rows ("colwise"); None for other layers.

    Such a plan replaces `forward` by a function of transformers.distributed.tensor_parallel (5.17 to 5.24). Without
    gradients, that function multiplies by the local rows of the DTensor and does nothing else.
    """
    forward, weight = vars(linear).get("forward"), linear.weight
    if getattr(forward, "__module__", None) != "transformers.distributed.tensor_parallel" or torch.is_grad_enabled():
        return None
    closure = dict(zip(forward.__code__.co_freevars, (cell.cell_contents for cell in forward.__closure__)))
    style = closure.get("self")
    is_plain = (
        type(style).__name__ == "ColwiseParallel"
        and style.output_layouts.is_shard(-1)
        and linear.bias is None
        and not has_forward_hooks(linear)
        and is_equivalent_forward(linear, closure.get("original_forward"))
    )
    is_by_rows = is_plain and type(weight).__name__ == "DTensor" and [*weight.placements] == [weight.placements[0]]
    return weight.to_local() if is_by_rows and weight.placements[0].is_shard(0) else None


# ---- Loading and saving ----------------------------------------------------------------------------------------------


# set on a config between its loading for a pipeline and that of the model
_IN_PIPELINE = "_is_loaded_in_pipeline"


class RefusedInPipelineError(LookupError):
    """A refusal to load a checkpoint, which leaves `pipeline()` with its own message.

    After an OSError, ValueError, TypeError or RuntimeError, `pipeline()` goes on to the next class (5.17 to 5.24). For
    a checkpoint that brings its code, that is transformers' own class, which initializes at random what is missing.
    """


class ConfigHooks:
    """A base before PreTrainedConfig: marks a config that is loaded in a pipeline, for `LoadingHooks`."""

    @classmethod
    @functools.wraps(PreTrainedConfig.from_pretrained.__func__)
    def from_pretrained(cls, *args, **kwargs):
        loaded = super().from_pretrained(*args, **kwargs)
        # a pipeline names its task by this argument (5.17 to 5.24)
        if kwargs.get("_from_pipeline") is not None:
            setattr(loaded[0] if isinstance(loaded, tuple) else loaded, _IN_PIPELINE, True)
        return loaded


class LoadingHooks:
    """A base before PreTrainedModel: checks what a checkpoint lacks, keeps dtypes, and lets experts be dispatched."""

    # weights whose names end with one of these keep their file's dtype when a model is loaded in 16 bits
    keep_dtype_of_files: tuple[str, ...] = ()

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        # transformers would search the source of the module that defines the model for a decorator (5.17 to 5.24)
        return True

    def _get_dtype_plan(self, dtype: torch.dtype) -> dict[str, torch.dtype | None]:
        # None means no cast (5.17 to 5.24); `_keep_in_fp32_modules_strict` would also widen 16-bit weights
        if dtype not in (torch.float16, torch.bfloat16):
            return super()._get_dtype_plan(dtype)
        if getattr(self, "is_quantized", False):
            # a quantizer casts what it does not quantize to the parameter's dtype, whatever the plan says (5.24)
            for name, parameter in self.named_parameters():
                if name.endswith(self.keep_dtype_of_files):
                    parameter.data = parameter.data.float()
        return super()._get_dtype_plan(dtype) | dict.fromkeys(self.keep_dtype_of_files)

    def _resolve_parallel_plans(self, distributed_config):
        # transformers checks that experts can be divided, and not that heads can (5.24)
        heads, size = self.config.num_attention_heads, distributed_config.tp_size or 1
        if heads % size:
            raise ValueError(f"expected a tp_size that divides {heads} attention heads, got {size}; choose another.")
        return super()._resolve_parallel_plans(distributed_config)

    def check_loaded(self, missing: list[str], mismatched: list[tuple], errors: dict[str, str]) -> None:
        """May raise ValueError, given missing names, (name, shape in the file, shape here), and failed conversions."""

    def _adjust_missing_and_unexpected_keys(self, loading_info) -> None:
        # the last call before transformers initializes missing weights
        super()._adjust_missing_and_unexpected_keys(loading_info)
        missing, mismatched = sorted(loading_info.missing_keys), sorted(loading_info.mismatched_keys)
        errors, in_pipeline = dict(loading_info.conversion_errors), vars(self.config).pop(_IN_PIPELINE, False)
        try:
            self.check_loaded(missing, mismatched, errors)
        except ValueError as error:
            # transformers raises an error for these too, but in a `finally` that would hide this one
            loading_info.mismatched_keys, loading_info.conversion_errors = set(), {}
            if in_pipeline:
                raise RefusedInPipelineError(str(error)) from error
            raise

    def has_adapters_of_transformers(self) -> bool:
        """Whether transformers itself added adapters, so that it saves these alone."""
        return self._hf_peft_config_loaded


class CheckedConverter(WeightConverter):
    """A converter between files and the model with a check on the names found in files, before it merges them."""

    __slots__ = ()

    @classmethod
    def like(cls, known: WeightConverter) -> "CheckedConverter":
        """Makes a checked converter that does what a converter of transformers does."""
        return cls(known._original_source_patterns, known._original_target_patterns, operations=known.operations)

    def check_names(self, names_in_files: set[str], patterns: list[str], config: PreTrainedConfig) -> None:
        """May raise ValueError, given the names in files that become one parameter, and their patterns."""

    def convert(self, layer_name, model=None, config=None, hf_quantizer=None, loading_info=None):
        # `loading_info` is None while saving, when one tensor is split and no name can be missing
        if loading_info is not None:
            names_in_files = {name for names in self.layer_targets.values() for name in names}
            self.check_names(names_in_files, self.source_patterns, config)
        return super().convert(layer_name, model, config, hf_quantizer, loading_info)


def convert_files_of(model_class: type, converter_class: type[CheckedConverter], like: str) -> None:
    """Registers checked converters for the files of `model_class`, which do what those of model type `like` do.

    transformers has no converters for classes from outside, whose experts would then keep their initial values.
    """
    converters = [converter_class.like(known) for known in get_checkpoint_conversion_mapping(like)]
    register_checkpoint_conversion_mapping(model_class.__name__, converters, overwrite=True)


def reason_of(failed_conversion: str) -> str:
    """The error message, taken from the traceback of a failed conversion, after which transformers adds a line."""
    return failed_conversion.rpartition("\nError: ")[0].rpartition("\n")[2]


def failed_in_quantizer(failed_conversion: str) -> bool:
    """Whether a conversion failed because a quantizer could not quantize, or because a library is not installed.

    The added line names the operation: those that quantize are called `Bnb4bitQuantize`, `TorchAoQuantize` and so on.
    The line of the traceback before the message names the class of the error.
    """
    trace, _, added = failed_conversion.rpartition("\nError: ")
    operation = added.partition(" on tensors destined for ")[0]
    is_import_error = re.search(r"^(ImportError|ModuleNotFoundError): ", trace, re.MULTILINE) is not None
    return is_import_error or operation.endswith("Quantize")


def carries_its_code(config: PreTrainedConfig) -> bool:
    """Whether a config is registered for `trust_remote_code`, so that its `auto_map` names files saved beside it."""
    return config._auto_class is not None
