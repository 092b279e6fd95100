"""What README and docs/serving.md show: curl's examples, and replicas on Kubernetes."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from serve.fake import fake_app
from serve.live import live

from deepseek_jax.serve.config import KEYS, ServeConfig

ROOT = Path(__file__).parents[2]
CURL = re.findall(r"^curl (?:.*\\\n)*.*", (ROOT / "README.md").read_text(encoding="utf-8"), re.M)


@pytest.fixture(scope="module")
def port():
    with live(fake_app()) as found:
        yield found


@pytest.mark.skipif(shutil.which("curl") is None, reason="no curl here")
@pytest.mark.parametrize("command", CURL)
def test_curl(command, port):
    command = command.replace("127.0.0.1:8000", f"127.0.0.1:{port}").replace("curl", "curl -sS --fail", 1)
    said = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60, check=True).stdout
    if '"stream": true' in command:
        *events, done = said.removesuffix("\n\n").split("\n\n")
        assert done == "data: [DONE]"
        assert json.loads(events[-1].removeprefix("data: "))["usage"]["completion_tokens"] > 0
    elif "/metrics" in command:
        assert "deepseek_jax_requests_total" in said
    else:
        assert "choices" in json.loads(said) or "data" in json.loads(said)


def test_there_are_examples():
    assert len(CURL) >= 4


def test_kubernetes_takes_the_replicas():
    validate = pytest.importorskip("kubernetes_validate", reason="pip install kubernetes-validate")
    yaml = pytest.importorskip("yaml")
    service, deployment = yaml.safe_load_all((ROOT / "scripts" / "kubernetes_serve.yaml").read_text(encoding="utf-8"))
    for resource in (service, deployment):
        validate.validate(resource, "1.31", strict=True)
    pod = deployment["spec"]["template"]
    assert service["spec"]["selector"].items() <= pod["metadata"]["labels"].items()
    (container,) = pod["spec"]["containers"]
    assert container["ports"][0]["containerPort"] == ServeConfig().port
    assert pod["spec"]["terminationGracePeriodSeconds"] > ServeConfig().drain_seconds
    assert KEYS in {variable["name"] for variable in container["env"]}
    assert container["args"][container["args"].index("--allowed-hosts") + 1] == service["metadata"]["name"]
