"""Where in a folder a model lies, and what to say where none does."""

import json
import re
from collections.abc import Iterable
from pathlib import Path

from deepseek_jax.checkpoint.places import Folder, committed_steps, resolved

CHECKPOINTS = "checkpoints"  # the folder of a run that holds them
STAGES = ("grpo", "sft", "pretrain")  # of a demo, the last first
_LISTED = 5
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def is_released(path: str | Path) -> bool:
    """Whether this is a model as released: config.json beside safetensors that are no adapter's."""
    weights = (file for file in Path(path).glob("*.safetensors") if not file.name.startswith("adapter_"))
    return (Path(path) / "config.json").is_file() and any(weights)


def find_model(path: str | Path) -> Path:
    """The folder that holds the model which ``path`` names: itself, or of a demo the last stage that has one; not of a
    folder that holds other runs too.

    FileNotFoundError says what is there instead, and what to do about it.
    """
    folder = expanded(path)
    if is_released(folder) or checkpoint_steps(folder / CHECKPOINTS):
        return folder
    within = folder.iterdir() if folder.is_dir() else ()
    runs = {each.name for each in within if checkpoint_steps(each / CHECKPOINTS)}
    if runs and runs <= {*STAGES}:
        return folder / next(stage for stage in STAGES if stage in runs)
    raise FileNotFoundError(f"{path} {_instead(folder)}")


def described(path: str | Path, step: int | None = None) -> str:
    """The model that ``path`` names, for who reads it: of a run also which step, and whether more may come."""
    folder = find_model(path)
    steps = [] if is_released(folder) else checkpoint_steps(folder / CHECKPOINTS)
    if not steps:
        return str(folder)
    unfinished = "" if (folder / "result.json").exists() else " of a run that has not finished"
    return f"{folder}, step {step or steps[-1]}{unfinished}"


def checkpoint_steps(directory: Folder) -> list[int]:
    """The committed steps in a run's folder of checkpoints, or where it says they are, oldest first."""
    return committed_steps(resolved(directory))


def expanded(path: str | Path) -> Path:
    """The path, with a ``~`` that no shell has expanded, as in ``--init-from=~/model``. ValueError for a URL."""
    if "://" in str(path):
        raise ValueError(f"{path}: a model's or a run's folder is local or mounted, no URL: copy it first")
    return Path(path).expanduser() if str(path).startswith("~") and not Path(path).exists() else Path(path)


def _instead(path: Path) -> str:
    """What is at a path where no model is."""
    if not path.exists():
        if _HUB_ID.fullmatch(str(path)) and not path.parent.exists():
            return (
                "does not exist; if it names a model of the Hugging Face hub: "
                f"hf download {path} --local-dir FOLDER, and give FOLDER"
            )
        return "does not exist"
    if path.is_file():
        if path.suffix == ".gguf":
            return "is a GGUF file, llama.cpp's own format: give the folder of safetensors that it was made from"
        return "is a file: give the folder of the model"
    names = sorted(entry.name for entry in path.iterdir())
    held = {Path(name).suffix for name in names}
    if "adapter_config.json" in names:
        base = _base_of(path / "adapter_config.json")
        return (
            f"is a LoRA adapter to {base}, and no model: merge it (peft's merge_and_unload(), then save_pretrained) "
            "and give the merged folder"
        )
    if "snapshots" in names:
        snapshots = (f"snapshots/{entry.name}" for entry in sorted((path / "snapshots").iterdir()))
        return f"is a hub cache's top folder: give the model in it, {_list(snapshots, ' or ')}"
    if ".safetensors" in held:
        return "holds safetensors and no config.json, which says what network they are: put it beside them"
    if pickles := [name for name in names if Path(name).suffix in (".bin", ".pt", ".pth")]:
        return (
            f"holds its weights as pickle ({_list(pickles)}), which is never read here: have transformers write "
            "safetensors (from_pretrained, then save_pretrained)"
        )
    if ".gguf" in held:
        return "holds GGUF files, llama.cpp's own format: give the folder of safetensors that they were made from"
    if models := [name for name in names if is_released(path / name) or checkpoint_steps(path / name / CHECKPOINTS)]:
        return f"holds models in folders of their own: give one of them, {_list(models)}"
    if {"metrics.jsonl", CHECKPOINTS, *STAGES} & {*names}:
        return "holds a run that has saved no checkpoint yet: go on with it, or give another"
    if "config.json" in names:
        return "holds config.json and no safetensors: the weights are missing, as after a download that was cut off"
    if not names:
        return "is empty"
    return f"holds neither a run's {CHECKPOINTS}/ nor config.json beside safetensors, but {_list(names)}"


def _list(names: Iterable[str], joint: str = ", ") -> str:
    names = [*names]
    return joint.join(names[:_LISTED]) + (", …" if len(names) > _LISTED else "")


def _base_of(file: Path) -> str:
    try:
        base = json.loads(file.read_text(encoding="utf-8")).get("base_model_name_or_path")
    except (ValueError, AttributeError):
        base = None
    return str(base or "another model")
