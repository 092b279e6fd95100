"""R1 in miniature: corpus and tokenizer, pretraining, cold-start SFT, GRPO, report. Each stage is a recipe of its own.

A stage that has its result is not run again; one that was stopped goes on from its last checkpoint.
"""

import dataclasses
import json
import os
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.text import Text

from deepseek_jax.checkpoint.model import TOKENIZER, load
from deepseek_jax.data.chat import encode_chat
from deepseek_jax.data.text import read_objects
from deepseek_jax.evals.experts import expert_shares, token_kinds
from deepseek_jax.parallel.processes import require_one_process
from deepseek_jax.rl.arithmetic import read_jsonl, to_messages
from deepseek_jax.saying import terminal
from deepseek_jax.train.resume import differences
from deepseek_jax.typed import check_types
from deepseek_jax.workflows.chain import Link, held, run_chain
from deepseek_jax.workflows.corpus import CorpusConfig, build_corpus
from deepseek_jax.workflows.grpo import GRPOConfig, grpo
from deepseek_jax.workflows.pretrain import PretrainConfig, pretrain
from deepseek_jax.workflows.recipe import load_recipe, moved
from deepseek_jax.workflows.report import print_summary, write_report
from deepseek_jax.workflows.report_data import EXPERT_SHARES
from deepseek_jax.workflows.sft import SFTConfig, sft
from deepseek_jax.workflows.stage_result import write_json
from deepseek_jax.workflows.tokenizer import train_on_files

RECIPE_DIR = "runs/demo"  # the folder that the recipes in configs/demo/ name


@dataclasses.dataclass(frozen=True)
class CorpusStage:
    """The demo's corpus and tokenizer, written to ``folder``."""

    folder: str = "runs/corpus"
    """Where corpus and tokenizer are written."""
    corpus: CorpusConfig = CorpusConfig()

    def __post_init__(self) -> None:
        check_types(self)


@dataclasses.dataclass(frozen=True)
class DemoConfig:
    """R1 in miniature: corpus and tokenizer, pretraining, cold-start SFT, GRPO, report."""

    run_dir: str = RECIPE_DIR
    """Where all stages write."""
    seed: int = 0
    """Of the corpus and of every stage."""
    recipes: str = "demo"
    """The folder of the stages' recipes."""
    quiet: bool = False
    """Say nothing before the summary."""

    def __post_init__(self) -> None:
        check_types(self)


def make_corpus(config: CorpusStage) -> dict:
    """Write corpus and tokenizer; what is already whole and of the same configuration stays."""
    folder = Path(config.folder)
    meta_path, tokenizer_path = folder / "meta.json", folder / TOKENIZER
    wanted = json.loads(json.dumps(dataclasses.asdict(config.corpus)))
    if meta_path.exists() and tokenizer_path.exists():
        meta = json.loads(meta_path.read_text(encoding="utf-8"))
        if differ := differences(meta["config"], wanted):
            named = "; ".join(f"{name} is {was!r} there and {now!r} here" for name, (was, now) in differ.items())
            raise ValueError(f"{folder} holds a corpus of other settings: {named}; choose another folder, or remove it")
        return meta
    meta = build_corpus(folder, config.corpus)
    train_on_files([folder / "documents" / "train.jsonl"], config.corpus.vocab_size, folder)
    return meta


def demo(config: DemoConfig, console: Console | None = None) -> None:
    """Run all stages, write ``report.html`` and print the summary.

    ValueError where a stage was run with other settings, or another process works in ``run_dir``.
    """
    require_one_process("demo")
    console = console or terminal()
    with held(config.run_dir):
        _demo(config, console)


def _demo(config: DemoConfig, console: Console) -> None:
    run_dir = Path(config.run_dir)
    began = time.monotonic()

    def say(name: str, more: str) -> None:
        if not config.quiet:
            console.print(Text.assemble((name, "bold"), more))

    def recipe(name: str, kind: type):
        loaded = moved(load_recipe(f"{config.recipes}/{name}", kind), RECIPE_DIR, str(run_dir))
        if kind is CorpusStage:
            return dataclasses.replace(loaded, corpus=dataclasses.replace(loaded.corpus, seed=config.seed))
        return dataclasses.replace(loaded, seed=config.seed, quiet=config.quiet)

    links = [
        Link("pretrain", pretrain, recipe("pretrain", PretrainConfig)),
        Link("sft", sft, recipe("sft", SFTConfig)),
        Link("grpo", grpo, recipe("grpo", GRPOConfig)),
    ]
    corpus = recipe("corpus", CorpusStage)
    say("corpus", f" and tokenizer → {corpus.folder}")
    make_corpus(corpus)

    def after(name: str) -> None:
        if name == "grpo" and not (run_dir / name / EXPERT_SHARES).exists():
            write_expert_shares(Path(corpus.folder), run_dir / name, seq_len=links[0].config.data.seq_len)
        write_report(run_dir)

    run_chain(links, say, after=after)
    report = write_report(run_dir)
    print_summary(run_dir, console)
    console.print(f"report: {report}   ({time.monotonic() - began:.0f} s for what was run now)")
    program = os.path.relpath(sys.argv[0]) if Path(sys.argv[0]).is_file() else "deepseek-jax"  # it may not be on PATH
    console.print(f"ask it 23+58=, say: {program} chat {run_dir}")


def write_expert_shares(corpus: Path, run_dir: Path, *, seq_len: int) -> None:
    """``EXPERT_SHARES``: which experts serve code, prose, digits and thinking, on held-out documents and problems."""
    model = load(run_dir)
    if not model.config.num_moe_layers:
        return
    tokenizer = model.text
    documents: dict[str, list[str]] = {"code": [], "prose": []}
    for row in read_objects(corpus / "documents" / "heldout.jsonl"):
        if row["kind"] in documents and len(documents[row["kind"]]) < 32:
            documents[row["kind"]].append(row["text"])
    problems = read_jsonl(corpus / "problems_heldout.jsonl")[:96]
    chats = [encode_chat(tokenizer, to_messages(problem))[0][0] for problem in problems]
    shares = expert_shares(
        model,
        token_kinds(tokenizer, documents, chats),
        seq_len=seq_len,
    )
    write_json(run_dir / EXPERT_SHARES, shares)
