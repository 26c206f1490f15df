"""`attn_implementation="flash_attention_2"`: prompts are given to flash-attn as it takes them.

flash-attn runs on GPUs only. Functions with its signatures stand in for it; they refuse what it refuses, heads whose
queries and values differ in width.
"""

import functools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import modeling_flash_attention_utils as flash_attention

from deepseek_latent import DeepseekV2ForCausalLM, LatentCache
from tests.support import LITE, random_ids, relative_error, tiny_model

both_models = pytest.mark.parametrize("fields", [{}, LITE], ids=["V2", "Lite"])


def flash_attn_func(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False):  # [b s h w], [b t h w]
    assert q.shape[-1] == k.shape[-1] == v.shape[-1]
    s, t = q.shape[1], k.shape[1]
    # flash-attn aligns its causal mask with the last key
    mask = torch.ones(s, t, dtype=torch.bool).tril(t - s) if causal else None
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=softmax_scale).transpose(1, 2)


def flash_attn_varlen_func(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None, causal=False
):  # [s h w], [t h w]
    lengths_q, lengths_k = (x.diff().tolist() for x in (cu_seqlens_q, cu_seqlens_k))
    assert (max_seqlen_q, max_seqlen_k) == (max(lengths_q), max(lengths_k))
    sequences = zip(q.split(lengths_q), k.split(lengths_k), v.split(lengths_k), strict=True)
    options = {"softmax_scale": softmax_scale, "causal": causal}
    return torch.cat([flash_attn_func(*(x[None] for x in sequence), **options)[0] for sequence in sequences])


@pytest.fixture
def flash_attn(monkeypatch) -> list[str]:
    """Puts the functions above in place of flash-attn, and returns the list of their calls."""
    calls = []

    def counted(function):
        @functools.wraps(function)
        def count(*args, **options):
            calls.append(function.__name__)
            return function(*args, **options)

        return count

    functions = [counted(flash_attn_func), counted(flash_attn_varlen_func)]
    found = (*functions, None, flash_attention._pad_input, flash_attention._unpad_input)
    # transformers keeps what it has imported
    monkeypatch.setattr(flash_attention, "_loaded_implementation", None)
    monkeypatch.setattr(flash_attention, "_lazy_imports", lambda *args, **options: found)
    return calls


def model_pair(fields: dict) -> tuple[DeepseekV2ForCausalLM, DeepseekV2ForCausalLM]:
    """The same model with flash_attention_2, which `from_pretrained` refuses without flash-attn, and with sdpa."""
    flash, sdpa = tiny_model(**fields), tiny_model(**fields)
    flash.config._attn_implementation = "flash_attention_2"
    return flash, sdpa


@both_models
@pytest.mark.parametrize("padding", [None, "left", "right"])
def test_a_prompt_has_the_logits_of_sdpa(fields, padding, flash_attn):
    flash, sdpa = model_pair(fields)
    ids, mask = random_ids(3, 12), torch.ones(3, 12, dtype=torch.long)
    if padding is not None:
        mask[0, :5] = mask[1, :2] = 0
    mask = mask.flip(1) if padding == "right" else mask
    found, expected = (model(ids, attention_mask=mask).logits[mask.bool()] for model in (flash, sdpa))
    assert relative_error(found, expected) < 1e-5
    assert set(flash_attn) == {"flash_attn_func" if padding is None else "flash_attn_varlen_func"}


@both_models
def test_packed_sequences_do_not_see_each_other(fields, flash_attn):
    flash, sdpa = model_pair(fields)
    ids, lengths = random_ids(1, 12), [5, 7]
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    found = flash(ids, position_ids=positions).logits
    expected = torch.cat([sdpa(part).logits for part in ids.split(lengths, dim=1)], dim=1)
    assert relative_error(found, expected) < 1e-5
    assert set(flash_attn) == {"flash_attn_varlen_func"}


@both_models
@pytest.mark.parametrize("make", [lambda config: None, LatentCache], ids=["default", "latent"])
def test_generated_tokens_are_those_of_sdpa_and_are_decoded_from_latents(fields, make, flash_attn):
    flash, sdpa = model_pair(fields)
    ids, mask = random_ids(3, 12), torch.ones(3, 12, dtype=torch.long)
    mask[0, :5] = 0
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}

    def tokens(model: DeepseekV2ForCausalLM) -> Tensor:
        return model.generate(ids, attention_mask=mask, past_key_values=make(model.config), **options)

    assert torch.equal(tokens(flash), tokens(sdpa))
    # one call per layer, for the prompt
    assert len(flash_attn) == flash.config.num_hidden_layers


@both_models
def test_a_chunk_after_cached_tokens_has_the_logits_of_sdpa(fields, flash_attn):
    flash, sdpa = model_pair(fields)
    ids = random_ids(2, 12)
    with torch.no_grad():
        caches = {model: LatentCache(model.config) for model in (flash, sdpa)}
        for model, cache in caches.items():
            model(ids[:, :6], past_key_values=cache)
        found, expected = (model(ids[:, 6:], past_key_values=cache).logits for model, cache in caches.items())
    assert relative_error(found, expected) < 1e-5
    assert len(flash_attn) == 2 * flash.config.num_hidden_layers
