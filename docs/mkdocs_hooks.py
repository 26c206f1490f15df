"""What the site needs beyond mkdocs: links that leave docs/, and pages that load nothing from other hosts.

The pages link to other files of the repository as GitHub needs it, `../examples/heal.py`. On the site, plots are copied
and shown, and every other such file is linked in the repository.
"""

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parent.parent
LOADED = re.compile(r'<(?:script|img|link rel="(?:stylesheet|preconnect)")[^>]*(?:src|href)="(?:https?:)?//[^"]*"')


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    for plot in sorted(ROOT.glob("benchmarks/results/*.png")):
        place = plot.relative_to(ROOT).as_posix()
        files.append(File(place, str(ROOT), config.site_dir, config.use_directory_urls))
    return files


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    def target(match: re.Match) -> str:
        path = match[1].partition("#")[0]
        if not (ROOT / path).exists():
            raise PluginError(f"{page.file.src_uri} links to ../{path}, which does not exist; correct the link.")
        on_site = files.get_file_from_path(path) is not None
        return f"]({match[1]})" if on_site else f"]({config.extra['repository']}/blob/main/{match[1]})"

    return re.sub(r"\]\(\.\./([^)]*)\)", target, markdown)


def on_post_page(output: str, *, page: Page, config: MkDocsConfig) -> str:
    if loaded := LOADED.search(output):
        raise PluginError(f"{page.file.src_uri} would load {loaded[0]} from another host; copy it into docs/.")
    return output
