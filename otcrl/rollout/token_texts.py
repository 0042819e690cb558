"""Which characters of a decoded text came from which token."""

from __future__ import annotations

from collections.abc import Callable, Sequence

Decode = Callable[[Sequence[int]], str]

_BROKEN = "\ufffd"  # what bytes that are no whole character decode to
_MOST = 8  # tokens that one character can be spread over, and then some


def token_texts(ids: Sequence[int], text: str, decode: Decode, known: dict[int, str]) -> list[str]:
    """The piece of `text`, which is `decode(ids)`, that each token stands for; together they are `text`.

    Where a character is spread over several tokens the last of them has it and the others have "". Decoded by
    itself a token may lack the space before it, which belongs to it all the same. `known` remembers what single
    tokens decode to; give the same one for the next text.
    """
    pieces: list[str] = []
    at = 0  # characters of `text` that have their token
    while len(pieces) < len(ids):
        piece = known.get(ids[len(pieces)], _BROKEN)
        if _BROKEN not in piece and text.startswith(piece, at):  # nearly always
            pieces.append(piece)
        else:
            count, piece = _next(ids[len(pieces) : len(pieces) + _MOST], text, at, decode, known)
            pieces += [""] * (count - 1) + [piece]
        at += len(piece)
    if pieces:
        pieces[-1] += text[at:]
    return pieces


def _next(ids: Sequence[int], text: str, at: int, decode: Decode, known: dict[int, str]) -> tuple[int, str]:
    """How many of `ids`, at least one, stand for the next piece of `text`, and that piece."""
    if ids[0] not in known:
        known[ids[0]] = decode(ids[:1])
    broken = ""
    for count in range(1, len(ids) + 1):
        alone = known[ids[0]] if count == 1 else decode(ids[:count])
        for piece in (alone, f" {alone}"):
            if text.startswith(piece, at):
                if _BROKEN not in piece:
                    return count, piece
                broken = broken or (piece if count == 1 else "")
    return 1, broken
