"""Converted piece by piece is the same as loaded and saved; what a stopped call finished is not done again."""

import json

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from checkpoint import hf_cases as cases

from deepseek_jax import load_hf
from deepseek_jax.checkpoint import CheckpointStore, hf_convert
from deepseek_jax.checkpoint.hf_load import Released
from deepseek_jax.checkpoint.reading import named_leaves
from deepseek_jax.model import transformer

CONFIGS = cases.FAMILIES | {"fp8": cases.FP8}
META = {"stage": "convert"}


def folder_of(tmp_path, name):
    tensors = cases.released(CONFIGS[name])
    return cases.write(tmp_path / "m", CONFIGS[name], cases.in_fp8(tensors) if name == "fp8" else tensors)


def convert(source, directory, dtype="float32"):
    """Returns the bytes reported: in all, found finished, read."""
    totals, sizes = [], []
    with Released(source, dtype=dtype) as released:
        hf_convert.write_checkpoint(
            released, directory / "0", meta=META, on_start=totals.append, on_tensor=sizes.append
        )
    return totals[0], sizes[0], sum(sizes[1:])


def contents(folder):
    """Every file of the state with its bytes, and when and as which file it was written."""
    files = [file for file in (folder / "state").rglob("*") if file.is_file()]
    return {
        str(file.relative_to(folder)): (file.read_bytes(), file.stat().st_ino, file.stat().st_mtime_ns)
        for file in files
    }


@pytest.mark.parametrize(
    ("name", "dtype", "piece_bytes"),
    [
        ("v3", "bfloat16", 2**28),  # whole leaves
        ("v3", "float32", 2000),  # leaves cut into layers and experts
        ("v2_lite", "bfloat16", 2000),
        ("qwen2", "float32", 2000),
        ("fp8", "float32", 2000),
        ("fp8", "bfloat16", 2**28),
    ],
)
def test_it_is_the_checkpoint_of_the_loaded_model(name, dtype, piece_bytes, tmp_path, monkeypatch):
    monkeypatch.setattr(hf_convert, "PIECE_BYTES", piece_bytes)
    source = folder_of(tmp_path, name)
    total, found, read = convert(source, tmp_path / "pieces", dtype)
    assert (found, read) == (0, total)
    params, bias = transformer.split(load_hf(source, dtype=dtype))
    state = {"params": params} | ({} if bias is None else {"router_bias": bias})
    with CheckpointStore(tmp_path / "whole", keep=1) as store:
        store.save(0, state, loader={}, meta=META, block=True)
    abstract = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), state)
    (wanted, *beside), (got, *besides) = (
        CheckpointStore(tmp_path / place, keep=1).restore(abstract) for place in ("whole", "pieces")
    )
    assert besides == beside
    same(got, wanted)
    same(got, state)
    lists = [json.loads((tmp_path / place / "0" / "inventory.json").read_text()) for place in ("whole", "pieces")]
    assert lists[0]["arrays"] == lists[1]["arrays"]
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as plain:
        same(plain.restore(tmp_path / "pieces" / "0" / "state"), state)
    chunks = [file for file in (tmp_path / "pieces" / "0" / "state").glob("params.*/*") if file.name[0] != "."]
    assert (len(chunks) > len(jax.tree.leaves(params))) == (piece_bytes == 2000)


def same(found, wanted):
    a, b = named_leaves(found), named_leaves(wanted)
    assert a.keys() == b.keys()
    for path in a:
        assert (a[path].dtype, a[path].shape) == (b[path].dtype, b[path].shape), path
        assert np.asarray(a[path]).tobytes() == np.asarray(b[path]).tobytes(), path


@pytest.mark.parametrize(("step", "calls"), [("_write", 40), ("_write_rest", 1), ("write_inventory", 1)])
def test_what_is_finished_is_not_done_again(step, calls, tmp_path, monkeypatch):
    monkeypatch.setattr(hf_convert, "PIECE_BYTES", 2000)
    source = folder_of(tmp_path, "v3")
    total, _, _ = convert(source, tmp_path / "once")

    before, made = getattr(hf_convert, step), []

    def stop(*args):
        made.append(args)
        if len(made) == calls:
            raise InterruptedError
        return before(*args)

    with monkeypatch.context() as patch:
        patch.setattr(hf_convert, step, stop)
        with pytest.raises(InterruptedError):
            convert(source, tmp_path / "twice")
    folder = tmp_path / "twice" / "0"
    (folder / "state" / "params.embed" / "0.0.__lock").write_text("what a killed write leaves")
    left = {name: facts for name, facts in contents(folder).items() if "/params." in name and "__lock" not in name}
    everything, found, read = convert(source, tmp_path / "twice")
    assert everything == total and found + read == total
    assert (0 < found < total) if step == "_write" else read == 0
    after = contents(folder)
    assert {name: after[name] for name in left} == left
    once = contents(tmp_path / "once" / "0")
    arrays = lambda files: {name: facts[0] for name, facts in files.items() if "/params." in name}  # noqa: E731
    assert arrays(after) == arrays(once) and after.keys() == once.keys()
    assert [entry.name for entry in (tmp_path / "twice").iterdir()] == ["0"]


def test_pieces_keep_to_their_size_and_fill_each_leaf_once(monkeypatch, tmp_path):
    monkeypatch.setattr(hf_convert, "PIECE_BYTES", 2000)
    with Released(folder_of(tmp_path, "v3"), dtype="float32") as released:
        plans = [hf_convert._plan(path, leaf, released.tensors) for path, leaf in hf_convert.state_of(released).items()]
    for plan in plans:
        assert all(size % part == 0 for size, part in zip(plan.leaf.shape, plan.chunk, strict=True))
        assert len({piece.at for piece in plan.pieces}) == np.prod(plan.leaf.shape) // np.prod(plan.chunk)
    names = [tensor.name for plan in plans for piece in plan.pieces for tensor in piece.tensors]
    assert sorted(names) == sorted(tensor.name for tensor in released.tensors)
    cut = {".".join(plan.path): plan.chunk for plan in plans}
    assert cut["moe_layers.mlp.wi"][:2] == (1, 1) and cut["moe_layers.attention_norm.gain"][0] > 1
