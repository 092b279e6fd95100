"""Answers that were trained on, as text: some of each logged step, for people to read."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from deepseek_jax.files import read_json_lines, write_whole
from deepseek_jax.parallel.processes import gather
from deepseek_jax.train.loop_config import LoopConfig

FILE_NAME = "rollouts.jsonl"


@dataclasses.dataclass
class SampleLog:
    """``rollouts.jsonl`` of a run's folder: of each step that has a line of metrics, its first ``most`` answers.

    As with the metrics no step appears twice: at its first step a process cuts what an earlier one wrote behind it. Of
    several processes the first alone writes.
    """

    run_dir: str | Path
    loop: LoopConfig
    most: int = 64
    _began: bool = dataclasses.field(default=False, init=False)

    def write(self, step: int, answers: Sequence[Mapping[str, Any]]) -> None:
        """Add those of a step, where it is due; steps count from 1, as the lines of metrics do."""
        due = self.loop.due(self.loop.log_every, step)
        if due:  # the first of all processes' answers, which follow one another
            answers = [answer for part in gather(answers[: self.most]) for answer in part]
        if jax.process_index():
            return
        path = Path(self.run_dir) / FILE_NAME
        if not self._began:
            kept = [line for line in read_json_lines(path) if line["step"] < step] if path.exists() else []
            write_whole(path, "".join(map(_line, kept)))
            self._began = True
        if due:
            with path.open("a", encoding="utf-8", errors="backslashreplace") as file:
                file.write("".join(_line({"step": step, **answer}) for answer in answers[: self.most]))


def _line(content: Mapping[str, Any]) -> str:
    return json.dumps(content, ensure_ascii=False) + "\n"
