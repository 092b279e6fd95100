"""``convert`` both ways, killed in between, and the commands that read what it wrote."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from checkpoint import hf_cases as cases
from conftest import ENVIRONMENT
from small import SPEAKER, tokenizer

from deepseek_jax.checkpoint.hf_save import save_hf
from deepseek_jax.checkpoint.safetensors import TensorFiles, read_header
from deepseek_jax.cli.main import main

TESTS = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def released(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("released") / "m"
    save_hf(cases.model(SPEAKER), folder, dtype="float32")
    tokenizer().save(folder)
    return folder


@pytest.fixture(scope="module")
def converted(released, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("converted") / "run"
    assert main(["convert", str(released), str(folder), "--dtype", "float32"]) == 0
    return folder


def bytes_of(folder: Path) -> dict[str, bytes]:
    with TensorFiles(folder) as files:
        return {name: files.array(name).tobytes() for name in files.tensors}


def test_there_and_back_is_the_same_to_the_byte(released, converted, tmp_path):
    assert main(["convert", str(converted), str(tmp_path / "m"), "--dtype", "float32"]) == 0
    assert bytes_of(tmp_path / "m") == bytes_of(released)
    for name in ("tokenizer.json", "config.json"):
        assert (tmp_path / "m" / name).read_bytes() == (released / name).read_bytes()
    assert [file.name for file in tmp_path.iterdir()] == ["m"]


def test_generate_and_inspect_take_it(released, converted, capsys):
    said = []
    for folder in (released, converted):
        assert main(["generate", str(folder), "--prompt", "def add", "--max-tokens", "4"]) == 0
        said.append(capsys.readouterr().out)
    assert said[0] == said[1]
    assert main(["inspect", str(converted)]) == 0
    assert "1 dense, 1 MoE, 1 MTP" in capsys.readouterr().out


def test_what_cannot_be(released, converted, tmp_path, capsys):
    assert main(["convert", str(released), str(tmp_path / "x"), "--dtype", "float8_e4m3"]) == 1
    assert "our own checkpoints hold bfloat16 or float32" in capsys.readouterr().err
    assert main(["convert", str(released), str(converted)]) == 1
    assert "exists already" in capsys.readouterr().err
    assert main(["convert", str(tmp_path), str(tmp_path / "x")]) == 1
    assert "holds no checkpoints/" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


KILLED = """
import os, signal, sys
from deepseek_jax.checkpoint import hf_load, hf_save
from deepseek_jax.cli.main import main
owner, name, last = (hf_save._Writer, "_make", 30) if sys.argv[1] == "save" else (hf_load._Leaves, "fill", 30)
method, calls = getattr(owner, name), []
def die(*args):
    calls.append(1)
    if len(calls) == last:
        os.kill(os.getpid(), signal.SIGKILL)
    return method(*args)
setattr(owner, name, die)
main(sys.argv[2:])
"""


def killed(*arguments: str) -> None:
    environment = os.environ | ENVIRONMENT | {"PYTHONPATH": str(TESTS)}
    done = subprocess.run([sys.executable, "-c", KILLED, *arguments], env=environment, capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()


def test_a_killed_conversion_to_safetensors_goes_on(released, converted, tmp_path):
    arguments = ["convert", str(converted), str(tmp_path / "m"), "--dtype", "float32", "--shard-gigabytes", "1e-5"]
    killed("save", *arguments)
    partial = tmp_path / "m.partial"
    assert [file.name for file in tmp_path.iterdir()] == [partial.name]
    finished = {}
    for file in partial.glob("*.safetensors"):
        try:
            read_header(file)
            finished[file.name] = file.stat().st_mtime_ns
        except ValueError:
            pass
    assert finished
    assert main(arguments) == 0
    assert [file.name for file in tmp_path.iterdir()] == ["m"]
    assert {name: (tmp_path / "m" / name).stat().st_mtime_ns for name in finished} == finished
    assert bytes_of(tmp_path / "m") == bytes_of(released)


def test_a_killed_conversion_to_a_checkpoint_begins_anew(released, tmp_path):
    arguments = ["convert", str(released), str(tmp_path / "run")]
    killed("load", *arguments)
    assert [file.name for file in tmp_path.iterdir()] == ["run.partial"]
    assert main(["inspect", str(tmp_path / "run")]) == 1
    assert main(arguments) == 0
    assert [file.name for file in tmp_path.iterdir()] == ["run"]
