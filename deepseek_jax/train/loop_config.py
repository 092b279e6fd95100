"""How long the loop trains, and how often it does what beside it."""

from dataclasses import dataclass
from typing import Literal

from deepseek_jax.checkpoint.places import check_directory
from deepseek_jax.typed import check_least, check_types


@dataclass(frozen=True)
class LoopConfig:
    """How long to train, and how often to do what beside it; all counts are in steps."""

    steps: int
    """Of the whole run, those before it was stopped included."""
    log_every: int = 10
    """Steps from one line of metrics to the next."""
    checkpoint_every: int = 100
    """Steps from one checkpoint to the next; the last step makes one in any case."""
    keep: int = 2
    """Newest checkpoints to keep, beside the best."""
    checkpoints: str = ""
    """Where they go, if not into the run's folder: a folder of this run alone by its whole path, or on
    gs://BUCKET/FOLDER. The run's folder says where, so that all that reads the run finds them."""
    eval_every: int = 0
    """Steps from one evaluation to the next; 0: none."""
    best_metric: str | None = None
    """Keep the checkpoint of the best evaluation by this metric."""
    best_mode: Literal["max", "min"] = "max"
    """Whether more of it is better, or less."""
    max_bad_steps: int = 5
    """This many steps in a row whose loss or gradient is not finite end the run."""
    tensorboard: bool = True
    """Write tensorboard/ beside metrics.jsonl."""

    def __post_init__(self) -> None:
        check_types(self)
        check_least(self, 1, "steps", "log_every", "checkpoint_every", "keep", "max_bad_steps")
        if self.checkpoints:
            try:
                check_directory(self.checkpoints)
            except ValueError as error:
                raise ValueError(f"checkpoints={self.checkpoints!r}: {error}") from error
            if not self.checkpoints.startswith(("gs://", "/")):
                raise ValueError(f"checkpoints={self.checkpoints!r}: expected gs://BUCKET/FOLDER, or a path from / on")
        if self.best_metric is not None and self.eval_every == 0:
            raise ValueError(f"best_metric={self.best_metric!r} needs evaluations: eval_every is 0")

    def due(self, every: int, step: int) -> bool:
        """Whether something done every so many steps (0: never), and at the end, is due after `step`."""
        return every > 0 and (step % every == 0 or step == self.steps)
