"""IFEval (arXiv 2311.07911): prompts with instructions that a program can check, all of which an answer must follow."""

from collections.abc import Sequence
from typing import Any

from deepseek_jax.rl.answers import last_reply
from deepseek_jax.rl.instructions import follows
from deepseek_jax.rl.tasks import Row, Task, TaskConfig, column, make_rows_task


def make(config: TaskConfig) -> Task:
    """Columns `prompt`, `instruction_id_list` and `kwargs`, as in google/IFEval.

    Right by the strict measure: what is said after thinking, as it stands, follows every instruction. The figure
    ``instructions`` is the share of instructions that are followed.
    """
    if config.answer:
        raise ValueError(f"task.answer={config.answer!r}: ifeval's instructions stand in columns of their own")

    def accuracy(completion: str, row: Row) -> float:
        return float(all(followed(completion, row)))

    def figures(answers: Sequence[tuple[Row, str, bool]]) -> dict[str, float]:
        each = [followed(completion, row) for row, completion, _ in answers]
        return {"instructions": sum(map(sum, each)) / sum(map(len, each))}

    asking = make_rows_task(config)
    return Task(asking.ask, accuracy, lambda row: None, ("accuracy",), config.system, figures=figures)


def followed(completion: str, row: Row) -> list[bool]:
    """Of each of a row's instructions whether the completion follows it. ValueError for a row that has none."""
    names, arguments = column(row, "instruction_id_list"), column(row, "kwargs")
    if not isinstance(names, list) or not isinstance(arguments, list) or not len(names) == len(arguments) > 0:
        raise ValueError(f'"instruction_id_list" {names!r:.80} and "kwargs" must be lists of one length')
    reply = last_reply(completion)
    return [follows(reply, name, _object(given)) for name, given in zip(names, arguments, strict=True)]


def _object(given: Any) -> dict[str, Any]:
    if given is not None and not isinstance(given, dict):
        raise ValueError(f'"kwargs" holds {given!r:.80}; it must hold objects')
    return given or {}
