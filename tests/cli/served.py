"""``deepseek-jax serve`` as a process: what it says, who its child is, and what is left of either."""

import contextlib
import json
import re
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

RECIPE = """
from deepseek_jax.config import ModelConfig
def config():
    return ModelConfig(vocab_size=300, num_hidden_layers=2, num_nextn_predict_layers=0, max_position_embeddings=4096)
"""
SMALL = ("--serving.slots", "2", "--serving.pages", "32", "--serving.page", "8", "--serving.context", "128")
SMALL += ("--serving.chunk", "16", "--serving.turns", "1")
SERVE = (sys.executable, "-m", "deepseek_jax.cli.main", "serve")


def recipe(folder: Path) -> str:
    """The file of a small one."""
    file = folder / "mine.py"
    file.write_text(RECIPE)
    return str(file)


@contextlib.contextmanager
def started(command: Sequence[str]) -> Iterator[subprocess.Popen[str]]:
    """The process; at the end of the block it is killed."""
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def told(process: subprocess.Popen[str], what: str) -> re.Match[str]:
    """Waits for a line. AssertionError, with all that was said, where it does not come."""
    assert process.stderr is not None
    lines = []
    for line in process.stderr:
        lines.append(line)
        if found := re.search(what, line):
            return found
    raise AssertionError("".join(lines))


def request(url: str, **asked: Any) -> urllib.request.Request:
    """Of a completion; with a bias against the end of sentence, so that it is as long as may be."""
    body = {"prompt": "a", "logit_bias": {"1": -100}} | asked
    made = urllib.request.Request(f"{url}/v1/completions", json.dumps(body).encode())
    made.add_header("Content-Type", "application/json")
    return made


def children(pid: int) -> list[int]:
    return [child for child, (parent, state) in _processes().items() if parent == pid and state != "Z"]


def ended(pid: int, seconds: float = 20.0) -> bool:
    """Whether a process that is nobody's here ends within so long."""
    last = time.monotonic() + seconds
    while _processes().get(pid, (0, "Z"))[1] != "Z":
        if time.monotonic() > last:
            return False
        time.sleep(0.05)
    return True


def _processes() -> dict[int, tuple[int, str]]:
    """Of each its parent and its state."""
    found = dict[int, tuple[int, str]]()
    for file in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has just ended
            state, parent = file.read_text().rpartition(")")[2].split()[:2]
            found[int(file.parent.name)] = int(parent), state
    return found
