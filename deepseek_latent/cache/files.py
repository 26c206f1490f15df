"""Files of cached tensors that cannot be taken for what they are not, and the name of the model they belong to.

Both rest on one checksum that reads every byte where it lies. It guards against accidents, not against forgery.
"""

import functools
import hashlib
import json
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers.configuration_utils import PreTrainedConfig

from ..compat.peft import adapted_layers, adapter_state

FORMAT = 2
KEY = "deepseek_latent"  # of our entry in the file's header
# beside transformers' own fields, what a config.json says that no cached number depends on
_NEUTRAL = re.compile(
    r"_.*|.*_dropout|.*_token_id|output_.*|aux_loss_alpha|auto_map|ep_size|initializer_range|pretraining_tp"
    r"|rope_scaling|rope_theta|seq_aux|tie_word_embeddings|torch_dtype|use_cache"
)
_WORDS_PER_SUM = 512  # words of 8 bytes


def fingerprint(model: torch.nn.Module) -> str:
    """Names a model as far as its cache depends on it, in hexadecimal: configuration, every weight, peft's adapters.

    Two models with one name compute the same cache; where that cannot be known cheaply the names differ. So a model
    with adapters in it has another name than without, disabled or merged ones too: merging rounds. Every weight is
    read; one that is spread over processes is gathered for it, and then all of them have to call.

    Raises:
        ValueError: for weights on the meta device, which hold no numbers.
    """
    tensors = model.state_dict()
    for name, tensor in tensors.items():
        if tensor.is_meta:
            raise ValueError(f"expected numbers in every weight, {name} is on the meta device; load it, offload none.")
    return _hash([settings_of(model), _digest(tensors)])


def settings_of(model: torch.nn.Module) -> list[Any]:
    """What enters the fingerprint beside the weights: configuration, and which adapters act how strongly."""
    generic = {field.name for field in fields(PreTrainedConfig)}
    config = model.config.to_dict().items()
    config = {name: value for name, value in config if name not in generic and not _NEUTRAL.fullmatch(name)}
    return [config, [[name, *adapter_state(layer)] for name, layer in adapted_layers(model)]]


def write_tensors(path: str | os.PathLike, tensors: dict[str, Tensor], metadata: dict[str, Any]) -> None:
    """Writes a safetensors file, there as a whole or not at all; `metadata` is what JSON can hold.

    Contiguous tensors on the CPU are written from where they lie, others are copied for it. Only the user who wrote
    the file may read it.

    Raises:
        FileNotFoundError: if the folder is not there.
    """
    path = Path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"expected a folder to write {path.name} into, {path.parent} is none; create it first.")
    # through JSON and back, so that the seal is over what a reader will see
    record = {"format": FORMAT, "metadata": json.loads(json.dumps(metadata)), "contents": _digest(tensors)}
    record["seal"] = _hash(record)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
        temporary = Path(folder, path.name)
        save_file(tensors, temporary, {KEY: json.dumps(record)})
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)


def read_tensors(path: str | os.PathLike, verify: bool = True) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the metadata that `write_tensors` was given; refuses a file that holds anything else.

    `verify=False` trusts the tensors' contents and reads none of them before they are used.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is cut off, altered, of a newer format or from elsewhere.
    """
    with _opened(path) as file:
        record = _record(path, file.metadata())
        names = file.keys()
        # memory of one private mapping of the file: paged in when read, copied when written to
        tensors = {name: file.get_tensor(name) for name in names}
    if verify and _digest(tensors) != record["contents"]:
        raise _altered(path, "its tensors are")
    return tensors, record["metadata"]


def read_metadata(path: str | os.PathLike) -> dict[str, Any]:
    """The metadata alone, checked, from the file's header; raises as `read_tensors`."""
    with _opened(path) as file:
        return _record(path, file.metadata())["metadata"]


@contextmanager
def _opened(path: str | os.PathLike) -> Iterator[safe_open]:
    """safetensors opens a file twice, for its header and for its tensors; both are of one and the same file here."""
    while True:
        found = _identity(path)
        try:
            opened = safe_open(path, framework="pt")
        except (SafetensorError, RuntimeError) as error:
            if _identity(path) == found:
                reason = f"{path} is cut off, altered or no safetensors file ({error}); write it anew."
                raise ValueError(reason) from error
            continue
        with opened as file:
            # another process may have replaced it in between
            if _identity(path) == found:
                yield file
                return


def _identity(path: str | os.PathLike) -> tuple[int, int, int]:
    if not Path(path).is_file():
        raise FileNotFoundError(f"expected a file of cached tensors, there is none at {path}.")
    status = os.stat(path)
    return status.st_ino, status.st_mtime_ns, status.st_size


def _record(path: str | os.PathLike, entries: dict[str, str] | None) -> dict[str, Any]:
    if not entries or KEY not in entries:
        raise ValueError(f"{path} was written by something else: expected an entry {KEY!r} in its header, got none.")
    try:
        record = json.loads(entries[KEY])
        is_older, is_newer = record["format"] < FORMAT, record["format"] > FORMAT
        is_whole = is_older or is_newer or record.pop("seal") == _hash(record)
    except (ValueError, TypeError, KeyError) as error:
        raise _altered(path, "its header is") from error
    if is_older or is_newer:
        remedy = "update deepseek-latent" if is_newer else "write it again"
        raise ValueError(f"expected format {FORMAT}, got {record['format']} in {path}; {remedy}.")
    if not is_whole:
        raise _altered(path, "its header is")
    return record


def _altered(path: str | os.PathLike, part: str) -> ValueError:
    return ValueError(f"{path} was altered: {part} not what was written there; remove it.")


def _hash(value: Any) -> str:
    # what JSON does not know, a quantizer's object say, counts by its class
    text = json.dumps(value, sort_keys=True, default=lambda unknown: type(unknown).__name__)
    return hashlib.sha256(text.encode()).hexdigest()


def _digest(tensors: dict[str, Tensor]) -> str:
    """Names, dtypes, shapes and all values, in hexadecimal; whatever the order, the device and the memory layout."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        for inner_name, tensor in _plain(name, tensors[name]):
            digest.update(json.dumps([inner_name, str(tensor.dtype), list(tensor.shape)]).encode())
            digest.update(_checksums(tensor).cpu().numpy())
    return digest.hexdigest()


def _plain(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The tensor, gathered if it is spread over processes; the tensors inside, if it is one of a quantizer's."""
    if hasattr(tensor, "full_tensor"):
        tensor = tensor.full_tensor()
    if not hasattr(tensor, "__tensor_flatten__"):
        yield name, tensor
        return
    for inner_name in tensor.__tensor_flatten__()[0]:
        yield from _plain(f"{name}.{inner_name}", getattr(tensor, inner_name))


@torch.no_grad()
def _checksums(tensor: Tensor) -> Tensor:
    """One sum modulo 2^64 per 4 KiB, int64, the same on every device.

    A word w counts (w xor w >> 29) times an odd number of its place: no change of one word is lost, and no exchange
    likely. Without the shift, a word's top bit would count modulo 2, and two signs changed together go unseen.
    """
    keys = _keys(tensor.device)
    # a CPU makes its four passes over what fits the cores' caches; elsewhere it is the number of passes that costs
    chunk = torch.get_num_threads() << 19 if tensor.device.type == "cpu" else 1 << 26  # bytes
    sums = []
    for data in tensor.detach().contiguous().view(-1).split(chunk // tensor.itemsize):
        data = data.view(torch.uint8)
        missing = -data.numel() % keys.nbytes
        if missing or data.storage_offset() % keys.itemsize:
            data = torch.nn.functional.pad(data, (0, missing))
        words = data.view(torch.int64).view(data.numel() // keys.nbytes, _WORDS_PER_SUM)
        sums.append((words >> 29).bitwise_xor_(words).mul_(keys).sum(dim=-1))
    return torch.cat(sums)


@functools.cache
def _keys(device: torch.device) -> Tensor:
    data = hashlib.shake_256(KEY.encode()).digest(8 * _WORDS_PER_SUM)
    return torch.frombuffer(bytearray(data), dtype=torch.int64).to(device) | 1
