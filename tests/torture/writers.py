"""Every writer of the package on tiny inputs, and processes that are ended or find the disk full while they write."""

import json
import os
import re
import shutil
import signal
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig

from deepseek_latent import ExpertSelection, LatentCache, PromptCache, save_experts, whole_files
from deepseek_latent.commands.__main__ import main
from deepseek_latent.conversion.boundaries import MARKER
from deepseek_latent.conversion.remote_code import auto_map, exported_files
from deepseek_latent.kernels.cpu import build
from tests.conversion.sources import save_source
from tests.support import random_ids, tiny_model

from .campaign import Hang, time_limit

# file name: its bytes; a folder: no bytes; names are relative to the box
Snapshot = dict[str, bytes | None]
SELECTION = ExpertSelection({1: [1]})


# writes what stands for a library
COMPILER = """#!/bin/sh
if [ "$1" = --version ]; then echo stub; exit; fi
while [ $# -gt 0 ]; do
  if [ "$1" = -o ]; then printf operators > "$2"; fi
  shift
done
"""


class CommandRefused(Exception):
    """A command printed a sentence and returned 2."""


@dataclass(frozen=True)
class Writer:
    """Something that writes `out` in a folder, the box; `before` makes what is there before it writes."""

    name: str
    out: str
    write: Callable[[Path], None]
    before: Callable[[Path], None] | None = None
    # False if it refuses to write over what it wrote
    replaces: bool = True
    # whether the visible files of the box are those before, those after, or as good
    is_whole: Callable[[Snapshot, Snapshot, Snapshot], bool] = lambda found, before, after: found in (before, after)
    # disks such as NFS cannot exchange two folders, so there is a moment without one, which the next writer ends
    exchanges: bool = True


def make_inputs(folder: Path) -> None:
    """What the writers read, made once."""
    small = {"num_hidden_layers": 2, "vocab_size": 32, "hidden_size": 32, "intermediate_size": 40}
    save_source(folder / "llama", LlamaConfig, **small)
    experts = {"n_routed_experts": 4, "n_group": 2, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    model = tiny_model(**small, **experts, num_attention_heads=2, kv_lora_rank=16)
    model.save_pretrained(folder / "deepseek")
    _command("convert", "export-deepseek", folder / "deepseek", folder / "ranks", "--model-parallel", "2")
    adapter = get_peft_model(model, LoraConfig(r=2, target_modules=["o_proj"], init_lora_weights=False))
    adapter.save_pretrained(folder / "adapter")
    tensors = load_file(folder / "adapter" / "adapter_model.safetensors")
    for name, parameter in tiny_experts(model).items():
        out, into = parameter.shape
        tensors |= {f"{name}.lora_A.weight": torch.ones(2, into), f"{name}.lora_B.weight": torch.ones(out, 2)}
    save_file(tensors, folder / "adapter" / "adapter_model.safetensors", {"format": "pt"})
    config = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    config["target_modules"] = ["o_proj", "gate_proj", "up_proj", "down_proj"]
    (folder / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    (folder / "g++").write_text(COMPILER)
    (folder / "g++").chmod(0o755)


def tiny_experts(model) -> dict[str, torch.Tensor]:
    """The weights of separate experts, by the names that adapters of transformers 4 have for them."""
    mlp, prefix = model.model.layers[1].mlp.experts, "base_model.model.model.layers.1.mlp.experts"
    gate_up, down = mlp.gate_up_proj, mlp.down_proj
    found = {}
    for expert in range(len(down)):
        gate, up = gate_up[expert].chunk(2)
        for name, weight in {"gate": gate, "up": up, "down": down[expert]}.items():
            found[f"{prefix}.{expert}.{name}_proj"] = weight
    return found


def small_model():
    return tiny_model(num_hidden_layers=2, n_routed_experts=4, n_group=2, num_experts_per_tok=2)


def all_writers(inputs: Path) -> list[Writer]:
    model = small_model()
    ids = random_ids(1, 70)
    with torch.no_grad():
        cache, longer = (model(ids[:, :t], cache=LatentCache(model.config)).cache for t in (66, 69))
    writers = []
    for kb in (8, 32, 1000):
        size = ("--max-shard-size", f"{kb}KB")
        for kind, source, options in (
            ("gqa-to-mla", "llama", ()),
            ("cast", "deepseek", ("--dtype", "bfloat16")),
            ("upcycle", "llama", ("--scheme", "M2", "--routed-experts", "2", "--top-k", "1")),
            ("import-deepseek", "ranks", ()),
            ("export-deepseek", "deepseek", ("--model-parallel", "2")),
        ):
            convert = partial(_convert, kind, inputs / source, *options, *size)
            again = partial(_convert, kind, inputs / source, *options, *size, "--force")
            earlier = partial(_convert, "cast", inputs / "deepseek", "--dtype", "float16", "--max-shard-size", "20KB")
            writers.append(Writer(f"{kind}, {kb} KB", "out", convert, replaces=False))
            writers.append(Writer(f"{kind}, {kb} KB, --force", "out", again, earlier))
            stopped = partial(_stop_in_a_shard, again)
            writers.append(Writer(f"{kind}, {kb} KB, resumed", "out", again, stopped))
        no_exchange = f"cast, {kb} KB, --force, no exchange"
        again = partial(_convert, "cast", inputs / "deepseek", *size, "--force")
        writers.append(Writer(no_exchange, "out", again, earlier, exchanges=False))
    adapter = partial(_command_in, "convert", "adapter", inputs / "adapter")
    writers.append(Writer("adapter", "out", adapter, replaces=False))
    export, exported = (lambda box: _command("export-code", box / "out")), partial(_earlier_export, inputs)
    writers.append(Writer("export-code", "out", export, partial(_checkpoint, inputs), is_whole=_is_one_export))
    writers.append(Writer("export-code over an earlier one", "out", export, exported, is_whole=_is_one_export))
    experts = [lambda box, s=s: save_experts(model, s, box / "out") for s in (SELECTION, ExpertSelection({1: [0, 2]}))]
    writers.append(Writer("save_experts", "out", experts[0]))
    writers.append(Writer("save_experts over an earlier one", "out", *experts))
    writers.append(Writer("save_experts over an earlier one, no exchange", "out", *experts, exchanges=False))
    writers.append(Writer("ExpertSelection", "x.json", lambda box: SELECTION.save(box / "x.json")))
    earlier = lambda box: (box / "x.json").write_text("earlier")  # noqa: E731
    writers.append(
        Writer("ExpertSelection over an earlier one", "x.json", lambda box: SELECTION.save(box / "x.json"), earlier)
    )
    saves = [lambda box, c=c: c.save(box / "c", tokens=ids, model=model) for c in (longer, cache)]
    writers.append(Writer("LatentCache", "c", saves[0]))
    writers.append(Writer("LatentCache over an earlier one", "c", *saves))
    stores = [lambda box, c=c: prompts(box).store(c, ids, model) for c in (longer, cache)]
    writers.append(Writer("PromptCache", "prompts", stores[0], prompts, is_whole=_has_whole_prompts))
    writers.append(Writer("PromptCache over a prefix", "prompts", *stores, is_whole=_has_whole_prompts))
    writers.append(Writer("kernels", "home", partial(_build_kernels, inputs), is_whole=_has_all_files_or_none))
    return writers


def _build_kernels(inputs: Path, box: Path) -> None:
    """Builds what stands for the library of operators, by a compiler without C++, and keeps it in the box."""
    with (
        mock.patch.object(build.shutil, "which", return_value=str(inputs / "g++")),
        mock.patch.object(build, "constants", SimpleNamespace(HF_HOME=str(box / "home"))),
        mock.patch.object(torch.ops, "load_library", return_value=None),
    ):
        build.load_library()


def _has_all_files_or_none(found: Snapshot, before: Snapshot, after: Snapshot) -> bool:
    """Whether the only thing that is missing are files, as folders may be there before them."""
    files = {name: content for name, content in found.items() if content is not None}
    return not files or files == {name: content for name, content in after.items() if content is not None}


def run_forked(action: Callable[[], int | None], *, seconds: float = 60) -> tuple[int, str]:
    """Runs `action` in a copy of this process, and returns how that ended and what it printed.

    The number is what `action` returns, 1 for an error, or a negative signal. Raises Hang after `seconds`.
    """
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.dup2(writer, 1)
        os.dup2(writer, 2)
        status = 1
        try:
            status = action() or 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    os.close(writer)
    try:
        with time_limit(seconds), open(reader, errors="replace") as printed:
            text = printed.read()
            return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), text
    except Hang:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        raise


def snapshot(box: Path) -> Snapshot:
    return {str(path.relative_to(box)): None if path.is_dir() else _content(path) for path in box.rglob("*")}


def _content(path: Path) -> bytes:
    """What a file holds, without the dates of other files."""
    return re.sub(rb"\d+\s*\]", b"]", path.read_bytes()) if path.name == MARKER else path.read_bytes()


def visible(content: Snapshot) -> Snapshot:
    return {name: data for name, data in content.items() if not any(part.startswith(".") for part in Path(name).parts)}


def put_back(writer: Writer, box: Path) -> None:
    whole_files.remove_leftovers(box / writer.out)


def _command(*arguments) -> None:
    if main([str(argument) for argument in arguments]) != 0:
        raise CommandRefused


def _command_in(*arguments_and_box) -> None:
    *arguments, box = arguments_and_box
    _command(*arguments, box / "out")


def _convert(kind: str, source: Path, *options_and_box) -> None:
    *options, box = options_and_box
    _command("convert", kind, source, box / "out", *options)


def _stop_in_a_shard(write: Callable[[Path], None], box: Path) -> None:
    """Leaves what a process leaves that is killed while safetensors writes its last shard but one."""
    real, calls = whole_files.save_file, []

    def stop(tensors, path, metadata):
        calls.append(path)
        if len(calls) > 1:
            (path.parent / ".tmpABCDEF").write_bytes(b"half")
            (path.parents[1] / ".tmpABCDEF").write_bytes(b"half")
            os.kill(os.getpid(), signal.SIGKILL)
        real(tensors, path, metadata)

    def action():
        whole_files.save_file = stop
        write(box)

    run_forked(action)
    shutil.rmtree(box / "out", ignore_errors=True)


def _checkpoint(inputs: Path, box: Path) -> None:
    (box / "out").mkdir()
    shutil.copy(inputs / "deepseek" / "config.json", box / "out")


def _earlier_export(inputs: Path, box: Path) -> None:
    _checkpoint(inputs, box)
    config = json.loads((box / "out" / "config.json").read_text())
    (box / "out" / "config.json").write_text(json.dumps(config | {"auto_map": auto_map()}))
    for name in exported_files():
        (box / "out" / name).write_text("of an earlier version")


def _is_one_export(found: Snapshot, before: Snapshot, after: Snapshot) -> bool:
    """Without an entry in config.json, nobody reads the code beside it."""
    config = json.loads(found["out/config.json"])
    return found in (before, after) or not config.get("auto_map")


def prompts(box: Path) -> PromptCache:
    return PromptCache(box / "prompts", max_bytes=10**8)


def _has_whole_prompts(found: Snapshot, before: Snapshot, after: Snapshot) -> bool:
    """A folder of prompts is a set: it may hold the prefix and what replaces it at the same time."""
    return found.items() <= (before | after).items() and (
        before.items() <= found.items() or after.items() <= found.items()
    )
