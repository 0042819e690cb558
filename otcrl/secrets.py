"""Which settings are nobody else's business: reports are passed on, and trackers show a run's config to others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

SECRETS = ("token", "api_key", "password", "secret")


def public(node: Any) -> Any:
    """The config with `...` for what is secret."""
    if not isinstance(node, Mapping):
        return node
    return {key: "..." if key in SECRETS and value else public(value) for key, value in node.items()}


def told(words: Sequence[str]) -> bool:
    """Whether a command line (key=value) says a secret."""
    return any(word.partition("=")[0].split(".")[-1] in SECRETS for word in words)
