"""What is refused before a run begins: settings and parts that do not fit each other.

Each part checks itself when it is made; here is what can only be seen when several are together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from otcrl.algos.mismatch import Correction
from otcrl.dialects.hermes import EXAMPLE
from otcrl.errors import ConfigError, DataError
from otcrl.evaluate.attempts import check_column
from otcrl.experiment import Evaluate
from otcrl.protocols import (
    Algorithm,
    Calls,
    Chat,
    Dialect,
    Malformed,
    Message,
    Prepares,
    RewardFn,
    Task,
    Tokenizer,
    Tool,
)
from otcrl.rewards.format import FormatReward, fault
from otcrl.rollout.loop import Player
from otcrl.sft import Sft, batch
from otcrl.tell import tell
from otcrl.train import Loop
from otcrl.types import Problem

if TYPE_CHECKING:
    from otcrl.models.tokenizer import HFTokenizer

MOST_CHECKED = 2000  # prompts of each split that are tried before a run begins


def check_names(cfg: Mapping[str, Any]) -> None:
    """Raises ConfigError for a setting beside the groups that is of another kind or outside its range."""
    kinds = {"name": str, "run_dir": str, "seed": int, "resume": str, "resume_changed": bool}
    for key, kind in kinds.items():
        if type(cfg[key]) is not kind:
            raise ConfigError(f"{key} must be {kind.__name__}, got {cfg[key]!r}")
        if cfg[key] == "":
            raise ConfigError(f"{key} must not be empty")
    threads = cfg.get("threads")
    if threads is not None and (type(threads) is not int or threads < 1):
        raise ConfigError(f"threads must be null or at least 1, got {threads!r}")
    if not 0 <= cfg["seed"] < 2**32:
        raise ConfigError(f"seed must be at least 0 and below 2**32, got {cfg['seed']}")


def check_deadlines(tools: Mapping[str, Tool], limit_s: float) -> None:
    """Raises ConfigError for a tool that would be given up before its own deadline, the one that it can act upon."""
    for name, tool in tools.items():
        own_s = getattr(tool, "timeout_s", 0.0)
        if own_s >= limit_s:
            raise ConfigError(
                f"tools: {name} has timeout_s={own_s:g}, and rollout.limits.tool_timeout_s is {limit_s:g}: the tool's "
                "own must be shorter, for it alone knows what to do then"
            )


def check_group_size(size: int, algo: Algorithm, reward: RewardFn) -> None:
    """Raises ConfigError for one trajectory a problem where the algorithm or the reward compares siblings."""
    for part, instead in ((algo, "algo=ppo or algo=reinforce_pp"), (reward, "reward=otc_ppo")):
        if size < 2 and part.needs_groups:
            raise ConfigError(
                f"rollout.group_size is {size}, and {type(part).__name__} compares trajectories of one problem: "
                f"use 2 or more, or {instead}"
            )


def check_reward(reward: RewardFn, algo: Algorithm, task: Task, dialect: Dialect, tools: Mapping[str, Tool]) -> None:
    """Raises ConfigError for a reward that says nothing of this task, this dialect or to this algorithm."""
    within = getattr(reward, "reward", reward)  # Overlong's
    if getattr(within, "imitates", False) and not getattr(task, "imitates", False):
        raise ConfigError(
            f"reward is {type(within).__name__}, which compares a turn with a published one, and the task has none: "
            "use task=tool_calls, or another reward"
        )
    if getattr(reward, "can_be_negative", False) and getattr(algo, "refuses_negative", False):
        raise ConfigError(
            f"algo is {type(algo).__name__}, which divides by a group's mean reward, and {type(reward).__name__} can "
            "be below 0: use reward=outcome, reward=otc_grpo, or another algo"
        )
    if (
        isinstance(within, FormatReward)
        and within.rules == "sequence"
        and (why := fault(well_formed(dialect, tools), within.calls, within.result))
    ):
        raise ConfigError(
            f"reward.rules is 'sequence', and what {type(dialect).__name__} writes never keeps to it with "
            f"reward.calls={list(within.calls)} and reward.result={within.result!r} ({why}): use "
            "reward.rules=dialect, or leave calls and result empty"
        )


def well_formed(dialect: Dialect, tools: Mapping[str, Tool]) -> str:
    """A response with a thought, a call of each tool and an answer, as the dialect writes them."""
    thought = "<think> t </think>"
    called = () if isinstance(dialect, Prepares) else tools  # there the policy makes none
    turns = [f"{thought}{dialect.write_call(name, 'q')}{dialect.observation('r')}" for name in called]
    return "".join([*turns, thought, dialect.write_answer("a")])


def check_correction(correction: Correction, algo: Algorithm) -> None:
    """Raises ConfigError where tokens are masked one by one, and the algorithm's ratio is that of a trajectory.

    There its tokens' weights act by their mean alone, so a masked token would keep its gradient.
    """
    if (correction.level, correction.bound) == ("token", "mask") and getattr(algo, "whole_ratio", False):
        raise ConfigError(
            f"correction.bound=mask at correction.level=token leaves out tokens, and {type(algo).__name__} takes or "
            "leaves a whole trajectory: use correction.level=geometric or sequence, or correction.bound=truncate"
        )


def check_dialect(dialect: Dialect, task: Task, tokenizer: HFTokenizer, tools: Mapping[str, Tool]) -> None:
    """Raises ConfigError when the task needs another dialect, or it cannot be written or cannot use the tools."""
    imitates = getattr(dialect, "calls", "run") == "imitate"
    if imitates != getattr(task, "imitates", False):
        what = "compares a whole turn" if not imitates else "is not about calls to imitate"
        fix = "dialect=toolrl, or dialect=hermes dialect.calls=imitate" if not imitates else "dialect.calls=run"
        raise ConfigError(f"the task {what}: use {fix}")
    openings = (dialect.open_call(tool) for tool in tools)
    for text in (*dialect.stop(tools), *openings, dialect.open_answer()):
        if "".join(text.split()) not in "".join(tokenizer.decode(tokenizer.encode(text)).split()):
            raise DataError(
                f"the tokenizer has no tokens for {text!r}, which the dialect needs: take another model (model=tiny "
                "knows the task's words() and no others)"
            )
    try:
        dialect.check(tokenizer, tools)
    except ConfigError as error:
        raise type(error)(f"dialect: {error}") from error
    own = task.held_out() if imitates else []  # with messages of their own
    check_template(dialect, own[0] if own else EXAMPLE, tokenizer, tools)


def tell_unread(problems: Sequence[Problem], tokenizer: HFTokenizer) -> None:
    """Says how many questions the model cannot read, as a model with a token a word cannot read those of others."""

    def letters(text: str) -> str:
        return "".join(text.split()).lower()

    tried = problems[:MOST_CHECKED]
    unread = [p for p in tried if letters(tokenizer.decode(tokenizer.encode(p.question))) != letters(p.question)]
    if unread:
        tell(f"{len(unread)} of {len(tried)} questions hold what the tokenizer cannot read, as {unread[0].question!r}")


def check_template(dialect: Dialect, problem: Problem, tokenizer: HFTokenizer, tools: Mapping[str, Tool]) -> None:
    """Raises DataError when the chat template loses a message: the policy would not hear of its tools, or be asked."""

    def seen(ids: list[int]) -> str:
        return "".join(tokenizer.decode(ids).split())  # templates may trim

    prompt = dialect.prompt(problem, tools)
    shown = seen(tokenizer.prompt_ids(prompt))
    for message in prompt.messages if isinstance(prompt, Chat) else (Message("user", prompt),):
        if seen(tokenizer.encode(message.content)) not in shown:
            raise DataError(
                f"dialect: {tokenizer.template.name} does not write the {message.role} message of "
                f"{type(dialect).__name__}: {message.content[:60]!r} is not in the prompt as it is. Use another model, "
                "or model.chat=false"
            )


def check_evaluation(config: Evaluate, task: Task, dialect: Dialect) -> None:
    """Raises ConfigError for what an evaluation would only find out at its end."""
    check_column(task.held_out(), config.difficulty)
    if config.offloading and isinstance(dialect, Prepares):
        raise ConfigError("evaluate.offloading takes tools away and forces calls, and this dialect leaves neither to "
                          "the policy: set it to false")  # fmt: skip


def check_questions(player: Player, task: Task, loop: Loop) -> None:
    """Raises DataError for a prompt that is empty or too long, and ConfigError when there is nothing to ask."""
    asked = task.sample(0, min(loop.steps * loop.problems_per_step, MOST_CHECKED))
    held_out = task.held_out()
    if not held_out:
        raise ConfigError("the task has no evaluation problems, and a run is judged by them")
    for problem in (*asked, *held_out[:MOST_CHECKED]):
        player.check(problem)


def check_demonstrations(
    sft: Sft, task: Task, dialect: Dialect, tokenizer: Tokenizer, tools: Mapping[str, Tool]
) -> None:
    """Raises ConfigError for demonstrations that the cold start could not use, or that call what is not there."""
    sft = replace(sft, batch_size=max(sft.batch_size, 64))  # so that every kind is likely to be among them
    batch(0, tokenizer, task, dialect, sft)
    for demo in task.demonstrations(0, sft.batch_size, dialect):
        for segment, following in pairwise(demo):
            if segment.is_action and not following.is_action:
                action = dialect.parse(segment.text, tools)
                for call in action.calls if isinstance(action, Calls) else [action]:
                    if isinstance(call, Malformed):
                        raise ConfigError(f"sft: a demonstration holds a call that cannot be made. {call.why}")
