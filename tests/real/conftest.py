"""The real model and its texts, as `make real` prepares them: a Llama, the same as latent attention, and as experts."""

import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from deepseek_latent.commands.__main__ import main
from deepseek_latent.conversion.calibration import Calibration
from deepseek_latent.conversion.compress import CompressedMla
from deepseek_latent.conversion.compression_report import build_model
from deepseek_latent.conversion.llama_source import LlamaSource
from deepseek_latent.conversion.source import Source

ROOT = Path(__file__).parent.parent.parent
LLAMA, MLA, TEXTS = (ROOT / ".real" / name for name in ("llama", "mla", "texts"))
PREPARED = (LLAMA / "config.json", MLA / "config.json", TEXTS / "calibration.txt")
# how each scheme cuts the MLPs, into experts that add little to the size
UPCYCLES = {
    "M0": ("--shared-experts", "4", "--routed-experts", "2", "--top-k", "1"),
    "M5": ("--shared-experts", "2", "--routed-experts", "4", "--groups", "2", "--top-k", "2"),
}
GREEDY = {"do_sample": False, "max_new_tokens": 40}


def pytest_collection_modifyitems(items):
    if not all(file.is_file() for file in PREPARED):
        for item in items:
            if item.get_closest_marker("real"):
                item.add_marker(pytest.mark.skip(reason="`make real` prepares the model that this needs"))


@pytest.fixture(scope="session")
def source():
    return AutoModelForCausalLM.from_pretrained(LLAMA).eval()


@pytest.fixture(scope="session")
def model():
    """The exact conversion."""
    return AutoModelForCausalLM.from_pretrained(MLA).eval()


@pytest.fixture(scope="session")
def tokenizer():
    return AutoTokenizer.from_pretrained(MLA)


@pytest.fixture(scope="session")
def question(tokenizer):
    """Token ids [1 s] of a question whose answer repeats itself."""
    messages = [{"role": "user", "content": "List the seven days of the week, then list them again."}]
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)[
        "input_ids"
    ]


@pytest.fixture(scope="session")
def answer(source, question):
    """The source's greedy answer, with the question [1 s]."""
    return source.generate(question, **GREEDY)


@pytest.fixture(scope="session")
def windows(tokenizer):
    """Windows [4 256] of the held-out articles."""
    text = (TEXTS / "wiki_eval.txt").read_text(encoding="utf-8")
    ids = tokenizer(text[:20_000], return_tensors="pt", verbose=False)["input_ids"][0]
    return ids[: 4 * 256].view(4, 256)


@pytest.fixture(scope="session")
def compressed(tokenizer):
    """Half of the cache, by closed forms from a short text; `convert` refines it for another ten minutes."""
    text = (TEXTS / "calibration.txt").read_text(encoding="utf-8")
    ids = tokenizer(text[:30_000], return_tensors="pt", verbose=False)["input_ids"][0]
    eager = AutoModelForCausalLM.from_pretrained(LLAMA, dtype=torch.float32, attn_implementation="eager").eval()
    statistics = Calibration(eager, LlamaSource(Source(LLAMA)), ids[: 12 * 256].view(12, 256))
    return build_model(CompressedMla(Source(LLAMA), statistics, r=48, c=144))


@pytest.fixture(scope="session", params=UPCYCLES)
def upcycled(request, tmp_path_factory):
    """The scheme and the folder of the model as experts, made from the Llama."""
    folder = tmp_path_factory.mktemp("upcycled") / request.param
    options = ("--scheme", request.param, *UPCYCLES[request.param])
    assert main(["convert", "upcycle", str(LLAMA), str(folder), *options]) == 0
    yield request.param, folder
    # pytest would keep its 800 MB for some sessions
    shutil.rmtree(folder)


def nats(model, windows, cache=None):
    """The loss of each token [tokens] of windows, the second half of each read over the rows that `cache` holds."""
    half = windows.shape[1] // 2
    with torch.no_grad():
        if cache is None:
            logits = model(windows[:, :-1], use_cache=False).logits
        else:
            logits = torch.cat(
                [model(part, cache=cache).logits for part in (windows[:, :half], windows[:, half:-1])], 1
            )
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten(), reduction="none")
