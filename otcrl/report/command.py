"""`otcrl report`: runs as one HTML file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

from otcrl import __version__
from otcrl.errors import ConfigError
from otcrl.report.build import content
from otcrl.report.files import read_runs
from otcrl.report.page import page

OWN = ("out", "trajectories")
MOST = 5000


def report(folders: Sequence[str], named: Mapping[str, str]) -> None:
    """Writes `out=FILE`. Raises ConfigError for what is no run, and DataError for files that cannot be read."""
    if not folders:
        raise ConfigError("otcrl report needs a run directory: otcrl report runs/NAME")
    out, most = Path(named.get("out") or "report.html"), whole_number(named.get("trajectories", str(MOST)))
    found = content(read_runs([Path(folder) for folder in folders]), most)
    title = " · ".join(run["name"] for run in found.runs)
    text = page(found, title, f"otcrl {__version__}, {datetime.now(UTC):%Y-%m-%d %H:%M} UTC")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"out={out}: {error.strerror or error}") from error
    left_out = f" ({found.left_out:,} left out: trajectories=N)" if found.left_out else ""
    print(f"otcrl: wrote {out}: {len(found.details):,} trajectories{left_out}, {len(text) / 1e6:.1f} MB")


def whole_number(text: str) -> int:
    if not text.isdecimal():
        raise ConfigError(f"trajectories must be a whole number of at least 0, got {text!r}")
    return int(text)
