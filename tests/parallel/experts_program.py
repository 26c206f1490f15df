"""Trains one step with experts on several processes: python experts_program.py FOLDER RESULTS OPTIONS

FOLDER has a checkpoint and batches.pt, a list with the ids [b s] of each group of processes that shares a batch.
RESULTS gets the loss and the gradients, both averaged over the batches, and of every process what it sent, how many
pairs of a token and a device it chose, and in which order things happened.
"""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

import deepseek_latent  # noqa: F401
from deepseek_latent.experts import exchange
from deepseek_latent.experts.moe import PartsOfMLP
from deepseek_latent.modeling_deepseek_v2 import moe_layers
from tests.parallel.launch import finish


def choose_first_half(gate: torch.nn.Module) -> None:
    """Makes a router choose only experts of the first process, by the choices that it would make, folded."""
    choose = gate.choose

    def choose_of_half(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        half = logits.shape[-1] // 2
        return choose(torch.cat((logits[:, :half], logits[:, half:] - 1e4), dim=-1))

    gate.choose = choose_of_half


def note(events: list[str], owner: type, method: str, event: str) -> None:
    """Adds `event` to a list whenever a method is called."""
    call = getattr(owner, method)

    def call_and_note(*args, **kwargs):
        events.append(event)
        return call(*args, **kwargs)

    setattr(owner, method, staticmethod(call_and_note) if method == "backward" else call_and_note)


def main() -> None:
    folder, results, options = Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3])
    sizes = options["sizes"]
    division = DistributedConfig(ep_implementation="device_limited", **sizes)
    model = AutoModelForCausalLM.from_pretrained(folder, distributed_config=division).train()
    layers = moe_layers(model).values()
    if options.get("checkpointing"):
        model.gradient_checkpointing_enable()
    if options.get("one_sided"):
        for moe in layers:
            choose_first_half(moe.gate)
    batches = torch.load(folder / "batches.pt")
    ids = batches[dist.get_rank() // sizes.get("tp_size", 1)]
    events: list[str] = []
    bytes_sent: list[int] = []
    first = next(iter(layers))
    issue = exchange.Exchange._issue
    exchange.Exchange._issue = lambda self, rows, *sizes: bytes_sent.append(rows.nbytes) or issue(self, rows, *sizes)
    for method in ("_start", "_wait"):
        function = getattr(exchange, method.title())
        note(events, function, "apply", method[1:])
        note(events, function, "backward", f"{method[1:]} back")
    note(events, PartsOfMLP, "_expand", "expand")
    note(events, PartsOfMLP, "_project", "project")
    for name in ("up_proj", "down_proj"):
        layer = getattr(first.shared_experts, name)
        layer.register_full_backward_hook(lambda *_, name=name: events.append(f"{name} back"))
    chosen = []
    first.gate.register_forward_hook(lambda gate, given, made: chosen.append(made[2]))

    torch.manual_seed(dist.get_rank())
    loss = model(ids, labels=ids).loss
    loss.backward()
    found = {}
    for name, x in model.named_parameters():
        found[name] = x.grad.full_tensor() if isinstance(x.grad, DTensor) else x.grad
    loss = loss.detach()
    dist.all_reduce(loss)
    found["loss"] = loss / dist.get_world_size()
    owner = chosen[0] // first.experts.num_experts
    found_here = {
        "tokens": len(owner),
        "pairs": sum(len(set(row)) for row in owner.tolist()),
        "tokens_sent": first.experts.tokens_sent,
        "bytes_sent": sum(bytes_sent),
        "events": events,
    }
    torch.save(found_here, results / f"{dist.get_rank()}.pt")
    if dist.get_rank() == 0:
        torch.save(found, results / "found.pt")
    finish()


if __name__ == "__main__":
    main()
