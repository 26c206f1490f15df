"""Helpers of the tests of `PromptCache`."""

import os
import signal
import subprocess
import sys
from itertools import count
from pathlib import Path

import torch

from deepseek_latent import LatentCache, whole_files
from deepseek_latent.cache.prompt_cache import PromptCache
from tests.support import random_ids

ROOM = 10**9  # bytes


@torch.no_grad()
def last_logits(model, ids: torch.Tensor, cache: LatentCache) -> torch.Tensor:
    """Logits of the last token, after computing the tokens that `cache` does not hold."""
    held = cache.get_seq_length()
    return model(ids[:, held:], cache=cache, use_cache=True).logits[:, -1]


def store_prompt(prompts: PromptCache, model, ids: torch.Tensor) -> None:
    cache = LatentCache(model.config, cache_dtype=prompts.cache_dtype)
    last_logits(model, ids, cache)
    prompts.store(cache, ids, model)


def with_prefix(ids: torch.Tensor, length: int, seed: int) -> torch.Tensor:
    """The first `length` of these ids, then 40 other ids."""
    rest = random_ids(1, 40, seed)
    rest[0, 0] = 2 + (ids[0, length] - 1) % 90
    return torch.cat((ids[:, :length], rest), dim=1)


def num_tokens_found(prompts: PromptCache, model, ids: torch.Tensor) -> int:
    return prompts.load(ids, model).get_seq_length()


def kill_at(point: int, folder: str) -> None:
    """Makes this process end at a change of a file in `folder`; point -1 is where half of the new file is written."""

    def write_half(tensors, path, metadata):
        save_file(tensors, path, metadata)
        os.truncate(path, path.stat().st_size // 2)
        os.kill(os.getpid(), signal.SIGKILL)

    changes, change = count(), {"mkdir", "rename", "remove", "rmdir", "chmod", "utime"}

    def watch(event, arguments):
        opens_to_write = event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        is_change = (opens_to_write or event.removeprefix("os.") in change) and folder in str(arguments)
        if is_change and next(changes) == point:
            os.kill(os.getpid(), signal.SIGKILL)

    if point < 0:
        save_file, whole_files.save_file = whole_files.save_file, write_half
    else:
        sys.addaudithook(watch)


def damage(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 4
    path.write_bytes(data)


def start(function: str, *arguments) -> subprocess.Popen:
    """Calls "tests.module:function" in another process; the first argument is a path, the others are numbers."""
    module, name = function.split(":")
    program = f"import sys, pathlib, {module} as there; path, *numbers = sys.argv[1:]"
    program += f"; print(there.{name}(pathlib.Path(path), *map(int, numbers)))"
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    options |= {"cwd": Path(__file__).parents[2], "env": os.environ | {"OMP_NUM_THREADS": "1"}}
    return subprocess.Popen([sys.executable, "-c", program, *map(str, arguments)], **options)
