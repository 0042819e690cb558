"""How long a report of 5,000 trajectories takes to write, how large it is, and how long a browser takes to open it.

The run is made up (tests/runs.py): groups of 16, four calls at most, observations of 100 and of 400 words. A page is
open when what it is there for can be seen; the slowest of four times, each in a fresh profile, counts.

    pip install 'otcrl[dev]'; apt-get install chromium
    python benchmarks/report.py
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from common import Row, publish
from playwright.sync_api import Browser, sync_playwright

from otcrl.report.build import content
from otcrl.report.files import read_runs
from otcrl.report.page import page

sys.path.append(str(Path(__file__).parents[1]))
from tests.runs import World, write_run

PAGES = {"summary": "section.summary table", "trajectories?at=4900": ".segment.answer", "training": ".u-wrap canvas"}
STEPS = 500  # of metrics
TIMES = 4


def main() -> None:
    path = shutil.which("chromium") or shutil.which("google-chrome")
    rows: list[Row] = []
    with TemporaryDirectory() as folder, sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=path, args=["--no-sandbox"])
        for words in (100, 400):
            rows.append(measure(browser, Path(folder) / str(words), words))
        browser.close()
    publish("report", rows, {})


def measure(browser: Browser, folder: Path, words: int) -> Row:
    tokens = write(folder, words)
    begun = time.monotonic()
    text = page(content(read_runs([folder]), 5000), "5,000 trajectories", "")
    file = folder / "report.html"
    file.write_text(text, encoding="utf-8")
    row: dict[str, float] = {
        "tokens": round(tokens),
        "transcripts_mb": round((folder / "transcripts.jsonl").stat().st_size / 1e6, 1),
        "report_mb": round(file.stat().st_size / 1e6, 1),
        "written_s": round(time.monotonic() - begun, 1),
    }
    for name, sign in PAGES.items():
        slowest = max(opening(browser, f"{file.as_uri()}#{name}", sign) for _ in range(TIMES))
        row[f"{name.partition('?')[0]}_s"] = round(slowest, 2)
    return row


def write(folder: Path, words: int) -> float:
    """Ten steps that are alike but for their names, 496 trajectories each; the mean of their tokens."""
    write_run(folder, steps=1, problems=31, group=16, world=World(words=words))
    made: list[dict[str, Any]] = [json.loads(line) for line in (folder / "transcripts.jsonl").read_text().splitlines()]
    logged = json.loads((folder / "metrics.jsonl").read_text())
    with (folder / "transcripts.jsonl").open("w") as file:
        for step in range(10):
            for row in made:
                again = {"step": step, "group": row["group"] + 31 * step, "id": f"{row['id']}/{step}"}
                file.write(json.dumps(row | again, separators=(",", ":")) + "\n")
    (folder / "metrics.jsonl").write_text("".join(json.dumps(logged | {"step": step}) + "\n" for step in range(STEPS)))
    return sum(row["tokens"]["total"] for row in made) / len(made)


def opening(browser: Browser, address: str, sign: str) -> float:
    context = browser.new_context()
    opened = context.new_page()
    begun = time.monotonic()
    opened.goto(address)
    opened.wait_for_selector(sign)
    spent = time.monotonic() - begun
    context.close()
    return spent


if __name__ == "__main__":
    main()
