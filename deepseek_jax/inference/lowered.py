"""Programs as they are lowered ahead: by tracing, or out of a module that was made by it once."""

import contextlib
import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import jax
import jax.export
import jax.numpy as jnp

from deepseek_kernels import registry


class Program(NamedTuple):
    """A jitted function and what it is called with: ``function(*static, *arrays, **options)``."""

    function: Any
    static: tuple[Any, ...]
    arrays: tuple[Any, ...]
    options: dict[str, Any]
    donated: int
    """Which of ``arrays``."""
    gives: Any
    """The structure of its result."""
    compiler: dict[str, Any] | None
    """The function's own ``compiler_options``."""

    def lower(self) -> jax.stages.Lowered:
        """By tracing it."""
        return self.function.lower(*self.static, *self.arrays, **self.options)


class Module(NamedTuple):
    """What ``jax.export`` makes of a program. outputs: shapes and dtypes. used: which of its arguments it takes. said:
    of its kernels which are slow, and why, with the level that it is logged at."""

    code: bytes
    outputs: list[tuple[list[int], str]]
    used: list[int]
    said: dict[str, int]


def exported(program: Program, platform: str) -> Module:
    """By tracing it. ValueError or NotImplementedError where ``jax.export`` does not take it, or what is wrong with the
    program itself."""
    # Custom calls may change from one jax to another: a module is for this one alone.
    unchecked = [jax.export.DisabledSafetyCheck.custom_call("ALL")]
    with _as_it_is(), registry.listening() as said:
        export = jax.export.export(program.function, platforms=[platform], disabled_checks=unchecked)
        found = export(*program.static, *program.arrays, **program.options)
    outputs = [(list(out.shape), str(out.dtype)) for out in found.out_avals]
    module = Module(bytes(found.mlir_module_serialized), outputs, list(found.module_kept_var_idx), said)
    frame = _frame(program, module, platform)
    names = "in_avals", "out_avals", "nr_devices", "platforms", "ordered_effects", "unordered_effects"
    for name in (*names, "uses_global_constants", "calling_convention_version"):
        if getattr(found, name) != getattr(frame, name):
            raise ValueError(f"{name} would be {getattr(frame, name)} in place of {getattr(found, name)}")
    if found.out_tree != program.gives:
        raise ValueError(f"results would be {program.gives} in place of {found.out_tree}")
    return module


def called(program: Program, module: Module, platform: str) -> jax.stages.Lowered:
    """The program, of which nothing is traced but a call of the module."""
    frame = _frame(program, module, platform)
    inside = dataclasses.replace(frame, mlir_module_serialized=module.code, module_kept_var_idx=tuple(module.used))

    def call(*arrays):
        return jax.tree.unflatten(program.gives, inside.call(*jax.tree.leaves(arrays)))

    call.__name__ = call.__qualname__ = program.function.__name__
    return jax.jit(call, donate_argnums=program.donated, compiler_options=program.compiler).lower(*program.arrays)


def holding(kind: Any) -> Any:
    """A dataclass with numbers in the place of arrays, for its structure."""
    return kind(*range(len(dataclasses.fields(kind))))


def check_dtypes(dtypes: Iterable[Any]) -> None:
    """ValueError for weights that no program which is compiled ahead takes."""
    if jax.__version_info__ < (0, 11) and jnp.int4 in dtypes:
        raise ValueError(
            f"weights in int4, jax {jax.__version__}: its programs that are compiled ahead take none; requests as they "
            "come need jax 0.11 for them, or weights in int8; answered together, as by generate and eval --batching "
            "together, they may stay"
        )


def _frame(program: Program, module: Module, platform: str) -> jax.export.Exported:
    """A program with these arguments and results that does nothing: all that ``jax.export`` knows beside the module.
    (Its own format for that takes a package, flatbuffers, which jax does not bring.)"""

    def nothing(*arrays):
        return [jnp.zeros(shape, dtype) for shape, dtype in module.outputs]

    return jax.export.export(jax.jit(nothing, keep_unused=True), platforms=[platform])(*jax.tree.leaves(program.arrays))


@contextlib.contextmanager
def _as_it_is() -> Iterator[None]:
    """Lowered as ``jit`` does it, not as older versions of jax could read it."""
    name = "jax_export_ignore_forward_compatibility"
    before = jax.config.values[name]
    jax.config.update(name, True)
    try:
        yield
    finally:
        jax.config.update(name, before)
