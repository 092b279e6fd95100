"""``convert`` both ways, killed in between, and the commands that read what it wrote."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from checkpoint import hf_cases as cases
from conftest import ENVIRONMENT
from small import SPEAKER, tokenizer

from deepseek_jax.checkpoint import hf_convert
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
import itertools, os, signal, sys
from deepseek_jax.checkpoint import hf_convert, hf_save
from deepseek_jax.cli.main import main
hf_convert.PIECE_BYTES = 2000
owner, name = (hf_save._Writer, "_make") if sys.argv[1] == "save" else (hf_convert, "_write")
function, calls = getattr(owner, name), itertools.count(1)
def die(*args):  # two threads come here: each call has a number of its own
    number, done = next(calls), function(*args)
    if number == 30:
        os.kill(os.getpid(), signal.SIGKILL)
    return done
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


def chunks(folder: Path) -> dict[str, tuple[bytes, int, int]]:
    """The pieces that are finished: bytes, file, time."""
    files = [file for file in folder.glob("checkpoints/0/state/*/*") if ".__lock" not in file.name]
    facts = {file: file.stat() for file in files}
    return {
        str(file.relative_to(folder)): (file.read_bytes(), facts[file].st_ino, facts[file].st_mtime_ns)
        for file in files
    }


def test_a_killed_conversion_to_a_checkpoint_goes_on(released, tmp_path, monkeypatch, caplog, capsys):
    monkeypatch.setattr(hf_convert, "PIECE_BYTES", 2000)
    once, again = (["convert", str(released), str(tmp_path / name)] for name in ("once", "run"))
    assert main(once) == 0
    assert not caplog.records and not capsys.readouterr().err
    killed("load", *again)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["once", "run.partial"]
    assert main(["inspect", str(tmp_path / "run")]) == 1
    finished = chunks(tmp_path / "run.partial")
    assert len(finished) >= 29
    assert main(again) == 0
    assert sorted(file.name for file in tmp_path.iterdir()) == ["once", "run"]
    whole, wanted = chunks(tmp_path / "run"), chunks(tmp_path / "once")
    assert {name: whole[name] for name in finished} == finished
    assert {name: facts[0] for name, facts in whole.items()} == {name: facts[0] for name, facts in wanted.items()}
    assert {file.name for file in (tmp_path / "run").iterdir()} == {file.name for file in (tmp_path / "once").iterdir()}


@pytest.mark.parametrize("change", ["time", "dtype", "ignored", "nothing"])
def test_another_source_or_dtype_begins_anew(change, released, tmp_path, monkeypatch):
    monkeypatch.setattr(hf_convert, "PIECE_BYTES", 2000)
    source = shutil.copytree(released, tmp_path / "m")
    arguments = ["convert", str(source), str(tmp_path / "run")]

    def fail(*args):
        raise InterruptedError("stopped")

    with monkeypatch.context() as patch:
        patch.setattr(hf_convert, "_write_rest", fail)
        assert main(arguments) == 1
    finished = chunks(tmp_path / "run.partial")
    assert finished
    if change == "time":
        os.utime(source / "model.safetensors", ns=(1, 1))
    arguments += {"dtype": ["--dtype", "float32"], "ignored": ["--ignore-config", "torch_dtype"]}.get(change, [])
    assert main(arguments) == 0
    again = chunks(tmp_path / "run")
    assert (again.keys() == finished.keys()) == (change != "dtype")  # wider numbers fill more pieces
    assert all((again[name][1:] == finished[name][1:]) == (change == "nothing") for name in finished)


def test_nothing_is_written_where_the_source_is_wrong(released, tmp_path, capsys):
    source = shutil.copytree(released, tmp_path / "m")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"intermediate_size": 24}))
    assert main(["convert", str(source), str(tmp_path / "run")]) == 1
    assert "the files do not hold this model" in capsys.readouterr().err
    assert [file.name for file in tmp_path.iterdir()] == ["m"]


FULL_DISK = """
import resource, signal, sys
from deepseek_jax.cli.main import main
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # a write over the limit fails with EFBIG, as on a full disk
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), resource.RLIM_INFINITY))
sys.exit(main(sys.argv[2:]))
"""


@pytest.mark.parametrize("limit", [4000, 64])
def test_a_full_disk_is_one_sentence_and_nothing_is_left(limit, released, tmp_path):
    arguments = [str(limit), "convert", str(released), str(tmp_path / "run"), "--dtype", "float32"]
    environment = os.environ | ENVIRONMENT | {"JAX_ENABLE_COMPILATION_CACHE": "0"}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", FULL_DISK, *arguments],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    first, *others = done.stderr.splitlines()
    assert re.fullmatch(rf".*: the model's [0-9,]+ bytes do not fit in {tmp_path}", first), done.stderr
    assert others == ["(DEEPSEEK_JAX_TRACEBACK=1 shows where)"]
    assert not list(tmp_path.iterdir())
