"""Converts LoRA adapters between separate layers per routed expert (transformers 4, vLLM, SGLang) and stacked experts.

Gate and up of an expert become one parameter: their As are concatenated, their Bs are on a diagonal, so the rank
doubles. In the other direction such a pair is cut again, and of any other pair gate and up get all of A and their half
of B. So an adapter that is converted there and back has the same bits again, and its config means the same.
"""

import json
import os
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file

from ..compat.adapter_clients import CLIENTS, dropped_targets, target_of
from ..json_files import read_json
from ..whole_files import save_tensors, save_text, whole_folder
from .adapter_config import CONFIG_FILE, AdapterConfig
from .adapter_targets import Form, changed_fields, settings_of
from .adapter_tensors import (
    PREFIX,
    find_experts,
    ranks_of,
    read_separate,
    read_stacked,
    separate_layers,
    stack_layers,
    write_separate,
    write_stacked,
)

WEIGHTS_FILE = "adapter_model.safetensors"


def convert_adapter(source: Path, out: Path) -> dict:
    """Writes an adapter with separate experts as one with stacked experts, or the other way. Returns a report.

    The product B A of every pair stays exactly the same, and so does its scaling; only with rsLoRA, a rank that doubles
    or halves changes the scaling by a rounding of float64. peft has no dropout for stacked weights, so it becomes 0.
    The report says which targets other than routed experts have no effect in which programs.

    Raises:
        ValueError: unless the source is a plain LoRA adapter whose routed experts are all separate or all stacked, and
            whose config and tensors agree about them; and if `out` exists.
    """
    config = AdapterConfig.load(source)
    if out.exists():
        raise ValueError(f"{out} exists; choose another folder.")
    try:
        tensors = load_file(source / WEIGHTS_FILE)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"expected {WEIGHTS_FILE} in {source}, got: {error}") from error
    found, is_separate = find_experts([*tensors])
    of_experts = {name: tensors.pop(name) for name in found}
    modules = {module.partition(".lora_")[0] for name in tensors if (module := name.removeprefix(PREFIX)) != name}
    others = sorted({module.replace(".base_layer", "") for module in modules})
    others += [weight for module in others if config.targets_parameter(weight := f"{module}.weight")]

    names = [*dict.fromkeys(parts[0] for parts in found.values())]
    e = 1 + max(int(parts[1]) for parts in found.values()) if is_separate else 0
    if e > len(found):
        raise ValueError(f"expected experts 0 to {e - 1} in {source}, got {len(found)} tensors of experts in all.")
    old = Form(is_separate, e)
    settings = settings_of(config, names, old)
    read = read_separate if is_separate else read_stacked
    layers = read(of_experts, found, settings)
    e = len(next(iter(layers[names[0]].values())).a)
    _check_number_of_experts(config, e)
    convert, write = (stack_layers, write_stacked) if is_separate else (separate_layers, write_separate)
    made = convert(layers)
    changes = changed_fields(config, settings, ranks_of(made), others, old, Form(not is_separate, e))
    tensors |= write(made)
    report = {"out": str(out), "experts": "stacked" if is_separate else "separate"}
    report |= {"experts_per_layer": e, "tensors": len(tensors)}
    for client, dropped in dropped_targets(map(target_of, others)).items():
        report[f"no_effect_in_{client}"] = f"{', '.join(dropped)}; {CLIENTS[client].advice}"
    if is_separate and config.lora_dropout:
        changes["lora_dropout"] = 0.0
        report["lora_dropout"] = f"{config.lora_dropout} before, 0 now, since peft has none for stacked weights"

    out.parent.mkdir(parents=True, exist_ok=True)
    with whole_folder(out) as folder:
        contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
        save_tensors(folder / WEIGHTS_FILE, contiguous, {"format": "pt"})
        save_text(folder / CONFIG_FILE, json.dumps(config.fields | changes, indent=2) + "\n")
    return report


def _check_number_of_experts(config: AdapterConfig, e: int) -> None:
    """Refuses another number of experts than that of the model, if its folder is here.

    Stacked tensors have experts times rank rows, so a wrong rank would pass for another number of experts.
    """
    base = config.fields.get("base_model_name_or_path")
    # unlike Path.is_file, this is also False for a name that is too long
    if not isinstance(base, str) or not base or not os.path.isfile(os.path.join(base, "config.json")):
        return
    expected = read_json(Path(base) / "config.json").get("n_routed_experts")
    if e != expected:
        raise ValueError(f"expected {expected} experts, as {base} has, got {e} by the ranks that the config names.")
