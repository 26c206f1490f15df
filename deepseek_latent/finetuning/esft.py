"""Expert-specialised fine-tuning: the experts a text uses are trained whole, everything else stays as it is.

Source: "Let the Expert Stick to His Last" (arXiv:2407.01906); files as in github.com/deepseek-ai/ESFT.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from operator import index
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..compat.peft import is_adapted
from ..compat.torch import become
from ..experts.moe import DeepseekV2Experts, DeepseekV2MoE, check_plain, state_of
from ..experts.trained import TrainedExperts
from ..modeling_deepseek_v2 import DeepseekV2PreTrainedModel, moe_layers
from .activity import Activity

FILE = "expert_cfg.json"
# of the paper, by how experts are scored
THRESHOLDS = {"token": 0.2, "gate": 0.1}


@dataclass(frozen=True)
class ExpertSelection:
    """What is trained: experts by layer, and, if they are to be, the shared experts and all that is no expert.

    `non_expert_modules` are attention, norms, embeddings, head, dense MLPs and routers.
    """

    experts: Mapping[int, Sequence[int]]
    shared_experts: bool = False
    non_expert_modules: bool = False

    def __post_init__(self):
        # layers may come as JSON has them, numbers as torch and numpy have them
        try:
            experts = {int(layer): [index(expert) for expert in chosen] for layer, chosen in self.experts.items()}
        except (AttributeError, TypeError, ValueError) as error:
            raise ValueError(f"expected experts by layer, {{layer: [numbers]}}, got {self.experts!r}.") from error
        object.__setattr__(self, "experts", experts)

    @classmethod
    def load(cls, path: str | Path) -> "ExpertSelection":
        """From an expert_cfg.json, or the folder it lies in; ValueError for anything else, or if it is not there."""
        path = Path(path)
        path = path / FILE if path.is_dir() else path
        if not path.is_file():
            raise ValueError(
                f"expected {path}, as save_experts or ExpertSelection.save writes it, and it is not there; checkpoints "
                "load with from_pretrained, adapters of peft with PeftModel.from_pretrained."
            )
        try:
            given = json.loads(path.read_text(encoding="utf-8"))
            rest = (bool(given.get(name, False)) for name in ("shared_experts", "non_expert_modules"))
            return cls(given["experts"], *rest)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f'expected {{"experts": {{layer: [ids]}}, "shared_experts": .., "non_expert_modules": ..}} in {path}, '
                f"got something else ({type(error).__name__}: {error})."
            ) from error

    def save(self, path: str | Path) -> None:
        """As an expert_cfg.json that DeepSeek's own code reads, in the folder `path` or by that name."""
        path = Path(path)
        given = {"experts": {str(layer): [*chosen] for layer, chosen in self.experts.items()}}
        given |= {"shared_experts": self.shared_experts, "non_expert_modules": self.non_expert_modules}
        (path / FILE if path.is_dir() else path).write_text(json.dumps(given) + "\n", encoding="utf-8")


def expert_scores(activity: Activity, by: str = "token") -> dict[int, list[float]]:
    """By layer, how much a text uses each expert, from `activity_of(model, ids)`.

    By "token", the share of choices, 1 in all; by "gate", the mean gate value. Source: paper 3.2.
    """
    if by not in ("token", "gate"):
        raise ValueError(f"experts are scored by 'token' or by 'gate', got {by!r}.")
    return dict(zip(activity.layers, (activity.shares if by == "token" else activity.gates).tolist()))


def select_experts(scores: Mapping[int, Sequence[float]], threshold: float) -> dict[int, list[int]]:
    """Of each layer the best experts, best first, until their scores add up to `threshold`.

    `THRESHOLDS` has those of the paper. Source: paper 3.3.
    """
    if not isinstance(scores, Mapping):
        raise TypeError(f"expected scores by layer, from expert_scores(activity), got {type(scores).__name__}.")
    if not 0 < threshold <= 1:
        raise ValueError(f"threshold must be above 0 and at most 1, got {threshold}.")
    chosen: dict[int, list[int]] = {}
    for layer, of_layer in scores.items():
        chosen[layer], total = [], 0.0
        # the lower number first among equals
        for expert in sorted(range(len(of_layer)), key=lambda expert: -of_layer[expert]):
            if total >= threshold:
                break
            chosen[layer].append(expert)
            total += of_layer[expert]
    return chosen


def train_experts(model: PreTrainedModel, selection: ExpertSelection) -> None:
    """Leaves gradients to what `selection` names, and to nothing else of `model`.

    Then train as ever. Nothing has to be merged: saving gives a checkpoint in the official layout at any time,
    `save_experts` what was trained alone, and `merge_experts` ends it.

    Raises:
        ValueError: before anything is changed, where nothing is selected, layers or experts are not there, or experts
            are wrapped, packed, sharded, in training already, or not multiplied by "grouped_mm".
        TypeError: for what is no DeepSeek-V2, or one that peft has wrapped.
    """
    layers = _moe_layers(model)
    _check(selection, layers)
    if not (any(selection.experts.values()) or selection.shared_experts or selection.non_expert_modules):
        raise ValueError("expected something to train, got a selection of nothing.")
    for moe in layers.values():
        check_plain(moe.experts)
    _take_gradients(model, selection.non_expert_modules)
    for layer, moe in layers.items():
        _take_gradients(moe.experts, False)
        if moe.shared_experts is not None:
            _take_gradients(moe.shared_experts, selection.shared_experts)
        if selection.experts.get(layer):
            become(moe.experts, TrainedExperts)
            moe.experts.start(selection.experts[layer])


def merge_experts(model: PreTrainedModel) -> None:
    """Makes `model` what loading its checkpoint would give: trained experts are experts again, all takes gradients.

    Under adapters that were put on meanwhile, these alone take gradients.
    """
    moe_layers(model)
    for module in model.modules():
        if isinstance(module, TrainedExperts):
            module.finish()
    if isinstance(model, DeepseekV2PreTrainedModel) and _has_no_adapters(model):
        _take_gradients(model, True)


def _take_gradients(module: nn.Module, wanted: bool) -> None:
    for parameter in module.parameters():
        # packed weights are integers
        if parameter.is_floating_point():
            parameter.requires_grad_(wanted)


def save_experts(model: PreTrainedModel, selection: ExpertSelection, folder: str | Path) -> None:
    """Writes what was trained, by its names in checkpoints, and expert_cfg.json: DeepSeek's ESFT adapters.

    `model` may be in training or merged; `load_experts` and DeepSeek's own code put it back on the model it came from.
    Raises ValueError for a folder that holds a checkpoint, and for a selection of other experts than are in training.
    """
    folder = Path(folder)
    if (folder / "config.json").exists():
        raise ValueError(f"expected a folder for the trained experts alone, got {folder}, which holds a checkpoint.")
    layers = _moe_layers(model)
    _check(selection, layers)
    _check_stored(layers)
    training = {i: {*moe.experts.trained} for i, moe in layers.items() if isinstance(moe.experts, TrainedExperts)}
    for layer in layers if training else ():
        trained, given = sorted(training.get(layer, [])), sorted(selection.experts.get(layer, []))
        if trained != given:
            raise ValueError(
                f"expected the selection that is in training, of layer {layer} experts {trained}, got {given}."
            )
    for part in ("shared_experts", "non_expert_modules"):
        of_part = ExpertSelection({}, **{part: True})
        named = [x for name, x in model.named_parameters() if _is_selected(name, of_part)]
        if training and getattr(selection, part) and named and not any(x.requires_grad for x in named):
            raise ValueError(f"expected the selection that is in training, and {part}, which it names, are frozen.")
    # DeepSeek's code asks for every layer
    selection = replace(selection, experts={layer: selection.experts.get(layer, []) for layer in layers})
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.clone() for name, tensor in _selected(model, selection).items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    selection.save(folder)


def load_experts(model: PreTrainedModel, folder: str | Path) -> ExpertSelection:
    """Puts what `save_experts` or DeepSeek's code wrote in place of the model's own weights.

    Raises ValueError, before anything is changed, where the files hold less or more than expert_cfg.json says, or
    other shapes than the model.
    """
    folder = Path(folder)
    if folder.is_file():
        raise ValueError(f"expected the folder that save_experts wrote, got the file {folder}.")
    selection, layers = ExpertSelection.load(folder), _moe_layers(model)
    _check(selection, layers)
    _check_stored(layers)
    for moe in layers.values():
        if isinstance(moe.experts, TrainedExperts):
            raise ValueError(f"expected experts to be replaced, and they are {moe.experts.state}.")
    places = _selected(model, selection)
    came = {}
    for file in sorted(folder.glob("*.safetensors")):
        # DeepSeek's code takes names from the head or from the backbone on
        try:
            tensors = load_file(file)
        except SafetensorError as error:
            raise ValueError(f"{file} is cut off or no safetensors file ({error}); copy it anew.") from error
        came |= {name if name in places else f"model.{name}": tensor for name, tensor in tensors.items()}
    problems = [f"{name} is missing" for name in sorted(places.keys() - came.keys())]
    problems += [f"{name} is one too many" for name in sorted(came.keys() - places.keys())]
    problems += [
        f"{name} has shape {list(came[name].shape)}, expected {list(place.shape)}"
        for name, place in places.items()
        if name in came and came[name].shape != place.shape
    ]
    if problems:
        raise ValueError(f"{folder} does not hold what its {FILE} selects: {'; '.join(problems[:8])}.")
    for name, place in places.items():
        place.copy_(came[name])
    return selection


def _selected(model: PreTrainedModel, selection: ExpertSelection) -> dict[str, Tensor]:
    """What `selection` names, by names in checkpoints, each a view of the model's own weight."""

    state = model.state_dict()
    found = {name: tensor for name, tensor in state.items() if _is_selected(name, selection)}
    prefix = "model." if hasattr(model, "model") else ""
    for layer, chosen in selection.experts.items():
        experts = f"{prefix}layers.{layer}.mlp.experts"
        for expert in chosen:
            gate, up = state[f"{experts}.gate_up_proj"][expert].chunk(2)
            parts = {"gate": gate, "up": up, "down": state[f"{experts}.down_proj"][expert]}
            found |= {f"{experts}.{expert}.{name}_proj.weight": part for name, part in parts.items()}
    return found


def _is_selected(name: str, selection: ExpertSelection) -> bool:
    """Whether this weight is one that `selection` names as a whole."""
    if ".mlp.experts." in name:
        return False
    return selection.shared_experts if ".mlp.shared_experts." in name else selection.non_expert_modules


def _moe_layers(model: PreTrainedModel) -> dict[int, DeepseekV2MoE]:
    if not isinstance(model, DeepseekV2PreTrainedModel):
        raise TypeError(f"expected a DeepSeek-V2 without adapters around it, got {type(model).__name__}.")
    if not _has_no_adapters(model):
        raise TypeError("expected a DeepSeek-V2 without adapters in it; merge these, or load the model without them.")
    return moe_layers(model)


def _has_no_adapters(model: nn.Module) -> bool:
    return not any(is_adapted(module) for module in model.modules())


def _check(selection: ExpertSelection, layers: dict[int, DeepseekV2MoE]) -> None:
    if not isinstance(selection, ExpertSelection):
        raise TypeError(
            f"expected an ExpertSelection, got {type(selection).__name__}; write ExpertSelection(experts), or load one "
            "with ExpertSelection.load(path)."
        )
    for layer, chosen in selection.experts.items():
        if layer not in layers:
            raise ValueError(f"expected layers with experts ({min(layers)} to {max(layers)}), got layer {layer}.")
        last = len(layers[layer].gate.weight) - 1
        if len({*chosen}) < len(chosen) or not all(0 <= expert <= last for expert in chosen):
            raise ValueError(f"expected different experts out of 0 to {last} in layer {layer}, got {[*chosen]}.")


def _check_stored(layers: dict[int, DeepseekV2MoE]) -> None:
    for moe in layers.values():
        if not isinstance(moe.experts, DeepseekV2Experts) or not moe.experts.down_proj.is_contiguous():
            raise ValueError(f"expected routed experts that hold their weights, and they are {state_of(moe.experts)}.")
