"""The byte-level BPE tokenizer with DeepSeek's special tokens: load, train, encode, decode."""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, trainers

from deepseek_jax.data.model_folder import (
    TOKENIZER,
    TextFiles,
    json_bytes,
    read_json_object,
    read_stop_ids,
    read_template,
    token_text,
)
from deepseek_jax.data.template import ChatTemplate

# The bar is U+FF5C and the underscore U+2581, as in DeepSeek's released tokenizers.
BOS = "<｜begin▁of▁sentence｜>"
EOS = "<｜end▁of▁sentence｜>"
PAD = "<｜▁pad▁｜>"
THINK = "<think>"
END_THINK = "</think>"
FIM_HOLE = "<｜fim▁hole｜>"
FIM_BEGIN = "<｜fim▁begin｜>"
FIM_END = "<｜fim▁end｜>"
USER = "<｜User｜>"
ASSISTANT = "<｜Assistant｜>"
EOT = "<|EOT|>"
TOOL_TOKENS = (
    "<｜tool▁calls▁begin｜>",
    "<｜tool▁calls▁end｜>",
    "<｜tool▁call▁begin｜>",
    "<｜tool▁call▁end｜>",
    "<｜tool▁outputs▁begin｜>",
    "<｜tool▁outputs▁end｜>",
    "<｜tool▁output▁begin｜>",
    "<｜tool▁output▁end｜>",
    "<｜tool▁sep｜>",
)
# In the order of R1's ids: the first three open the vocabulary, the others close it.
_FIRST = (BOS, EOS, PAD)
_LAST = (THINK, END_THINK, FIM_HOLE, FIM_BEGIN, FIM_END, USER, ASSISTANT, EOT, *TOOL_TOKENS)
SPECIAL_TOKENS = _FIRST + _LAST
PAD_ID = 2

# DeepSeek's format as a chat template, for who reads a model that was trained here: it writes what data/chat.py writes
# as ids, but that special tokens count wherever they stand. System messages open the conversation, and all
# assistants' turns but one that ends it lose their thinking.
DEEPSEEK_TEMPLATE = f"""\
{{{{ bos_token }}}}
{{{{- messages | selectattr('role', 'equalto', 'system') | map(attribute='content') | join('\\n\\n') }}}}
{{%- for message in messages %}}
    {{%- if message.role == 'user' %}}
        {{{{- '{USER}' + message.content }}}}
    {{%- elif message.role == 'assistant' %}}
        {{{{- '{ASSISTANT}' + (message.content if loop.last else message.content.split('{END_THINK}')[-1]) }}}}
        {{{{- eos_token }}}}
    {{%- endif %}}
{{%- endfor %}}
{{%- if add_generation_prompt %}}{{{{- '{ASSISTANT}' }}}}{{% endif %}}"""

# R1's pre-tokenizer, but that every digit stands alone (R1 takes up to three together).
_DIGIT = r"\p{N}"
_CJK = "[一-龥぀-ゟ゠-ヿ]+"
_WORDS = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+"
    r"|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    r"| ?[\p{P}\p{S}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# GPT-2's alphabet of byte-level tokens: a printable byte is its own character, the k-th other one is chr(256 + k).
_PRINTABLE = {*range(33, 127), *range(161, 173), *range(174, 256)}
_OTHERS = [byte for byte in range(256) if byte not in _PRINTABLE]
_BYTE_OF = {chr(b): b for b in _PRINTABLE} | {chr(256 + k): b for k, b in enumerate(_OTHERS)}


class Tokenizer:
    """Text to ids and back. Only with `allow_special` can text produce a special token.

    bos, eos, pad: how those tokens are spelled, None where the tokenizer has none; without `pad`, EOS pads.
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
        stop_ids: Iterable[int] = (),
        template: ChatTemplate | None = None,
        files: TextFiles | None = None,
    ):
        self._special = backend
        self._bos, self._eos, self._pad = bos, eos, pad
        eos_ids = [] if eos is None else [self.token_id(eos)]
        self.stop_ids: tuple[int, ...] = tuple(dict.fromkeys([*eos_ids, *stop_ids]))
        self.template = template
        serialised = backend.to_str()
        self.fingerprint: str = hashlib.sha256(serialised.encode()).hexdigest()
        # The same merges without any added token: what encodes text that nobody vouches for.
        plain = json.loads(serialised) | {"added_tokens": []}
        self._plain = tokenizers.Tokenizer.from_str(json.dumps(plain))
        self.files: TextFiles = self._own_files() if files is None else files

    @classmethod
    def from_folder(cls, path: str | os.PathLike[str]) -> "Tokenizer":
        """Reads what a model's folder says of text: tokenizer.json, tokenizer_config.json, the chat template.

        path: a folder that a model was released in or that a stage wrote, or its tokenizer.json. Under any other name
        a file in that format is read alone.

        BOS, EOS and PAD are those of the config; without that file, DeepSeek's. `eos_token_id` of
        generation_config.json, a number or a list, ends answers too. ValueError names what is wrong: no
        tokenizer.json, a token that the vocabulary lacks, a template that is no template.
        """
        file = Path(path)
        file = file if file.suffix == ".json" else file / TOKENIZER
        backend = cls._read(file)
        if file.name != TOKENIZER:
            return cls(backend)
        folder = file.parent
        config = read_json_object(folder / "tokenizer_config.json")
        if not config:
            config = {"bos_token": BOS, "eos_token": EOS, "pad_token": PAD if backend.token_to_id(PAD) else None}
        names = {name: token_text(config, f"{name}_token") for name in ("bos", "eos", "pad")}
        for name, token in names.items():
            if token is not None and backend.token_to_id(token) is None:
                raise ValueError(f"{folder}: {name}_token={token!r} is not in tokenizer.json")
        template, files = read_template(folder, config), TextFiles.read(folder)
        if files.files.keys() == {TOKENIZER} and not files.ids:  # of an older run, say
            files = None
        return cls(backend, **names, stop_ids=read_stop_ids(folder), template=template, files=files)

    @staticmethod
    def _read(file: Path) -> tokenizers.Tokenizer:
        if not file.is_file():
            raise ValueError(f"{file}: no such tokenizer file; a tokenizer.json or a folder holding one is needed")
        text = file.read_text(encoding="utf-8")
        try:
            content = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"{file}:{error.lineno}: not JSON ({error.msg}); a tokenizer.json is needed") from error
        if not isinstance(content, dict) or "model" not in content:
            raise ValueError(f"{file}: has no 'model', so it is no tokenizer.json")
        try:
            return tokenizers.Tokenizer.from_str(text)
        except Exception as error:  # the library raises no narrower one
            raise ValueError(f"{file}: no tokenizer.json ({error})") from error

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Writes all that `from_folder` and transformers' AutoTokenizer read, byte for byte what came from a folder;
        returns the tokenizer.json."""
        self.files.write(Path(folder))
        return Path(folder) / TOKENIZER

    def _own_files(self) -> TextFiles:
        """The files of a tokenizer that came without any; DeepSeek's format where it has the tokens and no template."""
        names = {"bos_token": self._bos, "eos_token": self._eos, "pad_token": self._pad}
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False} | names
        if self.template is not None:
            config["chat_template"] = self.template.source
        elif self.has_chat_tokens:
            config["chat_template"] = DEEPSEEK_TEMPLATE
        files = {
            TOKENIZER: self._special.to_str(pretty=True).encode(),
            "tokenizer_config.json": json_bytes({name: value for name, value in config.items() if value is not None}),
        }
        ids: dict[str, Any] = {f"{name}_id": self.token_id(token) for name, token in names.items() if token is not None}
        if self.stop_ids:
            ids["eos_token_id"] = self.stop_ids[0] if len(self.stop_ids) == 1 else [*self.stop_ids]
        return TextFiles(files, ids)

    @cached_property
    def vocab_size(self) -> int:
        """Number of ids, special tokens included: every id is below it."""
        return self._special.get_vocab_size(with_added_tokens=True)

    def token_id(self, token: str) -> int:
        """The id of one token as spelled in the vocabulary; ValueError when it is not there."""
        token_id = self._special.token_to_id(token)
        if token_id is None:
            raise ValueError(f"this tokenizer ({self.vocab_size} ids) has no token {token!r}")
        return token_id

    @cached_property
    def bos_ids(self) -> list[int]:
        """What stands in front of raw text: BOS where the tokenizer has one, else nothing (Qwen2)."""
        return [] if self._bos is None else [self.bos_id]

    @cached_property
    def bos_id(self) -> int:
        if self._bos is None:
            raise ValueError("this tokenizer names no bos_token in its tokenizer_config.json")
        return self.token_id(self._bos)

    @cached_property
    def eos_id(self) -> int:
        if self._eos is None:
            raise ValueError("this tokenizer names no eos_token in its tokenizer_config.json")
        return self.token_id(self._eos)

    @cached_property
    def pad_id(self) -> int:
        """PAD, else EOS, else 0: padding is masked wherever it stands, so that any id does."""
        if self._pad is None:
            return 0 if self._eos is None else self.eos_id
        return self.token_id(self._pad)

    @cached_property
    def has_chat_tokens(self) -> bool:
        """Whether DeepSeek's format can be written."""
        tokens = (self._bos, self._eos, USER, ASSISTANT)
        return all(token is not None and self._special.token_to_id(token) is not None for token in tokens)

    @cached_property
    def think_id(self) -> int:
        return self.token_id(THINK)

    @cached_property
    def end_think_id(self) -> int:
        return self.token_id(END_THINK)

    @cached_property
    def user_id(self) -> int:
        return self.token_id(USER)

    @cached_property
    def assistant_id(self) -> int:
        return self.token_id(ASSISTANT)

    @property
    def plain_json(self) -> str:
        """The tokenizer.json that `encode` goes by without `allow_special`: no added tokens."""
        return self._plain.to_str()

    def encode(self, text: str, *, allow_special: bool = False) -> list[int]:
        """Ids of `text` alone: no BOS or EOS, whatever `add_bos_token` says (transformers 5 does the same for R1).

        Raw text that a model is to continue needs `[*bos_ids, *encode(text)]`; `Engine.generate` does that. Without
        `allow_special`, a special token's spelling inside `text` becomes ordinary tokens.
        """
        backend = self._special if allow_special else self._plain
        return backend.encode(text, add_special_tokens=False).ids

    def encode_messages(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        **variables: Any,
    ) -> list[int]:
        """Ids of a conversation as the model's own template writes it; a BOS only where the template writes one.

        As in transformers, special tokens count wherever they stand, in what users say too; `chat.encode_prompt`
        is DeepSeek's format without that. ValueError: no template, or what `ChatTemplate.render` refuses.
        """
        if self.template is None:
            raise ValueError("this tokenizer has no chat template (chat_template in tokenizer_config.json)")
        text = self.template.render(messages, tools=tools, add_generation_prompt=add_generation_prompt, **variables)
        return self.encode(text, allow_special=True)

    def token_bytes(self, token_id: int, *, skip_special_tokens: bool = True) -> bytes:
        """What one id adds to the bytes that `decode` reads as UTF-8; nothing for ids past the vocabulary.

        ValueError where the tokenizer's decoder is not byte-level: there is no such thing then.
        """
        if not self._byte_level:
            raise ValueError("this tokenizer's decoder is not ByteLevel, so its tokens are not bytes")
        if skip_special_tokens and token_id in self._skipped:
            return b""
        token = self._special.id_to_token(token_id)
        if token is None:
            return b""
        # A token with any other character is an added one, spelled as it is.
        spelled = [_BYTE_OF.get(character) for character in token]
        return token.encode() if None in spelled else bytes(b for b in spelled if b is not None)

    @cached_property
    def _byte_level(self) -> bool:
        return (json.loads(self._special.to_str())["decoder"] or {}).get("type") == "ByteLevel"

    @cached_property
    def _skipped(self) -> frozenset[int]:
        return frozenset(i for i, token in self._special.get_added_tokens_decoder().items() if token.special)

    def decode(self, ids: Iterable[int], *, skip_special_tokens: bool = True) -> str:
        """Text of `ids`; bytes that are not UTF-8 become U+FFFD, ids past the vocabulary give nothing.

        `skip_special_tokens` leaves out BOS, EOS, PAD and EOT. As in R1's tokenizer the others, `<think>`
        among them, are visible markup and stay.
        """
        return self._special.decode([int(i) for i in ids], skip_special_tokens=skip_special_tokens)


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Trains a byte-level BPE of at most `vocab_size` ids (fewer where `texts` have no pair left to merge).

    The layout is R1's: BOS, EOS, PAD are 0, 1, 2; then bytes and merges; the other special tokens last.
    The same texts in the same order give the same tokenizer.
    """
    smallest = len(SPECIAL_TOKENS) + 256
    if vocab_size < smallest:
        raise ValueError(
            f"vocab_size={vocab_size} is too small: {len(SPECIAL_TOKENS)} special tokens and 256 bytes "
            f"need at least {smallest}"
        )
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            *(pre_tokenizers.Split(Regex(rule), behavior="isolated") for rule in (_DIGIT, _CJK, _WORDS)),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(_LAST),
        special_tokens=[_added(token) for token in _FIRST],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    backend.add_tokens([_added(token) for token in _LAST])
    tokenizer = Tokenizer(backend)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (0, 1, PAD_ID)
    return tokenizer


def _added(token: str) -> AddedToken:
    return AddedToken(token, normalized=False, special=token in (BOS, EOS, PAD, EOT))
