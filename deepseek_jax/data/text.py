"""Reads documents, chats and rows of any columns from files; a broken line is named by file and line."""

import gzip
import json
import logging
import os
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from deepseek_jax.data.conversations import Conversation, read_conversation

logger = logging.getLogger(__name__)

PathLike = str | os.PathLike[str]
T = TypeVar("T")

_JSONL = (".jsonl", ".jsonl.gz")


def read_documents(
    paths: PathLike | Iterable[PathLike],
    *,
    text_field: str = "text",
    skip_broken: bool = False,
    skipped: Counter[str] | None = None,
) -> Iterator[str]:
    """Documents of .jsonl, .jsonl.gz and .parquet (one a line or row, in `text_field`) and .txt (one a file).

    A broken line is a ValueError "FILE:LINE: what is wrong". With `skip_broken` it is left out, counted in
    `skipped[FILE]`, and each file's number is logged. A file that cannot be read on is always an error.
    """

    def document(value: Any) -> str:
        if not isinstance(value, dict) or text_field not in value:
            raise ValueError(f'no field "{text_field}"; each line must be {{"{text_field}": "..."}}')
        return check_text(value[text_field], text_field)

    for path in map(Path, _as_list(paths)):
        if path.suffix == ".txt":
            records = iter([(1, lambda path=path: {text_field: path.read_bytes().decode("utf-8")})])
        else:
            records = _records(path, text_field, also=", .txt")
        yield from _good(path, records, document, skip_broken, skipped)


def read_chats(
    paths: PathLike | Iterable[PathLike],
    *,
    then: Callable[[Conversation], T] = lambda conversation: conversation,
    skip_broken: bool = False,
    skipped: Counter[str] | None = None,
) -> Iterator[T]:
    """Conversations of .jsonl, .jsonl.gz or .parquet, one a line or row, in any form that `read_conversation` knows.

    then: what is made of each. Broken lines, and those that it raises ValueError for, are treated as in
    `read_documents`; those that it raises RefusedError for are an error in any case.
    """

    def chat(value: Any) -> T:
        conversation = read_conversation(value)
        for message in conversation.messages:
            check_text(message["content"] or "", "content")
        return then(conversation)

    for path in map(Path, _as_list(paths)):
        yield from _good(path, _records(path), chat, skip_broken, skipped)


class RefusedError(ValueError):
    """A record that ``skip_broken`` must not leave out: nothing in it is broken."""


class Record(dict[str, Any]):
    """A row by column; `where` says which it is: "FILE:LINE", or "FILE:ROW" of a Parquet file, counted from 1."""

    __slots__ = ("where",)

    def __init__(self, columns: Mapping[str, Any], where: str):
        super().__init__(columns)
        self.where = where


def read_rows(paths: PathLike | Iterable[PathLike]) -> Iterator[Record]:
    """Rows of .jsonl, .jsonl.gz and .parquet with whatever columns they have, one at a time.

    A broken line, and one that is no JSON object, is a ValueError "FILE:LINE: what is wrong".
    """
    for path in map(Path, _as_list(paths)):
        for number, parse in _records(path):
            try:
                columns = parse()
                if not isinstance(columns, dict):
                    raise ValueError(f"a {type(columns).__name__}; each line must be an object")
            except ValueError as error:
                raise ValueError(f"{path}:{number}: {error}") from error
            yield Record(columns, f"{path}:{number}")


def read_objects(path: PathLike) -> list[Record]:
    """All of a file's rows, see `read_rows`."""
    return list(read_rows(path))


# A record that is not parsed yet: its line number, and a function that parses it or raises ValueError.
_Records = Iterator[tuple[int, Callable[[], Any]]]


def _good(
    path: Path, records: _Records, check: Callable[[Any], T], skip_broken: bool, skipped: Counter[str] | None
) -> Iterator[T]:
    broken = 0
    for line, parse in records:
        try:
            value = check(parse())
        except ValueError as error:  # of which JSONDecodeError and UnicodeDecodeError are kinds
            if not skip_broken or isinstance(error, RefusedError):
                raise ValueError(f"{path}:{line}: {error}") from error
            broken += 1
            if skipped is not None:
                skipped[str(path)] += 1
            continue
        yield value
    if broken:
        logger.warning("%s: skipped %d broken lines", path, broken)


def _records(path: Path, column: str | None = None, *, also: str = "") -> _Records:
    """The records of a file by the kind that its name says; of Parquet, `column` alone."""
    if path.name.endswith(_JSONL):
        return _json_lines(path)
    if path.suffix == ".parquet":
        return _parquet_rows(path, column)
    raise ValueError(f"{path}: unknown kind of file; {', '.join(_JSONL)}, .parquet{also} can be read")


def _json_lines(path: Path) -> _Records:
    number = 0
    with gzip.open(path, "rb") if path.suffix == ".gz" else open(path, "rb") as file:
        try:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield number, lambda line=line: _parse_json(line)
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise ValueError(f"{path}:{number + 1}: the gzip data is broken from here on ({error})") from error


def _parse_json(line: bytes) -> Any:
    try:
        return json.loads(line.decode("utf-8").rstrip())
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON ({error.msg} at column {error.colno}); one JSON object a line") from error


def _parquet_rows(path: Path, column: str | None) -> _Records:
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"{path}: not a whole Parquet file ({error})") from error
    with file:
        names = file.schema_arrow.names
        if column is not None and column not in names:
            raise ValueError(f'{path}: no column "{column}"; it has {", ".join(names)}')
        number = 0
        for batch in file.iter_batches(batch_size=1024, columns=None if column is None else [column]):
            columns = list(zip(batch.schema.names, batch.columns, strict=True))
            for index in range(batch.num_rows):
                number += 1
                yield number, lambda columns=columns, index=index: {name: at[index].as_py() for name, at in columns}


def check_text(value: Any, field: str) -> str:
    """`value`, if it is text that a tokenizer can take; ValueError if not."""
    if not isinstance(value, str):
        raise ValueError(f'"{field}" is of type {type(value).__name__}; it must be text')
    value.encode("utf-8")  # JSON can spell half a surrogate pair, which is no text
    return value


def _as_list(paths: PathLike | Iterable[PathLike]) -> list[PathLike]:
    return [paths] if isinstance(paths, (str, os.PathLike)) else list(paths)
