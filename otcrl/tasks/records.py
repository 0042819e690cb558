"""Reading data sets: files or hub names to rows, rows to problems.

Every way in which a data set can differ from what the config promised is a DataError that names the
file, the row, the field and what was expected; nothing is guessed, and nothing skipped unless asked.
"""

from __future__ import annotations

import csv
import json
import logging
import random
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

from otcrl.errors import ConfigError, DataError, NoProblems, nearest
from otcrl.jsonlines import read_json_lines
from otcrl.tasks.fields import Record, Row, Wrong
from otcrl.tasks.readers import choose, fitting
from otcrl.types import Problem

log = logging.getLogger(__name__)

SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".parquet", ".tsv")
_HUB_NAME = re.compile(r"(?P<name>[\w.-]+(/[\w.-]+)?)(:(?P<split>\w+(\[[\w:%]+\])?))?")
_GIVEN_NAME = re.compile(r"[\w.-]+")


def read_rows(source: str, required: Iterable[str] = ()) -> Iterator[dict[str, object]]:
    """The rows of a file (.jsonl, .jsonl.gz, .json, .parquet, .tsv), or of a hub data set (`owner/name:split`).

    Raises DataError: no such file or data set, not readable, a row that is no object, a `required`
    column that a row lacks, no rows at all. Raises ConfigError when a reader is not installed.
    """
    required, row = tuple(required), None
    for number, row in enumerate(_raw_rows(source), start=1):
        yield _with_columns(row, required, f"{source}, row {number}")
    if row is None:
        raise NoProblems(f"{source} holds no rows.")


def read_problems(
    source: str, limit: int | None = None, seed: int = 0, skip_bad_rows: bool = False, reader: str = "auto"
) -> list[Problem]:
    """The problems of one file or hub data set, in its order; a seeded subset of `limit` where it has more.

    `Problem.id` is `source/split/id`; columns that the reader does not use are kept in `meta`. `name=FILE` names the
    source of all rows, else a row or the file does. Raises DataError; rows that are no problem are left out, and their
    number logged, only where the caller asks for it.
    """
    given, source = given_name(source)
    name, split = source_and_split(source)
    read = records(read_rows(source), source, skip_bad_rows, reader)
    named = ((at, where, row, replace(record, source=given or record.source)) for at, where, row, record in read)
    problems = [to_problem(record, row, name, split, position, where) for position, where, row, record in named]
    if not problems:
        raise NoProblems(f"{source} holds no problem.")
    check_unique(problems, source)
    return problems if limit is None else _subset(problems, limit, f"{seed}/{name}/{split}")


def records(
    rows: Iterable[Row], source: str, skip_bad_rows: bool = False, reader: str = "auto"
) -> Iterator[tuple[int, str, Row, Record]]:
    """(place, `source, row 7`, the row, what it says) for every row; the first row decides between the readers.

    A reader whose published files repeat rows gives each of them once.
    """
    chosen, bad, num_rows, repeated = None, list[str](), 0, 0
    seen: set[tuple[object, ...]] = set()
    try:
        for position, row in enumerate(rows):
            where, num_rows = f"{source}, row {position + 1}", position + 1
            try:
                chosen = chosen or choose(reader, row)
                record = chosen.read(row)
            except (Wrong, KeyError, DataError) as error:
                why = f"there is no column {error}" if isinstance(error, KeyError) else str(error)
                if chosen is not None and (others := fitting(row)):
                    why += f". Reader {others[0]!r} would fit"
                if not skip_bad_rows:
                    hint = "" if chosen is None else " ([task.]skip_bad_rows=true goes on without such rows)"
                    raise DataError(f"{where}: {why}{hint}") from error
                bad.append(f"{where}: {why}")
                continue
            same = (record.source, record.key, record.question, record.answers)
            if chosen.repeats and record.key is not None and same in seen:
                repeated += 1
                continue
            seen |= {same} if chosen.repeats else set()
            yield position, where, row, record
    finally:  # also when whoever asked has enough
        if bad and chosen is not None:
            log.warning("%s: %d of %d rows left out, the first: %s", source, len(bad), num_rows, bad[0])
        if repeated:
            log.info("%s: %d of %d rows repeat an earlier one", source, repeated, num_rows)
    if bad and chosen is None:
        raise NoProblems(bad[0])


def _subset(problems: list[Problem], limit: int, seed: str) -> list[Problem]:
    if limit < 1:
        raise ConfigError(f"the most problems to take of a source must be at least 1, got {limit}")
    chosen = random.Random(seed).sample(range(len(problems)), min(limit, len(problems)))
    return [problems[i] for i in sorted(chosen)]


def check_unique(problems: Sequence[Problem], where: str) -> None:
    """Raises DataError when two problems share an id: tables keyed by id would mix them up."""
    seen: dict[str, Problem] = {}
    for problem in problems:
        if first := seen.get(problem.id):
            places = f", {first.place} and {problem.place}" if first.place and problem.place else ""
            raise DataError(
                f"{where}: two problems have the id {problem.id!r}{places}; ids must be unique over all sources."
            )
        seen[problem.id] = problem


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
    if is_named and not rest:
        raise DataError(f"{source!r} must be NAME=FILE, or the file alone")
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


def to_problem(record: Record, row: Row, source: str, split: str, position: int, where: str) -> Problem:
    """The record as a problem; the source and split that a row names go before those of the file's name."""
    optimal = row.get("optimal_calls")
    if not (optimal is None or isinstance(optimal, int)):
        raise DataError(f"{where}: optimal_calls must be a whole number, got {optimal!r}")
    source = record.source or str(row.get("data_source") or source)
    return Problem(
        id=f"{source}/{record.split or split}/{position if record.key is None else record.key}",
        question=record.question,
        answers=record.answers,
        source=source,
        optimal_calls=optimal,
        meta=dict(record.meta),
        place=where,
    )


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
        return _with_possible_answers(_json_list(path), path)
    if path.name.endswith(".tsv"):
        return _tsv_rows(path)
    raise DataError(f"{source} must end in one of {', '.join(SUFFIXES)}, got {''.join(path.suffixes) or 'no suffix'!r}")


def _names_beside(path: Path) -> str:
    """The nearest existing name in the file's directory, or the nearest existing directory."""
    if path.parent.is_dir():
        return nearest(path.name, (p.name for p in path.parent.iterdir())) or f" {path.parent} is empty."
    existing = next(parent for parent in path.absolute().parents if parent.is_dir())
    hint = "otcrl data NAME out=DIR writes published sets"
    return f" There is no directory {path.parent} either; {existing} exists ({hint})."


def _json_list(path: Path) -> Iterator[object]:
    """A list, `{"Data": [...]}` as in TriviaQA, or JSON lines by the wrong name as in BFCL."""
    try:
        rows = json.loads(path.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        if error.msg == "Extra data" and error.lineno > 1:
            return (row for _, row in read_json_lines(path))
        raise DataError(f"{path}: expected a JSON list of objects, but {error}") from error
    except (UnicodeDecodeError, RecursionError) as error:
        raise DataError(f"{path}: expected a JSON list of objects, but {error}") from error
    rows = rows.get("Data", rows) if isinstance(rows, dict) else rows
    if not isinstance(rows, list):
        raise NoProblems(f"{path}: expected a JSON list of objects, got {type(rows).__name__}")
    return iter(rows)


def _with_possible_answers(rows: Iterator[object], path: Path) -> Iterator[object]:
    """BFCL keeps what is right in a file of the same name in `possible_answer/`; its rows are joined by their id."""
    beside = path.parent / "possible_answer" / path.name
    if not beside.is_file():
        return rows
    right = {str(row.get("id")): row.get("ground_truth") for row in _json_list(beside) if isinstance(row, dict)}
    return (
        {**row, "ground_truth": right[str(row["id"])]} if isinstance(row, dict) and str(row.get("id")) in right else row
        for row in rows
    )


def _tsv_rows(path: Path) -> Iterator[object]:
    """Cells may be in double quotes, as PopQA's are. A stray quote would join rows to one, so it is an error."""
    number = 0
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            for number, row in enumerate(csv.DictReader(file, delimiter="\t", strict=True), start=1):
                if None in row:
                    raise DataError(f"{path}, row {number}: more columns than the first line names: {row[None]}")
                yield row
    except (UnicodeDecodeError, csv.Error) as error:
        where = f"{path}, row {number + 1}"
        raise DataError(f"{where}: not readable as columns with tabs between them: {error}") from error


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
    match = _HUB_NAME.fullmatch(source)
    name, split = (match["name"], match["split"] or "train") if match else (source, "train")
    return hub_rows(name, None, split)


def hub_rows(name: str, config: str | None, split: str) -> Iterator[object]:
    """The rows of one split of a hub data set, in the variant `config` where it has several. Raises DataError."""
    try:
        import datasets
    except ImportError as error:
        raise ConfigError(f"{name} is no file, and a hub data set needs: pip install 'otcrl[data]'") from error
    try:
        loaded = datasets.load_dataset(name, config, split=split)
    except Exception as error:  # the library and its HTTP clients raise a dozen unrelated kinds; none is lost
        raise DataError(
            f"there is no file {name}, and the hub data set {name!r}, split {split!r}, could not be downloaded: "
            f"{type(error).__name__}: {error}"
        ) from error
    return iter(loaded)
