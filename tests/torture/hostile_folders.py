"""Sources, places and neighbors that a stranger prepared: whatever they hold, a conversion writes only its own folder.

Each case makes a sandbox with a source, a secret and a folder of precious files, plants hostile entries drawn at
random, and runs a command in this process. No byte of the secret may be copied, nothing but OUT and the hidden places
beside it may change, and an accepted OUT must pass our own checks.
"""

import os
import random
import shutil
import stat
import tempfile
from pathlib import Path

import yaml
from markdown_it import MarkdownIt
from transformers import LlamaConfig

from deepseek_latent.conversion.checkpoint import check_checkpoint, read_config
from deepseek_latent.conversion.deepseek_layout import ImportDeepseek
from deepseek_latent.conversion.loading import load_model
from tests.conversion.sources import save_source
from tests.support import tiny_model

from .campaign import Campaign, Hang, time_limit
from .hostile_entries import DAMAGE, as_given, choose_out, plant_entry, quietly

SECRET = "s3cret of somebody else"
LIMIT = 20  # seconds for a command; the machine may be busy
SMALL_LLAMA = {"vocab_size": 40, "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 2}
SMALL_DEEPSEEK = {"vocab_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 300}
KINDS = {
    "gqa-to-mla": ("llama", []),
    "gqa-to-mla --bias-free": ("llama", ["--bias-free"]),
    "upcycle": ("llama", ["--scheme", "M1", "--routed-experts", "2", "--top-k", "2"]),
    "cast": ("deepseek", ["--max-shard-size", "50KB"]),
    "cast --dtype": ("deepseek", ["--dtype", "bfloat16"]),
    "export-deepseek": ("deepseek", ["--model-parallel", "2"]),
    "import-deepseek": ("exported", []),
    "export-code": ("deepseek", []),
}
HIDDEN = (".partial", ".lock")


def run(campaign: Campaign) -> None:
    with tempfile.TemporaryDirectory() as base:
        originals = _make_originals(Path(base))
        for chance in campaign.cases():
            with tempfile.TemporaryDirectory() as sandbox:
                _run_case(campaign, chance, originals, Path(sandbox).resolve())


def _make_originals(base: Path) -> dict[str, Path]:
    save_source(base / "llama", LlamaConfig, **SMALL_LLAMA)
    tiny_model(**SMALL_DEEPSEEK).save_pretrained(base / "deepseek")
    for name in ("llama", "deepseek"):
        (base / name / "tokenizer.json").write_text("{}")
    quietly(["convert", "export-deepseek", str(base / "deepseek"), str(base / "exported")])
    return {name: base / name for name in ("llama", "deepseek", "exported")}


def _run_case(campaign: Campaign, chance: random.Random, originals: dict[str, Path], sandbox: Path) -> None:
    (sandbox / "secret").write_text(SECRET)
    (sandbox / "precious").mkdir()
    for name in ("README.md", "config.json", "plan.json"):
        (sandbox / "precious" / name).write_text(f"precious {name}")
    kind = chance.choice([*KINDS])
    original, options = KINDS[kind]
    source = as_given(chance, shutil.copytree(originals[original], sandbox / "source"))
    for _ in range(chance.choice([0, 1, 1, 2])):
        chance.choice(DAMAGE)(chance, source, sandbox)
    command = ["convert", kind.split()[0], str(source)]
    if kind == "export-code":
        out = source.resolve()
        plant_entry(chance, source / "code", sandbox)
        command = ["export-code", str(source), *chance.choice([[], ["--subfolder", "code"]])]
    else:
        place, needed = choose_out(chance, source, sandbox, originals)
        out = Path(os.path.realpath(place))
        command += [str(place), *options, *chance.choice([[], ["--force"], ["--force", "--replace-any-folder"]])]
        for suffix in chance.sample(HIDDEN, chance.choice([0, 0, 0, 1, 2])):
            plant_entry(chance, out.with_name(f".{out.name}{suffix}"), sandbox)
    what = f"{command}, {sorted(os.listdir(source))}"
    before, before_out = _content(sandbox, out), _content(out, None)
    try:
        with time_limit(LIMIT):
            status, printed = quietly(command)
    except Hang:
        return campaign.finding("hang", what)
    except Exception as error:
        return campaign.finding("raw exception", f"{what}: {type(error).__name__}: {str(error)[:300]}")
    campaign.count("accepted" if status == 0 else "refused")
    campaign.count(kind)
    sentences = [line for line in printed.splitlines() if line.startswith("deepseek-latent ")]
    if status not in (0, 2) or (status == 2) != (len(sentences) == 1) or not all(map(str.isprintable, sentences)):
        campaign.finding("raw exception", f"{what}: status {status}, printed {printed[-500:]!r}")
    if changed := _difference(before, _content(sandbox, out)):
        campaign.finding("wrong answer", f"{what}: {changed} was changed, status {status}")
    if status == 2 and kind != "export-code" and (changed := _difference(before_out, _content(out, None))):
        campaign.finding("half output", f"{what}: refused, and {changed} in OUT was changed")
    for folder in (out, out.with_name(f".{out.name}.partial")):
        held = _content(folder, None)
        leaked = [path for path in held.keys() - before_out.keys() if SECRET.encode() in held[path][-1]]
        if leaked and kind != "export-code":
            campaign.finding("wrong answer", f"{what}: {leaked[0]} in {folder} holds the secret")
    if status == 0 and kind != "export-code":
        if needed is None or not {*needed} <= {*command}:
            campaign.finding("wrong answer", f"{what}: OUT was replaced without {needed}")
        try:
            _check_accepted(campaign, out, kind)
        except (ValueError, OSError, AssertionError) as error:
            campaign.finding("wrong answer", f"{what}: accepted, but {type(error).__name__}: {str(error)[:300]}")


def _check_accepted(campaign: Campaign, out: Path, kind: str) -> None:
    if left := [name for name in os.listdir(out.parent) if name in [f".{out.name}{x}" for x in HIDDEN]]:
        raise AssertionError(f"{left} is left beside OUT")
    usual = 0o666 & ~_umask()
    for path in out.iterdir():
        status = path.lstat()
        assert stat.S_ISREG(status.st_mode), f"{path.name!r} is not a regular file"
        assert status.st_mode & 0o7777 == usual, f"{path.name!r} has the mode {status.st_mode:o}"
    if kind == "export-deepseek":
        ImportDeepseek(out, out / "config.json").pieces()
        return
    problems = check_checkpoint(out, read_config(str(out))).problems
    assert not problems, problems[0]
    load_model(out, dtype="auto")
    campaign.count("loaded")
    _, metadata, text = (out / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    assert yaml.safe_load(metadata).keys() <= {"library_name", "license", "language"}, metadata
    tokens = MarkdownIt("commonmark").enable("table").parse(text)
    kinds = [inner.type for token in tokens for inner in [token, *(token.children or [])]]
    unwanted = {"html_block", "html_inline", "link_open", "image", "hr", "blockquote_open"} & {*kinds}
    assert not unwanted, f"the card has {unwanted}"
    assert kinds.count("heading_open") == 1, "the card has a heading of the source"
    assert all(map(str.isprintable, (metadata + text).split("\n"))), "the card has control characters"
    campaign.count("cards read")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _content(folder: Path, left_out: Path | None) -> dict[str, tuple[str, bytes]]:
    """Type, mode and content of everything under a folder, without following links.

    OUT, its hidden neighbors and the folders that it is in are left out.
    """
    content = {}
    for parent, folders, files in os.walk(folder):
        for path in (Path(parent, name) for name in [*folders, *files]):
            if left_out is not None:
                below = [x for x in (path, *path.parents) if x.parent == left_out.parent]
                if path in left_out.parents or any(
                    x == left_out or x.name.startswith(f".{left_out.name}.") for x in below
                ):
                    continue
            status = path.lstat()
            held = b""
            if stat.S_ISLNK(status.st_mode):
                held = os.fsencode(os.readlink(path))
            elif stat.S_ISREG(status.st_mode) and status.st_size < 10**8:
                held = path.read_bytes()
            content[str(path.relative_to(folder))] = (stat.filemode(status.st_mode), held)
    return content


def _difference(before: dict, after: dict) -> str:
    return ", ".join(repr(name) for name in sorted({*before, *after}) if before.get(name) != after.get(name))[:300]
