"""What fewer bits per latent cost and save: python -m benchmarks.quantised_cache

Quality is that of the trained checkpoint examples/pydoc-tiny on its held-out text, read through each kind of cache:
perplexity beside the cache as the model computes it, and how far the next-token distributions move (KL divergence).
Time is that of one decoded token of Lite-4 over a filled cache, all kinds in turn in one process.
"""

import argparse
import json
import math
import statistics
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from deepseek_latent import LatentCache
from deepseek_latent.latent_cache_layer import LatentCacheLayer
from deepseek_latent.latent_format import Latents, SeparateStretch
from deepseek_latent.latent_ops import UpProjection, absorbed_attention
from examples.pydoc_text import BETWEEN_DOCUMENTS, WINDOW, encode

from .lite4 import build
from .machine import alternated, described, gemm_rate, read_bandwidth

CHECKPOINT = Path(__file__).parent.parent / "examples" / "pydoc-tiny"
KINDS = (None, 8, 6, 5, 4, "fp8")


@torch.no_grad()
def log_probabilities(model: PreTrainedModel, ids: Tensor, bits: int | str | None) -> Tensor:
    """[b s-1 vocab] of the next token, in float32, the second half of each window read from the cache only."""
    cache, half = LatentCache(model.config, bits=bits), ids.shape[1] // 2
    parts = [model(part, past_key_values=cache).logits for part in (ids[:, :half], ids[:, half:-1])]
    return torch.cat(parts, dim=1).float().log_softmax(dim=-1)


def quality() -> list[dict]:
    """Per kind: nats per token, change of perplexity with its standard error, mean KL divergence from no rounding."""
    model = AutoModelForCausalLM.from_pretrained(CHECKPOINT)
    documents = (CHECKPOINT / "held_out.txt").read_text(encoding="utf-8").split(BETWEEN_DOCUMENTS)
    tokens = encode(AutoTokenizer.from_pretrained(CHECKPOINT), documents)
    windows = tokens[: len(tokens) // WINDOW * WINDOW].view(-1, WINDOW)
    nats, divergence = {bits: [] for bits in KINDS}, {bits: [] for bits in KINDS}
    for ids in windows.split(8):
        exact = log_probabilities(model, ids, None)
        for bits in KINDS:
            rounded = exact if bits is None else log_probabilities(model, ids, bits)
            nats[bits].append(-rounded.gather(-1, ids[:, 1:, None]).flatten())
            divergence[bits].append((exact.exp() * (exact - rounded)).sum(-1).flatten())
    nats, divergence = ({bits: torch.cat(x) for bits, x in each.items()} for each in (nats, divergence))
    rows = []
    for bits in KINDS:
        difference = nats[bits] - nats[None]
        rows.append(
            {
                "bits": bits,
                "nats_per_token": round(nats[bits].mean().item(), 5),
                "perplexity_change_percent": round(100 * math.expm1(difference.mean().item()), 4),
                "standard_error_percent": round(100 * difference.std().item() / len(difference) ** 0.5, 4),
                "mean_kl_nats": round(divergence[bits].mean().item(), 7),
                "tokens": len(difference),
            }
        )
    return rows


def filled(model: PreTrainedModel, tokens: int, bits: int | str | None) -> LatentCache:
    """A cache of random latents of unit variance, as after their norm."""
    config, cache = model.config, LatentCache(model.config, bits=bits)
    generator = torch.Generator().manual_seed(0)
    for first in range(0, tokens, 4096):
        shape = (1, 1, min(4096, tokens - first))
        for layer in range(config.num_hidden_layers):
            new = (torch.randn(*shape, width, generator=generator) for width in (config.kv_lora_rank, 64))
            cache.append(*(x.to(model.dtype) for x in new), layer)
    return cache


def attention_error(layer: LatentCacheLayer) -> float:
    """Of attention that reads the stored rows, against attention to what they stand for, rounded to bfloat16."""
    generator = torch.Generator().manual_seed(1)
    q_content, q_rotary, w_uk, w_uv = (
        torch.randn(shape, generator=generator) for shape in ((1, 1, 16, 128), (1, 1, 16, 64), *[(16, 128, 512)] * 2)
    )
    dense = Latents(SeparateStretch(layer.keys[:, 0].float(), layer.values[:, 0].float()))
    actual, expected = (
        absorbed_attention(
            q_content, q_rotary, latents, UpProjection(w_uk), UpProjection(w_uv), mask=None, scale=512**-0.5 / 16
        )
        for latents in (layer.latents, dense)
    )
    return relative(actual, expected)


def relative(actual: Tensor, expected: Tensor) -> float:
    return ((actual - expected).norm() / expected.norm()).item()


@torch.inference_mode()
def decoding(contexts: list[int], repetitions: int) -> list[dict]:
    """Milliseconds per token of Lite-4, and the ratio to the cache without bits, per kind and context."""
    model, rows = build("ours"), []
    token = torch.tensor([[17]])
    for context in contexts:
        caches = {bits: filled(model, context, bits) for bits in KINDS}

        def step(bits, caches=caches):
            logits = model(token, past_key_values=caches[bits]).logits
            caches[bits].crop(-1)
            return logits

        logits = {bits: step(bits).float() for bits in KINDS}
        seconds = {bits: statistics.median(x) for bits, x in alternated(
            {bits: lambda bits=bits: step(bits) for bits in KINDS}, repetitions
        ).items()}  # fmt: skip
        for bits in KINDS:
            # correct before fast
            error = attention_error(caches[bits].layers[0])
            assert error < 0.01, f"at {bits} bits attention is off by {error}"
            rows.append(
                {
                    "context": context,
                    "bits": bits,
                    "bytes_per_token_and_layer": caches[bits].nbytes // context // len(caches[bits].layers),
                    "milliseconds": round(1e3 * seconds[bits], 2),
                    "ratio_to_no_bits": round(seconds[bits] / seconds[None], 3),
                    "attention_relative_error": round(error, 6),
                    "logits_relative_change_by_rounding": round(relative(logits[bits], logits[None]), 5),
                }
            )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--contexts", type=int, nargs="*", default=[1024, 16384, 65536])
    parser.add_argument("--repetitions", type=int, default=9)
    parser.add_argument("--out", type=Path, help="also write the result here, as JSON")
    options = parser.parse_args()
    result = described("python -m benchmarks.quantised_cache") | {"quality": quality()}
    for row in result["quality"]:
        print(row)
    result |= {"read_bytes_per_second": read_bandwidth(), "float32_flop_per_second": gemm_rate()}
    result["decoding_lite4"] = decoding(options.contexts, options.repetitions)
    for row in result["decoding_lite4"]:
        print(row)
    if options.out:
        options.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
