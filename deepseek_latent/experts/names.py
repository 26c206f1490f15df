"""The names of routed experts: files hold one matrix per expert and projection, the model two stacked weights.

Letters: e routed experts, d model width, f width of one expert.
"""

import re

from torch import Tensor
from transformers.configuration_utils import PreTrainedConfig

from ..compat.transformers import CheckedConverter, convert_files_of, failed_in_quantizer, reason_of

# gate_up_proj [e 2f d] holds the rows of gate_proj before those of up_proj; down_proj is [e d f]
PROJECTIONS = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
STACKED = tuple(PROJECTIONS)
MAX_PROBLEMS = 20  # in one error message
# the stacked weights as peft's `target_parameters` name them
ROUTED_EXPERTS = tuple(f"experts.{name}" for name in STACKED)
_STACKED_WEIGHT = re.compile(rf"(?P<experts>.*\.mlp\.experts)\.(?P<name>{'|'.join(STACKED)})")
_WEIGHT_OF_EXPERT = re.compile(r"(?P<expert>\d+)\.(?P<projection>gate|up|down)_proj\.weight")


def name_of_expert(expert: int, projection: str) -> str:
    """The name in files of one matrix of an expert, relative to the layer's experts."""
    return f"{expert}.{projection}.weight"


def parse_name_of_expert(name: str) -> tuple[int, str] | None:
    """The inverse of `name_of_expert`: the expert and the projection, or None for any other name."""
    found = _WEIGHT_OF_EXPERT.fullmatch(name)
    return None if found is None else (int(found["expert"]), f"{found['projection']}_proj")


def stacked_name(projection: str) -> str:
    """The stacked weight that holds a projection."""
    return next(name for name, projections in PROJECTIONS.items() if projection in projections)


def split_projections(name: str, weight: Tensor) -> dict[str, Tensor]:
    """The projections inside the stacked weight `name`, of all experts [e out in] or of one [out in], as views."""
    projections = PROJECTIONS[name]
    return dict(zip(projections, weight.chunk(len(projections), dim=-2)))


def shapes_in_files(name: str, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    """The names and shapes of the tensors in files that hold the model's parameter `name` of this shape."""
    stacked = _STACKED_WEIGHT.fullmatch(name)
    if stacked is None:
        return {name: shape}
    projections, (e, rows, columns) = PROJECTIONS[stacked["name"]], shape
    shape_of_one = rows // len(projections), columns
    return {
        f"{stacked['experts']}.{name_of_expert(expert, projection)}": shape_of_one
        for expert in range(e)
        for projection in projections
    }


def pattern_in_files(name: str) -> str:
    """The name in files of the model's parameter `name`; for stacked experts, a pattern of all their names."""
    stacked = _STACKED_WEIGHT.fullmatch(name)
    if stacked is None:
        return name
    projections = ",".join(projection.removesuffix("_proj") for projection in PROJECTIONS[stacked["name"]])
    projections = f"{{{projections}}}" if "," in projections else projections
    return f"{stacked['experts']}.*.{projections}_proj.weight"


class ExpertConverter(CheckedConverter):
    """Stacks a layer's experts as transformers does, after checking that the files number them from 0 to e - 1.

    transformers counts the experts and does not read their numbers. It would put expert 12 of a file with the experts
    0 to 10 and 12 in the place of expert 11, and would name only the layer where an expert is missing.
    """

    __slots__ = ()

    def check_names(self, names_in_files: set[str], patterns: list[str], config: PreTrainedConfig) -> None:
        prefix, experts = min(names_in_files).partition("mlp.experts.")[0], range(config.n_routed_experts)
        expected = set()
        for pattern in patterns:
            of_all_experts = {prefix + pattern.replace("*", str(expert)) for expert in experts}
            # quantizers add patterns of every kind of scale they know, and a file may have none of that kind
            if pattern.endswith(".weight") or names_in_files & of_all_experts:
                expected |= of_all_experts
        problems = [f"{name} is missing" for name in sorted(expected - names_in_files)]
        problems += [f"{name} is unexpected" for name in sorted(names_in_files - expected)]
        if problems:
            raise incomplete_backbone(problems)


def missing_in_files(name: str, failed_conversion: str | None) -> str:
    """A message that a parameter is missing, or why it could not be made of the tensors in files."""
    if failed_conversion is None:
        return f"{pattern_in_files(name)} is missing"
    done = "stacked" if _STACKED_WEIGHT.fullmatch(name) else "converted"
    return f"{pattern_in_files(name)} cannot be {done} ({reason_of(failed_conversion)})"


def failure_of_quantizer(errors: dict[str, str]) -> ValueError | None:
    """The error for weights that are in the files and could not be quantized, if `errors` of conversions has any."""
    names = sorted(name for name, error in errors.items() if failed_in_quantizer(error))
    if not names:
        return None
    more = f" and {len(names) - 1:,} more" if len(names) > 1 else ""
    return ValueError(
        f"the quantizer could not convert {names[0]}{more}: {reason_of(errors[names[0]])}. The checkpoint holds these "
        "weights; install what the quantizer needs, or choose another quantization_config."
    )


def incomplete_backbone(problems: list[str]) -> ValueError:
    # a wrong number of layers would make thousands
    shown = problems[:MAX_PROBLEMS]
    more = f"; and {len(problems) - len(shown):,} more" if len(problems) > len(shown) else ""
    return ValueError(
        f"the checkpoint does not hold this model's backbone: {'; '.join(shown)}{more}. "
        "Complete or convert the checkpoint, or correct its config.json; nothing was initialized in their place."
    )


def register_expert_files(model_class: type) -> None:
    """Has transformers stack and split the experts of `model_class` as it does those of its own class."""
    convert_files_of(model_class, ExpertConverter, like="deepseek_v2")
