"""Models as transformers 4 has them, with a module per routed expert, for adapters with separate experts."""

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from deepseek_latent.experts.names import split_projections
from deepseek_latent.experts.routed import DeepseekV2Experts


class SeparateExperts(nn.Module):
    """The modules of a model by their names, with linear layers for each routed expert. It cannot be called.

    It is no model of transformers, so peft takes adapters for it as they are.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        for name, module in model.named_children():
            self.add_module(name, module)
        for moe in [*self.modules()]:
            if isinstance(getattr(moe, "experts", None), DeepseekV2Experts):
                moe.experts = nn.ModuleList(map(_linear_layers, moe.experts.gate_up_proj, moe.experts.down_proj))

    def get_input_embeddings(self) -> nn.Module:
        return self.model.embed_tokens

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def prepare_inputs_for_generation(self) -> None:
        """peft looks for it in causal language models."""


def _linear_layers(gate_up: Tensor, down: Tensor) -> nn.ModuleDict:
    weights = split_projections("gate_up_proj", gate_up) | {"down_proj": down}
    layers = nn.ModuleDict({name: nn.Linear(*weight.shape[::-1], bias=False) for name, weight in weights.items()})
    return layers.to(down.dtype)


@torch.no_grad()
def deltas(model: PeftModel) -> dict[str, Tensor]:
    """What an adapter adds to each weight, by its name in checkpoints, in float64."""
    found = {}
    for place, layer in model.get_base_model().named_modules():
        if not isinstance(layer, BaseTunerLayer) or not getattr(layer, "lora_A", None):
            continue
        place = place.replace(".base_layer", "")
        a, b, scaling = layer.lora_A["default"].weight, layer.lora_B["default"].weight, layer.scaling["default"]
        if not place.endswith(".mlp.experts"):
            found[place] = scaling * b.double() @ a.double()
            continue
        e, name = layer.num_experts, layer.parameter_name
        a, b = a.double().reshape(e, -1, a.shape[1]), b.double().reshape(len(b), -1, e).permute(2, 0, 1)
        for i, delta in enumerate(scaling * b @ a):
            for projection, part in split_projections(name, delta).items():
                found[f"{place}.{i}.{projection}"] = part
    return found
