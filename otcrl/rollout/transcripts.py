"""Whole trajectories as JSON lines: reading them is the debugger."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path

from otcrl.types import Reward, Trajectory


def write_transcripts(
    path: Path,
    step: int,
    scored: Iterable[tuple[Trajectory, Reward | None]],
    correct: Callable[[Trajectory], float] | None = None,
) -> None:
    """Append one line for each trajectory; `correct` judges its answer where no reward does."""
    with path.open("a", encoding="utf-8") as file:
        for t, reward in scored:
            line = {
                "step": step,
                "id": t.problem.id,
                "source": t.problem.source,
                "question": t.problem.question,
                "answers": t.problem.answers,
                "optimal_calls": t.problem.optimal_calls,
                "response": t.response,
                "answer": t.answer,
                "correct": correct(t) if correct else None if reward is None else reward.parts.get("correct"),
                "stop": t.stop,
                "violations": t.violations,
                "reward": None if reward is None else reward.value,
                "parts": {} if reward is None else reward.parts,
                "calls": [asdict(call) for call in t.tool_calls],
                "tokens": {"total": len(t.token_ids), "sampled": sum(t.action_mask)},
                "timings": t.timings,
            }
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
