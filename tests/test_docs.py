"""The API reference names everything public, every page is on the site, and the site asks nothing of other hosts."""

import re
from dataclasses import fields
from pathlib import Path

import deepseek_latent

ROOT = Path(__file__).parent.parent
API = (ROOT / "docs" / "api.md").read_text()
SITE = (ROOT / "mkdocs.yml").read_text()


def test_the_api_reference_has_every_public_name_and_no_other():
    assert sorted(re.findall(r"^::: deepseek_latent\.(\w+)$", API, re.MULTILINE)) == sorted(deepseek_latent.__all__)


def test_the_api_reference_has_every_field_of_the_config_with_its_default():
    documented = {}
    for names, defaults in re.findall(r"^\| (`.*?`) \| (.*?) \|", API, re.MULTILINE):
        values = [text.strip().strip('"') for text in defaults.split(",")]
        documented |= dict(zip(re.findall(r"`(\w+)`", names), values, strict=True))
    own = {field.name: field for field in fields(deepseek_latent.DeepseekV2Config)}
    own = {name: own[name] for name in deepseek_latent.DeepseekV2Config.__annotations__ if name in own}
    assert documented.keys() == own.keys()
    for name, value in documented.items():
        if name != "num_key_value_heads":
            assert value == str(own[name].default), name


def test_every_page_is_in_the_navigation():
    assert set(re.findall(r"(\S+\.md)$", SITE, re.MULTILINE)) == {page.name for page in (ROOT / "docs").glob("*.md")}


def test_every_drawing_is_shown_and_is_what_its_program_draws(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "docs" / "drawings")
    import draw

    shown = set(re.findall(r"drawings/(\w+)\.svg", (ROOT / "docs" / "how-it-works.md").read_text()))
    drawn = {draw.attention: "attention", draw.cache: "cache", draw.routing: "routing"}
    assert shown == {*drawn.values()} == {path.stem for path in (ROOT / "docs" / "drawings").glob("*.svg")}
    for function, name in drawn.items():
        assert (ROOT / "docs" / "drawings" / f"{name}.svg").read_text(encoding="utf-8") == function()


def test_nothing_that_the_site_shows_is_loaded_from_another_host():
    for path in [*(ROOT / "docs").glob("*.md"), *(ROOT / "docs" / "drawings").glob("*.svg")]:
        text = path.read_text(encoding="utf-8").replace('xmlns="http://www.w3.org/2000/svg"', "")
        assert not re.findall(r'!\[[^]]*\]\(http|<img|<script|(?:src|href)="http|url\(http|@import', text), path.name
