"""Which implementation runs where, and why not a faster one: ``python -m deepseek_kernels [cuda:9.0] [bfloat16]``."""

import logging
import sys

from deepseek_kernels.registry import ANYWHERE, table
from deepseek_kernels.target import Target

TARGETS = (
    Target("cpu"),
    Target("cuda", "9.0"),
    Target("cuda", "8.0"),
    Target("rocm", "gfx942"),
    Target("tpu", "TPU v5p"),
)


def main(arguments: list[str]) -> None:
    logging.disable()  # the reasons stand in the table
    names = [argument for argument in arguments if argument.partition(":")[0] in ANYWHERE]
    targets = [Target.parse(name) for name in names] or TARGETS
    dtypes = [argument for argument in arguments if argument not in names] or ["float32", "bfloat16"]
    for target in targets:
        for dtype in dtypes:
            print(f"{target.platform} {target.chip} {dtype}".replace("  ", " "))
            for operation, choice in table(target, dtype).items():
                print(f"  {operation:16} {choice.name:11} rows {choice.rows:4}  {choice.reason}".rstrip())


main(sys.argv[1:])
