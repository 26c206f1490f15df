"""A checkpoint to convert: checked before any work, then read tensor by tensor."""

import functools
import hashlib
import json
import re
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..json_files import read_json
from .boundaries import file_inside
from .checkpoint import (
    SAFETENSORS_DTYPES,
    StoredTensor,
    merge_headers,
    read_generation_config,
    read_headers,
)
from .places import download, folder_or_hub
from .source_card import read_card
from .target import Piece

TORCH_DTYPES = {name: dtype for dtype, name in SAFETENSORS_DTYPES.items()}
# files which are copied unchanged, as data: code among them is not run
COMPANION_PATTERNS = ("tokenizer*", "special_tokens_map.json", "vocab*", "merges.txt", "chat_template*", "*.model")
COMPANION_PATTERNS += ("LICENSE*", "generation_config.json")
MAX_FILE_BYTES = 2 * 10**8  # of any file but weights
READ_PATTERNS = ("*.safetensors", "*.safetensors.index.json", "config.json", "README.md", *COMPANION_PATTERNS)
_LAYER = re.compile(r"(?:.*\.)?layers\.(\d+)\.")


class Source:
    """A folder of safetensors files and its config.json; `source[name]` reads one tensor as it is stored.

    Raises ValueError for files that are absent, unreadable, outside of the folder, quantized or pickles, that hold a
    tensor twice, or whose number of layers is not that of the config. Reading a tensor with NaN or infinity raises it
    too.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder).expanduser()
        if not self.folder.is_dir():
            raise ValueError(f"expected a folder with a checkpoint, got {folder}; download it first.")
        self.config = read_json(self.folder / "config.json")
        # what is copied or kept at the end is read now, before hours of work
        self.card = read_card(self.folder)
        read_generation_config(self.folder)
        if self.config.get("quantization_config"):
            raise ValueError(f"expected unquantized weights, got a quantization_config in {folder}; take its source.")
        self.tensors = self._headers()
        num_layers = self.config.get("num_hidden_layers")
        layers = {int(match[1]) for name in self.tensors if (match := _LAYER.match(name))}
        # architectures that name their layers otherwise are refused by their model_type
        if layers and num_layers is not None and num_layers != len(layers):
            raise ValueError(
                f"config.json has num_hidden_layers {num_layers}, but the files hold {len(layers)}; correct one."
            )

    def _headers(self) -> dict[str, StoredTensor]:
        if not any(self.folder.glob("*.safetensors")):
            pickles = sorted(path.name for path in self.folder.iterdir() if path.suffix in (".bin", ".pt", ".pth"))
            found = f", only {pickles[0]}, which could run code when it is read" if pickles else ""
            raise ValueError(f"expected safetensors files in {self.folder}, found none{found}.")
        headers, problems = read_headers(self.folder)
        tensors, duplicates = merge_headers(headers)
        problems = duplicates + problems
        for name, tensor in tensors.items():
            if tensor.dtype not in TORCH_DTYPES:
                problems.append(f"{name} has dtype {tensor.dtype}, expected one of {', '.join(TORCH_DTYPES)}")
        if problems:
            more = f", and {len(problems) - 1:,} more" if len(problems) > 1 else ""
            raise ValueError(f"cannot convert {self.folder}: {problems[0]}{more}.")
        return tensors

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    def shape(self, name: str) -> tuple[int, ...]:
        return self.tensors[name].shape

    def dtype(self, name: str) -> torch.dtype:
        return TORCH_DTYPES[self.tensors[name].dtype]

    def __getitem__(self, name: str) -> Tensor:
        file = self.tensors[name].file
        try:
            # opened again for each tensor, because the pages read from a mapped file count as memory of the process
            with safe_open(self.folder / file, framework="pt") as stored:
                tensor = stored.get_tensor(name)
        except SafetensorError as error:
            raise ValueError(f"{file} changed while it was read ({error}); start again.") from error
        if not tensor.isfinite().all():
            raise ValueError(f"{name} in {self.folder / file} holds NaN or infinity; take another copy.")
        return tensor

    def piece(self, name: str) -> Piece:
        """A tensor that is copied unchanged."""
        return Piece(name, self.shape(name), self.dtype(name), functools.partial(self.__getitem__, name))

    def companion_files(self) -> list[Path]:
        return companion_files(self.folder)

    @property
    def name(self) -> str:
        return self.config.get("_name_or_path") or self.folder.resolve().name

    def weight_files(self) -> list[Path]:
        return sorted({self.folder / tensor.file for tensor in self.tensors.values()})

    def fingerprint(self) -> str:
        return fingerprint(self.config, self.weight_files())


def fingerprint(config: dict, files: Iterable[Path]) -> str:
    """A hash that changes with the config and with the size or date of any weight file."""
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    for file in sorted(files):
        state = file.stat()
        digest.update(f"{file.name} {state.st_size} {state.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def check_files(folder: Path) -> None:
    """Raises ValueError unless `folder` is one and every file of it that a conversion reads is a regular file inside.

    Whatever is read may be written into OUT and published. Subfolders are never read.
    """
    if not folder.is_dir():
        raise ValueError(f"expected a folder with a checkpoint, got {folder}; download it first.")
    for path in _matching(folder, READ_PATTERNS):
        size = file_inside(folder, path.name).stat().st_size
        if size > MAX_FILE_BYTES and path.suffix != ".safetensors":
            raise ValueError(
                f"{path.name!r} in {folder} has {size:,} bytes, expected {MAX_FILE_BYTES:,} at most; restore it."
            )


def companion_files(folder: Path) -> list[Path]:
    """The files of a checkpoint that are copied unchanged."""
    return _matching(folder, COMPANION_PATTERNS)


def _matching(folder: Path, patterns: Iterable[str]) -> list[Path]:
    return sorted({path for pattern in patterns for path in folder.glob(pattern) if not path.is_dir()})


def fetch_source(given: str) -> Path:
    """A folder, or that of a hub id after downloading it. Raises ValueError if neither exists."""
    place = folder_or_hub(given)
    return place if isinstance(place, Path) else download(place, [*READ_PATTERNS])
