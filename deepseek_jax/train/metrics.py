"""The metrics of a run: one JSON object a line in `metrics.jsonl`, scalars in `tensorboard/` as well."""

import errno
import json
import os
import resource
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from deepseek_jax.files import finite, read_json_lines, write_whole

FILE_NAME = "metrics.jsonl"


class MetricsWriter:
    """Append a run's metrics; a line is on its way to the disk when `write` returns.

    Opening cuts what an earlier process wrote after `after_step`, the step that this one goes on from, and a
    last line that a kill cut short: no step appears twice. Of several processes the first alone writes.
    """

    def __init__(self, run_dir: str | Path, *, after_step: int = 0, tensorboard: bool = True) -> None:
        self._file = self._summary = None
        if jax.process_index() > 0:
            return
        run_dir = Path(run_dir)
        run_dir.mkdir(parents=True, exist_ok=True)
        path = run_dir / FILE_NAME
        if path.exists():
            _cut(path, after_step)
        self._file = path.open("ab", buffering=0)  # nothing left to write at close, should the disk be full
        if tensorboard:
            from tensorboardX import SummaryWriter  # it brings torch along, where that is installed

            self._summary = SummaryWriter(str(run_dir / "tensorboard"), purge_step=after_step + 1)

    def write(self, step: int, metrics: Mapping[str, Any]) -> dict[str, Any]:
        """Write `{"step", "time" (unix seconds), **metrics}` and return it.

        Arrays become nested lists, and numbers that are not finite null: JSON has no word for them.

        Raises:
            OSError: the disk is full; names the file.
        """
        line = {"step": step, "time": time.time()} | {name: _plain(value) for name, value in metrics.items()}
        if self._file is None:
            return line
        text = (json.dumps(line, allow_nan=False) + "\n").encode()
        try:
            complete = self._file.write(text) == len(text)
        except OSError as error:
            raise OSError(error.errno, f"{error.strerror}: metrics of step {step}", self._file.name) from error
        if not complete:
            raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)}: metrics of step {step}", self._file.name)
        if self._summary is not None:
            for name, value in metrics.items():
                if np.ndim(value) == 0:
                    self._summary.add_scalar(name, float(value), step)
        return line

    def close(self) -> None:
        """Close the files and end TensorBoard's thread."""
        if self._file is not None:
            self._file.close()
        if self._summary is not None:
            self._summary.close()


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl, or of the one in a run's folder. A last line without an end is skipped.

    Raises:
        ValueError: FILE:LINE of a line that is not a JSON object with a step.
    """
    path = Path(path)
    path = path / FILE_NAME if path.is_dir() else path
    lines = read_json_lines(path)
    for number, line in enumerate(lines, start=1):
        if "step" not in line:
            raise ValueError(f"{path}:{number}: expected an object with a step, found {str(line)[:80]}")
    return lines


def peak_memory() -> dict[str, int]:
    """`peak_bytes_device`, the most that one of this process's devices has held; where devices do not count (CPU),
    `peak_bytes_process`."""
    peaks = [(device.memory_stats() or {}).get("peak_bytes_in_use") for device in jax.local_devices()]
    counted = [peak for peak in peaks if peak is not None]
    if counted:
        return {"peak_bytes_device": max(counted)}
    unit = 1 if sys.platform == "darwin" else 1024
    return {"peak_bytes_process": unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss}


def _cut(path: Path, after_step: int) -> None:
    kept = [json.dumps(line) + "\n" for line in read_metrics(path) if line["step"] <= after_step]
    write_whole(path, "".join(kept))


def _plain(value: Any) -> Any:
    if isinstance(value, jax.Array | np.ndarray | np.generic):
        value = np.asarray(value).tolist()
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return finite(value + 0.0 if isinstance(value, float) else value)  # 0 for -0, a mean that nothing pulls
