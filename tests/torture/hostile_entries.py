"""What a stranger prepares: hostile entries in a source, at OUT and beside it, drawn at random."""

import io
import json
import os
import random
import stat
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from deepseek_latent.commands.__main__ import main
from deepseek_latent.conversion.source import READ_PATTERNS

FILES = ["LICENSE", "README.md", "tokenizer.json", "vocab.txt", "a.model", "generation_config.json", "config.json"]
FILES += ["model.safetensors", "more.safetensors", "model.safetensors.index.json", "chat_template.jinja", "notes.txt"]
# what may stand in a name
MARKUP = ["<img src=x onerror=alert(1)>", "\x1b]0;owned\x07\x1b[2J", "x\n---\nlicense: mit\n---\n# Buy", "`", "```\n"]
MARKUP += ["[a](javascript:b)", "\u202egnp.exe", "$command ${name}", "|a|\n|-|", "\ud800", "n" * 9999, "[/bold]:bomb:"]
MARKUP += ["https://phish.example", "<!--", "a & b", "\x00", "ü", "meta-llama/Llama-3", "'\"); import os; os.system('"]


def quietly(arguments: list[str]) -> tuple[int, str]:
    printed = io.StringIO()
    with redirect_stdout(printed), redirect_stderr(printed):
        return main(arguments), printed.getvalue()


def as_given(chance: random.Random, source: Path) -> Path:
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


def plant_entry(chance: random.Random, path: Path, sandbox: Path) -> None:
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


def plant_file(chance: random.Random, source: Path, sandbox: Path) -> None:
    name = chance.choice(FILES)
    if chance.random() < 0.4:
        inserted = chance.choice(MARKUP).replace("/", "").replace("\0", "").replace("\ud800", "")[:99]
        name = chance.choice(READ_PATTERNS).replace("*", inserted) or "LICENSE"
    elif chance.random() < 0.7 and not (source / name).is_dir():
        (source / name).unlink(missing_ok=True)
    plant_entry(chance, source / name, sandbox)


def edit_config(source: Path, **changes) -> None:
    file = source / "config.json"
    if file.is_file() and not file.is_symlink() and file.stat().st_size < 10**6:
        try:
            config = json.loads(file.read_text())
        except ValueError:
            # something was planted there
            return
        file.write_text(json.dumps({name: x for name, x in (config | changes).items() if x is not ...}))


def rename_itself(chance: random.Random, source: Path, sandbox: Path) -> None:
    edit_config(
        source, _name_or_path=chance.choice(MARKUP) + chance.choice(["", *MARKUP]), author=chance.choice(MARKUP)
    )


def write_card(chance: random.Random, source: Path, sandbox: Path) -> None:
    fields = {
        name: chance.choice([*MARKUP, "mit", ["en", "<b>"], {"a": "b"}, 3, None]) for name in ("license", "language")
    }
    card = json.dumps(
        {"license": fields["license"], "language": fields["language"], "base_model": chance.choice(MARKUP)}
    )
    if not os.path.lexists(source / "README.md"):
        (source / "README.md").write_text(f"---\n{card}\n---\n{chance.choice(MARKUP)}", errors="replace")


def lie_about_dtype(chance: random.Random, source: Path, sandbox: Path) -> None:
    edit_config(source, dtype=chance.choice(["float32", "bfloat16", "float16", ...]), torch_dtype=...)


def change_tensors(chance: random.Random, source: Path, sandbox: Path) -> None:
    for file in source.glob("*.safetensors"):
        if not file.is_file() or file.is_symlink() or file.stat().st_size > 10**8:
            continue
        try:
            tensors = load_file(file)
        except SafetensorError:
            continue
        names = chance.choice([[*tensors], [chance.choice([*tensors])], [x for x in tensors if "gate.weight" in x]])
        dtype = chance.choice([torch.float32, torch.bfloat16, torch.float16])
        tensors |= {name: tensors[name].to(dtype) for name in names}
        if chance.random() < 0.2:
            del tensors[chance.choice([*tensors])]
        if chance.random() < 0.2:
            tensors[chance.choice(MARKUP).replace("\ud800", "")] = torch.zeros(2)
        save_file(tensors, file, metadata={"format": "pt"})


def choose_out(
    chance: random.Random, source: Path, sandbox: Path, originals: dict[str, Path]
) -> tuple[Path, list[str] | None]:
    """OUT, and the words without which it must not be replaced; None if it must never be."""
    name = chance.choice(["out", "out", *MARKUP]).replace("/", "").replace("\0", "0").replace("\ud800", "")[:250]
    out = sandbox / f"o{name}"
    choice = chance.choice(["new", "new", "converted", "converted", "changed", "source", "inside", "above", "others"])
    if choice in ("converted", "changed"):
        quietly(["convert", "cast", str(originals["deepseek"]), str(out)])
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


DAMAGE = (plant_file, plant_file, rename_itself, write_card, lie_about_dtype, change_tensors)
