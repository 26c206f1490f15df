"""Time to first token with and without a stored prompt: python examples/prompt_cache.py [MODEL | lite4]

A long prompt is read once and stored. Then a second prompt, with the same prefix and another question at its end, is
answered twice: with an empty cache and with the stored one. `lite4` is the model of the benchmarks, with V2-Lite's
widths, 4 layers and random weights; any other MODEL is a folder or hub id.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.lite4 import build
from benchmarks.machine import described
from deepseek_latent import LatentCache, PromptCache

HERE = Path(__file__).parent
QUESTION = 16  # tokens at the end that differ between the prompts


def first_logits(model: PreTrainedModel, ids: Tensor, cache: LatentCache) -> Tensor:
    """[vocab] of the first new token, as generate() computes them."""
    output = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        cache=cache,
        max_new_tokens=1,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return output.logits[0][0].float()


def measure(model: PreTrainedModel, prompt_tokens: int, folder: str) -> dict:
    generator = torch.Generator().manual_seed(0)
    shared = torch.randint(3, model.config.vocab_size, (1, prompt_tokens - QUESTION), generator=generator)
    questions = torch.randint(3, model.config.vocab_size, (2, QUESTION), generator=generator)
    first, second = (torch.cat((shared, question[None]), dim=1) for question in questions)
    prompts = PromptCache(folder, max_bytes=2**30)

    cache = LatentCache(model.config)
    first_logits(model, first, cache)
    start = time.perf_counter()
    prompts.store(cache, first, model)
    storing = time.perf_counter() - start

    start = time.perf_counter()
    expected = first_logits(model, second, LatentCache(model.config))
    without = time.perf_counter() - start

    start = time.perf_counter()
    cache = prompts.load(second, model)
    loading = time.perf_counter() - start
    found = cache.get_seq_length()
    actual = first_logits(model, second, cache)
    with_stored = time.perf_counter() - start

    error = ((actual - expected).norm() / expected.norm()).item()
    # a prompt read in parts rounds differently than in one; an error in the cache would be much larger
    assert error < 0.05, f"the stored prompt changes the logits by {error}"
    return {
        "prompt_tokens": prompt_tokens,
        "tokens_found": found,
        "stored_bytes": prompts.nbytes,
        "seconds_without": round(without, 3),
        "seconds_with": round(with_stored, 3),
        "seconds_with_of_which_loading": round(loading, 3),
        "seconds_storing": round(storing, 3),
        "ratio": round(without / with_stored, 1),
        "logits_relative_difference": round(error, 5),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", default=str(HERE / "pydoc-tiny"))
    parser.add_argument("--prompt-tokens", type=int, help="default: 4096 for lite4, 1024 otherwise")
    parser.add_argument("--out", type=Path, help="also write the figures here, as JSON")
    options = parser.parse_args()
    is_lite4 = options.model == "lite4"
    model = build("ours") if is_lite4 else AutoModelForCausalLM.from_pretrained(options.model)
    prompt_tokens = options.prompt_tokens or (4096 if is_lite4 else 1024)
    with tempfile.TemporaryDirectory() as folder:
        figures = measure(model, prompt_tokens, folder)
    table = Table("time to first token", "", show_header=False)
    for name, value in figures.items():
        table.add_row(name.replace("_", " "), f"{value:,}")
    Console().print(table)
    if options.out:
        name = options.model if is_lite4 else Path(options.model).name
        command = f"python examples/prompt_cache.py {name} --prompt-tokens {prompt_tokens}"
        options.out.write_text(json.dumps(described(command) | {"model": name} | figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
