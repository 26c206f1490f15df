"""`deepseek-latent convert ...` and `verify`, also as `python -m deepseek_latent.conversion`."""

import argparse
import json
import sys
from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError
from rich.console import Console
from rich.table import Table
from transformers.utils.logging import disable_progress_bar, set_verbosity_error

from ..configuration_deepseek_v2 import DeepseekV2Config
from ..conversion.adapter import convert_adapter
from ..conversion.calibration import text_of
from ..conversion.cast import Cast
from ..conversion.compression_report import compressed, measured_noise
from ..conversion.convert import convert, target_for
from ..conversion.deepseek_layout import ExportDeepseek, ImportDeepseek
from ..conversion.gqa_to_mla import GqaToMla
from ..conversion.source import Source, source_folder
from ..conversion.target import SHARD_BYTES
from ..conversion.upcycle import SCHEMES, Upcycle
from ..conversion.verify import verify

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


def add_commands(commands) -> None:
    """Adds `convert` and `verify` to a parser's commands."""
    parser = commands.add_parser("convert", help="make a DeepSeek-V2 checkpoint of another one")
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="KIND")
    for add in (_add_gqa_to_mla, _add_upcycle, _add_cast, _add_import, _add_export):
        kind = add(kinds)
        kind.add_argument("source", metavar="SRC", help="a folder with config.json and safetensors files, or a hub id")
        kind.add_argument("out", metavar="OUT", help="the folder to be made")
        kind.add_argument("--max-shard-size", type=_bytes, default=SHARD_BYTES, metavar="SIZE", help="default: 1500MB")
        kind.add_argument("--push-to-hub", metavar="REPO", help="upload OUT there when it is done")
        kind.add_argument("--force", action="store_true", help="replace OUT where it is a checkpoint")
        kind.add_argument("--dry-run", action="store_true", help="only say what would be written")
        kind.add_argument("--json", action="store_true", help="report as JSON")
        kind.set_defaults(action=_convert)

    adapter = kinds.add_parser("adapter", help="a LoRA adapter with experts one by one becomes stacked, or back")
    adapter.add_argument("source", type=Path, metavar="SRC", help="a folder with adapter_config.json")
    adapter.add_argument("out", type=Path, metavar="OUT", help="the folder to be made")
    adapter.add_argument("--json", action="store_true", help="report as JSON")
    adapter.set_defaults(action=_convert_adapter)

    check = commands.add_parser("verify", help="compare a converted checkpoint with its source")
    check.add_argument("out", metavar="OUT")
    check.add_argument("--against", type=Path, metavar="SRC", help="the checkpoint it was made of")
    check.add_argument("--text", metavar="FILE", type=Path, help="tokens to compare on; default: random ones")
    check.add_argument("--dtype", choices=DTYPES, help="to compute in; default: as stored")
    check.add_argument("--json", action="store_true", help="report as JSON")
    check.set_defaults(action=_verify)


def _add_gqa_to_mla(kinds) -> argparse.ArgumentParser:
    gqa = kinds.add_parser("gqa-to-mla", help="Llama, Mistral, Qwen2: attention becomes latent, exactly or compressed")
    gqa.add_argument("--bias-free", action="store_true", help="without biases: a wider cache, an error of about 1e-4")
    gqa.add_argument("--kv-lora-rank", type=int, metavar="C", help="compress: width of the latent, with what follows")
    gqa.add_argument("--qk-rope-head-dim", type=int, metavar="R", help="compress: width of what keeps its rotation")
    gqa.add_argument("--calibrate", type=Path, metavar="TEXT", help="compress: a file with text like that to be read")
    gqa.set_defaults(make=_gqa_to_mla)
    return gqa


# each `make` gives the files that are read, what they become, and what was measured of it


def _gqa_to_mla(folder: Path, arguments: argparse.Namespace) -> tuple[Source, GqaToMla, dict]:
    files = Source(folder)
    widths = (arguments.kv_lora_rank, arguments.qk_rope_head_dim, arguments.calibrate)
    if all(given is None for given in widths):
        conversion = GqaToMla(files, bias_free=arguments.bias_free)
        conversion.check_dtype()
        return files, conversion, {"cached elements per token before": conversion.source.cached_elements}
    if None in widths or arguments.bias_free:
        raise ValueError("compression takes --kv-lora-rank, --qk-rope-head-dim and --calibrate, and no --bias-free.")
    text = text_of(arguments.calibrate)
    return files, *compressed(files, r=arguments.qk_rope_head_dim, c=arguments.kv_lora_rank, text=text)


def _add_upcycle(kinds) -> argparse.ArgumentParser:
    upcycle = kinds.add_parser("upcycle", help="a dense model's MLPs become experts, exactly")
    upcycle.add_argument("--scheme", choices=SCHEMES, required=True, help="how they are cut; see docs/conversion.md")
    upcycle.add_argument("--routed-experts", type=int, required=True, metavar="N", help="per layer")
    upcycle.add_argument("--shared-experts", type=int, default=0, metavar="S", help="per layer; default: none")
    upcycle.add_argument("--top-k", type=int, required=True, metavar="K", help="routed experts per token")
    upcycle.add_argument("--groups", type=int, default=1, metavar="G", help="of routed experts; default: 1")
    upcycle.add_argument("--dense-layers", type=int, default=1, metavar="L", help="first layers that stay; default: 1")
    upcycle.add_argument(
        "--router-noise",
        type=float,
        default=0.0,
        metavar="STD",
        help="added to the router, so that experts part; inexact",
    )
    upcycle.add_argument(
        "--reinitialise", type=float, default=0.0, metavar="SHARE", help="of each routed expert's neurons; inexact"
    )
    upcycle.set_defaults(make=_upcycle)
    return upcycle


def _upcycle(folder: Path, arguments: argparse.Namespace) -> tuple[Source, Upcycle, dict]:
    """Of a dense DeepSeek-V2, or of what `gqa-to-mla` makes of another source."""
    files = Source(folder)
    is_deepseek = files.config.get("model_type") == DeepseekV2Config.model_type
    conversion = Upcycle(
        Cast(files, None) if is_deepseek else GqaToMla(files),
        arguments.scheme,
        e=arguments.routed_experts,
        shared=arguments.shared_experts,
        k=arguments.top_k,
        groups=arguments.groups,
        dense_layers=arguments.dense_layers,
        router_noise=arguments.router_noise,
        reinitialised=arguments.reinitialise,
    )
    measured = {"share of neurons that are zeros": conversion.filled} if conversion.filled else {}
    if not arguments.shared_experts:
        measured["opens in stock transformers"] = "no, its class has shared experts always"
    return files, conversion, measured | ({} if conversion.is_exact else measured_noise(conversion))


def _add_cast(kinds) -> argparse.ArgumentParser:
    cast = kinds.add_parser("cast", help="another dtype or size of shards")
    cast.add_argument("--dtype", choices=DTYPES, help="default: as stored")
    cast.set_defaults(make=_cast)
    return cast


def _cast(folder: Path, arguments: argparse.Namespace) -> tuple[Source, Cast, dict]:
    files = Source(folder)
    return files, Cast(files, DTYPES.get(arguments.dtype)), {}


def _add_import(kinds) -> argparse.ArgumentParser:
    theirs = kinds.add_parser("import-deepseek", help="from the layout of DeepSeek's own inference code")
    theirs.add_argument("--config", type=Path, metavar="FILE", help="its config; default: config.json in SRC")
    theirs.set_defaults(make=_import)
    return theirs


def _import(folder: Path, arguments: argparse.Namespace) -> tuple[ImportDeepseek, ImportDeepseek, dict]:
    files = ImportDeepseek(folder, arguments.config or folder / "config.json")
    return files, files, {}


def _add_export(kinds) -> argparse.ArgumentParser:
    ours = kinds.add_parser("export-deepseek", help="to the layout of DeepSeek's own inference code")
    ours.add_argument("--model-parallel", type=int, default=1, metavar="N", help="processes, a file each; default: 1")
    ours.set_defaults(make=_export)
    return ours


def _export(folder: Path, arguments: argparse.Namespace) -> tuple[Source, ExportDeepseek, dict]:
    files = Source(folder)
    return files, ExportDeepseek(files, arguments.model_parallel), {}


def _convert(arguments: argparse.Namespace) -> int:
    set_verbosity_error()
    disable_progress_bar()
    folder = source_folder(arguments.source)
    target = target_for(folder, arguments)
    files, conversion, measured = arguments.make(folder, arguments)
    try:
        report = convert(files, conversion, measured, target, arguments)
    except KeyboardInterrupt:
        print(f"interrupted; the same command goes on from {target.partial}", file=sys.stderr)
        return 130
    _tell(report, arguments.json)
    return 0


def _convert_adapter(arguments: argparse.Namespace) -> int:
    _tell(convert_adapter(arguments.source, arguments.out), arguments.json)
    return 0


def _verify(arguments: argparse.Namespace) -> int:
    set_verbosity_error()
    disable_progress_bar()
    text = text_of(arguments.text) if arguments.text else None
    report = verify(Path(arguments.out), arguments.against, text, DTYPES.get(arguments.dtype))
    _tell(report, arguments.json)
    return 1 if report["problems"] else 0


def _tell(report: dict, as_json: bool) -> None:
    if as_json:
        print(json.dumps(report, indent=2))
        return
    table = Table("", "", show_header=False)
    for name, value in report.items():
        table.add_row(name.replace("_", " "), _said(value))
    Console().print(table)


def _said(value: list | float | int | str) -> str:
    if isinstance(value, list):
        return "\n".join(map(str, value)) or "none"
    if isinstance(value, float):
        return f"{value:.4g}" if 0.01 < abs(value) < 1e6 else f"{value:.2e}"
    return f"{value:,}" if isinstance(value, int) else value


def _bytes(text: str) -> int:
    for unit, size in _UNITS.items():
        number = text.upper().removesuffix(unit)
        if number != text.upper() and number.isdigit() and int(number):
            return int(number) * size
    raise argparse.ArgumentTypeError(f"expected a whole number of KB, MB, GB or TB, such as 500MB, got {text}")


def act(parser: argparse.ArgumentParser, argv: list[str] | None) -> tuple[argparse.Namespace, int]:
    """Does what the command line says; its arguments and exit code: 2 for unusable input, said in one sentence."""
    given = sys.argv[1:] if argv is None else argv
    arguments = parser.parse_args(given)
    arguments.given = given
    try:
        return arguments, arguments.action(arguments)
    except (ValueError, OSError, StrictDataclassError) as error:
        print(f"{parser.prog} {arguments.command}: {' '.join(str(error).split())}", file=sys.stderr)
        return arguments, 2


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m deepseek_latent.conversion", description=__doc__)
    add_commands(parser.add_subparsers(dest="command", required=True, metavar="COMMAND"))
    return act(parser, argv)[1]
