"""Several processes on one folder: the first writes, the others wait for it or write nothing."""

import jax
import pytest

from deepseek_jax.parallel import hosts
from deepseek_jax.train.metrics import MetricsWriter
from deepseek_jax.workflows.stage import write_json


@pytest.fixture
def process(monkeypatch):
    """Makes this process one of two; what it does in order."""

    def become(index):
        monkeypatch.setattr(jax, "process_count", lambda: 2)
        monkeypatch.setattr(jax, "process_index", lambda: index)
        monkeypatch.setattr(hosts.multihost_utils, "sync_global_devices", lambda name: done.append("sync"))
        return done

    done: list[str] = []
    return become


def test_alone_nobody_waits(monkeypatch):
    monkeypatch.setattr(hosts.multihost_utils, "sync_global_devices", lambda name: pytest.fail("waited"))
    assert hosts.first_host_first(lambda: 5) == 5


@pytest.mark.parametrize(("index", "order"), [(0, ["work", "sync"]), (1, ["sync", "work"])])
def test_the_first_host_works_first(process, index, order):
    done = process(index)
    hosts.first_host_first(lambda: done.append("work"))
    assert done == order


def test_another_process_writes_no_files(process, tmp_path):
    process(1)
    writer = MetricsWriter(tmp_path / "run")
    assert writer.write(3, {"loss": 1.5})["loss"] == 1.5
    writer.close()
    write_json(tmp_path / "result.json", {})
    assert list(tmp_path.iterdir()) == []
