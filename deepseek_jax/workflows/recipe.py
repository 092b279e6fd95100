"""Recipes: Python files with a docstring and a function ``config()`` that returns a stage's configuration.

One that is of several stages, each a field, gives a single one too: RECIPE:FIELD.
"""

import dataclasses
import difflib
import importlib.util
import json
import re
import sys
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

PACKAGE = Path(__file__).resolve().parents[1]


def recipe_folders() -> list[Path]:
    """Where recipes are looked for by name: ``configs/`` here, of the checkout, and of the installed package."""
    return [folder for folder in (Path("configs"), PACKAGE.parent / "configs", PACKAGE / "configs") if folder.is_dir()]


def find_recipe(name: str) -> Path:
    """The file behind ``demo/pretrain`` or ``path/to/recipe.py``. ValueError lists what there is."""
    path = Path(name)
    if path.suffix == ".py" and path.is_file():
        return path
    for folder in (Path(), *recipe_folders()):
        found = folder / path.with_suffix(".py")
        if found.is_file():
            return found
    known = sorted(
        {
            file.relative_to(folder).with_suffix("").as_posix()
            for folder in recipe_folders()
            for file in folder.rglob("*.py")
        }
    )
    likely = "".join(f"did you mean {near}? " for near in difflib.get_close_matches(name, known, n=1))
    raise ValueError(f"no recipe {name!r}: {likely}give a Python file, or one of {', '.join(known) or 'none'}")


def load_recipe(name: str, kind: type) -> Any:
    """The configuration that a recipe gives, or its field where ``name`` is RECIPE:FIELD, which must be a ``kind``.

    ValueError says what a recipe needs.
    """
    name, _, field = name.partition(":")
    path = find_recipe(name)
    module_name = f"deepseek_jax_recipe_{path.stem}"
    spec = importlib.util.spec_from_file_location(module_name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module  # tyro resolves annotations through it
    try:
        spec.loader.exec_module(module)
        if not callable(getattr(module, "config", None)):
            raise ValueError("it defines no function config()")
        config = module.config()
    except SyntaxError as error:
        raise ValueError(f"{path} is no recipe: {error.msg} in line {error.lineno}") from error
    except Exception as error:  # a recipe is a program: whatever it raises is told with its line
        raise ValueError(f"{path} is no recipe: {_said(error, path)}") from error
    stages = _stages(config)
    if field and field not in stages:
        raise ValueError(f"{path} has no stage {field!r}; it has {', '.join(stages) or 'none'}")
    found = stages[field] if field else config
    if field and "pretrain" in stages and (base := getattr(config, "base", "")):  # which stands in its place
        found = moved(found, stages["pretrain"].run_dir, base)
    if not isinstance(found, kind):
        fitting = "".join(f", as {name}:{each} is" for each in stages if isinstance(stages[each], kind))
        raise ValueError(f"{path} gives a {type(found).__name__}; this command takes a {kind.__name__}{fitting}")
    return found


def _stages(config: Any) -> dict[str, Any]:
    """The fields of a recipe that are configurations of their own."""
    fields = dataclasses.fields(config) if dataclasses.is_dataclass(config) else ()
    return {each.name: value for each in fields if dataclasses.is_dataclass(value := getattr(config, each.name))}


def _said(error: Exception, path: Path) -> str:
    """The error, its type where that is no ValueError, and the recipe's line that it came from."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
    what = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
    return f"{what} in line {lines[-1]}" if lines else what


def as_now(saved: Mapping[str, Any], settings: Mapping[str, Any], config: Any) -> dict[str, Any]:
    """The ``saved`` settings of a run, as they would stand if it had been made by this release where it lies now, to be
    compared with its ``settings`` of today, whose recipe ``config`` is: a field that there was not has its default, and
    a path is today's where they differ by no more than the move of the folder that the run lies in.
    """
    if "recipe" not in saved:
        return dict(saved)
    there = {**saved, "recipe": _with_defaults(saved["recipe"], config)}
    old, new = (str(Path(place).parent) for place in (saved["recipe"]["run_dir"], config.run_dir))

    def follow(was: Any, now: Any) -> Any:
        if isinstance(was, dict) and isinstance(now, dict):
            return {name: follow(value, now.get(name)) for name, value in was.items()}
        if isinstance(was, list) and isinstance(now, list) and len(was) == len(now):
            return [follow(*pair) for pair in zip(was, now, strict=True)]
        return now if isinstance(was, str) and moved(was, old, new) == now else was

    return follow(*(json.loads(json.dumps(tree)) for tree in (there, settings)))


def _with_defaults(saved: Mapping[str, Any], config: Any) -> dict[str, Any]:
    """The settings, with the defaults of fields that the class of ``config`` has and they have not."""
    found = dict(saved)
    for field in dataclasses.fields(config):
        value, was = getattr(config, field.name), saved.get(field.name, field.default)
        if dataclasses.is_dataclass(was):
            was = dataclasses.asdict(cast(Any, was))
        elif dataclasses.is_dataclass(value) and isinstance(was, dict):
            was = _with_defaults(was, value)
        if was is not dataclasses.MISSING:
            found[field.name] = was
    return found


def moved(config: Any, old: str, new: str) -> Any:
    """The same configuration with every path under ``old`` put under ``new``, those of reward models too."""
    under = re.compile(rf"(model:)?{re.escape(old)}(?=/|$)")

    def move(value: Any) -> Any:
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            fields = {field.name: move(getattr(value, field.name)) for field in dataclasses.fields(value) if field.init}
            return dataclasses.replace(value, **fields)
        if isinstance(value, tuple):
            return tuple(move(item) for item in value)
        if isinstance(value, str) and (found := under.match(value)):
            return (found.group(1) or "") + new + value[found.end() :]
        return value

    return move(config)
