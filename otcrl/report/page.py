"""One HTML file that needs nothing else: markup, style, scripts and data in it, and leave for nothing but them.

Whatever a model or a tool wrote is data: JSON in which no `<` is left, or compressed and in base64, in script elements
that no browser runs. The scripts put it on the page as text. Were that ever forgotten, the Content-Security-Policy
would still run no script but ours, load nothing, and (Trusted Types) make no markup from a string.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
from collections.abc import Iterable, Sequence
from importlib.resources import files
from string import Template
from typing import Any

from otcrl.report.build import KINDS, Content

STYLES = ("vendor/uPlot.min.css", "style.css")
SCRIPTS = (  # in this order: each may use what stands before it
    "vendor/uPlot.iife.min.js",
    *("dom.js", "data.js", "charts.js", "tables.js"),
    *("summary.js", "training.js", "calls.js", "tools.js"),
    *("trajectory.js", "list.js", "viewer.js", "compare.js", "main.js"),
)
BLOCK = 64  # trajectories that are compressed, and later opened, together


def page(content: Content, title: str, made: str) -> str:
    """The file; `made` says when and by what."""
    styles, scripts = [read(name) for name in STYLES], [read(name) for name in SCRIPTS]
    blocks = [content.details[i : i + BLOCK] for i in range(0, len(content.details), BLOCK)]
    index = {
        "title": title,
        "made": made,
        "runs": content.runs,
        "differences": content.differences,
        "questions": content.questions,
        "columns": content.columns,
        "leftOut": content.left_out,
        "kinds": KINDS,
        "block": BLOCK,
    }
    return Template(read("page.html")).substitute(
        policy=policy(styles, scripts),
        styles="".join(f"<style>{style}</style>\n" for style in styles),
        data=f'<script type="application/json" id="index">{as_json(index)}</script>\n',
        blocks="".join(f'<script type="text/plain" class="block">{packed(block)}</script>\n' for block in blocks),
        scripts="".join(f"<script>{script}</script>\n" for script in scripts),
    )


def read(name: str) -> str:
    return files("otcrl.report").joinpath("web", name).read_text(encoding="utf-8")


def policy(styles: Iterable[str], scripts: Iterable[str]) -> str:
    """Only what is written here runs or styles; nothing is loaded, sent or framed."""
    return "; ".join(
        [
            "default-src 'none'",
            f"script-src {hashes(scripts)}",
            f"style-src {hashes(styles)}",
            "img-src data:",  # the empty icon, so that no browser asks for one
            "base-uri 'none'",
            "form-action 'none'",
            "require-trusted-types-for 'script'",
            "trusted-types 'none'",
        ]
    )


def hashes(texts: Iterable[str]) -> str:
    return " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(t.encode()).digest()).decode()}'" for t in texts)


def as_json(value: Any) -> str:
    """In a script element: ASCII, and nothing in it can end the element or begin a comment."""
    text = json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def packed(details: Sequence[dict[str, Any]]) -> str:
    text = json.dumps(details, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return base64.b64encode(gzip.compress(text.encode(), mtime=0)).decode()
