"""One process at a time in a run's folder, whatever became of the one before."""

import errno
import fcntl
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from deepseek_jax.train import run_lock as module
from deepseek_jax.train.run_lock import LOCK, is_held, run_lock

# Loaded by its path: a process that imports no jax starts at once. Its child must not keep the lock.
HOLDER = """
import importlib.util, os, subprocess, sys, time
spec = importlib.util.spec_from_file_location("run_lock", sys.argv[1])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
with module.run_lock(sys.argv[2]):
    if not os.fork():
        time.sleep(30)
        os._exit(0)
    print("held", flush=True)
    time.sleep(30)
"""


@pytest.fixture
def holder(tmp_path):
    """Another process, with a child, that trains in tmp_path/run."""
    command = [sys.executable, "-c", HOLDER, module.__file__, str(tmp_path / "run")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    yield process
    os.killpg(process.pid, 9)
    process.communicate()


def test_a_second_process_is_told_which_one_trains_there_until_that_is_killed(holder, tmp_path):
    folder = tmp_path / "run"
    (folder / "metrics.jsonl").write_text("{}\n")
    before = {path: path.read_bytes() for path in folder.iterdir()}
    says = rf"run: process {holder.pid} on \S+ has trained there since 2\d{{3}}-\d\d-\d\d [\d:]+ .*; wait for it, or"
    with pytest.raises(ValueError, match=says), run_lock(folder):
        pytest.fail("two processes in one folder")
    assert {path: path.read_bytes() for path in folder.iterdir()} == before
    assert is_held(folder)
    holder.kill()  # its child lives on
    holder.wait()
    assert not is_held(folder)
    with run_lock(folder):
        assert json.loads((folder / LOCK).read_text())["pid"] == os.getpid()
        assert is_held(folder)
    assert [path.name for path in folder.iterdir()] == ["metrics.jsonl"]


def test_this_process_itself_enters_once_and_leaves_no_empty_folder(tmp_path):
    with run_lock(tmp_path / "a" / "run"):
        os.symlink(tmp_path / "a", tmp_path / "link")
        with (
            pytest.raises(ValueError, match="link/run: this process trains there already"),
            run_lock(tmp_path / "link/run"),
        ):
            pytest.fail("entered twice")
    assert not (tmp_path / "a").exists()


def test_a_mount_without_locks_says_so_and_a_full_disk_names_the_file(tmp_path, monkeypatch, caplog):
    def fail(number):
        def call(*_):
            raise OSError(number, os.strerror(number))

        return call

    monkeypatch.setattr(fcntl, "lockf", fail(errno.ENOLCK))
    with run_lock(tmp_path / "run"):
        assert re.search(r"run: locks do not work there \(.*No locks available\): see that no other", caplog.text)
    monkeypatch.undo()
    monkeypatch.setattr(module.os, "ftruncate", fail(errno.ENOSPC))
    with pytest.raises(OSError, match=rf"No space left on device: '.*{LOCK}'"), run_lock(tmp_path / "run"):
        pass
    assert not (tmp_path / "run").exists()


def test_a_lock_file_that_its_holder_removes_meanwhile_is_no_lock(tmp_path, monkeypatch):
    """Opened before the holder ended, locked after: another process would make and lock a new file."""
    path, take = Path(tmp_path / LOCK), fcntl.lockf

    def late(descriptor, how):
        if path.read_bytes() == b"old":
            path.unlink()
        take(descriptor, how)

    path.write_bytes(b"old")
    monkeypatch.setattr(fcntl, "lockf", late)
    with run_lock(tmp_path):
        assert json.loads(path.read_text())["pid"] == os.getpid()
