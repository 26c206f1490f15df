"""How routed experts stand in files, one tensor each, and in the model, all of a layer in one."""

from transformers.configuration_utils import PreTrainedConfig

from ..compat.transformers import CheckedConverter, convert_files_of, reason_of

# as `target_parameters` of peft name the two stacked weights
ROUTED_EXPERTS = ("experts.gate_up_proj", "experts.down_proj")


class ExpertConverter(CheckedConverter):
    """Stacks a layer's experts as transformers does, once their names in the file are known to be 0 .. e-1.

    transformers counts experts but never reads their numbers, so a file with experts 0-10 and 12 would fill the place
    of expert 11 with expert 12, and of one that is missing only the layer would be named.
    """

    __slots__ = ()

    def check_names(self, came: set[str], patterns: list[str], config: PreTrainedConfig) -> None:
        prefix, experts = min(came).partition("mlp.experts.")[0], range(config.n_routed_experts)
        wanted = set()
        for pattern in patterns:
            of_all = {prefix + pattern.replace("*", str(expert)) for expert in experts}
            # quantizers add patterns of scales for all that they know, of which files may have none
            if pattern.endswith(".weight") or came & of_all:
                wanted |= of_all
        problems = [f"{name} is missing" for name in sorted(wanted - came)]
        problems += [f"{name} is one too many" for name in sorted(came - wanted)]
        if problems:
            raise incomplete_backbone(problems)


def in_files(name: str) -> str:
    """What the model's parameter `name` is called in files; for stacked experts, the pattern of all their names."""
    name = name.replace("mlp.experts.gate_up_proj", "mlp.experts.*.{gate,up}_proj.weight")
    return name.replace("mlp.experts.down_proj", "mlp.experts.*.down_proj.weight")


def missing_in_files(name: str, failed_conversion: str | None) -> str:
    """Says that a parameter is missing, or why its experts could not be stacked."""
    if failed_conversion is None:
        return f"{in_files(name)} is missing"
    return f"{in_files(name)} cannot be merged ({reason_of(failed_conversion)})"


def incomplete_backbone(problems: list[str]) -> ValueError:
    return ValueError(
        f"the checkpoint does not hold this model's backbone: {'; '.join(problems)}. "
        "Complete or convert the checkpoint, or correct its config.json; nothing was initialised in their place."
    )


def register_expert_files(model_class: type) -> None:
    """Has transformers stack and split the experts of `model_class` as it does those of its own."""
    convert_files_of(model_class, ExpertConverter, like="deepseek_v2")
