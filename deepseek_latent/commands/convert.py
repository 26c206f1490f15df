"""`deepseek-latent convert KIND`: makes a DeepSeek-V2 checkpoint from another one."""

import argparse
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from ..configuration_deepseek_v2 import DeepseekV2Config
from ..conversion.adapter import convert_adapter
from ..conversion.cast import Cast
from ..conversion.compression_report import compress_and_evaluate, measure_logits_change
from ..conversion.convert import convert, prepare_target
from ..conversion.cost import Cost, cost_of, cost_of_compression, cost_without_biases
from ..conversion.deepseek_layout import ExportDeepseek, ImportDeepseek
from ..conversion.gguf_source import source_folder
from ..conversion.gqa_to_mla import GqaToMla
from ..conversion.source import Source, fetch_source
from ..conversion.source_card import read_card
from ..conversion.text import read_text
from ..conversion.upcycle import Upcycle
from .terminal import print_report, quiet_transformers

# A function of `_BUILDERS` returns the files that are read, the cost of the conversion, and a function that does what
# needs time: it returns the conversion and measurements for the report.
Built = tuple[Source | ImportDeepseek, Cost, Callable[[], tuple[object, dict]]]


def _build_gqa_to_mla(folder: Path, arguments: argparse.Namespace) -> Built:
    files = Source(folder)
    if arguments.calibrate is None:
        conversion = GqaToMla(files, bias_free=arguments.bias_free)
        conversion.check_dtype()
        if arguments.bias_free:
            return files, cost_without_biases(files, conversion), lambda: (conversion, {})
        cost = cost_of(files, conversion, conversion.pieces(), conversion.source.cached_elements)
        return files, cost, lambda: (conversion, {})
    texts = [read_text(file) for file in arguments.calibrate]
    widths = {"r": arguments.qk_rope_head_dim, "c": arguments.kv_lora_rank}
    return files, cost_of_compression(files, **widths), lambda: compress_and_evaluate(files, **widths, texts=texts)


def _build_upcycle(folder: Path, arguments: argparse.Namespace) -> Built:
    """Upcycles a dense DeepSeek-V2, or the result of `gqa-to-mla` for any other source."""
    files = Source(folder)
    is_deepseek = files.config.get("model_type") == DeepseekV2Config.model_type
    base = Cast(files, None) if is_deepseek else GqaToMla(files)
    conversion = Upcycle(
        base,
        arguments.scheme,
        e=arguments.routed_experts,
        shared=arguments.shared_experts,
        k=arguments.top_k,
        groups=arguments.groups,
        dense_layers=arguments.dense_layers,
        router_noise=arguments.router_noise,
        reinitialized=arguments.reinitialize,
    )
    measured = {"fraction of neurons that are zeros": conversion.zero_fraction} if conversion.zero_fraction else {}
    if not arguments.shared_experts:
        measured["opens in stock transformers and vLLM"] = "no, they always have shared experts"
    cost = cost_of(files, conversion, conversion.pieces(), None if is_deepseek else base.source.cached_elements)

    def measure() -> tuple[Upcycle, dict]:
        return conversion, measured | ({} if conversion.is_exact else measure_logits_change(conversion))

    return files, cost, measure


def _build_cast(folder: Path, arguments: argparse.Namespace) -> Built:
    files = Source(folder)
    conversion = Cast(files, arguments.dtype and getattr(torch, arguments.dtype))
    return files, cost_of(files, conversion, conversion.pieces()), lambda: (conversion, {})


def _build_import(folder: Path, arguments: argparse.Namespace) -> Built:
    files = ImportDeepseek(folder, arguments.config or folder / "config.json")
    return files, cost_of(files, files, files.pieces()), lambda: (files, {})


def _build_export(folder: Path, arguments: argparse.Namespace) -> Built:
    files = Source(folder)
    conversion = ExportDeepseek(files, arguments.model_parallel)
    pieces = [piece for shard in conversion.shards().values() for piece in shard]
    return files, cost_of(files, conversion, pieces), lambda: (conversion, {})


_BUILDERS = {
    "gqa-to-mla": _build_gqa_to_mla,
    "upcycle": _build_upcycle,
    "cast": _build_cast,
    "import-deepseek": _build_import,
    "export-deepseek": _build_export,
}


@quiet_transformers()
def convert_checkpoint(arguments: argparse.Namespace) -> int:
    if "gguf_file" not in arguments:
        return _convert_folder(fetch_source(arguments.source), arguments)
    with source_folder(arguments.source, arguments.gguf_file) as folder:
        return _convert_folder(folder, arguments)


def _convert_folder(folder: Path, arguments: argparse.Namespace) -> int:
    push_to_hub = None if arguments.dry_run else arguments.push_to_hub
    target = prepare_target(
        folder,
        arguments.out,
        shard_bytes=arguments.max_shard_size,
        force=arguments.force,
        replace_any_folder=arguments.replace_any_folder,
        push_to_hub=push_to_hub,
        dry_run=arguments.dry_run,
    )
    # a card that cannot be read is said before the work, and does not end it
    if warning := read_card(folder).warning:
        print(f"warning: {warning}", file=sys.stderr)
    files, cost, measure = _BUILDERS[arguments.kind](folder, arguments)
    for sentence in cost.sentences():
        print(f"cost: {sentence}", file=sys.stderr)
    if not arguments.dry_run:
        target.check_room(cost.bytes + sum(file.stat().st_size for file in files.companion_files()))
    conversion, measured = measure()
    measured = cost.report() | measured
    command = f"deepseek-latent {shlex.join(arguments.argv)}"
    try:
        report = convert(
            files, conversion, measured, target, command=command, push_to_hub=push_to_hub, dry_run=arguments.dry_run
        )
    except KeyboardInterrupt:
        print(f"interrupted; the same command continues from {target.partial}", file=sys.stderr)
        return 130
    print_report({"out": arguments.out} | report, as_json=arguments.json)
    return 0


def print_converted_adapter(arguments: argparse.Namespace) -> int:
    print_report(convert_adapter(arguments.source, arguments.out), as_json=arguments.json)
    return 0
