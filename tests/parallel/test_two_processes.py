"""The harness of several processes, and which rows of a batch are whose."""

import json

from parallel.two_processes import start

PROGRAM = """
import json
import numpy as np
from pathlib import Path
from jax.experimental import multihost_utils
from deepseek_jax.parallel import processes
from deepseek_jax.parallel.mesh import MeshConfig, make_mesh
from deepseek_jax.parallel.sharding import ShardingRules, place_batch

axes, whole = ShardingRules().batch, np.arange(64).reshape(8, 8)
said = {"devices": jax.device_count(), "sum": int(multihost_utils.process_allgather(1 + jax.process_index()).sum())}
for sizes in ({"data": 8}, {"fsdp": 2, "expert": 2}, {"data": 2, "context": 4}, {"data": 1, "context": 8}):
    mesh = make_mesh(MeshConfig(**sizes))
    part, parts = processes.row_groups(mesh, axes)
    rows = whole[8 // parts * part :][: 8 // parts]
    placed = place_batch({"tokens": rows}, mesh)["tokens"]
    right = [(shard.data == whole[shard.index]).all() for shard in placed.addressable_shards]
    said[str(sizes)] = part, parts, placed.shape, bool(np.all(right))
try:
    processes.require_own_rows(mesh, axes, "sampling")
except ValueError as error:
    said["refused"] = str(error)
large = "x" * 5_000_000  # more than a message of gRPC may be by default
said["gathered"] = processes.gather({"index": jax.process_index(), "large": large})[1]["index"]
said["any"] = processes.any_process(jax.process_index() == 1), processes.any_process(False)
agreed = processes.Agreement()
numbers = [agreed.largest(number * jax.process_index()) for number in (0, 15, 0, 0)]
said["agreed"] = numbers, agreed.largest(jax.process_index(), now=True)
try:
    processes.first_host_alone(lambda: [][1])
except (IndexError, ValueError) as error:
    said["failed"] = f"{type(error).__name__}: {error}"
Path(sys.argv[1], f"said.{jax.process_index()}").write_text(json.dumps(said))
"""


def test_two_processes_share_out_rows_and_agree(tmp_path):
    with start(PROGRAM, [tmp_path], folder=tmp_path) as group:
        group.done()
    said = [json.loads((tmp_path / f"said.{index}").read_text()) for index in range(2)]
    for index, found in enumerate(said):
        assert (found["devices"], found["sum"]) == (8, 3)
        own, same = [index, 2, [8, 8], True], [0, 1, [8, 8], True]
        assert found["{'data': 8}"] == found["{'fsdp': 2, 'expert': 2}"] == found["{'data': 2, 'context': 4}"] == own
        assert found["{'data': 1, 'context': 8}"] == same
        assert "splits a batch into 1 parts for 2 processes, each of which needs one of its own" in found["refused"]
        assert (found["gathered"], found["any"], found["agreed"]) == (1, [True, False], [[0, 0, 15, 0], 1])
    assert said[0]["failed"] == "IndexError: list index out of range"
    assert said[1]["failed"] == "ValueError: process 0: list index out of range"
