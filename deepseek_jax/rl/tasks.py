"""Tasks: what a row of the user's file asks, and what a right answer to it is.

    config = TaskConfig(name="gsm8k", path=("train.jsonl",))
    task = make_task(config)
    loader = PromptLoader(config.path, batch_size=16, seed=0)
    task.check(loader.rows)                          # every row can be asked, or ValueError "FILE:LINE: why not"
    with Grader(rewards or task.rewards, task=task) as grader:
        rows = next(loader)
        chats = [task.messages(row) for row in rows]  # [{"role", "content"}, ...], a user's turn last
        ...                                           # sample completions, one for each row (`rollout` does)
        grades = grader.grade(completions, rows)      # grades.total_N, grades.metrics()

A task of the package is a module with `make(config: TaskConfig) -> Task`, imported when it is asked for and not
before; a preset is one of them with the columns of a known dataset. A user's is a function `(row) -> str | list of
messages` in a file, `mine.py:ask`, called in a process that is killed when it hangs; it is graded as "rows" is.
"""

import dataclasses
import difflib
import importlib
import re
import weakref
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from deepseek_jax.data.conversations import Message, read_messages
from deepseek_jax.data.text import check_text
from deepseek_jax.rl import answers
from deepseek_jax.rl.tools import Tools, ToolsConfig
from deepseek_jax.rl.workers import WorkerPool
from deepseek_jax.typed import check_types

Row = Mapping[str, Any]
Messages = list[Message]
# Of each step of a completion its end, in characters, and its reward.
Steps = Sequence[tuple[int, float]]
Reward = Callable[[str, Row], float | Steps | None]
Accuracy = Callable[[str, Row], float | None]

# By name, the modules of the package's tasks.
TASKS = {name: f"deepseek_jax.rl.{name}" for name in ("arithmetic", "code", "countdown", "gsm8k", "humaneval", "logic")}
TASKS |= {"maths": "deepseek_jax.rl.mathematics", "choice": "deepseek_jax.rl.multiple_choice"}
TASKS |= {name: f"deepseek_jax.rl.{name}" for name in ("ifeval", "mixed", "programs")}
_ASK_SECONDS = 10.0  # what a call of a user's function may take
_FILE = re.compile(r"(.+\.py):([^:/]+)")
# "{{" and "}}" are braces, "{}" is itself (as in \boxed{}), and anything else in braces is a column.
_FIELD = re.compile(r"\{\{|\}\}|\{([^{}]+)\}")


@dataclasses.dataclass(frozen=True)
class TaskConfig:
    """Which task, and which columns of which files it reads. "" is the task's own default."""

    name: str = "rows"
    """rows, gsm8k, maths, choice, code, programs, humaneval, ifeval, countdown, arithmetic, logic; a preset of one:
    math, aime, cnmo, gpqa, mmlu, mmlu_pro, livecodebench, codeforces; mixed, whose rows name one each in a column
    `task`; or file.py:function, from a row to text or messages."""
    path: tuple[str, ...] = ()
    """Files of rows, folders of them, quoted globs: .jsonl(.gz|.zst), .parquet; or hf:NAME[:CONFIG]:SPLIT, a dataset of
    the Hugging Face hub."""
    prompt: str = ""
    """The column that is asked: text, or a list of {"role", "content"}. Here and below A|B is the first of several that
    a row has."""
    answer: str = ""
    """The column with the right answer."""
    system: str = ""
    """Text that opens each conversation."""
    template: str = ""
    """The user's turn, made of columns: "{question}\\nAnswer in {unit}." ("{{", "}}": braces)."""

    tools: ToolsConfig = ToolsConfig()

    def __post_init__(self) -> None:
        check_types(self)


_MATHS = TaskConfig("maths", prompt="problem|Problem|question|Question", answer="answer|Answer|solution|Solution")
# By name, a task and what it uses where the configuration says nothing.
PRESETS = {
    # The box of the worked solution is there in all copies of MATH, a column with the answer in some.
    "math": TaskConfig("maths", prompt="problem", answer="solution"),
    "aime": _MATHS,
    "cnmo": _MATHS,
    **{name: TaskConfig("choice") for name in ("gpqa", "mmlu", "mmlu_pro")},
    "livecodebench": TaskConfig("programs", prompt="question_content", answer="public_test_cases+private_test_cases"),
    # Examples of what programs read and write are tests, too.
    "codeforces": TaskConfig(
        "programs", prompt="description", answer="examples|public_tests+official_tests|private_tests"
    ),
}


@dataclasses.dataclass(frozen=True)
class Task:
    """What is asked and what is right; both functions raise ValueError for a row that they cannot use.

    ask: a row as messages, or as the text of a single one; `messages` checks it. accuracy: the reward of that name,
    1 or 0, or None for a row without an answer; it runs in this process, so it must not hang (see ``score_all``).
    right: the answer as text, None where the row has none. rewards: the specifications (see ``Grader``) that grade by
    default. system: text that opens each conversation. said: what a completion answers, as accuracy reads it, so that
    those that say the same are equal (None: nothing); absent where wrong answers cannot be compared. tools: what may be
    called on the way to an answer.
    """

    ask: Callable[[Row], Any]
    accuracy: Accuracy
    right: Callable[[Row], str | None]
    rewards: tuple[str, ...] = ("accuracy=1.0", "format=0.2")
    system: str = ""
    said: Callable[[str, Row], Hashable | None] | None = None
    tools: Tools | None = None
    figures: Callable[[Sequence[tuple[Row, str, bool]]], Mapping[str, float]] | None = None

    def messages(self, row: Row) -> Messages:
        """The conversation to be answered. ValueError "FILE:LINE: what" for a row that gives none."""
        try:
            asked = self.ask(row)
            messages = read_messages([{"role": "user", "content": asked}] if isinstance(asked, str) else asked)
            if messages[-1]["role"] != "user":
                raise ValueError(
                    f"its last message has role {messages[-1]['role']!r}; to be answered, it must be 'user'"
                )
            for message in messages:
                check_text(message["content"] or "", "content")
        except ValueError as error:
            raise ValueError(f"{where(row)}: {error}") from error
        system = [{"role": "system", "content": self.system}] if self.system else []
        return [*system, *messages]

    def grades(self, row: Row) -> bool:
        """Whether ``accuracy`` says of answers to the row whether they are right: of code, tests do so, and there is no
        right answer as text."""
        return self.right(row) is not None or self.accuracy("", row) is not None

    def check(self, rows: Iterable[Row]) -> None:
        """ValueError for the first row that cannot be asked."""
        for row in rows:
            self.messages(row)


def make_task(config: TaskConfig) -> Task:
    """The task that `config` names, with its tools. ValueError for a name, file or function that there is not."""
    task = _make_task(config)
    if not config.tools.use:
        return task
    tools = Tools(config.tools)
    return dataclasses.replace(task, tools=tools, system=f"{task.system}\n\n{tools.told}".strip())


def _make_task(config: TaskConfig) -> Task:
    if config.name == "rows":
        return make_rows_task(config)
    config = _with_preset(config)
    if config.name in TASKS:
        return importlib.import_module(TASKS[config.name]).make(config)
    if (found := split_function(config.name)) is not None:
        return _make_file_task(config, *found)
    names = [*TASKS, *PRESETS]
    near = "".join(f" did you mean {name}?" for name in difflib.get_close_matches(config.name, names, n=1))
    raise ValueError(
        f"task.name={config.name!r}: expected rows, {', '.join(names)} or file.py:function;{near}".rstrip(";")
    )


def _with_preset(config: TaskConfig) -> TaskConfig:
    preset = PRESETS.get(config.name)
    if preset is None:
        return config
    prompt = config.prompt or ("" if config.template else preset.prompt)
    return dataclasses.replace(config, name=preset.name, prompt=prompt, answer=config.answer or preset.answer)


def score_all(
    reward: Accuracy, completions: Sequence[str], rows: Sequence[Row], *, name: str = "accuracy"
) -> list[float | None]:
    """The reward of each completion, which answers the row at its place; a ValueError names the row.

    A reward that waits for other processes says by its `threads` how many calls at a time it takes.
    """

    def score(completion: str, row: Row) -> float | None:
        try:
            return reward(completion, row)
        except ValueError as error:
            raise ValueError(f"{where(row)}: reward {name}: {error}") from error

    with ThreadPoolExecutor(getattr(reward, "threads", 1), thread_name_prefix="reward") as threads:
        return list(threads.map(score, completions, rows))


def where(row: Row) -> str:
    """Which row it is, for messages."""
    return getattr(row, "where", "a row")


def column(row: Row, name: str) -> Any:
    """The row's value, of "A|B" that of the first column that there is; ValueError with the columns where there is
    none."""
    for one in name.split("|") if name not in row else (name,):
        if one in row:
            return row[one]
    raise ValueError(f'no column "{name}"; it has {", ".join(map(str, row)) or "none"}')


def fill(template: str, row: Row) -> str:
    """`template` with the row's text and numbers in the place of {column}."""

    def value(match: re.Match[str]) -> str:
        if match.group(1) is None:
            return match.group()[0]
        found = column(row, match.group(1))
        numbers = isinstance(found, list) and all(isinstance(item, int | float) for item in found)
        if not isinstance(found, str | int | float) and not numbers:
            raise ValueError(f'"{match.group(1)}" is of type {type(found).__name__}; a template takes text and numbers')
        return str(found)

    return _FIELD.sub(value, template)


def make_rows_task(
    config: TaskConfig,
    *,
    prompt: str = "prompt",
    template: str = "",
    answer: Callable[[str], str] = lambda text: text,
) -> Task:
    """A question from one column, or from several through a template, and its answer from another.

    `prompt` and `template` are what is used where the configuration has none ("{prompt}" in the latter is the
    column that asks); `answer` takes the right answer out of its column's text, or raises ValueError.
    """
    if config.template and config.prompt:
        raise ValueError(
            f"task.template makes the question of columns by name: task.prompt={config.prompt!r} is not used"
        )
    asked_by = config.prompt or prompt
    written = config.template or template.replace("{prompt}", f"{{{asked_by}}}")

    def ask(row: Row) -> Any:
        return fill(written, row) if written else _conversation(column(row, asked_by), asked_by)

    return _answered(ask, config, answer)


def _conversation(value: Any, name: str) -> Any:
    if not isinstance(value, str | list):
        raise ValueError(f'"{name}" is of type {type(value).__name__}; it must be text or a list of messages')
    return value


def _answered(ask: Callable[[Row], Any], config: TaskConfig, extract: Callable[[str], str]) -> Task:
    """A task whose right answers stand in a column."""
    name = config.answer or "answer"

    def right(row: Row) -> str | None:
        value = column(row, name)
        if value is None or value == "":
            return None
        if not isinstance(value, str | int | float) or isinstance(value, bool):
            raise ValueError(f'"{name}" is of type {type(value).__name__}; it must be text or a number')
        return extract(str(value))

    def accuracy(completion: str, row: Row) -> float | None:
        answer = right(row)
        return None if answer is None else float(answers.is_right(completion, answer))

    def said(completion: str, row: Row) -> Hashable | None:
        return answers.said(completion, right(row) or "")

    return Task(ask, accuracy, right, system=config.system, said=said)


def _make_file_task(config: TaskConfig, file: str, function: str) -> Task:
    if config.prompt or config.template:
        raise ValueError(f"task.name={config.name!r} makes the question: task.prompt and task.template are not used")
    pool = WorkerPool([(str(Path(file).resolve()), function, 1)], count=1, time_limit=_ASK_SECONDS)

    def ask(row: Row) -> Any:
        (outcome,) = pool.call([(0, row)])
        if outcome.failure == "timeout":
            raise ValueError(f"{Path(file).name}:{function} took more than {_ASK_SECONDS:g} s")
        if outcome.failure:
            raise ValueError(f"{function}: {outcome.text}")
        return outcome.value

    weakref.finalize(ask, pool.close)  # the process ends with the task, or with the program
    return _answered(ask, config, lambda text: text)


def split_function(name: str) -> tuple[str, str] | None:
    """File and function of "file.py:function"; None where it is no such thing. ValueError for a missing file."""
    found = _FILE.fullmatch(name)
    if found is None:
        return None
    file, function = found.groups()
    if not Path(file).is_file():
        raise ValueError(f"{name}: there is no file {file}")
    return file, function
