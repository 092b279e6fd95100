"""The files about text beside a model's weights: special tokens, stop tokens, chat template. They travel with it."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from deepseek_jax.data.template import ChatTemplate
from deepseek_jax.files import read_json_object, write_whole

TOKENIZER = "tokenizer.json"
TOKENS_MAP = "special_tokens_map.json"
GENERATION = "generation_config.json"
CONFIG = "tokenizer_config.json"
_TEMPLATE = "chat_template.jinja"
COMPANIONS = (
    CONFIG,
    TOKENS_MAP,
    "added_tokens.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    _TEMPLATE,
    GENERATION,
)
_MORE_TEMPLATES = "additional_chat_templates"
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
_DRAWING = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


@dataclasses.dataclass(frozen=True)
class TextFiles:
    """files: their bytes by name, tokenizer.json among them. ids: what the model's config.json says of special tokens,
    which is about text though it stands there."""

    files: Mapping[str, bytes]
    ids: Mapping[str, Any]

    @classmethod
    def read(cls, folder: Path) -> "TextFiles":
        """All that a model's folder, or a run's, has of them. FileNotFoundError: no such folder."""
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder}: no such folder to take the tokenizer from")
        found = [folder / name for name in (TOKENIZER, *COMPANIONS)]
        found += sorted((folder / _MORE_TEMPLATES).glob("*.jinja"))
        files = {file.relative_to(folder).as_posix(): file.read_bytes() for file in found if file.is_file()}
        ids: dict[str, Any] = {}
        for name in ("config.json", GENERATION):
            if not ids:  # a run's config.json says nothing of them
                ids = {key: value for key, value in read_json_object(folder / name).items() if key in TOKEN_IDS}
        return cls(files, ids)

    def stopping_at(self, stop_ids: Sequence[int]) -> "TextFiles":
        """These files, with `eos_token_id` set to `stop_ids` unless that is where transformers stops with them: by
        generation_config.json, and where there is none by config.json."""
        generation = json.loads(self.files.get(GENERATION, b"null"))
        said = _as_ids((self.ids if generation is None else generation).get("eos_token_id"))
        if not stop_ids or {*said} == {*stop_ids}:
            return self
        eos = {"eos_token_id": stop_ids[0] if len(stop_ids) == 1 else [*stop_ids]}
        changed = {} if generation is None else {GENERATION: json_bytes(generation | eos)}
        return TextFiles({**self.files, **changed}, {**self.ids, **eos})

    def with_padding(self) -> "TextFiles":
        """These files, with `pad_token_id` where they name a token to pad with that ends nothing: without one
        transformers' classifiers take batches of one alone, and by EOS they would read what stands before it."""
        named, backend = (json.loads(self.files.get(name, b"{}")) for name in (TOKENS_MAP, TOKENIZER))
        named |= json.loads(self.files.get(CONFIG, b"{}"))
        pad, eos = (token_text(named, name) for name in ("pad_token", "eos_token"))
        ids = {token["content"]: token["id"] for token in backend.get("added_tokens", ())}
        if self.ids.get("pad_token_id") is not None or pad == eos or pad not in ids:
            return self
        return TextFiles(self.files, {**self.ids, "pad_token_id": ids[pad]})

    def with_template(self, source: str) -> "TextFiles":
        """These files with this chat template in the place of all that they have."""
        files = {name: content for name, content in self.files.items() if not name.startswith(_MORE_TEMPLATES)}
        config = json.loads(files.get(CONFIG, b"{}"))
        config.pop("chat_template", None)
        return TextFiles({**files, CONFIG: json_bytes(config), _TEMPLATE: source.encode()}, self.ids)

    def write(self, folder: Path) -> None:
        """Each file whole or not at all, tokenizer.json last. Without a generation_config.json the ids make one."""
        files = dict(self.files)
        if self.ids and GENERATION not in files:
            files[GENERATION] = json_bytes(self.ids)
        for name in sorted(files, key=TOKENIZER.__eq__):
            file = folder / name
            file.parent.mkdir(parents=True, exist_ok=True)
            write_whole(file, files[name])


def json_bytes(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(dict(content), indent=2, ensure_ascii=False) + "\n").encode()


def token_text(config: Mapping[str, Any], name: str) -> str | None:
    """`bos_token` and the like, spelled as a text or as {"content": text}; None where null or absent."""
    value = config.get(name)
    if isinstance(value, Mapping):
        value = value.get("content")
    if (value is None and config.get(name) is not None) or not isinstance(value, str | None):
        raise ValueError(f"tokenizer_config.json: {name}={config[name]!r} is neither a text nor one with 'content'")
    return value


def read_stop_ids(folder: Path) -> list[int]:
    """`eos_token_id` of generation_config.json, or where it says none of config.json: none, a number or a list."""
    ids = []
    for file in (folder / GENERATION, folder / "config.json"):
        ids = ids or _as_ids(read_json_object(file).get("eos_token_id"))
        if not all(type(i) is int and i >= 0 for i in ids):
            raise ValueError(f"{file}: eos_token_id={ids} is neither an id nor a list of ids")
    return ids


def read_sampling(folder: Path) -> dict[str, Any]:
    """What generation_config.json says of drawing, as fields of ``SamplingParams`` and whatever its `do_sample`: none
    where there is no such file. ValueError: what is no number, or no whole one as `top_k`."""
    said = read_json_object(folder / GENERATION)
    found = {name: said[name] for name in _DRAWING if said.get(name) is not None}
    for name, value in found.items():
        if type(value) not in (int, float) or not abs(value) < 2**31 or (name == "top_k" and value != int(value)):
            raise ValueError(f"{folder / GENERATION}: {name}={value!r:.40}: expected a number")
    return {name: max(int(value), 0) if name == "top_k" else float(value) for name, value in found.items()}


def _as_ids(value: Any) -> list[Any]:
    return [] if value is None else value if isinstance(value, list) else [value]


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
