"""Damaged checkpoints, given to every command that reads one and to `from_pretrained`.

A command must end with 0, or with 1 or 2 and one sentence. What it wrote must pass our own checks and give finite
logits. `from_pretrained` must raise an error of ours as soon as our code is involved; what transformers raises by
itself while it reads files is counted apart, and must not take long either.
"""

import contextlib
import io
import resource
import shutil
import tempfile
import time
import traceback
import warnings
from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
)
from transformers.utils import logging

from deepseek_latent.commands.__main__ import main
from tests.conversion.architectures import save_published
from tests.conversion.sources import LLAMA3, save_source
from tests.support import tiny_model

from .campaign import PACKAGE, SECONDS_PER_CASE, Campaign, Hang, time_limit
from .damaged_folders import damage

MEMORY = 12 * 2**30  # bytes of address space: an allocation by the numbers of a config fails instead of the machine
SECONDS_TO_CHECK = 20  # for a command on a checkpoint that it accepts
SMALLER = ("--kv-lora-rank", "48", "--qk-rope-head-dim", "16", "--calibrate", "TEXT")
EXPERTS = ("--scheme", "M3", "--routed-experts", "4", "--groups", "2", "--top-k", "2")
# by kind of checkpoint: commands, with the places of the checkpoint and of what is written
COMMANDS = {
    "deepseek": (
        ("inspect", "SRC"),
        ("verify", "SRC"),
        ("verify", "GOOD", "--against", "SRC"),
        ("verify", "SRC", "--text", "TEXT"),
        ("experts", "SRC", "--text", "TEXT", "--esft", "OUT.json"),
        ("generate", "SRC", "w1 w2", "--max-new-tokens", "2"),
        ("convert", "cast", "SRC", "OUT", "--dtype", "float32"),
        ("convert", "cast", "SRC", "OUT", "--max-shard-size", "100KB"),
        ("convert", "cast", "SRC", "OUT", "--dry-run"),
        ("convert", "export-deepseek", "SRC", "OUT", "--model-parallel", "2"),
        ("export-code", "SRC"),
        ("from_pretrained",),
        ("from_pretrained",),
    ),
    "llama": (
        ("convert", "gqa-to-mla", "SRC", "OUT"),
        ("convert", "gqa-to-mla", "SRC", "OUT", "--bias-free"),
        ("convert", "gqa-to-mla", "SRC", "OUT", *SMALLER),
        ("convert", "upcycle", "SRC", "OUT", *EXPERTS),
        ("convert", "upcycle", "SRC", "OUT", *EXPERTS, "--dry-run"),
    ),
    "layout": (
        ("convert", "import-deepseek", "SRC", "OUT"),
        ("convert", "import-deepseek", "SRC", "OUT", "--dry-run"),
    ),
    "dense": (("convert", "upcycle", "SRC", "OUT", *EXPERTS), ("inspect", "SRC"), ("from_pretrained",)),
}


def run(campaign: Campaign) -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, hard))
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as place:
        checkpoints = make_checkpoints(Path(place))
        for random in campaign.cases():
            kind, source = random.choice(checkpoints)
            folder = Path(place) / "case"
            shutil.copytree(source, folder / "source")
            done = f"{source.name}: {damage(folder / 'source', random)}"
            words = random.choice(COMMANDS[kind])
            places = {
                "SRC": str(folder / "source"),
                "OUT": str(folder / "out"),
                "GOOD": str(source),
                "TEXT": str(source.parent / "text"),
                "OUT.json": str(folder / "experts.json"),
            }
            if words == ("from_pretrained",):
                _load(campaign, folder / "source", done)
            else:
                _command(campaign, [places.get(word, word) for word in words], done)
            shutil.rmtree(folder)


def make_checkpoints(place: Path) -> list[tuple[str, Path]]:
    """Small valid checkpoints of every kind, and a text to calibrate on: (kind, folder)."""
    # heads for two ranks
    tiny_model(torch.bfloat16, num_attention_heads=4).save_pretrained(place / "v2")
    tiny_model(tie_word_embeddings=True, q_lora_rank=None).save_pretrained(place / "v2-tied")
    tiny_model(torch.bfloat16).save_pretrained(place / "v2-shards", max_shard_size="100KB")
    save_source(place / "llama", LlamaConfig, rope_parameters=LLAMA3)
    save_source(place / "llama-biases", LlamaConfig, torch.bfloat16, attention_bias=True)
    save_source(place / "mistral", MistralConfig, sliding_window=None)
    save_source(place / "qwen2", Qwen2Config, tie_word_embeddings=True)
    # cut and partly rotated; scaled; without RoPE in a layer
    for name in ("Phi-4-mini, both lists equal", "Granite 3, tied", "SmolLM3"):
        save_published(place / name.partition(",")[0], name)
    for folder in place.iterdir():
        _add_companions(folder)
    (place / "text").write_text(" ".join(f"w{i % 90}" for i in range(1400)))
    for words in (
        ("cast", "v2", "v2-bf16", "--dtype", "bfloat16"),
        ("export-deepseek", "v2-bf16", "layout", "--model-parallel", "2"),
        ("gqa-to-mla", "llama", "dense"),
    ):
        command = ["convert", words[0], str(place / words[1]), str(place / words[2]), *words[3:]]
        assert _run(command, SECONDS_TO_CHECK)[0] == 0, command
    kinds = {"v2": "deepseek", "v2-tied": "deepseek", "v2-shards": "deepseek", "layout": "layout", "dense": "dense"}
    return [
        (kinds.get(folder.name, "llama"), folder)
        for folder in sorted(place.iterdir())
        if folder.is_dir() and folder.name != "v2-bf16"
    ]


def _add_companions(folder: Path) -> None:
    words = Tokenizer(WordLevel({f"w{i}": i for i in range(95)} | {"[UNK]": 95}, unk_token="[UNK]"))
    words.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(folder)
    (folder / "README.md").write_text("---\nlicense: mit\nlanguage: [en]\nmodel-index: []\n---\n# A model\n")
    (folder / "LICENSE").write_text("MIT")


def _run(words: list[str], seconds: float) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a command, run in this process."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), time_limit(seconds):
        code = main(words)
    return code, out.getvalue(), err.getvalue()


def _command(campaign: Campaign, words: list[str], done: str) -> None:
    what = f"{' '.join(words[: 1 + (words[0] == 'convert')])} {' '.join(words[4:])} on {done}"
    before = time.process_time()
    try:
        code, _, err = _run(words, SECONDS_TO_CHECK)
    except Hang:
        return campaign.finding("hang", f"{what}: more than {SECONDS_TO_CHECK} s")
    except BaseException as error:
        return campaign.finding("raw exception", f"{what}: {_described(error)}")
    # time of this process, because others may use the machine
    if code == 2 and (spent := time.process_time() - before) > SECONDS_PER_CASE:
        campaign.finding("hang", f"{what}: refused after {spent:.1f} s")
    # a progress bar is rewritten in its line, and a model card that cannot be read is warned of
    said = [line for line in err.splitlines() if line and "%|" not in line and not line.startswith("warning: the ")]
    campaign.count(f"{words[0]} {'accepted' if code == 0 else 'refused'}")
    if code == 2 and (len(said) != 1 or not 20 < len(said[0]) < 1000):
        campaign.finding("raw exception", f"{what}: expected one sentence, got {said[-3:]!r}"[:1500])
    if code not in (0, 1, 2):
        campaign.finding("raw exception", f"{what}: exit code {code}")
    out_folder = Path(words[3]) if words[0] == "convert" and "--dry-run" not in words else None
    if out_folder is not None and out_folder.exists() != (code == 0):
        campaign.finding(
            "half output", f"{what}: exit code {code}, OUT {'exists' if out_folder.exists() else 'is missing'}"
        )
    if code == 0 and out_folder is not None and "export-deepseek" not in words:
        _check_result(campaign, Path(words[2]), out_folder, what, is_exact="--calibrate" not in words)


def _check_result(campaign: Campaign, source: Path, out: Path, what: str, *, is_exact: bool) -> None:
    """What a conversion wrote must pass `inspect`, and compute what its source computes if that can be loaded."""
    try:
        code, said, err = _run(["inspect", str(out)], SECONDS_TO_CHECK)
        if code:
            return campaign.finding("wrong answer", f"{what}: inspect of OUT says {said[-400:]} {err[-400:]}")
        model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float64).eval()
        ids = torch.arange(min(24, model.config.vocab_size))[None]
        logits = model(ids).logits
        if not logits.isfinite().all():
            return campaign.finding("wrong answer", f"{what}: OUT has logits that are not finite")
        if not is_exact:
            return campaign.count("converted and loaded")
    except Exception as error:
        return campaign.finding("wrong answer", f"{what}: OUT does not load: {_described(error)}")
    try:
        expected = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float64).eval()(ids).logits
    except Exception:
        return campaign.count("converted and loaded")
    error = ((logits - expected).abs().max() / expected.abs().max()).item()
    if not error < 0.1:
        campaign.finding("wrong answer", f"{what}: logits differ from the source's by {error:.2g}")
    campaign.count("converted and compared")


def _load(campaign: Campaign, folder: Path, done: str) -> None:
    # transformers allocates what a config says before it finds that the files hold less
    what = f"from_pretrained on {done}"
    try:
        with time_limit(SECONDS_TO_CHECK):
            AutoConfig.from_pretrained(folder)
            model = AutoModelForCausalLM.from_pretrained(folder)
            logits = model(torch.tensor([[0]])).logits
        campaign.count("from_pretrained accepted")
        # bytes of a weight may have become any number
        if not logits.isfinite().all() and all(weight.abs().max() < 1e3 for weight in model.parameters()):
            campaign.finding("wrong answer", f"{what}: logits are not finite, though the weights are small")
    except Hang:
        campaign.finding("hang", f"{what}: more than {SECONDS_TO_CHECK} s")
    except (ValueError, TypeError, OSError, StrictDataclassError) as error:
        campaign.count("from_pretrained refused")
        if _passes_through_us(error) and not 20 < len(str(error)) < 3000:
            campaign.finding("raw exception", f"{what}: {_described(error)}")
    except Exception as error:
        if _passes_through_us(error) or isinstance(error, MemoryError):
            campaign.finding("raw exception", f"{what}: {_described(error)}")
        campaign.count("raised by transformers alone")


def _passes_through_us(error: BaseException) -> bool:
    return any(PACKAGE in Path(frame.filename).parents for frame in traceback.extract_tb(error.__traceback__))


def _described(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    places = [
        f"{Path(frame.filename).name}:{frame.lineno}" for frame in frames if PACKAGE in Path(frame.filename).parents
    ]
    last = f"{Path(frames[-1].filename).name}:{frames[-1].lineno}"
    return f"{type(error).__name__}: {str(error)[:300]} ({' '.join(places[-2:])} {last})"
