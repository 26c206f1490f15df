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


@needs_compiler
def test_the_python_blocks_run_in_order_and_print_what_their_comments_say(tmp_path):
    assert len(BLOCKS) == 4
    # it writes a file where it is run
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    code = "\n".join(BLOCKS)
    assert_prints_as_promised(code, run(sys.executable, "-c", code, cwd=tmp_path))


def test_a_screen_is_enough():
    assert len(README.splitlines()) <= 150
    assert max(len(line) for line in README.splitlines() if line.startswith("|")) <= 110


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("index.md", 1),
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


@pytest.mark.parametrize("target", sorted(set(re.findall(r"`?make ([a-z-]+)", README))))
def test_every_make_target_named_exists(target):
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)


LINKS = [
    (page, link)
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    for link in re.findall(r"\]\(([^)h#][^)]*)\)", page.read_text())
]


@pytest.mark.parametrize(("page", "link"), LINKS, ids=lambda value: getattr(value, "name", value))
def test_every_local_link_leads_somewhere(page, link):
    file, _, heading = link.partition("#")
    assert (page.parent / file).exists()
    if heading:
        headings = re.findall(r"^#+ (.*)", (page.parent / file).read_text(), flags=re.MULTILINE)
        assert heading in [re.sub(r"[^\w -]", "", name).lower().replace(" ", "-") for name in headings]
