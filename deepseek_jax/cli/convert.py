"""``convert``: a run, or a released model's folder, to a released model's folder."""

import dataclasses
import hashlib
import json
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Literal

import tyro
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from deepseek_jax.checkpoint import CheckpointStore
from deepseek_jax.checkpoint.finding import CHECKPOINTS, find_model, is_released
from deepseek_jax.checkpoint.hf_load import KEPT, KEPT_FP8
from deepseek_jax.checkpoint.hf_save import released_bytes, write_model
from deepseek_jax.checkpoint.integers import KEPT_INTEGERS
from deepseek_jax.checkpoint.model import load, read_config
from deepseek_jax.checkpoint.places import sizes
from deepseek_jax.checkpoint.publishing import check_place
from deepseek_jax.checkpoint.safetensors import TensorFiles
from deepseek_jax.compute import ComputeConfig
from deepseek_jax.saying import terminal
from deepseek_kernels.block_fp8 import FP8
from deepseek_kernels.integers import GROUP

GIGABYTE = 10**9


@dataclasses.dataclass(frozen=True)
class _Convert:
    """Write a model as released ones are: config.json, safetensors, tokenizer and chat template, as transformers, vLLM
    and every command here read it. The whole model is in memory meanwhile. Killed on the way it leaves nothing but
    DST.partial; run again, it goes on."""

    src: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SRC")]
    """A folder that a stage or the demo wrote, or a released model's, to have its weights in another dtype."""
    dst: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DST")]
    """The folder to write; it must not exist, or be empty."""
    dtype: Literal["bfloat16", "float32", "float8_e4m3"] = "bfloat16"
    """Of the weights written; float8_e4m3: matrices in blocks with scales, as V3 is released."""
    quantize: Literal["none", "fp8", "int8", "int4"] = "none"
    """fp8: as --dtype float8_e4m3; int8, int4: matrices as whole numbers with a scale for each --group terms of an
    output, as compressed-tensors has them. Router, norms, embedding, head and MLA's kv_b stay bfloat16."""
    group: int = GROUP
    """Of int8 and int4: even, 128 or 32 for instance."""
    shard_gigabytes: float = 5.0
    """How large one safetensors file may become."""
    step: int = 0
    """Of a run, a checkpoint other than the newest (0)."""
    ema: bool = False
    """Of a run, the running mean of the parameters in their place."""
    ignore_config: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """A field of a released config.json to take as absent; give it several times for more."""


def run_convert(arguments: Sequence[str]) -> None:
    options = tyro.cli(_Convert, args=list(arguments), prog="deepseek-jax convert")
    source = find_model(options.src)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # load says them again
        config = read_config(source, step=options.step or None, ignore_config=options.ignore_config)
    dtype = _written_as(options)
    size = released_bytes(config, dtype, options.group)
    check_place(Path(options.dst), size)  # better known before a large model is read
    compute = ComputeConfig(param_dtype=_read_as(source, dtype))
    model = load(
        source, compute=compute, step=options.step or None, ema=options.ema, ignore_config=options.ignore_config
    )
    with _progress("writing") as (start, advance):
        write_model(
            model,
            Path(options.dst),
            dtype,
            group=options.group,
            max_shard_bytes=int(options.shard_gigabytes * GIGABYTE),
            resume_as=f"{_name_of(source, options.step)} {options.ema} {[*options.ignore_config]}",
            on_start=start,
            on_tensor=advance,
        )
    terminal().print(f"→ {options.dst}", soft_wrap=True)


def _written_as(options: _Convert) -> str:
    """The name of what --dtype and --quantize say together."""
    if options.group != GROUP and options.quantize not in KEPT_INTEGERS:
        raise ValueError(f"--group {options.group} --quantize {options.quantize}: int8 and int4 alone have groups")
    if options.quantize == "none":
        return options.dtype
    name = KEPT_FP8 if options.quantize == "fp8" else options.quantize
    if options.dtype not in ("bfloat16", name):
        raise ValueError(f"--dtype {options.dtype} --quantize {options.quantize}: what is not quantised is bfloat16")
    return name


def _read_as(source: Path, dtype: str) -> Literal["bfloat16", "float32", "float8_e4m3"]:
    """The dtype in which nothing is lost that ``dtype`` would keep."""
    if dtype not in KEPT:
        return "bfloat16" if dtype == "bfloat16" else "float32"
    if is_released(source):
        with TensorFiles(source) as files:
            if any(tensor.dtype == FP8 for tensor in files.tensors.values()):
                return KEPT_FP8
    return "float32"


def _name_of(source: Path, step: int) -> str:
    """What tells these weights from others: their files' places, sizes and times."""
    if is_released(source):
        files: Iterable[Path] = [source / "config.json", *source.glob("*.safetensors*")]
    else:
        with CheckpointStore(source / CHECKPOINTS, keep=1) as store:
            folder = store.directory / str(step or store.latest_step())
        if not isinstance(folder, Path):
            return hashlib.sha256(json.dumps([str(folder), sizes(folder)]).encode()).hexdigest()
        files = folder.rglob("*")
    facts = [[str(file.absolute()), file.stat().st_size, file.stat().st_mtime_ns] for file in sorted(files)]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


@contextmanager
def _progress(what: str) -> Iterator[tuple[Callable[[int], None], Callable[[int], None]]]:
    """A bar of bytes -> (set its total, advance it)."""
    columns = (TextColumn(what), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns) as bar:
        task = bar.add_task(what, total=None)
        yield (lambda total: bar.update(task, total=total)), (lambda size: bar.update(task, advance=size))
