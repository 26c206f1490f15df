"""How `generate()` handles latents: the cache that it makes, what it refuses, and inputs that it would misread."""

import contextlib
import copy
import functools
from collections.abc import Callable

import torch.nn.functional as F
from transformers.cache_utils import DynamicCache, QuantizedCache, StaticCache
from transformers.generation import GenerationConfig, GenerationMode
from transformers.masking_utils import create_masks_for_generate
from transformers.utils import ModelOutput

from .cache.batching import as_prompts, check_batching_config, check_outputs, with_latent_pages
from .cache.checks import check_batch_of_ids, check_capacity
from .cache.format import NUMBERS_OF_BITS, check_cache_dtype
from .cache.generation_checks import (
    check_cache_for_generation,
    check_mask_of_prompt,
    check_starts_with_stored_tokens,
    num_tokens_to_hold,
)
from .cache.latent_cache import LatentCache, check_offloading
from .compat.cache_name import CACHE, CACHE_NAMES, takes_either_cache_name
from .compat.transformers import GenerationHooks


class LatentGenerationMixin(GenerationHooks):
    """transformers' generation, which uses a `LatentCache` unless the user asks for another cache."""

    # the class that captures and replays decoding steps; set by `optimize_for_inference(model, graphs=True)`
    replayed_steps: type | None = None

    @functools.wraps(GenerationHooks.generate)
    def generate(self, inputs=None, *args, **kwargs):
        ids = kwargs.get("input_ids", inputs)
        # with embeddings, ids may be empty
        if ids is not None and kwargs.get("inputs_embeds") is None:
            check_batch_of_ids(ids)
        return super().generate(inputs, *args, **kwargs)

    @takes_either_cache_name
    def prepare_inputs_for_generation(
        self,
        input_ids,
        next_sequence_length=None,
        cache=None,
        attention_mask=None,
        inputs_embeds=None,
        is_first_iteration=False,
        **kwargs,
    ):
        # only in the first step: in later ones, which may be replayed, reading the length would wait for the device
        held = 0 if cache is None or not is_first_iteration else cache.get_seq_length()
        if is_first_iteration and next_sequence_length is None and input_ids.shape[1] > held > 0:
            # assisted decoding passes the whole prompt even if a prefix is cached; the length of the mask or, if an
            # all-ones mask was dropped, the last position gives the total number of tokens
            positions = kwargs.get("position_ids")
            if attention_mask is not None:
                num_tokens = attention_mask.shape[1]
            else:
                num_tokens = None if positions is None else int(positions[0, -1]) + 1
            if num_tokens == input_ids.shape[1]:
                next_sequence_length = num_tokens - int(held)
        if is_first_iteration and held and next_sequence_length == input_ids.shape[1] - held:
            check_starts_with_stored_tokens(cache, input_ids)
        inputs = super().prepare_inputs_for_generation(
            input_ids,
            next_sequence_length=next_sequence_length,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            is_first_iteration=is_first_iteration,
            **{CACHE: cache},
            **kwargs,
        )
        if is_first_iteration and not held and attention_mask is not None and attention_mask.dim() == 2:
            tokens = inputs["input_ids"] if inputs.get("inputs_embeds") is None else inputs["inputs_embeds"]
            check_mask_of_prompt(attention_mask, tokens.shape[1])
        # peft 0.21 looks up the old name to see whether a learned prompt is already in the cache
        return inputs | {name: inputs[CACHE] for name in CACHE_NAMES if CACHE in inputs}

    def prepare_cache_settings(self, given, settings, mask):
        settings = copy.copy(settings)
        if given is not None:
            check_cache_for_generation(given, settings, mask)
            if settings.is_assistant:
                # an assistant passes its cache again with the settings that made it, and transformers refuses both
                settings.cache_implementation = settings.cache_config = None
        # an assistant drafts a few tokens per call, too few to capture a graph for them
        replays = self.replayed_steps is not None and not settings.is_assistant
        if replays and given is None and settings.cache_implementation is None:
            settings.cache_implementation = "static"
        wanted = settings.cache_implementation
        if wanted is not None and wanted.startswith("offloaded"):
            check_offloading()
        if wanted is not None and wanted.startswith("static"):
            settings.max_cache_len = max(settings.max_cache_len or 0, num_tokens_to_hold(settings))
        is_quantized = _requested_cache_dtype(settings) is not None
        if is_quantized and given is None and settings.cache_implementation == "quantized":
            # transformers then makes its default cache, which `choose_cache` replaces by ours
            settings.cache_implementation = None
        return settings

    def choose_cache(self, made, given, settings, mode):
        if isinstance(made, QuantizedCache) and mode == GenerationMode.ASSISTED_GENERATION:
            raise ValueError(
                "assisted decoding and prompt lookup remove tokens from the cache, which a QuantizedCache cannot do; "
                'use cache_config={"backend": "latent", "cache_dtype": "int8"}.'
            )
        if given is None and type(made) is StaticCache and not made.offloading:
            capacity = made.layers[0].max_cache_len
            return LatentCache(self.config, cache_dtype=_requested_cache_dtype(settings), max_cache_len=capacity)
        if given is not None or type(made) is not DynamicCache:
            return made
        return LatentCache(self.config, offloading=made.offloading, cache_dtype=_requested_cache_dtype(settings))

    def create_masks_for_generate(self, attention_mask, **kwargs):
        """Makes the mask of a step over a compileable cache; over a `LatentCache`, `forward` makes it."""
        if any(isinstance(kwargs.get(name), LatentCache) for name in CACHE_NAMES):
            return attention_mask
        return create_masks_for_generate(attention_mask=attention_mask, **kwargs)

    def get_compiled_call(self, compile_config):
        """Returns the `forward` that `generate()` calls after the prompt if the cache is compileable."""
        if self.replayed_steps is None:
            return functools.partial(_call_with_fixed_shapes, super().get_compiled_call(compile_config))
        steps = self.replayed_steps(self)
        return lambda **inputs: _call_with_fixed_shapes(steps, **inputs) if steps.supports(inputs) else self(**inputs)

    def init_continuous_batching(self, generation_config=None, continuous_batching_config=None, *args, **kwargs):
        """As in transformers, with pages that store each latent and rotary key once; `generate_batch` calls it too."""
        check_batching_config(continuous_batching_config)
        manager = super().init_continuous_batching(generation_config, continuous_batching_config, *args, **kwargs)
        return with_latent_pages(manager)

    @contextlib.contextmanager
    def continuous_batching_context_manager(self, *args, **kwargs):
        """As in transformers, but an interrupt does not wait for the requests that are left."""
        with super().continuous_batching_context_manager(*args, **kwargs) as manager:
            try:
                yield manager
            except KeyboardInterrupt:
                manager.stop(hard_stop=True)
                raise

    @functools.wraps(GenerationHooks.generate_batch)
    def generate_batch(self, inputs, generation_config=None, *args, **kwargs):
        # a prompt that is refused or fails has the reason as the `error` of its output; the others are not concerned
        inputs = as_prompts(inputs)
        outputs = super().generate_batch(inputs, generation_config, *args, **kwargs)
        settings = self.generation_config if generation_config is None else generation_config
        check_outputs(outputs, len(inputs), settings.num_return_sequences or 1)
        errors = [output.error for output in outputs.values() if output.error is not None]
        if errors and kwargs.get("cache_implementation") == "paged":
            # generate() called this, and returns one tensor, which has no place for errors
            raise ValueError(errors[0])
        return outputs


def _call_with_fixed_shapes(step: Callable[..., ModelOutput], **inputs) -> ModelOutput:
    """Calls a compiled or replayed `step` with inputs whose shapes do not change while a static `LatentCache` fills."""
    cache = inputs.get(CACHE)
    if not isinstance(cache, LatentCache):
        return step(**inputs)
    ids, mask = inputs["input_ids"], inputs.get("attention_mask")
    check_capacity(cache.max_cache_len, cache.get_seq_length() + ids.shape[1])
    if mask is not None and mask.dim() == 2:
        inputs["attention_mask"] = F.pad(mask, (0, cache.max_cache_len - mask.shape[1]), value=1)
    cache.count.to_device(ids.device)
    try:
        output = step(**inputs)
    except BaseException:
        cache.count.undo()
        raise
    cache.count.advance_on_host(ids.shape[1])
    return output


def _requested_cache_dtype(settings: GenerationConfig) -> str | None:
    """The dtype that `cache_config` asks for, as in {"backend": "latent", "cache_dtype": "int6"}.

    It is None if another backend is named, for which transformers makes its own quantized cache.
    """
    cache_implementation, cache_config = settings.cache_implementation, settings.cache_config
    if settings.is_assistant and cache_implementation is None and cache_config is not None:
        # since 5.24, transformers removes one of the two from an assistant's copy of the settings
        cache_implementation = "quantized"
    backend = None if cache_config is None else cache_config.get("backend")
    if backend is None and (cache_implementation == "quantized" or cache_config):
        # transformers' default is quanto, another package; without "quantized" it would not read the config at all
        what = 'cache_implementation="quantized"' if cache_implementation == "quantized" else "cache_config"
        raise ValueError(
            f'{what} needs a backend, such as cache_config={{"backend": "latent", "cache_dtype": "int8"}}.'
        )
    if backend != "latent":
        return None
    if cache_implementation not in ("quantized", "static"):
        raise ValueError(
            f'the latent backend needs cache_implementation="quantized" or "static", got {cache_implementation!r}.'
        )
    if cache_config.keys() != {"backend", "cache_dtype"} or cache_config["cache_dtype"] is None:
        number = next((name for name in NUMBERS_OF_BITS if name in cache_config), None)
        instead = "takes" if number is None else f"takes cache_dtype in place of {number}, as in"
        example = '{"backend": "latent", "cache_dtype": "int8"}'
        raise ValueError(f"the latent backend {instead} {example}, got {cache_config}.")
    check_cache_dtype(cache_config["cache_dtype"])
    return cache_config["cache_dtype"]
