"""The chat template and its loss mask; the text is compared with R1's own template where that is at hand."""

import json
from pathlib import Path

import pytest

from deepseek_jax.data.chat import encode_chat, encode_prompt, split_thinking
from deepseek_jax.data.special_tokens import ASSISTANT, BOS, END_THINK, EOS, SPECIAL_TOKENS, THINK, USER
from deepseek_jax.data.tokenizer import Tokenizer

R1_CONFIG = Path(__file__).parents[3] / "shared/data/deepseek_r1_tokenizer/tokenizer_config.json"

TWO_TURNS = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "1+1?"},
    {"role": "assistant", "content": "<think>easy</think>\n\n2"},
    {"role": "user", "content": "and 2+2?"},
    {"role": "assistant", "content": "<think>double</think>4"},
]


def learnt(tokenizer: Tokenizer, ids: list[int], mask: list[int]) -> list[str]:
    """The texts of the runs of 1 in the mask."""
    runs, previous = [], 0
    for token, flag in zip(ids, mask, strict=True):
        if flag and not previous:
            runs.append([])
        if flag:
            runs[-1].append(token)
        previous = flag
    return [tokenizer.decode(run, skip_special_tokens=False) for run in runs]


def test_text_and_mask_of_two_turns(tokenizer: Tokenizer) -> None:
    """Each answer is learnt with its own thinking, after a prompt that holds none."""
    first, (ids, mask) = encode_chat(tokenizer, TWO_TURNS)
    assert [first] == encode_chat(tokenizer, TWO_TURNS[:3])
    assert learnt(tokenizer, *first) == [f"{THINK}easy{END_THINK}\n\n2{EOS}"]
    assert tokenizer.decode(ids, skip_special_tokens=False) == (
        f"{BOS}Be brief.{USER}1+1?{ASSISTANT}\n\n2{EOS}{USER}and 2+2?{ASSISTANT}{THINK}double{END_THINK}4{EOS}"
    )
    assert learnt(tokenizer, ids, mask) == [f"{THINK}double{END_THINK}4{EOS}"]
    assert ids.count(tokenizer.think_id) == ids.count(tokenizer.end_think_id) == 1
    assert set(mask) == {0, 1}


def test_what_was_answered_without_thinking_is_one_sample(tokenizer: Tokenizer) -> None:
    plain: list[dict] = [*TWO_TURNS[:2], {"role": "assistant", "content": "2"}, *TWO_TURNS[3:]]
    plain += [{"role": "user", "content": "thanks"}]  # which nobody answers
    ((ids, mask),) = encode_chat(tokenizer, plain)
    assert learnt(tokenizer, ids, mask) == [f"2{EOS}", f"{THINK}double{END_THINK}4{EOS}"] and mask[-1] == 1
    plain[2] = plain[2] | {"weight": 0}
    ((same, mask),) = encode_chat(tokenizer, plain)
    assert same == ids and learnt(tokenizer, ids, mask) == [f"{THINK}double{END_THINK}4{EOS}"]


def test_reasoning_is_written_as_thinking(tokenizer: Tokenizer) -> None:
    apart = [TWO_TURNS[1], {"role": "assistant", "content": "2", "reasoning_content": "easy"}]
    ((ids, mask),) = encode_chat(tokenizer, apart)
    assert learnt(tokenizer, ids, mask) == [f"{THINK}\neasy\n{END_THINK}\n\n2{EOS}"]
    prompt = encode_prompt(tokenizer, [*apart, TWO_TURNS[3]])
    assert prompt == encode_prompt(tokenizer, [TWO_TURNS[1], {"role": "assistant", "content": "\n\n2"}, TWO_TURNS[3]])


def test_prompt_is_the_chat_up_to_the_answer(tokenizer: Tokenizer) -> None:
    ids, mask = encode_chat(tokenizer, TWO_TURNS)[-1]
    prompt = encode_prompt(tokenizer, TWO_TURNS[:-1])
    assert prompt[-1] == tokenizer.assistant_id
    assert ids[: len(prompt)] == prompt
    assert all(mask[len(prompt) :]) and mask[len(prompt) - 1] == 0


@pytest.mark.parametrize("role", ["user", "system"])
@pytest.mark.parametrize("token", SPECIAL_TOKENS)
def test_content_of_others_makes_no_special_token(tokenizer: Tokenizer, role: str, token: str) -> None:
    def count(content: str) -> int:
        messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
        messages[role == "user"]["content"] = content
        return encode_prompt(tokenizer, messages).count(tokenizer.token_id(token))

    assert count(f"x{token}y") == count("xy")


def test_assistant_content_makes_thinking_tokens_only(tokenizer: Tokenizer) -> None:
    messages = [
        {"role": "user", "content": "u"},
        {"role": "assistant", "content": f"{THINK}a{END_THINK}{EOS}{USER}"},
    ]
    ((ids, _),) = encode_chat(tokenizer, messages)
    assert (ids.count(tokenizer.eos_id), ids.count(tokenizer.user_id)) == (1, 1)
    assert (ids.count(tokenizer.think_id), ids.count(tokenizer.end_think_id)) == (1, 1)


@pytest.mark.parametrize(
    "messages",
    [
        TWO_TURNS[:2],
        TWO_TURNS[:4],
        [TWO_TURNS[1], TWO_TURNS[1]],
        [TWO_TURNS[1], TWO_TURNS[0], TWO_TURNS[2], TWO_TURNS[0], TWO_TURNS[3]],
    ],
)
def test_prompts_read_as_in_r1s_own_template(tokenizer: Tokenizer, messages: list[dict[str, str]]) -> None:
    if not R1_CONFIG.is_file():
        pytest.skip("R1's tokenizer_config.json is not here (shared/data/deepseek_r1_tokenizer)")
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    template = json.loads(R1_CONFIG.read_text())["chat_template"]
    expected = ImmutableSandboxedEnvironment().from_string(template)
    assert tokenizer.decode(encode_prompt(tokenizer, messages), skip_special_tokens=False) == expected.render(
        messages=messages, bos_token=BOS, add_generation_prompt=True
    )


@pytest.mark.parametrize(
    ("more", "tools", "message"),
    [
        ([{"role": "tool", "content": "x"}], None, "message 3 has role 'tool'"),
        ([{"role": "developer", "content": "x"}], None, "message 3 has role 'developer'"),
        ([{"role": "assistant", "tool_calls": [{"name": "f"}]}], None, "message 3 calls a tool"),
        ([], [{"name": "f"}], "the conversation has tools"),
    ],
)
def test_what_the_format_has_no_place_for_is_named(tokenizer: Tokenizer, more, tools, message: str) -> None:
    for encode, talk in ((encode_chat, [*more, TWO_TURNS[4]]), (encode_prompt, [*more, TWO_TURNS[3]])):
        with pytest.raises(ValueError, match=f"{message}.*DeepSeek's.*chat_template.jinja"):
            encode(tokenizer, [*TWO_TURNS[:3], *talk], tools)


def test_the_conversation_must_fit(tokenizer: Tokenizer) -> None:
    for encode in (encode_chat, encode_prompt):
        with pytest.raises(ValueError, match="role 'judge'"):
            encode(tokenizer, [{"role": "judge", "content": "x"}])
    with pytest.raises(ValueError, match="no message of role 'assistant' answers"):
        encode_chat(tokenizer, TWO_TURNS[:2])
    with pytest.raises(ValueError, match="must be 'user'"):
        encode_prompt(tokenizer, TWO_TURNS[:3])


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("<think>a b</think>\n\nc", ("a b", "c")),
        ("a</think>c", ("a", "c")),
        ("\n<think>never ends", ("never ends", "")),
        (" c ", (None, "c")),
        ("<think></think>c", ("", "c")),
        ("<think>a</think>b</think>c", ("a</think>b", "c")),
        ("", (None, "")),
    ],
)
def test_split_thinking(text: str, parts: tuple[str | None, str]) -> None:
    assert split_thinking(text) == parts
