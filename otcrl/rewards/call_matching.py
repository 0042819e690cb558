"""When the calls of one turn are the ones that were wanted: all of them, in any order, and no others."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from otcrl.dialects.tool_calls import Written, read
from otcrl.protocols import Malformed

_IGNORED = re.compile(r"[ ,./\-_*^]")  # in texts, as BFCL's checker has it


def calls_of(turn: str) -> list[Written] | None:
    """The calls in a turn's `<tool_call>` tags, thoughts left out; None when one of them, or what it is, is unclear."""
    said = turn.rpartition("</think>")[2]
    calls = read(said)
    return (
        None
        if "<think>" in said or any(isinstance(call, Malformed) for call in calls)
        else [c for c in calls if isinstance(c, Written)]
    )


def same_calls(turn: str, gold: str) -> float:
    """1.0 if both turns make the same calls with the same arguments, in any order (ToolRL's exact match)."""
    calls, wanted = calls_of(turn), calls_of(gold)
    if calls is None or wanted is None or len(calls) != len(wanted):
        return 0.0
    return float(_assignable([[_equal(call, each) for each in wanted] for call in calls]))


def _equal(call: Written, wanted: Written) -> bool:
    return call.name == wanted.name and _identical(call.arguments, wanted.arguments)


def _identical(one: object, other: object) -> bool:
    """Equal as JSON: 1 is 1.0, and neither is true."""
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return one.keys() == other.keys() and all(_identical(one[key], other[key]) for key in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(_identical, one, other))
    return isinstance(one, bool) == isinstance(other, bool) and one == other


def accepted_calls(turn: str, accepted: object, functions: Sequence[Mapping[str, object]]) -> float:
    """1.0 if the turn's calls are the wanted ones, each argument with a value that is accepted (BFCL's AST check).

    `accepted`: a list of {name: {argument: [values]}}, where "" among the values says that the argument may be left
    out; "some": any call will do. `functions` say which arguments there are, which must be there, and their types.
    """
    calls = calls_of(turn)
    if calls is None:
        return 0.0
    if accepted == "some":
        return float(bool(calls))
    wanted = list(accepted) if isinstance(accepted, list) else []
    if len(calls) != len(wanted):
        return 0.0
    known = {str(function["name"]): function for function in functions}
    fits = [[_accepts(call, each, known) for each in wanted] for call in calls]
    return float(_assignable(fits))


def _assignable(fits: list[list[bool]]) -> bool:
    """Whether every row can have a column of its own that it fits (augmenting paths)."""
    owner: dict[int, int] = {}  # column -> row

    def place(row: int, tried: set[int]) -> bool:
        for column, fit in enumerate(fits[row]):
            if fit and column not in tried:
                tried.add(column)
                if column not in owner or place(owner[column], tried):
                    owner[column] = row
                    return True
        return False

    return all(place(row, set()) for row in range(len(fits)))


def _accepts(call: Written, wanted: Mapping[str, Mapping[str, list[object]]], known: Mapping[str, Mapping]) -> bool:
    (name, values) = next(iter(wanted.items()))
    parameters = known.get(name, {}).get("parameters", {})
    properties, required = parameters.get("properties", {}), parameters.get("required", [])
    if call.name != name or any(key not in call.arguments for key in required):
        return False
    if any(key not in properties or key not in values for key in call.arguments):
        return False
    if any(key not in call.arguments and "" not in listed for key, listed in values.items()):
        return False
    return all(_value(given, values[key], properties[key].get("type")) for key, given in call.arguments.items())


def _value(given: object, values: Sequence[object], kind: object) -> bool:
    if kind == "integer" and isinstance(given, float):
        return False  # while a whole number will do for a float
    return any(_matches(given, value) for value in values)


def _matches(given: object, value: object) -> bool:
    """An object's accepted values are lists again; texts are compared without case, spaces and some punctuation."""
    if isinstance(given, str) and isinstance(value, str):
        return _plain(given) == _plain(value)
    if isinstance(given, list) and isinstance(value, list):
        return len(given) == len(value) and all(map(_matches, given, value))
    if isinstance(given, Mapping) and isinstance(value, Mapping):
        inside = {key: listed if isinstance(listed, list) else [listed] for key, listed in value.items()}
        if any(key not in inside for key in given) or any(
            "" not in inside[key] for key in inside.keys() - given.keys()
        ):
            return False
        return all(any(_matches(given[key], each) for each in inside[key]) for key in given)
    return type(given) is not str and _identical(given, value)


def _plain(text: str) -> str:
    return _IGNORED.sub("", text).lower().replace("'", '"')
