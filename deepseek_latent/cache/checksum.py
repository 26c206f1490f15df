"""A checksum of tensors and of JSON values that reads every byte. It guards against accidents, not against forgery."""

import functools
import hashlib
import json
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

_WORDS_PER_SUM = 512  # words of 8 bytes


def hash_json(value: Any) -> str:
    # a value that JSON cannot hold, such as a quantizer's settings object, is hashed as the name of its class
    text = json.dumps(value, sort_keys=True, default=lambda unknown: type(unknown).__name__)
    return hashlib.sha256(text.encode()).hexdigest()


def hash_tensors(tensors: dict[str, Tensor]) -> str:
    """Hashes names, dtypes, shapes and values, in hexadecimal; order, device and memory layout do not matter."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        for inner_name, tensor in _plain_tensors(name, tensors[name]):
            digest.update(json.dumps([inner_name, str(tensor.dtype), list(tensor.shape)]).encode())
            digest.update(checksums(tensor).cpu().numpy())
    return digest.hexdigest()


def _plain_tensors(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Yields `tensor`, gathered if it is sharded over processes, or the inner tensors of a quantizer's subclass."""
    if hasattr(tensor, "full_tensor"):
        tensor = tensor.full_tensor()
    if not hasattr(tensor, "__tensor_flatten__"):
        yield name, tensor
        return
    for inner_name in tensor.__tensor_flatten__()[0]:
        yield from _plain_tensors(f"{name}.{inner_name}", getattr(tensor, inner_name))


@torch.no_grad()
def checksums(tensor: Tensor) -> Tensor:
    """One sum modulo 2^64 for each 4 KiB, int64, the same on every device.

    A word w contributes (w xor w >> 29) times an odd number that depends on its position. So no change of one word is
    missed, and an exchange of two words hardly ever. Without the shift, the top bit of a word would count modulo 2,
    and two changed signs would cancel out.
    """
    factors = position_factors(tensor.device)
    # on a CPU, the four passes run over a chunk that fits the caches; elsewhere the number of passes is what costs
    chunk = torch.get_num_threads() << 19 if tensor.device.type == "cpu" else 1 << 26  # bytes
    sums = []
    for data in tensor.detach().contiguous().view(-1).split(chunk // tensor.itemsize):
        data = data.view(torch.uint8)
        missing = -data.numel() % factors.nbytes
        if missing or data.storage_offset() % factors.itemsize:
            data = torch.nn.functional.pad(data, (0, missing))
        words = data.view(torch.int64).view(data.numel() // factors.nbytes, _WORDS_PER_SUM)
        sums.append((words >> 29).bitwise_xor_(words).mul_(factors).sum(dim=-1))
    return torch.cat(sums)


@functools.cache
def position_factors(device: torch.device) -> Tensor:
    """The odd factor for each word's position, [512] int64."""
    data = hashlib.shake_256(b"deepseek_latent").digest(8 * _WORDS_PER_SUM)
    return torch.frombuffer(bytearray(data), dtype=torch.int64).to(device) | 1
