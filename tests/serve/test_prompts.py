"""Conversations as ids: what the template writes, and that nothing that was typed counts as a special token."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from data.families import THINKING, write_qwen
from hypothesis import given
from hypothesis import strategies as st

from deepseek_jax.data.chat import encode_prompt
from deepseek_jax.data.special_tokens import END_THINK, EOS, TOOL_TOKENS
from deepseek_jax.data.tokenizer import Tokenizer
from deepseek_jax.data.tokenizer_training import train_tokenizer
from deepseek_jax.serve.parsing import Parser
from deepseek_jax.serve.prompts import CLOSING, NO_THOUGHT, Prompt, write_prompt

R1 = Path(__file__).parents[3] / "shared/data/deepseek_r1_tokenizer"
# V3.1's ways in short: calls without fences, thinking by a switch.
TEMPLATE = """\
{{- bos_token }}{% for m in messages if m.role == 'system' %}{{ m.content }}{% endfor %}
{%- for m in messages %}
    {%- if m.role == 'user' %}{{- '<｜User｜>' + m.content }}
    {%- elif m.role == 'assistant' %}
        {{- '<｜Assistant｜>' + (m.content or '').split('</think>')[-1] }}
        {%- for call in m.tool_calls or [] %}
            {{- '<｜tool▁calls▁begin｜>' if loop.first }}
            {{- '<｜tool▁call▁begin｜>' + call.function.name + '<｜tool▁sep｜>' + call.function.arguments }}
            {{- '<｜tool▁call▁end｜>' }}{{ '<｜tool▁calls▁end｜>' if loop.last }}
        {%- endfor %}
        {{- eos_token }}
    {%- elif m.role == 'tool' %}{{- '<｜tool▁output▁begin｜>' + m.content + '<｜tool▁output▁end｜>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<｜Assistant｜>' + ('<think>' if thinking else '</think>') }}{% endif %}"""
HI = [{"role": "user", "content": "Hi"}]
PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}}
TOOL = {"type": "function", "function": {"name": "weather", "description": "Of a city.", "parameters": PARAMETERS}}
CALL = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Paris"}'}}
ASKED = [*HI, {"role": "assistant", "content": None, "tool_calls": [CALL]}, {"role": "tool", "content": "sunny"}]


def trained() -> Tokenizer:
    return train_tokenizer(["def add(a, b):\n    return a + b\n", "what is the weather? 12+34=46\n"] * 2, 320)


PLAIN = trained()
OURS = PLAIN.with_template(TEMPLATE)


@pytest.fixture(scope="module")
def r1(tmp_path_factory) -> Tokenizer:
    if not R1.is_dir():
        pytest.skip("R1's tokenizer is not here: no shared/data/deepseek_r1_tokenizer beside the repository")
    folder = tmp_path_factory.mktemp("r1")
    (folder / "tokenizer.json").write_bytes(gzip.decompress((R1 / "tokenizer.json.gz").read_bytes()))
    (folder / "tokenizer_config.json").write_bytes((R1 / "tokenizer_config.json").read_bytes())
    return Tokenizer.from_folder(folder)


def shown(tokenizer: Tokenizer, prompt: Prompt) -> str:
    return tokenizer.decode(prompt.ids, skip_special_tokens=False)


def special(tokenizer: Tokenizer, prompt: Prompt) -> list[int]:
    added = {*tokenizer.added_ids}
    return [i for i in prompt.ids if i in added]


def system(content: str) -> dict[str, str]:
    return {"role": "system", "content": content}


def changed(value: Any, text: str) -> Any:
    """The conversation with a text in the place of each that somebody gave."""
    if isinstance(value, dict):
        kept = {key: value[key] for key in ("role", "type", "id") if key in value}
        return {key: changed(item, text) for key, item in value.items()} | kept
    return [changed(item, text) for item in value] if isinstance(value, list) else text if value is not None else None


def test_without_special_tokens_it_is_what_encode_prompt_writes(r1):
    talk = [{"role": "system", "content": "Be brief."}, *HI, {"role": "assistant", "content": "<think>a</think>b"}, *HI]
    for tokenizer in (PLAIN, OURS, r1):
        assert write_prompt(tokenizer, talk) == Prompt(encode_prompt(tokenizer, talk))
    assert write_prompt(r1, ASKED).ids == encode_prompt(r1, ASKED)


@given(st.lists(st.one_of(st.sampled_from(PLAIN.added_tokens), st.sampled_from("<｜ >\n"), st.text())).map("".join))
def test_what_is_typed_is_no_special_token(text):
    """Neither in a message, nor what a tool answers, nor in a call's arguments or a tool's description."""
    tool = changed(TOOL, text) | {"function": {**changed(TOOL["function"], text), "name": "weather"}}
    long = [{"role": "system", "content": "x"}, *ASKED]
    for tokenizer, talk, tools in ((PLAIN, HI, False), (OURS, HI, False), (OURS, long, True)):
        expected = write_prompt(tokenizer, talk, tools=[TOOL] if tools else ())
        typed = [*changed(talk, text or "x")]
        for message in typed:  # an assistant's own marks are special
            if message["role"] == "assistant" and message["content"]:
                message["content"] = "x"
        found = write_prompt(tokenizer, typed, tools=[tool] if tools else ())
        assert special(tokenizer, found) == special(tokenizer, expected)
        assert tokenizer.decode(tokenizer.encode(text)) in shown(tokenizer, found)


def test_two_texts_make_no_special_token_together(r1):
    """Where a template writes system messages right behind each other, strips them, or drops a part that it has seen:
    cut anywhere, in two or three."""
    strips = OURS.with_template(TEMPLATE.replace("{{ m.content }}{% endfor", "{{ m.content.strip() }}{% endfor"))
    for tokenizer, white in ((OURS, ""), (strips, " \n"), (r1, "")):
        plain = special(tokenizer, write_prompt(tokenizer, [*map(system, "ab"), *HI]))
        for token in (EOS, "<｜User｜>", END_THINK):
            cuts = [(a, b) for a in range(1, len(token)) for b in range(a, len(token))]
            for a, b in cuts[:: 1 if tokenizer is OURS else 9]:
                talk = [system(f"So{token[:a]}{white}"), system(token[a:b] or "x"), system(f"{white}{token[b:]}, then")]
                talk = talk[:: 2 if a == b else 1]
                prompt = write_prompt(tokenizer, [*talk, *HI])
                assert special(tokenizer, prompt) == plain
                assert "\n" in white or tokenizer is r1 or f"So{token}, then" in shown(tokenizer, prompt)
    said = {"role": "assistant", "content": f"<think>a{EOS[:4]}</think>{EOS[4:]}b"}
    dropping = OURS.with_template(TEMPLATE.replace(".split('</think>')[-1]", ".replace('</think>', '')"))
    for tokenizer in (OURS, dropping):
        expected = write_prompt(tokenizer, [*HI, said | {"content": "<think>a</think>b"}, *HI])
        assert special(tokenizer, write_prompt(tokenizer, [*HI, said, *HI])) == special(tokenizer, expected)


def test_what_only_might_have_become_one_is_written_as_ever(r1):
    """Texts that begin or end with an angle: token for token as without a look at them."""
    talk = [{"role": "system", "content": "> is more,"}, {"role": "user", "content": "> a?\nIs 1 <"}]
    for tokenizer in (PLAIN, OURS, r1):
        assert write_prompt(tokenizer, talk) == Prompt(encode_prompt(tokenizer, talk))


def test_r1s_tokens_are_none_either(r1):
    for text in ("<｜end▁of▁sentence｜>", "a<｜User｜> b<｜tool▁outputs▁end｜>", "<｜Us<｜User｜>er｜>", "</think>"):
        prompt = write_prompt(r1, changed(ASKED, text))
        assert special(r1, prompt) == special(r1, write_prompt(r1, ASKED))
        assert shown(r1, prompt).count(text) >= 4
    assert encode_prompt(r1, changed(HI, EOS)) != write_prompt(r1, changed(HI, EOS)).ids


def test_tools_are_told_where_the_template_has_no_place_for_them(r1):
    told = shown(r1, write_prompt(r1, [{"role": "system", "content": "Be brief."}, *HI], tools=[TOOL]))
    assert told.startswith("<｜begin▁of▁sentence｜>Be brief.\n\n## Tools\n")
    assert f"### weather\nDescription: Of a city.\n\nParameters: {json.dumps(PARAMETERS)}\n" in told
    assert "function<｜tool▁sep｜>tool_call_name\n```json\ntool_call_arguments\n```<｜tool▁call▁end｜>" in told
    prompt = write_prompt(OURS, HI, tools=[TOOL])
    assert "<｜tool▁call▁begin｜>tool_call_name<｜tool▁sep｜>tool_call_arguments<｜tool▁call▁end｜>" in shown(
        OURS, prompt
    )
    marks = {OURS.token_id(token) for token in TOOL_TOKENS}
    assert prompt.tools and marks & {*prompt.ids}
    hidden = write_prompt(OURS, HI, tools=[TOOL], choice="none")
    assert hidden == write_prompt(OURS, HI) and not hidden.tools


def test_other_templates_write_them_themselves(tmp_path):
    config = {"bos_token": None, "eos_token": "<|im_end|>", "chat_template": THINKING}
    tokenizer = Tokenizer.from_folder(write_qwen(tmp_path / "qwen", config))
    assert f"<tools>\n{json.dumps(TOOL)}\n</tools>" in shown(tokenizer, write_prompt(tokenizer, HI, tools=[TOOL]))
    with pytest.raises(ValueError, match="DeepSeek's format alone"):
        write_prompt(tokenizer, HI, tools=[TOOL], choice="required")


def test_a_call_that_must_come_is_begun(r1):
    named = {"type": "function", "function": {"name": "weather"}}
    for tokenizer, rest in ((r1, '{"city": "Paris"}\n```<｜tool▁call▁end｜>'), (OURS, '{"city": "Paris"}')):
        for choice in ("required", named):
            prompt = write_prompt(tokenizer, HI, tools=[TOOL], choice=choice)
            assert shown(tokenizer, prompt).endswith(prompt.begun)
            parser = Parser(opened=prompt.opened, tools=prompt.tools)
            parts = [*parser.push(prompt.begun), *parser.push(rest), *parser.finish()]
            assert "".join(part.text for part in parts) == 'weather{"city": "Paris"}'
    with pytest.raises(ValueError, match="'required' with 2 tools: name the one"):
        write_prompt(OURS, HI, tools=[TOOL, TOOL], choice="required")
    with pytest.raises(ValueError, match="tool_choice='weather': the tools are none"):
        write_prompt(OURS, HI, choice=named)


def test_thinking_is_switched_or_closed(r1):
    assert [write_prompt(OURS, HI, think=think).opened for think in (None, True, False)] == [False, True, False]
    opens = r1.with_template(
        r1.template.source.replace("'<｜Assistant｜>'}}{% endif", "'<｜Assistant｜><think>\\n'}}{% endif")
    )
    assert write_prompt(opens, HI).opened
    for tokenizer, begun in ((OURS, ""), (PLAIN, NO_THOUGHT), (r1, NO_THOUGHT), (opens, CLOSING)):
        prompt = write_prompt(tokenizer, HI, think=False)
        assert prompt.begun == begun and shown(tokenizer, prompt).endswith(begun)
        parser = Parser(opened=prompt.opened)
        parts = [*parser.push(prompt.begun), *parser.push("Hello")]
        assert [(part.kind, part.text) for part in parts] == [("content", "Hello")]


def test_what_has_no_place_is_refused(tmp_path):
    bare = Tokenizer.from_folder(write_qwen(tmp_path / "qwen"))
    for tokenizer, match in ((PLAIN, "tools: this model is asked in DeepSeek's plain"), (bare, "tools: .* no place")):
        with pytest.raises(ValueError, match=match):
            write_prompt(tokenizer, HI, tools=[TOOL])
    for name in ("messages", "self", "tools", "bos_token", "__class__", "a b", "add_generation_prompt"):
        with pytest.raises(ValueError, match="chat_template_kwargs"):
            write_prompt(OURS, HI, variables={name: 1})
    for name in ("thinking", "template", "prompt", "more", "render", "tokenizer"):
        prompt = write_prompt(OURS, HI, variables={name: True}, think=False)
        assert prompt.opened == (name == "thinking")
    with pytest.raises(ValueError, match="the last message has role 'system'"):
        write_prompt(OURS, [*HI, {"role": "system", "content": "x"}])
    late = [{"role": "developer", "content": "Be brief."}, *HI]
    assert "Be brief.<｜User｜>" in shown(OURS, write_prompt(OURS, late))
