"""Chat templates of released models: foreign jinja2 programs, run in jinja2's sandbox with limits.

What transformers' `apply_chat_template` gives a template it finds here too (`tojson`, `raise_exception`,
`strftime_now`, loop controls, the `generation` block, tools), so the text is the same.
"""

import functools
import json
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from datetime import datetime
from typing import Any

from jinja2 import Template, TemplateError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from deepseek_jax.data.conversations import REASONING

MAX_TEMPLATE_BYTES = 64 * 1024
MAX_CHARS = 4 * 1024 * 1024  # of the rendered text, and of what one operator makes: a million tokens
MAX_CPU_SECONDS = 10.0
# No chat template needs these, and each can make much out of little. Using one is jinja2's "No filter named ...".
_NO_FILTERS = ("batch", "center", "format", "indent", "pprint", "round", "slice", "urlize", "wordwrap", "xmlattr")
# The methods of a text that can make much out of little, and the characters that each makes at most.
_TEXT_SIZES: dict[str, Callable[..., int]] = {
    "center": lambda text, width, *fill: width,
    "ljust": lambda text, width, *fill: width,
    "rjust": lambda text, width, *fill: width,
    "zfill": lambda text, width: width,
    "expandtabs": lambda text, tabsize=8: len(text) + text.count("\t") * tabsize,
    "join": lambda text, parts: 0 if len(parts) < 2 else sum(map(len, parts)) + len(text) * (len(parts) - 1),
    "replace": lambda text, old, new, count=-1: len(text) + text.count(old) * len(new),
    "translate": lambda text, table: len(text) * max((len(v) for v in table.values() if isinstance(v, str)), default=1),
}
# A width of four digits or one that is computed: "%5000s", "%*d", "{:>5000}", "{:{}}".
_WIDE_FIELD = re.compile(r"%(\([^)]*\))?[-+ #0-9.]*(\d{4}|\*)|\{[^{}]*(:[^{}]*\d{4}|\{)")
_ASKS_FOR_NONE = re.compile(r"\bis\s+(not\s+)?none\b", re.IGNORECASE)


class ChatTemplate:
    """A chat template with the special tokens that it may name.

    source: the jinja2 text, at most 64 KiB. tokens: {"bos_token": text, ...}, the variables it finds beside the
    messages. tool_source: the template used where tools are given, for the few models that have one apart.
    ValueError: a source that is too long or is no jinja2.

    The sandbox lets nothing out. Calls, operators, the output and the time at each of them are limited; a loop that
    does none of these, or a text that `~` doubles over and over, is not: the template is the model's own file.
    """

    def __init__(self, source: str, tokens: Mapping[str, str], *, tool_source: str | None = None):
        self._sources = source, source if tool_source is None else tool_source
        self._templates = [_compile(text) for text in self._sources]
        self._tokens = dict(tokens)

    @property
    def source(self) -> str:
        """The jinja2 text."""
        return self._sources[0]

    def mentions(self, name: str, *, tools: bool = False) -> bool:
        """Whether a name stands in the text; with ``tools``, in the one used where they are given."""
        return re.search(rf"\b{re.escape(name)}\b", self._sources[tools]) is not None

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        **variables: Any,
    ) -> str:
        """The text of a conversation. ValueError: what the template refuses, may not do or takes too long for.

        Messages, tools and variables are JSON values. Keys whose value is None are left out, as transformers 5
        does, with one exception: the `content` of a message with `tool_calls` stays None where the template asks
        `is none`. R1's does and cannot render such a message otherwise.
        """
        if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
            raise ValueError('messages must be a non-empty list of {"role": ..., "content": ...}')
        keep_none = bool(_ASKS_FOR_NONE.search(self._sources[tools is not None]))
        given = {
            **self._tokens,
            **{name: _plain(value, name) for name, value in variables.items()},
            "messages": [_message(message, index, keep_none) for index, message in enumerate(messages)],
            "tools": _plain(tools, "tools"),
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            return "".join(_pieces(self._templates[tools is not None], given))
        except ValueError as error:
            silent = [index for index, message in enumerate(given["messages"]) if message.get("content") is None]
            if not silent or "content" not in str(error):
                raise
            raise ValueError(f"{error}; message {silent[0]} has none, and this template has no place for it") from error


def opens_thinking(prompt: str) -> bool:
    """Whether a rendered prompt has opened `<think>` for the model, as R1's newer template does.

    The completion then begins inside the thinking: `split_thinking("<think>" + completion)` reads it right even
    where it was cut before `</think>`. With R1's first template the model writes `<think>` itself.
    """
    return prompt.rstrip().endswith("<think>")


def _message(message: Any, index: int, keep_none: bool) -> dict[str, Any]:
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise ValueError(f'message {index} must be a mapping with a text under "role"')
    kept = {"content"} if keep_none and message.get("tool_calls") is not None else set()
    plain = {key: _plain(value, f"message {index}, {key}") for key, value in message.items()}
    plain = {key: value for key, value in plain.items() if value is not None or key in kept}
    thought = next((plain[key] for key in REASONING if key in plain), None)
    return plain if thought is None else {"thinking": thought, **plain, "reasoning_content": thought}


def _plain(value: Any, where: str) -> Any:
    """A copy of JSON types only, so that a template gets no object with methods of its own."""
    if value is None or type(value) in (str, bool, int, float):
        return value
    if isinstance(value, Mapping) and all(type(key) is str for key in value):
        return {key: _plain(item, where) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str | bytes | bytearray):
        return [_plain(item, where) for item in value]
    raise ValueError(f"{where}: a {type(value).__name__} is no JSON value")


# ---- the sandbox ----

_DEADLINE: ContextVar[float] = ContextVar("deadline", default=float("inf"))


def _pieces(template: Template, given: Mapping[str, Any]) -> Iterator[str]:
    length = 0
    token = _DEADLINE.set(time.thread_time() + MAX_CPU_SECONDS)  # this thread's own time: a busy machine is no fault
    try:
        for piece in template.generate(given):
            length += len(piece)
            _check_size(length)
            yield piece
    except Exception as error:  # whatever a foreign program runs into is a fault of its text or its input
        raise ValueError(f"chat template: {_reason(error)}") from error
    finally:
        _DEADLINE.reset(token)


def _check_time() -> None:
    if time.thread_time() > _DEADLINE.get():
        raise SecurityError(f"it runs for more than {MAX_CPU_SECONDS} s")


def _check_size(size: int) -> None:
    if size > MAX_CHARS:
        raise SecurityError(f"it makes {size} characters or items, more than {MAX_CHARS}")


def _check_widths(text: str | bytes) -> None:
    if _WIDE_FIELD.search(text if isinstance(text, str) else text.decode("latin-1")):
        raise SecurityError("a format with a wide or computed width")


class _Namespace(Namespace):
    """`namespace()` without underscored names, as in transformers."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        Namespace.__init__(args[0])
        for name, value in dict(*args[1:], **kwargs).items():
            args[0][name] = value

    def __setitem__(self, name: str, value: Any) -> None:
        if not isinstance(name, str) or name.startswith("_"):
            raise SecurityError(f"a namespace cannot hold {name!r}")
        super().__setitem__(name, value)


class _Generation(Extension):
    """`{% generation %}`: marks what an assistant said for trainers; rendered as if it were not there."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True)).set_lineno(line)


class _Environment(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset(("+", "*", "**", "%"))

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"])
        for name in _NO_FILTERS:
            del self.filters[name]
        self.filters |= {"tojson": _tojson, "replace": _replace}
        self.globals |= {"namespace": _Namespace, "raise_exception": _raise_exception, "strftime_now": _strftime_now}
        del self.globals["lipsum"], self.globals["cycler"], self.globals["joiner"]

    def call(self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        _check_time()
        method = getattr(__obj, "__wrapped__", __obj)  # the sandbox wraps str.format
        text, name = getattr(method, "__self__", None), getattr(method, "__name__", "")
        if isinstance(text, str | bytes):
            if name in ("format", "format_map"):
                _check_widths(text)
            if name == "join" and len(args) == 1:
                args = ([*args[0]],)  # an iterator has no length
            if name in _TEXT_SIZES:  # the names that jinja2 hands on of itself, in a loop, are no arguments
                given = {key: value for key, value in kwargs.items() if not key.startswith("_")}
                _check_size(_TEXT_SIZES[name](text, *args, **given))
        return super().call(__context, __obj, *args, **kwargs)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        _check_time()
        sizes = [len(side) if isinstance(side, str | bytes | list | tuple) else side for side in (left, right)]
        numbers = all(isinstance(side, int | float) for side in (left, right))
        if operator == "**" or (operator == "*" and numbers):
            if not numbers or max(abs(left), abs(right)) > 10**9 or (operator == "**" and abs(right) > 9):
                raise SecurityError(f"{operator} of numbers beyond what a template needs")
        elif operator == "%" and isinstance(left, str | bytes):
            _check_widths(left)
        elif all(isinstance(size, int) for size in sizes) and not numbers:
            _check_size(sizes[0] * sizes[1] if operator == "*" else sum(sizes))
        return super().call_binop(context, operator, left, right)


def _replace(text: Any, old: Any, new: Any, count: int | None = None) -> str:
    text, old, new = str(text), str(old), str(new)
    _check_size(len(text) + text.count(old) * len(new))
    return text.replace(old, new, -1 if count is None else count)


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    # jinja2's own escapes HTML, which no model has seen.
    if indent is not None and (len(indent) if isinstance(indent, str) else indent) > 100:
        raise SecurityError("tojson with an indent of more than 100")
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: Any) -> None:
    raise TemplateError(str(message))


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


def _reason(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "it nests or calls itself too deep"
    return str(error) if isinstance(error, TemplateError) else f"{type(error).__name__}: {error}"


@functools.cache
def _environment() -> _Environment:
    return _Environment()


def _compile(source: str) -> Template:
    size = len(source.encode("utf-8", "surrogatepass"))
    if size > MAX_TEMPLATE_BYTES:
        raise ValueError(f"chat template: {size} bytes, more than {MAX_TEMPLATE_BYTES}")
    try:
        return _environment().from_string(source)
    except Exception as error:  # jinja2's syntax errors, and Python's own where the nesting is too deep
        line = getattr(error, "lineno", None)
        raise ValueError(f"chat template: {'' if line is None else f'line {line}: '}{_reason(error)}") from error
