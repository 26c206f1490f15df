"""`deepseek-latent inspect`: counts parameters and cache, and checks a folder's files against its config.json."""

import argparse
from pathlib import Path

import torch
from rich.table import Column, Table

from ..cache.format import CACHE_DTYPES, latent_format
from ..configuration_deepseek_v2 import DeepseekV2Config
from ..conversion.checkpoint import architecture_of, check_checkpoint, checkpoint_tensors, has_weights, read_config
from ..conversion.escaping import printable
from ..conversion.size import cached_elements_per_token, idle_parameters, parameters_by_part
from .terminal import print_tables, quiet_transformers

MAX_PROBLEMS_SHOWN = 40


def inspect_checkpoint(arguments: argparse.Namespace) -> int:
    with quiet_transformers():
        config = read_config(arguments.model)
    print_tables(_parameter_table(config), _cache_table(config))
    folder = Path(arguments.model).expanduser()
    if not folder.is_dir() or not has_weights(folder):
        print(f"No files were checked, because {arguments.model} is not a folder with safetensors weights.")
        return 0
    report = check_checkpoint(folder, config)
    if not report.problems:
        print(f"The files fit config.json: {report.num_tensors:,} tensors, {report.num_files:,} file(s).")
        return 0
    shown = report.problems if arguments.all else report.problems[:MAX_PROBLEMS_SHOWN]
    print(*map(printable, shown), sep="\n")
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
    # rich wraps a title to the width of its table
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
    compressed = config.cached_width * config.num_hidden_layers
    for attention, count in cached_elements_per_token(config).items():
        table.add_row(attention, f"{count:,}", f"{count * dtype.itemsize:,}", f"{count / compressed:.2f}")
    for cache_dtype in CACHE_DTYPES[1:]:
        widths = config.kv_lora_rank, config.qk_rope_head_dim
        row_bytes = latent_format(cache_dtype, *widths, dtype, config.num_unquantized_channels).row_width
        num_bytes = row_bytes * config.num_hidden_layers
        ratio = f"{num_bytes / (compressed * dtype.itemsize):.2f}"
        table.add_row(f"MLA, {cache_dtype}", f"{compressed:,}", f"{num_bytes:,}", ratio)
    return table
