"""Published forms of a question and its answers, each read by one function: a row in, a `Record` out.

A file is read by one reader: the one that is named, or the first of `READERS` whose columns its first row has. A row
that does not hold what its reader promises is a `Wrong` field, which `records.py` turns into an error with the file and
the row in it. Where a form has supporting passages, the record has them too.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from otcrl.dialects.torl import boxed
from otcrl.errors import DataError, nearest
from otcrl.tasks.fields import (
    Paragraph,
    Record,
    Row,
    Wrong,
    first_of,
    ground_truth,
    inside,
    listing,
    mapping,
    message,
    parsed,
    record_of,
    texts,
    unique,
    verl_record,
)

ANSWERS = ("answers", "golden_answers", "answer", "Answer")
SEARCH_R1_MARK = "Question:"  # Search-R1's instructions end with it
SEARCH_R1_END = f"<answer> Beijing </answer>. {SEARCH_R1_MARK}"  # and as it published them with this


@dataclass(frozen=True, slots=True)
class Reader:
    read: Callable[[Row], Record]  # raises Wrong
    fits: Callable[[Row], bool]  # by its columns alone
    needs: str  # what `fits` looks for
    repeats: bool = False  # the published files hold rows several times, which count once


# -- questions with short answers ----------------------------------------------------------------------


def plain(row: Row) -> Record:
    """`{id, question, answers: [...]}`, one answer or several, under any of `ANSWERS`: FlashRAG, NQ-open, Bamboogle."""
    question, key = first_of(row, "question", "Question")
    column = next((name for name in ANSWERS if row.get(name) is not None), None)
    if column is None:
        raise Wrong("answers", "one text or a list of at least one text", None)
    answers = texts(row[column], column)
    if any("####" in answer for answer in answers):
        raise Wrong(column, "an answer alone, without the solution before ####", row[column])
    return record_of(row, question, answers, key, "metadata", *ANSWERS)  # FlashRAG's `metadata` holds whole pages


def triviaqa(row: Row) -> Record:
    """TriviaQA's file or its copy on the hub: a value and its aliases."""
    question, key = first_of(row, "question", "Question")
    answer = mapping(row.get("answer", row.get("Answer")), "answer")
    value, _ = first_of(answer, "value", "Value", where="answer.")
    aliases = answer.get("aliases", answer.get("Aliases")) or []
    dropped = ("entity_pages", "search_results", "EntityPages", "SearchResults", *ANSWERS)
    return record_of(
        row, question, texts(unique([value, *listing(aliases, "answer.aliases")]), "answer"), key, *dropped
    )


def popqa(row: Row) -> Record:
    """PopQA: the answers are a JSON list in a text."""
    answers = parsed(row["possible_answers"], "possible_answers")
    return record_of(row, row["question"], texts(answers, "possible_answers"), "question", "possible_answers")


def strategyqa(row: Row) -> Record:
    """StrategyQA: yes or no."""
    if not isinstance(row["answer"], bool):
        raise Wrong("answer", "true or false", row["answer"])
    answers = ("yes",) if row["answer"] else ("no",)
    return record_of(row, row["question"], answers, "question", "answer", "evidence")


def hotpotqa(row: Row) -> Record:
    """HotpotQA and 2WikiMultihopQA, their files or their copies on the hub, with the paragraphs they come with.

    In HotpotQA's fullwiki files those are what a search engine has found, which need not be the gold ones.
    """
    facts, context = parsed(row["supporting_facts"], "supporting_facts"), parsed(row["context"], "context")
    if isinstance(facts, Mapping):  # the hub keeps a list of pairs as a pair of lists
        facts = [[title] for title in listing(facts.get("title"), "supporting_facts.title")]
    if isinstance(context, Mapping):
        sentences = context.get("sentences", context.get("content"))
        titles, bodies = listing(context.get("title"), "context.title"), listing(sentences, "context.sentences")
        if len(titles) != len(bodies):
            raise Wrong("context.sentences", f"of {len(titles)} paragraphs, as context.title", bodies)
        context = list(zip(titles, bodies, strict=True))
    gold = dict.fromkeys(
        str(title) for fact in listing(facts, "supporting_facts") for title in listing(fact, "supporting_facts")[:1]
    )
    paragraphs = []
    for pair in listing(context, "context"):
        if len(listing(pair, "context")) != 2:
            raise Wrong("context", "pairs of a title and its sentences", pair)
        title, sentences = listing(pair, "context")
        text = prose([str(each) for each in listing(sentences, "context")])
        paragraphs.append(Paragraph(str(title), text, str(title) in gold))
    record = record_of(
        row, row["question"], texts(row["answer"], "answer"), "question", "answer", "supporting_facts", "context"
    )
    there = {paragraph.title for paragraph in paragraphs}
    return replace(record, paragraphs=tuple(paragraphs), gold_missing=tuple(t for t in gold if t not in there))


def prose(sentences: Sequence[str]) -> str:
    """One text: HotpotQA's sentences begin with the space between them, and 2WikiMultihopQA's do not.

    >>> prose(["One.", " Two.", "Three."])
    'One. Two. Three.'
    """
    text = ""
    for each in sentences:
        text += each if not text or text[-1].isspace() or each[:1].isspace() else f" {each}"
    return text.strip()


def musique(row: Row) -> Record:
    """MuSiQue-Answerable: the answer and its aliases, and twenty paragraphs."""
    if row.get("answerable") is False:
        raise Wrong("answerable", "true: this is MuSiQue-Full, and musique_ans is the one with answers", False)
    paragraphs = []
    for number, each in enumerate(listing(row["paragraphs"], "paragraphs")):
        each = mapping(each, f"paragraphs[{number}]")
        text = str(each.get("paragraph_text", ""))
        paragraphs.append(Paragraph(str(each.get("title", "")), text.strip(), bool(each.get("is_supporting"))))
    answers = unique([row["answer"], *listing(row.get("answer_aliases") or [], "answer_aliases")])
    record = record_of(
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
    record = record_of(row, row["question"], (answer.strip().replace(",", ""),), "question", "answer")
    return replace(record, meta={**record.meta, "solution": solution})


def math(row: Row) -> Record:
    r"""MATH, MATH-500 and AIME: `problem` and `answer`, or a `solution` whose last `\boxed{}` is the answer."""
    question, key = first_of(row, "problem", "Problem")
    answer = row.get("answer", row.get("Answer"))
    if answer is None:
        solution = row.get("solution", row.get("Solution"))
        found = boxed(solution) if isinstance(solution, str) else []
        found = found or (re.findall(r"\\boxed\s+([^$]+)", solution) if isinstance(solution, str) else [])  # \boxed 2$
        if not found:
            raise Wrong("solution", r"a text with a \boxed{answer}, where there is no answer", solution)
        answer = found[-1].strip()
    return record_of(row, question, texts(answer, "answer"), key, "answer", "Answer")


# -- files of verl: a prompt, and the ground truth of a rule -------------------------------------------


def search_r1(row: Row) -> Record:
    """Search-R1's parquet: the `question` column, or what follows the instructions in its prompt."""
    target = mapping(ground_truth(row), "reward_model.ground_truth").get("target")
    question = row.get("question")
    if question is None:
        question = asked(message(row, -1))
    return verl_record(row, question, texts(target, "reward_model.ground_truth.target"), "golden_answers", "metadata")


def asked(prompt: str) -> str:
    """What follows Search-R1's instructions, or the only `Question:` of others: a question may hold one, too."""
    mark = SEARCH_R1_END if SEARCH_R1_END in prompt else SEARCH_R1_MARK
    _, _, question = prompt.partition(mark)
    if mark == SEARCH_R1_MARK and SEARCH_R1_MARK in question:
        raise Wrong("prompt", f"instructions that hold {mark!r} once, where there is no column 'question'", prompt)
    if not question.strip():
        raise Wrong("prompt", f"instructions with a question behind {mark!r}, or a column 'question'", prompt)
    return question.strip()


def torl(row: Row) -> Record:
    """ToRL's parquet (and others of verl): the last message is the problem."""
    return verl_record(row, message(row, -1).strip(), texts(ground_truth(row), "reward_model.ground_truth"))


def dapo(row: Row) -> Record:
    """DAPO-Math: the problem without the paragraphs of instructions around it."""
    paragraphs = message(row, -1).split("\n\n")
    kept = [text for text in paragraphs if not text.startswith(DAPO)]
    return verl_record(row, "\n\n".join(kept).strip(), texts(ground_truth(row), "reward_model.ground_truth"))


DAPO = ("Solve the following math problem", "Remember to put your answer")


# -- calls to imitate -----------------------------------------------------------------------------------


def toolrl(row: Row) -> Record:
    """ToolRL's rows: a prompt of a system and a user message, and the turn to imitate."""
    if "prompt" in row:
        system, user, output = message(row, 0), message(row, -1), ground_truth(row)
    else:
        system, user = row.get("system", row.get("instruction")), row.get("user", row.get("input"))
        output = row["output"]
    for name, value in (("system", system), ("user", user), ("output", output)):
        if not isinstance(value, str) or not value.strip():
            raise Wrong(name, "a text", value)
    record = verl_record(row, str(user), (str(output),), "system", "instruction", "user", "input", "output")
    messages = [{"role": "system", "content": system}, {"role": "user", "content": user}]
    return replace(record, meta={"messages": messages})


def bfcl(row: Row) -> Record:
    """Berkeley Function Calling Leaderboard, single-turn: functions, and the values that each argument may have."""
    turns = listing(row["question"], "question")
    if len(turns) != 1 or "initial_config" in row:
        raise Wrong("question", "one turn: multi-turn rows are judged by running BFCL's own classes", turns)
    messages = [mapping(each, "question[0]") for each in listing(turns[0], "question[0]")]
    if not messages or messages[-1].get("role") != "user":
        raise Wrong("question[0]", "messages, the last of them the user's", turns[0])
    functions = [_function(mapping(each, "function")) for each in listing(row["function"], "function")]
    kind = str(row.get("category") or str(row.get("id", "")).rstrip("0123456789-").rstrip("_"))
    if "java" in kind:
        raise Wrong("category", "of Python's types: Java's and JavaScript's literals cannot be compared here", kind)
    accepted = row.get("ground_truth")
    if accepted is None and "relevance" not in kind:
        raise Wrong("ground_truth", "a list of calls, joined in from possible_answer/ by id", None)
    for each in listing(accepted or [], "ground_truth"):
        values = list(mapping(each, "ground_truth").values())
        if len(values) != 1 or not all(isinstance(v, list) for v in mapping(values[0], "ground_truth").values()):
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
    if not isinstance(function.get("name"), str):
        raise Wrong("function", "objects with a name", function)
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
    truth = inside(row, "reward_model", "ground_truth")
    return "prompt" in row and isinstance(truth, Mapping) and "target" in truth


def _is_text(row: Row) -> bool:
    return "prompt" in row and isinstance(inside(row, "reward_model", "ground_truth"), str)


def _is_toolrl(row: Row) -> bool:
    output = inside(row, "reward_model", "ground_truth") if "prompt" in row else row.get("output")
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
