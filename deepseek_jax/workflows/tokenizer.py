"""A tokenizer trained on the documents of files: the one way, of the command and of the demo."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from deepseek_jax.data.text import PathLike, read_documents
from deepseek_jax.data.tokenizer import Tokenizer
from deepseek_jax.data.tokenizer_training import train_tokenizer


def train_on_files(
    paths: Sequence[PathLike],
    vocab_size: int,
    folder: str | Path,
    *,
    text_field: str = "text",
    skip_broken: bool = False,
) -> Tokenizer:
    """``train_tokenizer`` on what ``read_documents`` finds, saved to ``folder``. The same files give the same bytes.

    ValueError where there is no text in them, and what those two raise.
    """
    read = 0

    def documents() -> Iterator[str]:
        nonlocal read
        for document in read_documents(paths, text_field=text_field, skip_broken=skip_broken):
            read += len(document)
            yield document

    tokenizer = train_tokenizer(documents(), vocab_size)
    if not read:
        raise ValueError(f"{', '.join(map(str, paths))}: there is no text to train a tokenizer on")
    tokenizer.save(folder)
    return tokenizer
