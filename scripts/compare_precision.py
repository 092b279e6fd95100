"""Does bfloat16 compute follow float32's loss? The demo's pretraining in both, for several seeds.

    deepseek-jax corpus demo/corpus
    .venv/bin/python scripts/compare_precision.py [--steps 300] [--seeds 8] [--batch-size 4] [--folder runs/precision]

A seed draws parameters and the order of the rows, and is the same for both. Losses are averaged over 25 steps. Printed
for every hundredth step: float32's mean loss over the seeds, its standard deviation between them, and the difference
that bfloat16 makes for the same seed, the mean over seeds and the greatest. Then by how much of the spread the two
differ at the worst step. Runs that are there are read.
"""

import argparse
import dataclasses
from pathlib import Path
from typing import Literal

import numpy as np

from deepseek_jax.compute import ComputeConfig
from deepseek_jax.train.metrics import read_metrics
from deepseek_jax.workflows.pretrain import PretrainConfig, pretrain
from deepseek_jax.workflows.recipe import load_recipe

WINDOW = 25


def losses(arguments: argparse.Namespace, dtype: Literal["float32", "bfloat16"], seed: int) -> np.ndarray:
    """The loss of every step, averaged over the WINDOW steps up to it."""
    recipe: PretrainConfig = load_recipe("demo/pretrain", PretrainConfig)
    run_dir = Path(arguments.folder) / f"{dtype}-{seed}"
    pretrain(
        dataclasses.replace(
            recipe,
            run_dir=str(run_dir),
            seed=seed,
            batch_size=arguments.batch_size,
            data=dataclasses.replace(recipe.data, heldout=()),
            compute=ComputeConfig(dtype=dtype, scan_unroll=3),
            step=dataclasses.replace(recipe.step, microbatches=1),
            loop=dataclasses.replace(recipe.loop, steps=arguments.steps, log_every=1, eval_every=0),
        )
    )
    every = [line["loss"] for line in read_metrics(run_dir)]
    return np.convolve(every, np.full(WINDOW, 1 / WINDOW), mode="valid")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--folder", default="runs/precision")
    arguments = parser.parse_args()
    single, half = (
        np.stack([losses(arguments, dtype, seed) for seed in range(arguments.seeds)])
        for dtype in ("float32", "bfloat16")
    )
    spread, difference = single.std(axis=0, ddof=1), half - single
    print("step   float32   spread   mean difference   greatest")
    for step in [*range(100, arguments.steps, 100), arguments.steps]:
        at = step - WINDOW
        mean, greatest = difference[:, at].mean(), np.abs(difference[:, at]).max()
        print(f"{step:4}   {single[:, at].mean():.4f}   {spread[at]:.4f}   {mean:+.4f}   {greatest:.4f}")
    ratio = np.sqrt((difference**2).mean()) / np.sqrt((spread**2).mean())
    print(f"all steps from {WINDOW} on, root mean square: difference / spread = {ratio:.3f}")
    for name, size in (
        ("mean over seeds", np.abs(difference.mean(axis=0))),
        ("root mean square over seeds", np.sqrt((difference**2).mean(axis=0))),
    ):
        worst = int((size / spread).argmax())
        print(f"{name}: at most {size[worst] / spread[worst]:.2f} of the spread, at step {worst + WINDOW}")


if __name__ == "__main__":
    main()
