"""Reads documents and chats from files; a broken line is named by file and line."""

import gzip
import json
import logging
import os
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from deepseek_jax.data.chat import check_messages

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
        return _check_text(value[text_field], text_field)

    for path in map(Path, _as_list(paths)):
        if path.name.endswith(_JSONL):
            records = _json_lines(path)
        elif path.suffix == ".parquet":
            records = _parquet_rows(path, text_field)
        elif path.suffix == ".txt":
            records = iter([(1, lambda path=path: {text_field: path.read_bytes().decode("utf-8")})])
        else:
            raise ValueError(f"{path}: unknown kind of file; .jsonl, .jsonl.gz, .parquet and .txt can be read")
        yield from _good(path, records, document, skip_broken, skipped)


def read_chats(
    paths: PathLike | Iterable[PathLike], *, skip_broken: bool = False, skipped: Counter[str] | None = None
) -> Iterator[list[dict[str, str]]]:
    """Conversations of .jsonl or .jsonl.gz: {"messages": [{"role", "content"}, ...]} a line.

    Broken lines are treated as in `read_documents`.
    """

    def chat(value: Any) -> list[dict[str, str]]:
        if not isinstance(value, dict) or "messages" not in value:
            raise ValueError('no field "messages"; each line must be {"messages": [{"role": ..., "content": ...}]}')
        check_messages(value["messages"])
        for message in value["messages"]:
            _check_text(message["content"], "content")
        return value["messages"]

    for path in map(Path, _as_list(paths)):
        yield from _good(path, _json_lines(path), chat, skip_broken, skipped)


def read_objects(path: PathLike) -> list[dict[str, Any]]:
    """All objects of a .jsonl or .jsonl.gz file; a broken line is a ValueError "FILE:LINE: what is wrong"."""

    def record(value: Any) -> dict[str, Any]:
        if not isinstance(value, dict):
            raise ValueError(f"a {type(value).__name__}; each line must be an object")
        return value

    return list(_good(Path(path), _json_lines(Path(path)), record, False, None))


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
            if not skip_broken:
                raise ValueError(f"{path}:{line}: {error}") from error
            broken += 1
            if skipped is not None:
                skipped[str(path)] += 1
            continue
        yield value
    if broken:
        logger.warning("%s: skipped %d broken lines", path, broken)


def _json_lines(path: Path) -> _Records:
    if not path.name.endswith(_JSONL):
        raise ValueError(f"{path}: unknown kind of file; .jsonl and .jsonl.gz can be read")
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


def _parquet_rows(path: Path, column: str) -> _Records:
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"{path}: not a whole Parquet file ({error})") from error
    with file:
        names = file.schema_arrow.names
        if column not in names:
            raise ValueError(f'{path}: no column "{column}"; it has {", ".join(names)}')
        number = 0
        for batch in file.iter_batches(batch_size=1024, columns=[column]):
            for value in batch.column(0):
                number += 1
                yield number, lambda value=value: {column: value.as_py()}


def _check_text(value: Any, field: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f'"{field}" is of type {type(value).__name__}; it must be text')
    value.encode("utf-8")  # JSON can spell half a surrogate pair, which is no text
    return value


def _as_list(paths: PathLike | Iterable[PathLike]) -> list[PathLike]:
    return [paths] if isinstance(paths, (str, os.PathLike)) else list(paths)
