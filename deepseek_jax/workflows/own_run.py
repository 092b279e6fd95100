"""What a stage does before its own work: it looks at its settings, takes its folder and listens for signals."""

import dataclasses
import functools
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from typing import Any, TypeVar

import jax

from deepseek_jax.checkpoint.finding import described, find_model, is_released
from deepseek_jax.checkpoint.model import Model, load
from deepseek_jax.config import ModelConfig
from deepseek_jax.data.chat_templates import check_template
from deepseek_jax.data.tokenizer import Tokenizer
from deepseek_jax.data.turns import taught
from deepseek_jax.parallel.mesh import make_mesh
from deepseek_jax.parallel.processes import first_host_alone
from deepseek_jax.saying import doing, quietly
from deepseek_jax.train.preemption import stop_signals
from deepseek_jax.train.resume import saved_meta
from deepseek_jax.train.run_lock import run_lock
from deepseek_jax.workflows.log_to import check_logs

Config = TypeVar("Config")
Found = TypeVar("Found")


def owns_run(*needs: str) -> Callable[[Callable[[Config], Found]], Callable[[Config], Found]]:
    """A stage's function that holds its ``run_dir`` while it runs, from before anything is written there.

    needs: fields ("data.path") that must not be empty. ValueError where one is, or where another process holds the
    folder. Of several processes, which share the folder, the first holds it.
    """

    def owning(stage: Callable[[Config], Found]) -> Callable[[Config], Found]:
        @functools.wraps(stage)
        def run(config: Any) -> Found:
            require(config, *needs)
            check_logs(getattr(config, "log_to", ()))
            check_template(getattr(config, "chat_template", ""))
            first = jax.process_index() == 0
            with ExitStack() as stack:
                stack.enter_context(stop_signals("; the same command goes on from what was saved"))
                stack.enter_context(quietly(config.quiet or not first))
                first_host_alone(lambda: stack.enter_context(run_lock(config.run_dir)))
                return stage(config)

        return run

    return owning


def require(config: Any, *names: str) -> None:
    """ValueError for the first of these fields that is empty."""
    for name in names:
        if not functools.reduce(getattr, name.split("."), config):
            raise ValueError(f"{name} is empty: give --{name.replace('_', '-')}, or a recipe that has it")


def open_start(config: Any, *, arrays: bool = False, scores: bool = False) -> Model:
    """The model in ``config.init_from``, on the stage's mesh. ValueError where it predicts no tokens, unless ``scores``
    will do.

    Where the run goes on from a checkpoint of its own, that has all but the arrays, which are then None: they are read
    where ``arrays`` says that they are wanted all the same.
    """
    mesh = make_mesh(config.mesh)
    saved = None if arrays else saved_meta(config.run_dir)
    if saved is None:
        with doing(f"reading {described(config.init_from)}"):
            start = load(config.init_from, compute=config.compute, mesh=mesh, ignore_config=config.ignore_config)
        if not scores:
            start.config.check_speaks()
        return start
    model, tokenizer = ModelConfig.from_dict(saved["model"]), Tokenizer.from_folder(config.run_dir)
    return Model(model, config.compute.on(mesh), None, None, tokenizer, mesh)


def with_chat_template(config: Any, start: Model) -> Model:
    """``start`` as it is asked by ``config.chat_template``; a run that goes on has its own beside its tokenizer."""
    if saved_meta(config.run_dir) is not None:
        return dataclasses.replace(start, tokenizer=Tokenizer.from_folder(config.run_dir))
    return start.asked_by(config.chat_template)


def with_turns(config: Any, start: Model, turns: Iterable[int]) -> Model:
    """``start``, which says beside its tokenizer that it was taught conversations of so many questions; a run that goes
    on has said so."""
    if saved_meta(config.run_dir) is not None:
        return start
    released = is_released(find_model(config.init_from))
    return dataclasses.replace(start, tokenizer=taught(start.text, sorted(turns), released=released))
