"""Long work says what it is doing: bars on a terminal, one line per stage elsewhere."""

import io
import sys

import pytest
from transformers import LlamaConfig
from transformers.utils import logging

from deepseek_latent import optimize_for_inference, pack_experts
from deepseek_latent.commands.__main__ import main
from deepseek_latent.commands.terminal import quiet_transformers
from deepseek_latent.conversion.progress import announce, track, track_briefly, track_bytes
from tests.commands.terminal import byte_tokenizer
from tests.conversion.sources import save_source
from tests.support import needs_compiler, tiny_model


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def replaced_stderr(monkeypatch, stderr: io.StringIO) -> io.StringIO:
    # called in tests, because pytest puts its own stderr in place between a fixture and its test
    monkeypatch.setattr(sys, "stderr", stderr)
    return stderr


def test_a_terminal_gets_a_bar_and_a_file_gets_one_line(monkeypatch):
    terminal = replaced_stderr(monkeypatch, Terminal())
    assert [*track([1, 2], "counting")] == [1, 2]
    assert "counting: 100%" in terminal.getvalue()
    file = replaced_stderr(monkeypatch, io.StringIO())
    assert [*track([1, 2], "counting")] == [1, 2]
    assert file.getvalue() == "counting ...\n"


def test_a_bar_of_bytes_starts_at_those_that_are_done(monkeypatch):
    terminal = replaced_stderr(monkeypatch, Terminal())
    with track_bytes(4000, "writing out", done=1000) as progress:
        progress.update(3000)
    assert "25%" in terminal.getvalue()
    assert "100%" in terminal.getvalue()
    assert "4.00k/4.00k" in terminal.getvalue()


def test_a_brief_bar_leaves_no_line(monkeypatch):
    terminal = replaced_stderr(monkeypatch, Terminal())
    assert [*track_briefly([1, 2], "reading headers")] == [1, 2]
    assert terminal.getvalue().rstrip(" ").endswith("\r")
    file = replaced_stderr(monkeypatch, io.StringIO())
    assert [*track_briefly([1, 2], "reading headers")] == [1, 2]
    assert file.getvalue() == ""


def test_a_stage_without_steps_is_one_line(monkeypatch):
    terminal = replaced_stderr(monkeypatch, Terminal())
    announce("comparing files")
    assert terminal.getvalue() == "comparing files ...\n"


@pytest.mark.parametrize("is_terminal", [True, False], ids=["terminal", "file"])
def test_every_long_stage_of_a_compression_and_its_check_is_shown(tmp_path, monkeypatch, is_terminal):
    save_source(tmp_path / "source", LlamaConfig, vocab_size=264)
    byte_tokenizer().save_pretrained(tmp_path / "source")
    (tmp_path / "text.txt").write_text("".join(f"{i} is {i * i % 97}. " for i in range(400)))
    stderr = replaced_stderr(monkeypatch, Terminal() if is_terminal else io.StringIO())
    widths = ["--kv-lora-rank", "24", "--qk-rope-head-dim", "16", "--calibrate", str(tmp_path / "text.txt")]
    assert main(["convert", "gqa-to-mla", str(tmp_path / "source"), str(tmp_path / "out"), *widths]) == 0
    assert main(["verify", str(tmp_path / "out"), "--against", str(tmp_path / "source")]) in (0, 1)
    shown = stderr.getvalue()
    stages = ["calibrating", "measuring the perplexity", "choosing rotations", "converting in memory", "writing out"]
    for stage in stages:
        assert (f"{stage}: 100%" if is_terminal else f"{stage} ...\n") in shown
    assert (f"reading every tensor{': 100%' if is_terminal else ' ...'}") in shown
    for stage in ("comparing the files with their config.json", "computing logits in transformers' own class"):
        assert f"{stage} ...\n" in shown
    # brief bars, and those of transformers
    for stage in ("reading headers", "Loading weights"):
        assert (stage in shown) == is_terminal
    assert ("%|" in shown) == is_terminal


def round_to_int8(model):
    optimize_for_inference(model, weights="int8")


@pytest.mark.parametrize(
    ("change", "shown"),
    [
        (pack_experts, "packing experts in 4 bits"),
        pytest.param(round_to_int8, "rounding weights to int8", marks=needs_compiler),
    ],
)
def test_rounding_the_weights_of_a_model_is_shown_on_a_terminal(monkeypatch, change, shown):
    terminal = replaced_stderr(monkeypatch, Terminal())
    change(tiny_model())
    assert f"{shown}:   0%|" in terminal.getvalue()
    file = replaced_stderr(monkeypatch, io.StringIO())
    change(tiny_model())
    assert file.getvalue() == ""


def test_quiet_loading_restores_the_bars_of_transformers(monkeypatch):
    replaced_stderr(monkeypatch, io.StringIO())
    assert logging.is_progress_bar_enabled()
    with quiet_transformers():
        assert not logging.is_progress_bar_enabled()
    assert logging.is_progress_bar_enabled()
