"""Damaged JSON and safetensors files: parts that are missing, renamed or of another kind, and broken files."""

import copy
import json
from pathlib import Path
from random import Random

import torch
from safetensors.torch import save
from torch import Tensor

JUNK = [None, True, False, 0, 1, 2, 3, 8, -1, 2.5, float("nan"), 1e300, 10**400, "", "2", "*", "[", ".*", "all-linear"]
JUNK += [[], ["o_proj"], [1], [None], [[]], {}, {"a": 1}, {"1": [0]}, {"experts.gate_up_proj": 2}, {".*": 3}, {"(": 1}]
JUNK += [{"q_proj": None}, {"1": [0, 0]}, {"1": [True]}, {"01": [1]}, {"1": [99]}, "a{99999999999}", "x" * 5000]


def damage_json(content: dict, random: Random, file: Path, times: int = 1) -> None:
    """Writes `content` with some damage, if `times` is not 0."""
    content = copy.deepcopy(content)
    for _ in range(random.randint(1, 2) if times else 0):
        holder = content
        # sometimes inside a field
        if random.random() < 0.3 and (inner := [x for x in content.values() if isinstance(x, dict) and x]):
            holder = random.choice(inner)
        name = random.choice([*holder])
        if random.random() < 0.2:
            holder[random.choice(["new", name.upper(), f"{name}0"])] = holder.pop(name)
        else:
            holder[name] = copy.deepcopy(random.choice(JUNK))
        if not content:
            break
    text = json.dumps(content)
    if times and random.random() < 0.1:
        text = random.choice([text[: random.randrange(len(text))], "[" * 100_000, "[]", "7", "\x00", text + "}"])
    file.write_text(text, encoding="utf-8")


def damage_tensors(tensors: dict[str, Tensor], random: Random, file: Path, times: int = 1) -> None:
    """Writes `tensors` as a safetensors file with some damage, if `times` is not 0."""
    tensors = dict(tensors)
    for _ in range(random.randint(1, 2) if times else 0):
        name = random.choice([*tensors])
        x = tensors.pop(name)
        kind = random.choice(["drop", "rename", "copy", "shape", "dtype", "values"])
        if kind in ("rename", "copy"):
            old, new = random.choice(
                [("1", "2"), ("1", "7"), ("0", "00"), (".mlp", ""), ("A", "B"), ("model.", ""), ("gate", "up")]
            )
            tensors.setdefault(name.replace(old, new, 1), x)
        if kind == "shape" and x.dim() and x.shape[0]:
            x = random.choice(
                [x.T.contiguous(), x[:-1], x[..., :-1].contiguous(), x[0], x[None], x[:0], torch.cat([x, x])]
            )
        if kind == "dtype":
            x = x.to(
                random.choice(
                    [torch.int64, torch.uint8, torch.bool, torch.float64, torch.bfloat16, torch.float8_e4m3fn]
                )
            )
        if kind == "values" and x.numel() and x.is_floating_point():
            x = x.contiguous().clone()
            x.view(-1)[random.randrange(x.numel())] = random.choice([float("nan"), float("inf"), -0.0, 1e38])
        if kind not in ("drop", "rename"):
            tensors[name] = x.clone()
        if not tensors:
            break
    content = bytearray(save(tensors))
    if times and random.random() < 0.15:
        kind = random.choice(["cut", "header", "empty"])
        if kind == "cut":
            del content[random.randrange(len(content)) :]
        for _ in range(random.randint(1, 3) if kind == "header" else 0):
            content[random.randrange(min(len(content), 400))] = random.randrange(256)
        if kind == "empty":
            content = b""
    file.write_bytes(content)
