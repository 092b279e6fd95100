"""A server of OpenAI's kind as who answers in a talk: HTTP by the standard library, answers as server-sent events."""

import contextlib
import json
import socket
from collections.abc import Iterator
from http.client import HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection
from typing import Any
from urllib.parse import urlsplit

from deepseek_jax.cli.conversation import TooLongError, Turn
from deepseek_jax.data.chat import split_thinking
from deepseek_jax.data.special_tokens import END_THINK, THINK

_SECONDS = 10  # for a connection; an answer may take as long as it does


class Remote:
    """See ``conversation.Partner``. model: its name there."""

    def __init__(self, url: str, key: str, drawn: dict[str, Any], model: str = "") -> None:
        """drawn: how answers are, fields of a request. model: by default the server's first. ValueError: no such URL,
        or what the server says; OSError: it is not there."""
        self._where = urlsplit(url.rstrip("/"))
        if self._where.scheme not in ("http", "https") or not self._where.hostname:
            raise ValueError(f"--url {url}: expected http://HOST:PORT")
        self._path = self._where.path if self._where.path.endswith("/v1") else f"{self._where.path}/v1"
        self._headers = {"Content-Type": "application/json", "Connection": "close"}
        if key:
            self._headers["Authorization"] = f"Bearer {key}"
        self._socket: socket.socket | None = None
        with _failures(url):
            found = _names(url, self._open("GET", "models"))
        if not found or (model and model not in found):
            raise ValueError(f"--model {model or 'NAME'}: {url} has {', '.join(found) or 'none'}")
        self._url, self._drawn, self.model = url, drawn, model or found[0]

    def ask(self, turns: list[Turn]) -> Iterator[str]:
        body = {"model": self.model, "messages": [_without_thinking(each) for each in turns], "stream": True}
        with _failures(self._url):
            response = self._open("POST", "chat/completions", body | self._drawn)
        return self._pieces(response)

    def stop(self) -> None:
        """Whatever is waited for ends at once, and the server gives the answer up."""
        if self._socket is not None:
            with contextlib.suppress(OSError):  # it has just ended by itself
                self._socket.shutdown(socket.SHUT_RDWR)

    def _open(self, method: str, name: str, body: dict[str, Any] | None = None) -> HTTPResponse:
        assert self._where.hostname is not None
        kind = HTTPSConnection if self._where.scheme == "https" else HTTPConnection
        connection = kind(self._where.hostname, self._where.port, timeout=_SECONDS)
        connection.connect()
        assert connection.sock is not None
        connection.sock.settimeout(None)
        self._socket = connection.sock
        content = None if body is None else json.dumps(body).encode()
        connection.request(method, f"{self._path}/{name}", content, self._headers)
        response = connection.getresponse()
        if response.status != 200:
            with response:
                raise _refusal(response.status, response.read(1 << 16))
        return response

    def _pieces(self, response: HTTPResponse) -> Iterator[str]:
        thinking = False
        with response, _failures(self._url):
            for line in response:
                if not line.startswith(b"data:"):
                    continue
                if (data := line[5:].strip()) == b"[DONE]":
                    return
                told = json.loads(data)
                if "error" in told:
                    raise _refusal(0, data)
                for delta in [choice.get("delta") or {} for choice in told.get("choices") or ()]:
                    if thought := delta.get("reasoning_content") or delta.get("reasoning"):
                        yield thought if thinking else THINK + thought
                        thinking = True
                    if said := delta.get("content"):
                        yield END_THINK + said if thinking else said
                        thinking = False
            raise OSError("the answer was cut off")


@contextlib.contextmanager
def _failures(url: str) -> Iterator[None]:
    """Those of HTTP as OSError, with the address."""
    try:
        yield
    except (OSError, HTTPException) as error:
        raise OSError(f"{url}: {error or type(error).__name__}") from error


def _names(url: str, response: HTTPResponse) -> list[str]:
    """Of a server's models."""
    try:
        return [each["id"] for each in json.load(response)["data"]]
    except (ValueError, LookupError, TypeError) as error:
        raise ValueError(f"--url {url}: no server of OpenAI's kind, {error!r}") from error


def _refusal(status: int, body: bytes) -> ValueError:
    """As the server words it."""
    try:
        error = json.loads(body)["error"]
        message, code = error["message"], error.get("code")
    except (ValueError, LookupError, TypeError, AttributeError):  # not as OpenAI has it
        message, code = body.decode(errors="replace")[:200], None
    kind = TooLongError if code == "context_length_exceeded" else ValueError
    return kind(f"{status}: {message}" if status else message)


def _without_thinking(said: Turn) -> Turn:
    """As templates have it: no model is told what was thought before."""
    return said | {"content": split_thinking(said["content"])[1]} if said["role"] == "assistant" else said
