"""What rewards cost, and whether `maths` tells MATH-500's answers apart: python scripts/bench_rewards.py math500.json.

Prints answers a second of `maths` with several workers, half of them 0 + the right one and half 0 + another's;
seconds for the other rewards on one long completion; with --pairs, each ordered pair of different texts that count as
equal (an hour).
"""

import argparse
import functools
import json
import os
import random
import time

from deepseek_jax.rl.grader import Grader
from deepseek_jax.rl.tasks import TaskConfig, make_task

TEXT_REWARDS = ("choice", "format", "tags", "language", "repetition", "length:2000:500")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file")
    parser.add_argument("--pairs", action="store_true")
    options = parser.parse_args()
    with open(options.file, encoding="utf-8") as file:
        answers = [row["answer"] for row in json.load(file)]
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
    if options.pairs:
        return compare_pairs(sorted(set(answers)))
    others = random.Random(0).sample(answers, len(answers))
    rows = [{"answer": answer} for answer in answers] * 2
    said = [f"<think>Hm.</think>It is \\boxed{{0 + {answer}}}." for answer in [*answers, *others]]
    task = make_task(TaskConfig())
    for workers in (1, 2, 4):
        with Grader(("maths",), task=task, workers=workers) as grader:
            grader.grade(said[:8], rows[:8])
            began = time.monotonic()
            metrics = grader.grade(said, rows).metrics()
            rate = len(rows) / (time.monotonic() - began)
        print(f"maths, {workers} workers: {rate:.0f} answers/s, share right {metrics['reward_maths']:.3f}")
    print(f"maths: {maths_seconds(said, rows) * 1000:.1f} ms of a core for an answer")
    long = "<think>" + "So the sum of the first two is not what was asked, wait. " * 2300 + "</think>#### C"
    for reward in TEXT_REWARDS:
        with Grader((reward,), task=task) as grader:
            began = time.process_time()
            grader.grade([long] * 8, [{"answer": "C"}] * 8)
            print(f"{reward}: {(time.process_time() - began) / 8 * 1000:.1f} ms of a core for {len(long):,} characters")


def maths_seconds(said: list[str], rows: list[dict[str, str]]) -> float:
    from deepseek_jax.rl.rewards import maths

    began = time.process_time()
    for text, row in zip(said, rows, strict=True):
        maths.score(text, row)
    return (time.process_time() - began) / len(rows)


def compare_pairs(answers: list[str]) -> None:
    from deepseek_jax.rl.rewards import maths

    maths._parse = functools.cache(maths._parse)
    for right in answers:
        for said in answers:
            if right != said and maths.is_equal(right, said):
                print(f"{right!r} = {said!r}", flush=True)


if __name__ == "__main__":
    main()
