"""``/v1/responses`` as OpenAI's client reads it, whole and in events."""

import json

import openai
import pytest
from serve.fake import FakeAsker, fake_app
from serve.test_chat_thinking import ANSWER, THOUGHTS, Thinker, with_template
from serve.test_parsing import ARGUMENTS, V31
from serve.test_prompts import PARAMETERS
from starlette.testclient import TestClient

from deepseek_jax.serve.parsing import CALLS_BEGIN, CALLS_END

TOOL = {"type": "function", "name": "weather", "description": "Of a city.", "parameters": PARAMETERS}


def test_a_text_is_answered(client):
    asker = Thinker()
    response = client(asker).responses.create(model="fake", input="12+34?", instructions="Be brief.")
    assert (response.output_text, response.status, response.object) == ("46", "completed", "response")
    reasoning, said = response.output
    assert (reasoning.type, reasoning.content[0].text) == ("reasoning", THOUGHTS.strip())
    assert (said.type, said.role, said.status) == ("message", "assistant", "completed")
    assert response.usage.output_tokens == len(asker.thinks) and response.usage.input_tokens == len(asker.asked[0][0])
    assert response.usage.output_tokens_details.reasoning_tokens == len(asker.tokenizer.encode("\n" + THOUGHTS))
    written = asker.tokenizer.decode(asker.asked[0][0], skip_special_tokens=False)
    assert written.startswith("<｜begin▁of▁sentence｜>Be brief.<｜User｜>12+34?")


@pytest.mark.parametrize("at_once", [1, 100])
def test_events(client, at_once):
    ours = client(Thinker(at_once=at_once))
    with ours.responses.stream(model="fake", input="12+34?") as stream:  # whose bookkeeping asserts their order
        events = [*stream]
        final = stream.get_final_response()
    assert final.output_text == "46"
    assert [event.sequence_number for event in events] == [*range(len(events))]
    kinds = [event.type.removeprefix("response.") for event in events]
    once = [kind for place, kind in enumerate(kinds) if kinds[place - 1 : place] != [kind]]
    item = ["output_item.added", "content_part.added", "{0}.delta", "{0}.done", "content_part.done", "output_item.done"]
    items = [kind.format(name) for name in ("reasoning_text", "output_text") for kind in item]
    assert once == ["created", "in_progress", *items, "completed"]
    deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert "".join(deltas) == "46"
    whole = ours.responses.create(model="fake", input="12+34?")
    drop = {"id", "created_at"}
    assert whole.model_dump(exclude=drop)["usage"] == events[-1].response.model_dump(exclude=drop)["usage"]


def test_calls(client):
    asker = with_template(FakeAsker(f"Look: {CALLS_BEGIN}{V31}{V31}{CALLS_END}"))
    ours = client(asker)
    with ours.responses.stream(model="fake", input="12+34?", tools=[TOOL]) as stream:
        events = [*stream]
        response = stream.get_final_response()
    said, *calls = response.output
    assert said.content[0].text == "Look: "
    assert [(call.name, call.arguments, call.type) for call in calls] == [("weather", ARGUMENTS, "function_call")] * 2
    deltas = [event.delta for event in events if event.type == "response.function_call_arguments.delta"]
    assert "".join(deltas) == ARGUMENTS * 2
    outputs = [{"type": "function_call_output", "call_id": call.call_id, "output": "sunny"} for call in calls]
    talk = [{"role": "user", "content": "12+34?"}, *(one.model_dump() for one in response.output), *outputs]
    ours.responses.create(model="fake", input=talk, tools=[TOOL])
    written = asker.tokenizer.decode(asker.asked[-1][0], skip_special_tokens=False)
    assert f"Look: {CALLS_BEGIN}{V31}{V31}{CALLS_END}" in written and written.count("<｜tool▁output▁begin｜>sunny") == 2
    forced = with_template(FakeAsker(ARGUMENTS))
    choice = {"type": "function", "name": "weather"}
    (call,) = client(forced).responses.create(model="fake", input="Paris?", tools=[TOOL], tool_choice=choice).output
    assert json.loads(call.arguments) == json.loads(ARGUMENTS)


def test_a_talk_of_items(client):
    asker = Thinker()
    ours = client(asker)
    first = ours.responses.create(model="fake", input="12+34?")
    parts = [{"type": "input_text", "text": "And "}, {"type": "input_text", "text": "then?"}]
    talk = [{"role": "user", "content": "12+34?"}, *(one.model_dump() for one in first.output)]
    ours.responses.create(model="fake", input=[*talk, {"role": "user", "content": parts}])
    written = asker.tokenizer.decode(asker.asked[-1][0], skip_special_tokens=False)
    assert written.endswith("<｜Assistant｜>\n\n46<｜end▁of▁sentence｜><｜User｜>And then?<｜Assistant｜>")


def test_effort_and_length(client):
    none = client(Thinker()).responses.create(model="fake", input="12+34?", reasoning={"effort": "none"})
    assert none.output_text == "So 46." and len(none.output) == 1
    with client(Thinker()).responses.stream(model="fake", input="12+34?", max_output_tokens=3) as stream:
        last = [*stream][-1]
    assert (last.type, last.response.incomplete_details.reason) == ("response.incomplete", "max_output_tokens")
    assert last.response.output[-1].status == "incomplete"


@pytest.mark.parametrize(
    "more, match",
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id: nothing is stored"),
        ({"store": True}, "store: nothing is stored"),
        ({"background": True}, "background"),
        ({"input": []}, "input"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input"),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]}, "input"),
        ({"tools": [{"type": "web_search"}]}, "tools"),
        ({"tool_choice": "required"}, "required"),
    ],
)
def test_what_is_refused(client, more, match):
    with pytest.raises(openai.BadRequestError, match=match):
        client(FakeAsker(ANSWER)).responses.create(**{"model": "fake", "input": "x"} | more)


@pytest.mark.parametrize("more", ['"user": "\\ud800"', '"metadata": {"a": NaN}'])
def test_what_could_not_be_told_again_is_refused(more):
    body, kind = f'{{"input": "x", {more}}}', {"Content-Type": "application/json"}
    answer = TestClient(fake_app()).post("/v1/responses", content=body, headers=kind)
    assert answer.status_code == 400 and "no JSON" in answer.json()["error"]["message"]
