"""Several processes on one folder: the first alone writes."""

import jax

from deepseek_jax.train.metrics import MetricsWriter
from deepseek_jax.workflows.stage_result import write_json


def test_another_process_writes_no_files(monkeypatch, tmp_path):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    writer = MetricsWriter(tmp_path / "run")
    assert writer.write(3, {"loss": 1.5})["loss"] == 1.5
    writer.close()
    write_json(tmp_path / "result.json", {})
    assert list(tmp_path.iterdir()) == []
