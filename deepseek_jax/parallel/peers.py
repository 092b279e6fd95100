"""Who the processes of a run are, as the launcher that started this one has written into its environment."""

import re
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass

DISTRIBUTED = "DEEPSEEK_JAX_DISTRIBUTED"
COORDINATOR = "DEEPSEEK_JAX_COORDINATOR"
PROCESSES = "DEEPSEEK_JAX_PROCESSES"
PROCESS = "DEEPSEEK_JAX_PROCESS"

_ADDRESS = re.compile(r".+:\d{1,5}")
_PORTS = 61440, 4096  # above those that Linux gives to outgoing connections
_METADATA = "http://metadata.google.internal/computeMetadata/v1/instance/attributes/"


@dataclass(frozen=True)
class Peers:
    """The processes of a run. What is None is asked by jax of the service that knows it."""

    by: str
    """Who says so, for messages."""
    coordinator: str | None = None
    """HOST:PORT at which process 0 waits for the others."""
    processes: int | None = None
    index: int | None = None
    """Of this process."""
    devices: tuple[int, ...] | None = None
    """Its share of the host's GPUs; None: all."""


def find_peers(environ: Mapping[str, str], *, metadata: Callable[[str], str] | None = None) -> Peers | None:
    """The processes that the one with this environment is one of; None: it is alone.

    ``DEEPSEEK_JAX_COORDINATOR``, ``_PROCESSES`` and ``_PROCESS`` come first; what of them is not set is what Open MPI,
    Slurm or an indexed job of Kubernetes (the index alone) say. The workers of a TPU pod, and with
    ``DEEPSEEK_JAX_DISTRIBUTED=1`` whatever jax itself detects, are jax's to find. With 0 nothing is looked at.

    metadata: the value of an attribute of a Google Cloud machine.

    Raises:
        ValueError: naming the variable that is missing, no number, or out of range.
    """
    wanted = environ.get(DISTRIBUTED, "")
    if wanted not in ("", "0", "1"):
        raise ValueError(f"{DISTRIBUTED}={wanted!r}: expected 0 or 1, or leave it unset")
    if wanted == "0":
        return None
    given = {name: environ[name] for name in (COORDINATOR, PROCESSES, PROCESS) if environ.get(name)}
    found = _mpi(environ) or _slurm(environ)
    if given:
        return _completed(given, found or _indexed_job(environ))
    if found is not None and found.coordinator is None:
        raise ValueError(
            f"{found.by} started {found.processes} processes on several hosts and does not say where the first is: set "
            f"{COORDINATOR}=HOST:PORT of its host, with any free port (mpirun -x {COORDINATOR}=...); or, if each is "
            f"to work alone, {DISTRIBUTED}=0"
        )
    if found is None and (wanted == "1" or _tpu_workers(environ, metadata or _ask_metadata) > 1):
        return Peers(f"{DISTRIBUTED}=1" if wanted else "the TPU pod")
    return found


def _completed(given: Mapping[str, str], found: Peers | None) -> Peers | None:
    """The three settings, those that are not given from ``found``; all are checked."""
    known = {} if found is None else {COORDINATOR: found.coordinator, PROCESSES: found.processes, PROCESS: found.index}
    missing = [name for name in (COORDINATOR, PROCESSES, PROCESS) if given.get(name, known.get(name)) is None]
    if missing:
        said = ", ".join(f"{name}={value}" for name, value in given.items())
        raise ValueError(
            f"{said}, but {' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} not set: a run of several "
            f"processes needs {COORDINATOR}=HOST:PORT, {PROCESSES}=N and {PROCESS}=0 ... N-1"
        )
    coordinator = given.get(COORDINATOR) or str(known[COORDINATOR])
    processes, index = (_number(name, given.get(name, known.get(name))) for name in (PROCESSES, PROCESS))
    if not _ADDRESS.fullmatch(coordinator) or not 0 < int(coordinator.rpartition(":")[2]) < 2**16:
        raise ValueError(f"{COORDINATOR}={coordinator!r}: expected HOST:PORT, such as node1:1234")
    if processes < 1:
        raise ValueError(f"{PROCESSES}={processes}: expected at least 1")
    if index >= processes:
        raise ValueError(f"{PROCESS}={index}: expected 0 ... {processes - 1}, for {PROCESSES}={processes}")
    by = "its settings" if found is None else f"its settings and {found.by}"
    return Peers(by, coordinator, processes, index, found and found.devices) if processes > 1 else None


def _number(name: str, value: object) -> int:
    if not re.fullmatch(r"\d{1,9}", str(value)):
        raise ValueError(f"{name}={value!r}: expected a number")
    return int(str(value))


def _slurm(environ: Mapping[str, str]) -> Peers | None:
    """A task of an srun that started several. A batch script or salloc's shell has no step of its own: it is alone."""
    names = ("SLURM_STEP_NODELIST", "SLURM_STEP_NUM_TASKS", "SLURM_PROCID", "SLURM_LOCALID")
    if any(name not in environ for name in names) or (tasks := int(environ[names[1]])) < 2:
        return None
    match = re.match(r"([^,\[]+)(?:\[([^,\-\]]+))?", environ[names[0]])  # of node[07-09,12],other: node07
    assert match is not None, environ[names[0]]
    step = int(environ.get("SLURM_JOB_ID", 0)) + 101 * int(
        environ.get("SLURM_STEP_ID", 0)
    )  # steps may run side by side
    here = environ.get("SLURM_STEP_TASKS_PER_NODE", "1").split(",")  # 4(x2),3
    per_node = max(int(count.partition("(")[0]) for count in here)
    devices = _share(environ, int(environ["SLURM_LOCALID"]), per_node)
    return Peers("Slurm", f"{match[1]}{match[2] or ''}:{_port(step)}", tasks, int(environ["SLURM_PROCID"]), devices)


def _mpi(environ: Mapping[str, str]) -> Peers | None:
    """A process of an Open MPI's mpirun that started several."""
    size, rank, local, together = (
        int(environ.get(f"OMPI_COMM_WORLD_{name}", default))
        for name, default in (("SIZE", 1), ("RANK", 0), ("LOCAL_RANK", 0), ("LOCAL_SIZE", 1))
    )
    if size < 2:
        return None
    # Before version 5 the launcher's address, which is the first host's; later none is told.
    launcher = environ.get("OMPI_MCA_orte_hnp_uri", "")
    name = launcher or environ.get("PMIX_NAMESPACE", "")
    match = re.search(r"tcp://([^,:]+)", launcher)
    host = "127.0.0.1" if together == size else match[1] if match else None
    coordinator = None if host is None else f"{host}:{_port(zlib.crc32(name.split(';')[0].encode()))}"
    return Peers("Open MPI", coordinator, size, rank, _share(environ, local, together))


def _indexed_job(environ: Mapping[str, str]) -> Peers | None:
    """The index of a pod of Kubernetes' indexed jobs. Alone it says nothing: each pod may have work of its own."""
    index = environ.get("JOB_COMPLETION_INDEX")
    return None if index is None else Peers("Kubernetes", index=_number("JOB_COMPLETION_INDEX", index))


def _share(environ: Mapping[str, str], local: int, processes: int) -> tuple[int, ...] | None:
    """Of the GPUs that a launcher lets all the ``processes`` of a host see, those of the one with index ``local``; None
    where it has given each its own, or has only one. Where it does not say which there are, one for each."""
    visible = environ.get("CUDA_VISIBLE_DEVICES")
    count = processes if visible is None else len(visible.split(","))
    if processes == 1 or count == 1:
        return None
    if count % processes:
        raise ValueError(
            f"CUDA_VISIBLE_DEVICES={visible}: {count} GPUs do not split over the {processes} processes of this host"
        )
    each = count // processes
    return tuple(range(local * each, (local + 1) * each))


def _tpu_workers(environ: Mapping[str, str], metadata: Callable[[str], str]) -> int:
    """How many workers the TPU slice of this machine has, 1 where there is no TPU."""
    # jax says so as it is imported where it finds libtpu and chips.
    if environ.get("TPU_ML_PLATFORM") != "JAX" or "tpu" not in environ.get("JAX_PLATFORMS", "tpu"):
        return 1
    names = environ.get("TPU_PROCESS_ADDRESSES") or environ.get("TPU_WORKER_HOSTNAMES")  # Kubernetes
    if names is None and "TPU_SKIP_MDS_QUERY" not in environ:
        try:
            names = metadata("worker-network-endpoints")
        except OSError:
            return 1  # not one of Google's machines
    workers = len((names or "").split(","))
    return workers * int(environ.get("MEGASCALE_NUM_SLICES") or 1)


def _ask_metadata(attribute: str) -> str:
    import urllib.request  # which takes longer than all the rest here

    request = urllib.request.Request(_METADATA + attribute, headers={"Metadata-Flavor": "Google"})
    with urllib.request.urlopen(request, timeout=5) as answer:
        return answer.read().decode()


def _port(number: int) -> int:
    first, count = _PORTS
    return first + number % count
