"""A command as a process: Ctrl-C, pipes that close, encodings that lack characters."""

import os
import subprocess
import sys

from model.tiny import V3, config, weights, whole
from small import tokenizer

from deepseek_jax import save_hf

# A command that prints what Latin-1 lacks, and more than a pipe holds, and one that is interrupted where jax is
# imported: before anything of its own runs.
FAKE = """
import os, signal, sys, types
from deepseek_jax.cli import main as cli

class Interrupts:
    def find_spec(self, name, path=None, target=None):
        if name == "jax" and sys.argv[1] == "stopped":
            os.kill(os.getpid(), signal.SIGINT)

sys.meta_path.insert(0, Interrupts())
cli.COMMANDS |= {"prints": "fake", "stopped": "talk"}
sys.modules["deepseek_jax.cli.fake"] = types.SimpleNamespace(run_prints=lambda rest: print("→ é" + "x" * 200_000))
sys.exit(cli.main())
"""


def run(program: str, *arguments: str, **options) -> tuple[int, bytes, bytes]:
    process = subprocess.Popen(
        [sys.executable, "-W", "error", "-c", program, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=os.environ | options.pop("env", {}),
    )
    if options.pop("nobody_reads", False):
        assert process.stdout is not None
        process.stdout.close()
        process.stdout = None
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err


def test_what_cannot_be_shown_is_replaced():
    status, out, err = run(FAKE, "prints", env={"PYTHONIOENCODING": "latin-1"})
    assert (status, out[:4], err) == (0, "? éx".encode("latin-1"), b"")


def test_a_pipe_that_nobody_reads_is_no_error():
    status, _, err = run(FAKE, "prints", nobody_reads=True)
    assert (status, err) == (0, b"")


def test_ctrl_c_while_modules_are_imported_is_one_line():
    status, out, err = run(FAKE, "stopped")
    assert (status, out, err.strip()) == (130, b"", b"interrupted")


def test_ctrl_c_while_the_device_computes_is_one_line(tmp_path):
    """XLA's threads are at work when the process ends."""
    network = config(V3, num_hidden_layers=2, vocab_size=300, max_position_embeddings=1 << 20)
    save_hf(whole(network, *weights(network), tokenizer()), tmp_path / "m", dtype="float32")
    program = """
import os, signal, sys, threading, time
from deepseek_jax.cli.main import main
from deepseek_jax.inference.engine import Engine

generate = Engine.generate_ids
def stopped(*arguments, **options):
    out = generate(*arguments, **options)
    threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
    return out

Engine.generate_ids = stopped
sys.exit(main())
"""
    options = ["--prompt", "def", "--max-tokens", "1000000", "--temperature", "1"]
    status, out, err = run(program, "generate", str(tmp_path / "m"), *options)
    assert (status, out, err.strip()) == (130, b"", b"interrupted")


def test_an_answer_that_cannot_be_written_is_an_error():
    done = subprocess.run(["bash", "-c", f'{sys.executable} -c "$0" prints > /dev/full', FAKE], capture_output=True)
    assert done.returncode == 1
    assert done.stderr.splitlines()[0] == b"deepseek-jax prints: [Errno 28] No space left on device"
    assert len(done.stderr.splitlines()) == 2
