"""Completions made of requests that may be interrupted, for engines of vLLM in this process and behind HTTP alike.

A publication of weights ends whatever is in flight, and it is submitted again afterwards with what it had: so each
token's version is known, and its prefix is computed with the weights that sample the token. An engine that dies ends
its requests too; then a request is submitted again as it was, and its seed makes it draw the same tokens.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

from otcrl.errors import EngineError
from otcrl.protocols import Completion, Tokenizer

RESETS, RESET_S = 20, 0.1  # tries to empty the prefix cache after a publication, and seconds between them
COLDEST = 0.01  # temperature above 0 of a request to vLLM; it raises a lower one to that, without a word


@dataclass(frozen=True, slots=True)
class Part:
    """What one request brought. Token lists have equal length."""

    token_ids: list[int]
    logprobs: list[float]  # nats, under the distribution that was sampled from
    version: int  # of the weights that sampled them
    end: str  # vLLM's finish_reason: stop | length | abort, when it was interrupted


Submit = Callable[[list[int], int, int], Awaitable[Part]]  # (ids so far, most new ones, seed)


async def complete(
    submit: Submit,
    token_ids: Sequence[int],
    *,
    stop: Sequence[str],
    max_tokens: int,
    seed: int,
    context: int,
    tokenizer: Tokenizer,
) -> Completion:
    """The completion of `token_ids`, from as many requests as it takes."""
    ids, start = list(token_ids), len(token_ids)
    end = min(start + max_tokens, context)
    logprobs, versions = list[float](), list[int]()
    while True:
        part = await submit(ids, end - len(ids), seed_at(seed, len(ids)))
        ids += part.token_ids
        logprobs += part.logprobs
        versions += [part.version] * len(part.token_ids)
        if part.end != "abort":
            return Completion(ids[start:], logprobs, versions, part.end == "stop")
        keep = start + resumable(ids[start:], stop, tokenizer)
        del ids[keep:], logprobs[keep - start :], versions[keep - start :]


def resumable(ids: Sequence[int], stop: Sequence[str], tokenizer: Tokenizer) -> int:
    """How many of `ids` a new request can begin with.

    A stop string that was half written could not be seen any more. And after half a character vLLM takes the whole
    prompt for new text, which ends at a stop string that the instructions quote.
    """
    keep = before_half_stop(ids, stop, tokenizer)
    while keep and tokenizer.decode(ids[:keep]).endswith("\ufffd"):
        keep -= 1
    return keep if keep == len(ids) else resumable(ids[:keep], stop, tokenizer)


def before_half_stop(ids: Sequence[int], stop: Sequence[str], tokenizer: Tokenizer) -> int:
    """How many of `ids` come before a stop string that is begun at their end; all of them when none is."""
    keep = len(ids)
    text = tokenizer.decode(ids)
    overlap = max(
        (size for string in stop for size in range(1, len(string)) if text.endswith(string[:size])), default=0
    )
    while overlap and keep and len(tokenizer.decode(ids[:keep])) > len(text) - overlap:
        keep -= 1
    return keep


def check_request(
    token_ids: Sequence[int], stop: Sequence[str], max_tokens: int, temperature: float, context: int
) -> None:
    """Raises EngineError for a request that makes no sense."""
    if not 0 < len(token_ids) < context:
        raise EngineError(f"a prompt must have 1 to {context - 1} tokens (context - 1), got {len(token_ids)}")
    if "" in stop:
        raise EngineError("a stop string must not be empty")
    if max_tokens < 1:
        raise EngineError(f"max_tokens must be at least 1, got {max_tokens}")
    if not (temperature == 0 or temperature >= COLDEST):
        raise EngineError(
            f"temperature must be 0 or at least {COLDEST}, which vLLM would use instead, got {temperature}"
        )


def sampling(
    stop: Sequence[str], max_tokens: int, temperature: float, seed: int, tokenizer: Tokenizer
) -> dict[str, Any]:
    """A request's settings by vLLM's names: the whole distribution at `temperature`, and the tokenizer's own ends."""
    return {
        "max_tokens": max_tokens,
        "temperature": temperature,
        "top_p": 1.0,
        "top_k": 0,
        "min_p": 0.0,
        "seed": seed,
        "logprobs": 0,
        "ignore_eos": True,  # of the model's config, which may differ from the tokenizer's below
        "stop": list(stop),
        "stop_token_ids": sorted(tokenizer.stop_ids | one_token(stop, tokenizer)),
        "include_stop_str_in_output": True,
        "skip_special_tokens": False,
        "spaces_between_special_tokens": False,
    }


def one_token(stop: Sequence[str], tokenizer: Tokenizer) -> set[int]:
    """Ids of the stop strings that are one token: the engine itself ends there, without a step too many."""
    encoded = (tokenizer.encode(string) for string in stop)
    return {
        ids[0] for ids, string in zip(encoded, stop, strict=True) if len(ids) == 1 and tokenizer.decode(ids) == string
    }


def seed_at(seed: int, position: int) -> int:
    """A seed for the request that begins at `position` of the trajectory with `seed`; 63 bits."""
    return stable_number(f"{seed}/{position}") >> 1


def stable_number(text: str) -> int:
    """64 bits, the same in every process."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


async def drop_prefixes(who: str, reset: Callable[[], Awaitable[bool]]) -> None:
    """What was computed with other weights. vLLM refuses while a request that was ended still holds blocks."""
    for _ in range(RESETS):
        if await reset():
            return
        await asyncio.sleep(RESET_S)
    raise EngineError(f"{who} did not empty its prefix cache: it says that what old weights computed is still in use")
