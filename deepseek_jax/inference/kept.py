"""Programs as they were lowered, kept from one start to the next: a second one traces nothing.

jax keeps what it compiled, but asks for it by the lowered program: without this file every start traces and lowers all
again, of which a GPU's kernels are most. Here ``jax.export``'s module is written to a folder of jax's own cache, and
what was found is called in the place of the function; who finds nothing makes the module, writes it, and calls it in
the same way, so that both compile the very same program. What decides a program is its name (``Kept``); no tree of
Python's is written, so nothing is unpickled: who asks knows how arguments and results are put together.
"""

import contextlib
import functools
import hashlib
import importlib.metadata
import json
import logging
import os
import platform
import secrets
import zlib
from pathlib import Path

import jax
from jax.sharding import Mesh

from deepseek_jax.inference.lowered import Module, Program, called, exported
from deepseek_kernels import cpu, registry
from deepseek_kernels.target import Target

logger = logging.getLogger(__name__)

FOLDER = "deepseek-jax-lowered"  # in jax_compilation_cache_dir
MOST = 2**30  # bytes of it, of which those read last stay
_HEAD = b"deepseek-jax lowered 1\n"
_PACKAGES = (
    *("jax", "jaxlib", "flax", "numpy", "libtpu", "jax-cuda12-plugin", "jax-cuda13-plugin"),
    *("nvidia-cudnn-cu12", "nvidia-cudnn-cu13"),
)
_ENVIRONMENT = "XLA_", "LIBTPU_", "MOSAIC_", "TF_XLA_"  # beginnings of what compilers read
# Of jax's settings those that say where things lie, and our own.
_ELSEWHERE = "jax_compilation_cache", "jax_persistent_cache", "jax_cross_host", "jax_dump", "jax_export_ignore"


class Kept:
    """A folder of lowered programs for a mesh. Call it with the mesh entered.

    A program's name is a hash of all that decides it: this project's sources and C kernels, the versions of jax and of
    what lies below, jax's settings and the compilers' in the environment, the mesh and its kind of device, the function
    with its configurations and options, and of each argument place, shape, dtype, sharding and layout.
    """

    def __init__(self, folder: Path, mesh: Mesh):
        self.folder, self._said, self._grown = folder, False, False
        device = mesh.devices.flat[0]
        self._platform = Target.of(device).platform
        self._about = repr(
            (
                _SOURCES,
                cpu.registered() if self._platform == "cpu" else "",
                platform.python_version(),
                [(name, _version(name)) for name in _PACKAGES],
                sorted((name, str(value)) for name, value in jax.config.values.items() if _decides(name)),
                sorted((name, value) for name, value in os.environ.items() if name.startswith(_ENVIRONMENT)),
                (device.platform, device.device_kind, device.client.platform_version),
                (jax.process_count(), dict(mesh.shape), [(each.process_index, each.id) for each in mesh.devices.flat]),
            )
        )

    @classmethod
    def of(cls, mesh: Mesh) -> "Kept | None":
        """In the folder of jax's compiled programs; None where these are not kept, or not in a folder."""
        settings = jax.config.values
        folder = settings["jax_compilation_cache_dir"]
        if not folder or not settings["jax_enable_compilation_cache"]:
            return None
        if "://" in folder:
            logger.warning("lowered programs: each start traces its own; they are kept in folders, not at %s", folder)
            return None
        return cls(Path(folder) / FOLDER, mesh)

    def lowered(self, program: Program) -> jax.stages.Lowered:
        """The program as it is kept, or else kept from now on; where that cannot be, as ``program.lower`` has it."""
        file = self.folder / f"{program.function.__name__}-{self._name(program)}"
        module = self._read(file)
        if module is None:
            module = self._exported(program)
            if module is None:
                return program.lower()
            self._write(file, module)
        for what, level in module.said.items():  # which tracing it has said, if it was traced
            registry.say(level, what)
        return called(program, module, self._platform)

    def close(self) -> None:
        """Remove what nobody has read for longest, where programs were added and are too many."""
        if not self._grown:
            return
        with contextlib.suppress(OSError):  # another process does the same
            files = sorted(((file.stat(), file) for file in self.folder.iterdir()), key=lambda each: -each[0].st_mtime)
            total = 0
            for about, file in files:
                total += about.st_size
                if total > MOST:
                    file.unlink(missing_ok=True)

    def _name(self, program: Program) -> str:
        leaves, structure = jax.tree.flatten(program.arrays)
        arrays = [
            (x.shape, str(x.dtype), getattr(x, "weak_type", False), str(getattr(x, "format", None))) for x in leaves
        ]
        function = f"{program.function.__module__}.{program.function.__qualname__}"
        given = function, program.static, sorted(program.options.items()), program.donated, program.compiler
        return hashlib.sha256(repr((self._about, given, str(structure), arrays)).encode()).hexdigest()

    def _exported(self, program: Program) -> Module | None:
        try:
            return exported(program, self._platform)
        except Exception as error:  # whatever ``jax.export`` has against it; the program's own errors ``lower`` tells
            self._say(f"{program.function.__name__} cannot be kept: jax {jax.__version__}: {error}")
            return None

    def _read(self, file: Path) -> Module | None:
        try:
            content = file.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            self._say(f"{file}: cannot be read ({error.strerror or error}): traced anew")
            return None
        head, rest = content[: len(_HEAD) + 32], content[len(_HEAD) + 32 :]
        if head != _HEAD + hashlib.sha256(rest).digest():
            self._say(f"{file}: damaged: traced anew")
            return None
        with contextlib.suppress(OSError):  # another user's
            os.utime(file)
        about, _, code = rest.partition(b"\n")
        return Module(zlib.decompress(code), **json.loads(about))

    def _write(self, file: Path, module: Module) -> None:
        """All or nothing, also where others write the same."""
        about = json.dumps({name: value for name, value in module._asdict().items() if name != "code"}).encode()
        rest = about + b"\n" + zlib.compress(module.code, 1)
        half = file.with_name(f"{file.name}-{secrets.token_hex(8)}")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            half.write_bytes(_HEAD + hashlib.sha256(rest).digest() + rest)
            os.replace(half, file)
            self._grown = True
        except OSError as error:
            with contextlib.suppress(OSError):  # a full disk has room for the beginning
                half.unlink()
            self._say(f"{self.folder}: cannot be written ({error.strerror or error}): each start traces")

    def _say(self, what: str) -> None:
        if not self._said:
            logger.warning("lowered programs: %s", what)
        self._said = True


def _decides(name: str) -> bool:
    return not name.startswith(_ELSEWHERE)


def _sources() -> str:
    """Of this project, as they lie there."""
    digest = hashlib.sha256()
    for folder in (Path(__file__).parents[1], cpu.SOURCE.parent):
        for file in sorted(folder.rglob("*")):
            if file.suffix in (".py", ".c", ".h"):
                content = file.read_bytes()
                digest.update(f"{file.relative_to(folder)} {len(content)}\n".encode() + content)
    return digest.hexdigest()


@functools.cache
def _version(package: str) -> str:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(package)
    return ""


_SOURCES = _sources()  # as they are imported: who changes them while this process runs gets no old program as new
