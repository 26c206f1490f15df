"""What this package uses of the pages of transformers' continuous batching (5.17 to 5.24).

tests/compat/test_continuous_batching.py has a test for each entry.
"""

import functools
import inspect
from typing import Any

from torch import Tensor
from transformers.configuration_utils import PreTrainedConfig
from transformers.generation.continuous_batching import PagedAttentionCache


def update_pages(pages: PagedAttentionCache, rows: tuple[Tensor, Tensor], layer_idx: int, arguments: dict[str, Any]):
    """Writes two rows per new token and returns those of all visible tokens; `arguments` are the forward pass's own.

    5.17 and 5.18 take two of the arguments, later versions a dict of all, which they modify.
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


def tokens_in_all_pages(pages: PagedAttentionCache) -> int:
    """How many tokens of one request the pages can hold; 5.17 and 5.18 call it `num_pages`."""
    return pages.max_tokens_read if hasattr(pages, "max_tokens_read") else pages.num_pages


class Overlay:
    """Has the attributes of `original`, except for those that are replaced."""

    def __init__(self, original: Any, **replaced: Any):
        self._original = original
        vars(self).update(replaced)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._original, name)


def config_for_pages(config: PreTrainedConfig, heads: int, width: int) -> Any:
    """The config from which transformers lays out pages of two rows per token, each with `heads` heads of `width`.

    It names flash attention because that needs the same memory as our attention: no mask over all requests is built or
    reserved, and nothing is repeated per head when pages are read.
    """
    overlay = Overlay(config, num_key_value_heads=heads, head_dim=width, _attn_implementation="flash_attention_2")
    overlay.get_text_config = lambda *args, **kwargs: overlay
    return overlay
