"""Documents to ids on disk: what a worker process does. As a program it imports neither jax nor this package.

On standard input come a line of JSON {"tokenizer": bytes of the tokenizer.json that follows, "dtype"}, then for each
shard a line {"path", "lengths": bytes of each document} and the documents; a line on standard output answers each.
"""

import json
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO

import numpy as np
import tokenizers


def write_shard(backend: tokenizers.Tokenizer, documents: Iterable[bytes], path: Path, dtype: np.dtype) -> None:
    """The file of a shard: the documents' ids one after another, then their numbers of ids (<u4), and how many they are
    (<u8). It has its name only when it is whole and on the disk. OSError names the file."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}")
    counts = []
    try:
        with open(temporary, "wb") as file:
            for document in documents:
                ids = backend.encode(document.decode("utf-8"), add_special_tokens=False).ids
                file.write(np.array(ids, dtype).tobytes())
                counts.append(len(ids))
            file.write(np.array(counts, "<u4").tobytes() + np.array(len(counts), "<u8").tobytes())
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise OSError(error.errno, f"{error.strerror}: tokens could not be written", str(path)) from error
    finally:
        temporary.unlink(missing_ok=True)


def _serve(requests: BinaryIO, replies: BinaryIO) -> None:
    settings = json.loads(requests.readline())
    backend = tokenizers.Tokenizer.from_str(requests.read(settings["tokenizer"]).decode("utf-8"))
    for line in requests:
        shard = json.loads(line)
        documents = [requests.read(length) for length in shard["lengths"]]
        reply = None
        try:
            write_shard(backend, documents, Path(shard["path"]), np.dtype(settings["dtype"]))
        except OSError as error:
            reply = [error.errno, error.strerror, error.filename]
        replies.write(json.dumps(reply).encode() + b"\n")
        replies.flush()


if __name__ == "__main__":
    _serve(sys.stdin.buffer, sys.stdout.buffer)
