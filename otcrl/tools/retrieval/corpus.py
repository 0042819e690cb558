"""Passages, and the files they come in.

Two kinds of row are read: `{id, title, text}`, and Search-R1's `{id, contents}` where contents is
`"Title"`, a line break and the text.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from otcrl.errors import DataError
from otcrl.jsonlines import read_json_lines

EXPECTED = '{"id", "title", "text"} or {"id", "contents"}'


@dataclass(frozen=True, slots=True)
class Passage:
    id: str
    title: str  # "" if it has none
    text: str

    @property
    def contents(self) -> str:
        """What is encoded."""
        return f"{self.title}\n{self.text}" if self.title else self.text


@dataclass(frozen=True)
class Corpus:
    """The passages of some jsonl or jsonl.gz files, read anew each time they are iterated."""

    paths: Sequence[str]

    def __iter__(self) -> Iterator[Passage]:
        """Raises DataError naming file and line."""
        empty = True
        for path in self.paths:
            for passage in read_passages(path):
                empty = False
                yield passage
        if empty:
            raise DataError(f"the corpus {list(self.paths)} holds no passage; expected rows {EXPECTED}")


def read_passages(path: str | Path) -> Iterator[Passage]:
    """The passages of one file; blank lines are skipped. Raises DataError naming the line."""
    for where, row in read_json_lines(path):
        yield parse_passage(row, where)


def parse_passage(row: object, where: str) -> Passage:
    """One row. Raises DataError; `where` names the line in it."""
    if not isinstance(row, dict):
        raise DataError(f"{where}: expected a JSON object {EXPECTED}, got {str(row)[:60]}")
    if isinstance(row.get("contents"), str) and "text" not in row:
        title, _, text = row["contents"].partition("\n")
        row = {**row, "title": title.strip().strip('"'), "text": text}
    if not isinstance(row.get("id"), str | int):
        raise DataError(f"{where}: expected {EXPECTED}, but `id` is missing; the row has {sorted(row)}")
    for column in ("title", "text"):
        if not isinstance(row.get(column), str):
            raise DataError(f"{where}: expected {EXPECTED}, but `{column}` is missing; the row has {sorted(row)}")
    return Passage(str(row["id"]), row["title"], row["text"])
