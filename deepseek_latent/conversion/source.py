"""A checkpoint to convert: read tensor by tensor, and refused before any work where it is not what it says."""

import functools
import hashlib
import json
import re
from collections.abc import Iterable
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .checkpoint import (
    SAFETENSORS_DTYPES,
    StoredTensor,
    local_or_hub,
    merge_headers,
    not_found_error,
    read_json,
    read_shards,
)
from .target import Piece

DTYPES = {name: dtype for dtype, name in SAFETENSORS_DTYPES.items()}
# what a model is used with beside its weights and config, and what says who may use it
BESIDE = ("tokenizer*", "special_tokens_map.json", "vocab*", "merges.txt", "chat_template*", "*.model", "LICENSE*")
_LAYER = re.compile(r"(?:.*\.)?layers\.(\d+)\.")


class Source:
    """A folder of safetensors files and its config.json; `source[name]` reads one tensor as it is stored.

    Raises ValueError, naming what is wrong, for a folder whose files are absent, unreadable, outside of it, quantized
    or pickles, or hold a tensor twice or other layers than the config says; and on reading a tensor with NaN.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder).expanduser()
        if not self.folder.is_dir():
            raise ValueError(f"expected a folder with a checkpoint, got {folder}; download it first.")
        self.config = read_json(self.folder / "config.json")
        if self.config.get("quantization_config"):
            raise ValueError(f"expected unquantized weights, got a quantization_config in {folder}; take its source.")
        self.tensors = self._headers()
        layers = self.config.get("num_hidden_layers")
        stored = {int(found[1]) for name in self.tensors if (found := _LAYER.match(name))}
        if layers is not None and layers != len(stored):
            raise ValueError(f"config.json says num_hidden_layers {layers}, the files hold {len(stored)}; correct one.")

    def _headers(self) -> dict[str, StoredTensor]:
        if not any(self.folder.glob("*.safetensors")):
            pickles = sorted(path.name for path in self.folder.iterdir() if path.suffix in (".bin", ".pt", ".pth"))
            found = f", only {pickles[0]}, which could run code when it is read" if pickles else ""
            raise ValueError(f"expected safetensors files in {self.folder}, found none{found}.")
        headers, problems = read_shards(self.folder)
        tensors = merge_headers(headers, problems)
        for name, tensor in tensors.items():
            if tensor.dtype not in DTYPES:
                problems.append(f"{name} has dtype {tensor.dtype}, expected one of {', '.join(DTYPES)}")
        if problems:
            more = f", and {len(problems) - 1:,} more" if len(problems) > 1 else ""
            raise ValueError(f"cannot convert {self.folder}: {problems[0]}{more}.")
        return tensors

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    def shape(self, name: str) -> tuple[int, ...]:
        return self.tensors[name].shape

    def dtype(self, name: str) -> torch.dtype:
        return DTYPES[self.tensors[name].dtype]

    def __getitem__(self, name: str) -> Tensor:
        file = self.tensors[name].file
        try:
            # opened anew for each tensor, since what was read of a mapped file counts as memory of the process
            with safe_open(self.folder / file, framework="pt") as stored:
                tensor = stored.get_tensor(name)
        except SafetensorError as error:
            raise ValueError(f"{file} changed while it was read ({error}); start again.") from error
        if not tensor.isfinite().all():
            raise ValueError(f"{name} in {self.folder / file} holds NaN or infinity; take another copy.")
        return tensor

    def piece(self, name: str) -> Piece:
        """A tensor that goes along unchanged."""
        return Piece(name, self.shape(name), self.dtype(name), functools.partial(self.__getitem__, name))

    def companion_files(self) -> list[Path]:
        return companion_files(self.folder)

    @property
    def name(self) -> str:
        return self.config.get("_name_or_path") or self.folder.resolve().name

    def fingerprint(self) -> str:
        return fingerprint(self.config, {self.folder / tensor.file for tensor in self.tensors.values()})


def fingerprint(config: dict, files: Iterable[Path]) -> str:
    """Changes with the config and with any weight file; weights themselves are not read."""
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    for file in sorted(files):
        state = file.stat()
        digest.update(f"{file.name} {state.st_size} {state.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def companion_files(folder: Path) -> list[Path]:
    """Files of a checkpoint that go along unchanged."""
    return sorted({path for pattern in BESIDE for path in folder.glob(pattern) if path.is_file()})


def fetch_source(given: str) -> Path:
    """The folder of a path, or of what a hub id names, downloaded; ValueError if it is neither."""
    place = local_or_hub(given)
    if isinstance(place, Path):
        return place
    wanted = [
        "*.safetensors",
        "*.safetensors.index.json",
        "config.json",
        "generation_config.json",
        "README.md",
        *BESIDE,
    ]
    try:
        return Path(snapshot_download(given, allow_patterns=wanted))
    except (OSError, HFValidationError) as error:
        raise not_found_error(given, error) from error
