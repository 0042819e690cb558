"""Whole trajectories as JSON lines: reading them is the debugger. docs/report.md says what a line holds."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from itertools import groupby
from pathlib import Path

from otcrl.loggers.jsonl import append
from otcrl.protocols import Tokenizer
from otcrl.rollout.token_texts import token_texts
from otcrl.types import Batch, Reward, Scores, Targets, Trajectory

DECIMALS = 4


@dataclass(frozen=True, slots=True)
class Signal:
    """What the update is told about the sampled tokens of one trajectory, in their order."""

    advantages: list[float]  # as the loss sees them, importance weights included
    ratios: list[float]  # pi_old / mu, learner over sampler, before any bound


def signals(batch: Batch, scores: Scores, targets: Targets) -> list[Signal]:
    """[B] The signal of each row."""
    ratios_BT = (scores.old_logprobs - batch.sampler_logprobs).exp()
    return [
        Signal(advantages_T[mask_T].tolist(), ratios_T[mask_T].tolist())
        for advantages_T, ratios_T, mask_T in zip(targets.advantages, ratios_BT, batch.action_mask, strict=True)
    ]


@dataclass(frozen=True, kw_only=True)
class Transcript:
    """A trajectory and what became of it."""

    trajectory: Trajectory
    group: int  # of the problem in the run's stream, or in the evaluation
    sample: int = 0  # of the trajectory in its group
    reward: Reward | None = None  # None: an evaluation, or it does not count
    correct: float | None = None  # None: nobody has judged it
    signal: Signal | None = None  # None: nothing is learned from it

    def line(self, step: int, tokenizer: Tokenizer, known: dict[int, str]) -> dict[str, object]:
        t, reward = self.trajectory, self.reward
        return {
            "step": step,
            "group": self.group,
            "sample": self.sample,
            "id": t.problem.id,
            "source": t.problem.source,
            "question": t.problem.question,
            "answers": t.problem.answers,
            "optimal_calls": t.problem.optimal_calls,
            "response": t.response,
            "answer": t.answer,
            "correct": self.correct,
            "stop": t.stop,
            "violations": t.violations,
            "reward": None if reward is None else reward.value,
            "parts": {} if reward is None else reward.parts,
            "calls": [asdict(call) for call in t.tool_calls],
            "tokens": tokens(t, self.signal, tokenizer, known),
            "timings": t.timings,
        }


def tokens(t: Trajectory, signal: Signal | None, tokenizer: Tokenizer, known: dict[int, str]) -> dict[str, object]:
    """What is known of the tokens after the prompt. `spans` and `lengths` speak of all of them, the rest of the
    sampled ones: a list has an entry for each, a number holds for all.
    """
    sampled, start = sum(t.action_mask), prompt_length(t, tokenizer)
    spans = [len(list(run)) for _, run in groupby(t.action_mask[start:])]
    said = [i for i in range(start, len(t.token_ids)) if t.action_mask[i]]
    found: dict[str, object] = {
        "total": len(t.token_ids),
        "sampled": sampled,
        "prompt": start,
        "spans": spans if not spans or t.action_mask[start] else [0, *spans],  # sampled, injected, sampled ...
        "lengths": [len(piece) for piece in token_texts(t.token_ids[start:], t.response, tokenizer.decode, known)],
        "logprobs": short([t.logprobs[i] for i in said]),
        "versions": short([t.versions[i] for i in said]),
    }
    if signal is not None:
        found |= {"advantages": short(signal.advantages), "ratios": short(signal.ratios)}
    return found


def prompt_length(t: Trajectory, tokenizer: Tokenizer) -> int:
    """Tokens before the response, which begins with the first sampled token or with what was written before it."""
    start = t.action_mask.index(True) if any(t.action_mask) else len(t.token_ids)
    while start > 0 and len(tokenizer.decode(t.token_ids[start:])) < len(t.response):
        start -= 1
    return start


def short(values: Sequence[float]) -> list[float | None] | float | None:
    """Rounded; one number where all are the same. What is not a finite number is None."""
    rounded = [round(value, DECIMALS) if math.isfinite(value) else None for value in values]
    return rounded[0] if len(set(rounded)) == 1 else rounded


@dataclass(frozen=True, kw_only=True)
class Transcripts:
    """Appends to a file, one line for each trajectory."""

    path: Path
    tokenizer: Tokenizer
    known: dict[int, str] = field(default_factory=dict, repr=False)  # what single tokens decode to

    def write(self, step: int, transcripts: Iterable[Transcript]) -> list[dict[str, object]]:
        """All of them or, where that raises OSError, none. Returns what the lines hold."""
        lines = [transcript.line(step, self.tokenizer, self.known) for transcript in transcripts]
        text = "".join(json.dumps(line, ensure_ascii=False, separators=(",", ":")) + "\n" for line in lines)
        with self.path.open("ab", buffering=0) as file:
            # half of a surrogate pair, which a tool's JSON may hold, is no UTF-8: written as \ud800, it is JSON
            append(file, text.encode(errors="backslashreplace"))
        return lines
