"""Where a stage's metrics go beside its own files: Weights & Biases, or a function of the user's."""

import importlib.util
import logging
import os
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import jax

from deepseek_jax.rl.tasks import split_function
from deepseek_jax.rl.user_worker import describe, load_function

logger = logging.getLogger(__name__)

Log = Callable[[int, dict[str, Any]], None]

_WANDB_ID = "wandb-id.txt"  # by which a run that goes on is the same there


def check_logs(names: Sequence[str]) -> None:
    """ValueError for a name that is neither ``wandb``, installed, nor ``file.py:function`` of two arguments."""
    for name in names:
        if name == "wandb":
            if importlib.util.find_spec("wandb") is None:
                raise ValueError("log_to=wandb: wandb is not installed: pip install 'deepseek-jax[wandb]'")
        else:
            _function(name)


@contextmanager
def opened_logs(names: Sequence[str], run_dir: Path, settings: Mapping[str, Any]) -> Iterator[Log | None]:
    """One function (step, line of metrics) that hands on to all of them; None where there are none.

    Of several processes the first alone logs. A log that raises misses that line and the run goes on, as with a reward
    that raises; the first error of each is said.
    """
    if not names or jax.process_index() > 0:
        yield None
        return
    failed: set[str] = set()
    with ExitStack() as stack:
        logs = {
            name: stack.enter_context(_wandb_log(run_dir, settings)) if name == "wandb" else _function(name)
            for name in names
        }

        def log(step: int, line: dict[str, Any]) -> None:
            for name, each in logs.items():
                try:
                    each(step, dict(line))
                except Exception as error:  # whatever it raises
                    if name not in failed:
                        failed.add(name)
                        what = describe(error, name.rpartition(":")[0])
                        logger.warning("log_to %s, step %d: %s; the run goes on, this is said once", name, step, what)

        yield log


def _function(name: str) -> Log:
    found = split_function(name)
    if found is None:
        raise ValueError(f"log_to={name!r}: expected wandb, or file.py:function")
    return load_function(*found, arguments=2)


@contextmanager
def _wandb_log(run_dir: Path, settings: Mapping[str, Any]) -> Iterator[Log]:
    """Scalars go to a run of the folder's name; project, entity and mode come from WANDB_PROJECT and the like."""
    import wandb  # an extra  # pyright: ignore[reportMissingImports]

    path = run_dir / _WANDB_ID
    if not path.exists():
        path.write_text(uuid.uuid4().hex[:12] + "\n", encoding="utf-8")
    try:
        run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "deepseek-jax"),
            name=run_dir.resolve().name,
            id=path.read_text(encoding="utf-8").strip(),
            resume="allow",
            dir=str(run_dir),
            config=dict(settings),
        )
    except Exception as error:  # its own classes: no key, no network, no project
        raise RuntimeError(f"log_to wandb: {error} (WANDB_MODE=offline needs neither key nor network)") from error

    def log(step: int, line: dict[str, Any]) -> None:
        run.log({name: value for name, value in line.items() if isinstance(value, int | float)}, step=step)

    status = 1
    try:
        yield log
        status = 0
    finally:
        run.finish(exit_code=status)
