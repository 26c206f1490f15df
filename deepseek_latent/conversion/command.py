"""`deepseek-latent convert ...` and `verify`, also as `python -m deepseek_latent.conversion`."""

import argparse
import json
import shlex
import sys
from pathlib import Path

import torch
from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.errors import StrictDataclassError
from rich.console import Console
from rich.table import Table
from transformers.utils.logging import set_verbosity_error

from ..configuration_deepseek_v2 import DeepseekV2Config
from .cast import Cast
from .gqa_to_mla import GqaToMla
from .source import Source
from .target import SHARD_BYTES, Target
from .upcycle import SCHEMES, Upcycle
from .verify import verify

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


def add_commands(commands) -> None:
    """Adds `convert` and `verify` to a parser's commands."""
    convert = commands.add_parser("convert", help="make a DeepSeek-V2 checkpoint of another one")
    kinds = convert.add_subparsers(dest="kind", required=True, metavar="KIND")
    gqa = kinds.add_parser("gqa-to-mla", help="Llama, Mistral, Qwen2: attention becomes latent, exactly")
    gqa.add_argument("--bias-free", action="store_true", help="without biases: a wider cache, an error of about 1e-4")
    gqa.set_defaults(conversion=lambda source, arguments: GqaToMla(source, bias_free=arguments.bias_free))
    cast = kinds.add_parser("cast", help="another dtype or size of shards")
    cast.add_argument("--dtype", choices=DTYPES, help="default: as stored")
    cast.set_defaults(conversion=lambda source, arguments: Cast(source, DTYPES.get(arguments.dtype)))
    upcycle = kinds.add_parser("upcycle", help="a dense model's MLPs become experts, exactly")
    upcycle.add_argument("--scheme", choices=SCHEMES, required=True, help="how they are cut; see docs/conversion.md")
    upcycle.add_argument("--routed-experts", type=int, required=True, metavar="N", help="per layer")
    upcycle.add_argument("--shared-experts", type=int, default=0, metavar="S", help="per layer; default: none")
    upcycle.add_argument("--top-k", type=int, required=True, metavar="K", help="routed experts per token")
    upcycle.add_argument("--groups", type=int, default=1, metavar="G", help="of routed experts; default: 1")
    upcycle.add_argument("--dense-layers", type=int, default=1, metavar="L", help="first layers that stay; default: 1")
    upcycle.set_defaults(conversion=_upcycle)
    for parser in (gqa, cast, upcycle):
        parser.add_argument("source", metavar="SRC", help="a folder with config.json and safetensors files")
        parser.add_argument("out", metavar="OUT", help="the folder to be made")
        parser.add_argument("--max-shard-size", type=_bytes, default=SHARD_BYTES, metavar="SIZE", help="default: 2GB")
        parser.add_argument("--force", action="store_true", help="replace OUT where it is a checkpoint")
        parser.add_argument("--dry-run", action="store_true", help="only say what would be written")
        parser.add_argument("--json", action="store_true", help="report as JSON")
        parser.set_defaults(action=_convert)

    check = commands.add_parser("verify", help="compare a converted checkpoint with its source")
    check.add_argument("out", metavar="OUT")
    check.add_argument("--against", type=Path, metavar="SRC", help="the checkpoint it was made of")
    check.add_argument("--text", metavar="FILE", type=Path, help="tokens to compare on; default: random ones")
    check.add_argument("--dtype", choices=DTYPES, help="to compute in; default: as stored")
    check.add_argument("--json", action="store_true", help="report as JSON")
    check.set_defaults(action=_verify)


def _upcycle(source: Source, arguments: argparse.Namespace) -> Upcycle:
    """Of a dense DeepSeek-V2, or of what `gqa-to-mla` makes of another source."""
    is_deepseek = source.config.get("model_type") == DeepseekV2Config.model_type
    numbers = {"e": arguments.routed_experts, "shared": arguments.shared_experts, "k": arguments.top_k}
    return Upcycle(
        Cast(source, None) if is_deepseek else GqaToMla(source),
        arguments.scheme,
        **numbers,
        groups=arguments.groups,
        dense_layers=arguments.dense_layers,
    )


def _convert(arguments: argparse.Namespace) -> int:
    source = Source(arguments.source)
    target = Target(arguments.out, shard_bytes=arguments.max_shard_size, force=arguments.force)
    origin = source.folder.resolve()
    if target.out == origin or origin in target.out.parents or target.out in origin.parents:
        raise ValueError(f"{arguments.out} and the source lie in each other; choose another folder.")
    conversion = arguments.conversion(source, arguments)
    pieces, config = conversion.pieces(), conversion.config
    report = {
        "out": str(arguments.out),
        "tensors": len(pieces),
        "bytes": sum(piece.nbytes for piece in pieces),
        "files": list(target.plan(pieces)),
        "cached elements per token": config.cached_width * config.num_hidden_layers,
    }
    if not arguments.dry_run:
        command = f"deepseek-latent {shlex.join(arguments.given)}"
        texts = {"config.json": config.to_json_string(), "README.md": _card(source, command)}
        copies = [*source.beside(), *filter(Path.is_file, [source.folder / "generation_config.json"])]
        try:
            target.write(pieces, texts, copies, origin=f"{source.fingerprint()} {command}")
        except KeyboardInterrupt:
            print(f"interrupted; the same command goes on from {target.partial}", file=sys.stderr)
            return 130
    _tell(report, arguments.json)
    return 0


def _card(source: Source, command: str) -> str:
    """What the new folder says of itself: where it comes from, under which licence, and how it was made."""
    name, card = source.config.get("_name_or_path") or source.folder.resolve().name, source.folder / "README.md"
    given = ModelCard.load(card).data if card.is_file() else ModelCardData()
    data = ModelCardData(library_name="transformers", license=given.license, language=given.language)
    text = (
        f"# {name} as DeepSeek-V2\n\nMade of `{name}` by\n\n```bash\n{command}\n```\n\n"
        "which leaves a checkpoint in DeepSeek's official layout. `deepseek-latent verify OUT --against SRC` compares "
        "it with its source.\n"
    )
    return f"---\n{data.to_yaml()}\n---\n\n{text}"


def _verify(arguments: argparse.Namespace) -> int:
    set_verbosity_error()
    try:
        text = arguments.text.read_text(encoding="utf-8") if arguments.text else None
    except UnicodeDecodeError as error:
        raise ValueError(f"expected text in UTF-8, got {arguments.text}.") from error
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
    return f"{value:.2e}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else value


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
