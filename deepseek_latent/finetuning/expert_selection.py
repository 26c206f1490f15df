"""Which experts to train on a text: scores by how much the text uses each, and the selection as a file.

Source: "Let the Expert Stick to His Last" (arXiv:2407.01906); the file as in github.com/deepseek-ai/ESFT.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import index
from pathlib import Path
from textwrap import shorten

from ..json_files import read_json
from ..whole_files import save_text, whole_file
from .activity import Activity

CONFIG_FILE = "expert_cfg.json"
# the paper's thresholds, by the score of `expert_scores`
THRESHOLDS = {"token": 0.2, "gate": 0.1}


@dataclass(frozen=True)
class ExpertSelection:
    """What ESFT trains: experts by layer, and optionally the shared experts and everything that is not an expert.

    `non_expert_modules` are attention, norms, embeddings, head, dense MLPs and routers.
    """

    experts: Mapping[int, Sequence[int]]
    shared_experts: bool = False
    non_expert_modules: bool = False

    def __post_init__(self):
        try:
            experts = {_layer(layer): [*map(_number, chosen)] for layer, chosen in self.experts.items()}
            is_valid = len(experts) == len(self.experts)
        except (AttributeError, TypeError, ValueError):
            is_valid = False
        if not is_valid:
            raise ValueError(f"expected experts by layer, {{layer: [numbers]}}, got {self.experts!r:.200}.")
        for name in ("shared_experts", "non_expert_modules"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"expected true or false as {name}, got {getattr(self, name)!r:.80}.")
        object.__setattr__(self, "experts", experts)

    @classmethod
    def load(cls, path: str | Path) -> "ExpertSelection":
        """Reads an expert_cfg.json, or the one in the folder `path`. Raises ValueError if there is no valid one."""
        path = Path(path)
        path = path / CONFIG_FILE if path.is_dir() else path
        if not path.is_file():
            raise ValueError(
                f"expected {path}, as save_experts or ExpertSelection.save writes it, and it is not there; checkpoints "
                "load with from_pretrained, adapters of peft with PeftModel.from_pretrained."
            )
        try:
            given = read_json(path)
            flags = (given.get(name, False) for name in ("shared_experts", "non_expert_modules"))
            return cls(given["experts"], *flags)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f'expected {{"experts": {{layer: [ids]}}, "shared_experts": .., "non_expert_modules": ..}} in {path}, '
                f"got something else ({type(error).__name__}: {shorten(str(error), 400, placeholder=' ...')})."
            ) from error

    def save(self, path: str | Path) -> None:
        """Writes an expert_cfg.json that DeepSeek's own code reads, into the folder `path` or under that name."""
        path = Path(path)
        path = path / CONFIG_FILE if path.is_dir() else path
        given = {"experts": {str(layer): [*chosen] for layer, chosen in self.experts.items()}}
        given |= {"shared_experts": self.shared_experts, "non_expert_modules": self.non_expert_modules}
        with whole_file(path) as place:
            save_text(place, json.dumps(given) + "\n")


def _layer(layer: object) -> int:
    # JSON has layers as text
    return int(layer) if isinstance(layer, str) and str(int(layer)) == layer else _number(layer)


def _number(value: object) -> int:
    """A whole number, also one of torch's or numpy's own types."""
    if isinstance(value, bool):
        raise TypeError("expected a number, got true or false")
    return index(value)


def expert_scores(activity: Activity, by: str = "token") -> dict[int, list[float]]:
    """How much a text uses each expert, by layer, from `activity_of(model, ids)`.

    "token" scores by the share of choices, which adds up to 1; "gate" by the mean gate value. Source: paper 3.2.
    """
    if by not in ("token", "gate"):
        raise ValueError(f"experts are scored by 'token' or by 'gate', got {by!r}.")
    return dict(zip(activity.layers, (activity.shares if by == "token" else activity.gates).tolist()))


def select_experts(scores: Mapping[int, Sequence[float]], threshold: float) -> dict[int, list[int]]:
    """The best experts of each layer, best first, until their scores add up to `threshold`.

    `THRESHOLDS` has the thresholds of the paper. Source: paper 3.3.
    """
    if not isinstance(scores, Mapping):
        raise TypeError(f"expected scores by layer, from expert_scores(activity), got {type(scores).__name__}.")
    if not 0 < threshold <= 1:
        raise ValueError(f"threshold must be above 0 and at most 1, got {threshold}.")
    chosen: dict[int, list[int]] = {}
    for layer, scores_of_layer in scores.items():
        chosen[layer], total = [], 0.0
        # among equal scores, the expert with the lower number comes first
        for expert in sorted(range(len(scores_of_layer)), key=lambda expert: -scores_of_layer[expert]):
            if total >= threshold:
                break
            chosen[layer].append(expert)
            total += scores_of_layer[expert]
    return chosen
