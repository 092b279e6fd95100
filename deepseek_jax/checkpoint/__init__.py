"""Checkpoints of a run: arrays, the data loader's position and metadata in one atomic Orbax commit.

`store` writes and manages them, `reading` finds, checks and reads them. Nothing here knows what a loss or an
optimiser is: a state is a pytree of arrays, addressed by the names of its leaves.
"""

from deepseek_jax.checkpoint.reading import DamagedCheckpointError, restore_params
from deepseek_jax.checkpoint.store import CheckpointStore

__all__ = ["CheckpointStore", "DamagedCheckpointError", "restore_params"]
