"""What is written is what is released; a process that dies, a full disk or a taken name costs nothing."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from checkpoint import hf_cases as cases
from conftest import ENVIRONMENT
from model.tiny import QWEN, config, weights, whole
from small import tokenizer

from deepseek_jax import load, load_hf, save_hf
from deepseek_jax.checkpoint import hf_save
from deepseek_jax.checkpoint.hf_save import write_model
from deepseek_jax.checkpoint.publishing import filling, publish
from deepseek_jax.checkpoint.safetensors import TensorFiles
from deepseek_jax.data.model_folder import TextFiles
from deepseek_jax.data.special_tokens import EOS

SCORING = config(QWEN, num_labels=1, tie_word_embeddings=False)
TINY = cases.FAMILIES["v3"]


def tensors_of(folder: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    with TensorFiles(folder) as files:
        arrays = {name: files.array(name) for name in files.tensors}
    return {name: (array.dtype.name, array.shape, array.tobytes()) for name, array in arrays.items()}


def described(tensors: dict[str, np.ndarray]) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    return {name: (array.dtype.name, array.shape, array.tobytes()) for name, array in tensors.items()}


@pytest.mark.parametrize("family", cases.FAMILIES)
def test_every_family_is_written_as_released(family, tmp_path):
    config = cases.FAMILIES[family]
    save_hf(cases.model(config), tmp_path / "m", dtype="float32")
    assert tensors_of(tmp_path / "m") == described(cases.released(config))
    assert sorted(file.name for file in tmp_path.iterdir()) == ["m"]
    content = json.loads((tmp_path / "m" / "config.json").read_text())
    assert content["torch_dtype"] == "float32" and "quantization_config" not in content


def test_bfloat16_in_shards(tmp_path):
    save_hf(cases.model(TINY), tmp_path / "m", max_shard_bytes=4000)
    files = sorted(file.name for file in (tmp_path / "m").glob("*.safetensors"))
    assert len(files) > 3 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    expected = {
        name: value if "correction_bias" in name else value.astype(ml_dtypes.bfloat16)
        for name, value in cases.released(TINY).items()
    }
    assert tensors_of(tmp_path / "m") == described(expected)
    save_hf(load_hf(tmp_path / "m"), tmp_path / "again", max_shard_bytes=4000)
    for name in [*files, "model.safetensors.index.json", "config.json"]:
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "m" / name).read_bytes(), name


def test_kept_fp8_goes_through_byte_for_byte(tmp_path):
    tensors = cases.in_fp8(cases.released(cases.FP8))
    folder = cases.write(tmp_path / "m", cases.FP8, tensors)
    save_hf(load_hf(folder, dtype="float8_e4m3"), tmp_path / "kept", dtype="float8_e4m3")
    assert tensors_of(tmp_path / "kept") == described(tensors)
    content = json.loads((tmp_path / "kept" / "config.json").read_text())
    assert content["torch_dtype"] == "bfloat16"
    assert content["quantization_config"] == {
        "activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128],
    }  # fmt: skip
    save_hf(load_hf(folder, dtype="float8_e4m3"), tmp_path / "wide", dtype="float32")
    wide = cases.plain(tensors)
    assert tensors_of(tmp_path / "wide") == described({name: value.astype(np.float32) for name, value in wide.items()})


def test_fp8_out_of_wide_weights(tmp_path):
    save_hf(cases.model(cases.FP8), tmp_path / "m", dtype="float8_e4m3")
    wanted = cases.released(cases.FP8)
    with TensorFiles(tmp_path / "m") as files:
        assert {name for name in files.tensors if not name.endswith("_scale_inv")} == wanted.keys()
        back = cases.plain({name: files.array(name) for name in files.tensors})
    assert set(cases.in_fp8(wanted)) == set(tensors_of(tmp_path / "m"))
    for name, value in wanted.items():
        error = np.abs(back[name].astype(np.float32) - value)
        assert np.all(error <= np.abs(value) * 2**-4 + 1e-3), name


@pytest.mark.parametrize("read", [load, load_hf])
def test_the_files_about_text_come_along(read, tmp_path):
    folder = cases.with_tokenizer(tmp_path / "m", "{{ messages[0].content }}")
    (folder / "modeling_deepseek.py").write_text("no code")
    loaded = read(folder)
    save_hf(loaded, tmp_path / "own")
    written = json.loads((tmp_path / "own" / "config.json").read_text())
    assert (written["bos_token_id"], written["eos_token_id"]) == (0, [1, 5])
    texts = cases.files_about_text(folder)
    assert len(texts) == 4 and cases.files_about_text(tmp_path / "own") == texts
    assert not (tmp_path / "own" / "modeling_deepseek.py").exists()
    other = tmp_path / "other"
    other.mkdir()
    (other / "tokenizer.model").write_bytes(b"\xff")  # a tokenizer that is not read here is copied too
    save_hf(loaded, tmp_path / "given", tokenizer_from=other)
    assert cases.files_about_text(tmp_path / "given") == {"tokenizer.model": b"\xff"}
    with pytest.raises(FileNotFoundError, match="nowhere: no such folder"):
        save_hf(loaded, tmp_path / "x", tokenizer_from=tmp_path / "nowhere")
    assert not list(tmp_path.glob("x*"))


def test_classifiers_say_what_pads(tmp_path):
    """Where the tokenizer names a token that does nothing else, and config.json none."""
    folder = cases.with_tokenizer(tmp_path / "m", "")
    text, config = TextFiles.read(folder), json.loads((folder / "tokenizer_config.json").read_text())
    assert "pad_token_id" not in text.ids and text.with_padding().ids == {**text.ids, "pad_token_id": 2}
    said = TextFiles(text.files, {**text.ids, "pad_token_id": 7})
    ends, none = (
        TextFiles({**text.files, "tokenizer_config.json": json.dumps(config | {"pad_token": token}).encode()}, text.ids)
        for token in (EOS, None)
    )
    for unchanged in (said, ends, none, TextFiles({}, {})):
        assert unchanged.with_padding() is unchanged


@pytest.mark.parametrize("pad", [2, 5])
def test_a_classifier_whose_padding_ends_sentences_is_warned_of(pad, tmp_path, caplog):
    text = TextFiles.read(cases.with_tokenizer(tmp_path / "m", ""))
    model = whole(SCORING, *weights(SCORING), tokenizer())
    write_model(model, tmp_path / "x", "float32", text=TextFiles(text.files, {**text.ids, "pad_token_id": pad}))
    assert ("pad_token_id=5 ends a sentence too" in caplog.text) == (pad == 5)


def test_a_taken_name_is_refused_and_untouched(tmp_path):
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "dear").write_text("x")
    with pytest.raises(FileExistsError, match="m exists already"):
        save_hf(cases.model(TINY), tmp_path / "m")
    assert [file.name for file in tmp_path.rglob("*")] == ["m", "dear"]


@pytest.mark.parametrize("kind", ["empty", "link", "dangling link", "mount"])
def test_what_is_there_but_empty_is_filled(kind, tmp_path, monkeypatch):
    """Where nothing can be renamed to: a mount point is busy, a link is no folder."""
    place, target = tmp_path / "m", tmp_path / "far" / "away"
    (place if kind in ("empty", "mount") else target.parent).mkdir()
    if "link" in kind:
        place.symlink_to(target)
    if kind == "link":
        target.mkdir()
    if kind == "mount":
        (place / "lost+found").mkdir()
    if kind != "dangling link":
        monkeypatch.setattr(os, "rename", None)
    save_hf(cases.model(TINY), place, dtype="float32")
    assert place.is_symlink() == ("link" in kind)
    assert tensors_of(place) == described(cases.released(TINY))
    assert {file.name for file in place.iterdir()} == {"config.json", "model.safetensors"} | {
        file.name for file in place.glob("lost*")
    }
    assert not [*tmp_path.rglob("*.partial")]
    with pytest.raises(FileExistsError, match="m exists already"):
        save_hf(cases.model(TINY), place)


def test_a_folder_in_a_file_and_a_link_to_one(tmp_path):
    (tmp_path / "f").write_text("x")
    (tmp_path / "link").symlink_to("f")
    for path, error in ((tmp_path / "f" / "m", NotADirectoryError), (tmp_path / "link", FileExistsError)):
        with pytest.raises(error):
            save_hf(cases.model(TINY), path)


def test_filling_from_within_goes_on_where_it_was_killed(tmp_path):
    """While it fills, and while files go to their places; another's files are never touched."""
    place = tmp_path / "m"
    place.mkdir()
    with pytest.raises(KeyError), filling(place, 1, "a") as partial:
        (partial / "one").write_text("1")
        raise KeyError
    os.replace(partial / "one", place / "one")  # as publishing it would have begun
    with pytest.raises(FileExistsError), filling(place, 1, "b"):
        pass
    with filling(place, 1, "a") as partial:
        assert (partial / "one").read_text() == "1"
        (partial / "config.json").write_text("{}")
        publish(partial, place)
    assert sorted(file.name for file in place.iterdir()) == ["config.json", "one"]


def test_a_full_disk(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: os.statvfs_result((0,) * 10) and type("U", (), {"free": 10})())
        with pytest.raises(OSError, match="No space left on device: the model's [0-9,]+ bytes do not fit in"):
            save_hf(cases.model(TINY), tmp_path / "m")
    assert not list(tmp_path.iterdir())

    def fail(*args, **options):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(hf_save, "write_folder", fail)
    with pytest.raises(OSError, match="do not fit"):
        save_hf(cases.model(TINY), tmp_path / "m")
    assert not list(tmp_path.iterdir())


KILLED = """
import itertools, os, signal, sys
from checkpoint import hf_cases as cases
from deepseek_jax import save_hf
from deepseek_jax.checkpoint.hf_save import _Writer
make, calls = _Writer._make, itertools.count(1)
def die(self, tensor):  # two threads come here: each call has a number of its own
    if next(calls) == 20:
        os.kill(os.getpid(), signal.SIGKILL)
    return make(self, tensor)
_Writer._make = die
save_hf(cases.model(cases.FAMILIES["v3"]), sys.argv[1], max_shard_bytes=4000)
"""


def test_a_killed_save_leaves_nothing_that_looks_whole(tmp_path):
    tests = Path(__file__).parents[1]
    sources = os.pathsep.join(map(str, (tests, tests.parent, tests.parent / "kernels")))
    environment = os.environ | ENVIRONMENT | {"PYTHONPATH": sources}
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path / "m")], env=environment, check=False)
    assert done.returncode == -signal.SIGKILL
    assert [file.name for file in tmp_path.iterdir()] == ["m.partial"]
    with pytest.raises((FileNotFoundError, ValueError)):
        TensorFiles(tmp_path / "m.partial")
    save_hf(cases.model(TINY), tmp_path / "m")
    assert [file.name for file in tmp_path.iterdir()] == ["m"]
    load_hf(tmp_path / "m")
