"""Rooms import only the rooms that the table allows, and importing the package changes no module of transformers."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from deepseek_latent.conversion.remote_code import exported_files

TESTS = Path(__file__).parent
PACKAGE = TESTS.parent / "deepseek_latent"
CONTRIBUTING = (TESTS.parent / "CONTRIBUTING.md").read_text(encoding="utf-8")
# From the ground up: a room may import the rooms that it names, all of which stand above it in this table.
# A file of the top folder is a room of its own.
ROOMS = {
    "whole_files": set(),
    "json_files": set(),
    "compat": set(),
    "configuration": set(),
    "configuration_deepseek_v2": {"compat", "configuration"},
    "cache": {"whole_files", "compat", "configuration_deepseek_v2"},
    "attention": {"compat", "configuration_deepseek_v2", "cache"},
    "experts": {"compat", "configuration_deepseek_v2"},
    "generation": {"compat", "cache"},
    "checkpoints": {"compat", "attention", "experts"},
    "modeling_deepseek_v2": {"compat", "configuration_deepseek_v2", "cache", "attention", "experts", "generation"}
    | {"checkpoints"},
    "plugin_state": {"compat", "attention", "modeling_deepseek_v2"},
    "finetuning": {"whole_files", "json_files", "compat", "configuration_deepseek_v2", "experts"}
    | {"modeling_deepseek_v2"},
    "kernels": {"whole_files", "compat", "cache", "attention", "experts", "generation", "modeling_deepseek_v2"},
    "conversion": {"whole_files", "json_files", "compat", "configuration", "configuration_deepseek_v2", "experts"}
    | {"modeling_deepseek_v2"},
    "__init__": {"compat", "configuration_deepseek_v2", "cache", "experts", "finetuning", "kernels"}
    | {"modeling_deepseek_v2", "plugin_state"},
    "__main__": set(),
    "commands": {
        "__init__",
        "whole_files",
        "cache",
        "configuration_deepseek_v2",
        "conversion",
        "finetuning",
        "kernels",
        "modeling_deepseek_v2",
    },
}
# folders inside a room
FLOORS = {"kernels": {"cpu", "gpu"}}


def room_of(path: Path) -> str:
    inner = path.relative_to(PACKAGE)
    return inner.parts[0] if len(inner.parts) > 1 else inner.stem


def files_of(room: str) -> list[Path]:
    return [path for path in PACKAGE.rglob("*.py") if room_of(path) == room]


def imports_of(path: Path) -> tuple[set[str], set[str]]:
    """The rooms of the package, and the top-level packages outside it, that a file imports."""
    inside, outside = set(), set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [(alias.name, 0) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [(node.module or "", node.level)]
        else:
            continue
        for name, level in names:
            parts = name.split(".") if name else []
            if level == 0 and parts[0] != "deepseek_latent":
                outside.add(parts[0])
                continue
            above = [] if level == 0 else [*path.relative_to(PACKAGE).parts[:-level]]
            parts = [*above, *parts[level == 0 :]]
            inside.add(parts[0] if parts else "__init__")
    return inside - {room_of(path)}, outside


def test_every_room_is_in_the_table():
    assert {room_of(path) for path in PACKAGE.rglob("*.py")} == ROOMS.keys()


def test_no_room_imports_one_below_it():
    order = [*ROOMS]
    for room, may_import in ROOMS.items():
        assert may_import <= {*order[: order.index(room)]}, room


@pytest.mark.parametrize("room", ROOMS)
def test_imports_follow_the_table(room):
    found = set().union(*(imports_of(path)[0] for path in files_of(room)))
    assert found <= ROOMS[room]


def test_rooms_are_flat_except_for_the_folders_named():
    for path in PACKAGE.rglob("*.py"):
        folders = path.relative_to(PACKAGE).parts[1:-1]
        assert {*folders} <= FLOORS.get(room_of(path), set()), path


def test_exported_files_need_only_torch_transformers_and_their_dependencies():
    for name, text in exported_files().items():
        for node in ast.walk(ast.parse(text)):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module]
            outside = {each.partition(".")[0] for each in names} - set(sys.stdlib_module_names)
            # transformers itself requires the last two
            assert outside <= {"torch", "transformers", "huggingface_hub", "safetensors"}, name


def test_nothing_in_the_package_imports_the_tests_or_benchmarks():
    for path in PACKAGE.rglob("*.py"):
        assert not imports_of(path)[1] & {"tests", "benchmarks", "examples"}


def test_importing_replaces_class_names_and_changes_no_submodule_of_transformers():
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
    program = "import sys, deepseek_latent; assert 'deepseek_latent.commands' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True, cwd=PACKAGE.parent)


def test_contributing_names_the_tests_of_every_file():
    section = CONTRIBUTING.partition("## Which test guards which file")[2].partition("\n## ")[0]
    rows = [re.findall(r"`([^`]+)`", line) for line in section.splitlines() if line.startswith("| `")]
    named = set()
    for row in rows:
        for pattern in row:
            folder = TESTS if "test_" in pattern else PACKAGE
            found = [*folder.glob(pattern)]
            assert found, f"{pattern} is not there"
            named |= {path for path in found if folder == PACKAGE}
    files = {path for path in PACKAGE.rglob("*.py") if path.name != "__init__.py" and path.parent != PACKAGE}
    assert {str(path.relative_to(PACKAGE)) for path in files - named} == set()
