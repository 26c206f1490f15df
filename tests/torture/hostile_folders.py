"""Sources, places and neighbors that a stranger prepared: whatever they hold, a conversion writes only its own folder.

Each case makes a sandbox with a source, a secret and a folder of precious files, plants hostile entries drawn at
random, and runs a command in this process. No byte of the secret may be copied, nothing but OUT and the hidden places
beside it may change, and an accepted OUT must pass our own checks.
"""

import io
import json
import os
import random
import shutil
import stat
import tempfile
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import torch
import yaml
from markdown_it import MarkdownIt
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig

from deepseek_latent.commands.__main__ import main
from deepseek_latent.conversion.checkpoint import check_checkpoint, read_config
from deepseek_latent.conversion.deepseek_layout import ImportDeepseek
from deepseek_latent.conversion.loading import load_model
from deepseek_latent.conversion.source import READ_PATTERNS
from tests.conversion.sources import save_source
from tests.support import tiny_model

from .campaign import Campaign, Hang, time_limit

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
FILES = ["LICENSE", "README.md", "tokenizer.json", "vocab.txt", "a.model", "generation_config.json", "config.json"]
FILES += ["model.safetensors", "more.safetensors", "model.safetensors.index.json", "chat_template.jinja", "notes.txt"]
# what may stand in a name
MARKUP = ["<img src=x onerror=alert(1)>", "\x1b]0;owned\x07\x1b[2J", "x\n---\nlicense: mit\n---\n# Buy", "`", "```\n"]
MARKUP += ["[a](javascript:b)", "\u202egnp.exe", "$command ${name}", "|a|\n|-|", "\ud800", "n" * 9999, "[/bold]:bomb:"]
MARKUP += ["https://phish.example", "<!--", "a & b", "\x00", "ü", "meta-llama/Llama-3", "'\"); import os; os.system('"]
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
    _quietly(["convert", "export-deepseek", str(base / "deepseek"), str(base / "exported")])
    return {name: base / name for name in ("llama", "deepseek", "exported")}


def _quietly(arguments: list[str]) -> tuple[int, str]:
    printed = io.StringIO()
    with redirect_stdout(printed), redirect_stderr(printed):
        return main(arguments), printed.getvalue()


def _run_case(campaign: Campaign, chance: random.Random, originals: dict[str, Path], sandbox: Path) -> None:
    (sandbox / "secret").write_text(SECRET)
    (sandbox / "precious").mkdir()
    for name in ("README.md", "config.json", "plan.json"):
        (sandbox / "precious" / name).write_text(f"precious {name}")
    kind = chance.choice([*KINDS])
    original, options = KINDS[kind]
    source = _as_given(chance, shutil.copytree(originals[original], sandbox / "source"))
    damage = [chance.choice([_plant_file, _plant_file, _rename_itself, _write_card, _lie_about_dtype, _change_tensors])]
    for change in damage * chance.choice([0, 1, 1, 2]):
        change(chance, source, sandbox)
    command = ["convert", kind.split()[0], str(source)]
    if kind == "export-code":
        out = source.resolve()
        _plant_entry(chance, source / "code", sandbox)
        command = ["export-code", str(source), *chance.choice([[], ["--subfolder", "code"]])]
    else:
        place, needed = _choose_out(chance, source, sandbox, originals)
        out = Path(os.path.realpath(place))
        command += [str(place), *options, *chance.choice([[], ["--force"], ["--force", "--replace-any-folder"]])]
        for suffix in chance.sample(HIDDEN, chance.choice([0, 0, 0, 1, 2])):
            _plant_entry(chance, out.with_name(f".{out.name}{suffix}"), sandbox)
    what = f"{command}, {sorted(os.listdir(source))}"
    before, before_out = _content(sandbox, out), _content(out, None)
    try:
        with time_limit(LIMIT):
            status, printed = _quietly(command)
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


def _content(folder: Path, left_out: Path | None) -> dict[str, tuple[str, int, bytes]]:
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
            content[str(path.relative_to(folder))] = (stat.filemode(status.st_mode), status.st_nlink, held)
    return content


def _difference(before: dict, after: dict) -> str:
    return ", ".join(repr(name) for name in sorted({*before, *after}) if before.get(name) != after.get(name))[:300]


# what a stranger prepared


def _as_given(chance: random.Random, source: Path) -> Path:
    """The source as a folder, or as the hub's cache keeps it, or such a cache whose files are elsewhere."""
    layout = chance.choice(["folder", "folder", "cache", "cache elsewhere", "link"])
    if layout == "folder":
        return source
    if layout == "link":
        source.with_name("link").symlink_to(source.name)
        return source.with_name("link")
    cache = source.with_name("models--me--it")
    (cache / "snapshots" / "0123").mkdir(parents=True)
    blobs = cache / "blobs" if layout == "cache" else cache.with_name("private")
    blobs.mkdir()
    if layout != "cache":
        (cache / "blobs").symlink_to("../private")
    for number, path in enumerate(sorted(source.iterdir())):
        path.rename(blobs / str(number))
        (cache / "snapshots" / "0123" / path.name).symlink_to(f"../../blobs/{number}")
    source.rmdir()
    return cache / "snapshots" / "0123"


def _plant_entry(chance: random.Random, path: Path, sandbox: Path) -> None:
    """Puts a link, a pipe, a folder or a file there, if the system allows the name."""
    outside = [
        *[sandbox / "secret"] * 4,
        sandbox / "precious",
        sandbox / "precious" / "README.md",
        "nothing",
        path.name,
    ]
    outside += ["/dev/zero", "/proc/self/environ", "../secret", sandbox / "precious" / "plan.json"]
    entries = {
        "link": lambda: path.symlink_to(chance.choice(outside)),
        "pipe": lambda: os.mkfifo(path),
        "socket": lambda: os.mknod(path, stat.S_IFSOCK | 0o600),
        "folder": path.mkdir,
        "folder of links": lambda: (
            path.mkdir(),
            [(path / name).symlink_to(sandbox / "precious" / name) for name in ("README.md", "config.json")],
        ),
        "file": lambda: path.write_text("<b>planted</b>"),
        "other name": lambda: path.hardlink_to(sandbox / "precious" / "plan.json"),
        "huge": lambda: (path.touch(), os.truncate(path, 10**12)),
        "none": lambda: None,
    }
    kind = chance.choice([*entries, "link", "link", "folder of links", "file"])
    if path.parent.is_dir() and not os.path.lexists(path) and len(os.fsencode(path.name)) < 256:
        entries[kind]()


def _plant_file(chance: random.Random, source: Path, sandbox: Path) -> None:
    name = chance.choice(FILES)
    if chance.random() < 0.4:
        inserted = chance.choice(MARKUP).replace("/", "").replace("\0", "").replace("\ud800", "")[:99]
        name = chance.choice(READ_PATTERNS).replace("*", inserted) or "LICENSE"
    elif chance.random() < 0.7 and not (source / name).is_dir():
        (source / name).unlink(missing_ok=True)
    _plant_entry(chance, source / name, sandbox)


def _edit_config(source: Path, **changes) -> None:
    file = source / "config.json"
    if file.is_file() and not file.is_symlink() and file.stat().st_size < 10**6:
        config = json.loads(file.read_text())
        file.write_text(json.dumps({name: x for name, x in (config | changes).items() if x is not ...}))


def _rename_itself(chance: random.Random, source: Path, sandbox: Path) -> None:
    _edit_config(
        source, _name_or_path=chance.choice(MARKUP) + chance.choice(["", *MARKUP]), author=chance.choice(MARKUP)
    )


def _write_card(chance: random.Random, source: Path, sandbox: Path) -> None:
    fields = {
        name: chance.choice([*MARKUP, "mit", ["en", "<b>"], {"a": "b"}, 3, None]) for name in ("license", "language")
    }
    card = json.dumps(
        {"license": fields["license"], "language": fields["language"], "base_model": chance.choice(MARKUP)}
    )
    if not os.path.lexists(source / "README.md"):
        (source / "README.md").write_text(f"---\n{card}\n---\n{chance.choice(MARKUP)}", errors="replace")


def _lie_about_dtype(chance: random.Random, source: Path, sandbox: Path) -> None:
    _edit_config(source, dtype=chance.choice(["float32", "bfloat16", "float16", ...]), torch_dtype=...)


def _change_tensors(chance: random.Random, source: Path, sandbox: Path) -> None:
    for file in source.glob("*.safetensors"):
        if not file.is_file() or file.is_symlink() or file.stat().st_size > 10**8:
            continue
        tensors = load_file(file)
        names = chance.choice([[*tensors], [chance.choice([*tensors])], [x for x in tensors if "gate.weight" in x]])
        dtype = chance.choice([torch.float32, torch.bfloat16, torch.float16])
        tensors |= {name: tensors[name].to(dtype) for name in names}
        if chance.random() < 0.2:
            del tensors[chance.choice([*tensors])]
        if chance.random() < 0.2:
            tensors[chance.choice(MARKUP).replace("\ud800", "")] = torch.zeros(2)
        save_file(tensors, file, metadata={"format": "pt"})


def _choose_out(
    chance: random.Random, source: Path, sandbox: Path, originals: dict[str, Path]
) -> tuple[Path, list[str] | None]:
    """OUT, and the words without which it must not be replaced; None if it must never be."""
    name = chance.choice(["out", "out", *MARKUP]).replace("/", "").replace("\0", "0").replace("\ud800", "")[:250]
    out = sandbox / f"o{name}"
    choice = chance.choice(["new", "new", "converted", "converted", "changed", "source", "inside", "above", "others"])
    if choice in ("converted", "changed"):
        _quietly(["convert", "cast", str(originals["deepseek"]), str(out)])
        if not out.is_dir():
            return out, []
        if choice == "changed":
            (out / chance.choice(["notes.txt", "README.md", "model.safetensors"])).write_text("mine")
        return out, ["--force"] if choice == "converted" else ["--force", "--replace-any-folder"]
    if choice == "others":
        leads_to = chance.choice([sandbox / "precious", sandbox / "secret", source, sandbox / "new", out.name])
        out.symlink_to(leads_to)
        place = chance.choice([out, out, out / "inner", sandbox / "precious"])
        words = {source: None, sandbox / "precious": ["--force", "--replace-any-folder"]}
        return place, words.get(leads_to if place == out else place, None if leads_to == source else [])
    return {
        "new": (out, []),
        "source": (source, None),
        "inside": (source / "out", None),
        "above": (source.parent, None),
    }[choice]
