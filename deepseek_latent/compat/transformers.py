"""What this package leans on in transformers without a promise from its documentation, each thing once.

Every entry says what it is for, which versions have it and what ends it. tests/compat/test_canaries.py holds a canary
for each: a test that fails, naming what moved and who uses it here, when a release changes a name, a signature or a
behavior.
"""

import functools
import inspect
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.configuration_utils import PreTrainedConfig
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.core_model_loading import WeightConverter
from transformers.generation import GenerationConfig, GenerationMixin, GenerationMode
from transformers.generation.continuous_batching import PagedAttentionCache
from transformers.integrations.moe import _grouped_linear

from .bound_functions import is_equivalent_forward
from .cache_name import CACHE, answering_to_both, with_cache_named
from .torch import has_forward_hooks

# ---- The names of classes --------------------------------------------------------------------------------------------


def lead_names_to(*model_classes: type) -> None:
    """Has `transformers.NAME` be these classes for whoever asks by the name in `config.architectures`.

    So do TRL's trainers where they are given a model id, the reference models that they make for themselves, pipelines
    and `transformers serve`; Auto classes have a registry of their own. The modules of transformers stay as they are.

    transformers puts a second module in its own place when it imports its processors (5.17 to 5.24), and whoever has
    imported the first one keeps it.
    """
    kept = [vars(module).get("transformers") for module in [*sys.modules.values()] if isinstance(module, ModuleType)]
    for module in {id(x): x for x in (*kept, sys.modules["transformers"])}.values():
        if isinstance(module, ModuleType) and module.__name__ == "transformers":
            for model_class in model_classes:
                setattr(module, model_class.__name__, model_class)


# ---- Generation ------------------------------------------------------------------------------------------------------


class GenerationHooks(GenerationMixin):
    """generate() under both names of the cache, and with a say in which cache it makes.

    `_prepare_cache_for_generation` is the one place of GenerationMixin (5.17 to 5.24) where a default cache is made.
    TODO: drop it when transformers has a registry of default caches.
    """

    @functools.wraps(GenerationMixin.generate)
    def generate(self, *args, **kwargs):
        return answering_to_both(super().generate(*args, **with_cache_named(CACHE, kwargs)))

    def settings_for_cache(self, given: Cache | None, settings: GenerationConfig, mask: Tensor | None):
        """The settings by which transformers is to make a cache; `given` is that of the user, `mask` [b t] of both."""
        return settings

    def cache_to_use(self, made: Cache, given: Cache | None, settings: GenerationConfig, mode: GenerationMode) -> Cache:
        """The cache to generate with, where `made` is what transformers would take."""
        return made

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, generation_mode, *args, **kwargs):
        given = model_kwargs.get(CACHE)
        settings = self.settings_for_cache(given, generation_config, model_kwargs.get("attention_mask"))
        super()._prepare_cache_for_generation(settings, model_kwargs, generation_mode, *args, **kwargs)
        if model_kwargs.get(CACHE) is not None:
            model_kwargs[CACHE] = self.cache_to_use(model_kwargs[CACHE], given, generation_config, generation_mode)


def length_of_dropped_mask(settings: GenerationConfig) -> int:
    """How long the mask of ones was that generate() has dropped; -1 where it dropped none.

    `_mask_length` is noted since 5.19. Used to judge a prompt beside the cache that it continues.
    """
    return getattr(settings, "_mask_length", -1)


# ---- Continuous batching ---------------------------------------------------------------------------------------------


def update_pages(pages: PagedAttentionCache, rows: tuple[Tensor, Tensor], layer_idx: int, arguments: dict[str, Any]):
    """Writes two rows per token and reads all visible ones; `arguments` are those of the forward pass.

    5.17 and 5.18 take two of the arguments, later versions all of them in a dict that they change.
    TODO: drop the first form when transformers >= 5.19 is required.
    """
    if _pages_take_all_arguments():
        given = {"kwargs": dict(arguments)}
    else:
        given = {name: arguments[name] for name in ("read_index", "write_index")}
    return pages.update(key_states=rows[0], value_states=rows[1], layer_idx=layer_idx, **given)


@functools.cache
def _pages_take_all_arguments() -> bool:
    return "kwargs" in inspect.signature(PagedAttentionCache.update).parameters


class _Seen:
    """`original` as another sees it: the same, except for `differences`."""

    def __init__(self, original: Any, **differences: Any):
        self._original = original
        vars(self).update(differences)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._original, name)


def config_for_pages(config: PreTrainedConfig, heads: int, width: int) -> Any:
    """The config by which transformers lays out pages of two rows per token, each of `heads` heads of that width.

    Flash is named because it costs what we cost: no mask over all requests is built or reserved, and nothing is
    repeated per head when it is read.
    """
    seen = _Seen(config, num_key_value_heads=heads, head_dim=width, _attn_implementation="flash_attention_2")
    seen.get_text_config = lambda *args, **kwargs: seen
    return seen


def with_pages_for(manager: Any, config_of_pages: Callable[[PreTrainedConfig], Any]) -> Any:
    """Has `manager`, a ContinuousBatchingManager, lay out its pages by another config than its model's; returns it.

    A manager has no argument for that (5.17 to 5.24) and asks its model.
    TODO: drop it when a manager takes the layout of its pages.
    """
    # a manager that is kept for the next session comes by again
    if "_create_batch_processor" in vars(manager):
        return manager
    create = manager._create_batch_processor

    def create_with_other_pages() -> Any:
        model = manager.model
        manager.model = _Seen(model, config=config_of_pages(model.config))
        try:
            return create()
        finally:
            manager.model = model

    manager._create_batch_processor = create_with_other_pages
    return manager


# ---- Names of implementations ----------------------------------------------------------------------------------------

_PAGED = "paged|"


def attention_name(config: PreTrainedConfig) -> str:
    """`attn_implementation` as it was asked for, without what continuous batching writes before some names."""
    return config._attn_implementation.removeprefix(_PAGED)


def is_paged(config: PreTrainedConfig) -> bool:
    """Whether attention goes by a name of continuous batching, for which transformers makes no mask."""
    return config._attn_implementation.startswith(_PAGED)


def experts_name(config: PreTrainedConfig) -> str:
    """`experts_implementation` as it was asked for."""
    return config._experts_implementation


def grouped_linear(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """Rows [m in] times the weights [e out in] of their experts, whose rows end at `ends` [e]; in 5.17 to 5.24.

    It chooses between torch's grouped product and a fallback by device and dtype, also when compiled. The fallback is
    asked for by name in float64, which torch's product does not take.
    TODO: take a public name when transformers has one.
    """
    if weight.dtype == torch.float64:
        return torch.ops.transformers.grouped_mm_fallback(x.to(weight.dtype), weight.transpose(1, 2), ends)
    return _grouped_linear(x, weight, ends)


# ---- Tensor parallelism ----------------------------------------------------------------------------------------------


def local_rows(linear: nn.Linear) -> Tensor | None:
    """This process' rows of a weight that a plan splits by rows ("colwise"), where a call applies just these.

    A plan replaces `forward` by a function of transformers.distributed.tensor_parallel (5.17 to 5.24), which without
    gradients multiplies by the local rows of the DTensor. None for every other layer.
    """
    forward, weight = vars(linear).get("forward"), linear.weight
    if getattr(forward, "__module__", None) != "transformers.distributed.tensor_parallel" or torch.is_grad_enabled():
        return None
    kept = dict(zip(forward.__code__.co_freevars, (cell.cell_contents for cell in forward.__closure__)))
    style = kept.get("self")
    is_plain = (
        type(style).__name__ == "ColwiseParallel"
        and style.output_layouts.is_shard(-1)
        and linear.bias is None
        and not has_forward_hooks(linear)
        and is_equivalent_forward(linear, kept.get("original_forward"))
    )
    is_by_rows = is_plain and type(weight).__name__ == "DTensor" and [*weight.placements] == [weight.placements[0]]
    return weight.to_local() if is_by_rows and weight.placements[0].is_shard(0) else None


# ---- Loading and saving ----------------------------------------------------------------------------------------------


class LoadingHooks:
    """Before PreTrainedModel: a say in what a checkpoint may lack, in dtypes, and experts that can be dispatched."""

    # of weights of these names, the dtype that a file has is kept where others are loaded in 16 bits
    dtype_of_files: tuple[str, ...] = ()

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        # transformers would look for a decorator in the text of the module that defines the model (5.17 to 5.24)
        return True

    def _get_dtype_plan(self, dtype: torch.dtype) -> dict[str, torch.dtype | None]:
        # None casts nothing (5.17 to 5.24); `_keep_in_fp32_modules_strict` would also widen what is in 16 bits
        if dtype not in (torch.float16, torch.bfloat16):
            return super()._get_dtype_plan(dtype)
        if getattr(self, "is_quantized", False):
            # a quantizer casts what it leaves alone to the dtype of the parameter, whatever the plan says (5.24)
            for name, parameter in self.named_parameters():
                if name.endswith(self.dtype_of_files):
                    parameter.data = parameter.data.float()
        return super()._get_dtype_plan(dtype) | dict.fromkeys(self.dtype_of_files)

    def check_loaded(self, missing: list[str], misshapen: list[tuple], errors: dict[str, str]) -> None:
        """May raise ValueError; by name, what no file had, (name, shape there, shape here), and failed conversions."""

    def _adjust_missing_and_unexpected_keys(self, loading_info) -> None:
        # the last place before transformers initialises what is missing
        super()._adjust_missing_and_unexpected_keys(loading_info)
        missing, misshapen = sorted(loading_info.missing_keys), sorted(loading_info.mismatched_keys)
        errors = dict(loading_info.conversion_errors)
        try:
            self.check_loaded(missing, misshapen, errors)
        except ValueError:
            # transformers raises on these too, but in a `finally` that would hide the names
            loading_info.mismatched_keys, loading_info.conversion_errors = set(), {}
            raise

    def has_adapters_of_transformers(self) -> bool:
        """Whether adapters were added by transformers itself, so that saving writes these alone."""
        return self._hf_peft_config_loaded


class CheckedConverter(WeightConverter):
    """A converter between files and the model that is told which names it found before it merges them."""

    __slots__ = ()

    @classmethod
    def like(cls, known: WeightConverter) -> "CheckedConverter":
        return cls(known._original_source_patterns, known._original_target_patterns, operations=known.operations)

    def check_names(self, came: set[str], patterns: list[str], config: PreTrainedConfig) -> None:
        """May raise ValueError; the names in the files that are to become one parameter, and their patterns."""

    def convert(self, layer_name, model=None, config=None, hf_quantizer=None, loading_info=None):
        # None while saving, when one tensor is split and there is nothing to check
        if loading_info is not None:
            came = {name for names in self.layer_targets.values() for name in names}
            self.check_names(came, self.source_patterns, config)
        return super().convert(layer_name, model, config, hf_quantizer, loading_info)


def convert_files_of(model_class: type, converter_class: type[CheckedConverter], like: str) -> None:
    """Has transformers convert the files of `model_class` as those of model type `like`, with checks.

    It leaves classes from outside alone, which would then keep initial values.
    """
    converters = [converter_class.like(known) for known in get_checkpoint_conversion_mapping(like)]
    register_checkpoint_conversion_mapping(model_class.__name__, converters, overwrite=True)


def reason_of(failed_conversion: str) -> str:
    """What torch said, out of the traceback that transformers keeps of a failed conversion and adds a line to."""
    return failed_conversion.rpartition("\nError: ")[0].rpartition("\n")[2]


def carries_its_code(config: PreTrainedConfig) -> bool:
    """Whether a config was registered for `trust_remote_code`, so that `auto_map` names files saved beside it."""
    return config._auto_class is not None
