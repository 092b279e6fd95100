"""What a kernel computes and its backward pass needs, named for the policies of ``jax.checkpoint``.

The names stand inside the kernels' own forward passes: a name around the call would be on a copy that the backward pass
does not read, and the kernel would run a second time. Whoever chooses what a kernel sorts by keeps that as well.
"""

import jax
from jax.ad_checkpoint import checkpoint_name

KEPT = "deepseek_kernels"


def kept(value: jax.Array) -> jax.Array:
    """The value, which ``jax.checkpoint_policies.save_only_these_names(KEPT)`` keeps."""
    return checkpoint_name(value, KEPT)
