"""Every model of an R1 run asked the same held-out questions, each several times."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from deepseek_jax.checkpoint.model import load
from deepseek_jax.compute import ComputeConfig
from deepseek_jax.parallel.mesh import MeshConfig, make_mesh
from deepseek_jax.rl.tasks import TaskConfig
from deepseek_jax.saying import quietly
from deepseek_jax.typed import check_least, check_types
from deepseek_jax.workflows.questions import Answers, Asking, ask_questions
from deepseek_jax.workflows.stage_result import RESULT, write_json


@dataclasses.dataclass(frozen=True)
class R1Evaluation:
    """The last stage: what each of the others has made answers."""

    run_dir: str = "runs/r1/evaluation"
    """Where answers and figures are written."""
    seed: int = 0
    """Added to that of asking."""
    quiet: bool = False
    """Say nothing."""
    models: tuple[str, ...] = ()
    """Runs, or released models' folders. The figures are called by the last part of each."""
    base: str = ""
    """One more, which chat_template asks."""
    chat_template: str = ""
    """What a base model is asked by: r1_zero, or a file of jinja2 text."""
    problems: TaskConfig = TaskConfig()
    """Questions with right answers; none without a path."""
    requests: TaskConfig = TaskConfig()
    """Others, of general use, with right answers too; none without a path."""
    asking: Asking = Asking()
    batch_size: int = 16
    """Answers sampled at a time."""
    compute: ComputeConfig = ComputeConfig()
    mesh: MeshConfig = MeshConfig()

    MAY_CHANGE = ("run_dir", "quiet", "batch_size", "mesh")

    def __post_init__(self) -> None:
        check_types(self)
        check_least(self, 1, "batch_size")
        names = [name for name, _, _ in self.asked()]
        if len(set(names)) < len(names):
            raise ValueError(f"base={self.base!r}, models={self.models!r}: two have the same last part")

    def asked(self) -> Iterator[tuple[str, str, str]]:
        """Name, path and chat template of each."""
        for path in (self.base, *self.models):
            if path:
                yield Path(path).name, path, self.chat_template if path == self.base else ""


def evaluate(config: R1Evaluation) -> dict[str, Any]:
    """Ask all of them; answers that are there already stay. ``result.json`` has {model: {task: figures}}."""
    folder = Path(config.run_dir)
    asking = dataclasses.replace(config.asking, seed=config.asking.seed + config.seed)
    tasks = {name: Answers(task, asking) for name, task in _tasks(config).items()}
    found: dict[str, Any] = {}
    with quietly(config.quiet or jax.process_index() > 0):
        for name, path, template in config.asked():
            model = load(path, compute=config.compute, mesh=make_mesh(config.mesh)).asked_by(template)
            figures, _ = ask_questions(model, list(tasks.values()), asking, folder / name, batch_size=config.batch_size)
            found[name] = {task: figures[answers.name] for task, answers in tasks.items()}
    write_json(folder / "config.json", {"stage": "evaluation", "recipe": dataclasses.asdict(config)})
    write_json(folder / RESULT, found)
    return found


def check_rows(config: R1Evaluation, *, under: str) -> None:
    """ValueError for the first row that cannot be asked or has no right answer, but for files under this folder, which
    may not be there yet."""
    for task in _tasks(config).values():
        if not any(path.startswith(f"{under}/") for path in task.path):
            Answers(task, config.asking)


def _tasks(config: R1Evaluation) -> dict[str, TaskConfig]:
    tasks = {"problems": config.problems, "requests": config.requests}
    given = {name: task for name, task in tasks.items() if task.path}
    if not given:
        raise ValueError("problems.path and requests.path are empty: there is nothing to ask")
    return given
