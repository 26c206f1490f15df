"""Every recipe of docs/recipes.md runs and prints what its comments say."""

import os
import re
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from tests.test_readme import assert_prints_as_promised

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "recipes.md").read_text()
SETUP, *SECTIONS = re.split(r"^## ", PAGE, flags=re.MULTILINE)
RECIPES = {section.partition("\n")[0]: section for section in SECTIONS}
# these need a server, and packages of `make test-tools`
WITH_TOOLS = ["Serving", "Evaluation with lm-eval"]
ENVIRONMENT = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}


def blocks(text: str, language: str = "python") -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


def run_block(block: str, capsys) -> None:
    """Runs the page's first block, then this one, in this process: a process of its own would import for seconds."""
    exec(compile(f"{blocks(SETUP)[0]}\n{block}", "recipes.md", "exec"), {"__name__": "__main__"})
    assert_prints_as_promised(block, capsys.readouterr().out)


def command_of(recipe: str) -> list[str]:
    """The recipe's command, with this process's Python instead of the console script."""
    words = blocks(RECIPES[recipe], "bash")[0].split()
    assert words[0] == "deepseek-latent"
    return [sys.executable, "-m", "deepseek_latent", *words[1:]]


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path, monkeypatch):
    """Recipes write files where they are run."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "examples").symlink_to(ROOT / "examples")


@pytest.mark.parametrize("recipe", [name for name in RECIPES if name not in WITH_TOOLS])
def test_a_recipe_runs_and_prints_what_its_comments_say(recipe, capsys):
    (block,) = blocks(RECIPES[recipe])
    run_block(block, capsys)


@pytest.mark.slow
def test_the_recipe_for_serving_answers_a_client_of_openai(capsys, monkeypatch):
    for package in ("fastapi", "openai", "uvicorn"):
        pytest.importorskip(package, reason=f"{package} is not installed; make test-tools installs it")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    command = command_of("Serving")
    assert command[-1] == "8000"
    with subprocess.Popen([*command[:-1], port], env=ENVIRONMENT, stderr=subprocess.DEVNULL) as server:
        try:
            for _ in range(240):
                try:
                    urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5)
                    break
                except OSError:
                    time.sleep(0.5)
            (block,) = blocks(RECIPES["Serving"])
            assert "127.0.0.1:8000" in block
            run_block(block.replace("8000", port) + "\nassert answer.choices[0].text.strip()", capsys)
        finally:
            server.terminate()


@pytest.mark.slow
def test_the_recipe_for_lm_eval_measures_the_perplexity_of_a_text(tmp_path):
    pytest.importorskip("lm_eval", reason="lm_eval is not installed; make test-tools installs it")
    (task,) = blocks(RECIPES["Evaluation with lm-eval"], "yaml")
    (tmp_path / "held_out.yaml").write_text(task)
    environment = ENVIRONMENT | {"HF_DATASETS_CACHE": str(tmp_path / "datasets"), "HF_DATASETS_OFFLINE": "1"}
    done = subprocess.run(command_of("Evaluation with lm-eval"), env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    bits_per_byte = float(re.search(r"bits_per_byte[^\d]+([\d.]+)", done.stdout)[1])
    # the model's card has 1.609, also in windows of 256 tokens, which begin elsewhere
    assert 1.5 < bits_per_byte < 1.8, done.stdout


def test_the_command_that_shows_experts_plots_two_texts_and_says_whether_they_differ(tmp_path):
    command = command_of("Which expert does what")
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "experts.png").stat().st_size > 1000
    assert "specializ" in done.stdout or "differ" in done.stdout, done.stdout
