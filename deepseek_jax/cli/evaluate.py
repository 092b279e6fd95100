"""``eval``: how well a model predicts text of any kind, and how many questions it answers right."""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import jax
import tyro

from deepseek_jax.checkpoint import CheckpointStore
from deepseek_jax.checkpoint.finding import CHECKPOINTS, described, find_model, is_released
from deepseek_jax.checkpoint.model import Model, load
from deepseek_jax.compute import ComputeConfig
from deepseek_jax.data.chat_templates import check_template
from deepseek_jax.evals.needle import Needle, find_needles, rows_of, write_found
from deepseek_jax.evals.samples import margin
from deepseek_jax.evals.text import HeldOut, Score
from deepseek_jax.parallel.mesh import MeshConfig, make_mesh
from deepseek_jax.parallel.processes import first_host_alone, require_own_rows
from deepseek_jax.rl.tasks import TaskConfig
from deepseek_jax.saying import doing, quietly, terminal
from deepseek_jax.typed import check_least, check_types
from deepseek_jax.workflows.questions import Answers, Asking, ask_questions, identity
from deepseek_jax.workflows.scaling import Scaling, scale


@dataclasses.dataclass(frozen=True)
class _Eval:
    """Accuracy of a model on the questions of tasks, its bits per byte and perplexity on documents, by file, and by
    kind where rows have one, and how far back in a text it finds a planted fact."""

    run: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="PATH")]
    """A folder that a stage or the demo wrote, or a released model's, with its tokenizer.json."""
    tasks: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="TASK=FILES")] = ()
    """Questions, gsm8k=test.jsonl for instance: TASK as --task.name has it, FILES as --data."""
    ask: Annotated[Asking, tyro.conf.arg(name="")] = Asking(batching="continuous")
    task: TaskConfig = TaskConfig()
    """Columns and wording, of all tasks."""
    scaling: Scaling = Scaling()
    """Accuracy against tokens of thinking and samples, in scaling.json and scaling.png."""
    needle: Needle = Needle()
    """A planted fact found by length of the text and depth in it, in needle.json and needle.png."""
    out: str = ""
    """The folder for answers, a JSON line each, and result.json; by default one in runs/eval. The same command goes on
    where it was cut off."""
    data: tuple[str, ...] = ()
    """Files, folders and quoted globs of .txt, .md, .jsonl(.gz|.zst), .parquet; or hf:NAME[:CONFIG]:SPLIT."""
    text_field: str = "text"
    """The field or column of .jsonl and .parquet that holds the text."""
    seq_len: int = 0
    """Tokens of a row, into which documents are packed; 0 for those of the run's own rows, else 1024 or the most that
    the model takes."""
    batch_size: int = 8
    """Rows or answers at a time, or as many more as the mesh needs to split them."""
    step: int = 0
    """Of a run, a checkpoint other than the newest (0)."""
    ema: bool = False
    """Of a run, the running mean of the parameters."""
    ignore_config: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """A field of a released model's config.json to take as absent; give it several times for more."""
    chat_template: str = ""
    """Another chat template than the model's own: r1_zero, which a base model is asked by, or a file of jinja2 text."""
    mesh: MeshConfig = MeshConfig()
    compute: ComputeConfig = ComputeConfig()

    def __post_init__(self) -> None:
        check_types(self)
        check_least(self, 1, "batch_size")
        check_template(self.chat_template)


def run_eval(arguments: Sequence[str]) -> None:
    options = tyro.cli(_Eval, args=list(arguments), prog="deepseek-jax eval")
    with quietly(jax.process_index() > 0):
        _run(options)


def _run(options: _Eval) -> None:
    if not options.data and not options.tasks and not options.needle.lengths:
        raise ValueError("give TASK=FILES to ask, --data FILES to measure, --needle.lengths to find facts, or several")
    # What is wrong with them is known before the model.
    heldout = HeldOut(options.data, text_field=options.text_field) if options.data else None
    answers = [Answers(_task(options.task, text), options.ask) for text in options.tasks]
    path, mesh = find_model(options.run), make_mesh(options.mesh)
    if answers or options.needle.lengths:
        require_own_rows(mesh, options.compute.rules.batch, "answers")
    with doing(f"reading {described(path, options.step or None)}"):
        reading = {"compute": options.compute, "mesh": mesh, "step": options.step or None, "ema": options.ema}
        model = load(path, **reading, ignore_config=options.ignore_config).asked_by(options.chat_template)
    if heldout is not None:
        _predict(options, path, model, heldout)
    if answers:
        _ask(options, model, answers)
    if options.needle.lengths:
        _find(options, model)


def _task(config: TaskConfig, text: str) -> TaskConfig:
    name, found, files = text.partition("=")
    if not found or not name or not files:
        raise ValueError(f"{text!r}: expected TASK=FILES, such as gsm8k=test.jsonl")
    if config.name != TaskConfig.name or config.path:
        raise ValueError("--task.name, --task.path: a task is given as TASK=FILES here")
    return dataclasses.replace(config, name=name, path=(files,))


def _say(text: str) -> None:
    """A line of what was found, which the first of several processes prints."""
    if jax.process_index() == 0:
        terminal().print(text, soft_wrap=True)


def _predict(options: _Eval, path: Path, model: Model, heldout: HeldOut) -> None:
    seq_len = _seq_len(path, model, options.seq_len)
    ways = math.prod(model.mesh.shape[axis] for axis in model.compute.rules.batch)
    rows = -(-options.batch_size // ways) * ways
    with doing("measuring"):
        scores = heldout.scores(model, seq_len=seq_len, batch_size=rows)
    lines = {**scores.files, **{f"kind {kind}": score for kind, score in scores.kinds.items()}}
    width = max(map(len, [*lines, "all"]))
    for name, score in [*lines.items(), ("all", scores.total)]:
        _say(f"{name:{width}}  {_told(score)}")


def _ask(options: _Eval, model: Model, answers: list[Answers]) -> None:
    found, folder = ask_questions(model, answers, options.ask, options.out, batch_size=options.batch_size)
    for name, figures in found.items():
        _say(f"{name}  {_shares(figures)}")
    if options.scaling.wanted:
        for curve in scale(model, answers, options.scaling, folder, batch_size=options.batch_size):
            _say(_curved(curve))
    _say(f"answers: {folder}")


def _find(options: _Eval, model: Model) -> None:
    with doing("looking for planted facts"):
        found = find_needles(model, options.needle, batch_size=options.batch_size)
    folder = Path(options.out or f"runs/eval/needle-{identity(model)}")
    first_host_alone(lambda: write_found(found, folder))
    for row in rows_of(found):
        _say(row)
    _say(f"needle.json, needle.png: {folder}")


def _shares(figures: dict[str, float]) -> str:
    told = [f"{name} {100 * share:.1f} %" for name, share in figures.items() if "@" in name]
    told[0] += f" {margin(figures['pass@1'], figures['stderr'], int(figures['questions']))}"
    names = ["instructions", "rating", "rating_stderr"]
    if math.isinf(figures.get("rating", 0)):
        told.append(f"no rating, as {'all' if figures['rating'] > 0 else 'none'} of the rated problems were solved")
        names = names[:1]
    told += [f"{name} {figures[name]:.4g}" for name in names if name in figures]
    asked = f"{figures['questions']:,} questions × {figures['samples']}"
    if figures.get("skipped"):
        asked += f", {figures['skipped']:,} rows skipped"
    return f"{'   '.join(told)}   {asked}, {100 * figures['cut_off']:.0f} % cut off, {figures['tokens']:.0f} tokens"


def _curved(curve: dict[str, Any]) -> str:
    points = zip(curve["x"], curve["accuracy"], curve["stderr"], strict=True)
    shares = ((x, 100 * share, margin(share, error, curve["questions"])) for x, share, error in points)
    told = "   ".join(f"{x:,}: {share:.1f} % {more}" for x, share, more in shares)
    return f"{curve['task']}  {curve['kind']}{', ' if 'label' in curve else ''}{curve.get('label', '')}  {told}"


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
