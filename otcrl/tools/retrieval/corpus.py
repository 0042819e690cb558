"""Passages, and the files they come in.

Two kinds of row are read: `{id, title, text}`, and Search-R1's `{id, contents}` where contents is
`"Title"`, a line break and the text. `{id, title, contents}` is the first kind by another name.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from otcrl.errors import ConfigError, DataError
from otcrl.jsonlines import read_json_lines

if TYPE_CHECKING:
    import pyarrow

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
        """Raises DataError naming file and line, or row."""
        empty = True
        for path in self.paths:
            for passage in read_passages(path):
                empty = False
                yield passage
        if empty:
            raise DataError(f"the corpus {list(self.paths)} holds no passage; expected rows {EXPECTED}")


def read_passages(path: str | Path) -> Iterator[Passage]:
    """The passages of one file, or of a data set on the Hugging Face hub; blank lines are skipped.

    Raises DataError naming the line or row.
    """
    for where, row in read_rows(str(path)):
        yield parse_passage(row, where)


def read_rows(path: str) -> Iterator[tuple[str, object]]:
    """(where it is, the row) of .jsonl, .jsonl.gz, .parquet, .arrow and .feather files, else of a hub data set."""
    if path.endswith((".parquet", ".arrow", ".feather")):
        yield from table_rows(path)
    elif Path(path).is_file() or not is_hub_name(path):
        yield from read_json_lines(path)
    else:
        yield from hub_rows(path)


def is_hub_name(path: str) -> bool:
    """`owner/name`, with no file's ending."""
    return path.count("/") == 1 and not path.startswith((".", "/", "~")) and "." not in path.rpartition("/")[2]


def table_rows(path: str) -> Iterator[tuple[str, object]]:
    try:
        import pyarrow
        import pyarrow.dataset
        import pyarrow.ipc
    except ImportError as error:
        raise ConfigError(f"{path} needs pyarrow: pip install 'otcrl[data]'") from error

    number = 0
    try:
        for batch in arrow_batches(path):
            for row in batch.to_pylist():
                number += 1
                yield f"{path}, row {number}", row
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from error
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise DataError(f"{path} is no whole {Path(path).suffix[1:]} file, read up to row {number}: {error}") from error


def arrow_batches(path: str) -> Iterator[pyarrow.RecordBatch]:
    """One after the other; Arrow files come as files and as streams, which is what `datasets` writes."""
    import pyarrow
    import pyarrow.dataset
    import pyarrow.ipc

    if path.endswith(".arrow"):
        with pyarrow.memory_map(path) as source:
            stream = None
            with contextlib.suppress(pyarrow.ArrowInvalid):
                stream = pyarrow.ipc.open_stream(source)
            if stream is not None:
                yield from stream
                return
    suffix = "parquet" if path.endswith(".parquet") else "feather"
    yield from pyarrow.dataset.dataset(path, format=suffix).to_batches(batch_size=1024)


def hub_rows(name: str) -> Iterator[tuple[str, object]]:
    """The `train` split, streamed."""
    try:
        import datasets
        from datasets.exceptions import DatasetsError
    except ImportError as error:
        raise ConfigError(f"{name} is no file, and a hub data set needs: pip install 'otcrl[data]'") from error

    try:
        rows = datasets.load_dataset(name, split="train", streaming=True)
    except (OSError, ValueError, DatasetsError) as error:
        raise DataError(f"{name} is no file, and no data set on the hub that can be read: {error}") from error
    for number, row in enumerate(rows, start=1):
        yield f"{name}, row {number}", row


def named(row: Mapping[str, Any]) -> dict[str, Any]:
    """Title and text of a row that has `contents`; a single line is a text without a title."""
    contents: str = row["contents"]
    if isinstance(row.get("title"), str):
        return {"title": row["title"], "text": contents}
    title, line_break, text = contents.partition("\n")
    if not line_break:
        return {"title": "", "text": contents}
    title = title.strip()
    is_quoted = len(title) > 1 and title[0] == title[-1] == '"'
    return {"title": title[1:-1] if is_quoted else title, "text": text}


def parse_passage(row: object, where: str) -> Passage:
    """One row. Raises DataError; `where` names the line in it."""
    if not isinstance(row, dict):
        raise DataError(f"{where}: expected a JSON object {EXPECTED}, got {str(row)[:60]}")
    if isinstance(row.get("contents"), str) and "text" not in row:
        row = {**row, **named(row)}
    if not isinstance(row.get("id"), str | int):
        raise DataError(f"{where}: expected {EXPECTED}, but `id` is missing; the row has {sorted(row)}")
    for column in ("title", "text"):
        if not isinstance(row.get(column), str):
            raise DataError(f"{where}: expected {EXPECTED}, but `{column}` is missing; the row has {sorted(row)}")
    return Passage(str(row["id"]), row["title"], row["text"])
