"""LoRA on a model that processes share: python lora_program.py FOLDER RESULTS SIZES BITS TARGETS

FOLDER has a checkpoint and ids.pt [b s], of which every group of processes that shares a batch takes a part. Factors
depend on their names only. RESULTS gets the loss, the gradients, logits, tokens, and the adapter, all of the first
process. BITS of 16 leaves the experts as they are. TARGETS are linear layers; routed experts are targets as well.
"""

import ast
import sys
from pathlib import Path

import peft
import pytest
import torch
import torch.distributed as dist
from peft import LoraConfig, PeftModel, get_peft_model
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

import deepseek_latent  # noqa: F401
from deepseek_latent.experts.names import ROUTED_EXPERTS
from deepseek_latent.experts.routed import check_plain
from deepseek_latent.finetuning.packing import pack_experts
from deepseek_latent.modeling_deepseek_v2 import moe_layers
from tests.parallel.launch import finish


def load(folder: Path, sizes: dict, bits: int):
    given = {"distributed_config": DistributedConfig(**sizes)} if sizes else {}
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, **given)
    if bits < 16:
        pack_experts(model, bits)
    return model


def set_factors(model: torch.nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.manual_seed(sum(map(ord, name)))
            value = 0.2 * torch.randn(parameter.shape, dtype=torch.float64)
            if isinstance(parameter, DTensor):
                value = distribute_tensor(value, parameter.device_mesh, parameter.placements)
            parameter.data.copy_(value)


def averaged(x: torch.Tensor, num_batches: int) -> torch.Tensor:
    """The mean over all processes, as Trainer takes of a gradient if they have several batches."""
    whole = x.full_tensor() if isinstance(x, DTensor) else x.detach().clone()
    if num_batches > 1:
        dist.all_reduce(whole)
        whole /= dist.get_world_size()
    return whole


def refuse(*args, **kwargs):
    raise AssertionError("an adapter was added to the weights of all experts")


def main() -> None:
    folder, results = map(Path, sys.argv[1:3])
    sizes, bits, targets = ast.literal_eval(sys.argv[3]), int(sys.argv[4]), sys.argv[5].split(",")
    peft.tuners.lora.layer.ParamWrapper.forward = refuse
    config = LoraConfig(r=4, lora_alpha=8, target_modules=targets, target_parameters=[*ROUTED_EXPERTS])
    model = get_peft_model(load(folder, sizes, bits), config)
    set_factors(model)
    first = not sizes or dist.get_rank() == 0
    num_batches = sizes.get("fsdp_size", 1)
    own_batch = dist.get_rank() // sizes.get("tp_size", 1) if sizes else 0
    ids = torch.load(folder / "ids.pt")
    own = ids.chunk(num_batches)[own_batch]

    loss = model(own, labels=own).loss
    loss.backward()
    found = {name: averaged(x.grad, num_batches) for name, x in model.named_parameters() if x.grad is not None}
    found["loss"] = averaged(loss, num_batches)
    model.eval()
    with torch.no_grad():
        found["logits"] = model(ids).logits
    found["tokens"] = model.generate(ids, max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0)
    if sizes:
        with pytest.raises(ValueError, match="split over processes"):
            model.merge_adapter()
    if sizes and bits == 16:
        experts = next(iter(moe_layers(model.get_base_model()).values())).experts.get_base_layer()
        with pytest.raises(ValueError, match="these are split over processes"):
            check_plain(experts)
    adapter = {name: x for name, x in model.state_dict().items() if "lora_" in name}
    model.save_pretrained(results / "adapter", state_dict=adapter, is_main_process=first)
    if sizes:
        dist.barrier()
    # what was saved is loaded into a model that processes share as well
    again = PeftModel.from_pretrained(load(folder, sizes, bits), results / "adapter").eval()
    with torch.no_grad():
        found["logits of the saved adapter"] = again(ids).logits
    moe = next(iter(moe_layers(model.get_base_model()).values()))
    found["bytes of codes"] = torch.tensor(sum(x.nbytes for x in moe.experts.buffers()))
    if first:
        torch.save(found, results / "found.pt")
    finish()


if __name__ == "__main__":
    main()
