"""Every error otcrl raises on purpose.

OtcrlError
├── ConfigError(ValueError)    the run could not be built: exit code 2, one line, no traceback
│   └── DataError              a data file, index, tokenizer or prompt is not what the config promised
│       └── NoProblems         a data file is whole, and holds nothing that its reader could use
├── ToolUnavailable            a tool's server or sandbox is down; the policy is not to blame
├── EngineError                generation or weight publication failed
└── TrainingError              the run cannot go on: loss is not finite, too many infrastructure failures
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class OtcrlError(Exception):
    """Base of all of them; its text is written for the user."""


class ConfigError(OtcrlError, ValueError):
    """The run could not be built from what the user gave."""


class DataError(ConfigError):
    """A data file, index, tokenizer or prompt is not what the config promised."""


class NoProblems(DataError):
    """A data file holds no row, or none that is a problem."""


class ToolUnavailable(OtcrlError):
    """The tool itself is down, after its own retries; never raised for what the policy did."""


class EngineError(OtcrlError):
    """Generation or weight publication failed."""


class TrainingError(OtcrlError):
    """The run cannot go on."""


def nearest(name: str, choices: Iterable[str]) -> str:
    """` Did you mean 'x'?` when something close exists, else all the choices."""
    known = sorted(choices)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    if close:
        return f" Did you mean {close[0]!r}?"
    return f" Choose from: {', '.join(known)}." if known else ""
