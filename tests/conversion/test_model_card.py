"""The card of a conversion shows what strangers wrote as text: no markup, no HTML, nothing that a terminal acts on."""

import json
import os
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig

from deepseek_latent.commands.__main__ import main
from tests.conversion.sources import convert_to_mla, save_source
from tests.support import tiny_model

# names that a source can give itself
NAMES = [
    "meta-llama/Llama-3.2-1B",
    "<img src=x onerror=alert(1)>",
    "`</code><script>alert(1)</script>`",
    "``` \n<script>alert(1)</script>\n```",
    "x\n---\nlicense: mit\n---\n# Buy this",
    "[click](javascript:alert(1)) ![](https://tracker) https://phish.example www.phish.example",
    "\x1b]0;owned\x07\x1b[2J\u202egnp.exe",
    "$command ${report} $$",
    "|a|b|\n|-|-|",
    "n" * 100_000,
    "   ",
]


def card_of(out: Path) -> tuple[dict, list]:
    """The metadata of a card, and all tokens of its Markdown."""
    # rich brings it, except in its oldest releases
    markdown = pytest.importorskip("markdown_it")
    _, metadata, text = (out / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    tokens = markdown.MarkdownIt("commonmark").enable("table").parse(text)
    return yaml.safe_load(metadata), [inner for token in tokens for inner in [token, *(token.children or [])]]


@pytest.mark.parametrize("name", NAMES, ids=range(len(NAMES)))
def test_the_name_of_a_source_is_shown_and_is_not_markup(tmp_path, name):
    save_source(tmp_path / "source", LlamaConfig)
    config = json.loads((tmp_path / "source" / "config.json").read_text())
    (tmp_path / "source" / "config.json").write_text(json.dumps(config | {"_name_or_path": name}))
    metadata, tokens = card_of(convert_to_mla(tmp_path / "source", tmp_path / "out"))
    assert metadata == {"library_name": "transformers"}
    kinds = [token.type for token in tokens]
    assert not {"html_block", "html_inline", "link_open", "image"} & {*kinds}
    assert kinds.count("heading_open") == kinds.count("table_open") == 1
    assert kinds.count("fence") == 2
    spans = [token.content for token in tokens if token.type == "code_inline"]
    assert spans[0] == spans[1]
    assert len(spans[0]) <= 200
    assert spans[0].isprintable()
    if name.isprintable() and len(name) < 200 and name.strip():
        assert spans[0] == name
    assert all(line.isprintable() for line in (tmp_path / "out" / "README.md").read_text("utf-8").splitlines())


@pytest.mark.parametrize("folder", ['"); import os; os.system("', "```\n<b>", "\x1b[31m", "$place", "ü"], ids=range(5))
def test_the_folders_names_are_shown_and_are_not_code(tmp_path, folder):
    save_source(tmp_path / folder, LlamaConfig)
    _, tokens = card_of(convert_to_mla(tmp_path / folder, tmp_path / f"{folder} out"))
    bash, python = [token for token in tokens if token.type == "fence"]
    assert (bash.info, python.info) == ("bash", "python")
    assert bash.content.count("\n") == 1
    loaded = []
    code = python.content.splitlines()[-1].partition("= ")[2]
    eval(code, {"AutoModelForCausalLM": type("Fake", (), {"from_pretrained": staticmethod(loaded.append)})})
    assert loaded == [f"{folder} out"]


@pytest.mark.parametrize(
    ("written", "kept"),
    [
        ("license: apache-2.0\nlanguage:\n- en\n- de", {"license": "apache-2.0", "language": ["en", "de"]}),
        ('license: "<script>alert(1)</script>"', {}),
        ('license: "mit\\n---\\n# Buy this"', {}),
        ("license: {a: b}\nlanguage: [[en], 3, fr]", {}),
    ],
    ids=range(4),
)
def test_license_and_language_of_the_source_are_kept_if_they_are_identifiers(tmp_path, written, kept):
    save_source(tmp_path / "source", LlamaConfig)
    (tmp_path / "source" / "README.md").write_text(f"---\n{written}\n---\n<script>alert(1)</script>\n")
    metadata, tokens = card_of(convert_to_mla(tmp_path / "source", tmp_path / "out"))
    assert metadata == {"library_name": "transformers"} | kept
    assert "script" not in "".join(token.content for token in tokens)


@pytest.mark.parametrize("name", ["\x1b]0;owned\x07", "[/bold]", "[red]x", ":bomb:", "x" * 3000], ids=ascii)
def test_names_in_files_are_printed_and_not_acted_on(tmp_path, capsys, name):
    tiny_model().save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    save_file(tensors | {name: tensors["lm_head.weight"].clone()}, file, metadata={"format": "pt"})
    capsys.readouterr()
    for command in (["inspect"], ["verify"], ["verify", "--json"]):
        assert main([command[0], str(tmp_path), *command[1:]]) == 1
        out, err = capsys.readouterr()
        assert all(line.isprintable() for line in (out + err).split("\n"))
        assert ("owned" in out) == ("owned" in name)
        assert (":bomb:" in out) == (name == ":bomb:")
    assert main(["convert", "cast", str(tmp_path), str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err.split("\n")[-2]
    assert error.isprintable()
    assert len(error) < 1100
    assert os.listdir(tmp_path).count("out") == 0
