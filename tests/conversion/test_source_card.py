"""Whatever the README.md of a source holds, a conversion keeps what can be read of it, and says what cannot."""

import json

import pytest
from huggingface_hub import ModelCard
from transformers import LlamaConfig

from deepseek_latent.commands.__main__ import main
from deepseek_latent.conversion.source_card import read_card
from tests.conversion.sources import save_source

# the text of a README.md, and the license and language that are kept of it
CARDS = {
    "readable": (b"---\nlicense: mit\nlanguage:\n- en\n- de\ntags: [a]\n---\n# Model\n", "mit", ["en", "de"]),
    "Windows": (b"---\r\nlicense: mit\r\nlanguage:\r\n  - en\r\n---\r\n", "mit", ["en"]),
    "languages with Norwegian": (b"---\nlicense: mit\nlanguage:\n# two\n- sv\n- no\n---\n", "mit", ["sv", "no"]),
    "Norwegian": (b"---\nlicense: mit\nlanguage: no\n---\n", "mit", "no"),
    "no metadata": (b"# Model\nlicense: mit\n", None, None),
    "nothing": (b"", None, None),
    "YAML that does not parse": (b"---\nlicense: [\nlanguage: en\n---\n", None, "en"),
    "a field that does not parse beside them": (b"---\nlicense: mit\ntags: [\nbase_model: {{x\n---\n", "mit", None),
    "latin-1 beside them": ("---\nlicense: mit\nauthor: Günther\n---\nMüll".encode("latin-1"), "mit", None),
    "latin-1 inside": ("---\nlicense: mütt\nlanguage: en\n---\n".encode("latin-1"), None, "en"),
    "an odd model-index": (b"---\nlicense: mit\nmodel-index:\n- name: x\n  results: [5]\n---\n", "mit", None),
    "odd types": (b"---\nlicense: {a: 1}\nlanguage: [1]\ntags: 7\ndatasets: 3\nbase_model: [[1]]\n---\n", None, None),
    "a date": (b"---\nlicense: 2026-99-99\nlanguage: 2026-01-01\n---\n", None, None),
    "an object of Python": (b"---\nlicense: !!python/name:os.system\n---\n", None, None),
    "very deep": (b"---\nlicense: " + b"[" * 3_900 + b"\nlanguage: en\n---\n", None, "en"),
    "very long": (b"---\nlicense: " + b"x" * 10**6 + b"\nlanguage: en\n---\n", None, "en"),
    "bytes": (bytes(range(256)) * 20, None, None),
}


@pytest.mark.parametrize(("text", "license", "language"), CARDS.values(), ids=CARDS.keys())
def test_a_card_keeps_what_can_be_read_and_warns_of_the_rest(text, license, language, tmp_path):
    (tmp_path / "README.md").write_bytes(text)
    card = read_card(tmp_path)
    assert (card.license, card.language) == (license, language)
    block = text.partition(b"---")[2]
    given = [name for name in ("license", "language") if f"\n{name}:".encode() in block]
    unread = [name for name in given if getattr(card, name) is None]
    assert (card.warning or "").startswith(f"the {' and '.join(unread)} in" if unread else "")
    assert (card.warning is None) == (not unread)


def test_a_folder_without_a_card_has_an_empty_one(tmp_path):
    assert read_card(tmp_path) == (None, None, None)


def test_a_conversion_of_a_source_with_a_broken_card_succeeds_and_warns_once(tmp_path, capsys):
    save_source(tmp_path / "source", LlamaConfig)
    (tmp_path / "source" / "README.md").write_bytes(b"---\nlicense: [\nlanguage: en\nmodel-index: 5\n---\n\xff")
    command = ["convert", "gqa-to-mla", str(tmp_path / "source"), str(tmp_path / "out"), "--json"]
    assert main(command) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out)["tensors"] > 0
    warnings = [line for line in printed.err.splitlines() if line.startswith("warning: ")]
    assert len(warnings) == 1
    assert "the license in" in warnings[0]
    assert ModelCard.load(tmp_path / "out" / "README.md").data.to_dict() == {
        "language": "en",
        "library_name": "transformers",
    }
