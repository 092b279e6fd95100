"""Reads documents, chats and rows of any columns from files; a broken line is named by file and line."""

import codecs
import gzip
import json
import logging
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from deepseek_jax.data import hub
from deepseek_jax.data.conversations import Conversation, read_conversation
from deepseek_jax.data.files import LINES, ROWS, TEXTS, PathLike, find_files, open_file

logger = logging.getLogger(__name__)

T = TypeVar("T")

# A longer .txt is several documents, so that one takes little memory and no more than its share of a shuffle.
LONGEST_TEXT = 2**20


def read_documents(
    paths: PathLike | Iterable[PathLike],
    *,
    text_field: str = "text",
    skip_broken: bool = False,
    skipped: Counter[str] | None = None,
    read: Counter[str] | None = None,
) -> Iterator[str]:
    """Documents of .jsonl(.gz|.zst), .parquet and `hf:` (one a line or row, in `text_field`), .txt, .md (one a file).

    paths: files, folders and globs, see `find_files`. A text of more than a megabyte is several documents, cut at the
    end of a line.

    A broken line is a ValueError "FILE:LINE: what is wrong". With `skip_broken` it is left out, counted in
    `skipped[FILE]`, and each file's number is logged. A file that cannot be read on is always an error.
    `read[FILE]` counts its bytes so far.
    """
    for row in read_texts(paths, text_field=text_field, skip_broken=skip_broken, skipped=skipped, read=read):
        yield row[text_field]


def read_texts(
    paths: PathLike | Iterable[PathLike],
    *,
    text_field: str = "text",
    also: str | None = None,
    skip_broken: bool = False,
    skipped: Counter[str] | None = None,
    read: Counter[str] | None = None,
) -> Iterator[dict[str, Any]]:
    """`read_documents` as rows, which hold the column `also` beside the text, where they have it."""

    def document(value: Any) -> dict[str, Any]:
        if not isinstance(value, dict):
            raise ValueError(f"a {type(value).__name__}; each line must be an object")
        if text_field not in value:
            has = ", ".join(map(str, value)) or "none"
            raise ValueError(f'no field "{text_field}" but {has}: --data.text-field (or --text-field) names the text')
        check_text(value[text_field], text_field)
        return {name: value[name] for name in (text_field, also) if name is not None and name in value}

    for path in find_files(paths, (*TEXTS, *ROWS)):
        if path.suffix in TEXTS:
            records = _texts(path, text_field, read)
        else:
            columns = [text_field] if also is None else [text_field, also]
            records = _records(path, columns, also=", .txt, .md", read=read)
        yield from _good(path, records, document, skip_broken, skipped)


def read_chats(
    paths: PathLike | Iterable[PathLike],
    *,
    read: Callable[[Any], Conversation] = read_conversation,
    then: Callable[[Conversation], T] = lambda conversation: conversation,
    skip_broken: bool = False,
    skipped: Counter[str] | None = None,
) -> Iterator[T]:
    """Conversations of .jsonl(.gz|.zst), .parquet or `hf:`, one a line or row, in any form of `read_conversation`.

    read: what reads a row in its place. then: what is made of each. Broken lines, and those that one of them raises
    ValueError for, are treated as in `read_documents`; those that it raises RefusedError for are an error in any case.
    """

    def chat(value: Any) -> T:
        conversation = read(value)
        for message in conversation.messages:
            check_text(message["content"] or "", "content")
        return then(conversation)

    yield from read_checked(paths, chat, skip_broken=skip_broken, skipped=skipped)


def read_checked(
    paths: PathLike | Iterable[PathLike],
    check: Callable[[Any], T],
    *,
    skip_broken: bool = False,
    skipped: Counter[str] | None = None,
) -> Iterator[T]:
    """What `check` makes of each record of .jsonl(.gz|.zst), .parquet or `hf:`; its ValueErrors as in `read_chats`."""
    for path in find_files(paths):
        yield from _good(path, _records(path), check, skip_broken, skipped)


class RefusedError(ValueError):
    """A record that ``skip_broken`` must not leave out: nothing in it is broken."""


class Record(dict[str, Any]):
    """A row by column; `where` says which it is: "FILE:LINE", or "FILE:ROW" of a Parquet file, counted from 1."""

    __slots__ = ("where",)

    def __init__(self, columns: Mapping[str, Any], where: str):
        super().__init__(columns)
        self.where = where


def read_rows(paths: PathLike | Iterable[PathLike]) -> Iterator[Record]:
    """Rows of .jsonl(.gz|.zst), .parquet and `hf:` with whatever columns they have, one at a time.

    A broken line, and one that is no JSON object, is a ValueError "FILE:LINE: what is wrong".
    """
    for path in find_files(paths):
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


def _records(
    path: Path, columns: list[str] | None = None, *, also: str = "", read: Counter[str] | None = None
) -> _Records:
    """The records of a file by the kind that its name says; of Parquet, `columns` alone, of which it has the first."""
    if hub.is_hub(str(path)):
        return _hub_rows(str(path), columns, read)
    if path.name.endswith(LINES):
        return _json_lines(path, read)
    if path.suffix == ".parquet":
        return _parquet_rows(path, columns, read)
    raise ValueError(f"{path}: unknown kind of file; {', '.join(ROWS)}{also} can be read")


def _json_lines(path: Path, read: Counter[str] | None) -> _Records:
    number = 0
    file, raw = open_file(path)
    with raw, file:
        try:
            for number, line in enumerate(file, start=1):
                if read is not None:
                    read[str(path)] = raw.tell()
                if number == 1:
                    line = line.removeprefix(codecs.BOM_UTF8)
                if line.strip():
                    yield number, lambda line=line: _parse_json(line)
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise ValueError(f"{path}:{number + 1}: the gzip data is broken from here on ({error})") from error
        except OSError as error:
            if path.suffix != ".zst":
                raise
            raise ValueError(f"{path}:{number + 1}: the zstd data is broken from here on ({error})") from error


def _parse_json(line: bytes) -> Any:
    try:
        return json.loads(line.decode("utf-8").rstrip())
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON (column {error.colno}: {error.msg}); one JSON object a line") from error
    except RecursionError as error:
        raise ValueError("JSON that is nested too deeply to be read") from error


def _parquet_rows(path: Path, columns: list[str] | None, read: Counter[str] | None) -> _Records:
    import pyarrow
    import pyarrow.parquet

    try:
        # No pre-buffering: a row group of gigabytes is read page by page.
        file = pyarrow.parquet.ParquetFile(path, pre_buffer=False, buffer_size=2**20)
    except (pyarrow.ArrowInvalid, OSError) as error:
        if isinstance(error, FileNotFoundError | PermissionError):
            raise
        raise ValueError(f"{path}: not a whole Parquet file ({error})") from error
    with file:
        names = _present(path, file.schema_arrow.names, columns)
        number, size = 0, path.stat().st_size
        for batch in _batches(path, file, names):
            columns_of = list(zip(batch.schema.names, batch.columns, strict=True))
            for index in range(batch.num_rows):
                number += 1
                yield number, lambda columns=columns_of, index=index: {n: _own(at[index].as_py()) for n, at in columns}
            if read is not None:
                read[str(path)] = size * number // file.metadata.num_rows


def _batches(path: Path, file: Any, names: list[str] | None) -> Iterator[Any]:
    try:
        yield from file.iter_batches(batch_size=256, columns=names)
    except (OSError, ValueError) as error:  # Arrow's own, which name no file
        raise ValueError(f"{path}: the Parquet data cannot be read on ({error})") from error


def _own(value: Any) -> Any:
    """The value without the nulls of its structs: Arrow gives each the fields of all in its column."""
    if isinstance(value, dict):
        return {name: _own(field) for name, field in value.items() if field is not None}
    return [_own(item) for item in value] if isinstance(value, list) else value


def _hub_rows(path: str, columns: list[str] | None, read: Counter[str] | None) -> _Records:
    dataset = hub.load(path)
    if (names := _present(path, dataset.column_names, columns)) is not None:
        dataset = dataset.select_columns(names)
    size = 0 if read is None else int(hub.describe(path)["bytes"])
    for number, row in enumerate(dataset, start=1):
        if read is not None:
            read[path] = size * number // len(dataset)
        yield number, lambda row=row: {column: _own(value) for column, value in row.items()}


def _present(path: PathLike, names: list[str], columns: list[str] | None) -> list[str] | None:
    if columns is None:
        return None
    if columns[0] not in names:
        raise ValueError(f'{path}: no column "{columns[0]}"; it has {", ".join(names)}')
    return [column for column in columns if column in names]


def _texts(path: Path, text_field: str, read: Counter[str] | None) -> _Records:
    """A file of text as one record, or as several of a megabyte; each has the number of its first line, or of the
    first that is no UTF-8."""
    number = 1
    with open(path, "rb") as file:
        start = file.read(len(codecs.BOM_UTF8)).removeprefix(codecs.BOM_UTF8)
        while block := start + file.read(LONGEST_TEXT):
            block += file.readline(LONGEST_TEXT)
            while (following := file.peek(1)[:1]) and 0x80 <= following[0] < 0xC0:  # inside a character
                block += file.read(1)
            if read is not None:
                read[str(path)] = file.tell()
            wrong = 0
            try:
                block.decode("utf-8")
            except UnicodeDecodeError as error:
                wrong = block.count(b"\n", 0, error.start)
            yield number + wrong, lambda block=block: {text_field: block.decode("utf-8")}
            start, number = b"", number + block.count(b"\n")


def check_text(value: Any, field: str) -> str:
    """`value`, if it is text that a tokenizer can take; ValueError if not."""
    if not isinstance(value, str):
        raise ValueError(f'"{field}" is of type {type(value).__name__}; it must be text')
    value.encode("utf-8")  # JSON can spell half a surrogate pair, which is no text
    return value
