"""Engines whose steps are sent before the former ones are told, which they are on devices other than a CPU."""

from deepseek_jax.inference.continuous import Continuous
from deepseek_jax.inference.engine import Engine


def sent_ahead(made: Engine) -> Engine:
    """The same, before anything is asked of it."""
    half, model = made.requests, made.model
    given = model.network, model.compute, model.mesh, half.config, model.tokenizer.stop_ids
    half._continuous = Continuous(*given, begin=half._begin, ahead=True)
    return made
