"""Batches of packed rows for a training stage."""

from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from deepseek_jax.data.rows import RowLoader
from deepseek_jax.parallel.processes import row_groups
from deepseek_jax.train.state import TrainState


def row_loader(folder: Path, config: Any, mesh: Mesh) -> RowLoader:
    """Batches of ``config.batch_size`` packed rows, of which each process reads its own alone."""
    index, count = row_groups(mesh, config.compute.rules.batch)
    return RowLoader(folder, batch_size=config.batch_size, seed=config.seed, process_index=index, process_count=count)


class LoaderBatches:
    """A data loader as the loop's ``Batches``: what comes next does not depend on the state."""

    def __init__(self, loader: Any):
        self.loader = loader

    def next(self, state: TrainState) -> tuple[dict[str, Any], dict[str, Any]]:
        del state
        return next(self.loader), {}

    def state(self) -> dict[str, Any]:
        return self.loader.state()

    def restore(self, state: dict[str, Any]) -> None:
        self.loader.restore(state)
