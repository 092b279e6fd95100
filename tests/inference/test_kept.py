"""A second start traces nothing, and what it runs is what the first one ran."""

import collections
import dataclasses
import errno
import functools
import json
import logging
import os
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from inference.test_few_rows import V2_LITE
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from small import tokenizer

from deepseek_jax.compute import ComputeConfig
from deepseek_jax.inference import kept
from deepseek_jax.inference.engine import Engine
from deepseek_jax.inference.kept import FOLDER, Kept
from deepseek_jax.inference.lowered import Program
from deepseek_jax.inference.sampling import SamplingParams
from deepseek_jax.inference.serving_config import ServingConfig
from deepseek_jax.model.transformer import Transformer
from deepseek_jax.parallel.mesh import MeshConfig, make_mesh
from deepseek_kernels import Target, registry
from deepseek_kernels.registry import choose

# Widths that the C kernels take.
NETWORK = dataclasses.replace(V2_LITE, n_routed_experts=8, initializer_range=0.3)
SERVING = ServingConfig(slots=1, pages=8, page=4, context=16, chunk=8, turns=2)
ASKED = [SamplingParams(max_tokens=6, temperature=0.0), SamplingParams(max_tokens=6, seed=3)]
# Another process, with the same devices and flags.
START = "import json; from inference.test_kept import started; print(json.dumps(started()))"


def mesh(**sizes: Any) -> Mesh:
    return make_mesh(MeshConfig(**sizes), jax.devices()[: int(np.prod([*sizes.values()]))])


MESHES: list[dict[str, int]] = [{"data": 1}, {"expert": 2, "tensor": 2}]  # with and without scores


def started() -> list[dict[str, Any]]:
    """Of an engine on each mesh that warms up: how often a network was traced for that, and how many programs jax had
    not kept compiled; what it answers, and whether its programs take the pages as theirs."""
    plain, counts, found = Transformer.__call__, collections.Counter[str](), []

    def counted(self, *args, **options):
        counts["traced"] += 1
        return plain(self, *args, **options)

    def heard(event: str, **_):
        counts["asked"] += event == "/jax/compilation_cache/compile_requests_use_cache"
        counts["found"] += event == "/jax/compilation_cache/cache_hits"

    jax.monitoring.register_event_listener(heard)
    for sizes in MESHES:
        serving = dataclasses.replace(SERVING, score=sizes == MESHES[0])
        made = Engine.random(NETWORK, ComputeConfig(scan_decode=True), mesh(**sizes), tokenizer(), serving=serving)
        made.model.weights()
        programs = made.requests.continuous.programs
        pages = jax.tree.leaves(programs._pages)
        counts.clear()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Transformer, "__call__", counted)
            made.warm_up()
        told: dict[str, Any] = {name: counts[name] for name in ("traced", "asked", "found")}
        told["deleted"] = all(page.is_deleted() for page in pages)
        told["in place"] = [program.memory_analysis().alias_size_in_bytes for program in programs._programs.values()]
        answers = made.answer([[5, 9, 2, 7], [8, 8, 1]], ASKED)
        told["answers"] = [(answer.token_ids, answer.logprobs) for (answer,) in answers]
        found.append(told | {"late": made.metrics()["compiles"]})
    jax.monitoring.unregister_event_listener(heard)
    return found


def test_a_second_start_traces_nothing(tmp_path: Path):
    """Nor does it compile; its programs, those in C among them, give the very numbers of programs that are not kept."""
    environment = os.environ | {
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    starts = []
    for _ in range(2):
        run = subprocess.run([sys.executable, "-c", START], env=environment, check=True, capture_output=True, text=True)
        starts.append(json.loads(run.stdout))
    files = [*(tmp_path / FOLDER).iterdir()]
    assert sorted(file.name.partition("-")[0] for file in files) == sorted(
        ["copy_pages", "decode", "read", "read"] * 2 + ["read"] * 2
    )
    modules = [file.read_bytes()[len(kept._HEAD) + 32 :].partition(b"\n")[2] for file in files]  # behind a digest
    assert any(b"deepseek_paged" in zlib.decompress(module) for module in modules)
    enabled = jax.config.values["jax_enable_compilation_cache"]
    jax.config.update("jax_enable_compilation_cache", False)
    try:
        without = json.loads(json.dumps(started()))
    finally:
        jax.config.update("jax_enable_compilation_cache", enabled)
    for first, second, plain in zip(*starts, without, strict=True):
        assert first["traced"] >= 3 and second["traced"] == 0
        assert first["found"] == 0 and second["asked"] == second["found"] >= 4
        assert first["answers"] == second["answers"] == plain["answers"]
        assert first["in place"] == second["in place"] == plain["in place"] and min(plain["in place"])
        assert first["deleted"] and second["deleted"] and first["late"] == second["late"] == 0


TRACED = list[str]()


@functools.partial(jax.jit, static_argnames=("times", "more"), donate_argnames="pages")
def added(times: int, weights: dict[str, Any], pages: tuple[jax.Array, ...], rows: Any, *, more: int = 0):
    TRACED.append("added")
    return tuple(page + times * weights["w"].sum() + more for page in pages), rows.sum()


def program(times=3, dtype=jnp.float32, size=4, axis="data", rows=np.int32, more=0, pages=1) -> Program:
    place = NamedSharding(mesh(data=2, tensor=2), PartitionSpec(axis))
    placed = lambda *shape: jax.device_put(jnp.ones(shape, dtype), place)  # noqa: E731
    held = tuple(placed(size, 2) for _ in range(pages))
    arrays = {"w": placed(2)}, held, np.ones(3, rows)
    return Program(added, (times,), arrays, {"more": more}, 1, jax.tree.structure((held, 0)), None)


def run(folder: Path, program: Program) -> list[np.ndarray]:
    """Its numbers, by a process that has traced nothing yet, as far as jax knows."""
    jax.clear_caches()
    TRACED.clear()
    made = mesh(data=2, tensor=2)
    with jax.set_mesh(made):
        here = Kept(folder, made)
        compiled = here.lowered(program).compile()
        here.close()
        results = compiled(*program.arrays)
    assert all(page.is_deleted() for page in program.arrays[program.donated])
    return [np.asarray(x) for x in jax.tree.leaves(results)]


def assert_right(numbers: list[np.ndarray]) -> None:
    np.testing.assert_array_equal(numbers[0], np.full((4, 2), 7.0))
    assert numbers[1] == 3


@pytest.mark.parametrize(
    "other",
    [
        {"times": 4},
        {"dtype": jnp.bfloat16},
        {"size": 6},
        {"axis": "tensor"},
        {"rows": np.int8},
        {"more": 1},
        {"pages": 2},
    ],
    ids=lambda other: next(iter(other)),
)
def test_another_program_is_not_found(tmp_path: Path, other: dict[str, Any]):
    run(tmp_path, program())
    run(tmp_path, program(**other))
    assert TRACED
    assert_right(run(tmp_path, program()))
    assert not TRACED


def test_what_is_around_it_decides_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Sources, versions, the C kernels' build, what compilers read, jax's settings."""
    run(tmp_path, program())
    patches = [
        lambda patch: patch.setattr(kept, "_SOURCES", "others"),
        lambda patch: patch.setattr(kept, "_version", lambda package: "99"),
        lambda patch: patch.setattr(kept.cpu, "registered", lambda: "another build"),
        lambda patch: patch.setenv("XLA_SOMETHING", "1"),
    ]
    for patched in patches:
        with monkeypatch.context() as patch:
            patched(patch)
            assert_right(run(tmp_path, program()))
            assert TRACED
    with jax.default_matmul_precision("highest"):
        run(tmp_path, program())
        assert TRACED
    with jax.log_compiles(False):
        run(tmp_path, program())
    assert not TRACED


@pytest.mark.parametrize("left", [0, 20, 100, 10**9], ids=["empty", "head", "part", "a bit"])
def test_a_damaged_file_is_made_anew(tmp_path: Path, left: int, caplog: pytest.LogCaptureFixture):
    run(tmp_path, program())
    (file,) = tmp_path.iterdir()
    whole = file.read_bytes()
    half = bytearray(whole[:left])
    if half == whole:
        half[-9] ^= 1
    file.write_bytes(half)
    assert_right(run(tmp_path, program()))
    assert TRACED and [record.getMessage() for record in caplog.records] == [
        f"lowered programs: {file}: damaged: traced anew"
    ]
    run(tmp_path, program())
    assert not TRACED and len(caplog.records) == 1 and [*tmp_path.iterdir()] == [file]


def test_a_folder_that_cannot_be_written_is_told_once(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    (tmp_path / "file").write_text("")
    made = mesh(data=2, tensor=2)
    with jax.set_mesh(made):
        here = Kept(tmp_path / "file", made)
        programs = [program(), program(size=8)]
        sums = [here.lowered(each).compile()(*each.arrays)[1] for each in programs]
    assert sums == [3, 3]
    (record,) = caplog.records
    assert record.levelno == logging.WARNING and "file" in record.getMessage()


def test_a_full_disk_keeps_no_half_of_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(file, content):
        with file.open("wb") as stream:
            stream.write(content[:50])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    assert_right(run(tmp_path, program()))
    assert not [*tmp_path.iterdir()]


def test_a_second_start_says_what_is_slow(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    """Tracing chooses kernels and says so once; whose program is found has not heard it, nor who had the first one say
    it for another program."""

    @functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
    def slow(times, pages):
        TRACED.append("slow")
        choose("grouped_matmul", Target.parse("cuda:8.0"), jnp.bfloat16, rows=64, groups=4, widths=(256, 256))
        return (pages[0] * times,)

    for times, traced in ((2, True), (3, True), (2, False), (3, False)):
        if times == 2 or not traced:
            registry.say.cache_clear()
            caplog.clear()
        pages = program().arrays[1]
        run(tmp_path, Program(slow, (times,), (pages,), {}, 0, jax.tree.structure(pages), None))
        (record,) = caplog.records
        assert bool(TRACED) == traced and record.levelno == logging.WARNING
        assert record.getMessage().startswith("grouped_matmul in bfloat16 on cuda:8.0: blocks, not hopper: it needs")


def test_who_is_killed_while_writing_leaves_no_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A half file has another name, and goes as old ones do; of several the one that was read last stays."""

    def killed(half, file):
        Path(half).write_bytes(Path(half).read_bytes()[:50])
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(kept.os, "replace", killed)
        run(tmp_path, program())
    (half,) = tmp_path.iterdir()
    run(tmp_path, program())
    assert TRACED
    (whole,) = set(tmp_path.iterdir()) - {half}
    for age, file in enumerate((whole, half)):
        os.utime(file, (10**9 - age, 10**9 - age))
    run(tmp_path, program())
    assert not TRACED
    monkeypatch.setattr(kept, "MOST", 2 * whole.stat().st_size + 40)
    run(tmp_path, program(more=1))
    assert whole.exists() and not half.exists() and len([*tmp_path.iterdir()]) == 2
    run(tmp_path, program(more=2))
    assert not whole.exists() and len([*tmp_path.iterdir()]) == 2


def test_what_jax_does_not_export_is_told_and_runs(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    @functools.partial(jax.jit, donate_argnums=0)
    def calls_back(pages):
        jax.debug.callback(lambda x: None, pages[0])
        return (pages[0] + 1,)

    pages = program().arrays[1]
    found = run(tmp_path, Program(calls_back, (), (pages,), {}, 0, jax.tree.structure(pages), None))
    np.testing.assert_array_equal(found[0], np.full((4, 2), 2.0))
    (record,) = caplog.records
    assert "calls_back cannot be kept" in record.getMessage() and not [*tmp_path.iterdir()]


def test_it_lies_beside_jax_own_cache(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    """Where jax has none, nothing is kept."""
    name, before = "jax_compilation_cache_dir", jax.config.values["jax_compilation_cache_dir"]
    try:
        jax.config.update(name, str(tmp_path))
        here = Kept.of(mesh(data=1))
        assert here is not None and here.folder == tmp_path / FOLDER
        jax.config.update(name, "gs://bucket/cache")
        assert Kept.of(mesh(data=1)) is None and "gs://bucket/cache" in caplog.text
        jax.config.update(name, None)
        assert Kept.of(mesh(data=1)) is None and len(caplog.records) == 1
    finally:
        jax.config.update(name, before)
