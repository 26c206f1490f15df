"""Loads a language model for a command, which runs only if the files hold exactly that model."""

from pathlib import Path

from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, PreTrainedModel

from ..configuration_deepseek_v2 import DeepseekV2Config
from ..json_files import read_json
from .checkpoint import (
    StoredTensor,
    check_readable,
    checkpoint_tensors,
    config_from_json,
    has_weights,
)


def load_model(place: Path | str, model_class: type = AutoModelForCausalLM, **options) -> PreTrainedModel:
    """The model in a folder or of a hub id, in eval mode. No code of the checkpoint is run, and no pickle read.

    Raises ValueError if weights are unreadable, missing, unexpected or of another shape. transformers initializes
    missing weights at random, drops unexpected ones, and reports both only in its log.
    """
    if isinstance(place, Path) and has_weights(place):
        _refuse(place, _other_sizes(place, check_readable(place)))
    try:
        # sizes are judged below, where the message is one sentence
        model, found = model_class.from_pretrained(
            place,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            **options,
        )
    except SafetensorError as error:
        raise ValueError(
            f"expected readable weights in {place}, got: {error}; deepseek-latent inspect names the file."
        ) from error
    problems = [f"{name} is missing" for name in sorted(found["missing_keys"])]
    problems += [f"{name} is unexpected" for name in sorted(found["unexpected_keys"])]
    problems += [
        f"{name} has shape {list(in_file)}, expected {list(in_model)}"
        for name, in_file, in_model in sorted(found["mismatched_keys"])
    ]
    _refuse(place, problems)
    return model.eval()


def _other_sizes(folder: Path, stored: dict[str, StoredTensor]) -> list[str]:
    """The tensors whose shape in the headers is not that of the config, found before a model of these sizes is made."""
    given = read_json(folder / "config.json")
    if given.get("model_type") != DeepseekV2Config.model_type or given.get("quantization_config"):
        return []
    expected = checkpoint_tensors(config_from_json(given, folder))
    return [
        f"{name} has shape {list(tensor.shape)}, expected {list(expected[name])}"
        for name, tensor in stored.items()
        if name in expected and tensor.shape != expected[name]
    ]


def _refuse(place: Path | str, problems: list[str]) -> None:
    if problems:
        more = f", and {len(problems) - 1:,} more" if len(problems) > 1 else ""
        raise ValueError(
            f"the files of {place} do not fit its config.json: {problems[0]}{more}; correct the config or complete the "
            "files (deepseek-latent inspect lists all)."
        )
