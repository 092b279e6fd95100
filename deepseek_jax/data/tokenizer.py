"""The byte-level BPE tokenizer of a model: load, encode, decode, save."""

import copy
import hashlib
import json
import os
import re
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers

from deepseek_jax.data.model_folder import (
    TOKENIZER,
    TOKENS,
    TOKENS_MAP,
    TextFiles,
    json_bytes,
    read_stop_ids,
    read_template,
    token_text,
)
from deepseek_jax.data.special_tokens import ASSISTANT, BOS, DEEPSEEK_TEMPLATE, END_THINK, EOS, PAD, THINK, USER
from deepseek_jax.data.template import ChatTemplate
from deepseek_jax.files import read_json_object

_NAMES = {"bos": BOS, "eos": EOS, "pad": PAD}
# Halves of surrogate pairs are no text: what a terminal read as bytes holds them, or a file cut in mid-character.
_SURROGATES = re.compile("[\ud800-\udfff]+")


class Tokenizer:
    """Text to ids and back. Only with `allow_special` can text produce a special token.

    bos, eos, pad: how those tokens are spelled, None where the tokenizer has none; without `pad`, or where
    the vocabulary lacks it, EOS pads. add_bos: whether BOS stands in front of raw text.
    stop_ids: what ends an answer beside EOS. template: the model's chat template, where it came with one.
    files: what `save` writes; by default made of all that.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        bos: str | None = BOS,
        eos: str | None = EOS,
        pad: str | None = PAD,
        add_bos: bool = True,
        stop_ids: Iterable[int] = (),
        template: ChatTemplate | None = None,
        files: TextFiles | None = None,
    ):
        self._special = backend
        self._bos, self._eos = bos, eos
        self._add_bos = add_bos
        self._pad = pad if pad is None or backend.token_to_id(pad) is not None else None
        self._rows: int | None = None  # of the model's embedding, where they are fewer than the ids
        eos_ids = [] if eos is None else [self.token_id(eos)]
        self.stop_ids: tuple[int, ...] = tuple(dict.fromkeys([*eos_ids, *stop_ids]))
        self.template = template
        serialised = backend.to_str()
        self.fingerprint: str = hashlib.sha256(serialised.encode()).hexdigest()
        # The same merges without any added token: what encodes text that nobody vouches for.
        plain = json.loads(serialised) | {"added_tokens": []}
        self._plain = tokenizers.Tokenizer.from_str(json.dumps(plain))
        self.files: TextFiles = self._own_files() if files is None else self._completed(files)

    @classmethod
    def from_folder(cls, path: str | os.PathLike[str]) -> "Tokenizer":
        """Reads what a model's folder says of text: tokenizer.json, tokenizer_config.json, the chat template.

        path: a folder that a model was released in or that a stage wrote, or its tokenizer.json. Under any other name
        a file in that format is read alone.

        BOS, EOS and PAD are, each for itself, what the config says, null too, else special_tokens_map.json, else the
        id of it in the model's config.json; where neither of the first two is there, DeepSeek's as far as the
        vocabulary has them. `eos_token_id` of
        generation_config.json, or else of config.json, a number or a list, ends answers too. Truncation and padding
        that another program left in tokenizer.json are off. ValueError names what is wrong: no tokenizer.json, a token
        that the vocabulary lacks (but a PAD: EOS pads then), a template that is no template.
        """
        file = Path(path)
        file = file if file.suffix == ".json" else file / TOKENIZER
        backend, folder = cls._read(file), file.parent
        if file.name != TOKENIZER:
            return cls(backend, bos=_spelled(backend, None, BOS), eos=_spelled(backend, None, EOS))
        files = TextFiles.read(folder)
        said = read_json_object(folder / TOKENS_MAP) | read_json_object(folder / "tokenizer_config.json")
        defaults = dict.fromkeys(_NAMES) if said else _NAMES
        ids = {name: files.ids.get(f"{name}_token_id") for name in _NAMES}
        config = {f"{name}_token": _spelled(backend, ids[name], token) for name, token in defaults.items()} | said
        names = {name: token_text(config, f"{name}_token") for name in _NAMES}
        for name, token in names.items():
            if name != "pad" and token is not None and backend.token_to_id(token) is None:
                raise ValueError(f"{folder}: {name}_token={token!r} is not in tokenizer.json")
        stop_ids, template = read_stop_ids(folder), read_template(folder, config)
        # An id in config.json alone names a BOS that generation may begin with, not one in front of every text.
        adds = config.get("add_bos_token") is not False and ("bos_token" in said or not said)
        return cls(backend, **names, add_bos=adds, stop_ids=stop_ids, template=template, files=files)

    @staticmethod
    def _read(file: Path) -> tokenizers.Tokenizer:
        if not file.is_file():
            beside = (file.with_name(f"{file.name}.gz"), file.parent)  # the latter where it was given itself
            unpack = "".join(f"; gunzip -k {packed}" for packed in beside if packed.is_file())
            raise ValueError(
                f"{file}: no such tokenizer file; a tokenizer.json or a folder holding one is needed{unpack}"
            )
        text = file.read_text(encoding="utf-8")
        try:
            content = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"{file}:{error.lineno}: not JSON ({error.msg}); a tokenizer.json is needed") from error
        if not isinstance(content, dict) or "model" not in content:
            raise ValueError(f"{file}: has no 'model', so it is no tokenizer.json")
        try:
            backend = tokenizers.Tokenizer.from_str(text)
        except Exception as error:  # the library raises no narrower one
            raise ValueError(f"{file}: no tokenizer.json ({error})") from error
        backend.no_truncation()
        backend.no_padding()
        return backend

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Writes all that `from_folder` and transformers' AutoTokenizer read; returns the tokenizer.json.

        What came from a folder is written byte for byte, and what that lacked is added: the names of special tokens,
        DeepSeek's format as the template where chats are written in it, and in generation_config.json the ids that
        end answers here, so that they end them in transformers.
        """
        self.files.write(Path(folder))
        return Path(folder) / TOKENIZER

    def _own_files(self) -> TextFiles:
        """The files of a tokenizer that came without any."""
        files = {TOKENIZER: self._special.to_str(pretty=True).encode(), "tokenizer_config.json": self._own_config()}
        return TextFiles(files, self._own_ids())

    def _completed(self, given: TextFiles) -> TextFiles:
        more, ids = {}, given.ids
        if "tokenizer_config.json" not in given.files:
            more["tokenizer_config.json"], ids = self._own_config(), self._own_ids() | dict(ids)
        elif self.template is None and self.has_chat_tokens:
            more["chat_template.jinja"] = DEEPSEEK_TEMPLATE.encode()
        files = more | dict(given.files)
        config, named = (json.loads(files.get(name, b"{}")) for name in ("tokenizer_config.json", TOKENS_MAP))
        own = {"bos_token": self._bos, "eos_token": self._eos, "pad_token": self._pad}
        # What only ids of the model's config.json have named: that file is no part of these.
        unnamed = {name: token for name, token in own.items() if token is not None and name not in config | named}
        files |= {TOKENS_MAP: json_bytes(named | unnamed)} if unnamed else {}
        return TextFiles(files, ids).stopping_at(self.stop_ids)

    def _own_config(self) -> bytes:
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
        config |= {"bos_token": self._bos, "eos_token": self._eos, "pad_token": self._pad}
        config |= {} if self._add_bos else {"add_bos_token": False}
        if self.template is not None:
            config["chat_template"] = self.template.source
        elif self.has_chat_tokens:
            config["chat_template"] = DEEPSEEK_TEMPLATE
        return json_bytes({name: value for name, value in config.items() if value is not None})

    def _own_ids(self) -> dict[str, Any]:
        names = {"bos": self._bos, "eos": self._eos, "pad": self._pad}
        ids: dict[str, Any] = {f"{name}_token_id": self.token_id(token) for name, token in names.items() if token}
        if self.stop_ids:
            ids["eos_token_id"] = self.stop_ids[0] if len(self.stop_ids) == 1 else [*self.stop_ids]
        return ids

    def with_template(self, source: str) -> "Tokenizer":
        """This tokenizer with another chat template, of jinja2 text, alone. ValueError: it is none."""
        config = json.loads(self.files.files.get("tokenizer_config.json", b"{}"))
        tokens = {name: text for name in TOKENS if (text := token_text(config, name)) is not None}
        own = {"bos_token": self._bos, "eos_token": self._eos, "pad_token": self._pad}
        tokens |= {name: text for name, text in own.items() if text is not None}
        other = copy.copy(self)
        other.template = ChatTemplate(source, tokens)
        other.files = self.files.with_template(source)
        return other

    def over(self, rows: int) -> "Tokenizer":
        """This tokenizer for a model whose embedding has `rows` rows.

        Where the tokenizer has more ids than that, those past the rows are refused where they are used: ValueError
        names the token. They may be there, and PAD may be one of them: another id pads then.
        """
        fewer = rows if rows < self.vocab_size else None
        if fewer == self._rows:
            return self
        other = copy.copy(self)
        other._rows = fewer
        return other

    def _check(self, ids: list[int]) -> list[int]:
        if self._rows is not None and ids and max(ids) >= self._rows:
            token = self._special.id_to_token(max(ids))
            raise ValueError(
                f"token {token!r} has the id {max(ids)}, and the model's vocab_size={self._rows}: its tokenizer has "
                f"{self.vocab_size} ids, of which those from {self._rows} on cannot be used"
            )
        return ids

    @cached_property
    def vocab_size(self) -> int:
        """Number of ids, special tokens included: every id is below it."""
        return self._special.get_vocab_size(with_added_tokens=True)

    @property
    def usable(self) -> int:
        """Number of ids that the model has rows for, see `over`: every id that is used is below it."""
        return self.vocab_size if self._rows is None else self._rows

    def token_id(self, token: str) -> int:
        """The id of one token as spelled in the vocabulary; ValueError when it is not there."""
        token_id = self._special.token_to_id(token)
        if token_id is None:
            raise ValueError(f"this tokenizer ({self.vocab_size} ids) has no token {token!r}")
        return self._check([token_id])[0]

    @property
    def bos_ids(self) -> list[int]:
        """What stands in front of raw text: BOS where the tokenizer has one and adds it, else nothing (Qwen2)."""
        return [self.bos_id] if self._add_bos and self._bos is not None else []

    @property
    def bos_id(self) -> int:
        if self._bos is None:
            raise ValueError("this tokenizer names no bos_token in its tokenizer_config.json")
        return self.token_id(self._bos)

    @property
    def eos_id(self) -> int:
        if self._eos is None:
            raise ValueError("this tokenizer names no eos_token in its tokenizer_config.json")
        return self.token_id(self._eos)

    @property
    def pad_id(self) -> int:
        """PAD, else EOS, else 0: padding is masked wherever it stands, so that any id of the model's does."""
        ids = (self._special.token_to_id(token) for token in (self._pad, self._eos) if token is not None)
        return next((i for i in ids if i is not None and i < self.usable), 0)

    @property
    def added_ids(self) -> list[int]:
        """The ids of special and other added tokens: those that only `allow_special` makes of text."""
        return sorted(self._special.get_added_tokens_decoder())

    @cached_property
    def added_tokens(self) -> list[str]:
        """How they are spelled."""
        return [token.content for token in self._special.get_added_tokens_decoder().values()]

    @cached_property
    def has_chat_tokens(self) -> bool:
        """Whether DeepSeek's format can be written."""
        tokens = (self._bos, self._eos, USER, ASSISTANT)
        return all(token is not None and self._special.token_to_id(token) is not None for token in tokens)

    @property
    def think_id(self) -> int:
        return self.token_id(THINK)

    @property
    def end_think_id(self) -> int:
        return self.token_id(END_THINK)

    @property
    def user_id(self) -> int:
        return self.token_id(USER)

    @property
    def assistant_id(self) -> int:
        return self.token_id(ASSISTANT)

    @property
    def special_json(self) -> str:
        """The tokenizer.json that `decode` goes by: added tokens among it."""
        return self._special.to_str()

    @property
    def plain_json(self) -> str:
        """The tokenizer.json that `encode` goes by without `allow_special`: no added tokens."""
        return self._plain.to_str()

    def encode(self, text: str, *, allow_special: bool = False) -> list[int]:
        """Ids of `text` alone: no BOS or EOS, whatever `add_bos_token` says (transformers 5 does the same for R1).

        Raw text that a model is to continue needs `[*bos_ids, *encode(text)]`; `Engine.generate` does that. Without
        `allow_special`, a special token's spelling inside `text` becomes ordinary tokens. What is no character, as a
        byte that is no UTF-8 comes from the command line, is U+FFFD.
        """
        backend = self._special if allow_special else self._plain
        # The call for batches keeps no offsets, so that long texts are done sooner, and no lock: other threads go on.
        return self._check(backend.encode_batch_fast([whole_text(text)], add_special_tokens=False)[0].ids)

    def decode(self, ids: Iterable[int], *, skip_special_tokens: bool = True) -> str:
        """Text of `ids`; bytes that are not UTF-8 become U+FFFD, ids past the vocabulary give nothing.

        `skip_special_tokens` leaves out BOS, EOS, PAD and EOT. As in R1's tokenizer the others, `<think>`
        among them, are visible markup and stay.
        """
        return self._special.decode([*map(int, ids)], skip_special_tokens=skip_special_tokens)


def whole_text(text: str) -> str:
    """The text with each run of what is no character (half a surrogate pair, a byte that is no UTF-8) as U+FFFD."""
    return _SURROGATES.sub("\ufffd", text)


def _spelled(backend: tokenizers.Tokenizer, ids: Any, default: str | None) -> str | None:
    """The token of an id or of the first of a list; without one the default, if the vocabulary has it."""
    first = ids[0] if isinstance(ids, list) and ids else ids
    token = backend.id_to_token(first) if type(first) is int and first >= 0 else None
    return token or (default if default and backend.token_to_id(default) is not None else None)
