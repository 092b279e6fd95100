"""A base model is asked by a plain-text template, R1-Zero's to the letter, and keeps it wherever it goes."""

import json

import pytest
from data.families import llama, qwen, write_qwen

from deepseek_jax.data.chat import encode_chat, encode_prompt
from deepseek_jax.data.chat_templates import with_template
from deepseek_jax.data.model_folder import TextFiles
from deepseek_jax.data.special_tokens import BOS, EOS
from deepseek_jax.data.tokenizer import Tokenizer

# arXiv 2501.12948, table 1, "prompt" in the place of the question.
PAPER = (
    "A conversation between User and Assistant. The user asks a question, and the Assistant solves it. The assistant "
    "first thinks about the reasoning process in the mind and then provides the user with the answer. The reasoning "
    "process and answer are enclosed within <think> </think> and <answer> </answer> tags, respectively, i.e., <think> "
    "reasoning process here </think> <answer> answer here </answer>. User: prompt. Assistant:"
)
ASKED = [{"role": "user", "content": "prompt"}]
ANSWER = "<think> 1 and 1 </think> <answer> 2 </answer>"


def shown(tokenizer: Tokenizer, ids) -> str:
    return tokenizer.decode(ids, skip_special_tokens=False)


def test_a_base_is_asked_as_r1_zero_was(tokenizer):
    base = Tokenizer(tokenizer._special)
    assert shown(base, encode_prompt(base, ASKED)) != BOS + PAPER
    zero = with_template(base, "r1_zero")
    assert shown(zero, encode_prompt(zero, ASKED)) == BOS + PAPER
    ((ids, mask),) = encode_chat(zero, [*ASKED, {"role": "assistant", "content": ANSWER}])
    assert shown(zero, ids) == f"{BOS}{PAPER} {ANSWER}{EOS}"
    assert shown(zero, [i for i, flag in zip(ids, mask, strict=True) if flag]) == f" {ANSWER}{EOS}"
    with pytest.raises(ValueError, match="leaves out message 0, of role 'system'"):
        encode_prompt(zero, [{"role": "system", "content": "Be brief"}, *ASKED])


@pytest.mark.parametrize("make, start", [(qwen, ""), (llama, "<s>")], ids=["no_bos", "bos"])
def test_tokenizers_without_chats_have_it(make, start):
    """As raw text begins: with BOS where the tokenizer has it there."""
    base = make()
    with pytest.raises(ValueError, match="no chat template"):
        encode_prompt(base, ASKED)
    zero = with_template(base, "r1_zero")
    assert shown(zero, encode_prompt(zero, ASKED)).replace("<s> ", "<s>") == start + PAPER


def test_it_is_written_beside_the_tokenizer_and_transformers_would_read_it(tmp_path):
    """In the place of all that the folder had, which is as it was."""
    source = write_qwen(tmp_path / "base")
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "tool_use.jinja").write_text("{{ tools }}")
    base = Tokenizer.from_folder(source)
    zero = with_template(base, "r1_zero")
    zero.save(tmp_path / "run")
    read = Tokenizer.from_folder(tmp_path / "run")
    assert encode_prompt(read, ASKED) == encode_prompt(zero, ASKED) != encode_prompt(base, ASKED)
    assert [*TextFiles.read(tmp_path / "run").files].count("chat_template.jinja") == 1
    assert "chat_template" not in json.loads((tmp_path / "run" / "tokenizer_config.json").read_text())
    assert not (tmp_path / "run" / "additional_chat_templates").exists()
    assert encode_prompt(Tokenizer.from_folder(source), ASKED) == encode_prompt(base, ASKED)


def test_a_file_of_ones_own(tokenizer, tmp_path):
    file = tmp_path / "mine.jinja"
    file.write_text("{% for m in messages %}Q {{ m.content }}\n{% endfor %}A")
    mine = with_template(tokenizer, str(file))
    assert shown(mine, encode_prompt(mine, ASKED)) == "Q prompt\nA"
    assert with_template(tokenizer, "") is tokenizer
    with pytest.raises(ValueError, match="chat_template='r1-zero': expected r1_zero or a file"):
        with_template(tokenizer, "r1-zero")
    file.write_text("{% if %}")
    with pytest.raises(ValueError, match="mine.jinja': chat template: line 1"):
        with_template(tokenizer, str(file))
