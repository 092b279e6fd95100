"""Several processes on one folder: the first writes, the others wait for it or write nothing."""

import jax
import pytest

from deepseek_jax.parallel import hosts
from deepseek_jax.rl.tasks import TaskConfig
from deepseek_jax.train.metrics import MetricsWriter
from deepseek_jax.workflows.grpo import GRPOConfig, grpo
from deepseek_jax.workflows.sft import SFTConfig, SFTData, sft
from deepseek_jax.workflows.stage import write_json
from deepseek_jax.workflows.task_eval import TaskEval


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


EXAM = TaskEval(TaskConfig(path=("rows.jsonl",)))
SAMPLING = SFTConfig(init_from="x", data=SFTData(path=("chats.jsonl",)), evaluation=EXAM)
ASKING = GRPOConfig(init_from="x", task=EXAM.task)


@pytest.mark.parametrize(("stage", "config"), [(sft, SAMPLING), (grpo, ASKING)])
def test_stages_that_sample_need_one_process(process, stage, config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text('{"prompt": "1+1", "answer": "2"}\n')
    process(0)
    with pytest.raises(ValueError, match="samples answers, which one process can do so far, not 2"):
        stage(config)
