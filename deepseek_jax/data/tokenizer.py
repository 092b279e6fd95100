"""The byte-level BPE tokenizer with DeepSeek's special tokens: load, train, encode, decode."""

import hashlib
import json
import os
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, trainers

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

# R1's pre-tokenizer, but that every digit stands alone (R1 takes up to three together).
_DIGIT = r"\p{N}"
_CJK = "[一-龥぀-ゟ゠-ヿ]+"
_WORDS = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+"
    r"|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    r"| ?[\p{P}\p{S}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


class Tokenizer:
    """Text to ids and back. Only with `allow_special` can text produce a special token."""

    def __init__(self, backend: tokenizers.Tokenizer):
        self._special = backend
        serialised = backend.to_str()
        self.fingerprint: str = hashlib.sha256(serialised.encode()).hexdigest()
        # The same merges without any added token: what encodes text that nobody vouches for.
        plain = json.loads(serialised) | {"added_tokens": []}
        self._plain = tokenizers.Tokenizer.from_str(json.dumps(plain))

    @classmethod
    def from_file(cls, path: str | os.PathLike[str]) -> "Tokenizer":
        """Reads a `tokenizer.json`, or the one in the folder `path`; ValueError when there is none."""
        file = _tokenizer_file(path)
        if not file.is_file():
            raise ValueError(f"{file}: no such tokenizer file; a tokenizer.json or a folder holding one is needed")
        text = file.read_text(encoding="utf-8")
        try:
            content = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"{file}:{error.lineno}: not JSON ({error.msg}); a tokenizer.json is needed") from error
        if not isinstance(content, dict) or "model" not in content:
            raise ValueError(f"{file}: has no 'model', so it is no tokenizer.json")
        return cls(tokenizers.Tokenizer.from_str(text))

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Writes `path` (a name ending in .json, or a folder to hold tokenizer.json) whole or not at all."""
        file = _tokenizer_file(path)
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_name(file.name + ".partial")
        partial.write_text(self._special.to_str(pretty=True), encoding="utf-8")
        os.replace(partial, file)
        return file

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
    def bos_id(self) -> int:
        return self.token_id(BOS)

    @cached_property
    def eos_id(self) -> int:
        return self.token_id(EOS)

    @cached_property
    def pad_id(self) -> int:
        return self.token_id(PAD)

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

    def encode(self, text: str, *, allow_special: bool = False) -> list[int]:
        """Ids of `text`, with no BOS or EOS added.

        Without `allow_special`, a special token's spelling inside `text` becomes ordinary tokens.
        """
        backend = self._special if allow_special else self._plain
        return backend.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Iterable[int], *, skip_special_tokens: bool = True) -> str:
        """Text of `ids`; bytes that are not UTF-8 become U+FFFD, ids past the vocabulary give nothing.

        `skip_special_tokens` leaves out BOS, EOS, PAD and EOT. As in R1's tokenizer the others, `<think>`
        among them, are visible markup and stay.
        """
        return self._special.decode([int(i) for i in ids], skip_special_tokens=skip_special_tokens)


def _tokenizer_file(path: str | os.PathLike[str]) -> Path:
    path = Path(path)
    return path if path.suffix == ".json" else path / "tokenizer.json"


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
