"""Tokenizers as other families have them, trained here on a few words."""

import functools
import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from deepseek_jax.data.tokenizer import Tokenizer

WORDS = ["the quick brown fox jumps over the lazy dog , and they do not mind 12 34 numbers " * 3]
QWEN = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@functools.cache
def qwen_backend() -> Backend:
    backend = Backend(models.BPE())
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    options = {"initial_alphabet": alphabet, "special_tokens": list(QWEN), "show_progress": False}
    backend.train_from_iterator(WORDS, trainers.BpeTrainer(vocab_size=300, **options))
    return backend


def write_qwen(folder: Path, config: dict[str, Any] | None = None, **changed: Any) -> Path:
    """A Qwen-type folder about text: no BOS, no PAD; changed: entries of tokenizer.json."""
    folder.mkdir(exist_ok=True)
    content = json.loads(qwen_backend().to_str()) | changed
    (folder / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    if config is None:
        config = {"bos_token": None, "eos_token": QWEN[2], "chat_template": CHATML}
    if config:
        (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


@functools.cache
def qwen() -> Tokenizer:
    return Tokenizer(qwen_backend(), bos=None, eos=QWEN[2], pad=None)


@functools.cache
def llama() -> Tokenizer:
    """As sentencepiece's with byte fallback come out of transformers' converter."""
    trained = Backend(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    trained.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trained.train_from_iterator(WORDS, trainers.BpeTrainer(vocab_size=330, special_tokens=tokens, show_progress=False))
    content = json.loads(trained.to_str())
    content["added_tokens"] = content["added_tokens"][:3]
    backend = Backend.from_str(json.dumps(content))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(steps)
    return Tokenizer(backend, bos="<s>", eos="</s>", pad=None)


@functools.cache
def metaspace() -> Tokenizer:
    backend = Backend(models.Unigram())
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    options = {"special_tokens": ["<unk>", "</s>"], "unk_token": "<unk>", "show_progress": False}
    backend.train_from_iterator(WORDS, trainers.UnigramTrainer(vocab_size=60, **options))
    return Tokenizer(backend, bos=None, eos="</s>", pad=None)


@functools.cache
def wordpiece() -> Tokenizer:
    backend = Backend(models.WordPiece(unk_token="[UNK]"))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=80, special_tokens=["[UNK]", "[SEP]"], show_progress=False)
    backend.train_from_iterator(WORDS, trainer)
    return Tokenizer(backend, bos=None, eos="[SEP]", pad=None)


FAMILIES = {"qwen": qwen, "llama": llama, "metaspace": metaspace, "wordpiece": wordpiece}


# As Qwen3's: thinking and tool calls; reasoning is written in the answers to the last question alone.
THINKING = """\
{%- set at = namespace(last=0) %}
{%- for m in messages %}{% if m.role == 'user' %}{% set at.last = loop.index0 %}{% endif %}{% endfor %}
{%- if tools %}
    {{- '<|im_start|>system\\n' + (messages[0].content + '\\n' if messages[0].role == 'system' else '') + '<tools>' }}
    {%- for tool in tools %}{{- '\\n' }}{{- tool | tojson }}{% endfor %}
    {{- '\\n</tools><|im_end|>\\n' }}
{%- elif messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- for m in messages %}
    {%- if m.role == 'user' %}
        {{- '<|im_start|>user\\n' + m.content + '<|im_end|>\\n' }}
    {%- elif m.role == 'tool' %}
        {{- '<|im_start|>user\\n<tool_response>\\n' + m.content + '\\n</tool_response><|im_end|>\\n' }}
    {%- elif m.role == 'assistant' %}
        {{- '<|im_start|>assistant\\n' }}
        {%- if loop.index0 > at.last %}
            {{- '<think>\\n' + (m.reasoning_content or '').strip('\\n') + '\\n</think>\\n\\n' }}
        {%- endif %}
        {{- m.content or '' }}
        {%- for call in m.tool_calls or [] %}
            {{- '<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' }}
            {{- call.function.arguments | tojson }}
            {{- '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{% endif %}"""
