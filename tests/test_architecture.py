"""The import arrows of the package, and that importing it changes nothing of anybody else's."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "deepseek_latent"
# what others than this package may change, which everyone may ask
COMPAT = {"compat_accelerate", "compat_cache_name", "compat_peft", "compat_torch", "compat_transformers"}
# who may import whom inside the package, and all of them COMPAT; folders count as one
ARROWS = {
    "compat_accelerate": {"compat_torch"},
    "compat_cache_name": set(),
    "compat_peft": {"compat_accelerate"},
    "compat_torch": set(),
    "compat_transformers": {"compat_cache_name", "compat_torch"},
    "read_linear": {"hooks"},
    "__init__": {
        "configuration_deepseek_v2",
        "latent_cache",
        "lora",
        "modeling_deepseek_v2",
        "moe",
        "prompt_cache",
        "tested_versions",
    },
    "tested_versions": set(),
    "lora": {"configuration_deepseek_v2"},
    "modeling_deepseek_v2": {
        "balance",
        "configuration_deepseek_v2",
        "expert_files",
        "generation",
        "input_checks",
        "latent_attention",
        "latent_cache",
        "moe",
        "paged_latents",
        "rotary",
    },
    "latent_attention": {
        "configuration_deepseek_v2",
        "input_checks",
        "latent_cache",
        "latent_format",
        "latent_ops",
        "paged_latents",
        "read_linear",
        "rotary",
    },
    "generation": {"input_checks", "latent_cache", "latent_format", "paged_latents"},
    "input_checks": {"configuration_deepseek_v2"},
    "moe": {"balance", "configuration_deepseek_v2", "expert_lora", "expert_products", "hooks"},
    "expert_lora": {"expert_products", "hooks"},
    "expert_products": set(),
    "hooks": set(),
    "balance": {"configuration_deepseek_v2"},
    "rotary": {"configuration_deepseek_v2"},
    "latent_ops": {"latent_format"},
    "latent_cache": {"cache_files", "input_checks", "latent_cache_layer", "latent_format", "static_latent_layer"},
    "static_latent_layer": {"input_checks", "latent_cache_layer", "latent_format"},
    "latent_cache_layer": {"input_checks", "latent_format"},
    "latent_format": set(),
    "paged_latents": set(),
    "cache_files": set(),
    "configuration_deepseek_v2": {"configuration_checks", "rope_parameters"},
    "configuration_checks": {"rope_parameters"},
    "expert_files": set(),
    "rope_parameters": set(),
    "conversion": {"configuration_deepseek_v2", "lora", "modeling_deepseek_v2"},
    "cli": {
        "__init__",
        "configuration_deepseek_v2",
        "modeling_deepseek_v2",
        "latent_cache",
        "latent_format",
        "conversion",
        "expert_activity",
        "tool_runner",
    },
    "expert_activity": {"conversion", "esft", "router_statistics"},
    "packed_experts": {"expert_products", "hooks", "modeling_deepseek_v2", "moe"},
    "esft": {"modeling_deepseek_v2", "moe", "router_statistics", "trained_experts"},
    "trained_experts": {"expert_products", "moe"},
    "router_statistics": {"balance", "modeling_deepseek_v2"},
    "kernels": {
        "balance",
        "generation",
        "hooks",
        "latent_attention",
        "latent_cache",
        "latent_format",
        "latent_ops",
        "modeling_deepseek_v2",
        "moe",
    },
    "tool_runner": set(),
    "prompt_cache": {"cache_files", "input_checks", "latent_cache", "latent_format"},
}
AT_HOME = {
    "__init__",
    "cli",
    "conversion",
    "esft",
    "expert_activity",
    "kernels",
    "lora",
    "packed_experts",
    "prompt_cache",
    "router_statistics",
    "tested_versions",
    "tool_runner",
    "trained_experts",
}
TRAVELLING = sorted(set(ARROWS) - AT_HOME)


def imports_of(path: Path) -> tuple[set[str], set[str]]:
    """Names inside the package and top-level packages outside it that a file imports."""
    inside, outside = set(), set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [(alias.name, 0) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [(node.module or "", node.level)]
        else:
            continue
        for name, level in names:
            parts = name.split(".")
            if level == 0 and parts[0] != "deepseek_latent":
                outside.add(parts[0])
                continue
            if level == 0:
                parts = parts[1:]
            elif level == 1 and path.parent != PACKAGE:
                continue  # a sibling in the same folder
            inside.add(parts[0] if parts and parts[0] else "__init__")
    return inside, outside


def rooms() -> dict[str, list[Path]]:
    found = {}
    for path in PACKAGE.rglob("*.py"):
        inner = path.relative_to(PACKAGE)
        found.setdefault(inner.parts[0] if len(inner.parts) > 1 else inner.stem, []).append(path)
    return found


def test_every_room_of_the_package_is_in_the_table():
    assert rooms().keys() == ARROWS.keys()


@pytest.mark.parametrize("room", ARROWS)
def test_imports_follow_the_arrows(room):
    came = set().union(*(imports_of(path)[0] for path in rooms()[room]))
    assert came <= ARROWS[room] | (set() if room in COMPAT else COMPAT)


@pytest.mark.parametrize("name", TRAVELLING)
def test_travelling_files_need_only_torch_transformers_and_what_these_bring(name):
    _, outside = imports_of(PACKAGE / f"{name}.py")
    # transformers itself does not import without the last two
    assert outside - set(sys.stdlib_module_names) <= {"torch", "transformers", "huggingface_hub", "safetensors"}


def test_nothing_in_the_package_imports_the_tests_or_benchmarks():
    for path in PACKAGE.rglob("*.py"):
        assert not imports_of(path)[1] & {"tests", "benchmarks", "examples"}


def test_importing_leads_class_names_here_and_leaves_modules_of_transformers_alone():
    program = """
import transformers, transformers.models.deepseek_v2.modeling_deepseek_v2 as native
from transformers import masking_utils, modeling_utils, cache_utils
from transformers.models import deepseek_v2
modules = (native, masking_utils, modeling_utils, cache_utils, deepseek_v2)
before = [dict(vars(module)) for module in modules], dict(transformers.AttentionInterface()._global_mapping)
methods = dict(vars(native.DeepseekV2Attention)), dict(vars(transformers.PreTrainedModel))
import deepseek_latent
after = [dict(vars(module)) for module in modules], dict(transformers.AttentionInterface()._global_mapping)
assert before == after
assert methods == (dict(vars(native.DeepseekV2Attention)), dict(vars(transformers.PreTrainedModel)))
assert type(transformers.AutoConfig.for_model("llama")).__name__ == "LlamaConfig"
for name in deepseek_latent.__all__:
    if name.startswith("Deepseek"):
        assert getattr(transformers, name) is getattr(deepseek_latent, name), name
"""
    subprocess.run([sys.executable, "-c", program], check=True, cwd=PACKAGE.parent)


def test_importing_does_not_load_the_command_line():
    program = "import sys, deepseek_latent; assert 'deepseek_latent.cli' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True, cwd=PACKAGE.parent)
