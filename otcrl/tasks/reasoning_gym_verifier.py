"""Runs in the sandbox: the score that reasoning_gym's own verifier gives an answer, signed.

Some verifiers `eval` the answer, or have sympy do it. A process keeps no secret from code that runs in it, and the
signature of a score is one, so `eval` computes numbers, literals and sympy's expressions here, and calls nothing else.
"""

from __future__ import annotations

import ast
import builtins
import json
import sys
from collections.abc import Mapping
from typing import Any

import sympy
from reasoning_gym.factory import create_dataset

FUNCTIONS = {"abs", "cbrt", "max", "min", "pow", "root", "round", "sqrt", "sum"}  # that are no classes of sympy
SYNTAX = (
    *(ast.Expression, ast.Constant, ast.Name, ast.Load, ast.Call, ast.keyword),
    *(ast.List, ast.Tuple, ast.Set, ast.Dict, ast.UnaryOp, ast.BinOp, ast.BoolOp, ast.Compare),
    *(ast.operator, ast.unaryop, ast.boolop, ast.cmpop),
)
evaluate = builtins.eval


def harmless(source: Any, names: dict[str, Any] | None = None, local: Mapping[str, Any] | None = None, /) -> Any:
    """Python's `eval`, for what runs no code. Raises ValueError for anything else."""
    known = {**(names or {}), **(local or {})}
    for node in ast.walk(ast.parse(source.strip(), mode="eval")):
        if not isinstance(node, SYNTAX) or (isinstance(node, ast.Call) and not may_be_called(node.func, known)):
            raise ValueError(f"an answer may not hold {ast.unparse(node)!r}")
    return evaluate(source.strip(), {"__builtins__": {}} if names is None else names, local)


def may_be_called(function: ast.expr, known: Mapping[str, Any]) -> bool:
    if not isinstance(function, ast.Name):
        return False
    found = known.get(function.id)
    return function.id in FUNCTIONS or (isinstance(found, type) and issubclass(found, sympy.Basic))


def main() -> None:
    asked = json.load(sys.stdin)
    dataset = create_dataset(asked["dataset"], **asked["options"])
    entry = dataset[asked["index"]]
    builtins.eval = harmless
    print(asked["signature"], float(dataset.score_answer(asked["answer"], entry)))


if __name__ == "__main__":
    main()
