"""What scripts/ holds to start a run on many hosts: manifests that Kubernetes takes, a batch script that Slurm runs."""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPTS = ROOT / "scripts"
MANIFESTS = ["kubernetes.yaml", "kubernetes_tpu.yaml"]


@pytest.mark.parametrize("name", MANIFESTS)
def test_a_manifest_passes_kubernetes_own_schema(name):
    """Of a JobSet, which is no kind of Kubernetes' own, the template of its Job: that is what starts the pods."""
    validate = pytest.importorskip("kubernetes_validate", reason="pip install kubernetes-validate")
    (job,) = read(name)["spec"]["replicatedJobs"]
    resource = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "x"}, "spec": job["template"]["spec"]}
    validate.validate(resource, "1.31", strict=True)
    resource["spec"]["parallelism"] = "4"
    with pytest.raises(validate.ValidationError):
        validate.validate(resource, "1.31", strict=True)


def test_a_manifests_pods_are_those_of_its_processes():
    jobset = read("kubernetes.yaml")
    name, (job,) = jobset["metadata"]["name"], jobset["spec"]["replicatedJobs"]
    spec = job["template"]["spec"]
    (container,) = spec["template"]["spec"]["containers"]
    environment = {each["name"]: each["value"] for each in container["env"]}
    hosts = int(environment["DEEPSEEK_JAX_PROCESSES"])
    assert spec["completions"] == spec["parallelism"] == hosts
    assert environment["DEEPSEEK_JAX_COORDINATOR"].startswith(f"{name}-{job['name']}-0-0.{name}:")
    devices = hosts * container["resources"]["limits"]["nvidia.com/gpu"]
    assert container["args"][-2:] == ["--mesh.data", str(devices)]


def read(name):
    yaml = pytest.importorskip("yaml")
    return yaml.safe_load((SCRIPTS / name).read_text(encoding="utf-8"))


JOIN = """
import jax
from jax.experimental import multihost_utils
from deepseek_jax.parallel.hosts import join_hosts
print(join_hosts().by, jax.process_index(), jax.device_count(), multihost_utils.process_allgather(7).sum())
"""


@pytest.fixture
def batch(tmp_path):
    """Submits scripts/slurm.sbatch with two tasks, its deepseek-jax replaced by a shell script; tells of the job."""
    if shutil.which("sbatch") is None or subprocess.run(["sinfo"], capture_output=True).returncode:
        pytest.skip("no Slurm here: Debian's slurm-wlm and munge, slurmctld and slurmd on one node, will do")
    jobs = []

    def submit(script):
        program = tmp_path / "venv" / "bin" / "deepseek-jax"
        program.parent.mkdir(parents=True)
        program.write_text(f"#!/bin/bash\n{script}\n")
        program.chmod(0o755)
        options = ["--parsable", "--ntasks=2", "--ntasks-per-node=2", "--output=log"]
        command = ["sbatch", *options, SCRIPTS / "slurm.sbatch", "pretrain"]
        env = {**os.environ, "VENV": "venv", "JAX_NUM_CPU_DEVICES": "4", "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}
        done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=True)
        jobs.append(done.stdout.strip())
        return jobs[-1]

    yield submit
    for job in jobs:
        subprocess.run(["scancel", job], capture_output=True)


def outcome(job):
    """JobState and Restarts of a job that has ended, or is back in the queue."""
    facts = {}
    for _ in range(120):
        time.sleep(0.5)
        shown = subprocess.run(["scontrol", "show", "job", job, "--oneliner"], capture_output=True, text=True).stdout
        facts = dict(word.split("=", 1) for word in shown.split() if "=" in word)
        found = facts["JobState"], int(facts["Restarts"])
        if found[0] not in ("RUNNING", "COMPLETING", "CONFIGURING") and found != ("PENDING", 0):
            return found
    raise AssertionError(f"job {job} has not ended: {facts}")


def test_tasks_of_slurm_join_by_themselves(batch, tmp_path):
    job = batch(f"exec {sys.executable} -c '{JOIN}'")
    assert outcome(job) == ("COMPLETED", 0), (tmp_path / "log").read_text()
    lines = [line for line in (tmp_path / "log").read_text().splitlines() if line.startswith("Slurm")]
    assert sorted(lines) == ["Slurm 0 8 14", "Slurm 1 8 14"]


def test_slurm_goes_on_after_the_time_limits_signal(batch, tmp_path):
    job = batch("trap 'exit 130' TERM; touch up$SLURM_PROCID; while :; do sleep 0.1; done")
    while not ((tmp_path / "up0").exists() and (tmp_path / "up1").exists()):
        time.sleep(0.1)
    subprocess.run(["scancel", "--batch", "--signal=USR1", job], check=True)
    assert outcome(job) == ("PENDING", 1)


@pytest.mark.parametrize(
    ("script", "expected"),
    [("exit 1", ("FAILED", 0)), ("[ $SLURM_PROCID = 0 ] || kill -9 $$; sleep 20", ("PENDING", 1))],
)
def test_slurm_starts_a_death_again_and_no_mistake(batch, script, expected):
    assert outcome(batch(script)) == expected


def test_slurm_forgets_a_cancelled_job(batch, tmp_path):
    job = batch("trap 'sleep 1; exit 130' TERM; touch up; while :; do sleep 0.1; done")
    while not (tmp_path / "up").exists():
        time.sleep(0.1)
    subprocess.run(["scancel", job], check=True)
    assert outcome(job) == ("CANCELLED", 0)
