"""What every test runs under: eight emulated CPU devices, one compilation cache, types checked.

Everything goes through the environment, before jax is imported, so that the programs that tests start (a
`deepseek-jax pretrain` that is killed, say) run under the same: one set of compiled programs serves all.
"""

import gc
import os
import signal
from importlib.metadata import version
from pathlib import Path

CACHE = Path(__file__).parents[1] / ".cache" / "jax"

ENVIRONMENT = {
    # On a GPU host, `TEST_ON=cuda pytest tests/kernels` runs the kernels on the card.
    "JAX_PLATFORMS": os.environ.get("TEST_ON", "cpu"),
    "JAX_NUM_CPU_DEVICES": "8",
    "JAX_ENABLE_X64": "0",
    "JAX_ENABLE_COMPILATION_CACHE": "1",
    # One folder for both xdist workers, the programs they start and the next run.
    "JAX_COMPILATION_CACHE_DIR": str(CACHE),
    # Small programs too: by default only what took a second to compile is kept.
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.05",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    # Compile quickly rather than well: a gradient's program takes a fifth of the time, with the same numbers.
    "XLA_FLAGS": "--xla_backend_optimization_level=0",
}
if version("jaxlib").startswith("0.10."):  # later ones do not know the flag, and abort
    ENVIRONMENT["XLA_FLAGS"] += " --xla_cpu_use_fusion_emitters=false"
# Tokens of corpora: not where the user keeps theirs.
ENVIRONMENT["XDG_CACHE_HOME"] = str(CACHE.parent / "home")
os.environ.update(ENVIRONMENT)

# A shell's background jobs ignore Ctrl-C, and so would all that they start, tests of Ctrl-C among it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

import jax  # noqa: E402
import pytest  # noqa: E402
from hypothesis import settings  # noqa: E402
from jaxtyping import install_import_hook  # noqa: E402

# The first example of a property compiles, the others do not: a deadline would only measure that. The
# examples are the same in every run, and none are kept: a red test is red for everyone.
settings.register_profile("repository", deadline=None, derandomize=True, database=None, max_examples=25)
settings.load_profile("repository")

# Shapes and types in annotations are checked at every call, in tests only.
install_import_hook(["deepseek_jax", "deepseek_kernels"], "typechecking.check_functions")

# Linux gives a process 65,530 mappings (vm.max_map_count); a compiled program takes four, and XLA ends the process by a
# segmentation fault where it gets none. The whole suite brings a worker there.
MAPPINGS = Path("/proc/self/maps")
MOST_MAPPINGS = 16_384


@pytest.fixture(autouse=True, scope="module")
def let_go_of_programs():
    """After a file of tests: compiled programs go where they are many (what is needed again is read from the cache)."""
    yield
    if MAPPINGS.exists() and MAPPINGS.read_bytes().count(b"\n") > MOST_MAPPINGS:
        jax.clear_caches()
        gc.collect()


def pytest_terminal_summary(terminalreporter) -> None:
    """One line about the tests whose data is no part of the repository."""
    reports = terminalreporter.stats.get("skipped", ())
    files = sorted({report.location[0] for report in reports if "shared/" in str(report.longrepr)})
    if files:
        terminalreporter.write_line(f"left out, for want of data in ../shared: {', '.join(files)}")
