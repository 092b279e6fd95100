"""Imports only go down: a module imports from its own floor or from one below it, and nothing in a circle.

Those inside functions count as well: they would hide a circle, not break it.
"""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parents[1]
FLOORS = {  # DESIGN's table; a place that is not here has no floor yet, which is an error
    "deepseek_kernels": 0,
    **dict.fromkeys(("deepseek_jax.parallel", "deepseek_jax.config", "deepseek_jax.compute", "deepseek_jax.typed"), 1),
    **dict.fromkeys(("deepseek_jax.hf_config", "deepseek_jax.hf_families", "deepseek_jax.hf_fields"), 1),
    **dict.fromkeys(("deepseek_jax.hf_quantisation", "deepseek_jax.hf_rotary"), 1),
    **dict.fromkeys(("deepseek_jax.files", "deepseek_jax.saying"), 1),
    "deepseek_jax.model": 2,
    **dict.fromkeys(("deepseek_jax.checkpoint", "deepseek_jax.data"), 3),
    **dict.fromkeys(("deepseek_jax.train", "deepseek_jax.inference"), 4),
    **dict.fromkeys(("deepseek_jax.rl", "deepseek_jax.evals"), 5),
    **dict.fromkeys(("deepseek_jax.workflows", "deepseek_jax.serve"), 6),
    "deepseek_jax.cli": 7,
}


def modules() -> dict[str, Path]:
    found = {}
    for folder in (ROOT / "deepseek_jax", ROOT / "kernels" / "deepseek_kernels"):
        for path in folder.rglob("*.py"):
            parts = path.relative_to(folder.parent).with_suffix("").parts
            found[".".join(parts).removesuffix(".__init__")] = path
    return found


def imports(path: Path, known: dict[str, Path]) -> set[str]:
    """The project's modules that a file names in an import, wherever it stands."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}:{node.lineno}: a relative import"
            whole = node.module or ""
            names |= {full if (full := f"{whole}.{alias.name}") in known else whole for alias in node.names}
    return names & set(known)


KNOWN = modules()
GRAPH = {name: imports(path, KNOWN) for name, path in KNOWN.items()}


def room(module: str) -> str:
    return ".".join(module.split(".")[: 1 if module.startswith("deepseek_kernels") else 2])


def test_imports_only_go_down() -> None:
    """``deepseek_jax`` itself, which lends its public names, stands on top of what it names: nobody imports it."""
    up = [
        f"{name} (floor {FLOORS[room(name)]}) imports {other}"
        for name, others in GRAPH.items()
        for other in others
        if name != "deepseek_jax" and (other == "deepseek_jax" or FLOORS[room(other)] > FLOORS[room(name)])
    ]
    assert not up, "\n".join(sorted(up))


def test_no_circles() -> None:
    """CycleError names one: of modules, or of rooms, where each may be right by itself."""
    TopologicalSorter(GRAPH).prepare()
    rooms: dict[str, set[str]] = {}
    for name, others in GRAPH.items():
        rooms.setdefault(room(name), set()).update({room(other) for other in others} - {room(name)})
    TopologicalSorter(rooms).prepare()
