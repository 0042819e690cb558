"""A tool: a calculator under the name that Atlas's demonstrations call, so no sandbox is needed.

otcrl train conf=quickstart tools=calculator
"""

from __future__ import annotations

from dataclasses import dataclass

from otcrl.protocols import ToolResult
from otcrl.tasks.arithmetic import evaluate
from otcrl.types import Outcome


@dataclass(frozen=True, kw_only=True)
class Calculator:
    """Sums and products of whole numbers."""

    name: str
    description: str
    largest: int  # a result beyond this is refused

    argument = "expression"  # what dialects that write JSON call the text that `run` takes
    is_local = True  # it answers within moments, so an engine may wait for it

    def __post_init__(self) -> None:
        if self.largest < 1:
            raise ValueError(f"largest must be at least 1, got {self.largest}")

    async def run(self, arguments: str, session: str) -> ToolResult:
        """What the expression is worth. An expression that is none is the policy's failure, and it is told why."""
        try:
            value = evaluate(arguments)
        except (ValueError, RecursionError) as error:  # no sum (a DataError is a ValueError); one of a thousand terms
            return ToolResult(f"Error: {error}", Outcome.MODEL_ERROR)
        if abs(value) > self.largest:
            return ToolResult(f"Error: the result is beyond {self.largest}", Outcome.MODEL_ERROR)
        return ToolResult(str(value))

    async def release(self, session: str) -> None:
        """Nothing is remembered of a trajectory."""

    async def close(self) -> None:
        """Nothing is open."""
