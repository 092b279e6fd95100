"""Documents to ids on disk. As a program it is what makes tokens beside a run: it imports neither jax nor this package,
and holds the tokenizer once, however many processes share it.

Its arguments are the numbers of sockets, one for each process. On standard input come a line of JSON {"tokenizer",
"type"}, the first of them the bytes of the tokenizer.json that follows. On each socket come shards: a line {"path",
"lengths"}, the latter the bytes of each document, and the documents; a line answers each, null or what an OSError is
made of.
"""

import contextlib
import json
import os
import socket
import sys
from array import array
from collections.abc import Iterable
from pathlib import Path

import tokenizers


def write_shard(backend: tokenizers.Tokenizer, documents: Iterable[bytes], path: Path, typecode: str) -> None:
    """The file of a shard: the documents' ids one after another, then their numbers of ids (<u4), and how many they are
    (<u8). It has its name only when it is whole and on the disk. OSError names the file.

    typecode: of `array`, of the ids: "H" for two bytes, "I" for four.
    """
    temporary = path.with_name(f"{path.name}.{os.getpid()}")
    counts = array("I")
    try:
        with open(temporary, "wb") as file:
            for document in documents:
                ids = backend.encode(document.decode("utf-8"), add_special_tokens=False).ids
                file.write(_little_endian(array(typecode, ids)))
                counts.append(len(ids))
            file.write(_little_endian(counts) + len(counts).to_bytes(8, "little"))
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise OSError(error.errno, f"{error.strerror}: tokens could not be written", str(path)) from error
    finally:
        temporary.unlink(missing_ok=True)


def _little_endian(numbers: array) -> bytes:
    if sys.byteorder == "big":
        numbers.byteswap()
    return numbers.tobytes()


def _serve(link: socket.socket, backend: tokenizers.Tokenizer, typecode: str) -> None:
    with link, link.makefile("rwb") as stream:
        for line in stream:
            shard = json.loads(line)
            documents = [stream.read(length) for length in shard["lengths"]]
            reply = None
            try:
                write_shard(backend, documents, Path(shard["path"]), typecode)
            except OSError as error:
                reply = [error.errno, error.strerror, error.filename]
            stream.write(json.dumps(reply).encode() + b"\n")
            stream.flush()


def _main() -> None:
    links = [socket.socket(fileno=int(number)) for number in sys.argv[1:]]
    settings = json.loads(sys.stdin.buffer.readline())
    backend = tokenizers.Tokenizer.from_str(sys.stdin.buffer.read(settings["tokenizer"]).decode("utf-8"))
    for mine in links:
        if os.fork() == 0:
            for link in links:
                if link is not mine:
                    link.close()  # so that each end is seen by the other
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # the run has ended
                _serve(mine, backend, settings["type"])
            os._exit(0)
    for link in links:
        link.close()
    for _ in links:
        os.wait()


if __name__ == "__main__":
    _main()
