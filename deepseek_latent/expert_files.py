"""How routed experts stand in files, one tensor each, and in the model, all of a layer in one."""

from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.core_model_loading import WeightConverter


class ExpertConverter(WeightConverter):
    """Stacks a layer's experts as transformers does, once their names in the file are known to be 0 .. e-1.

    transformers counts experts but never reads their numbers, so a file with experts 0-10 and 12 would fill the place
    of expert 11 with expert 12, and of one that is missing only the layer would be named.
    """

    __slots__ = ()

    def convert(self, layer_name, model=None, config=None, hf_quantizer=None, loading_info=None):
        # None while saving, when one tensor is split and there is nothing to check
        if loading_info is not None:
            self._refuse_gaps(config.n_routed_experts)
        return super().convert(layer_name, model, config, hf_quantizer, loading_info)

    def _refuse_gaps(self, num_experts: int) -> None:
        came = {name for names in self.layer_targets.values() for name in names}
        prefix = min(came).partition("mlp.experts.")[0]
        wanted = {prefix + p.replace("*", str(e)) for p in self.source_patterns for e in range(num_experts)}
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
    # transformers keeps a traceback and adds a line; what torch said is the line before
    reason = failed_conversion.rpartition("\nError: ")[0].rpartition("\n")[2]
    return f"{in_files(name)} cannot be merged ({reason})"


def incomplete_backbone(problems: list[str]) -> ValueError:
    return ValueError(
        f"the checkpoint does not hold this model's backbone: {'; '.join(problems)}. "
        "Complete or convert the checkpoint, or correct its config.json; nothing was initialised in their place."
    )


def register_expert_files(model_class: type) -> None:
    """Has transformers stack and split the experts of `model_class`.

    It knows how for this model type but leaves classes from outside alone, which would keep initial values.
    """
    converters = [
        ExpertConverter(known._original_source_patterns, known._original_target_patterns, operations=known.operations)
        for known in get_checkpoint_conversion_mapping("deepseek_v2")
    ]
    register_checkpoint_conversion_mapping(model_class.__name__, converters, overwrite=True)
