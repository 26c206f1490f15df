"""Damaged, forged and foreign files of caches: each is refused in a sentence, or continues as the whole file does.

A damaged file keeps its seal. A forged one is sealed anew after a change, so that the checks behind the seal are
reached; rows of the right shape with other values cannot be told from true ones, so only damaged files are compared.
"""

import json
import re
import tempfile
import warnings
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import torch
from safetensors.torch import save
from torch import Tensor

from deepseek_latent import LatentCache, PromptCache
from deepseek_latent.cache import files
from deepseek_latent.cache.checksum import hash_tensors
from deepseek_latent.cache.format import CACHE_DTYPES
from tests.support import random_ids, tiny_model

from .campaign import Campaign

NUM_TOKENS = 70
ODD_VALUES = [None, True, -1, 0, 1, 2, 10**9, 2**31, 2**63, 10**400, 0.5, float("nan"), "", "x", "x" * 10**5, "\ud800"]
ODD_VALUES += [[], [[]], [[1]], {}, {"x": {}}, "fp8", "int6", "torch.bfloat16"]
DTYPES = [torch.float64, torch.bfloat16, torch.uint8, torch.int64, torch.bool, torch.float8_e5m2, torch.complex64]
DTYPES += [torch.uint16]


class Sample(NamedTuple):
    """A file as it was saved, what it holds, and the two tokens that follow its ids."""

    data: bytes
    tensors: dict[str, Tensor]
    metadata: dict[str, Any]
    ids: Tensor  # [b t]
    following: Tensor  # [b 2]


def run(campaign: Campaign) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    model = tiny_model(num_hidden_layers=2, n_routed_experts=None)
    with tempfile.TemporaryDirectory() as folder:
        path, prompts = Path(folder, "cache.safetensors"), Path(folder, "prompts")
        samples = [sample(model, path, x, shared) for x in CACHE_DTYPES for shared in (None, False, True)]
        others = [tiny_model(seed=1, num_hidden_layers=2, n_routed_experts=None), tiny_model(n_routed_experts=None)]
        foreign = [sample(other, path, None, None).data for other in others]
        for random in campaign.cases():
            whole = random.choice(samples)
            kind = random.choices(["damaged", "forged", "foreign"], [70, 28, 2])[0]
            if kind == "damaged":
                data = damaged(whole.data, random.choice(samples).data, random)
            else:
                data = forged(whole, random) if kind == "forged" else random.choice(foreign)
            campaign.count(kind)
            read = random.choices([load_cache, load_prompt, load_metadata], [6, 3, 1])[0]
            place = path if read is not load_prompt else prompts / f"{'ab' * 32}.v{files.FORMAT_VERSION}.safetensors"
            place.parent.mkdir(exist_ok=True)
            place.write_bytes(data)
            with torch.no_grad(), campaign.judged(f"{kind} file, {read.__name__}"):
                is_right = read(place, whole, model)
                if kind == "foreign" and read is load_cache:
                    campaign.finding("wrong answer", "a file of another model was loaded")
                elif kind == "damaged" and not is_right:
                    campaign.finding("wrong answer", f"{read.__name__} took a damaged file for what it is not")
                elif kind == "damaged" and read is load_cache and data != whole.data:
                    campaign.count("changes that mean nothing, loaded as written")


@torch.no_grad()
def sample(model, path: Path, cache_dtype: str | None, shared: bool | None) -> Sample:
    """A cache of one sequence if `shared` is None, otherwise of two, with or without a shared prefix."""
    ids, cache = random_ids(1, NUM_TOKENS), LatentCache(model.config, cache_dtype=cache_dtype)
    if shared is not None:
        ids = torch.cat((ids.expand(2, -1), random_ids(2, 9, seed=5)), dim=1)
    if shared:
        model(ids[:1, :NUM_TOKENS], cache=cache)
        cache.batch_repeat_interleave(2)
    model(ids[:, cache.get_seq_length() :], cache=cache)
    cache.save(path, tokens=ids, model=model)
    following = two_tokens(model, ids, LatentCache(model.config, cache_dtype=cache_dtype))
    tensors, metadata = files.read_tensors(path)
    return Sample(path.read_bytes(), {name: x.clone() for name, x in tensors.items()}, metadata, ids, following)


def two_tokens(model, ids: Tensor, cache: LatentCache) -> Tensor:
    """The greedy continuation [b 2] of ids [b t], of which the cache may hold the first."""
    tokens, new = [], ids[:, cache.get_seq_length() :]
    for _ in range(2):
        new = model(new, cache=cache, use_cache=True).logits[:, -1:].argmax(-1)
        tokens.append(new)
    return torch.cat(tokens, dim=1)


# what reads a file; each returns True if the whole file would have given the same


def load_cache(path: Path, whole: Sample, model) -> bool:
    cache = LatentCache.load(path, model=model)
    cache.crop(-1)
    return torch.equal(two_tokens(model, whole.ids, cache), whole.following)


def load_prompt(path: Path, whole: Sample, model) -> bool:
    prompts = PromptCache(path.parent, max_bytes=10**9, cache_dtype=whole.metadata["cache_dtype"])
    return torch.equal(two_tokens(model, whole.ids[:1], prompts.load(whole.ids[:1], model)), whole.following[:1])


def load_metadata(path: Path, whole: Sample, model) -> bool:
    return files.read_metadata(path) == whole.metadata


# what is done to a file


def damaged(data: bytes, other: bytes, random: Random) -> bytes:
    """Changes bytes anywhere, or text of the header, without sealing it anew."""
    data, start, length = bytearray(data), random.randrange(len(data)), random.choice([1, 1, 2, 8, 64, 1000])
    end = min(start + length, len(data))
    how = random.choice(
        ["bit", "byte", "overwrite", "zeros", "cut off", "remove", "double", "extend", "graft", "header"]
    )
    if how in ("bit", "byte"):
        data[start] ^= 1 << random.randrange(8) if how == "bit" else random.randrange(1, 256)
    elif how in ("overwrite", "zeros"):
        data[start:end] = random.randbytes(end - start) if how == "overwrite" else bytes(end - start)
    elif how == "cut off":
        del data[start:]
    elif how == "remove":
        del data[start:end]
    elif how == "double":
        data[start:start] = data[start:end]
    elif how == "extend":
        data += random.randbytes(length)
    elif how == "graft":
        data[start:end] = other[start:end]
    else:
        size = int.from_bytes(data[:8], "little")
        numbers = [*re.finditer(rb"\d+|[A-Z]+\d+|[a-z_]+", data[8 : 8 + size])]
        found = random.choice(numbers)
        new = random.choice(
            [b"0", b"-1", b"1000000000", b"9" * 30, b"F32", b"F64", b"U8", b"F6_E2M3", b"x" * 3000, b"rows"]
        )
        header = data[8 : 8 + found.start()] + new + data[8 + found.end() : 8 + size]
        data = len(header).to_bytes(8, "little") + header + data[8 + size :]
    return bytes(data)


def forged(whole: Sample, random: Random) -> bytes:
    """Changes metadata or tensors and writes them with a right seal."""
    tensors, metadata = dict(whole.tensors), json.loads(json.dumps(whole.metadata))
    name = random.choice([*tensors])
    x = tensors[name]
    how = random.choice(["metadata", "metadata", "token", "shape", "dtype", "drop", "rename", "swap", "add", "values"])
    if how == "metadata":
        metadata[random.choice([*metadata, "another"])] = random.choice(ODD_VALUES)
        if random.random() < 0.1:
            metadata = random.choice(ODD_VALUES)
        elif random.random() < 0.1:
            del metadata[random.choice([*metadata])]
    elif how == "token":
        row = random.choice(metadata["tokens"])
        row[random.randrange(len(row))] = random.choice([*ODD_VALUES, 3])
        if random.random() < 0.3:
            del row[0]
    elif how == "shape":
        shapes = [
            x[:, 1:],
            x[..., 1:],
            x[:0],
            x[0],
            x[:, :0],
            x.flatten(),
            x.transpose(0, 1),
            torch.cat((x, x)),
            x[None],
        ]
        tensors[name] = random.choice(shapes)
    elif how == "dtype":
        dtype = random.choice(DTYPES)
        tensors[name] = random.choice([x.to(dtype), torch.zeros(x.shape, dtype=dtype)])
    elif how == "drop":
        del tensors[name]
    elif how == "rename":
        tensors[random.choice(["layers.9.rows", "rows", "", "layers.0.prefix", "layers.1.rows"])] = tensors.pop(name)
    elif how == "swap":
        other = random.choice([*tensors])
        tensors[name], tensors[other] = tensors[other], tensors[name]
    elif how == "add":
        tensors[random.choice(["layers.0.rows", "layers.0.prefix", "x"])] = random.choice([x, x[:, :3], torch.ones(())])
    else:
        tensors[name] = torch.full_like(x, 255 if x.dtype == torch.uint8 else float("nan"))
    tensors = {name: x.clone(memory_format=torch.contiguous_format) for name, x in tensors.items()}
    return save(tensors, files._header_entries(metadata, hash_tensors(tensors)))
