"""``tokenizer train`` and ``tokenizer inspect``: a tokenizer of one's own, and what is in any."""

import dataclasses
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated

import tyro
from rich.table import Table

from deepseek_jax.data.model_folder import TOKENIZER
from deepseek_jax.data.special_tokens import DEEPSEEK_TEMPLATE
from deepseek_jax.data.text import read_documents
from deepseek_jax.data.tokenizer import Tokenizer
from deepseek_jax.saying import terminal
from deepseek_jax.workflows.tokenizer import train_on_files


@dataclasses.dataclass(frozen=True)
class _Train:
    """Train a byte-level BPE with DeepSeek's special tokens and chat format, each digit a token of its own, on
    documents; pretraining takes the folder (--data.tokenizer OUT)."""

    files: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="FILES")]
    """Text, of the kinds that pretraining's data.path takes."""
    vocab_size: int = 8192
    """Ids, special tokens included; fewer where the text has no pair left to merge."""
    out: str = "tokenizer"
    """The folder to write; it must hold no tokenizer."""
    text_field: str = "text"
    """The column of JSONL and Parquet files that holds the text."""
    skip_broken: bool = False
    """Leave broken lines out instead of stopping."""


@dataclasses.dataclass(frozen=True)
class _Inspect:
    """What a tokenizer has: ids, special tokens, chat template, what ends an answer; and how well it packs a text."""

    folder: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DIR")]
    """A folder that `tokenizer train` or a stage wrote, a released model's, or a tokenizer.json."""
    text: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Text to encode: its tokens, and bytes per token; give it several times for more."""
    file: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """A file, read as `tokenizer train` reads it, whose bytes per token are counted; give it several times for more."""
    text_field: str = "text"
    """The column of JSONL and Parquet files that holds the text."""


_Command = (
    Annotated[_Train, tyro.conf.subcommand("train", prefix_name=False)]
    | Annotated[_Inspect, tyro.conf.subcommand("inspect", prefix_name=False)]
)


def run_tokenizer(arguments: Sequence[str]) -> None:
    options = tyro.cli(_Command, args=list(arguments), prog="deepseek-jax tokenizer")  # type: ignore[arg-type]
    if isinstance(options, _Train):
        _train(options)
    else:
        _inspect(options)


def _train(options: _Train) -> None:
    if not options.files:
        raise ValueError("give FILES to train on")
    if (Path(options.out) / TOKENIZER).exists():  # runs may be going on with it
        raise FileExistsError(f"{options.out}/{TOKENIZER} exists already; choose another --out or remove it")
    console, began = terminal(), time.monotonic()
    console.print("reading the text and counting its pairs …", style="dim")
    tokenizer = train_on_files(
        options.files,
        options.vocab_size,
        options.out,
        text_field=options.text_field,
        skip_broken=options.skip_broken,
    )
    seconds = time.monotonic() - began
    fewer = "" if tokenizer.vocab_size >= options.vocab_size else f", all that the text gives of {options.vocab_size:,}"
    console.print(f"{tokenizer.vocab_size:,} ids{fewer} in {seconds:.1f} s → {options.out}", soft_wrap=True)
    console.print(f"--data.tokenizer {options.out} pretrains with it", soft_wrap=True)


def _inspect(options: _Inspect) -> None:
    tokenizer = Tokenizer.from_folder(options.folder)
    table = Table(title=options.folder, show_header=False)
    table.add_column()
    table.add_column(overflow="fold")
    for name, value in describe(tokenizer).items():
        table.add_row(name, value)
    for text in options.text:
        shown = [tokenizer.decode([i], skip_special_tokens=False) for i in tokenizer.encode(text)]
        table.add_row(f"{text!r:.40}", f"{packing(tokenizer, [text])}: {' '.join(map(repr, shown))}")
    for file in options.file:
        documents = read_documents(file, text_field=options.text_field)
        table.add_row(file, packing(tokenizer, documents))
    terminal().print(table)


def describe(tokenizer: Tokenizer) -> dict[str, str]:
    """What a tokenizer has, as lines to print."""

    def spelled(ids: Iterable[int]) -> str:
        named = (f"{tokenizer.decode([i], skip_special_tokens=False)} {i}" for i in ids)
        return ", ".join(named) or "none"

    added = tokenizer.added_ids
    some = spelled(added) if len(added) <= 24 else f"{spelled(added[:4])}, …, {spelled(added[-20:])}: {len(added):,}"
    template = "none"
    if tokenizer.template is not None:
        own = tokenizer.template.source != DEEPSEEK_TEMPLATE
        template = f"its own, {len(tokenizer.template.source):,} characters" if own else "DeepSeek's format"
    elif tokenizer.has_chat_tokens:
        template = "DeepSeek's format, by its tokens"
    lines = {
        "ids": f"{tokenizer.vocab_size:,}",
        "in front of text": spelled(tokenizer.bos_ids),
        "ends an answer": spelled(tokenizer.stop_ids),
        "pads": spelled([tokenizer.pad_id]),
        "added tokens": some,
        "chat template": template,
        "fingerprint": tokenizer.fingerprint[:16],
    }
    if template != "none":
        lines["a question"] = _asked(tokenizer)
    return lines


def _asked(tokenizer: Tokenizer) -> str:
    from deepseek_jax.data.chat import encode_prompt

    prompt = encode_prompt(tokenizer, [{"role": "user", "content": "Hi"}])
    return repr(tokenizer.decode(prompt, skip_special_tokens=False))


def packing(tokenizer: Tokenizer, documents: Iterable[str]) -> str:
    """How many bytes of text a token stands for on average."""
    size = count = 0
    for document in documents:
        size += len(document.encode("utf-8", "replace"))
        count += len(tokenizer.encode(document))
    return f"{size:,} bytes, {count:,} tokens, {size / max(count, 1):.2f} bytes per token"
