"""OpenAI's own client against the whole server: two processes, a network of random weights."""

import json
import re
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from serve.engine import NETWORK, TEMPLATE, Running, get, running
from small import tokenizer

PROMPT = "def add(a, b):"
CHAT = [{"role": "user", "content": "12+34="}]
NO_END = {str(tokenizer().eos_id): -100}


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running() as made:
        yield made


@pytest.fixture
def ours(server) -> Iterator[openai.OpenAI]:
    with server.client() as client:
        yield client


@pytest.fixture(scope="module")
def thinker() -> Iterator[openai.OpenAI]:
    """Of a server whose template opens the thinking and has a place for tools."""
    with running(template=TEMPLATE) as made, made.client() as client:
        yield client


def test_models(ours):
    (model,) = ours.models.list().data
    assert model.id == "tiny" and model.max_model_len == 256
    assert ours.models.retrieve("tiny") == model
    with pytest.raises(openai.NotFoundError, match="no model 'other'"):
        ours.models.retrieve("other")


def complete(ours, **options):
    return ours.completions.create(**{"model": "tiny", "prompt": PROMPT, "temperature": 0, "max_tokens": 12} | options)


def test_a_completion_of_unsaid_length_has_16_tokens_or_the_room_there_is(ours):
    assert complete(ours, max_tokens=None, logit_bias=NO_END).usage.completion_tokens == 16
    short = complete(ours, max_tokens=None, logit_bias=NO_END, prompt=[5] * 250)
    assert short.usage.completion_tokens == 6 and short.choices[0].finish_reason == "length"


def test_a_completion_whole_and_in_pieces(ours):
    whole = complete(ours)
    (choice,) = whole.choices
    assert whole.object == "text_completion" and choice.text and choice.finish_reason in ("stop", "length")
    pieces = [*complete(ours, stream=True, stream_options={"include_usage": True})]
    assert "".join(piece.choices[0].text for piece in pieces[:-1]) == choice.text
    assert [piece.choices[0].finish_reason for piece in pieces[:-1] if piece.choices[0].finish_reason] == [
        choice.finish_reason
    ]
    usage = pieces[-1].usage
    assert not pieces[-1].choices and usage.completion_tokens == whole.usage.completion_tokens
    assert usage.prompt_tokens == len(tokenizer().encode(PROMPT)) + 1
    assert usage.prompt_tokens_details.cached_tokens > 0
    ids = [tokenizer().bos_id, *tokenizer().encode(PROMPT)]
    assert complete(ours, prompt=ids).choices[0].text == complete(ours, prompt=[ids]).choices[0].text == choice.text
    assert complete(ours, echo=True).choices[0].text == PROMPT + choice.text


def test_several_prompts_and_answers(ours):
    two = complete(ours, prompt=[PROMPT, "7*8="], n=2)
    assert [choice.index for choice in two.choices] == [0, 1, 2, 3]
    assert two.choices[0].text == two.choices[1].text == complete(ours).choices[0].text
    drawn = [[c.text for c in complete(ours, n=3, seed=5, temperature=1.5).choices] for _ in range(2)]
    assert drawn[0] == drawn[1] and len({*drawn[0]}) == 3
    assert complete(ours, seed=-5, temperature=1.5).choices[0].text not in drawn[0]


def test_stops(ours):
    text = complete(ours, max_tokens=24, logit_bias=NO_END).choices[0].text
    stop = text[len(text) // 2 :][:2]
    for stops in (stop, ["none of it", stop]):
        cut = complete(ours, max_tokens=24, logit_bias=NO_END, stop=stops).choices[0]
        assert cut.finish_reason == "stop" and cut.text == text[: text.index(stop)]
    pieces = [*complete(ours, max_tokens=24, logit_bias=NO_END, stop=stop, stream=True)]
    assert "".join(piece.choices[0].text for piece in pieces) == text[: text.index(stop)]
    told = complete(ours, max_tokens=24, logit_bias=NO_END, logprobs=0, stop=stop).choices[0]
    assert "".join(told.logprobs.tokens).startswith(told.text)  # the last may have brought bytes of an earlier one
    ended = complete(ours, logit_bias=NO_END | {"65": 100}, extra_body={"stop_token_ids": [65]})
    assert ended.choices[0].finish_reason == "stop" and ended.usage.completion_tokens == 1


def test_logprobs(ours):
    told = complete(ours, logprobs=3, logit_bias=NO_END).choices[0]
    assert len(told.logprobs.tokens) == len(told.logprobs.token_logprobs) == 12
    assert "".join(told.logprobs.tokens) == told.text and told.logprobs.text_offset[0] == 0
    assert all(len(likely) <= 3 for likely in told.logprobs.top_logprobs)
    asked = {"model": "tiny", "messages": CHAT, "max_tokens": 6, "temperature": 0, "logprobs": True, "top_logprobs": 2}
    for content in (
        ours.chat.completions.create(**asked).choices[0].logprobs.content,
        [
            one
            for chunk in ours.chat.completions.create(**asked, stream=True)
            for one in (chunk.choices[0].logprobs.content if chunk.choices[0].logprobs else ())
        ],
    ):
        assert 0 < len(content) <= 6 and all(len(one.top_logprobs) == 2 for one in content)
        for one in content:
            assert one.logprob <= 0 and one.top_logprobs[0].logprob >= one.logprob - 1e-6
            assert bytes(one.bytes).decode("utf-8", "replace") == one.token


def test_chat(ours):
    asked = {"model": "tiny", "messages": CHAT, "temperature": 0.7, "seed": 3, "max_completion_tokens": 9, "n": 2}
    whole = ours.chat.completions.create(**asked)
    assert [choice.message.role for choice in whole.choices] == ["assistant"] * 2
    texts = {0: "", 1: ""}
    for chunk in ours.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}):
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
        usage = chunk.usage
    assert texts == {choice.index: choice.message.content for choice in whole.choices}
    assert usage.completion_tokens == whole.usage.completion_tokens <= 18
    nudged = {"presence_penalty": 1.0, "frequency_penalty": -1.0, "top_p": 0.9, "logit_bias": {"65": 5}}
    nudged |= {"extra_body": {"top_k": 5, "min_p": 0.01, "repetition_penalty": 1.1}}
    assert ours.chat.completions.create(**asked | nudged).choices[1].finish_reason in ("stop", "length")


SCHEMA = {
    "type": "object",
    "properties": {"a": {"enum": ["x", "yes"]}},
    "required": ["a"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("streamed", [False, True])
def test_an_answer_that_is_held_to_a_schema(ours, streamed):
    wanted = {"type": "json_schema", "json_schema": {"name": "mine", "schema": SCHEMA, "strict": True}}
    asked = {"model": "tiny", "messages": CHAT, "temperature": 0, "max_tokens": 200, "response_format": wanted}
    said = ours.chat.completions.create(**asked, stream=streamed)
    pieces = [piece.choices[0].delta.content or "" for piece in said] if streamed else [said.choices[0].message.content]
    assert json.loads("".join(pieces)) in ({"a": "x"}, {"a": "yes"})


def test_an_answer_that_is_held_to_an_expression(ours):
    more = {"structured_outputs": {"regex": "[0-9]{3}(a|b)"}}
    said = ours.chat.completions.create(model="tiny", messages=CHAT, max_tokens=20, extra_body=more)
    assert re.fullmatch("[0-9]{3}(a|b)", said.choices[0].message.content)
    with pytest.raises(openai.BadRequestError, match="regex") as refused:
        complete(ours, extra_body={"structured_outputs": {"regex": "("}})
    assert refused.value.param == "structured_outputs"


def test_a_schema_that_nothing_meets(ours):
    wanted = {"type": "json_schema", "json_schema": {"name": "mine", "schema": {"type": "string", "pattern": "("}}}
    with pytest.raises(openai.BadRequestError, match="json_schema"):
        ours.chat.completions.create(model="tiny", messages=CHAT, response_format=wanted)


def test_a_response_whole_and_in_events(ours):
    asked = {"model": "tiny", "input": "12+34=", "temperature": 0, "max_output_tokens": 24}
    whole = ours.responses.create(**asked)
    with ours.responses.stream(**asked) as stream:
        events = [*stream]
    (last,) = [event.response for event in events if event.type in ("response.completed", "response.incomplete")]
    deltas = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    assert whole.output_text and deltas == last.output_text == whole.output_text
    assert (whole.usage.input_tokens, whole.usage.output_tokens) == (last.usage.input_tokens, last.usage.output_tokens)
    assert whole.usage.total_tokens == whole.usage.input_tokens + whole.usage.output_tokens
    assert whole.status == last.status == ("incomplete" if whole.usage.output_tokens == 24 else "completed")
    chat = ours.chat.completions.create(model="tiny", messages=CHAT, temperature=0, max_tokens=24)
    assert chat.choices[0].message.content == whole.output_text
    assert chat.usage.prompt_tokens == whole.usage.input_tokens


WEATHER = {
    "type": "object",
    "properties": {"city": {"enum": ["Paris", "Rome"]}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
    "required": ["city", "days"],
    "additionalProperties": False,
}


def meets_weather(arguments: str) -> bool:
    told = json.loads(arguments)
    return {*told} == {"city", "days"} and told["city"] in ("Paris", "Rome") and told["days"] in range(1, 10)


@pytest.mark.parametrize("thinking", [False, True])
def test_a_call_that_is_asked_for(thinker, thinking):
    tools = [{"type": "function", "function": {"name": name, "parameters": WEATHER}} for name in ("rain", "sun")]
    asked = {"model": "tiny", "messages": CHAT, "temperature": 0, "max_tokens": 120, "tools": tools}
    asked |= {"tool_choice": {"type": "function", "function": {"name": "sun"}}}
    asked |= {"extra_body": {"chat_template_kwargs": {"thinking": thinking}}}
    (choice,) = thinker.chat.completions.create(**asked).choices
    (call,) = choice.message.tool_calls
    assert (call.function.name, choice.finish_reason) == ("sun", "tool_calls")
    assert meets_weather(call.function.arguments)
    chunks = [*thinker.chat.completions.create(**asked, stream=True)]
    deltas = [each for chunk in chunks for each in chunk.choices[0].delta.tool_calls or ()]
    assert "".join(each.function.arguments or "" for each in deltas) == call.function.arguments


def test_a_call_of_a_response(thinker):
    tools = [{"type": "function", "name": "sun", "parameters": WEATHER}]
    asked = {"model": "tiny", "input": "12+34=", "temperature": 0, "max_output_tokens": 120, "tools": tools}
    response = thinker.responses.create(**asked, tool_choice={"type": "function", "name": "sun"})
    (call,) = response.output
    assert (call.type, call.name, response.status) == ("function_call", "sun", "completed")
    assert meets_weather(call.arguments)


def test_thinking_has_its_budget(thinker):
    never = NO_END | {str(tokenizer().end_think_id): -100}
    asked = {"model": "tiny", "messages": CHAT, "temperature": 0, "max_tokens": 24, "logit_bias": never}
    more = {"chat_template_kwargs": {"thinking": True}}
    free = thinker.chat.completions.create(**asked, extra_body=more)
    thought = free.choices[0].message.reasoning_content
    assert free.usage.completion_tokens_details.reasoning_tokens == 24 and free.choices[0].message.content is None
    held = thinker.chat.completions.create(**asked, extra_body=more | {"thinking_budget": 6})
    said, usage = held.choices[0].message, held.usage
    assert said.content and said.reasoning_content and thought.startswith(said.reasoning_content)
    assert usage.completion_tokens == 24
    assert usage.completion_tokens_details.reasoning_tokens == 6 + 1  # the line's end before `</think>`
    told = {"content": "", "reasoning_content": ""}
    asked |= {"stream": True, "stream_options": {"include_usage": True}}
    for chunk in thinker.chat.completions.create(**asked, extra_body=more | {"thinking_budget": 6}):
        for choice in chunk.choices:
            told = {name: text + (choice.delta.model_dump().get(name) or "") for name, text in told.items()}
        last = chunk.usage
    assert told == {name: getattr(said, name) for name in told} and last.completion_tokens_details == (
        usage.completion_tokens_details
    )
    del asked["stream"], asked["stream_options"]
    none = thinker.chat.completions.create(**asked, extra_body=more | {"thinking_budget": 0})
    assert none.usage.completion_tokens_details.reasoning_tokens == 0 and none.choices[0].message.content


WRONG = {
    "temperature": {"temperature": 3},
    "max_tokens": {"max_tokens": 10**6},
    "n": {"n": 17},
    "stop": {"stop": ["x"] * 17},
    "top_logprobs": {"top_logprobs": 2},
    "logit_bias": {"logit_bias": {"nothing": 1}},
    "nonsense": {"extra_body": {"nonsense": 1}},
    "messages": {"messages": [{"role": "assistant", "content": "I"}]},
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_said(ours, name):
    with pytest.raises(openai.BadRequestError) as refused:
        ours.chat.completions.create(**{"model": "tiny", "messages": CHAT} | WRONG[name])
    error: Any = refused.value.body
    assert set(error) == {"message", "type", "param", "code"} and error["type"] == "invalid_request_error"
    assert name in error["message"] or name in str(error["param"])


PICTURE = [{"type": "image_url", "image_url": {"url": "http://elsewhere.invalid/c.png"}}]


FORM = "application/x-www-form-urlencoded"
MISTAKES = [  # and what the message tells
    (
        "chat/completions",
        {"messages": [{"role": "user", "content": PICTURE}]},
        "",
        "messages.0.content.0.type='image_url'",
    ),
    ("completions", {"prompt": "x", "stop": ["a", 1]}, "", "stop.1=1: Input should be a valid string"),
    ("completions", {"prompt": "x", "store": True, "tier": 1}, "", "store, tier: Extra inputs"),
    ("completions", {}, "", "prompt: Field required"),
    ("completions", "x", "", "the body is no JSON: "),
    ("completions", '{"prompt": "x"}', FORM, "Content-Type must be application/json"),
    ("nowhere", "x", "", "nothing is at /v1/nowhere"),
]


@pytest.mark.parametrize("path, body, kind, told", MISTAKES)
def test_a_mistake_is_told_by_its_place(server, path, body, kind, told):
    content = body if isinstance(body, str) else json.dumps(body)
    headers = {"Content-Type": kind or "application/json"}
    request = urllib.request.Request(f"{server.http.url}/v1/{path}", content.encode(), headers)
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(request, timeout=20)
    with refused.value as answer:
        assert answer.status == (404 if path == "nowhere" else 400)
        assert told in json.load(answer)["error"]["message"]


def test_ids_that_the_network_has_not(ours):
    with pytest.raises(openai.BadRequestError, match="vocab_size=300"):
        complete(ours, prompt=[NETWORK.vocab_size])
    with pytest.raises(openai.BadRequestError, match="vocab_size=300"):
        complete(ours, logit_bias={"300": 1}, stream=True)
    with pytest.raises(openai.BadRequestError, match="tokens has the id 300: expected below vocab_size=300"):
        ours.with_options(base_url=str(ours.base_url).removesuffix("v1/")).post(
            "/detokenize", body={"tokens": [1, 300]}, cast_to=object
        )


def test_metrics_tell_what_has_been(ours, server):
    for _ in range(3):  # the later ones find the prompt of the first
        complete(ours)
    server.idle()
    _, text = get(f"{server.http.url}/metrics")
    told = {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in text.split("\n") if line[:1] not in "#"}
    has = lambda name: told[f"deepseek_jax_{name}"]  # noqa: E731
    assert has("engine_running") == has("engine_waiting") == has("answers_open") == has("engine_compiles_total") == 0
    assert has("engine_tokens_total") > 12 and has("time_to_first_token_seconds_count") > 0
    assert has("inter_token_seconds_count") > 0 and has("engine_found_tokens_total") >= 8
    assert has('requests_total{path="/v1/completions",status="200"}') > 0
    assert "# TYPE deepseek_jax_engine_tokens_total counter\n" in text
    assert "# TYPE deepseek_jax_engine_running gauge\n" in text
