"""`deepseek_jax.rl.arithmetic` by its old name, until its users have moved."""

from deepseek_jax.rl.arithmetic import *  # noqa: F403
