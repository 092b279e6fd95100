"""A model travels whole: from a released folder or a run, with its tokenizer, in the dtypes that are asked for."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoint import hf_cases as cases
from model.tiny import whole
from small import SPEAKER, tokenizer

from deepseek_jax import ComputeConfig, Engine, load, load_hf, save_hf
from deepseek_jax.checkpoint import CheckpointStore
from deepseek_jax.data.chat import encode_prompt
from deepseek_jax.parallel.mesh import MeshConfig, make_mesh

TEMPLATE = "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}{{ eos_token }}{% endfor %}[assistant]"


def run_of(folder, model, *, ema=None, meta=None):
    """A run's folder, as a stage leaves it."""
    state = {"params": model.params} | ({} if ema is None else {"ema": ema})
    state |= {} if model.router_bias is None else {"router_bias": model.router_bias}
    with CheckpointStore(folder / "checkpoints", keep=1) as store:
        store.save(3, state, loader={}, meta={"model": model.config.to_dict()} | (meta or {}), block=True)
    model.text.save(folder)
    return folder


def same(found, wanted):
    jax.tree.map(np.testing.assert_array_equal, found.params, wanted.params)
    assert found.config == wanted.config


def test_float32_masters_with_bfloat16_compute_of_a_released_model(tmp_path):
    tensors = cases.in_fp8(cases.released(cases.FP8))
    folder = cases.write(tmp_path, cases.FP8, tensors)
    compute = ComputeConfig(dtype="bfloat16", param_dtype="float32")
    found = load(folder, compute=compute)
    assert {leaf.dtype for leaf in jax.tree.leaves(found.params)} == {np.dtype(np.float32)}
    tokens = jnp.arange(6, dtype=jnp.int32)[None]
    out = found(tokens)
    assert out.hidden.dtype == jnp.bfloat16 and out.logits is not None and out.logits.dtype == jnp.float32
    assert found.tokenizer is None
    with pytest.raises(ValueError, match="came without tokenizer.json"):
        _ = found.text
    cases.assert_same(found.network(), load_hf(folder, dtype="float32"))


def test_a_run_and_what_is_saved_of_it_are_the_same_model(tmp_path):
    folder = cases.with_tokenizer(tmp_path / "m", TEMPLATE)
    released = load(folder)
    assert released.text.stop_ids == (1, 5)
    run = load(run_of(tmp_path / "run", released))
    same(run, released)
    assert cases.files_about_text(tmp_path / "run") == cases.files_about_text(folder)
    save_hf(run, tmp_path / "again", dtype="float32")
    again = load(tmp_path / "again")
    same(again, released)
    assert cases.files_about_text(tmp_path / "again") == cases.files_about_text(folder)
    asked = [{"role": "user", "content": "12"}]
    ids = released.text.encode("<｜begin▁of▁sentence｜>[user]12<｜end▁of▁sentence｜>[assistant]", allow_special=True)
    assert [encode_prompt(m.text, asked) for m in (released, run, again)] == [ids] * 3
    assert Engine(run).tokenizer is run.tokenizer


def test_a_run_on_a_mesh_in_another_dtype(tmp_path):
    model = whole(SPEAKER, *cases.weights(SPEAKER), tokenizer())
    mesh = make_mesh(MeshConfig(data=4, fsdp=2))
    found = load(run_of(tmp_path, model), compute=ComputeConfig(param_dtype="bfloat16"), mesh=mesh)
    assert found.mesh is mesh and found.params["embed"].sharding.shard_shape((300, 16)) == (300, 8)
    same(found, dataclasses.replace(model, params=jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), model.params)))
    assert found.router_bias is not None and found.router_bias.dtype == jnp.float32


def test_a_run_that_recorded_how_it_was_computed_is_read(tmp_path):
    model = whole(SPEAKER, *cases.weights(SPEAKER), tokenizer())
    older = {"dtype": "bfloat16", "param_dtype": "float32", "remat": "full", "scan_unroll": 3}
    run = run_of(tmp_path, model, meta={"model": SPEAKER.to_dict() | older})
    for name in ("tokenizer_config.json", "generation_config.json"):  # nor did it keep these
        (run / name).unlink()
    found = load(run)
    same(found, model)
    assert (found.text.bos_id, found.text.eos_id, found.text.pad_id, found.text.stop_ids) == (0, 1, 2, (1,))
    assert found.text.files == model.text.files


def test_the_running_mean(tmp_path):
    model = whole(SPEAKER, *cases.weights(SPEAKER), tokenizer())
    mean = jax.tree.map(lambda leaf: leaf * 2, model.params)
    kept = run_of(tmp_path / "kept", model, ema=mean, meta={"recipe": {"step": {"ema_decay": 0.9}}})
    same(load(kept, ema=True), dataclasses.replace(model, params=mean))
    same(load(kept, step=3), model)
    for name, meta in (("none", {"recipe": {"step": {"ema_decay": 0.0}}}), ("converted", {"stage": "convert"})):
        with pytest.raises(ValueError, match=f"{name} keeps no running mean of its parameters"):
            load(run_of(tmp_path / name, model, meta=meta), ema=True)


def test_what_cannot_be_loaded_is_named(tmp_path):
    folder = cases.with_tokenizer(tmp_path / "m", TEMPLATE)
    run = run_of(tmp_path / "run", whole(SPEAKER, *cases.weights(SPEAKER), tokenizer()))
    for step, ema in ((3, False), (None, True)):
        with pytest.raises(ValueError, match="is a released model: it has no other steps and no running mean"):
            load(folder, step=step, ema=ema)
    with pytest.raises(ValueError, match="ignore_config=.*: it is for a released model"):
        load(run, ignore_config=("torch_dtype",))
    with pytest.raises(ValueError, match="param_dtype='float8_e4m3': .* holds float32"):
        load(run, compute=ComputeConfig(param_dtype="float8_e4m3"))
    with pytest.raises(FileNotFoundError, match="no checkpoint of step 4"):
        load(run, step=4)
    with pytest.raises(FileNotFoundError, match="holds models in folders of their own: give one of them, m"):
        load(tmp_path)
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match="tokenizer.json:1: not JSON"):
        load(folder)
