"""`deepseek-latent generate`: streams text, then shows the speed and the size of the cache."""

import argparse
import sys
import time

import torch
from rich.console import Console
from rich.table import Column, Table
from torch import Tensor
from transformers import BatchEncoding, PreTrainedTokenizerBase, TextStreamer

from ..cache.latent_cache import LatentCache
from ..configuration_deepseek_v2 import DeepseekV2Config
from ..conversion.checkpoint import read_config
from ..conversion.loading import load_model
from ..conversion.places import folder_or_hub
from ..conversion.size import EXPANDED, cached_elements_per_token
from ..conversion.text import check_vocabulary, load_tokenizer
from ..kernels import optimize_for_inference
from .chat import converse, encode_chat, messages_from_stdin
from .terminal import quiet_transformers


def generate_text(arguments: argparse.Namespace) -> int:
    with quiet_transformers():
        place = folder_or_hub(arguments.model)
        config = read_config(arguments.model)
        tokenizer = load_tokenizer(place)
        if arguments.chat and tokenizer.chat_template is None:
            raise ValueError("--chat needs a tokenizer with a chat template, and this one has none; leave --chat out.")
        inputs = None
        if arguments.prompt is not None:
            inputs = _encode(tokenizer, arguments.prompt, arguments.chat)
            # before the weights are loaded
            check_vocabulary(inputs["input_ids"], config.vocab_size)
        placement = {"dtype": arguments.dtype, "device_map": _device(arguments.device)}
        model = load_model(place, config=config, **placement)
        if arguments.optimize:
            print(optimize_for_inference(model), file=sys.stderr)
        if arguments.seed is not None:
            torch.manual_seed(arguments.seed)
        # top_k 0, because transformers samples from 50 tokens by default
        sampling = {"do_sample": True, "temperature": arguments.temperature, "top_p": arguments.top_p, "top_k": 0}
        # the cache in the table is the latent one, whichever cache the checkpoint asks for
        model.generation_config.cache_implementation = None
        cache = LatentCache(model.config, cache_dtype=arguments.cache_dtype)
        streamer = _TimedStreamer(tokenizer)

        def write(inputs: BatchEncoding) -> Tensor:
            check_vocabulary(inputs["input_ids"], config.vocab_size)
            # a generic tokenizer adds token_type_ids, which this model does not have
            inputs.pop("token_type_ids", None)
            streamer.start()
            return model.generate(
                **inputs.to(model.device),
                cache=cache,
                streamer=streamer,
                max_new_tokens=arguments.max_new_tokens,
                use_cache=True,
                **(sampling if arguments.temperature else {"do_sample": False}),
            )

        if inputs is not None:
            if not arguments.chat:
                print(arguments.prompt, end="", flush=True)
            write(inputs)
        else:
            converse(messages_from_stdin(), tokenizer, cache, write, max_tokens=config.max_position_embeddings)
    if streamer.times:
        counted = "new tokens" if inputs is not None else "new tokens of the last answer"
        Console(stderr=True).print(_table(config, cache, streamer, counted))
    return 0


def _table(config: DeepseekV2Config, cache: LatentCache, streamer: "_TimedStreamer", counted: str) -> Table:
    held, times, started = cache.nbytes, streamer.times, streamer.started
    bytes_per_element = cache.get_seq_length() * cache.layers[0].dtype.itemsize
    elements = cached_elements_per_token(config)
    expanded = elements.pop(EXPANDED) * bytes_per_element
    table = Table("", Column(justify="right"), show_header=False)
    table.add_row(counted, f"{len(times):,}")
    table.add_row("time to first token", f"{times[0] - started:.3f} s")
    if len(times) > 1:
        table.add_row("decoding", f"{(len(times) - 1) / (times[-1] - times[0]):.1f} tokens/s")
    table.add_row("cache held", f"{held:,} bytes")
    table.add_row(f"as keys and values of all {config.num_attention_heads} heads", f"{expanded:,} bytes")
    table.add_row("ratio", f"{expanded / held:.1f}")
    # what a model without latent attention would have, or, if this one was converted, what its source has
    for name, per_token in elements.items():
        if name.startswith(("GQA", "source")):
            table.add_row(f"as keys and values, {name}", f"{per_token * bytes_per_element:,} bytes")
            table.add_row(f"ratio to {name.partition(',')[0]}", f"{per_token * bytes_per_element / held:.2f}")
    return table


class _TimedStreamer(TextStreamer):
    """Streams new text to stdout and records the time of each new token since `start`."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.times: list[float] = []

    def start(self) -> None:
        self.started, self.times = time.perf_counter(), []

    def put(self, value: Tensor) -> None:
        if not self.next_tokens_are_prompt:
            self.times.append(time.perf_counter())
        super().put(value)


def _encode(tokenizer: PreTrainedTokenizerBase, prompt: str, is_chat: bool) -> BatchEncoding:
    if is_chat:
        inputs = encode_chat(tokenizer, [{"role": "user", "content": prompt}])
    else:
        inputs = tokenizer(prompt, return_tensors="pt")
    if inputs["input_ids"].shape[-1] == 0:
        raise ValueError("expected a prompt of at least one token, got none; write a longer prompt.")
    return inputs


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"--device must be a name like cpu or cuda:0, got {name}.") from error
    num_devices = torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= num_devices:
        raise ValueError(f"--device must be available, got {name}; torch finds {num_devices} CUDA devices.")
    return device
