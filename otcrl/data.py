"""`otcrl data`: published data sets, from the hub or from their own files, as files that every task reads."""

from __future__ import annotations

import gzip
import json
import logging
import os
import random
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from hashlib import blake2b
from itertools import islice
from operator import itemgetter
from pathlib import Path
from typing import TypeVar

from otcrl.errors import ConfigError, DataError, NoProblems, nearest
from otcrl.jsonlines import read_json_lines
from otcrl.tasks.catalogue import CATALOGUE, Published
from otcrl.tasks.fields import Record, Row
from otcrl.tasks.records import SUFFIXES, check_unique, hub_rows, read_rows, records, to_problem
from otcrl.types import Problem

log = logging.getLogger(__name__)

T = TypeVar("T")
Passage = tuple[str, str]  # its title and its text
SETTINGS = ("out", "from", "reader", "max", "seed", "skip_bad_rows")
TESTS = {"test", "dev", "val", "validation"}  # what the names of files to evaluate on have in them


def run(words: Sequence[str]) -> int:
    """The exit code of `otcrl data NAME[,NAME] out=DIR [from=FILE_OR_DIR] [key=value ...]`."""
    names = [name for word in words if "=" not in word for name in word.split(",")]
    settings = dict(word.split("=", 1) for word in words if "=" in word)
    for name in settings:
        if name not in SETTINGS:
            raise ConfigError(f"otcrl data has no setting {name!r}.{nearest(name, SETTINGS)}")
    for name in names or [""]:
        if name not in CATALOGUE:
            raise ConfigError(f"otcrl data knows no data set {name!r}.{nearest(name, CATALOGUE)}")
    if not settings.get("out"):
        raise ConfigError("otcrl data needs out=DIR")
    place = settings.get("from")
    if place is not None and len(names) > 1:
        raise ConfigError(f"from={place} holds one data set, and {len(names)} are named")
    limit, skip = settings.get("max"), settings.get("skip_bad_rows", "false")
    if limit is not None and (not limit.isdigit() or int(limit) < 1):
        raise ConfigError(f"max must be a whole number of at least 1, got {limit!r}")
    seed = settings.get("seed")
    if seed is not None and (limit is None or not seed.isdigit()):
        raise ConfigError(
            f"seed must be a whole number, and draws max=N rows of each split, got seed={seed}, max={limit}"
        )
    if skip not in ("true", "false"):
        raise ConfigError(f"skip_bad_rows must be true or false, got {skip!r}")
    for name in names:
        known = CATALOGUE[name]
        splits = local(Path(place)) if place is not None else downloaded(name, known)
        folder = Path(settings["out"]) / name
        try:
            written = write(
                name, settings.get("reader", known.reader), splits, folder,
                limit=int(limit) if limit else None, seed=int(seed) if seed else None, skip_bad_rows=skip == "true",
            )  # fmt: skip
        finally:
            with suppress(OSError):
                folder.rmdir()  # only of one that is empty: nothing came of it
        for path, count in written.items():
            print(f"otcrl: wrote {path}: {count} {'passages' if path.name.startswith('corpus') else 'questions'}")
    return 0


Splits = Iterable[tuple[str, str, Iterable[Row]]]  # (split, where its rows are from, its rows)


def downloaded(name: str, known: Published) -> Iterator[tuple[str, str, Iterable[Row]]]:
    if known.hub is None:
        raise ConfigError(f"{name} is not on the hub: get its files from {known.home}, and add from=FILE_OR_DIR")
    for theirs, ours in known.splits.items():
        rows = hub_rows(known.hub, known.config, theirs)
        yield ours, f"{known.hub}, split {theirs}", (dict(row) for row in rows if isinstance(row, Mapping))


def local(place: Path) -> Iterator[tuple[str, str, Iterable[Row]]]:
    """The files of a folder, or one file. A file's name says whether it is to train or to evaluate on."""
    files = sorted(path for path in place.iterdir() if path.name.endswith(SUFFIXES)) if place.is_dir() else [place]
    if not files:
        raise DataError(f"from={place} holds no file that ends in one of {', '.join(SUFFIXES)}")
    taken: dict[str, Path] = {}
    for path in files:
        split = split_of(path.name)
        if split in taken:
            raise DataError(f"{taken[split]} and {path} are both of the split {split!r}: name one of them, from=FILE")
        taken[split] = path
    for split, path in taken.items():
        yield split, str(path), read_rows(str(path))


def split_of(name: str) -> str:
    """train or test by what is in the file's name, else the name.

    >>> split_of("hotpot_dev_distractor_v1.json"), split_of("BFCL_v4_parallel.json")
    ('test', 'BFCL_v4_parallel')
    """
    stem = next((name.removesuffix(each) for each in sorted(SUFFIXES, key=len)[::-1] if name.endswith(each)), name)
    words = re.split(r"\W|_", stem.lower())
    if "train" in words:
        return "train"
    return "test" if TESTS & set(words) else stem


def write(
    name: str,
    reader: str,
    splits: Splits,
    folder: Path,
    *,
    limit: int | None = None,
    seed: int | None = None,
    skip_bad_rows: bool = False,
) -> dict[Path, int]:
    """(file -> rows in it) of `folder`: a file for each split, and a corpus where the questions come with paragraphs.

    Of each split the first `limit` rows are taken, or with a `seed` as many drawn at random.

    Raises DataError, and leaves no file that is not whole. Where bad rows are skipped, so is a file that is whole and
    holds nothing else.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"out: the folder {folder} cannot be made: {error.strerror}") from error
    problems: list[Problem] = []
    passages: dict[str, Passage] = {}  # by id
    written: dict[Path, int] = {}
    refused: list[NoProblems] = []
    for split, where, rows in splits:
        path, found, partial = folder / f"{split}.jsonl.gz", list[Problem](), list[str]()
        every = records(rows, where, skip_bad_rows, reader)
        try:
            with whole(path) as file:
                for position, place, row, record in taken(every, limit, None if seed is None else f"{seed}/{split}"):
                    found.append(to_problem(record, row, name, split, position, place))
                    partial += [f"{place}: {list(record.gold_missing)}"] if record.gold_missing else []
                    put(file, line(found[-1], name, gold_ids(record, passages, name), record.gold_missing), place)
                if not found:
                    raise NoProblems(f"{where} holds no problem.")
                check_unique([*problems, *found], where)
        except NoProblems as error:
            if not skip_bad_rows:
                raise
            refused.append(error)
            log.warning("left out: %s", error)
            continue
        if partial:
            log.warning(
                "%s: %d of %d questions come without all of their gold paragraphs, whose titles are their "
                "`gold_missing`; searching is not demonstrated on them. The first: %s",
                where, len(partial), len(found), partial[0],
            )  # fmt: skip
        written[path] = len(found)
        problems += found
    if not written and refused:
        raise refused[0]
    if passages:
        path = folder / "corpus.jsonl.gz"
        written[path] = write_corpus(path, passages)
    return written


def write_corpus(path: Path, passages: Mapping[str, Passage]) -> int:
    """The number of passages in it: also those that are there, as what is here of another split points at them."""
    if path.is_file():
        earlier = (row for _, row in read_json_lines(path) if isinstance(row, dict))
        passages = {str(row["id"]): (str(row["title"]), str(row["text"])) for row in earlier} | dict(passages)
    with whole(path) as file:
        for key, (title, text) in passages.items():
            put(file, {"id": key, "title": title, "text": text}, str(path))
    return len(passages)


def taken(items: Iterable[T], limit: int | None, seed: str | None) -> Iterable[T]:
    """The first `limit`, or as many drawn; all of them without a limit."""
    return islice(items, limit) if limit is None or seed is None else drawn(items, limit, seed)


def drawn(items: Iterable[T], count: int, seed: str) -> list[T]:
    """`count` of them at random, in their order; no more than that are held at a time (Vitter's algorithm R)."""
    rng = random.Random(seed)
    kept: list[tuple[int, T]] = []
    for place, item in enumerate(items):
        slot = place if place < count else rng.randrange(place + 1)
        if slot < count:
            kept[slot : slot + 1] = [(place, item)]
    return [item for _, item in sorted(kept, key=itemgetter(0))]


def gold_ids(record: Record, passages: dict[str, Passage], name: str) -> list[str]:
    """The ids of the record's gold paragraphs; all of its paragraphs are in `passages` afterwards.

    An id is a digest of the passage, so that it is the same whatever else is written, and when.
    """
    found: list[str] = []
    for paragraph in record.paragraphs:
        said = json.dumps([paragraph.title, paragraph.text]).encode()
        key = f"{name}-{blake2b(said, digest_size=8).hexdigest()}"
        passages[key] = (paragraph.title, paragraph.text)
        found += [key] if paragraph.is_gold and key not in found else []
    return found


def line(problem: Problem, name: str, gold: list[str], gold_missing: Sequence[str]) -> dict[str, object]:
    """The problem as a row that `plain` reads, with an id that makes it the same problem again."""
    _, key = problem.id.removeprefix(f"{problem.source}/").split("/", 1)  # SOURCE/SPLIT/KEY, and names may hold slashes
    row: dict[str, object] = {"id": key}
    if problem.source != name:
        row["data_source"] = problem.source
    row |= {"question": problem.question, "answers": list(problem.answers)}
    if problem.optimal_calls is not None:
        row["optimal_calls"] = problem.optimal_calls
    row |= ({"gold_ids": gold} if gold else {}) | ({"gold_missing": list(gold_missing)} if gold_missing else {})
    return row | dict(problem.meta)


@contextmanager
def whole(path: Path) -> Iterator[gzip.GzipFile]:
    """A gzip file that gets its name when all of it is written; the same content is the same bytes."""
    part = path.with_name(f"{path.name}.part")
    try:
        with part.open("wb") as raw, gzip.GzipFile("", "wb", mtime=0, fileobj=raw) as file:
            yield file
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def put(file: gzip.GzipFile, row: Mapping[str, object], where: str) -> None:
    """Raises DataError for what JSON in UTF-8 cannot hold, such as a date."""
    try:
        file.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
    except (TypeError, ValueError) as error:
        raise DataError(f"{where}: cannot be written as JSON: {error}") from error
