"""Small files of JSON and text: written whole or not at all, and read with errors that name them."""

import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def write_whole(path: Path, content: str | bytes) -> None:
    """Write beside the file and move: a killed process leaves the old one or the new one. OSError names the file.

    Half a character, as a command line can hold, becomes its escape, which JSON reads as it was."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        temporary.write_bytes(content if isinstance(content, bytes) else content.encode(errors="backslashreplace"))
        os.replace(temporary, path)
    except OSError as error:
        raise OSError(error.errno, f"{error.strerror}: cannot be written", str(path)) from error


def write_json(path: Path, content: Any, *, indent: int | None = 2) -> None:
    """The same, as JSON; a number that is not finite is null, since strict readers know no Infinity."""
    write_whole(path, json.dumps(finite(content), indent=indent, ensure_ascii=False, allow_nan=False) + "\n")


def finite(tree: Any) -> Any:
    """The same tree with None in the place of numbers that are not finite: JSON has no word for them."""
    if isinstance(tree, dict):
        return {name: finite(value) for name, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [finite(value) for value in tree]
    return None if isinstance(tree, float) and not math.isfinite(tree) else tree


def read_json_object(path: Path) -> dict[str, Any]:
    """A file that may be missing ({} then). ValueError: not a JSON object."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON ({error})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: holds a {type(content).__name__}, not an object")
    return content


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSONL file. A last line without an end, which a kill cut short, is skipped.

    Raises:
        ValueError: FILE:LINE of a line that is not a JSON object.
    """
    return list(each_json_line(path))


def each_json_line(path: Path) -> Iterator[dict[str, Any]]:
    """`read_json_lines` one by one, of a file that need not fit into memory."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                return
            try:
                row = json.loads(line.decode("utf-8"))
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{path}:{number}: not JSON ({error})") from error
            if not isinstance(row, dict):
                text = line[:80].decode("utf-8", "replace").strip()
                raise ValueError(f"{path}:{number}: expected a JSON object, found {text!r}")
            yield row
