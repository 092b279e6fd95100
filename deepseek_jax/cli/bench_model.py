"""``bench RECIPE``: the speed of a recipe's model as it is, on what this process has."""

import dataclasses
from collections.abc import Sequence
from typing import Annotated, Literal

import jax
import tyro
from rich.table import Table

from deepseek_jax.cli.bench_drafts import measure_drafts
from deepseek_jax.cli.bench_inference import measure_decoding, measure_prefill
from deepseek_jax.cli.bench_peer import peer_row
from deepseek_jax.cli.bench_report import Measured, print_profile
from deepseek_jax.cli.bench_training import measure_training
from deepseek_jax.inference.serving_config import MOST_DRAFTS
from deepseek_jax.saying import terminal
from deepseek_jax.typed import check_least, check_types
from deepseek_jax.workflows.pretrain import PretrainConfig
from deepseek_jax.workflows.recipe import load_recipe


@dataclasses.dataclass(frozen=True)
class ModelBench:
    """One kind of work of a recipe's model on random tokens with its own routing; ``--batch-size`` rows of
    ``--data.seq-len`` tokens, unless ``columns`` says something else. Prefill and decoding take random weights."""

    recipe: Annotated[PretrainConfig, tyro.conf.arg(name="")]
    work: Literal["train", "prefill", "decode"] = "train"
    """What is timed: train steps, the passes over prompts up to the first token, or the steps of greedy decoding."""
    segments: int = 0
    """train: rows packed from so many documents, which attention, balance and positions keep apart; 0: one a row."""
    columns: int = 0
    """prefill, decode: tokens of a row, in decoding those that it has when the last timed step ends; 0: the
    recipe's data.seq_len."""
    new_tokens: int = 64
    """decode: steps that are timed in one call."""
    quantize: Literal["none", "fp8", "int8", "int4"] = "none"
    """prefill, decode: the matrices that V3's checkpoints have in FP8 stay so (with --compute.grouped-matmul
    hopper_fp8 the experts' rows are rounded to FP8 as well), or those that convert --quantize takes are integers."""
    drafts: int = 0
    """decode: answer over a cache in pages, as a server does it, without drafts and with so many by an MTP module that
    is random like all weights; on one device."""
    acceptance: float = 0.85
    """drafts: the probability with which each is taken, whatever the network says."""
    repeats: int = 10
    """Train steps, prefills or calls of decoding that are timed."""
    profile: str = ""
    """A folder for a trace of one more call, whose twenty longest kernels are printed."""
    peer_python: str = ""
    """A Python with torch and transformers (make peer) to measure DeepseekV3ForCausalLM of the same configuration with,
    before ours, everything in the recipe's dtype, rows whole; empty for none."""
    peer_checkpointed: bool = False
    """train: the peer computes activations again in its backward pass."""

    def __post_init__(self) -> None:
        check_types(self)
        check_least(self, 1, "repeats", "new_tokens")
        if self.quantize != "none" and self.work == "train":
            why = "training keeps float32 masters; it is for work='prefill' and 'decode'"
            raise ValueError(f"quantize={self.quantize!r}: {why}")
        if self.drafts and (self.work != "decode" or self.quantize != "none"):
            raise ValueError(f"drafts={self.drafts}: for work='decode' without quantize")
        if not 0 <= self.drafts <= MOST_DRAFTS or not 0 < self.acceptance <= 1:
            raise ValueError(
                f"drafts={self.drafts}, acceptance={self.acceptance}: expected 0…{MOST_DRAFTS}, and a share above 0"
            )
        if self.segments > self.recipe.data.seq_len:
            raise ValueError(f"segments={self.segments}: must lie in 0…data.seq_len={self.recipe.data.seq_len}")
        if self.work == "decode" and self.row < self.new_tokens + 2:
            raise ValueError(f"new_tokens={self.new_tokens}: a row of {self.row} columns has room for {self.row - 2}")

    @property
    def row(self) -> int:
        return self.columns or self.recipe.data.seq_len


def run_bench_model(name: str, arguments: Sequence[str]) -> None:
    default = ModelBench(load_recipe(name, PretrainConfig))
    options = tyro.cli(ModelBench, args=list(arguments), default=default, prog=f"deepseek-jax bench {name}")
    peer = ask(options) if options.peer_python else None
    found = measure(options)
    table = Table(title=f"{name}: {options.work}", show_header=False)
    table.add_row("devices", f"{jax.devices()[0].device_kind} × {jax.device_count()}")
    for fact, value in found.facts.items():
        table.add_row(fact, value)
    if peer:
        table.add_row("transformers", peer)
    console = terminal()
    console.print(table)
    if options.profile:
        print_profile(console, found.call, options.profile)


def ask(options: ModelBench) -> str:
    """The peer's row."""
    recipe = options.recipe
    its = {"dtype": recipe.compute.dtype, "steps": options.repeats, "checkpointed": options.peer_checkpointed}
    shape = {"rows": recipe.batch_size, "columns": options.row, "new_tokens": options.new_tokens}
    return peer_row(options.peer_python, recipe.model, options.work, **shape, **its)


def measure(options: ModelBench) -> Measured:
    if options.work == "train":
        return measure_training(options.recipe, segments=options.segments, repeats=options.repeats)
    if options.work == "prefill":
        return measure_prefill(options.recipe, options.row, options.repeats, quantize=options.quantize)
    if options.drafts:
        times = options.row, options.new_tokens, options.repeats
        return measure_drafts(options.recipe, *times, drafts=options.drafts, acceptance=options.acceptance)
    return measure_decoding(options.recipe, options.row, options.new_tokens, options.repeats, quantize=options.quantize)
