"""The chat template and its loss mask; the text is compared with R1's own template where that is at hand."""

import json
from pathlib import Path

import pytest

from deepseek_jax.data.chat import check_messages, encode_chat, encode_prompt, split_thinking
from deepseek_jax.data.tokenizer import ASSISTANT, BOS, END_THINK, EOS, SPECIAL_TOKENS, THINK, USER, Tokenizer

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
    ids, mask = encode_chat(tokenizer, TWO_TURNS)
    assert tokenizer.decode(ids, skip_special_tokens=False) == (
        f"{BOS}Be brief.{USER}1+1?{ASSISTANT}\n\n2{EOS}{USER}and 2+2?{ASSISTANT}{THINK}double{END_THINK}4{EOS}"
    )
    assert learnt(tokenizer, ids, mask) == [f"\n\n2{EOS}", f"{THINK}double{END_THINK}4{EOS}"]
    assert ids.count(tokenizer.think_id) == ids.count(tokenizer.end_think_id) == 1
    assert set(mask) == {0, 1}


def test_prompt_is_the_chat_up_to_the_answer(tokenizer: Tokenizer) -> None:
    ids, mask = encode_chat(tokenizer, TWO_TURNS)
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
    ids, _ = encode_chat(tokenizer, messages)
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
    ("messages", "message"),
    [
        ([], "non-empty list"),
        ("hello", "non-empty list"),
        ([{"role": "user"}], "message 0 must have exactly the keys"),
        ([{"role": "user", "content": "x", "tool_calls": []}], "message 0 must have exactly the keys"),
        ([{"role": "tool", "content": "x"}], "role 'tool'; allowed are system, user, assistant"),
        ([{"role": ["user"], "content": "x"}], "role \\['user'\\]; allowed"),
        ([{"role": "user", "content": None}], "message 0 has content of type NoneType"),
    ],
)
def test_wrong_messages_are_named(messages: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_messages(messages)


def test_the_conversation_must_fit(tokenizer: Tokenizer) -> None:
    for encode in (encode_chat, encode_prompt):
        with pytest.raises(ValueError, match="role 'tool'"):
            encode(tokenizer, [{"role": "tool", "content": "x"}])
    with pytest.raises(ValueError, match="must be 'assistant'"):
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
