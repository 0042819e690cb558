"""Calls as JSON between `<tool_call>` tags: what Hermes (and Qwen) and ToolRL have in common.

Hermes writes one `{"name": ..., "arguments": {...}}` in each pair of tags, ToolRL a line `{"name": ..., "parameters":
{...}}` for each call in one pair. Both are read alike; what is wrong with a call is said in its place, and the calls
beside it stand.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from otcrl.protocols import Call, Calls, Malformed, Tool

OPEN, CLOSE = "<tool_call>", "</tool_call>"
TAG = re.compile(r"</?tool_call>")
ARGUMENTS = ("arguments", "parameters")
FORM = 'Write {"name": ..., "arguments": {...}}.'


@dataclass(frozen=True, slots=True)
class Written:
    """A call as it was written, whether or not there is such a tool."""

    name: str
    arguments: Mapping[str, object]


def read(text: str) -> list[Written | Malformed]:
    """Every attempt at a call, in order; never fails, whatever the text."""
    return [call for body in bodies(text) for call in ([body] if isinstance(body, Malformed) else objects(body))]


def bodies(text: str) -> Iterator[str | Malformed]:
    """What stands between each pair of tags, and what is wrong with tags that make no pair."""
    start = None
    for tag in TAG.finditer(text):
        if tag[0] == OPEN:
            if start is not None:
                yield Malformed(f"{OPEN} was opened again before it was closed with {CLOSE}.")
            start = tag.end()
        elif start is None:
            yield Malformed(f"{CLOSE} closes a tag that was never opened.")
        else:
            yield text[start : tag.start()]
            start = None
    if start is not None:
        yield Malformed(f"{OPEN} was opened and never closed with {CLOSE}.")


def objects(body: str) -> Iterator[Written | Malformed]:
    """The JSON objects that follow each other in `body`; reading ends at the first thing that is none."""
    decoder = json.JSONDecoder(strict=False, parse_constant=_refuse)  # not strict: raw line breaks in a string are fine
    at, end = len(body) - len(body.lstrip()), len(body.rstrip())
    if at >= end:
        yield Malformed(f"There is nothing between {OPEN} and {CLOSE}. {FORM}")
    while at < end:
        try:
            value, at = decoder.raw_decode(body, at)
        except (ValueError, RecursionError) as error:
            yield Malformed(f"A call must be JSON: {str(error)[:200]}. {FORM}")
            return
        yield _written(value)
        at += len(body[at:]) - len(body[at:].lstrip())


def _refuse(constant: str) -> object:
    raise ValueError(f"{constant} is no JSON")


def _written(value: object) -> Written | Malformed:
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        return Malformed(f"A call must be a JSON object with a name. {FORM}")
    given = [key for key in ARGUMENTS if key in value]
    arguments = value[given[0]] if given else {}
    if len(given) > 1 or not isinstance(arguments, dict):
        return Malformed(f"The arguments of {value['name']!r} must be one JSON object. {FORM}")
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:  # JSON may spell half a character, which no tool could be sent
        return Malformed(f"The call of {value['name']!r} holds half of a surrogate pair.")
    return Written(value["name"], arguments)


def asked(written: Sequence[Written | Malformed], tools: Mapping[str, Tool]) -> Call | Calls | Malformed:
    """What a turn with these calls (at least one) asks for."""
    calls = tuple(call if isinstance(call, Malformed) else _call(call, tools) for call in written)
    return calls[0] if len(calls) == 1 else Calls(calls)


def faults(written: Sequence[Written | Malformed], tools: Mapping[str, Tool] | None) -> list[str]:
    """What is wrong with the calls of a turn; where there are no `tools` to compare with, with their form alone."""
    calls = [call if tools is None or isinstance(call, Malformed) else _call(call, tools) for call in written]
    return [call.why for call in calls if isinstance(call, Malformed)]


def _call(written: Written, tools: Mapping[str, Tool]) -> Call | Malformed:
    """The call as the tool takes it: a text, or a JSON object where the tool has `parameters`."""
    name, arguments = written.name, written.arguments
    if name not in tools:
        return Malformed(f"There is no tool named {name!r}. The tools are: {', '.join(tools) or 'none'}.")
    if parameters(tools[name]) is not None:
        return Call(name, json.dumps(arguments, ensure_ascii=False))
    key = argument(tools[name])
    text = arguments.get(key)
    if len(arguments) != 1 or not isinstance(text, str):
        return Malformed(f'{name} takes one text, {{"{key}": "..."}}, got {json.dumps(arguments)[:200]}.')
    return Call(name, text)


# -- what the policy is told of a tool ----------------------------------------------------------------


def parameters(tool: Tool) -> Mapping[str, object] | None:
    """The JSON schema of what the tool takes; None: one text."""
    return getattr(tool, "parameters", None)


def argument(tool: Tool) -> str:
    """What JSON calls the one text that a tool takes."""
    return getattr(tool, "argument", "input")


def schema(tool: Tool) -> Mapping[str, object]:
    """`{name, description, parameters}`, the last a JSON schema."""
    text = {"type": "object", "properties": {argument(tool): {"type": "string"}}, "required": [argument(tool)]}
    return {"name": tool.name, "description": tool.description, "parameters": parameters(tool) or text}


def described(tool: Tool) -> str:
    """The tool's description, with the JSON that it takes where that is more than a text."""
    if (takes := parameters(tool)) is None:
        return tool.description
    return f"{tool.description} Write JSON, by this schema: {json.dumps(takes, ensure_ascii=False)}"


def arguments_of(tool: Tool | None, text: str) -> Mapping[str, object]:
    """The JSON object that a demonstration writes for `text`: what the tool would be given."""
    if tool is None or parameters(tool) is None:
        return {argument(tool) if tool else "input": text}
    return json.loads(text)


def dumped(value: object) -> str:
    """JSON in which no string can look like a tag."""
    return (
        json.dumps(value, ensure_ascii=False)
        .replace("<tool_call>", "\\u003ctool_call>")
        .replace("</tool_call>", "\\u003c/tool_call>")
    )
