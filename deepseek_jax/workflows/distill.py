"""Distillation as R1 does it (arXiv 2501.12948, section 2.4): what a teacher said, as text, is taught to a student by
SFT. Ids never travel, so each has a tokenizer of its own."""

import dataclasses
from pathlib import Path
from typing import Any

from deepseek_jax.typed import check_types
from deepseek_jax.workflows.inputs import look_for
from deepseek_jax.workflows.rejection import KEPT, RejectionConfig, check_kept, rejection
from deepseek_jax.workflows.sft import SFTConfig, sft
from deepseek_jax.workflows.stage_result import read_result


@dataclasses.dataclass(frozen=True)
class DistillConfig:
    """A teacher's samples and a student. Each is a run of its own, in ``samples`` and ``student`` of ``run_dir``."""

    run_dir: str = "runs/distill"
    """The folder of both."""
    samples: RejectionConfig = RejectionConfig()
    """The teacher, what it is asked and what is kept; without samples.init_from, student.data.path has what it said."""
    student: SFTConfig = SFTConfig()
    """The student and how it is taught; what is in student.data.path, general chats for instance, is mixed in."""
    quiet: bool = False
    """Say nothing before the result."""

    def __post_init__(self) -> None:
        check_types(self)


def distill(config: DistillConfig) -> dict[str, Any]:
    """Sample, then teach; each goes on where it was cut off. Returns the student's result, with the samples'.

    ValueError where no sample is kept, whatever else there is to learn."""
    if not config.samples.init_from and not config.student.data.path:
        raise ValueError("samples.init_from and student.data.path are empty: give a teacher, or files of what one said")
    run_dir, student, found = Path(config.run_dir), config.student, {}
    if config.samples.init_from:
        if read_result(run_dir / "student") is None:  # known before a teacher is asked for days
            look_for(student)
        own = {"run_dir": str(run_dir / "samples"), "quiet": config.quiet or config.samples.quiet}
        found["samples"] = rejection(dataclasses.replace(config.samples, **own))
        check_kept(run_dir / "samples")
        path = (str(run_dir / "samples" / KEPT), *student.data.path)
        student = dataclasses.replace(student, data=dataclasses.replace(student.data, path=path))
    own = {"run_dir": str(run_dir / "student"), "quiet": config.quiet or student.quiet}
    return sft(dataclasses.replace(student, **own)) | found
