"""The cost and benefit of fewer bits per latent and of int8 weights: python -m benchmarks.fewer_bits

Quality is measured on the held-out text of the trained checkpoint examples/pydoc-tiny, with each format of the cache
and with int8 weights: the change of perplexity, and the KL divergence of the next-token distributions from those of the
unchanged model. Time is that of one decoded token of Lite-4 with a filled cache, in plain torch and with the kernels;
all variants are timed in turn in one process.
"""

import argparse
import json
import math
import statistics
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from deepseek_latent import LatentCache, optimize_for_inference
from deepseek_latent.attention.ops import UpProjection, absorbed_attention
from deepseek_latent.cache.format import CACHE_DTYPES
from deepseek_latent.cache.layer import LatentCacheLayer
from deepseek_latent.cache.segments import Latents, SplitSegment
from deepseek_latent.kernels.cpu.attention import attend_in_place
from examples.pydoc_text import BETWEEN_DOCUMENTS, WINDOW, encode

from .decode import decode
from .lite4 import build, filled, twin
from .machine import alternated, described, gemm_rate, read_bandwidth

CHECKPOINT = Path(__file__).parent.parent / "examples" / "pydoc-tiny"
EXACT = "as the model computes"


@torch.no_grad()
def log_probabilities(model: PreTrainedModel, ids: Tensor, cache_dtype: str | None) -> Tensor:
    """[b s-1 vocab] of the next token, in float32, the second half of each window read from the cache only."""
    cache, half = LatentCache(model.config, cache_dtype=cache_dtype), ids.shape[1] // 2
    parts = [model(part, cache=cache).logits for part in (ids[:, :half], ids[:, half:-1])]
    return torch.cat(parts, dim=1).float().log_softmax(dim=-1)


def quality() -> list[dict]:
    """Nats per token, change of perplexity and its standard error, mean KL divergence, for each cache_dtype."""
    model, in_int8 = (AutoModelForCausalLM.from_pretrained(CHECKPOINT) for _ in range(2))
    optimize_for_inference(in_int8, weights="int8")
    readers = {
        EXACT if cache_dtype is None else f"cache, {cache_dtype}": (model, cache_dtype) for cache_dtype in CACHE_DTYPES
    }
    readers["weights, int8"] = (in_int8, None)
    documents = (CHECKPOINT / "held_out.txt").read_text(encoding="utf-8").split(BETWEEN_DOCUMENTS)
    tokens = encode(AutoTokenizer.from_pretrained(CHECKPOINT), documents)
    windows = tokens[: len(tokens) // WINDOW * WINDOW].view(-1, WINDOW)
    nats, divergence = {name: [] for name in readers}, {name: [] for name in readers}
    for ids in windows.split(8):
        exact = log_probabilities(model, ids, None)
        for name, (reader, cache_dtype) in readers.items():
            rounded = exact if name == EXACT else log_probabilities(reader, ids, cache_dtype)
            nats[name].append(-rounded.gather(-1, ids[:, 1:, None]).flatten())
            divergence[name].append((exact.exp() * (exact - rounded)).sum(-1).flatten())
    nats, divergence = ({name: torch.cat(x) for name, x in each.items()} for each in (nats, divergence))
    rows = []
    for name in readers:
        difference = nats[name] - nats[EXACT]
        rows.append(
            {
                "what": name,
                "nats_per_token": round(nats[name].mean().item(), 5),
                "perplexity_change_percent": round(100 * math.expm1(difference.mean().item()), 4),
                "standard_error_percent": round(100 * difference.std().item() / len(difference) ** 0.5, 4),
                "mean_kl_nats": round(divergence[name].mean().item(), 7),
                "tokens": len(difference),
            }
        )
    return rows


def attention_error(attend, layer: LatentCacheLayer) -> float:
    """The relative error of attention that reads stored rows, against attention to their decoded values."""
    generator = torch.Generator().manual_seed(1)
    q_content, q_rotary, w_uk, w_uv = (
        torch.randn(shape, generator=generator) for shape in ((1, 1, 16, 128), (1, 1, 16, 64), *[(16, 128, 512)] * 2)
    )
    dense = Latents(SplitSegment(layer.keys[:, 0].float(), layer.values[:, 0].float()))
    actual, expected = (
        attend(q_content, q_rotary, latents, UpProjection(w_uk), UpProjection(w_uv), mask=None, scale=512**-0.5 / 16)
        for attend, latents in ((attend, layer.latents), (absorbed_attention, dense))
    )
    return relative(actual, expected)


def relative(actual: Tensor, expected: Tensor) -> float:
    return ((actual - expected).norm() / expected.norm()).item()


@torch.inference_mode()
def decoding(contexts: list[int], repetitions: int) -> list[dict]:
    """Milliseconds per token of Lite-4, and the ratio to the unquantized cache, per format and context."""
    plain, token, rows = build("ours"), torch.tensor([[17]]), []
    kernels = twin(plain)
    optimize_for_inference(kernels)
    models = {"plain": plain, "kernels": kernels}
    attention = {"plain": absorbed_attention, "kernels": attend_in_place}
    for context in contexts:
        caches = {cache_dtype: filled(plain, context, cache_dtype) for cache_dtype in CACHE_DTYPES}

        steps = {
            (side, cache_dtype): lambda model=model, cache=cache: decode(model, cache, token)
            for side, model in models.items()
            for cache_dtype, cache in caches.items()
        }
        logits = {case: step().float() for case, step in steps.items()}
        seconds = {case: statistics.median(x) for case, x in alternated(steps, repetitions).items()}
        for side, cache_dtype in steps:
            # correct before fast
            cache, change = caches[cache_dtype], relative(logits[side, cache_dtype], logits[side, None])
            error = attention_error(attention[side], cache.layers[0])
            assert error < 0.01, f"{side}: with {cache_dtype}, attention is off by {error}"
            rows.append(
                {
                    "context": context,
                    "side": side,
                    "cache_dtype": cache_dtype,
                    "bytes_per_token_and_layer": cache.nbytes // context // len(cache.layers),
                    "milliseconds": round(1e3 * seconds[side, cache_dtype], 2),
                    "ratio_to_unquantized": round(seconds[side, cache_dtype] / seconds[side, None], 3),
                    "attention_relative_error": round(error, 6),
                    "logits_relative_change_by_rounding": round(change, 5),
                }
            )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--contexts", type=int, nargs="*", default=[1024, 16384, 65536])
    parser.add_argument("--repetitions", type=int, default=9)
    parser.add_argument("--out", type=Path, help="also write the result here, as JSON")
    options = parser.parse_args()
    result = described("python -m benchmarks.fewer_bits") | {"quality": quality()}
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
