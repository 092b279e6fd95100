"""R1's tokenizer and template against transformers, live: the same text, the same ids."""

import gzip
import json
from pathlib import Path

import pytest
from data.families import QWEN, THINKING, write_qwen
from hypothesis import given, settings
from hypothesis import strategies as st
from small import tokenizer

from deepseek_jax.data.chat import encode_chat, encode_prompt
from deepseek_jax.data.special_tokens import BOS, EOS, SPECIAL_TOKENS
from deepseek_jax.data.template import ChatTemplate
from deepseek_jax.data.tokenizer import Tokenizer

transformers = pytest.importorskip("transformers")

R1 = Path(__file__).parents[3] / "shared/data/deepseek_r1_tokenizer"
CASES = json.loads((Path(__file__).parents[1] / "data/golden_templates.json").read_text(encoding="utf-8"))["cases"]
OLD_END, NEW_END = "{{'<｜Assistant｜>'}}{% endif %}", "{{'<｜Assistant｜><think>\\n'}}{% endif %}"


@pytest.fixture(scope="module", params=["first", "since_february"])
def both(request, tmp_path_factory):
    """(ours, theirs) with either generation of the template."""
    if not (R1 / "tokenizer.json.gz").is_file():
        pytest.skip("R1's tokenizer is not here: no shared/data/deepseek_r1_tokenizer beside the repository")
    folder = tmp_path_factory.mktemp(request.param)
    (folder / "tokenizer.json").write_bytes(gzip.decompress((R1 / "tokenizer.json.gz").read_bytes()))
    config = json.loads((R1 / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert config["chat_template"].count(OLD_END) == 1
    if request.param == "since_february":
        config["chat_template"] = config["chat_template"].replace(OLD_END, NEW_END)
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return Tokenizer.from_folder(folder), transformers.AutoTokenizer.from_pretrained(str(folder))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_conversations(both, case):
    ours, theirs = both
    given = {"tools": case["tools"], "add_generation_prompt": case["prompt"]}
    try:
        text = theirs.apply_chat_template(case["messages"], tokenize=False, **given)
    except Exception:
        if case["name"] != "tools, no text in the call":  # ours keeps None there, see tests/data/test_template.py
            with pytest.raises(ValueError, match="chat template: "):
                ours.template.render(case["messages"], **given)
        return
    assert ours.template.render(case["messages"], **given) == text
    ids = theirs.apply_chat_template(case["messages"], return_dict=False, **given)
    assert ours.encode(text, allow_special=True) == ids
    assert ours.decode(ids, skip_special_tokens=False) == theirs.decode(ids) == text


COMMON = [*SPECIAL_TOKENS, "你好", "🙂", "  ", "\r\n", "\t", "12345", " def f(x):"]
anything = st.text(max_size=20) | st.sampled_from(COMMON)


def test_random_strings(both):
    ours, theirs = both

    @settings(max_examples=1500)  # with each generation of the template, 3000 in all
    @given(parts=st.lists(anything, max_size=8), skip=st.booleans())
    def same(parts: list[str], skip: bool) -> None:
        text = "".join(parts)
        ids = ours.encode(text, allow_special=True)
        assert ids == theirs.encode(text) == theirs.encode(text, add_special_tokens=False)
        assert ours.decode(ids, skip_special_tokens=skip) == theirs.decode(ids, skip_special_tokens=skip)

    same()


def test_special_tokens(both):
    ours, theirs = both
    assert (ours.bos_ids, ours.eos_id, ours.pad_id) == ([theirs.bos_token_id], theirs.eos_token_id, theirs.pad_token_id)
    assert ours.vocab_size == len(theirs)


TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "12+34?"},
    {"role": "assistant", "content": "<think>easy</think>\n\n46"},
    {"role": "user", "content": "and 7*8?"},
    {"role": "assistant", "content": "<think>hard</think>56"},
]


def test_a_tokenizer_trained_here_is_read_by_transformers(tmp_path):
    """Its folder alone: the same special tokens, and DeepSeek's format out of the template that it saves."""
    ours = tokenizer()
    ours.save(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "deepseek_v3"}')
    theirs = transformers.AutoTokenizer.from_pretrained(str(tmp_path))
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (0, 1, 2)
    text = "def add(a, b):  # 12+34<think>"
    assert theirs.encode(text) == ours.encode(text, allow_special=True) and theirs.decode(ours.encode(text)) == text
    for part in (TALK[:2], TALK[1:2], TALK[:4]):
        asked = theirs.apply_chat_template(part, add_generation_prompt=True, return_dict=False)
        assert asked == encode_prompt(ours, part)
        assert encode_prompt(Tokenizer.from_folder(tmp_path), part) == asked
    for talk in (TALK[:3], TALK):
        assert theirs.apply_chat_template(talk, return_dict=False) == encode_chat(ours, talk)[-1][0]


def test_the_loss_mask_is_that_of_generation_blocks(tmp_path):
    """transformers marks what stands in the blocks; ours finds it from prompts, in the same template without them."""
    marked = (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}<|assistant|>\n"
        "{% generation %}{{ m.content }}{{ eos_token }}{% endgeneration %}{{ '\\n' }}"
        "{% else %}<|{{ m.role }}|>\n{{ m.content }}{{ eos_token }}\n{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
    )
    plain = marked.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    ours = Tokenizer(tokenizer()._special, template=ChatTemplate(plain, {"bos_token": BOS, "eos_token": EOS}))
    ours.save(tmp_path)
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(str(tmp_path))
    found = theirs.apply_chat_template(TALK, chat_template=marked, return_dict=True, return_assistant_tokens_mask=True)
    assert encode_chat(ours, TALK) == [(found["input_ids"], found["assistant_masks"])]
    assert encode_prompt(ours, TALK[:4]) == theirs.apply_chat_template(
        TALK[:4], add_generation_prompt=True, return_dict=False
    )


CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": "ü", "b": [1]}}}
TOOLS = [{"type": "function", "function": {"name": "add", "description": "<&>", "parameters": {"type": "object"}}}]
ASK, SAY = {"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "2"}
THOUGHT = SAY | {"reasoning_content": "easy"}
CALLING = SAY | {"content": "", "tool_calls": [CALL], "reasoning_content": "so"}
STEPS = [CALLING, {"role": "tool", "content": "2"}, THOUGHT]


@pytest.mark.parametrize(
    ("talk", "tools", "samples"),
    [
        ([ASK, SAY], None, [1]),
        ([ASK, THOUGHT], None, [1]),
        ([{"role": "system", "content": "s"}, ASK, *STEPS], TOOLS, [(2, 4)]),  # one question: written as it was given
        ([ASK, SAY, ASK, SAY], None, [1, 3]),  # an answer's empty thinking goes once a question follows
        ([ASK, THOUGHT, ASK, *STEPS], TOOLS, [1, (3, 5)]),
    ],
)
def test_conversations_of_many_turns_are_what_transformers_writes(tmp_path, talk, tools, samples):
    """Each sample is a conversation that ends with an answer, and what is learnt is what a prompt does not hold."""
    ours = Tokenizer.from_folder(write_qwen(tmp_path / "q", {"eos_token": QWEN[2], "chat_template": THINKING}))
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(str(tmp_path / "q"))

    def written(messages, **options) -> list[int]:
        return theirs.apply_chat_template(messages, tools=tools, return_dict=False, **options)

    expected = []
    for learnt in (sample if isinstance(sample, tuple) else (sample,) for sample in samples):
        ids = written(talk[: learnt[-1] + 1])
        mask = [0] * len(ids)
        for index in learnt:
            prompt, end = written(talk[:index], add_generation_prompt=True), written(talk[: index + 1])
            assert ids[: len(prompt)] == prompt and ids[: len(end)] == end and end[-2] == ours.eos_id
            mask[len(prompt) : len(end) - 1] = [1] * (len(end) - 1 - len(prompt))  # a newline stands behind the eos
        expected.append((ids, mask))
    as_text = [dict(m) for m in talk]
    for message in as_text:
        if "tool_calls" in message:  # as OpenAI's logs have them
            function = CALL["function"] | {"arguments": json.dumps(CALL["function"]["arguments"])}
            message["tool_calls"] = [CALL | {"function": function, "id": "x"}]
    assert encode_chat(ours, talk, tools) == expected == encode_chat(ours, as_text, tools)
    for index in (i for i, m in enumerate(talk) if m["role"] == "assistant"):
        assert encode_prompt(ours, talk[:index], tools) == written(talk[:index], add_generation_prompt=True)


def test_tokens_that_only_the_map_names(tmp_path):
    """Where tokenizer_config.json names the same token otherwise or null, theirs is the map's and ours the config's."""
    folder = write_qwen(tmp_path, config={"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": QWEN[1]})
    (folder / "special_tokens_map.json").write_text(
        json.dumps({"bos_token": QWEN[0], "pad_token": {"content": QWEN[2]}})
    )
    ours, theirs = Tokenizer.from_folder(folder), transformers.AutoTokenizer.from_pretrained(str(folder))
    assert (ours.bos_id, ours.eos_id, ours.pad_id) == (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id)
    assert (ours.bos_id, ours.eos_id, ours.pad_id) == (0, 1, 2)
