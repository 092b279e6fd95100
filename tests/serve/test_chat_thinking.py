"""Thinking and tool calls through the server, as OpenAI's client reads them."""

import asyncio
import contextlib
import json

import openai
import pytest
from serve.fake import FakeAsker
from serve.test_parsing import ARGUMENTS, V3, V31
from serve.test_prompts import PARAMETERS, TEMPLATE, TOOL

from deepseek_jax.data.special_tokens import END_THINK, THINK
from deepseek_jax.serve.parsing import CALLS_BEGIN, CALLS_END
from deepseek_jax.serve.thinking import in_stages

THOUGHTS = "12+34 is 46. "
ANSWER = f"{THINK}\n{THOUGHTS}{END_THINK}\n\n46"
ASK = {"model": "fake", "messages": [{"role": "user", "content": "12+34?"}]}


class Thinker(FakeAsker):
    """Thinks, unless its prompt has closed the thinking: then it answers."""

    def __init__(self, answer=ANSWER, **options):
        super().__init__(answer, **options)
        self.thinks = self.answer

    async def submit(self, ids, sampling, draw):
        closed = self.tokenizer.end_think_id in ids
        self.answer = [*self.tokenizer.encode("So 46."), self.tokenizer.eos_id] if closed else self.thinks
        async with contextlib.aclosing(super().submit(ids, sampling, draw)) as events:
            async for event in events:
                yield event


def with_template(asker: FakeAsker) -> FakeAsker:
    asker.tokenizer = asker.tokenizer.with_template(TEMPLATE)
    return asker


def joined(stream) -> tuple[dict, list]:
    """What the deltas of a stream add up to, and its chunks."""
    chunks, told = [*stream], {"content": "", "reasoning": "", "reasoning_content": "", "calls": {}, "finish": None}
    for choice in (choice for chunk in chunks for choice in chunk.choices):
        given = choice.delta.model_dump()
        for name in ("content", "reasoning", "reasoning_content"):
            told[name] += given.get(name) or ""
        for call in given["tool_calls"] or ():
            function = told["calls"].setdefault(call["index"], {"id": call["id"], "name": "", "arguments": ""})
            function["name"] += call["function"].get("name") or ""
            function["arguments"] += call["function"].get("arguments") or ""
        told["finish"] = choice.finish_reason or told["finish"]
    return told, chunks


@pytest.mark.parametrize("at_once", [1, 100])
def test_thinking_stands_apart(client, at_once):
    asker = Thinker(at_once=at_once)
    ours = client(asker)
    whole = ours.chat.completions.create(**ASK)
    said = whole.choices[0].message.model_dump()
    assert (said["content"], said["reasoning_content"]) == ("46", THOUGHTS.strip()) and whole.choices[
        0
    ].finish_reason == "stop"
    thought = len(asker.tokenizer.encode("\n" + THOUGHTS))
    assert whole.usage.completion_tokens == len(asker.thinks)
    assert whole.usage.completion_tokens_details.reasoning_tokens == thought
    told, chunks = joined(ours.chat.completions.create(**ASK, stream=True, stream_options={"include_usage": True}))
    assert (told["content"], told["finish"]) == ("46", "stop")
    assert told["reasoning"] == told["reasoning_content"] == THOUGHTS.strip()
    assert chunks[-1].usage == whole.usage


def test_thinking_that_the_prompt_has_opened(client):
    asker = with_template(FakeAsker(f"{THOUGHTS}{END_THINK}46"))
    more = {"chat_template_kwargs": {"thinking": True}}
    said = client(asker).chat.completions.create(**ASK, extra_body=more).choices[0].message.model_dump()
    assert (said["content"], said["reasoning"]) == ("46", THOUGHTS.strip())
    cut = client(asker).chat.completions.create(**ASK, extra_body=more, max_tokens=3).choices[0]
    assert cut.message.content is None and cut.finish_reason == "length"


@pytest.mark.parametrize("at_once", [1, 4, 100])
@pytest.mark.parametrize("budget", [1, 5])
def test_thinking_ends_at_its_budget(client, budget, at_once):
    asker = Thinker(at_once=at_once)
    told, chunks = joined(
        client(asker).chat.completions.create(
            **ASK, extra_body={"thinking_budget": budget}, stream=True, stream_options={"include_usage": True}
        )
    )
    thoughts = asker.tokenizer.decode(asker.thinks[1 : 1 + budget])
    assert (told["reasoning"], told["content"], told["finish"]) == (thoughts.strip(), "So 46.", "stop")
    (first, *_), (second, sampling, _) = asker.asked
    assert second[: len(first)] == first and second[len(first) :][: 1 + budget] == asker.thinks[: 1 + budget]
    closing = len(second) - len(first) - 1 - budget
    usage = chunks[-1].usage
    assert (usage.prompt_tokens, usage.completion_tokens) == (len(first), 1 + budget + closing + len(asker.answer))
    assert usage.completion_tokens_details.reasoning_tokens == budget + 1  # the line's end before `</think>`
    assert sampling == asker.asked[0][1] | {"begun": 1 + budget + closing}  # with the noise of its place in the answer
    assert asker.open == 0 and asker.cancelled == 1


def test_a_budget_that_is_not_reached_or_leaves_nothing(client):
    asker = Thinker()
    ours = client(asker)
    plain = ours.chat.completions.create(**ASK, extra_body={"thinking_budget": 500})
    assert plain.choices[0].message.content == "46" and len(asker.asked) == 1
    cut = ours.chat.completions.create(**ASK, extra_body={"thinking_budget": 4}, max_tokens=6)
    assert (cut.choices[0].finish_reason, cut.usage.completion_tokens) == ("length", 6)


def test_no_thinking_at_all(client):
    asker = Thinker()
    for more in ({"thinking_budget": 0}, {"reasoning_effort": "none"}, {"reasoning_effort": "minimal"}):
        said = client(asker).chat.completions.create(**ASK, extra_body=more).choices[0].message
        assert said.content == "So 46." and "reasoning" not in said.model_dump()
    assert client(asker).chat.completions.create(**ASK, reasoning_effort="high").choices[0].message.content == "46"


@pytest.mark.parametrize("at_once", [1, 3, 100])
@pytest.mark.parametrize("budget", [None, 3, 500])
def test_a_grammar_binds_what_comes_behind_the_thinking(budget, at_once):
    asker = Thinker(f"{THOUGHTS}{END_THINK}\n\nso", at_once=at_once)
    ids, sampling = [asker.tokenizer.think_id], {"max_tokens": 100, "json_schema": "{}", "alternatives": 0}
    events = in_stages(asker, asker.tokenizer, ids, sampling, 0, opened=True, budget=budget)

    async def made() -> list[int]:
        return [token_id async for event in events for token_id in event.ids]

    text = asker.tokenizer.decode(asyncio.run(made()))
    thoughts = asker.tokenizer.decode(asker.thinks[:3]) + "\n" if budget == 3 else THOUGHTS
    assert text == f"{thoughts}{END_THINK}\n\nSo 46."
    (_, free, _), (behind, bound, _) = asker.asked
    assert free == {"max_tokens": 100, "alternatives": 0, "behind": {"json_schema": "{}"}}
    assert bound == sampling | {"begun": len(behind) - len(ids)}
    assert asker.tokenizer.decode(behind).endswith(f"{END_THINK}\n\n")


@pytest.mark.parametrize("call", [V3, V31], ids=["v3", "v3.1"])
def test_calls(client, call):
    asker = with_template(FakeAsker(f"Look: {CALLS_BEGIN}{call}{call}{CALLS_END}"))
    ours = client(asker)
    choice = ours.chat.completions.create(**ASK, tools=[TOOL]).choices[0]
    assert (choice.message.content, choice.finish_reason) == ("Look: ", "tool_calls")
    calls = choice.message.tool_calls
    assert [(one.function.name, json.loads(one.function.arguments)) for one in calls] == [
        ("weather", json.loads(ARGUMENTS))
    ] * 2
    told, _ = joined(ours.chat.completions.create(**ASK, tools=[TOOL], stream=True))
    assert [(one["name"], one["arguments"]) for one in told["calls"].values()] == [("weather", ARGUMENTS)] * 2
    assert (told["content"], told["finish"]) == ("Look: ", "tool_calls")
    one = ours.chat.completions.create(**ASK, tools=[TOOL], parallel_tool_calls=False).choices[0]
    assert len(one.message.tool_calls) == 1 and one.message.tool_calls[0].function.arguments == ARGUMENTS
    none = ours.chat.completions.create(**ASK, tools=[TOOL], tool_choice="none").choices[0]
    assert none.message.tool_calls is None and none.finish_reason == "stop" and CALLS_BEGIN in none.message.content
    talk = [*ASK["messages"], choice.message, *({"role": "tool", "tool_call_id": c.id, "content": "3"} for c in calls)]
    ours.chat.completions.create(model="fake", messages=talk, tools=[TOOL])
    written = asker.tokenizer.decode(asker.asked[-1][0], skip_special_tokens=False)
    assert f"weather<｜tool▁sep｜>{ARGUMENTS}" in written and written.count("<｜tool▁output▁begin｜>3") == 2


def test_a_call_that_must_come(client):
    asker = with_template(FakeAsker(ARGUMENTS))
    for choice in ("required", {"type": "function", "function": {"name": "weather"}}):
        ours = client(asker)
        said = ours.chat.completions.create(**ASK, tools=[TOOL], tool_choice=choice).choices[0]
        assert said.finish_reason == "tool_calls" and said.message.tool_calls[0].function.arguments == ARGUMENTS
        told, _ = joined(ours.chat.completions.create(**ASK, tools=[TOOL], tool_choice=choice, stream=True))
        assert told["calls"][0]["arguments"] == ARGUMENTS
        assert [json.loads(sampling["json_schema"]) for _, sampling, _ in asker.asked[-2:]] == [PARAMETERS] * 2
        with pytest.raises(openai.BadRequestError, match="structured_outputs: tool_choice"):
            more = {"structured_outputs": {"regex": "a"}}
            ours.chat.completions.create(**ASK, tools=[TOOL], tool_choice=choice, extra_body=more)


@pytest.mark.parametrize(
    "more, match",
    [
        ({"tool_choice": "required"}, "'required' with 0 tools"),
        ({"tool_choice": {"type": "function", "function": {"name": "f"}}}, "the tools are none"),
        ({"tools": [TOOL]}, "no place for them"),
        ({"tools": [{**TOOL, "function": {"name": "a b"}}]}, "tools.0.function.name"),
        ({"tools": [TOOL] * 129}, "129 tools"),
        ({"thinking_budget": -1}, "thinking_budget"),
        ({"reasoning_effort": "much"}, "reasoning_effort"),
        ({"chat_template_kwargs": {"tools": 1}}, "chat_template_kwargs"),
    ],
)
def test_what_is_refused(client, more, match):
    with pytest.raises(openai.BadRequestError, match=match) as refused:
        client(Thinker()).chat.completions.create(**ASK, extra_body=more)
    assert (refused.value.param or "").partition(".")[0] == [*more][0]


def test_thinking_that_no_token_ends_is_bound_by_nothing_behind_it(client, monkeypatch):
    asker = with_template(FakeAsker(f"{THOUGHTS}{END_THINK}46"))
    monkeypatch.setattr("deepseek_jax.serve.asked.thinks", lambda tokenizer: False)
    thinking = {"chat_template_kwargs": {"thinking": True}}
    assert client(asker).chat.completions.create(**ASK, extra_body=thinking).choices[0].message.content == "46"
    asked = {"response_format": {"type": "json_object"}, "structured_outputs": {"regex": "4"}, "thinking_budget": 5}
    for name, given in asked.items():
        with pytest.raises(openai.BadRequestError, match="are no tokens") as refused:
            client(asker).chat.completions.create(**ASK, extra_body={**thinking, name: given})
        assert refused.value.param == name
