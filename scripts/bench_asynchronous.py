"""Rollouts ahead of the training beside synchronous ones: answers a second, in turns within one process.

    python scripts/bench_asynchronous.py [--blocks 8] [--wait 0.012] [-- GRPO'S OPTIONS]

A machine that others use is faster now and slower then, so a process for each would compare hours, not ways. Here one
GRPO run of the demo's recipe goes on for blocks of `--steps` steps, synchronous and ahead by turns, and each pair of
blocks gives a ratio; of each block the first two steps, in which the thread begins, do not count. `--wait`: seconds
that a reward of each answer sleeps, in a worker as a user's does, as one that asks another machine.
"""

import argparse
import dataclasses
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from deepseek_jax.cli.main import main
from deepseek_jax.rl.rollout import Rollouts
from deepseek_jax.workflows import grpo

_UNCOUNTED = 2
REWARD = "import time\n\n\ndef waits(completion, row):\n    time.sleep({})\n    return 0.0\n"


class Alternating:
    """Rollouts that are synchronous in even blocks, and in odd ones made ahead."""

    def __init__(self, *arguments: Any, steps: int, block: int, staleness: int, **options: Any):
        *rest, config = arguments
        del steps
        self.block, self.seconds = block, list[list[float]]()
        make: Any = Rollouts
        self.make = lambda stale, end: make(
            *rest, dataclasses.replace(config, staleness=staleness * stale), steps=end, **options
        )
        self.taken, self.began = 0, 0.0
        self.now: Any = None

    def next(self, state: Any) -> Any:
        block, place = divmod(self.taken, self.block)
        if place == 0:
            if self.now is not None:
                self.now.close()
            self.now = self.make(block % 2, self.taken + self.block)
            self.seconds.append([])
        self.taken += 1
        self.began = time.monotonic()
        return self.now.next(state)

    def trained(self) -> dict[str, float]:
        if (self.taken - 1) % self.block >= _UNCOUNTED:
            self.seconds[-1].append(time.monotonic() - self.began)
        return self.now.trained()

    def state(self) -> dict[str, Any]:
        return {}

    def close(self) -> None:
        self.now.close()
        pairs = [(sum(a), sum(b)) for a, b in zip(self.seconds[::2], self.seconds[1::2], strict=True)]
        ratios = [synchronous / ahead for synchronous, ahead in pairs]
        for name, column in (("synchronous", 0), ("ahead", 1)):
            a_step = [pair[column] / (self.block - _UNCOUNTED) for pair in pairs]
            print(f"{name:12} {statistics.median(a_step):.3f} s a step ({min(a_step):.3f}…{max(a_step):.3f})")
        print(
            f"ratio        {statistics.median(ratios):.2f} ({min(ratios):.2f}…{max(ratios):.2f}), {len(ratios)} pairs"
        )


def bench() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=8)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--wait", type=float, default=0.0)
    parser.add_argument("--staleness", type=int, default=1)
    parser.add_argument("rest", nargs="*")
    given = parser.parse_args()
    blocks = 2 * given.blocks * given.steps
    options = {"block": given.steps, "staleness": given.staleness}
    grpo.Rollouts = lambda *args, **rest: Alternating(*args, **rest, **options)  # pyright: ignore
    with tempfile.TemporaryDirectory() as folder:
        arguments = ["grpo", "demo/grpo", "--run-dir", f"{folder}/run", "--loop.steps", str(blocks)]
        arguments += [
            "--loss.tis-cap",
            "2",
            "--loop.checkpoint-every",
            str(blocks),
            "--loop.no-tensorboard",
            "--evaluation.task.path",
        ]
        if given.wait:
            (Path(folder) / "slow.py").write_text(REWARD.format(given.wait))
            arguments += ["--reward", "accuracy", "--reward", "format=0.2", "--reward", f"{folder}/slow.py:waits"]
        main([*arguments, *given.rest])


if __name__ == "__main__":
    bench()
