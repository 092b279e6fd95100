"""Datasets of the Hugging Face hub as if they were files: `hf:NAME:SPLIT` or `hf:NAME:CONFIG:SPLIT`.

NAME is a dataset's name there or a folder here. The package `datasets` downloads it once into its own cache, which
serves without a network afterwards; rows are read from disk as they are asked for.
"""

import functools
from typing import Any

_PREFIX = "hf:"


def is_hub(path: str) -> bool:
    return path.startswith(_PREFIX)


def describe(path: str) -> dict[str, int | str]:
    """About how many bytes it has, and its fingerprint, in the form that files are told apart by."""
    dataset = load(path)
    return {"bytes": dataset.dataset_size or 1000 * len(dataset), "sha256": str(dataset._fingerprint)}


@functools.lru_cache(maxsize=8)
def load(path: str) -> Any:
    """The dataset: `len`, and dicts by index. ValueError: not spelled so, not to be had, or no package `datasets`."""
    parts = path.removeprefix(_PREFIX).split(":")
    if len(parts) not in (2, 3) or not all(parts):
        raise ValueError(f"{path}: expected hf:NAME:SPLIT or hf:NAME:CONFIG:SPLIT, as in hf:gsm8k:main:train")
    try:
        import datasets  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ValueError(f'{path}: needs the package datasets: pip install "deepseek-jax[datasets]"') from error
    name, *config, split = parts
    try:
        dataset = datasets.load_dataset(name, *config, split=split)
    except Exception as error:  # a network, a name, a format: the library has a kind for each
        raise ValueError(f"{path}: could not be loaded ({type(error).__name__}: {error})") from error
    return dataset
