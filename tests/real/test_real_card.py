"""The card of a real model is what the tool wrote with what was measured, and the hub would take card and files."""

import json
from pathlib import Path

import pytest
from huggingface_hub import CommitOperationAdd, ModelCard
from huggingface_hub.utils import validate_repo_id
from safetensors import safe_open
from transformers import LlamaConfig

from benchmarks.real_card import CARD, RESULT, card
from tests.conversion.sources import convert_to_mla, save_source

from .conftest import MLA


def row(what: str, perplexity: float, ratio: float) -> dict:
    measured = {"perplexity": perplexity, "ratio": ratio, "standard_error": 0.0012}
    return {"what": what, "articles": measured, "help": measured | {"perplexity": 2 * perplexity}}


MEASURED = {
    "windows": {"articles": 48, "help": 31},
    "window_length": 256,
    "models": [row("source", 21.5, 1.0), row("exact", 21.501, 1.00001)],
    "caches": [row("int8", 22.25, 1.0349)],
}


@pytest.fixture
def converted(tmp_path):
    save_source(tmp_path / "llama", LlamaConfig)
    (tmp_path / "llama" / "README.md").write_text("---\nlicense: apache-2.0\nlanguage:\n- en\n---\n")
    return convert_to_mla(tmp_path / "llama", tmp_path / "small-mla")


def assert_the_hub_takes(folder: Path) -> None:
    """Checks what huggingface_hub checks before an upload, and what the hub reads of the files."""
    validate_repo_id(f"someone/{folder.name}")
    for file in folder.iterdir():
        assert file.is_file()
        CommitOperationAdd(path_in_repo=file.name, path_or_fileobj=file)
    data = ModelCard.load(folder / "README.md").data
    assert (data.library_name, data.license, data.language) == ("transformers", "apache-2.0", ["en"])
    assert json.loads((folder / "config.json").read_text())["model_type"] == "deepseek_v2"
    with safe_open(folder / "model.safetensors", "pt") as stored:
        assert stored.metadata() == {"format": "pt"}


def test_the_hub_takes_a_converted_folder(converted):
    assert_the_hub_takes(converted)


@pytest.mark.real
def test_the_hub_takes_the_real_model():
    assert_the_hub_takes(MLA)


def test_a_card_holds_what_the_tool_wrote_and_every_measurement(converted):
    written = (converted / "README.md").read_text()
    text = card(written, MEASURED)
    assert ModelCard(text).data.to_dict() == ModelCard(written).data.to_dict()
    assert set(written.splitlines()) <= set(text.splitlines())
    assert "| exact | 21.501 (1.0000 ± 0.0012) | 43.002 (1.0000 ± 0.0012) |" in text
    assert "| cache, int8 | 22.250 (1.0349 ± 0.0012) | 44.500 (1.0349 ± 0.0012) |" in text
    assert "48 windows of 256 tokens (articles), 31 windows of 256 tokens (help)" in text


def test_the_card_in_this_repository_holds_the_measurements_of_the_result_file():
    text = CARD.read_text(encoding="utf-8")
    assert ModelCard(text).data.license == "apache-2.0"
    before, _, after = text.partition("Perplexity on ")
    rest = after.partition("The license is")[2]
    assert card(f"{before}The license is{rest}", json.loads(RESULT.read_text())) == text
