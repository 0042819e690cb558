"""The extension points. Implement one of these in one file, name it in one yaml.

A component's constructor is its config schema: the yaml lists exactly the constructor's fields.
Members that a frozen dataclass satisfies are declared as properties: to a type checker a plain
annotation would mean "mutable".
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from otcrl.types import Batch, Forward, Metrics, Outcome, Problem, Reward, Scores, Targets, TokenLoss, Trajectory

if TYPE_CHECKING:
    from torch import Tensor


# -- tasks --------------------------------------------------------------------------------------


class Task(Protocol):
    """Where problems come from, and when an attempt at one is right."""

    def sample(self, step: int, count: int) -> list[Problem]:
        """The `count` training problems of `step`; same step, same problems."""
        ...

    def held_out(self) -> list[Problem]:
        """Every evaluation problem, in a fixed order."""
        ...

    def correct(self, answer: str, problem: Problem) -> float:
        """1.0 if the answer is right, 0.0 if not; in between only for partial credit."""
        ...

    def demonstrations(self, step: int, count: int, dialect: Dialect) -> list[Demo]:
        """The SFT examples of `step`; same step, same examples. Raises ConfigError if the task has none."""
        ...


# -- how the policy writes and reads -------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Message:
    role: str  # system, user, assistant or tool
    content: str


@dataclass(frozen=True, slots=True)
class Chat:
    """Messages, which the tokenizer's chat template writes. `str` gives their contents alone."""

    messages: tuple[Message, ...]
    functions: tuple[str, ...] = ()  # what the policy can call, each as JSON in OpenAI's form; the template shows them

    def __str__(self) -> str:
        return "\n\n".join(message.content for message in self.messages)


Text = str | Chat  # what is said to the policy


@dataclass(frozen=True, slots=True)
class Segment:
    """A piece of a demonstration; only actions are trained on, and they are plain text."""

    said: Text
    is_action: bool

    @property
    def text(self) -> str:
        return str(self.said)


Demo = Sequence[Segment]  # the first segment is the prompt: `Tokenizer.prompt_ids` opens it, as in a rollout


@dataclass(frozen=True, slots=True)
class Call:
    """The policy asks for a tool."""

    tool: str
    arguments: str  # text, or the JSON object of a tool that has `parameters`


@dataclass(frozen=True, slots=True)
class Answer:
    """The policy gives its final answer."""

    text: str


@dataclass(frozen=True, slots=True)
class Malformed:
    """The policy tried and got the form wrong; `why` is shown to it as an observation."""

    why: str


@dataclass(frozen=True, slots=True)
class Calls:
    """Several calls in one turn. They run in their order, and one observation has a result for each."""

    calls: tuple[Call | Malformed, ...]


@dataclass(frozen=True, slots=True)
class Nothing:
    """Neither a call nor an answer, nor an attempt at one."""


Action = Call | Calls | Answer | Malformed | Nothing


class Dialect(Protocol):
    """How the policy writes a call or an answer, and how it is shown a result.

    `prompt`, `observation`, `write_call`, `write_answer` make text; `parse` and `violations` read it.
    Reading never changes tokens: a tag that ends inside a token leaves the whole token in place, and the
    token that ended the turn is not in the text that is read.
    """

    @property
    def ends_with_stop_token(self) -> bool:
        """True when an answer is over only at the end-of-text token, so demonstrations must show it."""
        ...

    def check(self, tokenizer: Tokenizer, tools: Mapping[str, Tool]) -> None:
        """Before a run: raises ConfigError when the dialect cannot be used with these tools or this chat template."""
        ...

    def stop(self, tools: Mapping[str, Tool]) -> Sequence[str]:
        """Strings that end a completion, for the engine to watch for."""
        ...

    def prompt(self, problem: Problem, tools: Mapping[str, Tool]) -> Text:
        """What opens a trajectory; a plain text is the user's message where there is a chat template."""
        ...

    def parse(self, text: str, tools: Mapping[str, Tool]) -> Action:
        """What one completion asks for; `text` is sampled text only."""
        ...

    def observation(self, *results: str) -> Text:
        """What is injected to carry the results of a turn's calls, tags and white space included."""
        ...

    def violations(self, sampled_turns: Sequence[str], tools: Mapping[str, Tool]) -> tuple[str, ...]:
        """Format rules that a trajectory's sampled turns break; empty when well-formed."""
        ...

    def write_call(self, tool: str, arguments: str) -> str: ...

    def write_answer(self, text: str) -> str: ...

    def open_call(self, tool: str) -> str:
        """The text that opens a call, for evaluation with a call forced; `write_call` starts with it."""
        ...

    def open_answer(self) -> str:
        """The text that opens an answer, for evaluation with tools off; `write_answer` starts with it."""
        ...


@runtime_checkable
class Prepares(Protocol):
    """What a dialect has beside the above if something is done for the policy before it writes anything."""

    @property
    def opening(self) -> str:
        """Text that is written for it after the prompt, and read with what follows; "" for none."""
        ...

    def look_up(self, problem: Problem) -> Call | None:
        """The call that is made for it, and counts as one of its own; None: none is."""
        ...

    def prompt_with(self, problem: Problem, found: str) -> str:
        """The text that opens a trajectory, with the call's result in it."""
        ...


@runtime_checkable
class Remembers(Protocol):
    """What a dialect has beside the above if an answer counts that was given before the last turn."""

    def answered(self, sampled_turns: Sequence[str]) -> str | None:
        """The answer of a trajectory whose last turn gives none; None: no turn did."""
        ...


@runtime_checkable
class Concludes(Protocol):
    """What a dialect has beside the above if its last turn is for the answer alone.

    That is the turn once the budget of calls is spent, or only one turn is left: it stops, and is read, as if there
    were no tools.
    """

    @property
    def conclusion(self) -> str | None:
        """Text that is written for the policy before that turn; "" for none. None: the last turn is as any other."""
        ...


class Tokenizer(Protocol):
    def encode(self, text: Text) -> list[int]:
        """Ids of `text` as plain text: control tokens are neither added nor recognised in it.

        A passage that spells out an end-of-turn token must not end the policy's turn. For a Chat: what the chat
        template writes between the token that ended the policy's turn and its next one, around contents that are
        plain text. Raises DataError when it cannot be written.
        """
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`, special tokens kept, no clean-up of spaces."""
        ...

    def prompt_ids(self, prompt: Text) -> list[int]:
        """Ids that open a trajectory: the chat template (or the start token) is applied here.

        Raises DataError when the prompt cannot be written.
        """
        ...

    def rewrites(self, reply: Chat) -> str:
        """How the chat template would change what stands before `reply` once it is there; "" if it only appends."""
        ...

    @property
    def pad_id(self) -> int: ...

    @property
    def end_id(self) -> int:
        """The token that ends the policy's turn: the chat template's, else the end of the text."""
        ...

    @property
    def stop_ids(self) -> frozenset[int]:
        """Token ids that end a completion (end of text, end of turn)."""
        ...

    @property
    def vocab_size(self) -> int: ...


# -- tools -----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ToolResult:
    text: str  # what the policy is shown; "(no result)" for an empty one
    outcome: Outcome = Outcome.OK  # OK or MODEL_ERROR
    cached: bool = False
    price: float = 0.0


class Tool(Protocol):
    """Something the policy can call. `name` is what the dialect writes.

    A tool takes one text, which dialects that write JSON call `argument` (its attribute, else "input"). One that
    takes more than a text has `parameters` instead, the JSON schema of an object; `run` gets that object as JSON.

    It may also have `is_local`, True where answers come from this machine within moments, so that an engine may wait
    for them (otcrl/rollout/pace.py), `identity`, the text that names what it answers from: a checkpoint keeps it, and
    an async `start`, awaited before the first call where that would wait for more than itself, such as an index.
    """

    @property
    def name(self) -> str: ...

    @property
    def description(self) -> str:
        """One sentence for the prompt: what it does and what to write in it."""
        ...

    async def run(self, arguments: str, session: str) -> ToolResult:
        """The result of one call. `session` names the trajectory, for a tool that remembers its earlier calls.

        Raises ToolUnavailable when the tool itself is down, after retries.
        """
        ...

    async def release(self, session: str) -> None:
        """The trajectory is over: free what was kept for it, if anything."""
        ...

    async def close(self) -> None:
        """Free processes and files; called once."""
        ...


# -- rewards and algorithms -----------------------------------------------------------------------


class RewardFn(Protocol):
    """Scores whole groups, so a reward may compare siblings. Void trajectories are not among them."""

    def __call__(self, trajectories_PG: Sequence[Sequence[Trajectory]]) -> list[list[Reward]]: ...

    @property
    def needs_groups(self) -> bool:
        """True when it means nothing for a problem with a single trajectory: it compares siblings."""
        ...

    def state_dict(self) -> dict[str, float]:
        """What must survive a restart (the table of n); {} when stateless."""
        ...

    def load_state_dict(self, state: Mapping[str, float]) -> None: ...


class Algorithm(Protocol):
    """Two pure functions: what to move towards, and the per-token loss that does it.

    One whose ratio is a trajectory's, not a token's, says so by `whole_ratio = True`.
    """

    @property
    def needs_critic(self) -> bool: ...

    @property
    def needs_groups(self) -> bool:
        """True when a problem with a single trajectory teaches nothing: the group is the baseline."""
        ...

    @property
    def needs_reference(self) -> bool: ...

    @property
    def weighting(self) -> str | int:
        """How tokens are averaged into one loss: see `functional.token_weights`."""
        ...

    @property
    def only_advantages_matter(self) -> bool:
        """True when a row whose advantages are all 0 adds nothing to the gradient, so it may be left out."""
        ...

    @property
    def trains_entropy(self) -> bool:
        """True when the loss holds an entropy term; otherwise entropy is only measured."""
        ...

    def targets(self, batch: Batch, scores: Scores) -> Targets: ...

    def token_loss(self, new: Forward, batch: Batch, scores: Scores, targets: Targets) -> TokenLoss: ...


# -- engines and loggers ----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Completion:
    token_ids: list[int]  # [L] as sampled; the token that completed a stop string is whole
    logprobs: list[float]  # [L] nats, of the distribution that was sampled from (after temperature)
    versions: list[int]  # [L] weights that sampled each token
    finished: bool  # True: a stop string or stop token ended it; False: max_tokens did


class Engine(Protocol):
    """Turns token ids into more token ids."""

    @property
    def version(self) -> int: ...

    @property
    def context(self) -> int:
        """Most tokens a trajectory may hold."""
        ...

    async def generate(
        self,
        token_ids: Sequence[int],
        *,
        stop: Sequence[str],
        max_tokens: int,
        temperature: float,
        seed: int,
        session: str,
        priority: int = 0,
    ) -> Completion:
        """Continue `token_ids` by at most `max_tokens` sampled ids (temperature 0: the likeliest).

        The draw at a position depends on (seed, position) alone, never on what else is running.
        Calls of one `session` extend each other's tokens, so its cache is kept until `release`.
        Where there is a queue, a lower `priority` goes first. Raises EngineError when generation fails.
        """
        ...

    async def score(self, token_ids: Sequence[int]) -> list[float]:
        """[L] log-probs (nats, temperature 1) of `token_ids` under the engine's weights; 0.0 for the first.

        The proof that the engine has the learner's weights rests on it. Raises EngineError when it cannot.
        """
        ...

    def release(self, session: str) -> None:
        """The trajectory is over; its cache may go."""
        ...

    async def sleep(self) -> None:
        """The learner works now: give back what memory can be given. `load_weights` wakes the engine."""
        ...

    async def load_weights(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Sample from `weights` from now on; trajectories under way go on with them.

        Raises EngineError naming a parameter that is missing, unknown, of another shape or damaged on its way.
        """
        ...

    async def close(self) -> None: ...


class Logger(Protocol):
    def log(self, metrics: Metrics, step: int) -> None: ...

    def close(self) -> None: ...


@runtime_checkable
class Reads(Protocol):
    """What a logger has beside the above if it shows trajectories."""

    def read(self, transcripts: Sequence[Mapping[str, Any]], step: int) -> None:
        """Trajectories of the step, each as transcripts.jsonl has it (docs/report.md)."""
        ...
