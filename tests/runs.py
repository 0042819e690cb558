"""A run directory as training leaves it, made up: real writers, invented trajectories."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from otcrl.evaluate.report import make_report
from otcrl.loggers.jsonl import JsonlLogger
from otcrl.protocols import Chat, Text
from otcrl.rollout.transcripts import Signal, Transcript, Transcripts
from otcrl.types import Outcome, Problem, Reward, Stop, ToolCall, Trajectory

CONFIG = {
    "task": {"_target_": "otcrl.tasks.atlas.Atlas"},
    "model": {"_target_": "otcrl.models.tiny.TinyLlama"},
    "reward": {"_target_": "otcrl.rewards.otc.OTCReward", "form": "grpo"},
    "algo": {"_target_": "otcrl.algos.grpo.GRPO"},
    "engine": {"_target_": "otcrl.rollout.hf_engine.HFEngine"},
    "tools": {"search": {"_target_": "otcrl.tools.search.SearchTool", "token": "t0p-s3cret"}},
    "name": "made_up",
    "seed": 0,
    "loop": {"steps": 40},
    "evaluate": {"counter": "well_formed"},
}
WORDS = "the a city river writer film band born capital of in which who first second known for album song team".split()


@dataclass(frozen=True)
class WordTokenizer:
    """A token for each word with the space before it; learns words as they come."""

    words: list[str] = field(default_factory=list)
    places: dict[str, int] = field(default_factory=dict)

    def encode(self, text: Text) -> list[int]:
        assert isinstance(text, str)
        found = re.findall(r"\s*\S+|\s+", text)
        for word in found:
            if word not in self.places:
                self.places[word] = len(self.words)
                self.words.append(word)
        return [self.places[word] for word in found]

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(self.words[token] for token in ids)

    def prompt_ids(self, prompt: Text) -> list[int]:
        return self.encode(prompt)

    def rewrites(self, reply: Chat) -> str:
        return ""

    pad_id = end_id = 0
    stop_ids = frozenset[int]()
    vocab_size = 0


@dataclass(frozen=True)
class World:
    """Questions that need 0, 1 or 2 calls, and a policy that over-calls less and less."""

    seed: int = 0
    words: int = 30  # of an observation
    tokenizer: WordTokenizer = field(default_factory=WordTokenizer)

    def text(self, draw: random.Random, count: int) -> str:
        return " ".join(draw.choice(WORDS) for _ in range(count))

    def problem(self, number: int, split: str = "train") -> Problem:
        draw = random.Random(f"{self.seed} {split} {number}")
        kind = ("known", "hidden", "two_hop")[number % 3]
        question = f"{self.text(draw, 9).capitalize()} {number}?"
        return Problem(f"world/{split}/{number}", question, (self.text(draw, 2),), kind, number % 3)

    def play(self, problem: Problem, eager: float, draw: random.Random, void: float = 0.0) -> Trajectory:
        """`eager`: how likely one call too many is, again and again."""
        calls = problem.optimal_calls or 0
        while calls < 4 and draw.random() < eager:
            calls += 1
        right = draw.random() < 0.9
        parts: list[tuple[str, bool]] = [("Answer the question: " + problem.question, False)]
        made = []
        for _ in range(calls):
            query, result = self.text(draw, 4), f"Doc 1 (Title: {self.text(draw, 2)}) {self.text(draw, self.words)}."
            outcome = draw.choices([Outcome.OK, Outcome.MODEL_ERROR], [0.97, 0.03])[0]
            result = result if outcome is Outcome.OK else "Error: the query is empty"
            parts += [
                (f" I should look up {self.text(draw, 5)}. <search> {query} </search>", True),
                (f" <observation>{result}</observation>", False),
            ]
            made.append(
                ToolCall("search", query, result, outcome, draw.lognormvariate(-2, 1), 0.0, draw.random() < 0.2)
            )
        if draw.random() < void:
            made.append(
                ToolCall("search", "anything", "http://127.0.0.1: connection refused", Outcome.INFRA_ERROR, 30.0)
            )
            parts.append((" <search> anything </search>", True))
        else:
            answer = problem.answers[0] if right else "nobody knows"
            parts.append((f" So it is clear. <answer> {answer} </answer>", True))
        return self.trajectory(problem, parts, made, draw)

    def trajectory(
        self, problem: Problem, parts: Sequence[tuple[str, bool]], made: Sequence[ToolCall], draw: random.Random
    ) -> Trajectory:
        encoded = [(self.tokenizer.encode(text), is_action) for text, is_action in parts]
        mask = [is_action for ids, is_action in encoded for _ in ids]
        answer = re.search("<answer> (.*) </answer>", parts[-1][0], re.DOTALL)
        return Trajectory(
            problem=problem,
            token_ids=[token for ids, _ in encoded for token in ids],
            action_mask=mask,
            logprobs=[-draw.expovariate(2) if is_action else 0.0 for is_action in mask],
            versions=[3 if is_action else -1 for is_action in mask],
            tool_calls=tuple(made),
            answer=answer[1] if answer else None,
            violations=(),
            stop=Stop.ANSWERED if answer else Stop.VOID,
            response="".join(text for text, _ in parts[1:]),
            timings={"total_s": 2.0, "generate_s": 1.5, "tool_s": sum(call.seconds for call in made)},
        )


def right(answer: str, problem: Problem) -> float:
    return float(answer == problem.answers[0])


def write_run(
    folder: Path,
    *,
    steps: int = 12,
    every: int = 3,
    problems: int = 4,
    group: int = 4,
    seed: int = 0,
    world: World | None = None,
) -> Path:
    """A finished run; transcripts of every so many steps, an evaluation before and after."""
    world = world or World(seed=seed)
    folder.mkdir(parents=True, exist_ok=True)
    config = CONFIG | {"seed": seed, "name": folder.name, "loop": {"steps": steps}}
    (folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    logger = JsonlLogger(folder / "metrics.jsonl")
    transcripts = Transcripts(path=folder / "transcripts.jsonl", tokenizer=world.tokenizer)
    for step in range(steps):
        draw, eager = random.Random(f"{seed} {step}"), 0.7 * (1 - step / steps)
        logger.log(metrics(step, eager, draw), step)
        if step % every == 0:
            transcripts.write(step, played(world, step, problems, group, eager, draw))
    for name, eager in (("before", 0.7), ("after", 0.05)):
        draw = random.Random(f"{seed} {name}")
        trajectories = [world.play(world.problem(k, "test"), eager, draw) for k in range(3 * problems)]
        make_report(trajectories, right).save(folder / "eval" / name)
        told = Transcripts(path=folder / "eval" / name / "transcripts.jsonl", tokenizer=world.tokenizer)
        told.write(
            0,
            [
                Transcript(trajectory=t, group=k, correct=right(t.answer or "", t.problem))
                for k, t in enumerate(trajectories)
            ],
        )
    logger.close()
    return folder


def played(world: World, step: int, problems: int, group: int, eager: float, draw: random.Random) -> list[Transcript]:
    found = []
    for number in range(step * problems, (step + 1) * problems):
        problem = world.problem(number)
        for sample in range(group):
            t = world.play(problem, eager, draw, void=0.01)
            if t.stop is Stop.VOID:
                found.append(Transcript(trajectory=t, group=number, sample=sample))
                continue
            correct, tool = right(t.answer or "", problem), 1 / (1 + len(t.tool_calls))
            sampled = sum(t.action_mask)
            found.append(
                Transcript(
                    trajectory=t,
                    group=number,
                    sample=sample,
                    reward=Reward(correct * tool, {"correct": correct, "tool": tool}),
                    correct=correct,
                    signal=Signal(
                        [round(draw.gauss(0, 1), 3)] * sampled, [draw.gauss(1, 0.02) for _ in range(sampled)]
                    ),
                )
            )
    return found


def metrics(step: int, eager: float, draw: random.Random) -> dict[str, float]:
    near = lambda value: value * draw.uniform(0.95, 1.05)  # noqa: E731
    calls = 1 + 2 * eager
    return {
        "reward/value": near(0.9 - eager / 2),
        "reward/correct": min(near(0.9), 1.0),
        "reward/tool": near(0.95 - eager / 2),
        "reward/sign_reversals": near(eager / 3),
        "reward/groups_with_signal": near(0.6),
        "calls/emitted": calls + 0.02,
        "calls/well_formed": calls,
        "calls/failed": 0.03 * calls,
        "calls/invalid": 0.01,
        "rollout/tokens": near(60 * calls + 40),
        "rollout/sampled_tokens": near(15 * calls + 10),
        "rollout/logprob_gap_mean": near(1e-3),
        "rollout/rewarded_logprob": -near(0.2 + eager),
        "rollout/void_share": 0.01,
        "update/kl": near(1e-3 * step),
        "update/entropy": near(0.3 + eager),
        "update/clip_fraction": near(0.01),
        "update/policy_grad_norm": near(0.5),
        "perf/tool_s": near(calls * 0.2),
        "perf/tokens_per_s": near(2000),
        "time/rollout_s": near(2 + eager),
        "time/reward_s": 0.01,
        "time/score_s": near(0.4),
        "time/transcripts_s": 0.02,
        "time/update_s": near(1.5),
        "time/sync_s": near(0.2),
        "time/step_s": near(4.2 + eager),
    }
