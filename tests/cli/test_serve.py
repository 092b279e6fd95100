"""``deepseek-jax serve`` as a process of its own: it tells where it is, and ends when it is told to."""

import json
import re
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator

import pytest

from deepseek_jax.cli.main import main

RECIPE = """
from deepseek_jax.config import ModelConfig
def config():
    return ModelConfig(vocab_size=300, num_hidden_layers=2, num_nextn_predict_layers=0, max_position_embeddings=512)
"""
SMALL = ("--serving.slots", "2", "--serving.pages", "32", "--serving.page", "8", "--serving.context", "128")
SMALL += ("--serving.chunk", "16", "--serving.turns", "1")
SERVE = (sys.executable, "-m", "deepseek_jax.cli.main", "serve")


@pytest.fixture
def process(tmp_path) -> Iterator[subprocess.Popen[str]]:
    recipe = tmp_path / "mine.py"
    recipe.write_text(RECIPE)
    command = [*SERVE, str(recipe), "--random", "--port", "0", *SMALL]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as started:
        yield started
        started.kill()


def told(process: subprocess.Popen[str], what: str) -> re.Match[str]:
    assert process.stderr is not None
    lines = []
    for line in process.stderr:
        lines.append(line)
        if found := re.search(what, line):
            return found
    raise AssertionError("".join(lines))


def test_sigterm_lets_streams_end(process):
    found = told(process, r"ready: (\S+)/v1 has mine, of 128 tokens; weights \S+ s, programs \S+ s")
    asked = {"prompt": "a", "max_tokens": 120, "stream": True, "logit_bias": {"1": -100}}
    request = urllib.request.Request(f"{found[1]}/v1/completions", json.dumps(asked).encode())
    request.add_header("Content-Type", "application/json")
    with urllib.request.urlopen(request, timeout=60) as answer:
        first = answer.readline()
        process.send_signal(signal.SIGTERM)
        rest = answer.read()
    assert first.startswith(b"data: {") and rest.endswith(b'"finish_reason":"length"}]}\n\ndata: [DONE]\n\n')
    told(process, "ending")
    assert process.wait(30) == 0


def test_a_port_that_is_taken_is_told_before_anything_is_loaded(tmp_path, capfd):
    recipe = tmp_path / "mine.py"
    recipe.write_text(RECIPE)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert subprocess.run([*SERVE, str(recipe), "--random", "--port", port]).returncode == 1
    said = capfd.readouterr().err
    assert f"127.0.0.1:{port}" in said and "weights" not in said


@pytest.mark.parametrize(
    "options, said",
    [
        (["--random", "--placement", "x.json"], "--random with placement"),
        (["--origins", "*"], "expected a page's, as https://chat.example"),
    ],
)
def test_what_would_do_nothing_is_refused(options, said, tmp_path, capsys):
    recipe = tmp_path / "mine.py"
    recipe.write_text(RECIPE)
    assert main(["serve", str(recipe), *options]) == 1
    assert said in capsys.readouterr().err
