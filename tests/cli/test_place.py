"""``place``: loads of a run's metrics, the file and the table, and a model in the placed order."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
from checkpoint.test_model import run_of
from model.tiny import weights, whole
from small import SPEAKER, tokenizer

from deepseek_jax.checkpoint.model import load
from deepseek_jax.cli.main import main
from deepseek_jax.model.reorder import reorder_experts
from deepseek_jax.parallel.eplb import place

LOADS = np.random.default_rng(0).gamma(0.5, size=(4, SPEAKER.num_routers, 8))


def run_folder(folder, loads=LOADS, model=SPEAKER):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"stage": "pretrain", "model": model.to_dict()}))
    lines = [{"step": step, "load": load.tolist()} for step, load in enumerate(loads, start=1)]
    lines.insert(1, {"step": 1, "eval/loss": 1.0})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_the_last_loads_are_placed(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    run = run_folder(tmp_path / "run")
    options = ["--devices", "4", "--nodes", "2", "--redundant", "4", "--steps", "2"]
    assert main(["place", str(run), *options]) == 0
    mean = LOADS[-2:].mean(axis=0)
    expected = place(mean, 12, devices=4, nodes=2, groups=SPEAKER.n_group)
    written = json.loads((run / "placement.json").read_text())
    # SGLang's form: a row a layer of the main model, dense ones in order.
    assert written == {"physical_to_logical_map": [[*range(8), *range(4)], expected[0].tolist()]}
    out = capsys.readouterr().out
    share = mean[0] / np.bincount(expected[0])
    busiest = share[expected[0]].reshape(4, 3).sum(axis=1).max() / (mean[0].sum() / 4)
    in_order = mean[0].reshape(4, 2).sum(axis=1).max() / (mean[0].sum() / 4)
    (row,) = [line for line in out.splitlines() if line.startswith("│         0 ")]
    assert f"{busiest:.3f}" in row and f"{in_order:.3f}" in row and f"{mean[0].max() / mean[0].mean():.3f}" in row
    assert str(run / "placement.json") in out.replace("\n", "")


def test_a_model_in_the_placed_order_is_the_same(tmp_path, capsys):
    """Groups stay whole, as a node has one; V3's router chooses them first."""
    wide = dataclasses.replace(SPEAKER, n_routed_experts=16)
    run = run_of(tmp_path / "run", whole(wide, *weights(wide), tokenizer()))
    loads = np.random.default_rng(1).gamma(0.5, size=(2, wide.num_routers, 16))
    run_folder(run, loads, wide)
    placed = tmp_path / "placed"
    options = ["--devices", "8", "--nodes", "4", "--reorder", str(placed)]
    assert main(["place", str(run), *options, "--output", str(tmp_path / "p.json")]) == 0
    order = json.loads((tmp_path / "p.json").read_text())["physical_to_logical_map"][1]
    assert sorted(order) == [*range(16)] != order
    was, now = (load(folder) for folder in (run, placed))
    expected = reorder_experts(
        wide, was.params, was.router_bias, place(loads.mean(axis=0), 16, devices=8, nodes=4, groups=4)
    )
    half = lambda tree: jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), tree)  # noqa: E731
    jax.tree.map(np.testing.assert_array_equal, half(now.params), half(expected[0]))
    np.testing.assert_array_equal(now.router_bias, expected[1])
    assert main(["place", str(run), "--devices", "8", "--reorder", str(tmp_path / "torn")]) == 1
    assert "tears apart some of the n_group=4 groups" in capsys.readouterr().err and not (tmp_path / "torn").exists()


def test_what_cannot_be_is_said(tmp_path, capsys):
    run = run_folder(tmp_path / "run")

    def refused(*arguments):
        assert main(["place", *arguments]) == 1
        return capsys.readouterr().err

    assert "4 groups cannot be dealt to 3 nodes" in refused(str(run), "--devices", "3", "--nodes", "3")
    assert "--steps 0: must be at least 1" in refused(str(run), "--devices", "4", "--steps", "0")
    assert "--redundant is 8" in refused(str(run), "--devices", "4", "--redundant", "8", "--reorder", "x")
    assert "holds no load of experts" in refused(str(run_folder(tmp_path / "dense", LOADS[:0])), "--devices", "4")
    assert "is no run of a stage" in refused(str(tmp_path), "--devices", "4")
    assert main(["place", str(run), "--devices", "4", "--reorder", str(run)]) == 1
    assert "exists already" in capsys.readouterr().err and not (run / "placement.json").exists()
