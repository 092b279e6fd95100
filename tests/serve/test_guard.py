"""Who is let in, asked through ASGI itself, and over sockets where it is uvicorn that must hold."""

import asyncio
import json
import logging
import socket
import time
from typing import Any

import pytest
from serve.live import live

from deepseek_jax.serve import guard as module
from deepseek_jax.serve import protocol
from deepseek_jax.serve.guard import Guard

KEY = "sk-0123456789"


async def echo(scope, receive, send):
    event = await receive()
    assert not event["more_body"]
    await send({"type": "http.response.start", "status": 200, "headers": [(b"x-app", b"1")]})
    await send({"type": "http.response.body", "body": event["body"]})


def ask(guard: Guard, path="/v1/models", method="GET", parts=(b"",), wait: Any = 0.0, **headers: Any):
    """(status, headers, body); headers are written with _ for -."""
    given = {"host": "localhost:8000"} | {name.replace("_", "-"): value for name, value in headers.items()}
    events = [{"type": "http.request", "body": part, "more_body": True} for part in parts]
    events[-1]["more_body"] = False
    sent = []

    async def receive():
        await asyncio.sleep(wait)
        return events.pop(0) if events else {"type": "http.disconnect"}

    async def send(event):
        sent.append(event)

    pairs = [(name.encode(), value.encode("latin-1")) for name, value in given.items() if value]
    asyncio.run(guard({"type": "http", "method": method, "path": path, "headers": pairs}, receive, send))
    found = {name.decode(): value.decode() for name, value in sent[0]["headers"]}
    return sent[0]["status"], found, b"".join(event.get("body", b"") for event in sent)


def test_keys():
    guard = Guard(echo, keys=("other", KEY))
    for path in ("/v1/models", "/metrics", "/docs", "/health/", "//", "/healthy"):
        status, headers, body = ask(guard, path)
        assert (status, headers["www-authenticate"]) == (401, "Bearer")
        assert json.loads(body)["error"]["code"] == "invalid_api_key"
    for wrong in (
        "Bearer",
        "Bearer ",
        f"Basic {KEY}",
        KEY,
        f"Bearer {KEY}x",
        f"Bearer {KEY[:-1]}",
        "Bearer käse",
        "Bearer \xff",
    ):
        assert ask(guard, authorization=wrong)[0] == 401
    for right in (f"Bearer {KEY}", f"bearer  {KEY} ", "Bearer other"):
        assert ask(guard, authorization=right)[0] == 200
    assert ask(guard, "/")[0] == ask(guard, "/health")[0] == ask(Guard(echo))[0] == 200
    assert KEY not in str(vars(guard))


def test_every_key_is_compared(monkeypatch):
    compared = []
    monkeypatch.setattr(module.hmac, "compare_digest", lambda a, b: compared.append((a, b)) or a == b)
    ask(Guard(echo, keys=(KEY, "b", "c")), authorization=f"Bearer {KEY}")
    assert len(compared) == 3 and all(len(a) == len(b) == 32 for a, b in compared)


@pytest.mark.parametrize(
    "host", ["localhost", "LOCALHOST:80", "127.0.0.1:8000", "[::1]:8000", "192.168.0.7", "gpu.lan", "gpu.lan.:1"]
)
def test_hosts_that_this_is(host):
    assert ask(Guard(echo, hosts=("GPU.lan",)), host=host)[0] == 200


@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "evil.example:8000",
        "localhost.evil.example",
        "127.0.0.1.nip.io",
        "[x]",
        "127.0.0.1:80@evil.example",
    ],
)
def test_hosts_that_it_is_not(host):
    for path in ("/", "/health", "/v1/models"):
        assert ask(Guard(echo, hosts=("gpu.lan",)), path, host=host)[0] == 403
    assert ask(Guard(echo, hosts=("*",)), host=host)[0] == 200


def test_a_host_there_must_be():
    assert ask(Guard(echo), host="")[0] == 400


def test_pages_of_elsewhere():
    guard = Guard(echo, keys=(KEY,), origins=("https://chat.example",))
    for origin in ("http://evil.example", "null", "http://localhost:8001", "https://chat.example.evil"):
        status, headers, _ = ask(guard, origin=origin, authorization=f"Bearer {KEY}")
        assert status == 403 and "access-control-allow-origin" not in headers
    own = ask(guard, origin="http://localhost:8000", authorization=f"Bearer {KEY}")
    assert own[0] == 200 and "access-control-allow-origin" not in own[1]
    named = {"origin": "https://chat.example"}
    status, headers, _ = ask(guard, authorization=f"Bearer {KEY}", **named)
    assert (status, headers["access-control-allow-origin"], headers["x-app"]) == (200, "https://chat.example", "1")
    asked = {"access_control_request_method": "POST", "access_control_request_headers": "authorization"}
    status, headers, _ = ask(guard, method="OPTIONS", **named, **asked)
    assert (status, headers["access-control-allow-headers"]) == (204, "authorization")
    assert ask(guard, method="OPTIONS", origin="http://evil.example", **asked)[0] == 403
    status, headers, _ = ask(guard, **named)  # that it lacks a key it may read
    assert (status, headers["access-control-allow-origin"]) == (401, "https://chat.example")


def test_bodies():
    guard = Guard(echo, body=10)
    assert ask(guard, method="POST", parts=(b"01234", b"56789"))[::2] == (200, b"0123456789")
    assert ask(guard, method="POST", parts=(b"01234", b"56789", b"!"))[0] == 413
    assert ask(guard, method="POST", parts=(b"01234",), content_length="11")[0] == 413
    assert ask(guard, method="POST", parts=(b"01234",), content_length="9" * 5000)[0] == 413
    assert ask(Guard(echo, seconds=0.02), method="POST", parts=(b"0",) * 9, wait=0.01)[0] == 408


def test_what_is_no_http():
    closed = []

    async def send(event):
        closed.append(event)

    asyncio.run(Guard(echo)({"type": "websocket", "headers": []}, None, send))  # type: ignore[arg-type]
    assert closed == [{"type": "websocket.close", "code": 1008}]


@pytest.fixture
def port(monkeypatch):
    """Of a server whose clients are given a second for a head."""
    monkeypatch.setattr(protocol, "HEAD_SECONDS", 1.0)
    with live(Guard(echo, keys=(KEY,))) as found:
        yield found


def sent(port: int, *parts: bytes, pause: float = 0.0) -> bytes:
    """What is answered; nothing where the connection is closed."""
    with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
        try:
            for part in parts:
                connection.sendall(part)
                time.sleep(pause)
            return connection.recv(1 << 16)
        except ConnectionError:  # closed while it was still being sent to
            return b""


def test_heads_are_bounded_in_time_and_size(port):
    head = b"GET /health HTTP/1.1\r\nHost: localhost\r\n"
    assert sent(port, head + b"\r\n").startswith(b"HTTP/1.1 200")
    assert sent(port) == sent(port, head[:9]) == sent(port, head) == b""
    assert sent(port, head, b"\r\n", pause=0.05).startswith(b"HTTP/1.1 200")
    assert sent(port, head, *[b"X-A: 1\r\n"] * 20, b"\r\n", pause=0.1) == b""  # however steadily it comes
    large = [head, *(b"X-%d: %s\r\n" % (n, b"x" * 10000) for n in range(8))]
    assert sent(port, *large).startswith(b"HTTP/1.1 400")
    body = (
        b"POST /v1/x HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer %s\r\nContent-Length: 400000\r\n\r\n"
        % KEY.encode()
    )
    assert sent(port, body + b"x" * 200000, b"x" * 200000).startswith(b"HTTP/1.1 200")
    for cut in (1, 2, 3):  # its end comes in two parts, the second with all of a body
        parts = body[:-cut], body[-cut:] + b"x" * 400000
        assert sent(port, *parts, pause=0.05).startswith(b"HTTP/1.1 200")


def test_who_reads_nothing_is_cut_off():
    """And who is slow is not: the app learns of the first that it has gone, and nothing of the second."""
    gone = []

    async def much(scope, receive, send):
        await receive()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for _ in range(160):  # together more than the sockets take
            await send({"type": "http.response.body", "body": b"x" * 100_000, "more_body": True})
        gone.append((await receive())["type"] if scope["path"] == "/idle" else "")
        await send({"type": "http.response.body", "body": b""})

    ask = b"GET /%s HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
    with live(much, stall=0.5) as found:
        with socket.create_connection(("127.0.0.1", found), timeout=10) as slow:
            slow.sendall(ask % b"slow")
            size = 0
            while part := slow.recv(1 << 20):
                size += len(part)
                time.sleep(0.02)
            assert size > 16_000_000
        with socket.create_connection(("127.0.0.1", found), timeout=10) as idle:
            idle.sendall(ask % b"idle")
            last = time.monotonic() + 10
            while len(gone) < 2 and time.monotonic() < last:
                time.sleep(0.02)
    assert gone == ["", "http.disconnect"]


def test_who_reads_one_long_message_slowly_is_not_cut_off():
    size = 16_000_000

    async def whole(scope, receive, send):
        await receive()
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % size)]})
        await send({"type": "http.response.body", "body": b"x" * size})

    with live(whole, stall=0.5) as found, socket.create_connection(("127.0.0.1", found), timeout=10) as slow:
        slow.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        read = 0
        while part := slow.recv(1 << 18):
            read += len(part)
            time.sleep(0.03)
    assert read > size, "the head too"


def test_no_key_is_logged(port, caplog):
    with caplog.at_level(logging.DEBUG):
        for key in (KEY, "sk-wrong"):
            sent(port, b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer %s\r\n\r\n" % key.encode())
    assert "/v1/models" in caplog.text and "sk-" not in caplog.text
