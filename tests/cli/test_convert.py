"""``convert``: a run, or a released model in another dtype, to a released folder; killed in between, and refused."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest
from checkpoint import hf_cases as cases
from checkpoint.test_model import TEMPLATE, run_of
from conftest import ENVIRONMENT
from model.tiny import weights, whole
from small import SPEAKER, tokenizer

from deepseek_jax.checkpoint.model import load
from deepseek_jax.checkpoint.safetensors import TensorFiles, read_header
from deepseek_jax.cli import convert
from deepseek_jax.cli.main import main

TESTS = Path(__file__).parents[1]
SOURCES = os.pathsep.join(map(str, (TESTS, TESTS.parent, TESTS.parent / "kernels")))


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run, with the running mean of its parameters."""
    model = whole(SPEAKER, *weights(SPEAKER), tokenizer())
    meta = {"recipe": {"step": {"ema_decay": 0.9}}}
    return run_of(tmp_path_factory.mktemp("run"), model, ema=weights(SPEAKER, seed=1)[0], meta=meta)


def values(folder: Path) -> dict[str, np.ndarray]:
    with TensorFiles(folder) as files:
        return {name: np.array(files.array(name)) for name in files.tensors}


def same(found: dict[str, np.ndarray], wanted: dict[str, np.ndarray]) -> None:
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert (found[name].dtype, found[name].tobytes()) == (value.dtype, value.tobytes()), name


def rounded(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """In bfloat16, but for the routing bias."""
    return {n: v if "correction_bias" in n else v.astype(ml_dtypes.bfloat16) for n, v in tensors.items()}


def test_a_run_becomes_a_released_model(run, tmp_path, capsys):
    assert main(["convert", str(run), str(tmp_path / "m"), "--dtype", "float32"]) == 0
    same(values(tmp_path / "m"), cases.released(SPEAKER))
    assert cases.files_about_text(tmp_path / "m") == cases.files_about_text(run)
    assert json.loads((tmp_path / "m" / "config.json").read_text())["eos_token_id"] == 1
    assert main(["convert", str(run), str(tmp_path / "mean"), "--ema", "--step", "3"]) == 0
    mean = cases.arrays(cases.model(SPEAKER, seed=1))[("params", "norm", "gain")]
    np.testing.assert_array_equal(values(tmp_path / "mean")["model.norm.weight"], mean.astype(ml_dtypes.bfloat16))
    assert sorted(file.name for file in tmp_path.iterdir()) == ["m", "mean"]
    said = []
    for folder in (run, tmp_path / "m"):
        capsys.readouterr()
        assert main(["generate", str(folder), "--prompt", "def add", "--max-tokens", "4"]) == 0
        said.append(capsys.readouterr().out)
    assert said[0] == said[1]
    assert main(["inspect", str(run)]) == 0
    assert "1 dense, 1 MoE, 1 MTP" in capsys.readouterr().out


def test_a_released_model_takes_another_dtype(tmp_path):
    """FP8 to bfloat16 and float32, FP8 to FP8 to the byte, float32 to FP8 and bfloat16."""
    stored = cases.in_fp8(cases.released(cases.FP8))
    fp8 = cases.write(tmp_path / "fp8", cases.FP8, stored)
    plain = {name: value.astype(np.float32) for name, value in cases.plain(stored).items()}
    for dtype, wanted in (("float8_e4m3", stored), ("float32", plain), ("bfloat16", rounded(plain))):
        assert main(["convert", str(fp8), str(tmp_path / dtype), "--dtype", dtype]) == 0
        same(values(tmp_path / dtype), wanted)
        quantised = "quantization_config" in json.loads((tmp_path / dtype / "config.json").read_text())
        assert quantised == (dtype == "float8_e4m3")
    assert main(["convert", str(tmp_path / "float32"), str(tmp_path / "again")]) == 0
    same(values(tmp_path / "again"), rounded(plain))
    assert main(["convert", str(tmp_path / "float32"), str(tmp_path / "back"), "--dtype", "float8_e4m3"]) == 0
    for name, value in cases.plain(values(tmp_path / "back")).items():
        error = np.abs(value.astype(np.float32) - plain[name])
        assert np.all(error <= np.abs(plain[name]) * 2**-4 + 1e-3), name


def test_a_models_own_template_goes_through_a_run(tmp_path, capsys):
    """A released Llama -> a stage's run -> chat, and a released folder again: all with its template and stop ids."""
    folder = cases.with_tokenizer(tmp_path / "llama", TEMPLATE)
    run = run_of(tmp_path / "run", load(folder))
    said = []
    for path in (folder, run):
        assert main(["generate", str(path), "--chat", "--prompt", "12", "--max-tokens", "4"]) == 0
        said.append(capsys.readouterr().out)
    assert said[0] == said[1]
    assert main(["convert", str(run), str(tmp_path / "out"), "--dtype", "float32"]) == 0
    assert cases.files_about_text(tmp_path / "out") == cases.files_about_text(folder)
    same(values(tmp_path / "out"), values(folder))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["model_type"], config["eos_token_id"]) == ("llama", [1, 5])


def test_what_cannot_be(run, tmp_path, capsys, monkeypatch):
    folder = cases.with_tokenizer(tmp_path / "m", TEMPLATE)
    assert main(["convert", str(folder), str(run)]) == 1
    assert "exists already" in capsys.readouterr().err
    with monkeypatch.context() as patch:  # before anything is read
        patch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=10))
        patch.setattr(convert, "load", None)
        assert main(["convert", str(run), str(tmp_path / "x")]) == 1
        assert "bytes do not fit in" in capsys.readouterr().err
    assert main(["convert", str(folder), str(tmp_path / "x"), "--ema"]) == 1
    assert "is a released model" in capsys.readouterr().err
    assert main(["convert", str(run), str(tmp_path / "x"), "--ignore-config", "torch_dtype"]) == 1
    assert "for a released model's config.json" in capsys.readouterr().err
    assert main(["convert", str(folder), str(tmp_path / "x"), "--group", "32"]) == 1
    assert "int8 and int4 alone have groups" in capsys.readouterr().err
    assert main(["convert", str(tmp_path), str(tmp_path / "x")]) == 1
    assert "holds models in folders of their own: give one of them, m" in capsys.readouterr().err
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 24}))
    assert main(["convert", str(folder), str(tmp_path / "x")]) == 1
    assert "the files do not hold this model" in capsys.readouterr().err
    assert [file.name for file in tmp_path.iterdir()] == ["m"]


KILLED = """
import itertools, os, signal, sys
from deepseek_jax.checkpoint.hf_save import _Writer
from deepseek_jax.cli.main import main
make, calls = _Writer._make, itertools.count(1)
def die(*args):  # two threads come here: each call has a number of its own
    number, done = next(calls), make(*args)
    if number == 30:
        os.kill(os.getpid(), signal.SIGKILL)
    return done
_Writer._make = die
main(sys.argv[1:])
"""


@pytest.mark.parametrize("change", ["nothing", "time", "dtype"])
def test_a_killed_conversion_goes_on(change, run, tmp_path):
    source = shutil.copytree(run, tmp_path / "run")
    (tmp_path / "out").mkdir()
    arguments = ["convert", str(source), str(tmp_path / "out" / "m"), "--shard-gigabytes", "1e-5"]
    environment = os.environ | ENVIRONMENT | {"PYTHONPATH": SOURCES}
    done = subprocess.run([sys.executable, "-c", KILLED, *arguments], env=environment, capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    partial = tmp_path / "out" / "m.partial"
    assert [*(tmp_path / "out").iterdir()] == [partial]
    finished = {}
    for file in partial.glob("*.safetensors"):
        try:
            read_header(file)
            finished[file.name] = file.stat().st_mtime_ns
        except ValueError:
            pass
    assert finished
    if change == "time":
        file = next(file for file in sorted(source.glob("checkpoints/3/**/*")) if file.is_file())
        os.utime(file, ns=(1, 1))
    assert main([*arguments, "--dtype", "float32" if change == "dtype" else "bfloat16"]) == 0
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["m"]
    times = {file.name: file.stat().st_mtime_ns for file in (tmp_path / "out" / "m").glob("*.safetensors")}
    kept = [name for name, written in finished.items() if times.get(name) == written]
    assert (len(kept) == len(finished)) == (change == "nothing")
    wanted = cases.released(SPEAKER)
    same(values(tmp_path / "out" / "m"), wanted if change == "dtype" else rounded(wanted))


FULL_DISK = """
import resource, signal, sys
from deepseek_jax.cli.main import main
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # a write over the limit fails with EFBIG, as on a full disk
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), resource.RLIM_INFINITY))
sys.exit(main(sys.argv[2:]))
"""


@pytest.mark.parametrize("limit", [4000, 64])
def test_a_full_disk_is_one_sentence_and_nothing_is_left(limit, run, tmp_path):
    arguments = [str(limit), "convert", str(run), str(tmp_path / "m"), "--dtype", "float32"]
    environment = os.environ | ENVIRONMENT | {"JAX_ENABLE_COMPILATION_CACHE": "0", "PYTHONPATH": SOURCES}
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
