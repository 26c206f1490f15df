"""A GGUF file as a source: the folder with safetensors files that it would be, made for as long as it is read."""

import glob
import os
import shutil
import struct
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from huggingface_hub import ModelCardData
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoModelForCausalLM, GgufConfig, PreTrainedConfig

from ..configuration.checks import SIZES, check_size
from .places import download, local_or_hub
from .progress import announce
from .source import fetch_source
from .text import load_tokenizer

# for others, transformers' reading of GGUF files has not been compared with their safetensors files
MODEL_TYPES = ("llama", "qwen2")
# what damaged metadata leads to in transformers and in the package gguf
_BAD_METADATA = (ArithmeticError, AttributeError, LookupError, MemoryError, OSError, RuntimeError, TypeError)
_BAD_METADATA += (ValueError, struct.error, StrictDataclassError)


@contextmanager
def source_folder(given: str, gguf_file: str | None) -> Iterator[Path]:
    """The folder of a source, which is a folder, a hub id or a GGUF file; `gguf_file` is the name of one in the others.

    The folder of a GGUF file is in the system's temporary folder, and is removed at the end. Raises ValueError if there
    is no such source, and as `write_dequantized` does.
    """
    file = _find(given, gguf_file)
    if file is None:
        yield fetch_source(given)
        return
    with tempfile.TemporaryDirectory(prefix="deepseek-latent-") as temporary:
        # the name of this folder is that of the source in the model card
        folder = Path(temporary) / file.stem
        write_dequantized(file, folder)
        yield folder


def _find(given: str, gguf_file: str | None) -> Path | None:
    """The GGUF file that is meant, or None for a source without one."""
    if gguf_file is None and not given.endswith(".gguf"):
        return None
    if gguf_file is None and not Path(given).expanduser().exists():
        raise ValueError(
            f"expected a GGUF file, got {given}, which does not exist; one on the hub is SRC --gguf-file NAME."
        )
    place = local_or_hub(given)
    if isinstance(place, Path):
        file = place / gguf_file if gguf_file else place
        if not file.is_file():
            raise ValueError(f"expected a GGUF file, got {file}, which is not a file; correct its name.")
        return file
    file = download(place, [glob.escape(gguf_file)]) / gguf_file
    if not file.is_file():
        raise ValueError(f"expected a GGUF file in {place} on the hub, got no {gguf_file} there; correct its name.")
    return file


def write_dequantized(file: Path, folder: Path) -> None:
    """Writes the model and the tokenizer of a GGUF file to a new folder, as transformers saves them.

    Weights are in bfloat16 if the file holds them so, and else in float32. The whole model is in memory. The folder has
    a link to the file, which keeps a conversion from replacing it.

    Raises ValueError if the package gguf is not installed, if transformers cannot read the file or would drop a part of
    it, and if the disk has no room.
    """
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise ValueError(f"{file.name} needs the package gguf, which is absent; run pip install gguf.") from error
    folder.mkdir()
    link = folder / file.name
    # transformers sees the file alone, without the adapter or config that may lie beside it
    link.symlink_to(file.resolve())
    try:
        # first transformers' own parser, which stays within the file whatever sizes its header gives
        config = AutoConfig.from_pretrained(folder, gguf_file=link.name)
        reader = GGUFReader(link)
        _check_contents(reader, config)
        dtype = _dtype(reader)
        card = ModelCardData(
            license=_metadata(reader, "general.license"), language=_metadata(reader, "general.languages")
        )
    except _BAD_METADATA as error:
        raise ValueError(f"expected a GGUF file that transformers can read, got: {error} ({file}).") from error
    num_bytes = sum(int(tensor.n_elements) for tensor in reader.tensors) * dtype.itemsize
    free = shutil.disk_usage(folder).free
    if free < num_bytes:
        raise ValueError(
            f"{num_bytes:,} bytes are to be written to {folder}, where {free:,} are left; make room, or set TMPDIR to "
            "another folder."
        )
    try:
        tokenizer = load_tokenizer(str(folder), gguf_file=link.name)
    except ValueError as error:
        raise ValueError(
            f"expected a tokenizer that transformers can read, got: {error.__cause__} ({file})."
        ) from error
    announce(f"reading {file.name} and writing its weights in {str(dtype).removeprefix('torch.')} to {folder.parent}")
    try:
        model, found = AutoModelForCausalLM.from_pretrained(
            folder,
            gguf_file=link.name,
            dtype=dtype,
            quantization_config=GgufConfig(dequantize=True),
            output_loading_info=True,
        )
    except _BAD_METADATA as error:
        raise ValueError(f"expected weights that transformers can dequantize, got: {error} ({file}).") from error
    if missing := sorted(found["missing_keys"]):
        raise ValueError(f"expected all weights in {file}, got none for {missing[0]}; take another copy.")
    # transformers puts the title of the model where others look for a path
    model.config.__dict__.pop("_model_name_or_path", None)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "README.md").write_text(f"---\n{card.to_yaml()}\n---\n", encoding="utf-8")
    changed = file.stat().st_mtime_ns
    for written in folder.glob("*.safetensors"):
        # the same source again, so that the next run continues an interrupted conversion
        os.utime(written, ns=(changed, changed))


def _metadata(reader, name: str):
    """A value of the file's metadata, or None."""
    return reader.fields[name].contents() if name in reader.fields else None


def _dtype(reader) -> torch.dtype:
    types = {tensor.tensor_type.name for tensor in reader.tensors if len(tensor.shape) > 1}
    return torch.bfloat16 if types == {"BF16"} else torch.float32


def _check_contents(reader, config: PreTrainedConfig) -> None:
    """Raises ValueError for a model that cannot be converted, and for contents that transformers leaves out."""
    if config.model_type not in MODEL_TYPES:
        raise ValueError(f"expected one of {', '.join(MODEL_TYPES)}, got a {config.model_type}")
    architecture = _metadata(reader, "general.architecture")
    left_out = {
        "scales RoPE": _metadata(reader, f"{architecture}.rope.scaling.type") not in (None, "none")
        or "rope_freqs.weight" in {tensor.name for tensor in reader.tensors},
        "has a sliding window": _metadata(reader, f"{architecture}.attention.sliding_window"),
    }
    for what, is_so in left_out.items():
        if is_so:
            raise ValueError(f"it {what}, which transformers leaves out; convert the model's safetensors files")
    for name, most in SIZES.items():
        if hasattr(config, name):
            check_size(name, getattr(config, name), most)
    with torch.device("meta"):
        expected = AutoModelForCausalLM.from_config(config).num_parameters()
    held = sum(int(tensor.n_elements) for tensor in reader.tensors)
    if held != expected:
        raise ValueError(f"its metadata describes a model of {expected:,} numbers, but it holds {held:,}")
