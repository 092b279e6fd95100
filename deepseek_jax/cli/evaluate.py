"""``eval``: how well a model predicts text of any kind."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import tyro

from deepseek_jax.checkpoint import CheckpointStore
from deepseek_jax.checkpoint.finding import CHECKPOINTS, find_model, is_released
from deepseek_jax.checkpoint.model import Model, load
from deepseek_jax.compute import ComputeConfig
from deepseek_jax.evals.text import HeldOut, Score
from deepseek_jax.saying import doing, terminal


@dataclasses.dataclass(frozen=True)
class _Eval:
    """Bits per byte and perplexity of a model on documents, by file, and by kind where rows have one."""

    run: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="PATH")]
    """A folder that a stage or the demo wrote, or a released model's, with its tokenizer.json."""
    data: tuple[str, ...] = ()
    """Files, folders and quoted globs of .txt, .md, .jsonl(.gz|.zst), .parquet; or hf:NAME[:CONFIG]:SPLIT."""
    text_field: str = "text"
    """The field or column of .jsonl and .parquet that holds the text."""
    seq_len: int = 0
    """Tokens of a row, into which documents are packed; 0 for those of the run's own rows, else 1024 or the most that
    the model takes."""
    batch_size: int = 8
    """Rows at a time."""
    step: int = 0
    """Of a run, a checkpoint other than the newest (0)."""
    ema: bool = False
    """Of a run, the running mean of the parameters."""
    ignore_config: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """A field of a released model's config.json to take as absent; give it several times for more."""
    compute: ComputeConfig = ComputeConfig()


def run_eval(arguments: Sequence[str]) -> None:
    options = tyro.cli(_Eval, args=list(arguments), prog="deepseek-jax eval")
    if not options.data:
        raise ValueError("give --data FILES to measure")
    heldout = HeldOut(options.data, text_field=options.text_field)  # what is wrong with it is known before the model
    path = find_model(options.run)
    with doing(f"reading {path}"):
        reading = {"compute": options.compute, "step": options.step or None, "ema": options.ema}
        model = load(path, **reading, ignore_config=options.ignore_config)
    seq_len = _seq_len(path, model, options.seq_len)
    with doing("measuring"):
        scores = heldout.scores(model, seq_len=seq_len, batch_size=options.batch_size)
    lines = {**scores.files, **{f"kind {kind}": score for kind, score in scores.kinds.items()}}
    width = max(map(len, [*lines, "all"]))
    for name, score in [*lines.items(), ("all", scores.total)]:
        terminal().print(f"{name:{width}}  {_told(score)}", soft_wrap=True)


def _told(score: Score) -> str:
    return (
        f"{score.bits_per_byte:.4f} bits per byte   perplexity {score.perplexity:.4g}   {score.documents:,} documents, "
        f"{score.bytes:,} bytes, {score.tokens:,} tokens"
    )


def _seq_len(path: Path, model: Model, wanted: int) -> int:
    longest = model.config.max_position_embeddings
    if wanted and not 2 <= wanted <= longest:
        raise ValueError(f"--seq-len {wanted}: must lie in 2…max_position_embeddings={longest}")
    if wanted or is_released(path):
        return wanted or min(1024, longest)
    with CheckpointStore(path / CHECKPOINTS, keep=1) as store:
        recipe = store.read_meta().get("recipe", {})
    return recipe.get("data", {}).get("seq_len") or min(1024, longest)
