"""Which settings are nobody else's business: reports are passed on, and trackers show a run's config to others."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

HIDDEN = "..."
# the end of a key, or of a program's option: token, GITHUB_TOKEN, --api-key. What ends in _env is a variable's name
SECRET = re.compile(r"(^|[\W_])(token|api[-_]?key|password|passwd|secret|credentials?)$", re.IGNORECASE)
CAMEL = re.compile(r"(?<=[a-z])(?=[A-Z])")  # accessToken
OPTION = re.compile(r"(--?[\w-]+)=(.*)", re.DOTALL)


def public(node: Any) -> Any:
    """The config with `...` for what is secret: values of such keys, a program's environment, its options."""
    if isinstance(node, Mapping):
        return {key: hidden(value) if is_secret(str(key)) else public(value) for key, value in node.items()}
    if isinstance(node, list):
        before = ["", *node][:-1]
        return [HIDDEN if is_option(last) else inner(each) for last, each in zip(before, node, strict=True)]
    return node


def is_secret(key: str) -> bool:
    return key == "env" or SECRET.search(CAMEL.sub("_", key)) is not None


def is_option(word: object) -> bool:
    """Whether what follows it is secret."""
    return isinstance(word, str) and word.startswith("-") and SECRET.search(word) is not None


def inner(value: Any) -> Any:
    """As `public`, of what is in a list: `--api-key=...`."""
    found = OPTION.fullmatch(value) if isinstance(value, str) else None
    return f"{found[1]}={HIDDEN}" if found and is_option(found[1]) else public(value)


def hidden(value: Any) -> Any:
    """What is under a secret key: the names in an environment may be seen."""
    if isinstance(value, Mapping):
        return {key: hidden(each) for key, each in value.items()}
    return HIDDEN if value else value


def told(words: Sequence[str]) -> bool:
    """Whether a command line (key=value) says a secret."""
    for word in words:
        key, _, value = word.partition("=")
        options = re.findall(r"--?[\w-]+", value)
        if any(map(is_secret, re.split(r"[.+~]", key))) or any(map(is_option, options)):
            return True
    return False
