"""scripts/bench_mesh.py: its rows are recipes that can be, and its table says what was found."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tyro

from deepseek_jax.parallel.legal import check_layout
from deepseek_jax.parallel.mesh import AXES
from deepseek_jax.workflows.pretrain import PretrainConfig
from deepseek_jax.workflows.recipe import load_recipe

SCRIPTS = Path(__file__).parents[1] / "scripts"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("bench_mesh", SCRIPTS / "bench_mesh.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["bench_mesh"] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("cards", [2, 4, 8])
def test_rows_are_legal_on_meshes_of_their_devices(script, cards):
    rows = [row for part in script.TRAINING for row in script.rows_of(part, cards)]
    assert len({row.name for row in rows}) == len(rows)
    assert {row.devices for row in rows} == {1, cards, *(count for count in (2, 4) if count < cards)}
    default = load_recipe(script.RECIPE, PretrainConfig)
    for row in rows:
        batch = row.rows * row.devices
        recipe = tyro.cli(PretrainConfig, args=[*row.overrides, "--batch-size", str(batch)], default=default)
        sizes = {axis: getattr(recipe.mesh, axis) for axis in AXES}
        sizes["data"] = sizes["data"] or row.devices // int(np.prod([size for size in sizes.values() if size]))
        assert np.prod(list(sizes.values())) == row.devices, row.name
        layout: Any = {"rows": batch // recipe.step.microbatches, "columns": recipe.data.seq_len}
        check_layout(recipe.model, recipe.compute, sizes, **layout)


def test_the_table_compares_losses_and_choices(script):
    one = {"losses": [2.0, 1.0], "loads": [[[0.5, 0.5], [1.0, 0.0]]], "dropped": 0.0}
    other = one | {"losses": [2.0, 1.01], "loads": [[[0.25, 0.75], [1.0, 0.0]]]}
    row = script.Row("equal", "float32: one device", 1)
    mesh = script.Row("equal", "float32: data 2", 2)
    lost = script.Row("train", "data 2", 2)
    found = {row.name: one, mesh.name: other, lost.name: {"failed": "no memory"}}
    lines = script.table([row, mesh, lost], found)
    assert "FAILED no memory" in lines[0]
    assert "off by 0.0e+00 of one device's; 0.0e+00" in lines[1]
    assert "off by 1.0e-02 of one device's; 1.2e-01 of the choices" in lines[2]


@pytest.mark.slow
def test_a_try_on_two_emulated_devices():
    more = {"JAX_NUM_CPU_DEVICES": "2", "JAX_PLATFORMS": "cpu", "PYTHON": sys.executable, "TF_CPP_MIN_LOG_LEVEL": "3"}
    command = [str(SCRIPTS / "bench_mesh.sh"), "equal", "--small", "--only", "float32", "--seconds", "500"]
    done = subprocess.run(command, env=os.environ | more, capture_output=True, text=True, check=True)
    rows = [line for line in done.stdout.splitlines() if line.startswith("equal")]
    assert len(rows) == 6, done.stdout
    for line in rows:
        assert float(line.split("off by ")[1].split()[0]) < 1e-5, line
        assert "0.0e+00 of the choices elsewhere; dropped 0.00%" in line
