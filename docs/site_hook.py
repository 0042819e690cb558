"""For the site: whatever of the repository a page links to is a page too, so links work there as they do on GitHub.

mkdocs knows the files in docs/ only. There `../otcrl/types.py` leads to source/otcrl/types.py.html, which shows the
file; README.md is the front page. A link to nothing is left as it is, and `mkdocs build --strict` stops at it.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from mkdocs.structure.files import File, Files, InclusionLevel

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
LINK = re.compile(r"(?<=\]\()(?P<path>[^)\s#:]+)(?P<anchor>#[^)\s]*)?(?=\))")
FENCED = re.compile(r"^(`{3,}).*?^\1$", re.MULTILINE | re.DOTALL)
LANGUAGES = {".py": "python", ".yaml": "yaml", ".yml": "yaml", ".sbatch": "bash", ".json": "json"}
ORIGINS = {"index.md": "README.md"}  # pages that do not lie in docs/ -> what they show


def on_files(files: Files, config: MkDocsConfig) -> Files:
    files.append(File.generated(config, "index.md", content=(ROOT / "README.md").read_text()))
    waiting = [(file.src_uri, file.content_string) for file in files.documentation_pages()]
    while waiting:
        page, text = waiting.pop()
        for target in links(page, text):
            name = page_of(target)
            if files.get_file_from_path(name) is None:
                ORIGINS[name] = target
                shown = content(target)
                files.append(File.generated(config, name, content=shown, inclusion=InclusionLevel.NOT_IN_NAV))
                waiting.append((name, shown))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    own = page.file.src_uri

    def rewritten(match: re.Match[str]) -> str:
        target = meant(own, match["path"])
        if target is None:
            return match[0]
        return posixpath.relpath(page_of(target), posixpath.dirname(own) or ".") + (match["anchor"] or "")

    return outside_fences(markdown, lambda text: LINK.sub(rewritten, text))


def links(page: str, text: str) -> list[str]:
    """The files and folders of the repository that a page links to."""
    paths: list[str] = []
    outside_fences(text, lambda part: paths.extend(m["path"] for m in LINK.finditer(part)) or part)
    return sorted({target for path in paths if (target := meant(page, path)) is not None})


def meant(page: str, path: str) -> str | None:
    """What a link of a page means, as a path in the repository; None where there is nothing."""
    origin = ORIGINS.get(page, f"docs/{page}")
    folder = origin if (ROOT / origin).is_dir() else posixpath.dirname(origin)
    target = posixpath.normpath(posixpath.join(folder, path))
    return target if not target.startswith("..") and (ROOT / target).exists() else None


def page_of(target: str) -> str:
    """Where the site has a file or folder of the repository."""
    path = ROOT / target
    if target == "README.md":
        return "index.md"
    if target.startswith("docs/") and path.suffix != ".py":  # exclude_docs leaves scripts out
        return target.removeprefix("docs/")
    if path.is_dir():
        return f"source/{target}/index.md"
    return f"source/{target}" if path.suffix == ".md" else f"source/{target}.md"


def content(target: str) -> str:
    path = ROOT / target
    if path.is_dir():
        shown = [p for p in sorted(path.iterdir()) if p.is_dir() or p.suffix in LANGUAGES]
        names = [p.name for p in shown if not p.name.startswith((".", "__"))]
        return "\n".join([f"# {target}", "", *(f"- [{name}]({name})" for name in names), ""])
    if path.suffix == ".md":
        return path.read_text()
    return f"# {target}\n\n````{LANGUAGES.get(path.suffix, 'text')}\n{path.read_text()}\n````\n"


def outside_fences(text: str, change: Callable[[str], str]) -> str:
    """`text` with all changed but its fenced blocks."""
    pieces, at = [], 0
    for block in FENCED.finditer(text):
        pieces += [change(text[at : block.start()]), block[0]]
        at = block.end()
    return "".join([*pieces, change(text[at:])])
