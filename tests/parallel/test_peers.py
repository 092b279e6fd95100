"""Who is told of which peers by its launcher; real processes that join by settings, and those that cannot."""

import os
import signal
import socket
import time

import pytest
from parallel.two_processes import start

from deepseek_jax.cli.main import main
from deepseek_jax.parallel.hosts import join_hosts
from deepseek_jax.parallel.peers import Peers, find_peers

# As srun and mpirun of Debian 12 (Slurm 22.05, Open MPI 4.1) set them.
SLURM = {
    "SLURM_JOB_ID": "2",
    "SLURM_NTASKS": "4",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NODELIST": "node[07-08]",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
}
MPI = {
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
}
LAUNCHER = {"OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911"}
GIVEN = {"DEEPSEEK_JAX_COORDINATOR": "node1:1234", "DEEPSEEK_JAX_PROCESSES": "4", "DEEPSEEK_JAX_PROCESS": "3"}
POD = {"TPU_ML_PLATFORM": "JAX"}


def told(*environs, **more):
    return {name: value for environ in environs for name, value in environ.items()} | more


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        (SLURM, Peers("Slurm", "node07:61442", 4, 3, (1,))),
        (told(SLURM, SLURM_STEP_NODELIST="a,b"), Peers("Slurm", "a:61442", 4, 3, (1,))),
        (told(SLURM, SLURM_STEP_ID="1"), Peers("Slurm", "node07:61543", 4, 3, (1,))),
        (told(SLURM, CUDA_VISIBLE_DEVICES="0,1,2,3"), Peers("Slurm", "node07:61442", 4, 3, (2, 3))),
        (told(SLURM, CUDA_VISIBLE_DEVICES="1"), Peers("Slurm", "node07:61442", 4, 3)),  # --gpus-per-task=1
        (told(SLURM, SLURM_STEP_TASKS_PER_NODE="1(x4)", SLURM_LOCALID="0"), Peers("Slurm", "node07:61442", 4, 3)),
        (told(MPI, LAUNCHER, SLURM), Peers("Open MPI", "10.96.0.1:64233", 4, 3, (1,))),
        (GIVEN, Peers("its settings", "node1:1234", 4, 3)),
        (
            told(GIVEN, DEEPSEEK_JAX_PROCESS="", JOB_COMPLETION_INDEX="2"),
            Peers("its settings and Kubernetes", "node1:1234", 4, 2),
        ),
        (told(MPI, DEEPSEEK_JAX_COORDINATOR="node1:1"), Peers("its settings and Open MPI", "node1:1", 4, 3, (1,))),
        ({"DEEPSEEK_JAX_DISTRIBUTED": "1"}, Peers("DEEPSEEK_JAX_DISTRIBUTED=1")),
        (told(POD, TPU_WORKER_HOSTNAMES="a,b"), Peers("the TPU pod")),
        (told(POD, TPU_WORKER_HOSTNAMES="a", MEGASCALE_NUM_SLICES="2"), Peers("the TPU pod")),
        (POD, Peers("the TPU pod")),
    ],
)
def test_a_launcher_tells_of_peers(environ, expected):
    assert (
        find_peers(environ, metadata={"worker-network-endpoints": "u:0:10.0.0.1,u:1:10.0.0.2"}.__getitem__) == expected
    )


def nowhere(attribute):
    raise OSError(attribute)


@pytest.mark.parametrize(
    "environ",
    [
        {},
        told(SLURM, SLURM_STEP_NUM_TASKS="1"),  # srun's of one
        {name: value for name, value in SLURM.items() if "STEP" not in name},  # a batch script, without srun
        told(MPI, OMPI_COMM_WORLD_SIZE="1"),
        {"JOB_COMPLETION_INDEX": "2"},  # of many jobs, each by itself
        told(GIVEN, SLURM, DEEPSEEK_JAX_DISTRIBUTED="0"),
        told(GIVEN, DEEPSEEK_JAX_PROCESSES="1", DEEPSEEK_JAX_PROCESS="0"),
        told(POD, TPU_WORKER_HOSTNAMES="localhost"),
        told(POD, TPU_WORKER_HOSTNAMES="a,b", JAX_PLATFORMS="cpu"),
        {"TPU_WORKER_HOSTNAMES": "a,b"},  # as where programs for TPUs are compiled
        POD,
    ],
)
def test_a_process_without_peers_is_alone(environ):
    assert find_peers(environ, metadata=nowhere) is None


def test_a_single_tpu_host_is_alone():
    assert find_peers(POD, metadata=lambda attribute: "u:0:10.0.0.1") is None


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({"DEEPSEEK_JAX_DISTRIBUTED": "yes"}, "DEEPSEEK_JAX_DISTRIBUTED='yes': expected 0 or 1"),
        (
            {"DEEPSEEK_JAX_PROCESSES": "2"},
            "DEEPSEEK_JAX_PROCESSES=2, but DEEPSEEK_JAX_COORDINATOR and DEEPSEEK_JAX_PROCESS are not",
        ),
        (
            told(GIVEN, DEEPSEEK_JAX_PROCESS="4"),
            "DEEPSEEK_JAX_PROCESS=4: expected 0 ... 3, for DEEPSEEK_JAX_PROCESSES=4",
        ),
        (told(GIVEN, DEEPSEEK_JAX_PROCESS="-1"), "DEEPSEEK_JAX_PROCESS='-1': expected a number"),
        (told(GIVEN, DEEPSEEK_JAX_PROCESSES="0"), "DEEPSEEK_JAX_PROCESSES=0: expected at least 1"),
        (told(GIVEN, DEEPSEEK_JAX_COORDINATOR="node1"), "DEEPSEEK_JAX_COORDINATOR='node1': expected HOST:PORT"),
        (told(GIVEN, DEEPSEEK_JAX_COORDINATOR="node1:99999"), "DEEPSEEK_JAX_COORDINATOR='node1:99999': expected HOST"),
        (
            MPI,
            "Open MPI started 4 processes on several hosts and does not say where the first is: set DEEPSEEK_JAX_COORD",
        ),
        (told(SLURM, CUDA_VISIBLE_DEVICES="0,1,2"), "3 GPUs do not split over the 2 processes of this host"),
    ],
)
def test_wrong_settings_are_refused(environ, message):
    with pytest.raises(ValueError, match=message.replace(".", r"\.")):
        find_peers(environ)


def test_options_before_the_command_are_its_settings(monkeypatch, capsys):
    for name in GIVEN:
        monkeypatch.setenv(name, "")
    assert main(["--coordinator", "node1:1234", "--processes=2", "--process", "2", "pretrain"]) == 1
    assert "DEEPSEEK_JAX_PROCESS=2: expected 0 ... 1, for DEEPSEEK_JAX_PROCESSES=2" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["--processes", "2", "pretrain", "--help"])  # waits for nobody


def test_a_coordinator_that_is_not_there_is_named(monkeypatch):
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{listener.getsockname()[1]}"  # nobody listens
        settings(monkeypatch, DEEPSEEK_JAX_COORDINATOR=address, DEEPSEEK_JAX_JOIN_SECONDS="1")
        with pytest.raises(ValueError, match=f"{address} .*process 3 of 4 has not reached process 0 there within 1 s"):
            join_hosts()


def test_a_port_that_is_taken_is_named(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        settings(monkeypatch, DEEPSEEK_JAX_COORDINATOR=address, DEEPSEEK_JAX_PROCESS="0")
        with pytest.raises(ValueError, match=f"{address} .*cannot be had .Address already in use"):
            join_hosts()


def settings(monkeypatch, **more):
    for name, value in (GIVEN | more).items():
        monkeypatch.setenv(name, value)


WORK = """
import sys, time
import jax
from jax.experimental import multihost_utils
from deepseek_jax.parallel.hosts import join_hosts
found = join_hosts()
print(found.by, found.index, jax.device_count(), jax.config.jax_cpu_collectives_implementation, flush=True)
multihost_utils.sync_global_devices("here")
print("met", flush=True)
time.sleep(float(sys.argv[1]))  # as in a kernel that waits for the other: no error of a collective ends it
"""


LOST = "deepseek-jax: this process was aborted, as jax does where another one of the run is lost."


def test_processes_join_by_settings_and_a_lost_one_ends_the_other(tmp_path):
    with start(WORK, [100], folder=tmp_path, join=False) as group:
        while not all("met" in (tmp_path / f"{i}.out").read_text() for i in (0, 1)):
            time.sleep(0.1)
        group.signal(0, signal.SIGKILL)  # whom the other misses at once
        ended = group.wait(60)
    assert [f"its settings {i} 8 gloo" in process.out for i, process in enumerate(ended)] == [True, True]
    assert [process.code for process in ended] == [-signal.SIGKILL, -signal.SIGABRT]
    assert LOST in ended[1].err and ended[1].err.endswith("on all, goes on from the last checkpoint.\n")


def test_who_waits_in_vain_says_so(tmp_path):
    environment = {"DEEPSEEK_JAX_JOIN_SECONDS": "2", "DEEPSEEK_JAX_PROCESSES": "2"}
    environment |= {"DEEPSEEK_JAX_PROCESS": "0", "DEEPSEEK_JAX_COORDINATOR": f"127.0.0.1:{20000 + os.getpid() % 10000}"}
    with start(WORK, [0], folder=tmp_path, processes=1, environment=environment) as group:
        (ended,) = group.wait(60)
    assert ended.code == -signal.SIGABRT
    assert ended.err.endswith("not all processes of this run came together within 2 s: has each been started?\n")


FAIL = """
import sys
from deepseek_jax.cli import main, stages
def run_pretrain(arguments):
    import jax, time
    if jax.process_index():
        raise TypeError("a mistake of one")
    time.sleep(100)
stages.run_pretrain = run_pretrain
sys.exit(main.main(["pretrain"]))
"""


def test_a_process_that_fails_alone_ends_the_other(tmp_path):
    with start(FAIL, folder=tmp_path, join=False) as group:
        ended = group.wait(60)
    assert [process.code for process in ended] == [-signal.SIGABRT, 1]
    assert "TypeError: a mistake of one" in ended[1].err and LOST in ended[0].err
