"""R1 from one end to the other: R1-Zero, R1's four stages, a distilled student (arXiv 2501.12948).

    data                 the miniature's corpus, problems and requests; skipped where files are given
    pretrain             the miniature's base; `base` names another model in its place
    zero                 R1-Zero: reinforcement learning from the base alone,
    zero_longer          and goes on with longer answers, where a recipe says so
    cold_start_samples   right and readable answers of R1-Zero
    cold_start           stage 1: SFT from the base on them
    reasoning            stage 2: reinforcement learning with the language-consistency reward
    samples              stage 3: rejection sampling from that checkpoint,
    sft                  and SFT from the base on what is kept and general data
    helpful, harmless    reward models, of the summary alone and of everything
    all_scenarios        stage 4: reinforcement learning by rules and these,
    preferences          or by these at its end alone, where a recipe says so
    student_base         the miniature's student before anything is taught to it
    student              distillation: SFT of the student on stage 3's samples
    evaluation           all of them asked the same questions

What a stage begins with and reads is said by its own configuration, in paths under one folder. One that begins with
nothing is not of the recipe. The two that go on are runs of their own, whose optimizer begins anew.
"""

import dataclasses
import difflib
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
from rich.console import Console
from rich.table import Table
from rich.text import Text

from deepseek_jax.checkpoint.finding import CHECKPOINTS, checkpoint_steps
from deepseek_jax.evals.samples import margin
from deepseek_jax.parallel.processes import first_host_alone
from deepseek_jax.saying import terminal
from deepseek_jax.typed import check_types
from deepseek_jax.workflows.chain import Link, held, run_chain
from deepseek_jax.workflows.grpo import GRPOConfig, grpo
from deepseek_jax.workflows.inputs import look_for
from deepseek_jax.workflows.pretrain import PretrainConfig, pretrain
from deepseek_jax.workflows.r1_data import R1Data, make_data
from deepseek_jax.workflows.r1_evaluation import R1Evaluation, check_rows, evaluate
from deepseek_jax.workflows.recipe import moved
from deepseek_jax.workflows.rejection import KEPT, RejectionConfig, check_kept, rejection
from deepseek_jax.workflows.report import write_report
from deepseek_jax.workflows.report_data import SERIES
from deepseek_jax.workflows.reward_model import RewardModelConfig, reward_model
from deepseek_jax.workflows.sft import SFTConfig, sft
from deepseek_jax.workflows.stage_result import read_result, write_json

# In their order: what runs each.
STAGES = {
    "data": make_data,
    "pretrain": pretrain,
    "zero": grpo,
    "zero_longer": grpo,
    "cold_start_samples": rejection,
    "cold_start": sft,
    "reasoning": grpo,
    "samples": rejection,
    "sft": sft,
    "helpful": reward_model,
    "harmless": reward_model,
    "all_scenarios": grpo,
    "preferences": grpo,
    "student_base": pretrain,
    "student": sft,
    "evaluation": evaluate,
}


@dataclasses.dataclass(frozen=True)
class R1Config:
    """All stages, each as its own command takes it. Their folders lie in one, which ``run_dir`` is in the place of."""

    run_dir: str = "runs/r1"
    """Where all stages write, a folder each."""
    seed: int = 0
    """Added to each stage's own."""
    base: str = ""
    """The base model, a run or a released model's folder, instead of the stage pretrain."""
    skip: tuple[str, ...] = ()
    """Stages not to run; what others read of them must be there."""
    quiet: bool = False
    """Say nothing but which stage it is."""
    data: R1Data = R1Data(run_dir="runs/r1/data")
    pretrain: PretrainConfig = PretrainConfig(run_dir="runs/r1/pretrain")
    zero: GRPOConfig = GRPOConfig(run_dir="runs/r1/zero")
    zero_longer: GRPOConfig = GRPOConfig(run_dir="runs/r1/zero_longer")
    cold_start_samples: RejectionConfig = RejectionConfig(run_dir="runs/r1/cold_start_samples")
    cold_start: SFTConfig = SFTConfig(run_dir="runs/r1/cold_start")
    reasoning: GRPOConfig = GRPOConfig(run_dir="runs/r1/reasoning")
    samples: RejectionConfig = RejectionConfig(run_dir="runs/r1/samples")
    sft: SFTConfig = SFTConfig(run_dir="runs/r1/sft")
    helpful: RewardModelConfig = RewardModelConfig(run_dir="runs/r1/helpful", judges="summary")
    harmless: RewardModelConfig = RewardModelConfig(run_dir="runs/r1/harmless", judges="all")
    all_scenarios: GRPOConfig = GRPOConfig(run_dir="runs/r1/all_scenarios")
    preferences: GRPOConfig = GRPOConfig(run_dir="runs/r1/preferences")
    student_base: PretrainConfig = PretrainConfig(run_dir="runs/r1/student_base")
    student: SFTConfig = SFTConfig(run_dir="runs/r1/student")
    evaluation: R1Evaluation = R1Evaluation(run_dir="runs/r1/evaluation")

    def __post_init__(self) -> None:
        check_types(self)
        for name in self.skip:
            if name not in STAGES:
                likely = "".join(f" did you mean {near}?" for near in difflib.get_close_matches(name, STAGES, n=1))
                raise ValueError(f"skip={self.skip!r}: no stage {name!r};{likely} there are {', '.join(STAGES)}")
        folders = {Path(getattr(self, name).run_dir).parent for name in STAGES}
        if len(folders) > 1:
            raise ValueError(f"the stages' run_dir lie in {', '.join(sorted(map(str, folders)))}: expected one folder")
        for name in STAGES:
            if Path(getattr(self, name).run_dir).name != name:
                raise ValueError(f"{name}.run_dir={getattr(self, name).run_dir!r}: its last part must be {name!r}")


def r1(config: R1Config, console: Console | None = None) -> None:
    """Run all stages that have no result yet and write ``report.html``.

    ValueError where a stage was run with other settings, another process works in ``run_dir``, no sample was kept, or a
    stage reads what neither is there nor comes of an earlier one.
    """
    first = jax.process_index() == 0
    console = (console or terminal()) if first else Console(quiet=True)
    began, run_dir = time.monotonic(), Path(config.run_dir)
    links = make_links(config)
    check_inputs(links)
    check_files(links)

    def say(name: str, more: str) -> None:
        console.print(Text.assemble((name, "bold"), more))

    def check_done(name: str) -> None:
        if isinstance(getattr(config, name), RejectionConfig):
            check_kept(run_dir / name)

    with held(run_dir):
        for name in config.skip:
            if (step := half_done(run_dir / name)) is not None:
                say(name, f" is skipped half done: what starts from it takes its checkpoint of step {step}")
        write_json(run_dir / SERIES, {"stages": [link.name for link in links]})
        run_chain(links, say, after=check_done)
        first_host_alone(lambda: write_report(run_dir))
    print_answers(run_dir, console)
    console.print(f"report: {run_dir / 'report.html'}   ({time.monotonic() - began:.0f} s for what was run now)")


def print_answers(run_dir: Path, console: Console) -> None:
    """A table of what the evaluation found: pass@1 of each model and task, in per cent."""
    found = read_result(run_dir / "evaluation") or {}
    tasks = list(dict.fromkeys(task for figures in found.values() for task in figures))
    table = Table("", *tasks, "tokens of an answer", title="Right answers, %")
    for name, figures in found.items():
        cells = [_share(figures[task]) for task in tasks]
        table.add_row(name, *cells, f"{figures[tasks[0]]['tokens']:.1f}")
    if found:
        console.print(table)


def _share(figures: dict[str, Any]) -> str:
    share = figures["pass@1"]
    return f"{100 * share:.1f} {margin(share, figures['stderr'], figures['questions'])}"


def make_links(config: R1Config) -> list[Link]:
    """The stages to run, in their order, their paths under ``config.run_dir``."""
    there, here = str(Path(config.pretrain.run_dir).parent), str(Path(config.run_dir))
    skipped = {*config.skip, *(["pretrain"] if config.base else [])}
    links = []
    for name, run in STAGES.items():
        stage = getattr(config, name)
        begins = isinstance(stage, PretrainConfig) or getattr(stage, "init_from", name)  # or with fresh parameters
        if name in skipped or not begins:
            continue
        stage = dataclasses.replace(stage, seed=stage.seed + config.seed, quiet=stage.quiet or config.quiet)
        stage = moved(stage, there, here)
        if config.base:  # which may lie where the recipe's own folder does, and stays there
            stage = moved(stage, moved(config.pretrain.run_dir, there, here), config.base)
        links.append(Link(name, run, stage))
    return links


def check_inputs(links: list[Link]) -> None:
    """ValueError for a path in a stage's settings that lies in the chain's folder, where neither an earlier stage makes
    it nor it is there already, and for samples of which none was kept."""
    made: list[str] = []
    for name, _, config in links:
        folder = str(Path(config.run_dir).parent)
        for field, path in _paths(config, folder):
            if path == config.run_dir or any(path == place or path.startswith(f"{place}/") for place in made):
                continue
            if not Path(path).exists():
                owner = Path(path).relative_to(folder).parts[0]
                raise ValueError(f"{name}.{field}={path!r}: it is not there, and the stage {owner} is not run before")
            if Path(path).name == KEPT:
                check_kept(Path(path).parent)
        made.append(config.run_dir)


def half_done(run_dir: Path) -> int | None:
    """The newest checkpoint's step of a stage that has no result; None where there is none, or it is done."""
    steps = checkpoint_steps(run_dir / CHECKPOINTS)
    return steps[-1] if steps and read_result(run_dir) is None else None


def check_files(links: list[Link]) -> None:
    """ValueError, naming the stage, for files and models outside the chain's folder that are not there, and for a row
    there that the evaluation cannot ask or grade. A stage that has its result needs them no more."""
    for name, _, config in links:
        if read_result(config.run_dir) is not None:
            continue
        try:
            folder = str(Path(config.run_dir).parent)
            look_for(config, under=folder)
            if isinstance(config, R1Evaluation):
                check_rows(config, under=folder)
        except (OSError, ValueError) as error:
            raise ValueError(f"{name}: {error}") from error


def _paths(value: Any, folder: str, field: str = "") -> Iterator[tuple[str, str]]:
    """(dotted field, text) of every setting that is a path under ``folder``."""
    if dataclasses.is_dataclass(value):
        for each in dataclasses.fields(value):
            yield from _paths(getattr(value, each.name), folder, f"{field}.{each.name}".lstrip("."))
    elif isinstance(value, tuple):
        for item in value:
            yield from _paths(item, folder, field)
    elif isinstance(value, str):
        path = re.split("[:=]", value.removeprefix("model:"))[0] if value.startswith("model:") else value
        if path.startswith(f"{folder}/"):
            yield field, path
