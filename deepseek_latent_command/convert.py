"""Options of `deepseek-latent convert KIND`."""

import argparse
from pathlib import Path

from .options import DTYPES, byte_size

# how an MLP is cut into experts, and what the scheme needs; docs/experts.md says more
SCHEMES = {
    "M0": "new experts; the MLP becomes the shared ones (--shared-experts)",
    "M1": "parts of the MLP, which are all chosen (K = N)",
    "M2": "copies of the MLP",
    "M3": "parts of the MLP; each group holds all, groups are chosen (--groups)",
    "M4": "as M3, with gate weights normalized to 1 and a random router (--groups)",
    "M5": "as M3, after a first part that is shared (--shared-experts, --groups)",
}


def add_command(commands) -> None:
    parser = commands.add_parser("convert", help="make a DeepSeek-V2 checkpoint from another one")
    parser.description = "Makes a DeepSeek-V2 checkpoint, or one in another layout. OUT is written whole or not at all."
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="KIND")
    _add_gqa_to_mla(kinds)
    _add_upcycle(kinds)
    _add_cast(kinds)
    _add_import(kinds)
    _add_export(kinds)
    _add_adapter(kinds)


def _add_gqa_to_mla(kinds) -> None:
    parser = kinds.add_parser(
        "gqa-to-mla", help="a Llama or similar model: attention becomes latent, exactly or compressed"
    )
    parser.description = (
        "Makes a DeepSeek-V2 of a Llama or similar model. Without options, the new model has the same logits and a "
        "cache about as large as the source's, larger if some layers have no RoPE. With --kv-lora-rank, "
        "--qk-rope-head-dim and --calibrate, the cache has C + R elements per token and layer, and the loss of quality "
        "is measured, also with --dry-run."
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
    _add_files(parser, reads_gguf=True)
    parser.set_defaults(check=_check_gqa_to_mla)


def _check_gqa_to_mla(arguments: argparse.Namespace) -> None:
    options = {
        "--kv-lora-rank": arguments.kv_lora_rank,
        "--qk-rope-head-dim": arguments.qk_rope_head_dim,
        "--calibrate": arguments.calibrate,
    }
    missing = [name for name, value in options.items() if value is None]
    if 0 < len(missing) < len(options):
        first, second, third = options
        raise ValueError(f"compression needs {first}, {second} and {third}; add {' and '.join(missing)}.")
    if not missing and arguments.bias_free:
        raise ValueError("--bias-free is for an exact conversion, and the other options compress; leave it out.")
    _check_files(arguments)


def _add_upcycle(kinds) -> None:
    parser = kinds.add_parser("upcycle", help="a dense model's MLPs become experts, exactly")
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.description = (
        "Makes experts of a dense model's MLPs, with the same logits until it is trained.\n"
        "--router-noise and --reinitialize make it inexact."
    )
    parser.epilog = "schemes:\n" + "\n".join(f"  {name}  {meaning}" for name, meaning in SCHEMES.items())
    parser.add_argument("--scheme", choices=SCHEMES, required=True, help="how the MLPs are cut, listed below")
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
    _add_files(parser, reads_gguf=True)


def _add_cast(kinds) -> None:
    parser = kinds.add_parser("cast", help="change the dtype or the size of the shards")
    parser.add_argument("--dtype", choices=DTYPES, help="default: as stored")
    _add_files(parser)


def _add_import(kinds) -> None:
    parser = kinds.add_parser("import-deepseek", help="from the layout of DeepSeek's own inference code")
    parser.add_argument(
        "--config", type=Path, metavar="FILE", help="the config of DeepSeek's code; default: config.json in SRC"
    )
    _add_files(parser)


def _add_export(kinds) -> None:
    parser = kinds.add_parser("export-deepseek", help="to the layout of DeepSeek's own inference code")
    parser.add_argument(
        "--model-parallel", type=int, default=1, metavar="N", help="number of ranks, each with its file; default: 1"
    )
    _add_files(parser)


def _add_adapter(kinds) -> None:
    parser = kinds.add_parser("adapter", help="a LoRA adapter with separate experts becomes stacked, or back")
    parser.add_argument("source", type=Path, metavar="SRC", help="a folder with adapter_config.json")
    parser.add_argument("out", type=Path, metavar="OUT", help="the folder to make")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    parser.set_defaults(action="convert:print_converted_adapter")


def _add_files(kind: argparse.ArgumentParser, *, reads_gguf: bool = False) -> None:
    """The source, the folder to write, and how it is written. Only a Llama or similar model comes as a GGUF file."""
    others = ", a hub id or a GGUF file" if reads_gguf else " or a hub id"
    kind.add_argument("source", metavar="SRC", help=f"a folder with config.json and safetensors files{others}")
    kind.add_argument("out", metavar="OUT", help="the folder to make")
    if reads_gguf:
        kind.add_argument("--gguf-file", metavar="NAME", help="read this GGUF file of SRC, a folder or a hub id")
    kind.add_argument("--max-shard-size", type=byte_size, default="1500MB", metavar="SIZE", help="default: 1500MB")
    kind.add_argument("--push-to-hub", metavar="REPO", help="upload OUT there when it is complete")
    kind.add_argument("--force", action="store_true", help="replace OUT if a conversion wrote it")
    kind.add_argument("--replace-any-folder", action="store_true", help="with --force: replace OUT whatever it holds")
    kind.add_argument("--dry-run", action="store_true", help="only report what would be written")
    kind.add_argument("--json", action="store_true", help="print the report as JSON")
    kind.set_defaults(check=_check_files, action="convert:convert_checkpoint")


def _check_files(arguments: argparse.Namespace) -> None:
    if arguments.replace_any_folder and not arguments.force:
        raise ValueError("--replace-any-folder says what --force may replace; add --force.")
    if "gguf_file" not in arguments and arguments.source.endswith(".gguf"):
        raise ValueError(
            f"expected a folder or a hub id, got {arguments.source!r}; only gqa-to-mla and upcycle read GGUF files."
        )
