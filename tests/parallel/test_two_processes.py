"""The harness itself: processes that see each other's devices, and what becomes of those whose peer dies."""

from parallel.two_processes import start

SUM = """
import jax
from jax.experimental import multihost_utils
both = multihost_utils.process_allgather(1 + jax.process_index()).sum()
print(jax.process_index(), jax.device_count(), both, sys.argv[1])
"""


def test_processes_see_each_others_devices(tmp_path):
    with start(SUM, ["given"], folder=tmp_path) as group:
        ended = group.done()
    assert [process.out.split() for process in ended] == [["0", "8", "3", "given"], ["1", "8", "3", "given"]]
