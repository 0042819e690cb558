"""What a row of a data set says, and how its fields are taken out: as what they should be, or as `Wrong`."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeGuard

Row = Mapping[str, object]
KEYS = ("id", "_id", "qid", "question_id", "QuestionId", "unique_id", "ID")  # what published rows are known by
NOT_META = ("question", *KEYS, "data_source", "extra_info", "optimal_calls")  # a problem says them in its own fields
SHOWN = 60  # characters of a value in an error


class Wrong(Exception):
    """A field that is not what the reader expects; never leaves the readers and `records.py`."""

    def __init__(self, field: str, expected: str, found: object) -> None:
        shown = repr(found)
        super().__init__(f"{field} must be {expected}, got {shown[:SHOWN]}{'...' if len(shown) > SHOWN else ''}")


@dataclass(frozen=True, slots=True)
class Paragraph:
    title: str
    text: str
    is_gold: bool


@dataclass(frozen=True, slots=True)
class Record:
    """What a row says, whatever its form."""

    question: str
    answers: tuple[str, ...]
    key: object = None  # the row's own id; None: its place in the file
    source: str | None = None  # the data set that the row says it is from
    split: str | None = None
    meta: Mapping[str, object] = field(default_factory=dict)
    paragraphs: tuple[Paragraph, ...] = ()  # that the question comes with
    gold_missing: tuple[str, ...] = ()  # titles of gold paragraphs that are not among them


def texts(value: object, where: str) -> tuple[str, ...]:
    """One text, a number, or a list of at least one of them, as texts."""
    listed = list(value) if isinstance(value, Sequence) and not isinstance(value, str) else [value]
    found = [written(item, where) if is_number(item) else item for item in listed]
    if len(found) > 2 and found[0] == "[" and all(len(str(text)) == 1 for text in found):  # seen in published files
        raise Wrong(where, "a list of texts, not one that was split into characters", "".join(map(str, found)))
    if not found or not all(isinstance(text, str) and text.strip() for text in found):
        raise Wrong(where, "one text or a list of at least one text", value)
    return tuple(str(text) for text in found)


def is_number(value: object) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def written(number: int | float, where: str) -> str:
    """As a person would write it: a column of whole numbers with a gap in it comes as 5.0, and the gap as nan."""
    if not math.isfinite(number):
        raise Wrong(where, "a text or a number", number)
    return str(int(number)) if number == int(number) else str(number)


def record_of(row: Row, question: object, answers: tuple[str, ...], *dropped: str) -> Record:
    """A record with the row's own id and, as meta, the columns that are not `dropped`."""
    if not isinstance(question, str) or not question.strip():
        raise Wrong("question", "a text", question)
    key = next((row[name] for name in KEYS if row.get(name) is not None), None)
    if not (key is None or isinstance(key, str | int | float)):
        raise Wrong("id", "a text or a number", key)
    kept = {name: value for name, value in row.items() if name not in {*NOT_META, *dropped}}
    return Record(question, answers, key, meta=kept)


def verl_record(row: Row, question: object, answers: tuple[str, ...], *dropped: str) -> Record:
    """A record of a row in verl's form, which says where it is from in `data_source` and `extra_info`."""
    info = row.get("extra_info")
    info = info if isinstance(info, Mapping) else {}
    record = record_of(row, question, answers, "prompt", "reward_model", *dropped)
    key = next((each for each in (record.key, info.get("index"), info.get("id")) if each is not None), None)
    split = info.get("split")
    return replace(
        record,
        key=key,
        source=str(row["data_source"]) if row.get("data_source") else None,
        split=str(split) if split else None,
    )


def ground_truth(row: Row) -> object:
    return mapping(row.get("reward_model"), "reward_model").get("ground_truth")


def message(row: Row, place: int) -> str:
    """The content of one message of verl's `prompt`."""
    prompt = row["prompt"]
    one = prompt[place] if isinstance(prompt, list | tuple) and prompt else None
    content = one.get("content") if isinstance(one, Mapping) else None
    if not isinstance(content, str):
        raise Wrong("prompt", "a list of messages {role, content}", prompt)
    return content


def first_of(row: Row, *names: str, where: str = "") -> tuple[object, str]:
    """(value, name) of the first of these columns that the row has."""
    for name in names:
        if name in row:
            return row[name], name
    raise Wrong(f"{where}{names[0]}", "a text", None)


def inside(row: object, *names: str) -> object:
    """What stands at this path; None where there is no such path."""
    for name in names:
        row = row.get(name) if isinstance(row, Mapping) else None
    return row


def mapping(value: object, where: str) -> Row:
    if not isinstance(value, Mapping):
        raise Wrong(where, "an object", value)
    return value


def listing(value: object, where: str) -> Sequence[object]:
    if not isinstance(value, list | tuple):
        raise Wrong(where, "a list", value)
    return value


def parsed(value: object, where: str) -> object:
    """What a JSON text holds; anything else is what it is."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise Wrong(where, "JSON", value) from error


def unique(values: Iterable[object]) -> list[object]:
    return list(dict.fromkeys(value for value in values if isinstance(value, str) or is_number(value)))
