"""What the README shows runs, in the order it is shown, from the repository's root."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.support import needs_compiler

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
OFFLINE = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}


def run(*command: str, cwd: Path = ROOT) -> str:
    done = subprocess.run(command, cwd=cwd, env=OFFLINE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, done.stdout
    return done.stdout


def assert_prints_as_promised(code: str, output: str) -> None:
    """What a comment says behind a print, up to the first "...", was printed."""
    for line in code.splitlines():
        if line.startswith("print(") and "  # " in line and "..." in line:
            assert line.split("  # ")[1].split("...")[0] in output


def test_there_is_code_to_run():
    assert len(BLOCKS) == 3


# the last goes on with the model of the first
@pytest.mark.parametrize(
    "block",
    [*BLOCKS[:2], pytest.param("\n".join(BLOCKS[::2]), marks=needs_compiler)],
    ids=["ten lines", "fine-tuning", "on a CPU"],
)
def test_every_python_block_runs_and_prints_what_its_comments_say(block):
    assert_prints_as_promised(block, run(sys.executable, "-c", block))


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("caches.md", 7),
        ("fine-tuning.md", 9),
        pytest.param("speed.md", 2, marks=needs_compiler),
        pytest.param("gpu.md", 1, marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")),
    ],
)
def test_a_page_of_the_docs_runs_from_top_to_bottom(name, count, tmp_path):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / name).read_text(), flags=re.DOTALL)
    assert len(blocks) == count
    # it writes files where it is run
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    page = "\n".join(blocks)
    assert_prints_as_promised(page, run(sys.executable, "-c", page, cwd=tmp_path))


def test_the_demo_writes_text_and_says_what_the_cache_held():
    output = run(
        sys.executable,
        "-m",
        "deepseek_latent.commands",
        "generate",
        "examples/pydoc-tiny",
        "The import statement",
    )
    assert "cache held" in output
    assert "as keys and values" in output


def test_the_map_names_what_is_there():
    block = re.search(r"## The map\n\n```\n(.*?)```", README, flags=re.DOTALL)[1]
    for line in block.splitlines():
        indent, place = re.match(r"( *)(\S+)", line).groups()
        path = ROOT / "deepseek_latent" / place if indent else ROOT / place
        assert path.exists(), place
        folder = path if path.is_dir() else path.parent
        for name in re.findall(r"[\w-]+\.(?:py|md)|\w+/", line):
            assert name == place or (folder / name).exists(), f"{name} in {place}"


def test_the_map_names_every_room():
    block = re.search(r"## The map\n\n```\n(.*?)```", README, flags=re.DOTALL)[1]
    rooms = {path.name for path in (ROOT / "deepseek_latent").iterdir() if (path / "__init__.py").exists()}
    assert rooms - {*re.findall(r"(\w+)/", block)} == set()


@pytest.mark.parametrize("target", sorted(set(re.findall(r"`?make ([a-z-]+)", README))))
def test_every_make_target_named_exists(target):
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)


@pytest.mark.parametrize("link", re.findall(r"\]\(([^)h][^)]*)\)", README))
def test_every_local_link_leads_somewhere(link):
    file, _, heading = link.partition("#")
    assert (ROOT / file).exists()
    if heading:
        headings = re.findall(r"^#+ (.*)", (ROOT / file).read_text(), flags=re.MULTILINE)
        assert heading in [re.sub(r"[^\w -]", "", name).lower().replace(" ", "-") for name in headings]
