"""Adapters and folders of trained experts: made by peft and converted there and back, and damaged in many ways."""

import json
import re
import tempfile
import warnings
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from random import Random

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor, nn

from deepseek_latent import ExpertSelection, load_experts, lora_config, save_experts
from deepseek_latent.commands.__main__ import main
from deepseek_latent.conversion.adapter import convert_adapter
from tests.conversion.separate_experts import SeparateExperts, deltas
from tests.support import tiny_model

from .adapter_configs import MLP, separate_config, stacked_config
from .campaign import Campaign, is_refusal
from .damage import damage_json, damage_tensors

TINY = {
    "vocab_size": 24,
    "hidden_size": 16,
    "num_attention_heads": 2,
    "q_lora_rank": 12,
    "kv_lora_rank": 20,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 6,
    "intermediate_size": 28,
    "moe_intermediate_size": 24,
    "n_shared_experts": 1,
    "num_experts_per_tok": 1,
    "topk_method": "greedy",
    "n_group": 1,
    "topk_group": 1,
}
IDS = torch.tensor([[3, 9, 4, 17, 5, 2, 11]])
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def run(campaign: Campaign) -> None:
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as whole:
        damage = Damage(Path(whole))
        kinds = [stacked_there_and_back, separate_there_and_back]
        kinds += [damage.convert] * 6 + [damage.attach] + [damage.load_experts] * 6
        for random in campaign.cases():
            kind = random.choice(kinds)
            campaign.count(kind.__name__.replace("_", " "))
            with tempfile.TemporaryDirectory() as folder:
                kind(campaign, random, Path(folder))


def tiny(e: int = 4, dtype: torch.dtype = torch.float32) -> nn.Module:
    return tiny_model(dtype, **TINY, n_routed_experts=e)


# ---- There and back --------------------------------------------------------------------------------------------------


def stacked_there_and_back(campaign: Campaign, random: Random, folder: Path) -> None:
    e, dtype = random.choice([1, 2, 3, 4]), random.choice([torch.float32, torch.bfloat16])
    models = (lambda: tiny(e, dtype), lambda: SeparateExperts(tiny(e, dtype)))
    there_and_back(campaign, random, folder, stacked_config(random), *models)


def separate_there_and_back(campaign: Campaign, random: Random, folder: Path) -> None:
    e, dtype = random.choice([1, 2, 3, 4]), random.choice([torch.float32, torch.bfloat16])
    models = (lambda: SeparateExperts(tiny(e, dtype)), lambda: tiny(e, dtype))
    there_and_back(campaign, random, folder, separate_config(random), *models)


def there_and_back(
    campaign: Campaign, random: Random, folder: Path, config: LoraConfig, given_model: Callable, other_model: Callable
) -> None:
    try:
        save_adapter(given_model(), config, random, folder / "given")
        PeftModel.from_pretrained(given_model(), folder / "given")
    except (ValueError, TypeError) as error:
        # some of these options contradict each other
        return campaign.count(f"not made by peft ({type(error).__name__})")
    shown = {name: x for name, x in config.to_dict().items() if x}
    for source, out in (("given", "other"), ("other", "again")):
        try:
            convert_adapter(folder / source, folder / out)
        except Exception as error:
            kind = "wrong answer" if is_refusal(error, (ValueError,)) else "raw exception"
            return campaign.finding(kind, f"the {source} adapter is not converted: {error!r:.300}: {shown}")
    if problem := difference(folder, given_model, other_model):
        return campaign.finding("wrong answer", f"{problem}: {shown}")
    return campaign.count("the same again")


@torch.no_grad()
def difference(folder: Path, given_model: Callable, other_model: Callable) -> str | None:
    """What is not the same in the adapter that was converted there and back, or in the one between."""
    given, again = (load_file(folder / name / WEIGHTS) for name in ("given", "again"))
    if given.keys() != again.keys() or not all(same_bits(given[name], again[name]) for name in given):
        return "other tensors"
    before, between, after = (
        PeftModel.from_pretrained(model(), folder / name).eval()
        for model, name in ((given_model, "given"), (other_model, "other"), (given_model, "again"))
    )
    expected = deltas(before)
    for model, name in ((between, "other"), (after, "again")):
        state, file = (
            # peft also saves the weights of embeddings, by how they are named
            {key for key in names if not key.endswith("base_layer.weight")}
            for names in (get_peft_model_state_dict(model), load_file(folder / name / WEIGHTS))
        )
        if state != file:
            return f"{name} targets something else than it holds: {sorted(state ^ file)[:3]}"
        found = deltas(model)
        if expected.keys() != found.keys():
            return f"{name} acts on other weights: {sorted(expected.keys() ^ found.keys())[:3]}"
        for place, delta in expected.items():
            if not torch.allclose(found[place], delta, rtol=1e-13, atol=1e-13 * delta.abs().max().item()):
                return f"{name} adds something else to {place}"
    is_callable = not any("experts.0" in name for name, _ in before.named_modules())
    if is_callable and not torch.equal(before(input_ids=IDS).logits, after(input_ids=IDS).logits):
        return "other logits"
    return None


def same_bits(x: Tensor, y: Tensor) -> bool:
    return (
        x.dtype == y.dtype
        and x.shape == y.shape
        and torch.equal(x.reshape(-1).view(torch.uint8), y.reshape(-1).view(torch.uint8))
    )


def save_adapter(model: nn.Module, config: LoraConfig, random: Random, folder: Path) -> None:
    """Saves an adapter with lopsided random factors, sometimes zero, block-diagonal or shared by gate and up."""
    model = get_peft_model(model, config, autocast_adapter_dtype=random.random() < 0.5)
    generator = torch.Generator().manual_seed(random.randrange(2**32))
    is_zero, is_shared, is_diagonal = (random.random() < 0.15 for _ in range(3))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                slope = torch.linspace(0.5, 1.5, parameter.shape[0]).view(-1, *[1] * (parameter.dim() - 1))
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * slope * 0.3)
            if is_zero and ".lora_B" in name:
                parameter.zero_()
        for layer in model.modules():
            if is_diagonal and getattr(layer, "parameter_name", None) == "gate_up_proj":
                b = layer.lora_B["default"].weight.unflatten(1, (-1, layer.num_experts))
                rows, columns = b.shape[0] // 2, b.shape[1] // 2
                b[:rows, columns:], b[rows:, :columns] = 0, 0
            gate, up = (layer[x] if isinstance(layer, nn.ModuleDict) and x in layer else None for x in MLP[:2])
            if is_shared and hasattr(gate, "lora_A") and hasattr(up, "lora_A"):
                up.lora_A["default"].weight.copy_(gate.lora_A["default"].weight)
    model.save_pretrained(folder)


# ---- Damage ----------------------------------------------------------------------------------------------------------


class Damage:
    """Whole adapters and trained experts, and what is done with damaged copies of them."""

    def __init__(self, folder: Path):
        self.model = tiny()
        self.state = {name: x.clone() for name, x in self.model.state_dict().items()}
        self.logits = self.model(IDS).logits
        self.model.config.save_pretrained(folder)
        random = Random(0)
        config = lora_config(tiny(), r=4, routed_experts=True, lora_alpha=7)
        save_adapter(tiny(), config, random, folder / "stacked")
        config = LoraConfig(r=2, lora_alpha=3, target_modules=["o_proj", *MLP])
        save_adapter(SeparateExperts(tiny()), config, random, folder / "separate")
        selection = ExpertSelection({1: [2, 0], 2: [3]}, shared_experts=True)
        save_experts(self.model, selection, folder / "experts")
        self.adapters = []
        for name in ("stacked", "separate"):
            config = json.loads((folder / name / CONFIG).read_text()) | {"base_model_name_or_path": str(folder)}
            self.adapters.append((config, load_file(folder / name / WEIGHTS)))
        self.experts = load_file(folder / "experts" / "model.safetensors")
        self.selection = json.loads((folder / "experts" / "expert_cfg.json").read_text())

    def adapter(self, random: Random, folder: Path) -> None:
        """Writes a damaged adapter."""
        folder.mkdir()
        config, tensors = random.choice(self.adapters)
        what = random.choice(["config", "config", "tensors", "tensors", "both"])
        damage_json(config, random, folder / CONFIG, times=what != "tensors")
        damage_tensors(tensors, random, folder / WEIGHTS, times=what != "config")

    def convert(self, campaign: Campaign, random: Random, folder: Path) -> None:
        self.adapter(random, folder / "given")
        output = StringIO()
        with campaign.judged("convert adapter"), redirect_stdout(output), redirect_stderr(output):
            code = main(["convert", "adapter", str(folder / "given"), str(folder / "out")])
            if code:
                lines = output.getvalue().strip().splitlines()
                campaign.count("refused by the command")
                if code != 2 or len(lines) != 1 or not 10 < len(lines[0]) < 1200:
                    campaign.finding("raw exception", f"exit code {code} and {lines[-3:]}")
                if [file.name for file in folder.iterdir()] != ["given"]:
                    campaign.finding("half output", f"{[file.name for file in folder.iterdir()]} after a refusal")
                return
            convert_adapter(folder / "out", folder / "again")
            given, again = (load_file(folder / name / WEIGHTS) for name in ("given", "again"))
            if given.keys() != again.keys() or not all(same_bits(given[name], again[name]) for name in given):
                campaign.finding("wrong answer", "a damaged adapter is not the same after there and back")
            names = " ".join([*given, *load_file(folder / "out" / WEIGHTS)])
            if {*re.findall(r"\.mlp\.experts\.(\d+)\.", names)} != {"0", "1", "2", "3"}:
                campaign.finding("wrong answer", "another number of experts than the model has")

    def attach(self, campaign: Campaign, random: Random, folder: Path) -> None:
        self.adapter(random, folder / "given")
        model = tiny()
        try:
            PeftModel.from_pretrained(model, folder / "given")
            campaign.count("attached")
        except Exception as error:
            # most refusals are peft's own
            ours = is_refusal(error, (ValueError, TypeError, OSError))
            campaign.count("refused" if ours else "refused by peft")
            # peft changes the model's own weights for this variant, before anything is read
            is_kasa = '"kasa_config": {' in (folder / "given" / CONFIG).read_text()
            if ours and not is_kasa and not torch.equal(model.eval()(IDS).logits, self.logits):
                campaign.finding("wrong answer", f"an adapter was refused and acts: {error!r:.300}")

    def load_experts(self, campaign: Campaign, random: Random, folder: Path) -> None:
        what = random.choice(["selection", "tensors", "both"])
        damage_json(self.selection, random, folder / "expert_cfg.json", times=what != "tensors")
        file = folder / random.choice(["model.safetensors"] * 9 + ["model-00001.safetensors"])
        damage_tensors(self.experts, random, file, times=what != "selection")
        if random.random() < 0.05:
            damage_tensors(self.experts, random, folder / "more.safetensors", times=1)
        expected = dict(self.state)
        with campaign.judged("load_experts"):
            load_experts(self.model, folder)
            expected = None
        state = self.model.state_dict()
        if expected is not None and not all(same_bits(x, expected[name]) for name, x in state.items()):
            campaign.finding("wrong answer", "the model changed although load_experts refused the folder")
        if expected is None and not all(x.isfinite().all() for x in state.values()):
            campaign.finding("wrong answer", "load_experts put numbers into the model that are not finite")
        self.model.load_state_dict(self.state)
