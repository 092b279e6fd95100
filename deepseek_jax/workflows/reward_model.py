"""Training a reward model: on pairs of answers, the better and the worse, or on answers that are good or bad."""

import dataclasses
import functools
import math
from collections import Counter
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tyro

from deepseek_jax.checkpoint.model import Model
from deepseek_jax.compute import ComputeConfig
from deepseek_jax.config import ModelConfig
from deepseek_jax.data.files import ROWS
from deepseek_jax.data.packing import Row
from deepseek_jax.data.preferences import Item, Judges, pack_items, read_items
from deepseek_jax.data.rows import check_rows, sources_of, write_rows
from deepseek_jax.model import parameters
from deepseek_jax.model.scores import with_scores
from deepseek_jax.parallel.processes import first_host_alone, together
from deepseek_jax.parallel.sharding import constrain, place_batch
from deepseek_jax.saying import doing, say
from deepseek_jax.train.loop_config import LoopConfig
from deepseek_jax.train.optimizer import OptimizerConfig
from deepseek_jax.train.reward_model import RewardModelLoss, margins
from deepseek_jax.typed import check_least, check_types
from deepseek_jax.workflows.own_run import open_start, owns_run
from deepseek_jax.workflows.row_batches import LoaderBatches, row_loader
from deepseek_jax.workflows.stage import train_stage
from deepseek_jax.workflows.stage_config import StageConfig
from deepseek_jax.workflows.stage_result import finish


@dataclasses.dataclass(frozen=True)
class PreferenceData:
    """Judged answers, and how rows are made of them."""

    path: tuple[str, ...] = ()
    """Files of judged answers, folders of them, quoted globs: .jsonl(.gz|.zst), .parquet; or hf:NAME[:CONFIG]:SPLIT. A
    row has `prompt` (text or messages) or `messages`, and `chosen` with `rejected`, or `response` with `label`: 1 or
    "safe", 0 or "unsafe"."""
    replay: tuple[str, ...] = ()
    """Such files that init_from, a reward model itself, was trained on before, of which a part comes in again: as it
    goes on with the answers of a later policy (DeepSeekMath's iterative GRPO)."""
    replay_share: float = 0.1
    """Of all judged answers, those of replay; fewer where it has fewer."""
    heldout: tuple[str, ...] = ()
    """Such files, on which agreement is measured."""
    seq_len: int = 16384
    """Tokens of a packed row, in which a pair's two answers, each with its prompt, must fit together."""
    drop_long: bool = False
    """Leave longer ones out, counted, and go on."""
    skip_broken: bool = False
    """Leave broken lines, equal answers and those without a summary out, counted, instead of stopping."""

    def __post_init__(self) -> None:
        check_types(self)
        check_least(self, 4, "seq_len")
        if not 0 < self.replay_share < 1:
            raise ValueError(f"replay_share={self.replay_share}: must lie between 0 and 1")


@dataclasses.dataclass(frozen=True)
class RewardModelConfig(StageConfig):
    """A reward model from any language model: its body, and a fresh head that gives one number for an answer. Rate,
    batch and passes are R1's (its pairs had up to 8192 tokens an answer)."""

    run_dir: str = "runs/reward_model"
    init_from: str = ""
    """The model to start from: a run, or a released model's folder."""
    ignore_config: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """A field of a released model's config.json to take as absent; give it several times for more."""
    judges: Judges = "summary"
    """What is shown to it of an answer, here and as a reward: its summary, what follows `</think>`, as R1 judges
    helpfulness; or all, as R1 judges harmlessness."""
    data: PreferenceData = PreferenceData()
    batch_size: int = 256
    """Rows of a step, each of one pair or more."""
    epochs: int = 1
    """Passes over the rows: training ends with them, or before at loop.steps; 0: at loop.steps alone."""
    loss: RewardModelLoss = RewardModelLoss()
    optimizer: OptimizerConfig = OptimizerConfig(peak_lr=6e-6)
    loop: LoopConfig = LoopConfig(steps=100_000)

    MAY_CHANGE = (*StageConfig.MAY_CHANGE, "ignore_config", "data.heldout")


@owns_run("init_from", "data.path")
def reward_model(config: RewardModelConfig) -> dict[str, Any]:
    """Run the stage, or go on with it; returns and writes its result: ``agreement``, the share of held-out pairs whose
    better answer scores higher (or of single ones on the right side of 0), with its standard error."""
    if config.loop.eval_every and not config.data.heldout:
        raise ValueError(f"loop.eval_every={config.loop.eval_every}: nothing to evaluate without data.heldout")
    start = open_start(config, scores=True)
    if start.params is not None:
        network = with_scores(start.config, start.params, start.router_bias, 1)
        start = dataclasses.replace(start, config=network[0], params=network[1], router_bias=network[2])
    heldout = _packed(config, config.data.heldout, start, Counter()) if config.data.heldout else []
    first_host_alone(lambda: _prepare(config, start))
    loader = row_loader(Path(config.run_dir) / "rows", config, start.mesh)
    steps = config.loop.steps
    if config.epochs:
        steps = min(steps, math.ceil(config.epochs * loader.meta["count"] / config.batch_size))
        say(f"{loader.meta['items']:,} judged items in {loader.meta['count']:,} rows: {steps} steps")
    config = dataclasses.replace(config, loop=dataclasses.replace(config.loop, steps=steps))
    trained, facts = train_stage(
        config,
        stage="reward_model",
        start=start,
        loss=config.loss,
        batches=LoaderBatches(loader),
        evaluate=(lambda model: agreement(model, heldout, config.batch_size)) if config.loop.eval_every else None,
    )

    def measure_last() -> dict[str, Any]:
        found = agreement(trained, heldout, config.batch_size) if heldout else {}
        return {name.removeprefix("eval/"): value for name, value in found.items()}

    return finish(config, facts, measure_last)


def agreement(model: Model, rows: Sequence[Row], batch_size: int) -> dict[str, float]:
    """The share of items whose margin is over 0 (0 itself is half a one), its standard error, and their number."""
    compute, found, rest = _margins(model.config, model.compute.exact), list[np.ndarray](), iter(rows)
    while group := list(islice(rest, batch_size)):
        group += [jax.tree.map(np.zeros_like, group[0])] * (batch_size - len(group))
        stacked = {name: np.stack([row[name] for row in group]) for name in group[0]}
        with jax.set_mesh(model.mesh):
            batch = place_batch(stacked, model.mesh, model.compute.rules, whole=True)
            margin_BI, there_BI = jax.device_get(compute(model.params, model.router_bias, batch))
        found.append(margin_BI[there_BI])
    right_N = (np.sign(np.concatenate(found)) + 1) / 2
    share, count = float(right_N.mean()), len(right_N)
    error = math.sqrt(share * (1 - share) / count)
    return {"eval/agreement": share, "eval/agreement_stderr": error, "eval/agreement_of": float(count)}


@functools.cache
def _margins(config: ModelConfig, compute: ComputeConfig):
    @jax.jit
    def run(params, router_bias, batch):
        found = margins(parameters.merge(config, params, router_bias, compute), batch)[:2]
        return jax.tree.map(lambda x: constrain(x, compute.rules, *[None] * x.ndim), found)  # every process reads it

    return together(run)


def _packed(
    config: RewardModelConfig, path: tuple[str, ...], start: Model, about: Counter[str], replay: tuple[str, ...] = ()
) -> list[Row]:
    """Rows of the judged answers; ``about`` gets the numbers of items and of what was left out."""
    items, share = _items(config, path, start, about), config.data.replay_share
    if replay:
        old = _items(config, replay, start, Counter())
        count = min(round(len(items) * share / (1 - share)), len(old))
        items += [old[index] for index in np.random.default_rng(0).permutation(len(old))[:count]]
        about += Counter(items=count)
    return pack_items(items, config.data.seq_len, pad_id=start.text.pad_id)


def _items(config: RewardModelConfig, path: tuple[str, ...], start: Model, about: Counter[str]) -> list[Item]:
    data, skipped = config.data, Counter[str]()
    items = read_items(
        path,
        start.text,
        judges=config.judges,
        seq_len=data.seq_len,
        positions=start.config.max_position_embeddings,
        drop_long=data.drop_long,
        skip_broken=data.skip_broken,
        skipped=skipped,
    )
    if not items:
        left_out = f", or none is left ({dict(skipped)})" if skipped else ""
        raise ValueError(f"{', '.join(path)}: there is no judged answer in it{left_out}")
    about += Counter(items=len(items)) + skipped
    return items


def _prepare(config: RewardModelConfig, start: Model) -> Path:
    """Pack the judged answers into rows on disk, once; rows of other data or settings are refused by name."""
    folder, data = Path(config.run_dir) / "rows", config.data
    without = ("heldout", *(() if data.replay else ("replay", "replay_share")))
    how = {name: value for name, value in dataclasses.asdict(data).items() if name not in without}
    made_of = {
        "vocab_size": start.text.usable,
        "tokenizer_fingerprint": start.text.fingerprint,
        "data": how | {"path": list(data.path), "judges": config.judges},
        **sources_of((*data.path, *data.replay), ROWS),
    }
    if folder.exists():
        check_rows(folder, made_of, (*data.path, *data.replay))
        return folder
    about = Counter[str]()
    with doing("packing judged answers"):
        rows = _packed(config, data.path, start, about, data.replay)
    folder.parent.mkdir(parents=True, exist_ok=True)
    write_rows(folder, rows, meta=made_of | {"items": about.pop("items"), "skipped": dict(about)})
    return folder
