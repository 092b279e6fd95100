"""From a body to what the engine is asked: ids, sampling, and what is too much."""

import asyncio
import json
import secrets
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib.util import find_spec
from typing import Any

from deepseek_jax.data.tokenizer import Tokenizer
from deepseek_jax.serve.answering import Asked
from deepseek_jax.serve.asking import Served
from deepseek_jax.serve.config import Limits
from deepseek_jax.serve.errors import ApiError, field_of, whole
from deepseek_jax.serve.parsing import CALL_END
from deepseek_jax.serve.prompts import Prompt, thinks, write_prompt
from deepseek_jax.serve.schema import Chat, Completion, Message, NamedTool, Sampled
from deepseek_jax.serve.thinking import budget_of

_SAME = ("temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty")
_COMPLETION_TOKENS = 16  # OpenAI's


async def asked_by_completion(body: Completion, tokenizer: Tokenizer, served: Served, limits: Limits) -> Asked:
    check_model(body.model, served)
    given: list[Any] = body.prompt if isinstance(body.prompt, list) else [body.prompt]
    given = [given] if isinstance(given[0], int) else given
    check_most("prompt", len(given), limits.n, "prompts")
    if body.max_tokens == 0 and not body.echo:
        raise ApiError(400, "max_tokens=0 without echo: nothing is asked for", param="max_tokens")
    prompts = given
    if isinstance(given[0], str):
        prompts = await encoded(lambda: [[*tokenizer.bos_ids, *tokenizer.encode(text)] for text in given], "prompt")
    asked = _asked(body, prompts, body.max_tokens, body.logprobs, served, limits, few=_COMPLETION_TOKENS)
    if not body.echo:
        return asked
    scored = {"prompt_logprobs": True} if body.logprobs is not None else {}
    return replace(asked, sampling=asked.sampling | scored, echo=True)


async def asked_by_chat(body: Chat, tokenizer: Tokenizer, served: Served, limits: Limits) -> Asked:
    check_model(body.model, served)
    if body.top_logprobs and not body.logprobs:
        raise ApiError(400, "top_logprobs needs logprobs=true", param="top_logprobs")
    prompt, budget = await prompt_of(body, tokenizer, limits)
    most = body.max_completion_tokens or body.max_tokens
    asked = _asked(body, [prompt.ids], most, (body.top_logprobs or 0) if body.logprobs else None, served, limits)
    if body.parallel_tool_calls is False and prompt.tools:
        asked = replace(asked, stops=(*asked.stops, CALL_END))
    if prompt.schema and body.structured_outputs is not None:
        raise ApiError(400, "structured_outputs: tool_choice has a call come", param="structured_outputs")
    if prompt.schema and find_spec("llguidance") is not None:  # without it, arguments are what the model makes of them
        asked = replace(asked, sampling=asked.sampling | {"json_schema": prompt.schema})
    field = asked.grammar or ("thinking_budget" if body.thinking_budget else None)
    if field and prompt.opened and not prompt.begun and not thinks(tokenizer):
        message = f"{field}: where thinking ends is not known, as <think> and </think> are no tokens of this model"
        raise ApiError(400, message, param=field)
    return replace(asked, prompt=prompt, thinking_budget=budget or None)


async def prompt_of(body: Chat, tokenizer: Tokenizer, limits: Limits) -> tuple[Prompt, int | None]:
    """What is answered, and for how many tokens it may be thought."""
    tools = [tool.model_dump(exclude_none=True) for tool in body.tools or ()]
    check_most("tools", len(tools), limits.tools, "tools")
    for tool in tools:
        size = len(json.dumps(tool["function"].get("parameters", {})))
        check_most("tools", size, limits.schema_bytes, f"bytes of {tool['function']['name']}'s parameters")
    choice = body.tool_choice.model_dump() if isinstance(body.tool_choice, NamedTool) else body.tool_choice
    budget = budget_of(body.thinking_budget, body.reasoning_effort)
    think = None if budget is None and body.reasoning_effort is None else budget != 0
    messages = as_messages(body.messages, limits)
    options = {"tools": tools, "choice": choice, "think": think, "variables": body.chat_template_kwargs}
    return await encoded(lambda: write_prompt(tokenizer, messages, **options)), budget


def as_messages(messages: Sequence[Message], limits: Limits) -> list[dict[str, Any]]:
    """As ``data.conversations`` reads them. ApiError: too many."""
    check_most("messages", len(messages), limits.messages, "messages")
    return [message.model_dump(exclude_none=True) for message in messages]


async def encoded(make: Callable[[], Any], field: str = "messages") -> Any:
    """What ``make`` makes of the text of a ``field``, beside the event loop. ApiError for what it refuses."""
    try:
        return await asyncio.to_thread(make)
    except ValueError as error:  # an empty conversation, what the template has no place for
        raise ApiError(400, whole(str(error)), param=field_of(str(error), field)) from error


def check_model(name: str, served: Served) -> None:
    if name and name != served.name:
        message = f"no model {whole(name)!r} here, but {served.name!r}"
        raise ApiError(404, message, param="model", code="model_not_found")


def check_most(param: str, number: int, most: int, what: str) -> None:
    if number > most:
        raise ApiError(400, f"{param}: {number} {what}, and at most {most} are taken", param=param)


def _asked(
    body: Sampled,
    prompts: list[list[int]],
    max_tokens: int | None,
    alternatives: int | None,
    served: Served,
    limits: Limits,
    *,
    few: int | None = None,
) -> Asked:
    """few: tokens of an answer where nothing is said, or as many as there is room for."""
    if body.stream_options is not None and not body.stream:
        raise ApiError(400, "stream_options without stream=true: nothing is streamed", param="stream_options")
    n, longest = body.n or 1, max(map(len, prompts))
    check_most("n", n * len(prompts), limits.n, "answers to all prompts")
    stops = [body.stop] if isinstance(body.stop, str) else body.stop or []
    check_most("stop", len(stops), limits.stops, "stop strings")
    check_most("stop", max(map(len, stops), default=0), limits.stop_length, "characters of one")
    room, most = served.context - longest, limits.max_tokens or served.context
    if room < (max_tokens != 0):
        message = f"the prompt has {longest} tokens, and this model's context {served.context} with the answer"
        field = "prompt" if isinstance(body, Completion) else "messages"
        raise ApiError(400, message, param=field, code="context_length_exceeded")
    if max_tokens is not None:
        field = "max_completion_tokens" if getattr(body, "max_completion_tokens", None) else "max_tokens"
        check_most(field, max_tokens, most, "tokens of an answer")
        if max_tokens > room:
            message = f"{field}={max_tokens} and a prompt of {longest} tokens pass the context of {served.context}"
            raise ApiError(400, message, param=field, code="context_length_exceeded")
    said = {name: float(value) for name in _SAME if (value := getattr(body, name)) is not None}
    sampling = served.sampling | said | ({} if body.top_k is None else {"top_k": max(body.top_k, 0)})
    sampling |= {
        "max_tokens": min(room, most, few or room) if max_tokens is None else max_tokens,
        "seed": secrets.randbits(31) if body.seed is None else body.seed % 2**31,
        "stop_token_ids": body.stop_token_ids or [],
        "logit_bias": [(int(token), float(bias)) for token, bias in (body.logit_bias or {}).items()],
        "alternatives": min(alternatives or 0, served.vocab_size),
    }
    if schema := _schema(body, limits):
        sampling["json_schema"] = schema
    if body.structured_outputs is not None:
        if schema:
            raise ApiError(400, "structured_outputs and response_format: expected one", param="structured_outputs")
        sampling["regex"] = regex = body.structured_outputs.regex
        check_most("structured_outputs", len(regex), limits.schema_bytes, "characters of an expression")
    usage = body.stream_options is not None and body.stream_options.include_usage
    return Asked(prompts, sampling, n, tuple(stops), alternatives, usage)


def _schema(body: Sampled, limits: Limits) -> str:
    """The JSON schema that the answer is held to, "" without one."""
    wanted = body.response_format
    if wanted is None or wanted.type == "text":
        return ""
    if wanted.type == "json_object":
        return '{"type": "object"}'
    if wanted.json_schema is None:
        raise ApiError(400, "response_format of type json_schema needs json_schema", param="response_format")
    schema = json.dumps(wanted.json_schema.schema_)
    check_most("response_format", len(schema), limits.schema_bytes, "bytes of a schema")
    return schema
