"""Trains a byte-level BPE tokenizer with DeepSeek's special tokens."""

import json
from collections.abc import Iterable

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, trainers

from deepseek_jax.data.model_folder import TOKENIZER
from deepseek_jax.data.special_tokens import BOS, EOS, EOT, PAD, PAD_ID, SPECIAL_TOKENS
from deepseek_jax.data.tokenizer import Tokenizer, whole_text

_FIRST, _LAST = SPECIAL_TOKENS[:3], SPECIAL_TOKENS[3:]

# R1's pre-tokenizer, but that every digit stands alone (R1 takes up to three together).
_DIGIT = r"\p{N}"
_CJK = "[一-龥぀-ゟ゠-ヿ]+"
_WORDS = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+"
    r"|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    r"| ?[\p{P}\p{S}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


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
    backend.train_from_iterator(map(whole_text, texts), trainer)
    backend.add_tokens([_added(token) for token in _LAST])
    tokenizer = Tokenizer(backend)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (0, 1, PAD_ID)
    return tokenizer


def made_up_tokenizer(vocab_size: int) -> Tokenizer:
    """One of exactly so many ids for a network of random weights: bytes, special tokens, and words that no text has."""
    made = json.loads(train_tokenizer([], len(SPECIAL_TOKENS) + 256).files.files[TOKENIZER])
    first, last = len(made["model"]["vocab"]), vocab_size - len(_LAST)
    made["model"]["vocab"] |= {f"Ġ{number}": number for number in range(first, last)}
    for token in made["added_tokens"][-len(_LAST) :]:
        token["id"] += last - first
    return Tokenizer(tokenizers.Tokenizer.from_str(json.dumps(made)))


def _added(token: str) -> AddedToken:
    return AddedToken(token, normalized=False, special=token in (BOS, EOS, PAD, EOT))
