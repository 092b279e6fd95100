"""What every training stage is told, and whether a mesh can do it."""

import dataclasses
import math

from jax.sharding import Mesh

from deepseek_jax.checkpoint.model import Model
from deepseek_jax.checkpoint.store import check_directory
from deepseek_jax.compute import ComputeConfig
from deepseek_jax.config import ModelConfig
from deepseek_jax.parallel.legal import check_layout
from deepseek_jax.parallel.mesh import MeshConfig
from deepseek_jax.train.loop_config import LoopConfig
from deepseek_jax.train.losses import LanguageModelLoss
from deepseek_jax.train.optimizer import OptimizerConfig
from deepseek_jax.train.step import StepConfig
from deepseek_jax.typed import check_least, check_types


@dataclasses.dataclass(frozen=True)
class StageConfig:
    """What all stages have: where they write, the seed, and how they train."""

    run_dir: str = "runs/stage"
    """The run's folder: checkpoints, metrics, result. A run that is there goes on. Several processes share it: a file
    system that all hosts see."""
    seed: int = 0
    """Of fresh parameters, of the data's order and of all that is drawn."""
    optimizer: OptimizerConfig = OptimizerConfig()
    step: StepConfig = StepConfig()
    loop: LoopConfig = LoopConfig(steps=100)
    mesh: MeshConfig = MeshConfig()
    compute: ComputeConfig = ComputeConfig()
    log_to: tuple[str, ...] = ()
    """Where metrics go beside metrics.jsonl: wandb, or file.py:function, called with the step and the line; what it
    raises is said once, and the run goes on."""
    quiet: bool = False
    """Say nothing before the result."""

    # What may differ, as a run goes on, from what its checkpoint was made with; see `check_resume`.
    MAY_CHANGE = ("run_dir", "compute", "mesh", "loop", "log_to", "quiet")

    def __post_init__(self) -> None:
        check_types(self)
        check_least(self, 1, *(name for name in ("batch_size", "minibatches", "inner_epochs") if hasattr(self, name)))
        self._check_parts()
        if self.run_dir.startswith("gs://"):
            raise ValueError(
                f"run_dir={self.run_dir!r}: expected a local or mounted folder, since a run appends to its files; its "
                "checkpoints can go to a bucket: loop.checkpoints=gs://BUCKET/FOLDER"
            )
        try:
            check_directory(self.run_dir)
        except ValueError as error:
            raise ValueError(f"run_dir={self.run_dir!r}: {error}") from error
        if self.compute.param_dtype != "float32":
            raise ValueError(
                f"compute.param_dtype={self.compute.param_dtype!r}: a stage trains float32 masters; another is for "
                "inference alone"
            )

    def rows_of_step(self) -> tuple[int, str]:
        """How many rows a step has, 0 where it is made as many as its parts and the mesh need, and what says so."""
        rows = getattr(self, "batch_size", 0)
        return rows, f"batch_size={rows}"

    def columns_of_step(self, model: ModelConfig) -> int | None:
        """The most tokens that a row has, where settings say so."""
        return getattr(getattr(self, "data", None), "seq_len", None)

    def _check_parts(self) -> None:
        rows, said = self.rows_of_step()
        minibatches = getattr(self, "minibatches", 1)
        for name, parts in (("minibatches", minibatches), ("step.microbatches", self.step.microbatches)):
            if rows % parts:
                raise ValueError(f"{name}={parts} does not divide the {rows} rows of {said}")
            rows, said = rows // parts, said if parts == 1 else f"{said}, {name}={parts}"


def check_start(config: StageConfig, start: Model) -> None:
    """ValueError for a layout that cannot be (``check_layout``): before rows are packed, and before the run's folder is
    there."""
    check_stage_layout(config, start.config, start.compute, start.mesh, config.columns_of_step(start.config))


def check_stage_layout(
    config: StageConfig, model: ModelConfig, compute: ComputeConfig, mesh: Mesh, columns: int | None
) -> None:
    """The same on rows of so many ``columns``, without parameters."""
    if isinstance(loss := getattr(config, "loss", None), LanguageModelLoss):
        loss.check(model)
    rows, said = config.rows_of_step()
    parts = {"minibatches": getattr(config, "minibatches", 1), "step.microbatches": config.step.microbatches}
    said += "".join(f", {name}={count}" for name, count in parts.items() if count > 1)
    rows //= math.prod(parts.values())
    layout = {"rows": rows or None, "columns": columns, "rows_said": f"the {rows} rows of {said}"}
    check_layout(model, compute, mesh.shape, **layout)
