"""Random weights by name, the same for transformers, for the golden files and for us: numpy alone, no other state."""

import zlib
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file


def draw(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Weights of size 0.2; gains around one; biases, the routing bias too, around zero."""
    noise = 0.2 * np.random.default_rng(zlib.crc32(name.encode())).standard_normal(tuple(shape))
    return (1 + noise if "norm" in name else noise).astype(np.float32)


def redraw(folder: Path) -> dict[str, list[int]]:
    """Draw anew every tensor of a folder's model.safetensors; returns their shapes."""
    file = folder / "model.safetensors"
    shapes = {name: list(value.shape) for name, value in load_file(file).items()}
    write(folder, shapes)
    return shapes


def write(folder: Path, shapes: dict[str, list[int]]) -> None:
    tensors = {name: draw(name, tuple(shape)) for name, shape in shapes.items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
