"""vLLM's POST /v1/completions with token ids in both directions: what is asked, and what is answered.

vLLM has a second endpoint for tokens, /inference/v1/generate. It is switched off unless the server was told otherwise,
and its answers differ between versions; this one is the same from 0.20 to 0.33.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from otcrl.rollout.submission import Part

PATH = "/v1/completions"
NO_PENALTIES = {"repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0}


def to_continue(ids: Sequence[int], settings: Mapping[str, Any], priority: int = 0) -> dict[str, Any]:
    """The body that asks for a completion; `settings` from `submission.sampling`.

    Whatever a server could have defaults of its own for (from the model's generation_config) is spelled out.
    """
    order = {"priority": priority} if priority else {}  # a server without priority scheduling refuses any other
    return {"prompt": list(ids), **settings, **NO_PENALTIES, **order, "return_token_ids": True}


def continued(answer: Mapping[str, Any], version: int) -> Part:
    """What the answer to `to_continue` brought. Raises KeyError or TypeError when it has no token ids."""
    choice = answer["choices"][0]
    ids = [*choice["token_ids"]]
    logprobs = choice["logprobs"]["token_logprobs"] if ids else []
    return Part(ids, [*logprobs], version, choice["finish_reason"])


def to_score(ids: Sequence[int]) -> dict[str, Any]:
    """The body that asks how likely `ids` are, at temperature 1."""
    return {"prompt": list(ids), "max_tokens": 1, "temperature": 1.0, "prompt_logprobs": 0, "return_token_ids": True}


def scored(answer: Mapping[str, Any], ids: Sequence[int]) -> list[float]:
    """[L] nats; 0.0 for the first token."""
    found = answer["choices"][0]["prompt_logprobs"]
    return [0.0 if at is None else at[str(token)]["logprob"] for token, at in zip(ids, found, strict=True)]
