"""Chat templates for models that have none, or another than wanted: by name, or from a file of the user's own."""

from pathlib import Path

from deepseek_jax.data.template import ChatTemplate
from deepseek_jax.data.tokenizer import Tokenizer

# What R1-Zero was asked by (arXiv 2501.12948, table 1), to the letter, with an answer behind it where there is one.
_R1_ZERO = """\
A conversation between User and Assistant. The user asks a question, and the Assistant solves it. The assistant first \
thinks about the reasoning process in the mind and then provides the user with the answer. The reasoning process and \
answer are enclosed within <think> </think> and <answer> </answer> tags, respectively, i.e., <think> reasoning process \
here </think> <answer> answer here </answer>.
{%- for message in messages %}
    {%- if message.role == 'user' %}{{ ' User: ' + message.content + '.' }}
    {%- elif message.role == 'assistant' %}{{ ' Assistant: ' + message.content + (eos_token or '') }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ ' Assistant:' }}{% endif %}"""
NAMED = {"r1_zero": _R1_ZERO}


def with_template(tokenizer: Tokenizer, template: str) -> Tokenizer:
    """The tokenizer of a model that is asked by another chat template, which is written beside it as it is saved.

    template: a name of ``NAMED``, a file of jinja2 text, or "", which changes nothing. By name, BOS opens the text
    where the tokenizer puts it in front of raw text. ValueError: none of these, or no jinja2.
    """
    check_template(template)
    if not template:
        return tokenizer
    if template in NAMED:
        return tokenizer.with_template(("{{ bos_token }}" if tokenizer.bos_ids else "") + NAMED[template])
    return tokenizer.with_template(Path(template).read_text(encoding="utf-8"))


def check_template(template: str) -> None:
    """ValueError where that is no template for ``with_template``."""
    if not template or template in NAMED:
        return
    if not Path(template).is_file():
        raise ValueError(f"chat_template={template!r}: expected {', '.join(NAMED)} or a file of jinja2 text")
    try:
        ChatTemplate(Path(template).read_text(encoding="utf-8"), {})
    except ValueError as error:
        raise ValueError(f"chat_template={template!r}: {error}") from error
