"""Which targets of a LoRA adapter other programs apply, and which they leave out or refuse.

docs/fine-tuning.md has this as a table, and says what it was measured with.
"""

from collections.abc import Iterable
from typing import NamedTuple

_MLPS = {"gate_proj", "up_proj", "down_proj"}
_EXPERTS = {"experts.gate_up_proj", "experts.down_proj"}


def _advice(client: str) -> str:
    return f'merge the adapter, or train another one with lora_config(model, serve_with="{client}")'


class Client(NamedTuple):
    """A program that loads adapters: its name in a sentence, what has no effect there, and what helps.

    `needs_options` are targets that it loads only with options of its own, which `options` names.
    """

    name: str
    dropped: frozenset[str]
    advice: str
    needs_options: frozenset[str] = frozenset()
    options: str = ""


CLIENTS = {
    "transformers": Client(
        "transformers and peft without deepseek_latent",
        frozenset(_MLPS),
        "import deepseek_latent before the model is loaded, or merge the adapter",
    ),
    "vllm": Client(
        "vLLM",
        frozenset({"kv_b_proj"}),
        _advice("vllm"),
        frozenset(_EXPERTS),
        "make a copy with separate experts by deepseek-latent convert adapter, or give vLLM's engine "
        "enable_mixed_moe_lora_format=True and its LoRARequest is_3d_lora_weight=True, or merge the adapter",
    ),
    "llama.cpp": Client(
        "llama.cpp",
        frozenset({"q_proj", "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "lm_head"} | _EXPERTS),
        _advice("llama.cpp"),
    ),
}

# others, such as embed_tokens, were not examined
APPLIED_EVERYWHERE = {"o_proj", "gate.weight"}


def dropped_targets(targets: Iterable[str]) -> dict[str, list[str]]:
    """Which of `targets` have no effect in a client, by the names in `CLIENTS` of those clients that drop any."""
    found = {name: sorted(client.dropped.intersection(targets)) for name, client in CLIENTS.items()}
    return {name: dropped for name, dropped in found.items() if dropped}


def targets_that_need_options(targets: Iterable[str]) -> dict[str, list[str]]:
    """Which of `targets` a client loads only with options of its own, by the names in `CLIENTS`."""
    found = {name: sorted(client.needs_options.intersection(targets)) for name, client in CLIENTS.items()}
    return {name: needing for name, needing in found.items() if needing}


def target_of(name: str) -> str:
    """The target, such as "kv_b_proj" or "experts.down_proj", of a module's or a stacked weight's full name."""
    *_, parent, last = f".{name}".split(".")
    return f"{parent}.{last}" if parent in ("experts", "gate") else last
