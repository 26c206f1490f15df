"""`convert` replaces and removes nothing that a conversion did not write, whatever lies at OUT and beside it."""

import json
import os
import re
from pathlib import Path

import pytest
from transformers import LlamaConfig

from deepseek_latent.commands.__main__ import main
from deepseek_latent.conversion import target
from deepseek_latent.conversion.target import Target
from tests.conversion.sources import convert_to_mla, save_source
from tests.support import tiny_model


@pytest.fixture
def source(tmp_path) -> Path:
    save_source(tmp_path / "source", LlamaConfig)
    return tmp_path / "source"


def convert(source: Path, out: Path, *options: str) -> int:
    return main(["convert", "gqa-to-mla", str(source), str(out), *options])


def touch_later(path: Path) -> None:
    """Makes a file look as if it was written again, with the same size, a minute after it was."""
    date = path.stat().st_mtime_ns + 60 * 10**9
    os.utime(path, ns=(date, date))


# what happened to a converted folder, and the name in the refusal
NOT_OURS = {
    "fine-tuned weights saved over it": (lambda out: touch_later(out / "model.safetensors"), "model.safetensors"),
    "an edited card": (lambda out: (out / "README.md").write_text("mine"), "README.md"),
    "notes beside it": (lambda out: (out / "notes.txt").write_text("mine"), "notes.txt"),
    "a checkpoint of a trainer": (lambda out: (out / "checkpoint-10").mkdir(), "checkpoint-10"),
    "no list": (lambda out: (out / "conversion.json").unlink(), "conversion.json"),
    "a list of other files": (lambda out: (out / "conversion.json").write_text('{"files": {}}'), "README.md"),
    "a list that is none": (lambda out: (out / "conversion.json").write_text('{"files": 3}'), "conversion.json"),
    "no JSON": (lambda out: (out / "conversion.json").write_text("{"), "conversion.json"),
    "a link for a file": (
        lambda out: ((out / "config.json").unlink(), (out / "config.json").symlink_to("../source/config.json")),
        "config.json",
    ),
}


@pytest.mark.parametrize("kind", NOT_OURS)
def test_force_keeps_what_no_conversion_wrote_and_names_the_second_word(source, tmp_path, capsys, kind):
    change, named = NOT_OURS[kind]
    out = convert_to_mla(source, tmp_path / "out")
    change(out)
    before = {path.name: path.lstat().st_ino for path in out.iterdir()}
    assert convert(source, out, "--force") == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert named in error, error
    assert "add --replace-any-folder" in error, error
    assert convert(source, out, "--replace-any-folder") == 2
    assert "--force" in capsys.readouterr().err
    assert {path.name: path.lstat().st_ino for path in out.iterdir()} == before
    assert convert(source, out, "--force", "--replace-any-folder") == 0
    assert convert(source, out, "--force") == 0


def test_a_checkpoint_that_was_saved_by_transformers_needs_the_second_word(source, tmp_path):
    save_source(tmp_path / "trained", LlamaConfig)
    assert convert(source, tmp_path / "trained", "--force") == 2
    assert (tmp_path / "trained" / "model.safetensors").is_file()


@pytest.mark.parametrize("kind", ["cast", "export-deepseek"])
def test_every_kind_of_conversion_lists_what_it_wrote(tmp_path, kind):
    tiny_model(num_attention_heads=4).save_pretrained(tmp_path / "source")
    command = ["convert", kind, str(tmp_path / "source"), str(tmp_path / "out")]
    assert main(command) == 0
    listed = json.loads((tmp_path / "out" / "conversion.json").read_text())["files"]
    assert listed.keys() == {path.name for path in (tmp_path / "out").iterdir()} - {"conversion.json"}
    assert main([*command, "--force"]) == 0


@pytest.mark.parametrize("variable", ["HOME", "PWD"])
def test_a_folder_that_holds_the_home_or_the_current_folder_is_never_replaced(
    source, tmp_path, capsys, monkeypatch, variable
):
    (tmp_path / "user" / "inner").mkdir(parents=True)
    if variable == "HOME":
        monkeypatch.setenv("HOME", str(tmp_path / "user" / "inner"))
    else:
        monkeypatch.chdir(tmp_path / "user" / "inner")
    (tmp_path / "user" / "inner" / "thesis").touch()
    for out in ("user", "user/inner"):
        assert convert(source, tmp_path / out, "--force", "--replace-any-folder") == 2
        assert re.search("is not replaced|cannot be replaced", capsys.readouterr().err)
    assert (tmp_path / "user" / "inner" / "thesis").is_file()


def test_a_folder_that_was_made_during_the_conversion_is_kept(source, tmp_path, monkeypatch, capsys):
    write_shards = Target._write_shards

    def meanwhile(self, shards):
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "thesis").touch()
        write_shards(self, shards)

    monkeypatch.setattr(Target, "_write_shards", meanwhile)
    assert convert(source, tmp_path / "out") == 2
    assert "out exists" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["thesis"]


def victim_folder(tmp_path: Path) -> Path:
    victim = tmp_path / "victim"
    victim.mkdir()
    for name in ("plan.json", "README.md", "config.json"):
        (victim / name).write_text("precious")
    return victim


# what somebody has planted beside OUT
PLANTED = {
    "the hidden folder is a link": (".out.partial", lambda path, victim: path.symlink_to(victim)),
    "the hidden folder is a file": (".out.partial", lambda path, victim: path.touch()),
    "the lock is a link": (".out.lock", lambda path, victim: path.symlink_to(victim / "plan.json")),
    "the lock is another name of a file": (".out.lock", lambda path, victim: path.hardlink_to(victim / "plan.json")),
    "the lock is a folder": (".out.lock", lambda path, victim: path.mkdir()),
    "the lock is a pipe": (".out.lock", lambda path, victim: os.mkfifo(path)),
}


@pytest.mark.parametrize("kind", PLANTED)
def test_what_is_planted_beside_out_is_refused_before_any_work_and_not_followed(source, tmp_path, capsys, kind):
    victim = victim_folder(tmp_path)
    name, plant = PLANTED[kind]
    plant(tmp_path / name, victim)
    assert convert(source, tmp_path / "out", "--dry-run") == 2
    assert f"{name} is in the way" in capsys.readouterr().err
    assert convert(source, tmp_path / "out") == 2
    assert {path.read_text() for path in victim.iterdir()} == {"precious"}
    assert not (tmp_path / "out").exists()


def test_what_belongs_to_another_user_is_refused(source, tmp_path, capsys, monkeypatch):
    (tmp_path / ".out.partial").mkdir()
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    assert convert(source, tmp_path / "out") == 2
    assert ".out.partial is in the way" in capsys.readouterr().err


@pytest.mark.parametrize("plant", [Path.symlink_to, Path.hardlink_to], ids=["link", "hard link"])
def test_links_in_the_hidden_folder_of_an_earlier_run_are_not_written_through(source, tmp_path, monkeypatch, plant):
    def interrupt(finished, path):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(target, "publish_folder", interrupt)
        assert convert(source, tmp_path / "out") == 130
    victim = victim_folder(tmp_path)
    for name in ("README.md", "config.json"):
        (tmp_path / ".out.partial" / name).unlink()
        plant(tmp_path / ".out.partial" / name, victim / name)
    assert convert(source, tmp_path / "out") == 0
    assert {path.read_text() for path in victim.iterdir()} == {"precious"}
    assert not [path for path in (tmp_path / "out").iterdir() if path.is_symlink()]


def test_the_hidden_folder_of_out_is_not_a_source(source, tmp_path, capsys):
    (tmp_path / "source").rename(tmp_path / ".out.partial")
    assert convert(tmp_path / ".out.partial", tmp_path / "out") == 2
    assert "same folder" in capsys.readouterr().err
    assert (tmp_path / ".out.partial" / "model.safetensors").is_file()


def test_a_name_without_room_for_its_hidden_folder_is_refused_before_any_work(source, tmp_path, capsys):
    assert convert(source, tmp_path / ("o" * 255), "--dry-run") == 2
    assert "too long" in capsys.readouterr().err
