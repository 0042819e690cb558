"""Published forms of a question and its answers, each read by one function: a row in, a `Record` out.

A file is read by one reader: the one that is named, or the first of `READERS` whose columns its first row has. A row
that does not hold what its reader promises is a `Wrong` field, which `records.py` turns into an error with the file and
the row in it. Where a form has supporting passages, the record has them too.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NoReturn

from otcrl.dialects.torl import boxed
from otcrl.errors import DataError, nearest

Row = Mapping[str, object]
KEYS = ("id", "_id", "qid", "question_id", "QuestionId", "unique_id", "ID")  # what published rows are known by
ANSWERS = ("answers", "golden_answers", "answer", "Answer")
SEARCH_R1_MARK = "Question:"  # Search-R1's instructions end with it
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


@dataclass(frozen=True, slots=True)
class Reader:
    read: Callable[[Row], Record]  # raises Wrong
    fits: Callable[[Row], bool]  # by its columns alone
    needs: str  # what `fits` looks for
    repeats: bool = False  # the published files hold rows several times, which count once


# -- questions with short answers ----------------------------------------------------------------------


def plain(row: Row) -> Record:
    """`{id, question, answers: [...]}`, one answer or several, under any of `ANSWERS`: FlashRAG, NQ-open, Bamboogle."""
    question, key = _first(row, "question", "Question")
    column = next((name for name in ANSWERS if row.get(name) is not None), None)
    if column is None:
        raise Wrong("answers", "one text or a list of at least one text", None)
    # FlashRAG's `metadata` holds whole pages
    return _record(row, question, texts(row[column], column), key, "metadata", *ANSWERS)


def triviaqa(row: Row) -> Record:
    """TriviaQA's file or its copy on the hub: a value and its aliases."""
    question, key = _first(row, "question", "Question")
    answer = _mapping(row.get("answer", row.get("Answer")), "answer")
    value, _ = _first(answer, "value", "Value", inside="answer.")
    aliases = answer.get("aliases", answer.get("Aliases")) or []
    dropped = ("entity_pages", "search_results", "EntityPages", "SearchResults", *ANSWERS)
    return _record(row, question, texts(_unique([value, *_list(aliases, "answer.aliases")]), "answer"), key, *dropped)


def popqa(row: Row) -> Record:
    """PopQA: the answers are a JSON list in a text."""
    answers = _parsed(row["possible_answers"], "possible_answers")
    return _record(row, row["question"], texts(answers, "possible_answers"), "question", "possible_answers")


def strategyqa(row: Row) -> Record:
    """StrategyQA: yes or no."""
    if not isinstance(row["answer"], bool):
        raise Wrong("answer", "true or false", row["answer"])
    answers = ("yes",) if row["answer"] else ("no",)
    return _record(row, row["question"], answers, "question", "answer", "evidence")


def hotpotqa(row: Row) -> Record:
    """HotpotQA and 2WikiMultihopQA, their files or their copies on the hub, with the paragraphs they come with."""
    facts, context = _parsed(row["supporting_facts"], "supporting_facts"), _parsed(row["context"], "context")
    if isinstance(facts, Mapping):  # the hub keeps a list of pairs as a pair of lists
        facts = [[title] for title in _list(facts.get("title"), "supporting_facts.title")]
    if isinstance(context, Mapping):
        sentences = context.get("sentences", context.get("content"))
        titles, bodies = _list(context.get("title"), "context.title"), _list(sentences, "context.sentences")
        context = list(zip(titles, bodies, strict=False))
    gold = {str(title) for fact in _list(facts, "supporting_facts") for title in _list(fact, "supporting_facts")[:1]}
    paragraphs = []
    for pair in _list(context, "context"):
        if len(_list(pair, "context")) != 2:
            raise Wrong("context", "pairs of a title and its sentences", pair)
        title, sentences = _list(pair, "context")
        text = "".join(str(each) for each in _list(sentences, "context"))
        paragraphs.append(Paragraph(str(title), text.strip(), str(title) in gold))
    record = _record(
        row, row["question"], texts(row["answer"], "answer"), "question", "answer", "supporting_facts", "context"
    )
    return replace(record, paragraphs=tuple(paragraphs))


def musique(row: Row) -> Record:
    """MuSiQue-Answerable: the answer and its aliases, and twenty paragraphs."""
    if row.get("answerable") is False:
        raise Wrong("answerable", "true: this is MuSiQue-Full, and musique_ans is the one with answers", False)
    paragraphs = []
    for number, each in enumerate(_list(row["paragraphs"], "paragraphs")):
        each = _mapping(each, f"paragraphs[{number}]")
        text = str(each.get("paragraph_text", ""))
        paragraphs.append(Paragraph(str(each.get("title", "")), text.strip(), bool(each.get("is_supporting"))))
    answers = _unique([row["answer"], *_list(row.get("answer_aliases") or [], "answer_aliases")])
    record = _record(
        row, row["question"], texts(answers, "answer"), "question", "answer", "answer_aliases", "paragraphs"
    )
    return replace(record, paragraphs=tuple(paragraphs))


# -- mathematics --------------------------------------------------------------------------------------


def gsm8k(row: Row) -> Record:
    """GSM8K: the answer stands behind `####`, at the end of the solution."""
    solution = row["answer"]
    _, mark, answer = solution.rpartition("####") if isinstance(solution, str) else ("", "", "")
    if not mark or not answer.strip():
        raise Wrong("answer", "a solution that ends with '#### NUMBER'", solution)
    record = _record(row, row["question"], (answer.strip().replace(",", ""),), "question", "answer")
    return replace(record, meta={**record.meta, "solution": solution})


def math(row: Row) -> Record:
    r"""MATH, MATH-500 and AIME: `problem` and `answer`, or a `solution` whose last `\boxed{}` is the answer."""
    question, key = _first(row, "problem", "Problem")
    answer = row.get("answer", row.get("Answer"))
    if answer is None:
        solution = row.get("solution", row.get("Solution"))
        found = boxed(solution) if isinstance(solution, str) else []
        if not found:
            raise Wrong("solution", r"a text with a \boxed{answer}, where there is no answer", solution)
        answer = found[-1]
    return _record(row, question, texts(answer, "answer"), key, "answer", "Answer")


# -- files of verl: a prompt, and the ground truth of a rule -------------------------------------------


def search_r1(row: Row) -> Record:
    """Search-R1's parquet: what follows the last `Question:` of its prompt, or the `question` column."""
    target = _mapping(_truth(row), "reward_model.ground_truth")["target"]
    question = row.get("question")
    if question is None:
        question = _content(row, -1).rsplit(SEARCH_R1_MARK, 1)[-1].strip()
        if not question:
            raise Wrong("prompt", f"instructions with a question behind {SEARCH_R1_MARK!r}", row["prompt"])
    return _verl(row, question, texts(target, "reward_model.ground_truth.target"), "golden_answers", "metadata")


def torl(row: Row) -> Record:
    """ToRL's parquet (and others of verl): the last message is the problem."""
    return _verl(row, _content(row, -1).strip(), texts(_truth(row), "reward_model.ground_truth"))


def dapo(row: Row) -> Record:
    """DAPO-Math: the problem without the paragraphs of instructions around it."""
    paragraphs = _content(row, -1).split("\n\n")
    kept = [text for text in paragraphs if not text.startswith(DAPO)]
    return _verl(row, "\n\n".join(kept).strip(), texts(_truth(row), "reward_model.ground_truth"))


DAPO = ("Solve the following math problem", "Remember to put your answer")


# -- calls to imitate -----------------------------------------------------------------------------------


def toolrl(row: Row) -> Record:
    """ToolRL's rows: a prompt of a system and a user message, and the turn to imitate."""
    if "prompt" in row:
        system, user, output = _content(row, 0), _content(row, -1), _truth(row)
    else:
        system, user = row.get("system", row.get("instruction")), row.get("user", row.get("input"))
        output = row["output"]
    for name, value in (("system", system), ("user", user), ("output", output)):
        if not isinstance(value, str) or not value.strip():
            raise Wrong(name, "a text", value)
    record = _verl(row, str(user), (str(output),), "system", "instruction", "user", "input", "output")
    messages = [{"role": "system", "content": system}, {"role": "user", "content": user}]
    return replace(record, meta={"messages": messages})


def bfcl(row: Row) -> Record:
    """Berkeley Function Calling Leaderboard, single-turn: functions, and the values that each argument may have."""
    turns = _list(row["question"], "question")
    if len(turns) != 1 or "initial_config" in row:
        raise Wrong("question", "one turn: multi-turn rows are judged by running BFCL's own classes", turns)
    messages = [_mapping(each, "question[0]") for each in _list(turns[0], "question[0]")]
    if not messages or messages[-1].get("role") != "user":
        raise Wrong("question[0]", "messages, the last of them the user's", turns[0])
    functions = [_function(_mapping(each, "function")) for each in _list(row["function"], "function")]
    kind = str(row.get("category") or str(row.get("id", "")).rstrip("0123456789-").rstrip("_"))
    if "java" in kind:
        raise Wrong("category", "of Python's types: Java's and JavaScript's literals cannot be compared here", kind)
    accepted = row.get("ground_truth")
    if accepted is None and "relevance" not in kind:
        raise Wrong("ground_truth", "a list of calls, joined in from possible_answer/ by id", None)
    for each in _list(accepted or [], "ground_truth"):
        values = list(_mapping(each, "ground_truth").values())
        if len(values) != 1 or not all(isinstance(v, list) for v in _mapping(values[0], "ground_truth").values()):
            raise Wrong("ground_truth", "calls {name: {argument: [accepted values]}}", each)
    meta = {
        "messages": [{"role": str(m.get("role")), "content": str(m.get("content"))} for m in messages],
        "functions": functions,
        "accepted": accepted if accepted is not None else ("some" if "irrelevance" not in kind else []),
        "category": kind,
    }
    return Record(str(messages[-1].get("content")), (json.dumps(accepted or []),), row.get("id"), meta=meta)


JSON_TYPES = {"dict": "object", "float": "number", "tuple": "array"}  # BFCL's names of types, where they differ


def _function(function: Mapping[str, object]) -> dict[str, object]:
    return {name: _schema(value) if name == "parameters" else value for name, value in function.items()}


def _schema(node: object) -> object:
    """BFCL's schema as JSON schema: the names of its types are Python's."""
    if isinstance(node, list):
        return [_schema(each) for each in node]
    if not isinstance(node, Mapping):
        return node
    schema = {name: value if name in ("default", "enum") else _schema(value) for name, value in node.items()}
    if isinstance(kind := schema.get("type"), str):
        schema["type"] = JSON_TYPES.get(kind, kind)
        if kind == "any":
            del schema["type"]
    return schema


# -- which reader ---------------------------------------------------------------------------------------


def _has(*names: str) -> Callable[[Row], bool]:
    return lambda row: all(name in row for name in names)


def _is_target(row: Row) -> bool:
    truth = _peek(row, "reward_model", "ground_truth")
    return "prompt" in row and isinstance(truth, Mapping) and "target" in truth


def _is_text(row: Row) -> bool:
    return "prompt" in row and isinstance(_peek(row, "reward_model", "ground_truth"), str)


def _is_toolrl(row: Row) -> bool:
    output = _peek(row, "reward_model", "ground_truth") if "prompt" in row else row.get("output")
    return isinstance(output, str) and output.lstrip().startswith("<think>")


def _is_dapo(row: Row) -> bool:
    return _is_text(row) and DAPO[1] in str(row["prompt"])


def _is_gsm8k(row: Row) -> bool:
    return "question" in row and "####" in str(row.get("answer"))


def _is_triviaqa(row: Row) -> bool:
    answer = row.get("answer", row.get("Answer"))
    return isinstance(answer, Mapping) and bool({"aliases", "Aliases"} & answer.keys())


def _is_strategyqa(row: Row) -> bool:
    return "question" in row and isinstance(row.get("answer"), bool)


def _is_bfcl(row: Row) -> bool:
    return isinstance(row.get("question"), list) and ("function" in row or "initial_config" in row)


def _is_math(row: Row) -> bool:
    return bool({"problem", "Problem"} & row.keys()) and bool({"answer", "Answer", "solution", "Solution"} & row.keys())


def _is_plain(row: Row) -> bool:
    return bool({"question", "Question"} & row.keys()) and bool(set(ANSWERS) & row.keys())


READERS: dict[str, Reader] = {
    "search_r1": Reader(search_r1, _is_target, "prompt and reward_model.ground_truth.target"),
    "toolrl": Reader(toolrl, _is_toolrl, "a prompt and a turn that begins with <think>"),
    "dapo": Reader(dapo, _is_dapo, "prompt and reward_model.ground_truth, instructed by DAPO", repeats=True),
    "torl": Reader(torl, _is_text, "prompt and a text in reward_model.ground_truth", repeats=True),
    "bfcl": Reader(bfcl, _is_bfcl, "question (a list of turns) and function"),
    "triviaqa": Reader(triviaqa, _is_triviaqa, "question and answer.aliases"),
    "popqa": Reader(popqa, _has("question", "possible_answers"), "question and possible_answers"),
    "hotpotqa": Reader(
        hotpotqa, _has("question", "answer", "supporting_facts", "context"),
        "question, answer, supporting_facts and context",
    ),
    "musique": Reader(musique, _has("question", "answer", "paragraphs"), "question, answer and paragraphs"),
    "strategyqa": Reader(strategyqa, _is_strategyqa, "question and answer (true or false)"),
    "gsm8k": Reader(gsm8k, _is_gsm8k, "question and an answer with ####"),
    "math": Reader(math, _is_math, "problem and answer, or a solution"),
    "plain": Reader(plain, _is_plain, "question and answers (or answer, golden_answers)"),
}  # fmt: skip


def fitting(row: Row) -> list[str]:
    """The readers that can read this row."""
    return [name for name, reader in READERS.items() if reader.fits(row) and _reads(reader, row)]


def _reads(reader: Reader, row: Row) -> bool:
    try:
        reader.read(row)
    except (Wrong, KeyError):
        return False
    return True


def choose(name: str, row: Row) -> Reader:
    """The reader called `name` (auto: the first that fits the row). Raises DataError with the one that would fit."""
    if name != "auto" and name not in READERS:
        raise DataError(f"there is no reader {name!r}.{nearest(name, ['auto', *READERS])}")
    if name == "auto" and (known := next((each for each in READERS.values() if each.fits(row)), None)):
        return known
    if name != "auto" and READERS[name].fits(row):
        return READERS[name]
    wanted = "" if name == "auto" else f" Reader {name!r} needs {READERS[name].needs}."
    columns = f" Its columns are: {', '.join(sorted(row)) or 'none'}."
    if others := fitting(row):
        raise DataError(f"the row does not fit.{wanted}{columns} Reader {others[0]!r} would fit.")
    missing = "question" if "question" not in row else "answers"
    hint = nearest(missing, row)
    hint = "" if "Choose from" in hint else hint
    raise DataError(f"there is no column {missing!r}.{hint}{wanted}{columns} No reader fits: docs/data.md lists them.")


# -- pieces of a row ------------------------------------------------------------------------------------


def texts(value: object, where: str) -> tuple[str, ...]:
    """One text, a number, or a list of at least one of them, as texts."""
    listed = list(value) if isinstance(value, Sequence) and not isinstance(value, str) else [value]
    found = [str(item) if isinstance(item, int | float) and not isinstance(item, bool) else item for item in listed]
    if len(found) > 2 and found[0] == "[" and all(len(str(text)) == 1 for text in found):  # seen in published files
        raise Wrong(where, "a list of texts, not one that was split into characters", "".join(map(str, found)))
    if not found or not all(isinstance(text, str) and text.strip() for text in found):
        raise Wrong(where, "one text or a list of at least one text", value)
    return tuple(str(text) for text in found)


def _record(row: Row, question: object, answers: tuple[str, ...], *dropped: str) -> Record:
    """A record with the row's own id and, as meta, the columns that are not `dropped`."""
    if not isinstance(question, str) or not question.strip():
        raise Wrong("question", "a text", question)
    key = next((row[name] for name in KEYS if row.get(name) is not None), None)
    kept = {name: value for name, value in row.items() if name not in {"question", *KEYS, *ALWAYS, *dropped}}
    return Record(question, answers, key, meta=kept)


ALWAYS = ("data_source", "extra_info", "optimal_calls")  # are fields of a problem


def _verl(row: Row, question: object, answers: tuple[str, ...], *dropped: str) -> Record:
    info = row.get("extra_info")
    info = info if isinstance(info, Mapping) else {}
    record = _record(row, question, answers, "prompt", "reward_model", *dropped)
    key = next((each for each in (record.key, info.get("index"), info.get("id")) if each is not None), None)
    split = info.get("split")
    return replace(
        record,
        key=key,
        source=str(row["data_source"]) if row.get("data_source") else None,
        split=str(split) if split else None,
    )


def _truth(row: Row) -> object:
    return _mapping(row.get("reward_model"), "reward_model").get("ground_truth")


def _content(row: Row, place: int) -> str:
    prompt = row["prompt"]
    listed = isinstance(prompt, Sequence) and not isinstance(prompt, str) and len(prompt) > 0
    message = prompt[place] if isinstance(prompt, Sequence) and listed else None
    content = message.get("content") if isinstance(message, Mapping) else None
    if not isinstance(content, str):
        raise Wrong("prompt", "a list of messages {role, content}", prompt)
    return content


def _first(row: Row, *names: str, inside: str = "") -> tuple[object, str]:
    """(value, name) of the first of these columns that the row has."""
    for name in names:
        if name in row:
            return row[name], name
    raise Wrong(f"{inside}{names[0]}", "a text", None)


def _peek(row: object, *names: str) -> object:
    for name in names:
        row = row.get(name) if isinstance(row, Mapping) else None
    return row


def _mapping(value: object, where: str) -> Row:
    return value if isinstance(value, Mapping) else _no(where, "an object", value)


def _list(value: object, where: str) -> Sequence[object]:
    return value if isinstance(value, list | tuple) else _no(where, "a list", value)


def _parsed(value: object, where: str) -> object:
    """What a JSON text holds; anything else is what it is."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError:
        return _no(where, "JSON", value)


def _unique(values: Iterable[object]) -> list[object]:
    return list(dict.fromkeys(value for value in values if isinstance(value, str)))


def _no(where: str, expected: str, found: object) -> NoReturn:
    raise Wrong(where, expected, found)
