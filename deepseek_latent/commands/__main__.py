"""`deepseek-latent`: generate text, inspect a checkpoint, let the code travel with it, run tools with the plugin."""

import argparse
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Column, Table
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase, TextStreamer
from transformers.utils import logging

from .. import LatentCache, __version__
from ..cache.format import CACHE_DTYPES, latent_format
from ..configuration_deepseek_v2 import DeepseekV2Config
from ..conversion.checkpoint import (
    architecture_of,
    check_checkpoint,
    checkpoint_tensors,
    has_weights,
    local_or_hub,
    read_config,
)
from ..conversion.remote_code import export_code
from ..conversion.size import cached_elements_per_token, expanded_width, idle_parameters, parameters_by_part
from .convert import act, add_commands
from .experts import add_command as add_experts
from .run import prepare_tool, run_tool

PROBLEMS_SHOWN = 40


def main(argv: list[str] | None = None) -> int:
    """Exit code 0: done; 1: the checkpoint does not fit its config; 2: unusable input, said in one sentence."""
    arguments, status = act(_parser(), argv)
    # out here, since what a tool raises is the tool's: traceback, exit code and all
    if arguments.command == "run" and status == 0:
        run_tool(arguments.module, arguments.script)
    return status


def _generate(arguments: argparse.Namespace) -> int:
    if arguments.top_p < 1 and not arguments.temperature:
        raise ValueError("--top-p needs a --temperature above 0; without one the most likely token is always taken.")
    with _quiet_transformers():
        config = read_config(arguments.model)
        tokenizer = _tokenizer(arguments.model)
        inputs = _encode(tokenizer, arguments.prompt, arguments.chat)
        place = {"dtype": arguments.dtype, "device_map": _device(arguments.device)}
        try:
            model = AutoModelForCausalLM.from_pretrained(local_or_hub(arguments.model), config=config, **place)
        except SafetensorError as error:
            raise ValueError(
                f"expected readable weights in {arguments.model}, got: {error}; deepseek-latent inspect names the file."
            ) from error
        if arguments.seed is not None:
            torch.manual_seed(arguments.seed)
        # top_k 0, since transformers would keep 50 tokens unasked
        sampling = {"do_sample": True, "temperature": arguments.temperature, "top_p": arguments.top_p, "top_k": 0}
        # whatever a checkpoint brings along, the cache reported on is the latent one
        model.generation_config.cache_implementation = None
        if not arguments.chat:
            print(arguments.prompt, end="", flush=True)
        streamer = _TimedStreamer(tokenizer)
        started = time.perf_counter()
        output = model.generate(
            **inputs.to(model.device),
            cache=LatentCache(model.config, cache_dtype=arguments.cache_dtype),
            streamer=streamer,
            max_new_tokens=arguments.max_new_tokens,
            use_cache=True,
            return_dict_in_generate=True,
            **(sampling if arguments.temperature else {"do_sample": False}),
        )
    Console(stderr=True).print(_generation_table(config, output.cache, streamer.times, started))
    return 0


def _generation_table(config: DeepseekV2Config, cache: LatentCache, times: list[float], started: float) -> Table:
    held = cache.nbytes
    per_layer = cache.layers[0].dtype.itemsize * expanded_width(config)
    expanded = cache.get_seq_length() * config.num_hidden_layers * per_layer
    table = Table("", Column(justify="right"), show_header=False)
    table.add_row("new tokens", f"{len(times):,}")
    table.add_row("time to first token", f"{times[0] - started:.3f} s")
    if len(times) > 1:
        table.add_row("decoding", f"{(len(times) - 1) / (times[-1] - times[0]):.1f} tokens/s")
    table.add_row("cache held", f"{held:,} bytes")
    table.add_row("as keys and values", f"{expanded:,} bytes")
    table.add_row("ratio", f"{expanded / held:.1f}")
    return table


class _TimedStreamer(TextStreamer):
    """Streams new text to stdout and remembers when each new token came."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.times: list[float] = []

    def put(self, value: Tensor) -> None:
        if not self.next_tokens_are_prompt:
            self.times.append(time.perf_counter())
        super().put(value)


def _tokenizer(model: str) -> PreTrainedTokenizerBase:
    place = local_or_hub(model)
    if isinstance(place, Path) and not any(place.glob("tokenizer*")):
        raise ValueError(f"expected tokenizer.json in {model}, got none; copy the tokenizer's files from its source.")
    return AutoTokenizer.from_pretrained(place)


def _encode(tokenizer: PreTrainedTokenizerBase, prompt: str, chat: bool):
    if chat and tokenizer.chat_template is None:
        raise ValueError("--chat needs a tokenizer with a chat template, and this one has none; leave --chat out.")
    if chat:
        options = {"add_generation_prompt": True, "return_tensors": "pt", "return_dict": True}
        inputs = tokenizer.apply_chat_template([{"role": "user", "content": prompt}], **options)
    else:
        inputs = tokenizer(prompt, return_tensors="pt")
    if inputs["input_ids"].shape[-1] == 0:
        raise ValueError("expected a prompt of at least one token, got none; write a longer prompt.")
    # a generic tokenizer adds token_type_ids, which this model does not have
    inputs.pop("token_type_ids", None)
    return inputs


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"--device must be a name like cpu or cuda:0, got {name}.") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"--device must be there, got {name}; torch sees {torch.cuda.device_count()} such devices.")
    return device


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    verbosity, progress_bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if progress_bars:
            logging.enable_progress_bar()


def _inspect(arguments: argparse.Namespace) -> int:
    with _quiet_transformers():
        config = read_config(arguments.model)
    Console().print(_parameter_table(config), _cache_table(config), sep="\n\n")
    folder = Path(arguments.model).expanduser()
    if not folder.is_dir() or not has_weights(folder):
        print("No files were checked: that takes a folder with safetensors weights.")
        return 0
    report = check_checkpoint(folder, config)
    if not report.problems:
        print(f"The files fit config.json: {report.num_tensors:,} tensors, {report.num_files:,} file(s).")
        return 0
    shown = report.problems if arguments.all else report.problems[:PROBLEMS_SHOWN]
    print(*shown, sep="\n")
    if len(shown) < len(report.problems):
        print(f"... and {len(report.problems) - len(shown):,} more; --all lists them.")
    print(f"The files do not fit config.json: {len(report.problems):,} problems.")
    return 1


def _parameter_table(config: DeepseekV2Config) -> Table:
    architecture = architecture_of(config)
    tensors = checkpoint_tensors(config, architecture)
    parts = parameters_by_part(tensors)
    total = sum(parts.values())
    title = f"{architecture}, {len(tensors):,} tensors"
    # a title is wrapped to its table
    table = Table("part", Column("parameters", justify="right"), title=title, min_width=len(title))
    for part, count in parts.items():
        table.add_row(part, f"{count:,}")
    table.add_section()
    table.add_row("total", f"{total:,}")
    table.add_row("active per token", f"{total - idle_parameters(config):,}")
    return table


def _cache_table(config: DeepseekV2Config) -> Table:
    dtype = config.dtype or torch.bfloat16
    numbers = (Column(heading, justify="right") for heading in ("elements", "bytes", "ratio"))
    table = Table("attention", *numbers, title=f"cache per token, {str(dtype).removeprefix('torch.')}")
    ours = config.cached_width * config.num_hidden_layers
    for attention, count in cached_elements_per_token(config).items():
        table.add_row(attention, f"{count:,}", f"{count * dtype.itemsize:,}", f"{count / ours:.2f}")
    for cache_dtype in CACHE_DTYPES[1:]:
        row = latent_format(cache_dtype, config.kv_lora_rank, config.qk_rope_head_dim, dtype).row_width
        in_bytes = row * config.num_hidden_layers
        table.add_row(f"MLA, {cache_dtype}", f"{ours:,}", f"{in_bytes:,}", f"{in_bytes / (ours * dtype.itemsize):.2f}")
    return table


def _export_code(arguments: argparse.Namespace) -> int:
    written = export_code(Path(arguments.folder).expanduser(), arguments.subfolder)
    print(f"Wrote into {arguments.folder}: {', '.join(written)}.")
    print("It now loads with trust_remote_code=True where only transformers is installed.")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="deepseek-latent", description=__doc__.partition(": ")[2])
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    generate = commands.add_parser("generate", help="stream text and say what the cache held")
    generate.description = "Streams text to stdout, then writes to stderr how fast it came and what the cache held."
    generate.add_argument("model", metavar="MODEL", help="a checkpoint's folder or a hub id")
    generate.add_argument("prompt", metavar="PROMPT")
    generate.add_argument(
        "--max-new-tokens", type=_between(int, 1, 1 << 20), default=128, metavar="N", help="default: 128"
    )
    generate.add_argument(
        "--temperature", type=_between(float, 0, 100), metavar="T", help="sample; default: most likely token"
    )
    generate.add_argument(
        "--top-p", type=_between(float, 0, 1), default=1.0, metavar="P", help="sample from the likeliest P of the mass"
    )
    generate.add_argument("--seed", type=int, metavar="N", help="makes sampling repeatable")
    dtypes = ("auto", "float32", "bfloat16", "float16")
    generate.add_argument("--dtype", choices=dtypes, default="auto", help="default: that of the checkpoint")
    generate.add_argument("--device", default="auto", help="cpu, cuda, cuda:1 ...; default: cuda where there is one")
    generate.add_argument(
        "--cache-dtype", choices=CACHE_DTYPES[1:], help="quantize the cache; default: the dtype that is computed in"
    )
    generate.add_argument("--chat", action="store_true", help="put the prompt into the tokenizer's chat template")
    generate.set_defaults(action=_generate)

    inspect = commands.add_parser("inspect", help="count parameters and cache, check a checkpoint's files")
    inspect.description = (
        "Counts parameters and cache without loading weights. For a folder, also compares every tensor's name, shape "
        "and dtype with config.json, from the files' headers. Exit code 0: fits, 1: does not, 2: unusable input."
    )
    inspect.add_argument("model", metavar="MODEL_OR_CONFIG", help="a folder, a config.json or a hub id")
    inspect.add_argument("--all", action="store_true", help=f"list all problems, not the first {PROBLEMS_SHOWN}")
    inspect.set_defaults(action=_inspect)

    export = commands.add_parser("export-code", help="make a checkpoint load where this package is not installed")
    export.description = (
        "Copies the model's code into a checkpoint's folder and names it in its config.json (auto_map), so that the "
        "folder loads with trust_remote_code=True where only transformers is installed."
    )
    export.add_argument("folder", metavar="FOLDER")
    export.add_argument("--subfolder", default="", metavar="NAME", help="put the code there, not beside the weights")
    export.set_defaults(action=_export_code)

    add_commands(commands)
    add_experts(commands)

    run = commands.add_parser(
        "run", usage="%(prog)s [-h] (-m MODULE | SCRIPT.py) ...", help="run another tool with DeepSeek-V2 registered"
    )
    run.description = "Runs a module or script as python would, with DeepSeek-V2 registered; its exit code is ours."
    run.add_argument("-m", dest="module", nargs=argparse.REMAINDER, metavar="MODULE", help="a module and its arguments")
    run.add_argument("script", nargs=argparse.REMAINDER, metavar="SCRIPT.py", help="a script and its arguments")
    run.set_defaults(action=lambda arguments: prepare_tool(arguments.module, arguments.script))
    return parser


def _between(kind: type, low: float, high: float):
    def parse(text: str) -> float:
        if not low <= (number := kind(text)) <= high:
            raise argparse.ArgumentTypeError(f"expected {low} to {high}, got {text}")
        return number

    parse.__name__ = kind.__name__  # argparse writes "invalid int value"
    return parse


if __name__ == "__main__":
    sys.exit(main())
