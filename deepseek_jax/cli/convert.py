"""``convert``: a released model's folder to our own checkpoint and back."""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Literal

import tyro
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from deepseek_jax.checkpoint import CheckpointStore, hf_convert
from deepseek_jax.checkpoint.hf_load import KEPT_FP8, Released
from deepseek_jax.checkpoint.hf_save import copy_companions, filling, publish, write_model
from deepseek_jax.checkpoint.model import CHECKPOINTS, TOKENIZER, is_released, load
from deepseek_jax.cli.talk import find_run

GIGABYTE = 10**9


@dataclasses.dataclass(frozen=True)
class _Convert:
    """Convert between a released model's folder (config.json and safetensors) and this project's own checkpoints, in
    the direction that SRC calls for. Killed on the way it leaves nothing but DST.partial; run again, it goes on.

    src: a released model's folder, or one that a stage or the demo wrote.
    dst: the folder to write; it must not exist.
    dtype: of the weights written; float8_e4m3 only to a released model's format.
    shard_gigabytes: how large one safetensors file may become.
    """

    src: Annotated[str, tyro.conf.Positional]
    dst: Annotated[str, tyro.conf.Positional]
    dtype: Literal["bfloat16", "float32", "float8_e4m3"] = "bfloat16"
    shard_gigabytes: float = 5.0
    ignore_config: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """A field of config.json to pass over; give it several times for more."""


def run_convert(arguments: Sequence[str]) -> None:
    options = tyro.cli(_Convert, args=list(arguments), prog="deepseek-jax convert")
    if is_released(options.src):
        _to_orbax(options)
    else:
        _to_hf(options)
    Console().print(f"→ {options.dst}")


def _to_orbax(options: _Convert) -> None:
    if options.dtype == KEPT_FP8:
        raise ValueError(f"--dtype {KEPT_FP8}: our own checkpoints hold bfloat16 or float32")
    source, target = Path(options.src), Path(options.dst)
    with Released(source, dtype=options.dtype, ignore_config=options.ignore_config) as released:
        files = [source / "config.json", *source.glob("*.safetensors*")]
        task = f"{_name_of(files)} {options.dtype} {[*options.ignore_config]} {hf_convert.LAYOUT}"
        with filling(target, hf_convert.size_of(released), task) as partial:
            with _progress("converting") as (start, advance):
                hf_convert.write_checkpoint(
                    released,
                    partial / CHECKPOINTS / "0",
                    meta={"stage": "convert", "model": released.config.to_dict()},
                    on_start=start,
                    on_tensor=advance,
                )
            copied = copy_companions(source, partial)
            publish(partial, target)
    if TOKENIZER not in copied:
        Console(stderr=True).print(f"{source} holds no {TOKENIZER}: generate and sft will ask for one in {target}")


def _to_hf(options: _Convert) -> None:
    if options.ignore_config:
        raise ValueError(f"--ignore-config is for a released model's config.json, and {options.src} is none")
    run = find_run(options.src)
    trained = load(run)
    with _progress("writing") as (start, advance):
        write_model(
            trained.config,
            trained.params,
            trained.router_bias,
            Path(options.dst),
            options.dtype,
            run,
            max_shard_bytes=int(options.shard_gigabytes * GIGABYTE),
            resume_as=_name_of_newest(run),
            on_start=start,
            on_tensor=advance,
        )


def _name_of_newest(run: Path) -> str:
    """What tells the newest checkpoint of a run from any other."""
    with CheckpointStore(run / CHECKPOINTS, keep=1) as store:
        folder = store.directory / str(store.latest_step())
    return _name_of([file for file in folder.rglob("*") if file.is_file()])


def _name_of(files: Iterable[Path]) -> str:
    """What tells these files from others: their places, sizes and times."""
    facts = [[str(file.absolute()), file.stat().st_size, file.stat().st_mtime_ns] for file in sorted(files)]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


@contextmanager
def _progress(what: str) -> Iterator[tuple[Callable[[int], None], Callable[[int], None]]]:
    """A bar of bytes -> (set its total, advance it)."""
    columns = (TextColumn(what), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns) as bar:
        task = bar.add_task(what, total=None)
        yield (lambda total: bar.update(task, total=total)), (lambda size: bar.update(task, advance=size))
