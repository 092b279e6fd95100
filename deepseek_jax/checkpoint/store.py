"""Write checkpoints while training goes on, keep the newest and the best, and survive what can go wrong."""

import json
import math
import os
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NoReturn

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, BestN, LatestN, PreservationPolicy

from deepseek_jax.checkpoint import reading
from deepseek_jax.checkpoint.faults import no_room, silence_repeats
from deepseek_jax.checkpoint.finding import checkpoint_steps
from deepseek_jax.checkpoint.places import Folder, check_directory, put_aside, resolved
from deepseek_jax.parallel.processes import meet

_DELETED = "deleted"


class CheckpointStore:
    """The checkpoints of one run, for the process that trains it, or for all of them, which share the folder.

    A save copies the arrays to the host, so that the next step may donate them, and threads write it. It
    counts once its folder is renamed to the step's number; a kill before that leaves nothing that looks so. Of several
    processes each writes its own part of the arrays, and all call these methods in the same order; any number of
    processes reads what any other number wrote.
    """

    def __init__(
        self,
        directory: str | Path,
        *,
        keep: int,
        best_metric: str | None = None,
        best_mode: Literal["max", "min"] = "max",
    ) -> None:
        """Args:
            directory: made with the first save; a local or mounted path, or gs://BUCKET/FOLDER.
            keep: how many of the newest checkpoints stay.
            best_metric: the best by this metric stays as well; NaN is worse than any number.

        Raises:
            ValueError: `keep` < 1, another `best_mode`, or a URL for a directory.
        """
        if keep < 1:
            raise ValueError(f"keep must be at least 1, not {keep}")
        if best_mode not in ("max", "min"):
            raise ValueError(f"best_mode must be 'max' or 'min', not {best_mode!r}")
        if "://" in str(directory):  # a path that is a pattern can be read
            check_directory(directory)
        self.directory = resolved(directory)
        self._keep, self._best_metric, self._best_mode = keep, best_metric, best_mode
        self._manager: ocp.CheckpointManager | None = None
        self._pending: tuple[int, dict[str, dict[str, list[Any]]]] | None = None

    def __enter__(self) -> "CheckpointStore":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def save(
        self,
        step: int,
        state: Any,
        *,
        loader: Mapping[str, Any],
        meta: Mapping[str, Any],
        reference: Any = None,
        metrics: Mapping[str, float] | None = None,
        block: bool = False,
    ) -> None:
        """Commit state, loader position and metadata, and the arrays of a reference that moves, as one checkpoint.

        Returns once the arrays are copied and may be donated, or with `block` once all is on disk.

        Raises:
            OSError: no room for this save or the one before it; names the directory and the last good step.
        """
        self.wait()
        trees = {"state": state} if reference is None else {"state": state, "reference": reference}
        named = {item: reading.named_leaves(tree) for item, tree in trees.items()}
        self._pending = step, {item: reading.describe_arrays(leaves) for item, leaves in named.items()}
        items = ocp.args.Composite(
            loader=ocp.args.JsonSave(dict(loader)),
            meta=ocp.args.JsonSave({**meta, "format": reading.FORMAT_VERSION}),
            **{item: ocp.args.PyTreeSave(reading.nest(leaves)) for item, leaves in named.items()},
        )
        kept = {self._best_metric: float(metrics[self._best_metric])} if self._best_metric and metrics else None
        try:
            if self._manager is None:
                self._manager = self._open_manager()
            self._manager.save(step, args=items, metrics=kept, force=True)
        except (OSError, ValueError, RuntimeError) as error:
            self._fail(error)
        if block:
            self.wait()

    def steps(self) -> list[int]:
        """The committed steps on disk, oldest first."""
        return checkpoint_steps(self.directory)

    def latest_step(self) -> int | None:
        """The newest committed step, or None."""
        return max(self.steps(), default=None)

    def restore(
        self, abstract_state: Any, step: int | None = None, *, meta: Mapping[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any], dict[str, Any]]:
        """Read a checkpoint onto any mesh -> (state, loader, meta).

        Args:
            abstract_state: pytree of ShapeDtypeStruct with the shardings wanted, which may differ from the
            saved. step: None takes the newest. A damaged one is passed over, with a warning that says which
                is used instead, and renamed to `<step>.damaged-<time>`.
            meta: what this run would save; its "model" is compared with the checkpoint's first.

        Raises:
            FileNotFoundError: no checkpoint, or not that step.
            reading.DamagedCheckpointError: the step asked for, or every step, is damaged.
            ValueError: of another model; names the fields, or else the arrays, that differ.
        """

        def read(folder: Folder) -> tuple[Any, dict[str, Any], dict[str, Any]]:
            reading.read_inventory(folder)
            saved = reading.read_json(folder, "meta", versions=(reading.FORMAT_VERSION,))
            reading.check_same_model(folder, saved, meta or {})
            return reading.read_state(folder, abstract_state), reading.read_json(folder, "loader"), saved

        if step is not None:
            return read(reading.existing(self.directory, step))
        _, content, damaged = reading.newest_intact(self.directory, read)
        meet()  # all have read
        for number in damaged if jax.process_index() == 0 else ():  # out of the way of the save that comes here again
            put_aside(self.directory / str(number), f"{number}.damaged-{time.time_ns()}")
        return content

    def restore_reference(self, abstract: Any, step: int) -> Any:
        """Read the reference of a checkpoint; errors as in `restore`."""
        return reading.read_state(reading.existing(self.directory, step), abstract, item="reference")

    def read_meta(self, step: int | None = None, *, going_on: bool = False) -> dict[str, Any]:
        """The metadata of a checkpoint, by default of the newest intact one; errors as in `restore`.

        going_on: refuse a format that is read for its model alone.
        """
        versions = (reading.FORMAT_VERSION,) if going_on else reading.READABLE

        def read(folder: Folder) -> dict[str, Any]:
            reading.read_inventory(folder)
            return reading.read_json(folder, "meta", versions=versions)

        if step is not None:
            return read(reading.existing(self.directory, step))
        return reading.newest_intact(self.directory, read)[1]

    def wait(self) -> None:
        """Block until the save in progress is on disk; raises what went wrong with it (see `save`)."""
        if self._manager is None:
            return
        try:
            self._manager.wait_until_finished()
        except (OSError, ValueError, RuntimeError) as error:
            self._fail(error)
        self._delete()

    def close(self) -> None:
        """Finish the save in progress and end the threads; a second call does nothing."""
        try:
            self.wait()
        finally:
            if self._manager is not None:
                manager, self._manager = self._manager, None
                manager.close()

    def _open_manager(self) -> ocp.CheckpointManager:
        check_directory(self.directory)
        silence_repeats()
        self._delete()
        keep: list[PreservationPolicy] = [LatestN(self._keep)]
        if self._best_metric is not None:
            keep.append(
                BestN(
                    get_metric_fn=self._score,
                    reverse=self._best_mode == "min",
                    n=1,
                    keep_checkpoints_without_metrics=False,
                )
            )
        options = ocp.CheckpointManagerOptions(
            preservation_policy=AnyPreservationPolicy(keep),
            best_fn=self._score if self._best_metric is not None else None,
            best_mode=self._best_mode,
            cleanup_tmp_directories=True,
            todelete_subdir=_DELETED,
            async_options=ocp.AsyncOptions(post_finalization_callback=self._write_inventory),
        )
        return ocp.CheckpointManager(self.directory, options=options)

    def _score(self, metrics: Mapping[str, float]) -> float:
        assert self._best_metric is not None
        value = metrics[self._best_metric]
        worst = -math.inf if self._best_mode == "max" else math.inf
        return worst if math.isnan(value) else value

    def _delete(self) -> None:
        """Remove what was moved out of the way: a kill in the middle leaves no half checkpoint under a step's name."""
        if jax.process_index() == 0 and isinstance(self.directory, Path):
            shutil.rmtree(self.directory / _DELETED, ignore_errors=True)

    def _unfinished(self, step: int) -> Folder:
        if not isinstance(self.directory, Path):
            return self.directory / str(step)  # without its mark
        return self.directory / f"{step}.orbax-checkpoint-tmp"

    def _write_inventory(self) -> None:
        """Called by Orbax's thread when all items are complete, before the folder gets its final name."""
        assert self._pending is not None
        step, arrays = self._pending
        for item in ("state", "reference"):
            parts = (self._unfinished(step) / item).glob("ocdbt.process_*")
            if any(parts) and not (self._unfinished(step) / item / "manifest.ocdbt").is_file():
                raise RuntimeError(
                    f"the checkpoint of step {step} in {self.directory} is not whole: its {item} was not merged"
                )
        if jax.process_index() == 0:
            write_inventory(self._unfinished(step), arrays["state"], arrays.get("reference"))

    def _fail(self, error: OSError | ValueError | RuntimeError) -> NoReturn:
        """Say a full disk in one sentence and free what the unfinished save took; raise others as is."""
        number = no_room(error)
        if number is None:
            raise error
        assert self._pending is not None
        step = self._pending[0]
        manager, self._manager = self._manager, None
        if manager is not None:
            try:
                manager.close()
            except (OSError, ValueError, RuntimeError) as again:
                if no_room(again) is None:
                    raise
        shutil.rmtree(str(self._unfinished(step)), ignore_errors=True)
        safe = self.latest_step()
        kept = "no checkpoint was saved before it" if safe is None else f"the checkpoint of step {safe} is safe"
        raise OSError(
            number,
            f"{os.strerror(number)}: the checkpoint of step {step} does not fit in {self.directory}; {kept}",
        ) from error


def write_inventory(
    folder: Folder, arrays: Mapping[str, list[Any]], reference: Mapping[str, list[Any]] | None = None
) -> None:
    """List the files of a complete checkpoint, and its arrays as `reading.describe_arrays` has them."""
    content = {"files": reading.file_sizes(folder), "arrays": arrays, "reference": reference or {}}
    (folder / reading.INVENTORY).write_text(json.dumps(content))
