"""The small JSON files about text beside a released model's weights: special tokens, stop tokens, chat template."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from deepseek_jax.data.template import ChatTemplate

TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


def read_json_object(file: Path) -> dict[str, Any]:
    """A file that may be missing ({} then). ValueError: not a JSON object."""
    if not file.is_file():
        return {}
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}: not JSON ({error})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file}: holds a {type(content).__name__}, not an object")
    return content


def token_text(config: Mapping[str, Any], name: str) -> str | None:
    """`bos_token` and the like, spelled as a text or as {"content": text}; None where null or absent."""
    value = config.get(name)
    if isinstance(value, Mapping):
        value = value.get("content")
    if (value is None and config.get(name) is not None) or not isinstance(value, str | None):
        raise ValueError(f"tokenizer_config.json: {name}={config[name]!r} is neither a text nor one with 'content'")
    return value


def read_stop_ids(folder: Path) -> list[int]:
    """`eos_token_id` of generation_config.json: none, a number or a list."""
    file = folder / "generation_config.json"
    ids = read_json_object(file).get("eos_token_id")
    ids = [] if ids is None else ids if isinstance(ids, list) else [ids]
    if not all(type(i) is int and i >= 0 for i in ids):
        raise ValueError(f"{file}: eos_token_id={ids} is neither an id nor a list of ids")
    return ids


def read_template(folder: Path, config: Mapping[str, Any]) -> ChatTemplate | None:
    """The chat template in a model's folder, or None where it has none. config: its tokenizer_config.json.

    `chat_template.jinja` comes before `chat_template` in the config, which is a text or a list of
    `{"name", "template"}`: `default`, and `tool_use` where tools are given.
    """
    named = _named_templates(config.get("chat_template"))
    for name, file in (("default", "chat_template"), ("tool_use", "additional_chat_templates/tool_use")):
        path = folder / f"{file}.jinja"
        if path.is_file():
            named[name] = path.read_text(encoding="utf-8")
    if not named:
        return None
    if "default" not in named:
        raise ValueError(f"{folder}: no chat template is named 'default', only {', '.join(map(repr, named))}")
    tokens = {name: text for name in TOKENS if (text := token_text(config, name)) is not None}
    return ChatTemplate(named["default"], tokens, tool_source=named.get("tool_use"))


def _named_templates(value: Any) -> dict[str, str]:
    entries = [] if value is None else [{"name": "default", "template": value}] if isinstance(value, str) else value
    try:
        named = {entry["name"]: entry["template"] for entry in entries}
    except (TypeError, KeyError) as error:
        raise ValueError("chat_template is neither a text nor a list of {'name', 'template'}") from error
    for name, source in named.items():
        if not isinstance(source, str):
            raise ValueError(f"chat_template {name!r} is a {type(source).__name__}, not a text")
    return named
