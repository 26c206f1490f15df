"""What this package adds to the model card that peft (0.20 and 0.21) writes beside an adapter for its own models."""

import functools
import os
import re
from importlib import import_module

from huggingface_hub import ModelCard
from torch import nn

from .adapter_clients import APPLIED_EVERYWHERE, CLIENTS, dropped_targets, target_of, targets_that_need_options
from .peft import adapted_layers, is_lora_parameter

_HEADING = "## Where this adapter acts"
# up to the next heading
_SECTION = re.compile(rf"^{_HEADING}$.*?(?=^#|\Z)", re.MULTILINE | re.DOTALL)
_HOW_TO_MERGE = """\
A merged adapter is a checkpoint, which acts everywhere as trained: where deepseek_latent is imported, load the adapter
with peft and call `model.merge_and_unload().save_pretrained("merged")`."""


def describe_targets(model_class: type) -> None:
    """Has peft write into the card of a LoRA adapter for these models in which programs it acts as trained.

    Other programs drop or rename some targets and report no error (see `adapter_clients`).
    """
    peft_model = import_module("peft").PeftModel
    write = peft_model.create_or_update_model_card
    if hasattr(write, "describes_targets"):
        return

    @functools.wraps(write)
    def write_and_describe(self, output_dir, *args, **kwargs):
        write(self, output_dir, *args, **kwargs)
        targets = _lora_targets(self) if isinstance(self.get_base_model(), model_class) else set()
        if targets:
            _describe(targets, os.path.join(output_dir, "README.md"))

    write_and_describe.describes_targets = True
    peft_model.create_or_update_model_card = write_and_describe


def _lora_targets(model: nn.Module) -> set[str]:
    """The targets of all LoRA adapters on a model, as other programs know them."""
    names = set()
    for name, layer in adapted_layers(model):
        if hasattr(layer, "lora_A"):
            # the wrappers of two parameters of one module are nested
            place = name.replace(".base_layer", "")
            names.add(f"{place}.{layer.parameter_name}" if is_lora_parameter(layer) else place)
    return {target_of(name) for name in names}


def _describe(targets: set[str], path: str) -> None:
    """Writes the section into the card at `path`, before its other sections or in place of an earlier one."""
    card = ModelCard.load(path)
    without = _SECTION.sub("", card.text)
    before, heading, after = without.partition("\n## ")
    card.text = f"{before.rstrip()}\n\n{_section(targets)}{heading}{after}"
    card.save(path)


def _section(targets: set[str]) -> str:
    def listed(names):
        return ", ".join(f"`{name}`" for name in sorted(names))

    dropped = dropped_targets(targets)
    rows = [f"| {CLIENTS[name].name} | {listed(names)} | {CLIENTS[name].advice} |" for name, names in dropped.items()]
    for name, names in targets_that_need_options(targets).items():
        rows.append(f"| {CLIENTS[name].name}, without options for them | {listed(names)} | {CLIENTS[name].options} |")
    lines = [_HEADING, "", f"It was trained with the Python package deepseek_latent, on {listed(targets)}."]
    if rows:
        lines[-1] += " Some programs leave some of these out, mostly without an error, and then compute something else:"
        lines += ["", "| program | without effect or refused | what to do |", "|---|---|---|", *rows, "", _HOW_TO_MERGE]
    elif targets <= APPLIED_EVERYWHERE:
        programs = ", ".join(client.name for client in CLIENTS.values())
        lines[-1] += f" Plain LoRA on these targets acts in {programs} as well."
    return "\n".join([*lines, ""])
