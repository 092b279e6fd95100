"""safetensors: the same files as the package of that name, and no file, however damaged, does more than raise."""

import contextlib
import json
import os
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from deepseek_jax.checkpoint.safetensors import (
    INDEX,
    SINGLE,
    DamagedFileError,
    TensorFiles,
    read_header,
)
from deepseek_jax.checkpoint.safetensors_writing import Planned, write_folder

OURS = {
    "BOOL": np.bool_,
    "U8": np.uint8,
    "I8": np.int8,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E4M3FNUZ": ml_dtypes.float8_e4m3fnuz,
    "F8_E5M2": ml_dtypes.float8_e5m2,
    "F8_E5M2FNUZ": ml_dtypes.float8_e5m2fnuz,
    "F8_E8M0": ml_dtypes.float8_e8m0fnu,
    "U16": np.uint16,
    "I16": np.int16,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "U32": np.uint32,
    "I32": np.int32,
    "F32": np.float32,
    "U64": np.uint64,
    "I64": np.int64,
    "F64": np.float64,
    "C64": np.complex64,
}
SHAPES = [(), (1,), (3, 5), (0,), (4, 0, 2), (2, 3, 7)]

many = settings(max_examples=400, suppress_health_check=[HealthCheck.function_scoped_fixture])


def every_tensor() -> dict[str, np.ndarray]:
    """All dtypes in all shapes, odd sizes between wide ones, with every bit pattern that a byte can have."""
    rng = np.random.default_rng(0)
    tensors = {}
    for label, dtype in OURS.items():
        for shape in SHAPES:
            count = int(np.prod(shape)) * np.dtype(dtype).itemsize
            raw = rng.integers(0, 2 if label == "BOOL" else 256, count, dtype=np.uint8)
            tensors[f"{label}.{'x'.join(map(str, shape))}.é"] = raw.view(dtype).reshape(shape)
    return tensors


def plan_of(tensors: Mapping[str, np.ndarray]) -> list[Planned]:
    return [Planned(name, array.dtype, array.shape) for name, array in tensors.items()]


def write(folder: Path, tensors: Mapping[str, np.ndarray], **options: Any) -> None:
    folder.mkdir(exist_ok=True)
    write_folder(folder, plan_of(tensors), tensors.__getitem__, **options)


def theirs(data: bytes) -> dict[str, dict]:
    """What the package reads, as dtype, shape and bytes: numpy has no name for some of its dtypes."""
    return {name: {**value, "data": bytes(value["data"])} for name, value in safetensors.deserialize(data)}


def assert_same(files: TensorFiles, tensors: Mapping[str, np.ndarray]) -> None:
    assert files.tensors.keys() == tensors.keys()
    for name, expected in tensors.items():
        got = files.array(name)
        assert got.dtype == expected.dtype and got.shape == expected.shape
        assert got.tobytes() == expected.tobytes()


def file_of(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(raw) if length is None else length).to_bytes(8, "little") + raw + data


def entry(dtype: Any = "F32", shape: Any = (2,), offsets: Any = (0, 8), **more: Any) -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets, **more}


# The package's files and ours


def test_the_package_reads_what_we_write(tmp_path: Path) -> None:
    tensors = every_tensor()
    write(tmp_path, tensors, metadata={"format": "pt", "who": "wé"})
    read = theirs((tmp_path / SINGLE).read_bytes())
    assert read.keys() == tensors.keys()
    for name, array in tensors.items():
        assert (read[name]["dtype"], tuple(read[name]["shape"])) == (name.split(".")[0], array.shape)
        assert read[name]["data"] == array.tobytes()
    with safetensors.safe_open(tmp_path / SINGLE, framework="np") as opened:
        assert opened.metadata() == {"format": "pt", "who": "wé"}
    assert read_header(tmp_path / SINGLE)[1] == {"format": "pt", "who": "wé"}


def test_we_read_what_the_package_writes(tmp_path: Path) -> None:
    tensors = every_tensor()
    specs = {
        name: safetensors.TensorSpec(
            dtype=array.dtype.name, shape=array.shape, data_ptr=array.ctypes.data, data_len=array.nbytes
        )
        for name, array in tensors.items()
        # It takes numpy's and torch's names of dtypes: not these three as ml_dtypes calls them.
        if name.split(".")[0] not in ("F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ")
    }
    kept = {name: tensors[name] for name in specs}
    file = tmp_path / "any.safetensors"
    safetensors.serialize_file(specs, file, metadata={"format": "np"})
    with TensorFiles(file) as files:
        assert_same(files, kept)
    assert read_header(file)[1] == {"format": "np"}


def test_a_file_of_one_dtype_is_the_packages_file_to_the_byte(tmp_path: Path) -> None:
    tensors = {f"layer.{i}": np.full((3, i), i, ml_dtypes.bfloat16) for i in range(5)}
    write(tmp_path, tensors)
    assert (tmp_path / SINGLE).read_bytes() == safetensors.numpy.save(tensors, {"format": "pt"})


def test_our_own_files_come_back(tmp_path: Path) -> None:
    tensors = every_tensor()
    write(tmp_path, tensors)
    with TensorFiles(tmp_path) as files:
        assert_same(files, tensors)
        for name in files.tensors:
            assert files.array(name).flags.aligned  # torch cannot read another
    empty = tmp_path / "empty"
    write(empty, {})
    assert TensorFiles(empty).tensors == {} == theirs((empty / SINGLE).read_bytes())


@many
@given(
    st.lists(
        st.tuples(st.sampled_from(sorted(OURS)), st.lists(st.integers(0, 4), max_size=4).map(tuple)),
        max_size=6,
    ),
    st.integers(1, 200),
)
def test_any_model_and_shard_size_come_back(
    tmp_path_factory: pytest.TempPathFactory, kinds: list, max_shard_bytes: int
) -> None:
    folder = tmp_path_factory.mktemp("model")
    tensors = {f"t{i}": np.ones(shape, OURS[kind]) for i, (kind, shape) in enumerate(kinds)}
    write(folder, tensors, max_shard_bytes=max_shard_bytes)
    with TensorFiles(folder) as files:
        assert_same(files, tensors)
    seen = {}
    for file in folder.glob("*.safetensors"):
        seen |= theirs(file.read_bytes())
    assert {name: value["data"] for name, value in seen.items()} == {n: a.tobytes() for n, a in tensors.items()}


# Writing


def test_shards_end_at_the_limit_and_the_index_lists_them(tmp_path: Path) -> None:
    tensors = {name: np.full(size, size, np.float32) for name, size in [("a", 4), ("b", 4), ("c", 1), ("d", 20)]}
    sizes: list[int] = []
    write(tmp_path, tensors, max_shard_bytes=32, on_tensor=sizes.append)
    index = json.loads((tmp_path / INDEX).read_text())
    first, second, third = (f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3))
    assert index == {
        "metadata": {"total_size": 29 * 4},
        "weight_map": {"a": first, "b": first, "c": second, "d": third},
    }
    assert {file.name for file in tmp_path.iterdir()} == {INDEX, first, second, third}
    assert sizes == [16, 16, 4, 80]
    with TensorFiles(tmp_path) as files:
        assert list(files.tensors) == ["a", "b", "c", "d"]
        assert_same(files, tensors)


def test_tensors_are_produced_once_in_the_plans_order_and_wide_ones_stored_first(tmp_path: Path) -> None:
    tensors = {"q": np.ones(3, np.int8), "scale": np.ones(2, np.float32), "half": np.ones(1, ml_dtypes.bfloat16)}
    asked: list[str] = []

    def produce(name: str) -> np.ndarray:
        asked.append(name)
        return tensors[name]

    write_folder(tmp_path, plan_of(tensors), produce)
    assert asked == ["q", "scale", "half"]
    assert list(read_header(tmp_path / SINGLE)[0]) == ["scale", "half", "q"]


def test_strided_arrays_are_written_as_they_look(tmp_path: Path) -> None:
    array = np.arange(12, dtype=np.int32).reshape(3, 4).T[::-1]
    write(tmp_path, {"a": array})
    assert_same(TensorFiles(tmp_path), {"a": array})


@pytest.mark.parametrize(
    "plan, options, message",
    [
        ([Planned("a", np.dtype("f4"), ())] * 2, {}, "'a' is reserved or planned twice"),
        ([Planned("__metadata__", np.dtype("f4"), ())], {}, "reserved"),
        ([Planned("a", np.dtype(">f4"), ())], {}, "'a': safetensors has no dtype >f4"),
        ([Planned("a", np.dtype("c16"), ())], {}, "complex128"),
        ([], {"max_shard_bytes": 0}, "max_shard_bytes must be at least 1, got 0"),
    ],
)
def test_plans_that_cannot_be_written(tmp_path: Path, plan: list, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        write_folder(tmp_path, plan, lambda name: np.zeros((), "f4"), **options)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("wrong", [np.zeros(3, np.float32), np.zeros(2, np.float16), np.zeros((2, 1), np.float32)])
def test_another_array_than_planned_is_a_bug_of_the_caller(tmp_path: Path, wrong: np.ndarray) -> None:
    with pytest.raises(AssertionError, match="a: planned float32"):
        write_folder(tmp_path, [Planned("a", np.dtype(np.float32), (2,))], lambda name: wrong)


def test_what_was_not_finished_is_refused(tmp_path: Path) -> None:
    plan = plan_of({"a": np.ones(100, np.float32), "b": np.ones(100, np.float32)})

    def produce(name: str) -> np.ndarray:
        if name == "b":
            raise KeyboardInterrupt
        return np.ones(100, np.float32)

    with pytest.raises(KeyboardInterrupt):
        write_folder(tmp_path, plan, produce)
    with pytest.raises(DamagedFileError):
        TensorFiles(tmp_path)


@pytest.mark.parametrize("present", [SINGLE, INDEX])
def test_weights_are_never_written_over(tmp_path: Path, present: str) -> None:
    (tmp_path / present).write_bytes(b"mine")
    with pytest.raises(FileExistsError):
        write(tmp_path, {"a": np.ones(9), "b": np.ones(9)}, max_shard_bytes=1)
    assert [file.name for file in tmp_path.iterdir()] == [present] and (tmp_path / present).read_bytes() == b"mine"


# Reading


def test_arrays_are_read_only_views_that_outlive_close(tmp_path: Path) -> None:
    write(tmp_path, {"a": np.arange(6, dtype=np.float32)})
    with TensorFiles(str(tmp_path)) as files:
        array = files.array("a")
        assert not array.flags.writeable and not array.flags.owndata
        with pytest.raises(KeyError):
            files.array("b")
    files.close()
    assert array.tolist() == [0, 1, 2, 3, 4, 5]
    with pytest.raises(ValueError, match="closed"):
        files.array("a")


def test_threads_share_one_map(tmp_path: Path) -> None:
    tensors = {f"t{i}": np.full(100, i) for i in range(32)}
    write(tmp_path, tensors, max_shard_bytes=3000)
    files = TensorFiles(tmp_path)
    workers = [threading.Thread(target=assert_same, args=(files, tensors)) for _ in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(files._maps) == len({info.file for info in files.tensors.values()})


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_forgotten_tensors_leave_memory_and_can_be_read_again(tmp_path: Path) -> None:
    def resident() -> int:
        status = Path("/proc/self/status").read_text()
        return sum(int(line.split()[1]) for line in status.splitlines() if line.startswith("RssFile")) // 1024

    tensors = {"small": np.ones(3, np.uint8), "large": np.ones(64 << 20, np.uint8), "last": np.ones(3, np.uint8)}
    write(tmp_path, tensors)
    with TensorFiles(tmp_path) as files:
        files.forget("large")  # nothing is mapped yet
        array = files.array("large")
        before = resident()
        assert array.sum() == 64 << 20
        touched = resident()
        files.forget("large")
        files.forget("small")
        assert touched - before > 48 and resident() - before < 16
        assert_same(files, tensors)


def test_a_file_that_shrinks_after_its_header_was_read(tmp_path: Path) -> None:
    write(tmp_path, {"a": np.ones(1000)})
    files = TensorFiles(tmp_path)
    os.truncate(tmp_path / SINGLE, 900)
    with pytest.raises(DamagedFileError, match="became shorter"):
        files.array("a")


def test_nothing_there(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "absent", tmp_path / "absent.safetensors"):
        with pytest.raises(FileNotFoundError):
            TensorFiles(path)


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / SINGLE)
    with pytest.raises(DamagedFileError, match="not a regular file"):
        TensorFiles(tmp_path)


# Damaged files

DAMAGED = {
    "empty file": (b"", "too few"),
    "seven bytes": (b"\2\0\0\0\0\0\0", "too few"),
    "header beyond the file": (file_of({}, length=3), "claims a header of 3 bytes"),
    "header of 2**64 - 1": (file_of({}, length=2**64 - 1), "claims a header of 18446744073709551615"),
    "no header": (file_of(b""), "not a JSON object"),
    "not JSON": (file_of(b"{nope"), "not valid JSON"),
    "not an object": (file_of([]), "not a JSON object"),
    "space in front": (file_of(b" {}"), "not a JSON object"),
    "not UTF-8": (file_of(b'{"\xff": 1}'), "not valid JSON"),
    "half a surrogate pair": (file_of(rb'{"\ud800": {"dtype":"F32","shape":[0],"data_offsets":[0,0]}}'), "JSON"),
    "deep": (file_of(b'{"a":' * 200_000), "not valid JSON"),
    "deep list": (file_of(b'{"a":' + b"[" * 900 + b"]" * 900 + b"}"), "needs exactly|not valid JSON"),
    "a key twice": (
        file_of(b'{"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},"a":{"dtype":"U8"}}'),
        "'a' occurs twice",
    ),
    "a field twice": (file_of(b'{"a":{"dtype":"U8","dtype":"U8","shape":[0],"data_offsets":[0,0]}}'), "twice"),
    "metadata of numbers": (file_of({"__metadata__": {"a": 1}}), "must map strings"),
    "metadata no object": (file_of({"__metadata__": "a"}), "must map strings"),
    "entry no object": (file_of({"a": 3}), "'a': needs exactly"),
    "field missing": (file_of({"a": {"dtype": "F32", "shape": [0]}}), "needs exactly"),
    "unknown field": (file_of({"a": entry(stride=[1])}, b"8" * 8), "needs exactly"),
    "unknown dtype": (file_of({"a": entry("F33")}, b"8" * 8), "unknown dtype 'F33'"),
    "dtype no string": (file_of({"a": entry(["F32"])}, b"8" * 8), "unknown dtype"),
    "shape no list": (file_of({"a": entry(shape=2)}, b"8" * 8), "shape must be"),
    "shape of floats": (file_of({"a": entry(shape=[2.0])}, b"8" * 8), "no size or offset can be 2.0"),
    "shape of booleans": (file_of({"a": entry(shape=[True], offsets=[0, 4])}, b"4" * 4), "shape must be"),
    "shape of nulls": (file_of({"a": entry(shape=[None])}, b"8" * 8), "shape must be"),
    "negative size": (file_of({"a": entry(shape=[-1, -2])}, b"8" * 8), "can be -1"),
    "rank 65": (file_of({"a": entry(shape=[1] * 65, offsets=[0, 4])}, b"4" * 4), "at most 64"),
    "NaN": (file_of(b'{"a":{"dtype":"F32","shape":[NaN],"data_offsets":[0,0]}}'), "can be NaN"),
    "a number of 5000 digits": (file_of({"a": entry(shape=[int("9" * 4000)])}, b"8" * 8), "no size or offset"),
    "product overflows": (file_of({"a": entry(shape=[2**62, 2])}, b"8" * 8), "too large"),
    "product overflows but for a 0": (file_of({"a": entry(shape=[0, 2**62, 2], offsets=[0, 0])}), "too large"),
    "offsets swapped": (file_of({"a": entry(offsets=[8, 0])}, b"8" * 8), "data_offsets must be"),
    "one offset": (file_of({"a": entry(offsets=[8])}, b"8" * 8), "data_offsets must be"),
    "three offsets": (file_of({"a": entry(offsets=[0, 4, 8])}, b"8" * 8), "data_offsets must be"),
    "offsets of strings": (file_of({"a": entry(offsets=["0", "8"])}, b"8" * 8), "data_offsets must be"),
    "negative offset": (file_of({"a": entry(offsets=[-8, 0])}, b"8" * 8), "can be -8"),
    "offset of 2**64": (file_of({"a": entry(offsets=[2**64, 2**64 + 8])}, b"8" * 8), "no size or offset"),
    "offset beyond the file": (file_of({"a": entry(offsets=[2**62, 2**62 + 8])}, b"8" * 8), "leaves a gap"),
    "size and shape disagree": (file_of({"a": entry(shape=[3])}, b"8" * 8), "takes 12 bytes, data_offsets give it 8"),
    "truncated": (file_of({"a": entry()}, b"7" * 7), "cut short"),
    "bytes at the end": (file_of({"a": entry()}, b"9" * 9), "bytes behind the last tensor"),
    "bytes without tensors": (file_of({}, b"9" * 9), "bytes behind the last tensor"),
    "overlap": (file_of({"a": entry(), "b": entry(offsets=[4, 12])}, b"c" * 12), "'b' overlaps"),
    "the same place": (file_of({"a": entry(), "b": entry()}, b"8" * 8), "overlaps"),
    "nothing within a tensor": (file_of({"a": entry(), "b": entry(shape=[0], offsets=[4, 4])}, b"8" * 8), "overlaps"),
    "gap": (file_of({"a": entry(), "b": entry(offsets=[9, 17])}, b"c" * 17), "'b' leaves a gap"),
    "gap in front": (file_of({"a": entry(offsets=[1, 9])}, b"c" * 9), "'a' leaves a gap"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damage_is_named(tmp_path: Path, case: str) -> None:
    data, message = DAMAGED[case]
    file = tmp_path / SINGLE
    file.write_bytes(data)
    with pytest.raises(DamagedFileError, match=message) as caught:
        read_header(file)
    assert str(file) in str(caught.value) and len(str(caught.value)) < len(str(file)) + 500


def test_a_long_claim_costs_no_memory(tmp_path: Path) -> None:
    """A sparse file that is large enough for a header of the full size, and one beyond it."""
    file = tmp_path / SINGLE
    file.write_bytes((100_000_001).to_bytes(8, "little"))
    os.truncate(file, 1 << 31)
    with pytest.raises(DamagedFileError, match="the limit is 100000000"):
        read_header(file)


def check_any_bytes(file: Path, data: bytes) -> None:
    """Refused; or valid, and then the package thinks so too and reads the same."""
    file.write_bytes(data)
    try:
        files = TensorFiles(file)
    except DamagedFileError:
        return
    expected = theirs(data)
    assert files.tensors.keys() == expected.keys()
    for name, info in files.tensors.items():
        assert files.array(name).tobytes() == expected[name]["data"] == data[info.start : info.end]
        assert list(info.shape) == expected[name]["shape"]


@many
@given(st.binary(max_size=300))
def test_fuzz_random_bytes(tmp_path: Path, data: bytes) -> None:
    check_any_bytes(tmp_path / SINGLE, data)


@many
@given(st.binary(max_size=200), st.binary(max_size=30))
def test_fuzz_random_headers(tmp_path: Path, header: bytes, data: bytes) -> None:
    check_any_bytes(tmp_path / SINGLE, file_of(b"{" + header, data))


VALID = file_of(
    {
        "__metadata__": {"format": "pt"},
        "a": entry("F32", [2, 1], [0, 8]),
        "b": entry("BF16", [3], [8, 14]),
        "c": entry("F8_E4M3", [], [14, 15]),
        "none": entry("I64", [0, 7], [15, 15]),
    },
    bytes(range(15)),
)


@many
@given(
    st.lists(
        st.tuples(st.integers(0, len(VALID) - 1), st.integers(0, 3), st.binary(max_size=4)), min_size=1, max_size=3
    )
)
def test_fuzz_mutated_files(tmp_path: Path, edits: list[tuple[int, int, bytes]]) -> None:
    """Bytes removed, replaced and put in anywhere; the header's length as it was, and once again put right."""
    data = VALID
    for place, drop, new in edits:
        data = data[:place] + new + data[place + drop :]
    check_any_bytes(tmp_path / SINGLE, data)
    body = data[8:]
    check_any_bytes(tmp_path / SINGLE, len(body[: len(body) - 15]).to_bytes(8, "little") + body)


@many
@given(st.integers(0, len(VALID)))
def test_fuzz_truncated_files(tmp_path: Path, size: int) -> None:
    file = tmp_path / SINGLE
    file.write_bytes(VALID[:size])
    if size == len(VALID):
        assert len(read_header(file)[0]) == 4
    else:
        with pytest.raises(DamagedFileError):
            read_header(file)


@many
@given(st.integers(0, 2**64 - 1) | st.integers(0, 2 * len(VALID)))
def test_fuzz_lying_lengths(tmp_path: Path, length: int) -> None:
    check_any_bytes(tmp_path / SINGLE, length.to_bytes(8, "little") + VALID[8:])


whole = st.integers(0, 20) | st.sampled_from([2**31, 2**32, 2**61, 2**62, 2**63 - 1, 2**63, 2**64, 10**30, -1, -8])
json_values = st.recursive(
    st.none() | st.booleans() | whole | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)
entries = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from([*OURS, "F4", "F6_E2M3"]) | json_values,
        "shape": st.lists(whole, max_size=3) | json_values,
        "data_offsets": st.lists(whole, min_size=2, max_size=2) | json_values,
    }
)


@many
@given(st.dictionaries(st.text(max_size=3) | st.just("__metadata__"), entries | json_values, max_size=4), st.binary())
def test_fuzz_lying_headers(tmp_path: Path, header: dict, data: bytes) -> None:
    check_any_bytes(tmp_path / SINGLE, file_of(header, data))


@many
@given(
    st.lists(st.tuples(st.sampled_from(sorted(OURS)), st.lists(st.integers(0, 3), max_size=3)), min_size=1, max_size=4),
    st.integers(0, 7),
    st.sampled_from([0, 0, 1, -1, 8, 2**62]),
    st.integers(0, 3),
)
def test_fuzz_offsets_that_are_nearly_right(tmp_path: Path, kinds: list, which: int, shift: int, extra: int) -> None:
    header, end = {}, 0
    for i, (kind, shape) in enumerate(kinds):
        start, end = end, end + int(np.prod(shape)) * np.dtype(OURS[kind]).itemsize
        header[f"t{i}"] = entry(kind, shape, [start, end])
    offsets = header[f"t{which // 2 % len(kinds)}"]["data_offsets"]
    offsets[which % 2] += shift
    right = shift == 0 and extra == 0
    data = file_of(header, bytes(end + extra))
    check_any_bytes(tmp_path / SINGLE, data)
    if right:
        assert read_header(tmp_path / SINGLE)[0].keys() == header.keys()


# Folders with an index


def sharded(folder: Path) -> tuple[str, str]:
    write(folder, {"a": np.ones(4), "b": np.zeros(4)}, max_shard_bytes=32)
    return "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def rewrite(folder: Path, **weight_map: Any) -> None:
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"] = {name: file for name, file in (index["weight_map"] | weight_map).items() if file != "gone"}
    (folder / INDEX).write_text(json.dumps(index))


def test_a_shard_is_missing(tmp_path: Path) -> None:
    _, second = sharded(tmp_path)
    (tmp_path / second).unlink()
    with pytest.raises(DamagedFileError, match=f"cannot read the shard '{second}': No such file"):
        TensorFiles(tmp_path)


def test_a_shard_is_damaged(tmp_path: Path) -> None:
    _, second = sharded(tmp_path)
    os.truncate(tmp_path / second, 100)
    with pytest.raises(DamagedFileError, match=second):
        TensorFiles(tmp_path)


def test_a_tensor_lies_in_another_shard(tmp_path: Path) -> None:
    first, second = sharded(tmp_path)
    rewrite(tmp_path, a=second, b=first)
    with pytest.raises(DamagedFileError, match=f"{first}: holds tensor 'a', but the index says '{second}'"):
        TensorFiles(tmp_path)


def test_a_tensor_is_in_two_shards(tmp_path: Path) -> None:
    first, second = sharded(tmp_path)
    (tmp_path / second).unlink()
    safetensors.numpy.save_file({"a": np.ones(4), "b": np.ones(4)}, tmp_path / second)
    with pytest.raises(DamagedFileError, match=f"{second}: holds tensor 'a', but the index says '{first}'"):
        TensorFiles(tmp_path)


def test_a_tensor_is_not_in_the_index(tmp_path: Path) -> None:
    first, second = sharded(tmp_path)
    (tmp_path / second).unlink()
    safetensors.numpy.save_file({"b": np.ones(4), "c": np.ones(4)}, tmp_path / second)
    with pytest.raises(DamagedFileError, match="holds tensor 'c', but the index does not list it"):
        TensorFiles(tmp_path)


def test_a_tensor_is_in_no_shard(tmp_path: Path) -> None:
    first, _ = sharded(tmp_path)
    rewrite(tmp_path, c=first)
    with pytest.raises(DamagedFileError, match=f"{first}: lacks tensor 'c'"):
        TensorFiles(tmp_path)


@pytest.mark.parametrize(
    "file",
    ["../x", "../x.safetensors", "/etc/passwd", "sub/x", "..", ".", "", "..\\x", "C:x", "a\0b", 3, None, ["x"]],
)
def test_an_index_cannot_lead_out_of_its_folder(tmp_path: Path, file: Any) -> None:
    folder = tmp_path / "model"
    sharded(folder)
    safetensors.numpy.save_file({"c": np.ones(4)}, tmp_path / "x.safetensors")
    rewrite(folder, c=file)
    with pytest.raises(DamagedFileError, match=r"weight_map\['c'\] must be the name of a file in this folder"):
        TensorFiles(folder)


def test_a_shard_with_an_impossible_name(tmp_path: Path) -> None:
    sharded(tmp_path)
    rewrite(tmp_path, c="x" * 5000)
    with pytest.raises(DamagedFileError, match="cannot read the shard"):
        TensorFiles(tmp_path)


@pytest.mark.parametrize(
    "index, message",
    [
        (b"", "not valid JSON"),
        (b"[]", "not a JSON object"),
        (b"{}", "weight_map must be an object"),
        (b'{"weight_map": []}', "weight_map must be an object"),
        (b'{"weight_map": {"a": "x", "a": "y"}}', "'a' occurs twice"),
        (b'{"weight_map": {"a": "\\ud800"}}', "not valid JSON"),
        (b"\xff", "not valid JSON"),
        (b'{"weight_map": {"a": "../x"}}', "must be the name"),
    ],
)
def test_a_damaged_index(tmp_path: Path, index: bytes, message: str) -> None:
    (tmp_path / INDEX).write_bytes(index)
    with pytest.raises(DamagedFileError, match=message):
        TensorFiles(tmp_path)


@many
@given(st.binary(max_size=60) | json_values.map(lambda v: json.dumps({"weight_map": v}).encode()))
def test_fuzz_indices(tmp_path: Path, index: bytes) -> None:
    (tmp_path / INDEX).write_bytes(index)
    with contextlib.suppress(DamagedFileError):
        assert TensorFiles(tmp_path).tensors == {}


def test_one_model_in_two_forms_is_ambiguous(tmp_path: Path) -> None:
    sharded(tmp_path)
    safetensors.numpy.save_file({"a": np.ones(4)}, tmp_path / SINGLE)
    with pytest.raises(DamagedFileError, match="has both"):
        TensorFiles(tmp_path)


def test_an_index_of_the_single_file_and_what_others_write_into_one(tmp_path: Path) -> None:
    write(tmp_path, {"a": np.ones(4)})
    index = {"metadata": {"total_size": 3.2e1, "extra": None}, "weight_map": {"a": SINGLE}}
    (tmp_path / INDEX).write_text(json.dumps(index))
    (tmp_path / "consolidated.safetensors").write_bytes(b"another program's")
    assert list(TensorFiles(tmp_path).tensors) == ["a"]


def test_shards_may_be_links_as_in_the_hubs_cache(tmp_path: Path) -> None:
    folder = tmp_path / "snapshot"
    first, _ = sharded(folder)
    (folder / first).rename(tmp_path / "blob")
    (folder / first).symlink_to(tmp_path / "blob")
    assert_same(TensorFiles(folder), {"a": np.ones(4), "b": np.zeros(4)})
