"""Chats by a template of the model's own: which tokens are learnt, what the last turn keeps, what is refused."""

import pytest

from deepseek_jax.data.chat import encode_chat, encode_prompt, prompt_opens_thinking
from deepseek_jax.data.special_tokens import ASSISTANT, BOS, DEEPSEEK_TEMPLATE, EOS, EOT, USER
from deepseek_jax.data.template import ChatTemplate
from deepseek_jax.data.tokenizer import Tokenizer

CHATML = (
    "{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>\n{{ m.content | trim }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
# As R1's: every answer loses its thinking. OPEN: as since February 2025, prompts open it.
R1 = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}<｜User｜>{{ m.content }}{% else %}"
    "<｜Assistant｜>{{ m.content.split('</think>')[-1] }}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<｜Assistant｜>{% endif %}"
)
OPEN = R1.replace("<｜Assistant｜>{% endif %}", "<｜Assistant｜><think>\n{% endif %}")
TALK = [
    {"role": "user", "content": "1+1?"},
    {"role": "assistant", "content": "<think>\neasy</think>\n\n2"},
    {"role": "user", "content": "2+2?"},
    {"role": "assistant", "content": "<think>\nhard</think>\n\n4"},
]
APART = {"role": "assistant", "content": "2", "thinking": "easy"}


def speaker(tokenizer: Tokenizer, source: str, **names) -> Tokenizer:
    template = ChatTemplate(source, {"bos_token": BOS, "eos_token": EOS})
    return Tokenizer(tokenizer._special, template=template, **names)


def shown(tokenizer: Tokenizer, messages, tools=None) -> list[str]:
    """The text of each sample, what is learnt in brackets."""
    texts = []
    for ids, mask in encode_chat(tokenizer, messages, tools):
        out, inside = "", False
        for token, flag in [*zip(ids, mask, strict=True), (None, 0)]:
            if bool(flag) != inside:
                out, inside = out + ("]" if inside else "["), bool(flag)
            out += "" if token is None else tokenizer.decode([token], skip_special_tokens=False)
        texts.append(out)
    return texts


def test_every_answer_is_learnt_with_the_token_that_ends_it(tokenizer):
    talk = [{"role": "system", "content": " Be brief. "}, *TALK[:1], {"role": "assistant", "content": " 2 "}]
    ours = speaker(tokenizer, CHATML)
    assert shown(ours, [*talk, *TALK[2:3], {"role": "assistant", "content": "4"}]) == [
        f"{BOS}<|system|>\nBe brief.{EOS}\n<|user|>\n1+1?{EOS}\n<|assistant|>\n[2{EOS}]\n"
        f"<|user|>\n2+2?{EOS}\n<|assistant|>\n[4{EOS}]\n"
    ]
    prompt = encode_prompt(ours, talk[:-1])
    assert encode_chat(ours, talk)[0][0][: len(prompt)] == prompt
    assert not prompt_opens_thinking(ours, talk[:-1])


def test_the_last_turn_keeps_the_thinking_that_the_template_drops(tokenizer):
    first = f"{BOS}{USER}1+1?{ASSISTANT}[<think>\neasy</think>\n\n2{EOS}]"
    before = f"{BOS}{USER}1+1?{ASSISTANT}\n\n2{EOS}{USER}2+2?{ASSISTANT}"
    assert shown(speaker(tokenizer, R1), TALK) == [first, f"{before}[<think>\nhard</think>\n\n4{EOS}]"]
    assert shown(speaker(tokenizer, R1), [TALK[0], APART, *TALK[2:]]) == [
        first.replace("easy", "easy\n"),
        f"{before}[<think>\nhard</think>\n\n4{EOS}]".replace("\n\n2", "2", 1),
    ]
    for source in (R1, OPEN):  # no thinking, none kept
        plain = [{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "2"}] * 2
        once = f"{USER}1+1?{ASSISTANT}[2{EOS}]"
        assert shown(speaker(tokenizer, source), plain) == [f"{BOS}{once}{once}"]


@pytest.mark.parametrize("content", ["<think>\nhard</think>\n\n4", "<think>hard</think>\n\n4", "hard</think>\n\n4"])
def test_what_a_prompt_opens_is_not_learnt(tokenizer, content):
    ours = speaker(tokenizer, OPEN)
    talk = [*TALK[:3], {"role": "assistant", "content": content}]
    before = f"{BOS}{USER}1+1?{ASSISTANT}\n\n2{EOS}{USER}2+2?{ASSISTANT}<think>\n"
    first = f"{BOS}{USER}1+1?{ASSISTANT}<think>\n[easy</think>\n\n2{EOS}]"
    assert shown(ours, talk) == [first, f"{before}[hard</think>\n\n4{EOS}]"]
    assert ours.decode(encode_prompt(ours, talk[:-1]), skip_special_tokens=False) == before
    assert prompt_opens_thinking(ours, talk[:-1])


def test_thinking_without_an_answer(tokenizer):
    talk = [*TALK[:1], {"role": "assistant", "content": "<think>\nnever</think>"}]
    assert shown(speaker(tokenizer, R1), talk) == [f"{BOS}{USER}1+1?{ASSISTANT}[<think>\nnever</think>{EOS}]"]


def test_deepseeks_format_as_a_template_is_written_as_ids(tokenizer):
    """What a tokenizer that was trained here saves: read again, users' texts still make no special token."""
    ours = speaker(tokenizer, DEEPSEEK_TEMPLATE)
    talk = [{"role": "system", "content": "s"}, {"role": "user", "content": f"{EOS}<think>"}, *TALK[1:]]
    assert encode_chat(ours, talk) == encode_chat(tokenizer, talk)
    assert encode_prompt(ours, talk[:-1]).count(ours.eos_id) == 1
    clean = [*TALK[:2], talk[0], *TALK[2:], talk[0]]  # system messages open it wherever they stand

    def written(messages, **given) -> list[int]:
        assert ours.template is not None
        return ours.encode(ours.template.render(messages, **given), allow_special=True)

    assert written(clean[:4]) == encode_prompt(tokenizer, clean[:4])
    assert written(clean[:5], add_generation_prompt=False) == encode_chat(tokenizer, clean[:5])[-1][0]
    assert ours.decode(written(clean), skip_special_tokens=False).startswith(f"{BOS}s\n\ns{USER}")


def test_an_answer_that_is_written_otherwise_later_has_a_sample_of_its_own(tokenizer):
    marked = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{{ '!' if loop.last and m.role == 'assistant' }}"
    marked += "{{ eos_token }}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
    talk = [{"role": "user", "content": "1"}, {"role": "assistant", "content": "2"}]
    first, again = f"<|user|>1{EOS}<|assistant|>[2!{EOS}]", f"<|user|>1{EOS}<|assistant|>2{EOS}"
    samples = [first, again + first, again * 2 + first]
    assert shown(speaker(tokenizer, marked), talk * 3) == samples
    unlearnt = [talk[0], talk[1] | {"weight": 0}]
    assert shown(speaker(tokenizer, marked), [*talk, *unlearnt, *talk]) == [samples[0], samples[2]]


def test_what_cannot_be_learnt_is_named(tokenizer):
    def refused(source: str, match: str, talk=TALK) -> None:
        with pytest.raises(ValueError, match=match):
            encode_chat(speaker(tokenizer, source), talk)

    answer = {"role": "assistant", "content": "2"}
    counted = CHATML.replace("{{ bos_token }}", "{{ messages | length }}")
    refused(counted, "prompt for message 3 is not how it writes the conversation")
    last = "{% for m in messages %}{{ m.content }}{% if loop.last %}!{% endif %}{% endfor %}"
    refused(last, "prompt for message 1", [*TALK[:1], answer])
    refused(
        R1.replace("[-1]", "[-1] | upper"), "its answer is not found", [*TALK[:1], {**answer, "content": "</think>b"}]
    )
    refused(CHATML, "no message of role 'assistant' answers", TALK[:1])
    refused("{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}", "non-empty list", [])
    with pytest.raises(ValueError, match="to be answered, it must be 'user'"):
        encode_prompt(speaker(tokenizer, CHATML), TALK)
    across = [{"role": "user", "content": "de"}, {"role": "assistant", "content": "f"}]
    bare = (
        "{% for m in messages %}{{ m.content }}{% endfor %}{% if not add_generation_prompt %}{{ eos_token }}{% endif %}"
    )
    refused(bare, "runs across the edge of a turn, after 'de'", across)


def test_a_template_without_a_stop_token_is_told(tokenizer):
    ours = speaker(tokenizer, CHATML.replace("eos_token", f"'{EOT}'"))
    with pytest.warns(UserWarning, match="ends an answer with no stop token"):
        (text,) = shown(ours, [*TALK[:1], {"role": "assistant", "content": "2"}])
        assert text.endswith(f"[2{EOT}\n]")


def test_without_any_format_chats_cannot_be_written(tokenizer):
    with pytest.raises(ValueError, match="no chat template and no <｜User｜>"):
        encode_prompt(Tokenizer(tokenizer._special, bos=None), TALK[:1])


CALL = {"type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {}}}]
CALLING = [TALK[0], {"role": "assistant", "tool_calls": [CALL]}, {"role": "tool", "content": "2"}, TALK[3]]


def test_what_a_template_leaves_out_is_named(tokenizer):
    def refused(match: str, talk, source: str = R1.replace("{% else %}", "{% elif m.role == 'assistant' %}")) -> None:
        for encode in (encode_chat, encode_prompt):
            with pytest.raises(ValueError, match=match):
                encode(speaker(tokenizer, source), talk if encode is encode_chat else [*talk, TALK[0]])

    refused("leaves out message 0, of role 'developer'", [{"role": "developer", "content": "Be kind."}, *TALK[:2]])
    refused("leaves out message 0, of role 'system'", [{"role": "system", "content": "Be kind."}, *TALK[:2]])
    refused("writes no tool calls", CALLING, CHATML.replace("m.content", "(m.content or '')"))
    with pytest.warns(UserWarning, match="does not write the tools"):
        shown(speaker(tokenizer, CHATML), TALK[:2], TOOLS)


@pytest.mark.parametrize("form", ["", " | tojson", " | tojson(indent=1)"])
@pytest.mark.parametrize("given", ['{"a": 1}', {"a": 1}])
def test_arguments_are_written_as_json_once(tokenizer, form, given):
    calls = "{% for c in m.tool_calls or [] %}{{ c.function.name }}{{ c.function.arguments FORM }}{% endfor %}"
    calls = calls.replace("FORM", form)
    ours = speaker(tokenizer, CHATML.replace("{{ m.content | trim }}", "{{ m.content or '' }}" + calls))
    call = CALL | {"function": CALL["function"] | {"arguments": given}}
    answered = {"role": "tool", "content": "{'a': 1}"}  # its own words are no distorted arguments
    (text,) = shown(ours, [TALK[0], {"role": "assistant", "tool_calls": [call]}, answered, TALK[3]])
    assert ('[add{"a": 1}' if "indent" not in form else '[add{\n "a": 1\n}') in text


def test_a_greeting_answers_nothing(tokenizer):
    greeted = [{"role": "assistant", "content": "Hi."}, *TALK[:1], {"role": "assistant", "content": "2"}]
    text = f"{BOS}<|assistant|>\nHi.{EOS}\n<|user|>\n1+1?{EOS}\n<|assistant|>\n[2{EOS}]\n"
    assert shown(speaker(tokenizer, CHATML), greeted) == [text]
