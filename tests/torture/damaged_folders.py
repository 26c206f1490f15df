"""Ways to damage a checkpoint's folder, drawn at random: its config, weights, index of weights and other files."""

import json
import struct
from collections.abc import Callable
from pathlib import Path
from random import Random

INDEX = "model.safetensors.index.json"
NUMBERS = (0, -1, 1, 2, 3, 7, 64, 10**3, 10**6, 10**9, 2**31, 2**63, 10**30, 1e-300, 1e30, 0.5, -0.5)
# what JSON of Python also reads, and values of every other type
VALUES = (
    *NUMBERS,
    float("nan"),
    float("inf"),
    None,
    True,
    False,
    "",
    "16",
    "bfloat16",
    "x" * 100_000,
    [],
    [5],
    {},
    {"a": 1},
)
VALUES += ("ünï\ud83d", [None], ["DeepseekV2Model"], {"rope_type": "yarn"}, {"type": "linear", "factor": -1})
TEXTS = (
    b"",
    b"[]",
    b"null",
    b"{",
    b"\xff\xfe",
    b"\xef\xbb\xbf{}",
    b"5",
    b'{"a": 1}',
    b"[" * 100_000,
    b'{"a":' * 50_000,
    b"\0" * 500,
)
# fields that a config may have besides those of the checkpoints that are damaged
FIELDS = ("num_labels", "id2label", "layer_types", "attn_implementation", "experts_implementation", "output_attentions")
FIELDS += ("quantization_config", "auto_map", "to_dict", "cached_width", "torch_dtype", "problem_type", "use_mla")
FIELDS += ("mlp_bias", "sliding_window", "head_dim", "per_layer_config", "is_encoder_decoder", "device_capacity_factor")
FIELDS += ("rope_scaling", "rope_parameters", "partial_rotary_factor", "label2id", "_name_or_path", "name_or_path")
CARDS = (
    b"---\nlicense: [\n---\n",
    "---\nlicense: müt\n---\n".encode("latin-1"),
    b"---\nmodel-index: 5\nlicense: {a: 1}\n---\n",
    b"---\nmodel-index:\n- name: x\n  results: [5]\n---\nx",
    b"---\n- a\n- b\n---\n",
    b"---\nlicense: 5\nlanguage: {a: [1]}\ntags: 7\nbase_model: [[1]]\ndatasets: 3\n---\n",
    b"---\nlicense: mit\n" + b"a: " + b"[" * 5_000 + b"\n---\n",
    b"---\na: &a [x, x]\nb: &b [*a, *a]\nlicense: *b\neval_results: 4\n---\n",
    b"---\nlicense: 2026-01-01\nlanguage: !!python/name:os.system\n---\n",
    b"---",
    b"\0\1\2",
)


def damage(folder: Path, random: Random) -> str:
    """Damages a checkpoint in one to three ways, and returns what was done."""
    chosen = random.choices([*WAYS], [*WAYS.values()], k=random.choice((1, 1, 1, 2, 3)))
    return ", ".join(f"{way.__name__[1:]}({way(folder, random)})" for way in chosen)


def _field(folder: Path, random: Random) -> str:
    """Sets or removes a field of config.json, perhaps inside of another one."""
    file = folder / "config.json"
    config = _read(file)
    if not isinstance(config, dict) or not config:
        return "no config"
    return _change_entry(file, config, config, random)


def _generation_field(folder: Path, random: Random) -> str:
    file = folder / "generation_config.json"
    config = _read(file)
    return _change_entry(file, config, config, random) if isinstance(config, dict) and config else "none"


def _change_entry(file: Path, whole: dict, part: dict, random: Random) -> str:
    name = random.choice(FIELDS if part is whole and random.random() < 0.1 else sorted(part))
    value = part.get(name)
    if isinstance(value, dict) and value and random.random() < 0.7:
        return f"{name}." + _change_entry(file, whole, value, random)
    if random.random() < 0.15:
        part.pop(name, None)
        described = f"{name} removed"
    else:
        part[name] = random.choice(VALUES)
        if isinstance(value, int) and random.random() < 0.5:
            part[name] = random.choice((value + 1, value - 1, 2 * value, -value, random.choice(NUMBERS)))
        described = f"{name} = {str(part[name])[:40]}"
    file.write_bytes(json.dumps(whole).encode("utf-8", "surrogatepass"))
    return described


def _deep(folder: Path, random: Random) -> str:
    """A field that holds very deeply nested JSON."""
    file = random.choice([*sorted(path for path in folder.glob("*.json") if path.is_file()), folder / "config.json"])
    if not file.is_file():
        return "no file"
    depth = random.choice((100, 900, 5_000, 200_000))
    text = file.read_text(errors="replace").rstrip()
    file.write_text(text.removesuffix("}") + f', "deep": {"[" * depth}{"]" * depth}}}')
    return f"{file.name} {depth}"


def _header(folder: Path, random: Random) -> str:
    """Changes the header of a weights file: a name, dtype, shape or offset, or the length before it."""
    file = _weights(folder, random)
    if file is None:
        return "no weights"
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    try:
        header = json.loads(content[8 : 8 + length])
        name = random.choice(sorted(set(header) - {"__metadata__"}))
    except (ValueError, IndexError, TypeError, RecursionError):
        return "no header"
    entry = header[name]
    if not isinstance(entry, dict) or not isinstance(entry.get("data_offsets"), list):
        return "no entry"
    kind = random.choice(("length", "name", "missing", "dtype", "shape", "offsets", "metadata", "raw"))
    if kind == "length":
        length = random.choice((0, 1, length - 1, length + 1, 10**8, 2**63, 2**64 - 1))
        file.write_bytes(struct.pack("<Q", length) + content[8:])
        return f"length {length}"
    if kind == "name":
        other = name.replace("layers.1", "layers.99") if "layers.1" in name and random.random() < 0.5 else name + "x"
        header[other] = header.pop(name)
    elif kind == "missing":
        del header[name]
    elif kind == "dtype":
        entry["dtype"] = random.choice(("F64", "F16", "BF16", "F32", "I32", "U8", "BOOL", "F8_E4M3", "X", 5, None))
    elif kind == "shape":
        shape = entry["shape"]
        entry["shape"] = random.choice((shape[::-1], [*shape, 1], [-1], [2**62, 2**62], [], "x", [0], [1.5]))
    elif kind == "offsets":
        entry["data_offsets"] = random.choice(
            ([0, 0], [-1, 4], [0, 2**62], [4, 0], [0], None, entry["data_offsets"][::-1])
        )
    elif kind == "metadata":
        header["__metadata__"] = random.choice(({}, {"format": "tf"}, {"format": "x"}, {"format": 5}, 7, None))
    text = json.dumps(header).encode()
    if kind == "raw":
        text = random.choice(TEXTS)
    file.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])
    return f"{kind} of {name}"


def _bytes(folder: Path, random: Random) -> str:
    """Changes some bytes of any file, cuts it off or makes it longer."""
    file = random.choice(_files(folder))
    content = bytearray(file.read_bytes())
    if not content:
        return "empty"
    kind = random.choice(("cut", "longer", "changed", "changed"))
    if kind == "cut":
        del content[random.randrange(len(content)) :]
    elif kind == "longer":
        content += random.randbytes(random.choice((1, 8, 4096)))
    else:
        for _ in range(random.choice((1, 4, 64))):
            content[random.randrange(min(len(content), random.choice((64, 4096, 10**9))))] = random.randrange(256)
    file.write_bytes(content)
    return f"{file.name} {kind}"


def _whole_file(folder: Path, random: Random) -> str:
    """Replaces any file by another text, an empty file, a folder or nothing."""
    file = random.choice(_files(folder))
    file.unlink()
    kind = random.random()
    if kind < 0.2:
        return f"no {file.name}"
    if kind < 0.3:
        file.mkdir()
        return f"folder {file.name}"
    text = random.choice(TEXTS)
    file.write_bytes(text)
    return f"{file.name} is {text[:20]}"


def _index(folder: Path, random: Random) -> str:
    """Adds or changes an index of shards."""
    file, weights = folder / INDEX, _weights(folder, random)
    index = _read(file)
    if not isinstance(index, dict) or not isinstance(index.get("weight_map"), dict):
        index = {"metadata": {"total_size": 5}, "weight_map": {"model.norm.weight": weights.name if weights else "x"}}
    kind = random.choice(("metadata", "no metadata", "map", "no map", "entry", "less"))
    placed = index["weight_map"]
    name = random.choice(sorted(placed) or ["x"])
    if kind == "metadata":
        index["metadata"] = random.choice(VALUES)
    elif kind == "no metadata":
        index.pop("metadata", None)
    elif kind == "map":
        index["weight_map"] = random.choice(VALUES)
    elif kind == "no map":
        del index["weight_map"]
    elif kind == "entry":
        placed[name] = random.choice((*VALUES, "../x", "/etc/passwd", "model.safetensors", "config.json", "."))
    else:
        placed.pop(name, None)
    file.write_bytes(json.dumps(index).encode("utf-8", "surrogatepass"))
    return kind


def _card(folder: Path, random: Random) -> str:
    card = random.choice(CARDS)
    (folder / "README.md").write_bytes(card)
    return str(card[:30])


WAYS: dict[Callable[[Path, Random], str], int] = {_field: 8, _header: 3, _bytes: 3, _whole_file: 2, _index: 2, _card: 1}
WAYS |= {_deep: 1, _generation_field: 1}


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_file())


def _weights(folder: Path, random: Random) -> Path | None:
    files = [path for path in _files(folder) if path.suffix == ".safetensors"]
    return random.choice(files) if files else None


def _read(file: Path):
    try:
        return json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
