"""`deepseek-latent convert KIND`: makes a DeepSeek-V2 checkpoint from another one."""

import argparse
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

from ..configuration_deepseek_v2 import DeepseekV2Config
from ..conversion.adapter import convert_adapter
from ..conversion.cast import Cast
from ..conversion.compression_report import compress_and_evaluate, measure_logits_change
from ..conversion.convert import convert, prepare_target
from ..conversion.cost import Cost, cost_of, cost_of_compression, cost_without_biases
from ..conversion.deepseek_layout import ExportDeepseek, ImportDeepseek
from ..conversion.gguf_source import source_folder
from ..conversion.gqa_to_mla import GqaToMla
from ..conversion.source import Source
from ..conversion.source_card import read_card
from ..conversion.target import DEFAULT_SHARD_BYTES
from ..conversion.text import read_text
from ..conversion.upcycle import SCHEMES, Upcycle
from .terminal import DTYPES, byte_size, print_report, quiet_transformers


def add_command(commands) -> None:
    parser = commands.add_parser("convert", help="make a DeepSeek-V2 checkpoint from another one")
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="KIND")
    for add_kind in (_add_gqa_to_mla, _add_upcycle, _add_cast, _add_import, _add_export):
        kind = add_kind(kinds)
        kind.add_argument(
            "source", metavar="SRC", help="a folder with config.json and safetensors files, a hub id or a GGUF file"
        )
        kind.add_argument("out", metavar="OUT", help="the folder to make")
        kind.add_argument("--gguf-file", metavar="NAME", help="read this GGUF file of SRC, a folder or a hub id")
        kind.add_argument(
            "--max-shard-size", type=byte_size, default=DEFAULT_SHARD_BYTES, metavar="SIZE", help="default: 1500MB"
        )
        kind.add_argument("--push-to-hub", metavar="REPO", help="upload OUT there when it is complete")
        kind.add_argument("--force", action="store_true", help="replace OUT if a conversion wrote it")
        kind.add_argument(
            "--replace-any-folder", action="store_true", help="with --force: replace OUT whatever it holds"
        )
        kind.add_argument("--dry-run", action="store_true", help="only report what would be written")
        kind.add_argument("--json", action="store_true", help="print the report as JSON")
        kind.set_defaults(action=_convert)
    _add_adapter(kinds)


# Each `_add_...` registers one kind of conversion. Its `build` returns the files that are read, the cost of the
# conversion, and a function that does what needs time: it returns the conversion and measurements for the report.
Built = tuple[Source | ImportDeepseek, Cost, Callable[[], tuple[object, dict]]]


def _add_gqa_to_mla(kinds) -> argparse.ArgumentParser:
    parser = kinds.add_parser(
        "gqa-to-mla", help="a Llama or similar model: attention becomes latent, exactly or compressed"
    )
    parser.add_argument("--bias-free", action="store_true", help="add no biases: a wider cache, an error of about 1e-4")
    parser.add_argument(
        "--kv-lora-rank", type=int, metavar="C", help="compress: width of the latent; needs the next two options"
    )
    parser.add_argument("--qk-rope-head-dim", type=int, metavar="R", help="compress: width of the rotary key")
    parser.add_argument(
        "--calibrate",
        type=Path,
        nargs="+",
        metavar="TEXT",
        help="compress: files with text like that the model will read, better of several kinds",
    )
    parser.set_defaults(build=_build_gqa_to_mla)
    return parser


def _build_gqa_to_mla(folder: Path, arguments: argparse.Namespace) -> Built:
    files = Source(folder)
    options = (arguments.kv_lora_rank, arguments.qk_rope_head_dim, arguments.calibrate)
    if all(option is None for option in options):
        conversion = GqaToMla(files, bias_free=arguments.bias_free)
        conversion.check_dtype()
        if arguments.bias_free:
            return files, cost_without_biases(files, conversion), lambda: (conversion, {})
        cost = cost_of(files, conversion, conversion.pieces(), conversion.source.cached_elements)
        return files, cost, lambda: (conversion, {})
    if None in options or arguments.bias_free:
        raise ValueError("compression takes --kv-lora-rank, --qk-rope-head-dim and --calibrate, and no --bias-free.")
    texts = [read_text(file) for file in arguments.calibrate]
    widths = {"r": arguments.qk_rope_head_dim, "c": arguments.kv_lora_rank}
    return files, cost_of_compression(files, **widths), lambda: compress_and_evaluate(files, **widths, texts=texts)


def _add_upcycle(kinds) -> argparse.ArgumentParser:
    parser = kinds.add_parser("upcycle", help="a dense model's MLPs become experts, exactly")
    parser.add_argument("--scheme", choices=SCHEMES, required=True, help="how the MLPs are cut; see docs/conversion.md")
    parser.add_argument("--routed-experts", type=int, required=True, metavar="N", help="routed experts per layer")
    parser.add_argument(
        "--shared-experts", type=int, default=0, metavar="S", help="shared experts per layer; default: none"
    )
    parser.add_argument("--top-k", type=int, required=True, metavar="K", help="routed experts per token")
    parser.add_argument("--groups", type=int, default=1, metavar="G", help="groups of routed experts; default: 1")
    parser.add_argument(
        "--dense-layers", type=int, default=1, metavar="L", help="number of first layers that stay dense; default: 1"
    )
    parser.add_argument(
        "--router-noise",
        type=float,
        default=0.0,
        metavar="STD",
        help="noise added to the router, so that equal experts diverge; inexact",
    )
    parser.add_argument(
        "--reinitialize",
        type=float,
        default=0.0,
        metavar="FRACTION",
        help="fraction of each routed expert's neurons to initialize again; inexact",
    )
    parser.set_defaults(build=_build_upcycle)
    return parser


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
        measured["opens in stock transformers"] = "no, its class always has shared experts"
    cost = cost_of(files, conversion, conversion.pieces(), None if is_deepseek else base.source.cached_elements)

    def measure() -> tuple[Upcycle, dict]:
        return conversion, measured | ({} if conversion.is_exact else measure_logits_change(conversion))

    return files, cost, measure


def _add_cast(kinds) -> argparse.ArgumentParser:
    parser = kinds.add_parser("cast", help="change the dtype or the size of the shards")
    parser.add_argument("--dtype", choices=DTYPES, help="default: as stored")
    parser.set_defaults(build=_build_cast)
    return parser


def _build_cast(folder: Path, arguments: argparse.Namespace) -> Built:
    files = Source(folder)
    conversion = Cast(files, DTYPES.get(arguments.dtype))
    return files, cost_of(files, conversion, conversion.pieces()), lambda: (conversion, {})


def _add_import(kinds) -> argparse.ArgumentParser:
    parser = kinds.add_parser("import-deepseek", help="from the layout of DeepSeek's own inference code")
    parser.add_argument(
        "--config", type=Path, metavar="FILE", help="the config of DeepSeek's code; default: config.json in SRC"
    )
    parser.set_defaults(build=_build_import)
    return parser


def _build_import(folder: Path, arguments: argparse.Namespace) -> Built:
    files = ImportDeepseek(folder, arguments.config or folder / "config.json")
    return files, cost_of(files, files, files.pieces()), lambda: (files, {})


def _add_export(kinds) -> argparse.ArgumentParser:
    parser = kinds.add_parser("export-deepseek", help="to the layout of DeepSeek's own inference code")
    parser.add_argument(
        "--model-parallel", type=int, default=1, metavar="N", help="number of ranks, each with its file; default: 1"
    )
    parser.set_defaults(build=_build_export)
    return parser


def _build_export(folder: Path, arguments: argparse.Namespace) -> Built:
    files = Source(folder)
    conversion = ExportDeepseek(files, arguments.model_parallel)
    pieces = [piece for shard in conversion.shards().values() for piece in shard]
    return files, cost_of(files, conversion, pieces), lambda: (conversion, {})


@quiet_transformers()
def _convert(arguments: argparse.Namespace) -> int:
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
    files, cost, measure = arguments.build(folder, arguments)
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


def _add_adapter(kinds) -> None:
    parser = kinds.add_parser("adapter", help="a LoRA adapter with separate experts becomes stacked, or back")
    parser.add_argument("source", type=Path, metavar="SRC", help="a folder with adapter_config.json")
    parser.add_argument("out", type=Path, metavar="OUT", help="the folder to make")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    parser.set_defaults(action=_convert_adapter)


def _convert_adapter(arguments: argparse.Namespace) -> int:
    print_report(convert_adapter(arguments.source, arguments.out), as_json=arguments.json)
    return 0
