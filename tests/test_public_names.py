"""What a user is told to import is in the package itself, and is loaded when it is first asked for."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import deepseek_latent

ROOT = Path(__file__).parent.parent
SOURCE = ast.parse((ROOT / "deepseek_latent" / "__init__.py").read_text())
# not the pages on what was tried and on the paper, which are not about using the package
PAGES = [ROOT / "README.md"] + [
    page for page in sorted((ROOT / "docs").glob("*.md")) if page.stem not in ("log", "paper-and-release")
]


def names_for_type_checkers() -> dict[str, str]:
    block = next(node for node in SOURCE.body if isinstance(node, ast.If))
    return {alias.name: node.module for node in block.body for alias in node.names}


@pytest.mark.parametrize("name", deepseek_latent.__all__)
def test_a_public_name_is_there_and_documented(name):
    assert getattr(deepseek_latent, name).__doc__
    assert name in dir(deepseek_latent)


def test_completion_offers_public_names_only():
    assert {name for name in dir(deepseek_latent) if not name.startswith("__")} == {*deepseek_latent.__all__}


def test_type_checkers_see_what_is_imported_when_asked_for():
    assert names_for_type_checkers() == deepseek_latent._MODULES
    assert deepseek_latent._MODULES.keys() <= {*deepseek_latent.__all__}


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'deepseek_latent' has no attribute 'no_such_name'"):
        _ = deepseek_latent.no_such_name


def test_importing_loads_neither_fine_tuning_nor_kernels():
    program = """
import sys, deepseek_latent
rooms = {name.split(".")[1] for name in sys.modules if name.startswith("deepseek_latent.")}
assert not rooms & {"finetuning", "kernels", "conversion", "commands"}, rooms
"""
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_code_in_the_docs_imports_from_the_package_itself(page):
    for block in re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.DOTALL):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and node.module.startswith("deepseek_latent"):
                assert node.module == "deepseek_latent"
                assert {alias.name for alias in node.names} <= {*deepseek_latent.__all__}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_functions_and_classes_that_the_docs_call_are_public(page):
    ours = {
        node.name
        for file in (ROOT / "deepseek_latent").rglob("*.py")
        for node in ast.parse(file.read_text()).body
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_")
    }
    called = set(re.findall(r"(?<![\w.])(\w+)(?:\.\w+)?\(", " ".join(re.findall(r"`[^`\n]+`", page.read_text()))))
    assert called & ours <= {*deepseek_latent.__all__}
