"""A step is all or nothing: if a call of the model does not return, its cache holds the tokens that it held before."""

import functools
from collections.abc import Callable, Sequence
from itertools import compress
from typing import Any, NamedTuple

import torch
from transformers.cache_utils import Cache, DynamicLayer, StaticLayer

from .layer import LatentCacheLayer

# the attribute of a cache, which may be one of transformers, with the beginning of its last step
BEGINNING = "beginning_of_step"


class Beginning(NamedTuple):
    """What a cache held when a step began; `dtype` is None if its layers had not been filled yet."""

    num_tokens: int
    dtype: torch.dtype | None
    has_graph: bool  # whether the rows held belong to a graph of autograd


class Broken(NamedTuple):
    """A cache that cannot take back the tokens of a step that failed."""

    layer: str


def begin_step(cache: Cache, is_here: Sequence[bool], num_tokens: int | None) -> None:
    """Notes that a step begins, before its first layer writes to a cache of `num_tokens` tokens.

    `is_here` is True for the layers that this process fills. A recorded step, with None tokens, is counted on the
    device (`TokenCount`).
    """
    if num_tokens is None:
        return
    earlier = getattr(cache, BEGINNING, None)
    # a cache that was reset since is empty
    if isinstance(earlier, Broken) and num_tokens:
        raise ValueError(
            f"a step over this cache was interrupted, and {earlier.layer} cannot remove its tokens; use a fresh cache."
        )
    first, dtype, has_graph = next(compress(cache.layers, is_here), None), None, False
    if first is not None and first.is_initialized:
        if isinstance(first, LatentCacheLayer):
            dtype, has_graph = first.dtype, first.has_graph
        elif first.keys is not None:
            dtype = first.keys.dtype
    setattr(cache, BEGINNING, Beginning(num_tokens, dtype, has_graph))


def all_or_nothing(call: Callable) -> Callable:
    """Makes a call of a model, such as its `forward`, take back the tokens of a step that it began and did not finish.

    Calls may be nested, and each takes back what is left to take back; so the outermost one decides.
    """

    @functools.wraps(call)
    def whole(self, *args, **kwargs):
        # a compiled step counts its tokens when it ends; see `TokenCount`
        cache = None if torch.compiler.is_compiling() else _cache_among(args, kwargs)
        if cache is None:
            return call(self, *args, **kwargs)
        earlier = getattr(cache, BEGINNING, None)
        try:
            return call(self, *args, **kwargs)
        except BaseException:
            if getattr(cache, BEGINNING, None) is not earlier:
                take_back(cache)
            raise

    return whole


def take_back(cache: Cache) -> None:
    """Removes the tokens of the last step that began."""
    beginning = getattr(cache, BEGINNING)
    if isinstance(beginning, Broken):
        return
    for layer in cache.layers:
        if isinstance(layer, LatentCacheLayer):
            layer.take_back(*beginning)
        elif type(layer) in (DynamicLayer, StaticLayer):
            _take_back_in_plain_layer(layer, beginning)
        elif int(layer.get_seq_length()) > beginning.num_tokens:
            setattr(cache, BEGINNING, Broken(type(layer).__name__))
            return
    if beginning.dtype is None and cache.layer_class_to_replicate is not None:
        # such a cache adds its layers as they are first filled
        cache.layers.clear()
    if cache.offloading and cache.layers:
        # the next step expects its first layer here
        cache.layers[0].prefetch()


def _take_back_in_plain_layer(layer: DynamicLayer | StaticLayer, beginning: Beginning) -> None:
    if type(layer) is StaticLayer:
        layer.cumulative_length.fill_(beginning.num_tokens)
    if beginning.dtype is None:
        # another batch may come next
        layer.keys = layer.values = None
        layer.is_initialized = False
    elif type(layer) is DynamicLayer and layer.is_initialized:
        kept = (x[..., : beginning.num_tokens, :].to(beginning.dtype) for x in (layer.keys, layer.values))
        layer.keys, layer.values = kept


def _cache_among(args: tuple, kwargs: dict[str, Any]) -> Cache | None:
    return next((x for x in (*kwargs.values(), *args) if isinstance(x, Cache)), None)
