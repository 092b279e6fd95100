"""What clients may send: OpenAI's fields, by their names, and some of vLLM's. Others are refused, by name: a field that
does nothing would mislead."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from deepseek_jax.inference.limits import ALTERNATIVES, BIASES, RANGES

STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
# A whole number may be written 1.0, as JSON schemas have it.
WHOLE = BeforeValidator(lambda x: int(x) if type(x) is float and x.is_integer() else x)
Id = Annotated[int, Field(ge=0, lt=2**31), WHOLE]
Ids = Annotated[list[Id], Field(min_length=1)]
Text = Annotated[str, Field(min_length=1)]
Beside = Annotated[int, Field(ge=0, le=ALTERNATIVES), WHOLE]
Bias = Annotated[float, Field(ge=-100, le=100)]


def _within(name: str) -> Any:
    least, most = RANGES[name]
    return Field(None, ge=least, le=most)


class StreamOptions(BaseModel):
    """include_usage: a last chunk tells the tokens."""

    model_config = STRICT
    include_usage: bool = False
    include_obfuscation: bool | None = None


class JsonSchema(BaseModel):
    model_config = ConfigDict(strict=True)
    name: str = Field("", max_length=64)
    description: str | None = None
    schema_: dict[str, Any] = Field(default_factory=dict, alias="schema")
    strict: bool | None = None


class ResponseFormat(BaseModel):
    """text; json_object: any JSON object; json_schema: what a schema allows."""

    model_config = STRICT
    type: Literal["text", "json_object", "json_schema"] = "text"
    json_schema: JsonSchema | None = None


class StructuredOutputs(BaseModel):
    """regex: the answer is this expression from end to end."""

    model_config = STRICT
    regex: Text


class Sampled(BaseModel):
    """What chat and plain completions share. top_k, min_p, repetition_penalty, stop_token_ids and structured_outputs
    are vLLM's; user and metadata are taken and change nothing."""

    model_config = STRICT
    model: str = Field("", max_length=256)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: Annotated[int, Field(ge=-1, lt=2**31), WHOLE] | None = None
    min_p: float | None = _within("min_p")
    presence_penalty: float | None = _within("presence_penalty")
    frequency_penalty: float | None = _within("frequency_penalty")
    repetition_penalty: float | None = _within("repetition_penalty")
    logit_bias: dict[Annotated[str, Field(pattern=r"^[0-9]{1,9}$")], Bias] | None = Field(None, max_length=BIASES)
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63), WHOLE] | None = None
    n: Annotated[int, Field(ge=1, lt=2**31), WHOLE] | None = None
    stop: Text | list[Text] | None = None
    stop_token_ids: list[Id] | None = Field(None, max_length=8)
    max_tokens: Annotated[int, Field(ge=1, lt=2**31), WHOLE] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    user: str | None = None
    metadata: dict[str, Any] | None = None


class Completion(Sampled):
    """``/v1/completions``. prompt: a text, ids, or a list of either. logprobs: of each token, and so many others; with
    echo of the prompt's tokens too. max_tokens may be 0 with echo."""

    prompt: Text | Ids | Annotated[list[Text], Field(min_length=1)] | Annotated[list[Ids], Field(min_length=1)]
    logprobs: Beside | None = None
    echo: bool | None = None
    max_tokens: Annotated[int, Field(ge=0, lt=2**31), WHOLE] | None = None


class Part(BaseModel):
    """A part of a message's content: text alone, of all that OpenAI has."""

    type: Literal["text"] = "text"
    text: str


class Function(BaseModel):
    """parameters: a JSON schema. strict is taken, and changes nothing."""

    model_config = ConfigDict(strict=True)
    name: str = Field(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(BaseModel):
    model_config = STRICT
    type: Literal["function"] = "function"
    function: Function


class FunctionName(BaseModel):
    model_config = STRICT
    name: str = Field(max_length=64)


class NamedTool(BaseModel):
    """The function that must be called."""

    model_config = STRICT
    type: Literal["function"] = "function"
    function: FunctionName


class Called(BaseModel):
    """arguments: JSON, as a text."""

    model_config = ConfigDict(strict=True)
    name: str
    arguments: str = "{}"


class ToolCall(BaseModel):
    model_config = ConfigDict(strict=True)
    id: str | None = None
    type: Literal["function"] = "function"
    function: Called


class Message(BaseModel):
    """A turn; what else a client has stored of one is passed over."""

    model_config = ConfigDict(strict=True, json_schema_extra={"required": ["role", "content"]})
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[Part] | None = None
    name: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[ToolCall] | None = Field(None, max_length=128)
    tool_call_id: str | None = None


class Chat(Sampled):
    """``/v1/chat/completions``. max_completion_tokens: OpenAI's newer name of max_tokens.

    tool_choice: "required" is for one tool alone. thinking_budget: tokens of thinking at most, 0 for none of it;
    reasoning_effort stands for one (none and minimal: 0, low: 1,024, medium: 8,192, high and xhigh: as many as it
    likes). chat_template_kwargs: vLLM's, variables for the template.
    """

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: Annotated[int, Field(ge=1, lt=2**31), WHOLE] | None = None
    logprobs: bool | None = None
    top_logprobs: Beside | None = None
    tools: list[Tool] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    thinking_budget: Annotated[int, Field(ge=0, lt=2**31), WHOLE] | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh"] | None = None
    chat_template_kwargs: dict[str, Any] | None = Field(None, max_length=16)


_EITHER: dict[str, Any] = {"oneOf": [{"required": ["prompt"]}, {"required": ["messages"]}]}


class Tokenize(BaseModel):
    """prompt: a text, with add_special_tokens as completions have it; or the messages of a chat."""

    model_config = STRICT | ConfigDict(json_schema_extra=_EITHER)
    model: str = Field("", max_length=256)
    prompt: str | None = None
    messages: list[Message] | None = Field(None, min_length=1)
    add_special_tokens: bool = True


class Detokenize(BaseModel):
    model_config = STRICT
    model: str = Field("", max_length=256)
    tokens: list[Id]
