"""Reading data sets: files or hub names to rows, rows to problems.

Every way in which a data set can differ from what the config promised is a DataError that names the
file, the row and what was expected; nothing is guessed, and nothing skipped unless asked.
"""

from __future__ import annotations

import json
import logging
import random
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path

from otcrl.errors import ConfigError, DataError, nearest
from otcrl.jsonlines import read_json_lines
from otcrl.types import Problem

Row = Mapping[str, object]

log = logging.getLogger(__name__)

SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".parquet")
_HUB_NAME = re.compile(r"(?P<name>[\w.-]+(/[\w.-]+)?)(:(?P<split>\w+(\[[\w:%]+\])?))?")
_GIVEN_NAME = re.compile(r"[\w.-]+")
_NOT_META = frozenset(  # what a Problem says in its own fields; FlashRAG's `metadata` holds whole pages
    ["id", "question", "answers", "answer", "golden_answers", "prompt", "reward_model", "optimal_calls", "metadata"]
)
_SEARCH_R1_MARK = "Question:"  # Search-R1's instructions end with it


def read_rows(source: str, required: Iterable[str] = ()) -> Iterator[dict[str, object]]:
    """The rows of a file (.jsonl, .jsonl.gz, .json, .parquet), or of a hub data set (`owner/name:split`).

    Raises DataError: no such file or data set, not readable, a row that is no object, a `required`
    column that a row lacks, no rows at all. Raises ConfigError when a reader is not installed.
    """
    required, row = tuple(required), None
    for number, row in enumerate(_raw_rows(source), start=1):
        yield _with_columns(row, required, f"{source}, row {number}")
    if row is None:
        raise DataError(f"{source} holds no rows.")


def read_problems(source: str, limit: int | None = None, seed: int = 0, skip_bad_rows: bool = False) -> list[Problem]:
    """The problems of one file or hub data set, in its order; a seeded subset of `limit` where it has more.

    Rows are `{id, question, answers: [...]}`, `{id, question, answer}`, or Search-R1's parquet schema.
    `Problem.id` is `source/split/id`; the other columns are kept in `meta`. `name=FILE` names the source of all
    rows, else a row or the file does. Raises DataError; rows that are no problem are left out, and their number
    logged, only where the caller asks for it.
    """
    given, source = given_name(source)
    name, split = source_and_split(source)
    problems, bad = [], []
    for position, row in enumerate(read_rows(source)):
        row = row | {"data_source": given} if given else row
        try:
            problems.append(to_problem(row, name, split, position, where=f"{source}, row {position + 1}"))
        except DataError as error:
            if not skip_bad_rows:
                raise DataError(f"{error} (skip_bad_rows=true goes on without such rows)") from error
            bad.append(str(error))
    if bad:
        log.warning("%s: %d of %d rows left out, the first: %s", source, len(bad), len(bad) + len(problems), bad[0])
    if not problems:
        raise DataError(f"{source} holds no problem.")
    check_unique(problems, source)
    return problems if limit is None else _subset(problems, limit, f"{seed}/{name}/{split}")


def _subset(problems: list[Problem], limit: int, seed: str) -> list[Problem]:
    if limit < 1:
        raise ConfigError(f"the most problems to take of a source must be at least 1, got {limit}")
    chosen = random.Random(seed).sample(range(len(problems)), min(limit, len(problems)))
    return [problems[i] for i in sorted(chosen)]


def check_unique(problems: Sequence[Problem], where: str) -> None:
    """Raises DataError when two problems share an id: tables keyed by id would mix them up."""
    seen: set[str] = set()
    for problem in problems:
        if problem.id in seen:
            raise DataError(f"{where}: two problems have the id {problem.id!r}; ids must be unique over all sources.")
        seen.add(problem.id)


def shuffled_epochs(length: int, start: int, count: int, seed: str) -> list[int]:
    """Places `start .. start + count` of an endless walk over `range(length)` that reshuffles each epoch.

    Stateless: any stretch can be had without walking up to it, and no epoch repeats an index.
    """
    places = (divmod(place, length) for place in range(start, start + count))
    return [_epoch(length, f"{seed}/{epoch}")[index] for epoch, index in places]


@lru_cache(maxsize=8)
def _epoch(length: int, seed: str) -> list[int]:
    return random.Random(seed).sample(range(length), length)


def given_name(source: str) -> tuple[str | None, str]:
    """`nq=dir/file.jsonl` -> (nq, dir/file.jsonl); (None, source) where no name is given, or a file is called so."""
    name, is_named, rest = source.partition("=")
    if is_named and _GIVEN_NAME.fullmatch(name) and not Path(source).is_file():
        return name, rest
    return None, source


def source_and_split(source: str) -> tuple[str, str]:
    """`dir/nq/train.jsonl.gz` -> (nq, train); `owner/nq:test` -> (nq, test)."""
    path = Path(source)
    for suffix in sorted(SUFFIXES, key=len, reverse=True):
        if path.name.endswith(suffix):
            return path.absolute().parent.name, path.name.removesuffix(suffix)
    name, _, split = source.partition(":")
    return name.rstrip("/").rsplit("/", 1)[-1], split or "train"


def to_problem(row: Row, source: str, split: str, position: int, where: str) -> Problem:
    """One row as a problem; a row's own `data_source` and `extra_info` go before the file's name."""
    info = row.get("extra_info")
    info = info if isinstance(info, Mapping) else {}
    source = str(row.get("data_source") or source)
    split = str(info.get("split") or split)
    key = row.get("id", info.get("index", position))
    optimal = row.get("optimal_calls")
    if not (optimal is None or isinstance(optimal, int)):
        raise DataError(f"{where}: optimal_calls must be a whole number, got {optimal!r}")
    return Problem(
        id=f"{source}/{split}/{key}",
        question=_question(row, where),
        answers=_answers(row, where),
        source=source,
        optimal_calls=optimal,
        meta={name: value for name, value in row.items() if name not in _NOT_META},
    )


def _question(row: Row, where: str) -> str:
    if "question" not in row and "prompt" in row:
        return _prompt_question(row["prompt"], where)
    question = _with_columns(row, ("question",), where)["question"]
    if not (isinstance(question, str) and question.strip()):
        raise DataError(f"{where}: question must be a text, got {question!r}")
    return question


def _prompt_question(prompt: object, where: str) -> str:
    """The question in a Search-R1 prompt: what follows the last `Question:`, or the whole message."""
    message = prompt[-1] if isinstance(prompt, Sequence) and prompt and not isinstance(prompt, str) else None
    content = message.get("content") if isinstance(message, Mapping) else None
    if not isinstance(content, str):
        raise DataError(f"{where}: prompt must be a list of messages {{role, content}}, got {prompt!r}")
    question = content.rsplit(_SEARCH_R1_MARK, 1)[-1].strip()
    if not question:
        raise DataError(f"{where}: the prompt holds no question after {_SEARCH_R1_MARK!r}")
    return question


def _answers(row: Row, where: str) -> tuple[str, ...]:
    reward_model = row.get("reward_model")
    truth = reward_model.get("ground_truth") if isinstance(reward_model, Mapping) else None
    for column, value in (
        ("answers", row.get("answers")),
        ("golden_answers", row.get("golden_answers")),
        ("answer", row.get("answer")),
        ("reward_model.ground_truth.target", truth.get("target") if isinstance(truth, Mapping) else truth),
    ):
        if value is not None:
            return _as_answers(value, f"{where}: {column}")
    _with_columns(row, ("answers",), where)
    raise DataError(f"{where}: answers is null")


def _as_answers(value: object, where: str) -> tuple[str, ...]:
    listed = list(value) if isinstance(value, Sequence) and not isinstance(value, str) else [value]
    texts = [str(item) if isinstance(item, int | float) and not isinstance(item, bool) else item for item in listed]
    if len(texts) > 2 and texts[0] == "[" and all(len(str(text)) == 1 for text in texts):  # seen in published files
        raise DataError(f"{where} is one text that was split into characters: {''.join(map(str, texts))!r}")
    if not texts or not all(isinstance(text, str) and text.strip() for text in texts):
        raise DataError(f"{where} must be one text or a list of at least one text, got {value!r}")
    return tuple(str(text) for text in texts)


def _with_columns(row: object, required: Iterable[str], where: str) -> dict[str, object]:
    if not isinstance(row, dict):
        raise DataError(f"{where}: expected an object with named columns, got {type(row).__name__} {str(row)[:60]!r}")
    for column in required:
        if column not in row:
            hint = nearest(column, row)
            columns = "" if "Choose from" in hint else f" Its columns are: {', '.join(sorted(row)) or 'none'}."
            raise DataError(f"{where}: there is no column {column!r}.{hint}{columns}")
    return row


# -- where rows come from ----------------------------------------------------------------------------


def _raw_rows(source: str) -> Iterator[object]:
    path = Path(source)
    is_file = source.endswith(SUFFIXES) or path.is_file()
    if not is_file and (path.is_dir() or _HUB_NAME.fullmatch(source)):
        return _hub_rows(source)
    if not path.is_file():
        raise DataError(f"there is no file {source}.{_names_beside(path)}")
    if path.name.endswith(".parquet"):
        return _parquet_rows(path)
    if path.name.endswith((".jsonl", ".jsonl.gz")):
        return (row for _, row in read_json_lines(path))
    if path.name.endswith(".json"):
        return _json_list(path)
    raise DataError(f"{source} must end in one of {', '.join(SUFFIXES)}, got {''.join(path.suffixes) or 'no suffix'!r}")


def _names_beside(path: Path) -> str:
    """The nearest existing name in the file's directory, or the nearest existing directory."""
    if path.parent.is_dir():
        return nearest(path.name, (p.name for p in path.parent.iterdir())) or f" {path.parent} is empty."
    existing = next(parent for parent in path.absolute().parents if parent.is_dir())
    return f" There is no directory {path.parent} either; {existing} exists."


def _json_list(path: Path) -> Iterator[object]:
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: expected a JSON list of objects, but {error}") from error
    if not isinstance(rows, list):
        raise DataError(f"{path}: expected a JSON list of objects, got {type(rows).__name__}")
    return iter(rows)


def _parquet_rows(path: Path) -> Iterator[object]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise ConfigError(f"{path} needs pyarrow: pip install 'otcrl[data]'") from error
    try:
        for batch in parquet.ParquetFile(path).iter_batches():
            yield from batch.to_pylist()
    except ArrowException as error:
        raise DataError(f"{path}: not readable as parquet: {error}") from error


def _hub_rows(source: str) -> Iterator[object]:
    """A hub data set, or a local folder that `datasets` can read; the split is `train` unless named."""
    try:
        import datasets
    except ImportError as error:
        raise ConfigError(f"{source} is no file, and a hub data set needs: pip install 'otcrl[data]'") from error
    match = _HUB_NAME.fullmatch(source)
    name, split = (match["name"], match["split"] or "train") if match else (source, "train")
    try:
        loaded = datasets.load_dataset(name, split=split)
    except Exception as error:  # the library and its HTTP clients raise a dozen unrelated kinds; none is lost
        raise DataError(
            f"there is no file {source}, and the hub data set {name!r}, split {split!r}, could not be downloaded: "
            f"{type(error).__name__}: {error}"
        ) from error
    return iter(loaded)
