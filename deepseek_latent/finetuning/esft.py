"""Expert-specialized fine-tuning (ESFT): the experts that a text uses are trained, everything else stays as it is.

Source: "Let the Expert Stick to His Last" (arXiv:2407.01906); files as in github.com/deepseek-ai/ESFT.
"""

from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..compat.other_classes import check_is_own_class
from ..compat.peft import is_adapted
from ..experts.moe import DeepseekV2MoE
from ..experts.names import STACKED, name_of_expert, split_projections
from ..experts.routed import DeepseekV2Experts, check_plain, not_stacked
from ..experts.trained import TrainedWeights
from ..experts.weights import StackedWeights
from ..modeling_deepseek_v2 import DeepseekV2PreTrainedModel, moe_layers
from ..whole_files import remove_leftovers, save_tensors, whole_folder
from .expert_selection import CONFIG_FILE, ExpertSelection


def train_experts(model: PreTrainedModel, selection: ExpertSelection) -> None:
    """Lets gradients reach what `selection` names, and nothing else of `model`.

    Then train as usual. Saving the model gives a checkpoint in the official layout at any time, `save_experts` writes
    only what was trained, and `finish_training` ends the training.

    Raises:
        ValueError: before anything is changed, where nothing is selected, layers or experts do not exist, or experts
            are wrapped, packed, sharded, in training already, or not multiplied by "grouped_mm".
        TypeError: for anything but a DeepSeek-V2, and for one that peft has wrapped.
    """
    layers = _moe_layers_without_adapters(model)
    _check_selection(selection, layers)
    if not (any(selection.experts.values()) or selection.shared_experts or selection.non_expert_modules):
        raise ValueError("expected something to train, got a selection of nothing.")
    for moe in layers.values():
        check_plain(moe.experts)
    _set_requires_grad(model, selection.non_expert_modules)
    for layer, moe in layers.items():
        _set_requires_grad(moe.experts, False)
        if moe.shared_experts is not None:
            _set_requires_grad(moe.shared_experts, selection.shared_experts)
        if selection.experts.get(layer):
            moe.experts.weights = TrainedWeights(selection.experts[layer])


def finish_training(model: PreTrainedModel) -> None:
    """Makes `model` what loading its checkpoint would give: plain experts, and gradients for all parameters.

    Where adapters were added in the meantime, only these keep gradients.
    """
    moe_layers(model)
    for module in model.modules():
        if isinstance(module, DeepseekV2Experts) and isinstance(module.weights, TrainedWeights):
            module.weights = StackedWeights()
    if isinstance(model, DeepseekV2PreTrainedModel) and _has_no_adapters(model):
        _set_requires_grad(model, True)


def _set_requires_grad(module: nn.Module, requires_grad: bool) -> None:
    for parameter in module.parameters():
        # packed weights are integers
        if parameter.is_floating_point():
            parameter.requires_grad_(requires_grad)


def save_experts(model: PreTrainedModel, selection: ExpertSelection, folder: str | Path) -> None:
    """Writes the trained weights, under their names in checkpoints, and expert_cfg.json: the files of DeepSeek's ESFT.

    `model` may be in training or finished. `load_experts` and DeepSeek's own code put the experts back into the model
    they came from. An earlier save in `folder` is replaced as a whole, when the new one is complete.

    Raises:
        ValueError: for a folder that holds other files than such a save, and for a selection of other experts than are
            in training.
    """
    folder = Path(folder)
    _check_holds_only_experts(folder)
    layers = _moe_layers_without_adapters(model)
    _check_selection(selection, layers)
    _check_holds_weights(layers)
    _check_is_in_training(selection, layers, model)
    # DeepSeek's code expects every layer
    selection = replace(selection, experts={layer: selection.experts.get(layer, []) for layer in layers})
    folder.parent.mkdir(parents=True, exist_ok=True)
    with whole_folder(folder) as place:
        tensors = {name: tensor.clone() for name, tensor in _selected(model, selection).items()}
        save_tensors(place / "model.safetensors", tensors, {"format": "pt"})
        selection.save(place)


def load_experts(model: PreTrainedModel, folder: str | Path) -> ExpertSelection:
    """Puts what `save_experts` or DeepSeek's code wrote in the place of the model's own weights.

    Raises ValueError, before anything is changed, where the files hold less or more than expert_cfg.json says, other
    shapes than the model has, or something else than finite floats, and where the model's weights cannot be written.
    """
    folder = Path(folder)
    if folder.is_file():
        raise ValueError(f"expected the folder that save_experts wrote, got the file {folder}.")
    selection, layers = ExpertSelection.load(folder), _moe_layers_without_adapters(model)
    _check_selection(selection, layers)
    _check_holds_weights(layers)
    for moe in layers.values():
        if isinstance(moe.experts.weights, TrainedWeights):
            raise not_stacked(moe.experts.weights)
    own = _selected(model, selection)
    # a weight that was rounded to int8 is a single number, expanded to its shape
    absent = next((name for name, weight in own.items() if weight.is_meta or 0 in weight.stride()), None)
    if absent is not None:
        raise ValueError(
            f"expected weights in memory that can be written, and {absent} is on disk, offloaded or rounded; load the "
            "model without that."
        )
    loaded, problems = _read_files(folder, own)
    problems += [f"{name} is missing" for name in sorted(own.keys() - loaded.keys())]
    problems += [f"{name} is unexpected" for name in sorted(loaded.keys() - own.keys())]
    problems += [
        f"{name} {problem}"
        for name, weight in own.items()
        if name in loaded and (problem := _problem_of(loaded[name], weight))
    ]
    if problems:
        shown = "; ".join(f"{problem:.200}" for problem in problems[:4])
        raise ValueError(f"{folder} does not hold what its {CONFIG_FILE} selects: {shown}.")
    for name, weight in own.items():
        weight.copy_(loaded[name])
    return selection


def _read_files(folder: Path, own: Collection[str]) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors of a folder by the names of the model, and the names that are there twice."""
    loaded, problems = {}, []
    for file in sorted(folder.glob("*.safetensors")):
        try:
            tensors = load_file(file)
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{file} is cut off or not a safetensors file ({error}); copy it again.") from error
        for name, tensor in tensors.items():
            # DeepSeek's code names tensors from the model with its head, or from the backbone
            name = name if name in own else f"model.{name}"
            problems += [f"{name} is there twice"] if name in loaded else []
            loaded[name] = tensor
    return loaded, problems


def _problem_of(tensor: Tensor, weight: Tensor) -> str | None:
    """Why `weight` cannot become `tensor`."""
    if tensor.shape != weight.shape:
        return f"has shape {list(tensor.shape)}, expected {list(weight.shape)}"
    if tensor.dtype not in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        return f"has dtype {tensor.dtype}, expected floats of 16 bits or more"
    if not tensor.to(weight.dtype).isfinite().all():
        return f"has numbers that are infinite or none in {weight.dtype}"
    return None


def _selected(model: PreTrainedModel, selection: ExpertSelection) -> dict[str, Tensor]:
    """What `selection` names, by its names in checkpoints; each tensor is a view of the model's own weight."""
    state = model.state_dict()
    found = {name: tensor for name, tensor in state.items() if _is_selected(name, selection)}
    prefix = "model." if hasattr(model, "model") else ""
    for layer, chosen in selection.experts.items():
        experts = f"{prefix}layers.{layer}.mlp.experts"
        for expert in chosen:
            for name in STACKED:
                for projection, weight in split_projections(name, state[f"{experts}.{name}"][expert]).items():
                    found[f"{experts}.{name_of_expert(expert, projection)}"] = weight
    return found


def _is_selected(name: str, selection: ExpertSelection) -> bool:
    """Whether `selection` names this weight as a whole."""
    if ".mlp.experts." in name:
        return False
    return selection.shared_experts if ".mlp.shared_experts." in name else selection.non_expert_modules


def _check_holds_only_experts(folder: Path) -> None:
    """Refuses a folder in which something else would be lost when it is replaced."""
    if not folder.is_dir():
        return
    # what a killed ExpertSelection.save left
    remove_leftovers(folder / CONFIG_FILE)
    # without this file, tensors beside it are not those of trained experts
    is_own = (folder / CONFIG_FILE).is_file()
    names = sorted(path.name for path in folder.iterdir() if path.name != CONFIG_FILE)
    others = [name for name in names if not (is_own and name.endswith(".safetensors"))]
    if others:
        found = "a checkpoint" if "config.json" in others else others[0]
        raise ValueError(
            f"expected a folder for nothing but the trained experts, got {folder}, which holds {found}; choose another."
        )


def _moe_layers_without_adapters(model: PreTrainedModel) -> dict[int, DeepseekV2MoE]:
    if not isinstance(model, DeepseekV2PreTrainedModel):
        check_is_own_class(model)
        raise TypeError(f"expected a DeepSeek-V2 without adapters around it, got {type(model).__name__}.")
    if not _has_no_adapters(model):
        raise TypeError("expected a DeepSeek-V2 without adapters in it; merge these, or load the model without them.")
    return moe_layers(model)


def _has_no_adapters(model: nn.Module) -> bool:
    return not any(is_adapted(module) for module in model.modules())


def _check_selection(selection: ExpertSelection, layers: dict[int, DeepseekV2MoE]) -> None:
    """Refuses layers and experts that the model does not have."""
    if not isinstance(selection, ExpertSelection):
        raise TypeError(
            f"expected an ExpertSelection, got {type(selection).__name__}; write ExpertSelection(experts), or load one "
            "with ExpertSelection.load(path)."
        )
    for layer, chosen in selection.experts.items():
        if layer not in layers:
            raise ValueError(f"expected layers with experts ({min(layers)} to {max(layers)}), got layer {layer!s:.80}.")
        last = len(layers[layer].gate.weight) - 1
        if len({*chosen}) < len(chosen) or not all(0 <= expert <= last for expert in chosen):
            raise ValueError(f"expected distinct experts from 0 to {last} in layer {layer}, got {[*chosen]!s:.200}.")


def _check_is_in_training(selection: ExpertSelection, layers: dict[int, DeepseekV2MoE], model: PreTrainedModel) -> None:
    """Refuses another selection than the one in training; a model that is not in training has none to compare with."""
    weights = {layer: moe.experts.weights for layer, moe in layers.items()}
    training = {layer: {*x.trained} for layer, x in weights.items() if isinstance(x, TrainedWeights)}
    if not training:
        return
    for layer in layers:
        trained, given = sorted(training.get(layer, [])), sorted(selection.experts.get(layer, []))
        if trained != given:
            raise ValueError(
                f"expected the selection that is in training, with experts {trained} in layer {layer}, got {given}."
            )
    for part in ("shared_experts", "non_expert_modules"):
        only_part = ExpertSelection({}, **{part: True})
        parameters = [x for name, x in model.named_parameters() if _is_selected(name, only_part)]
        if getattr(selection, part) and parameters and not any(x.requires_grad for x in parameters):
            raise ValueError(f"expected the selection that is in training, got one with {part}, which are frozen.")


def _check_holds_weights(layers: dict[int, DeepseekV2MoE]) -> None:
    """Refuses experts without stacked weights in memory, such as packed ones."""
    for moe in layers.values():
        # the stand-in of a packed weight is a single number, expanded to the shape of the weight
        if not moe.experts.down_proj.is_contiguous():
            raise not_stacked(moe.experts.weights)
