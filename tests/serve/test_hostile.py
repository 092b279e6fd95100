"""What means harm is refused or cut while others are answered as ever; who goes leaves nothing behind; the end is an
orderly one."""

import concurrent.futures
import json
import socket
import time
from collections.abc import Iterator
from typing import Any

import pytest
from serve.engine import NETWORK, Running, get, running
from small import tokenizer

NO_END = {str(tokenizer().eos_id): -100}
LONG = {"prompt": "12+34=", "max_tokens": 200, "logit_bias": NO_END, "stream": True}


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running() as made:
        yield made


def connect(server: Running) -> socket.socket:
    return socket.create_connection(("127.0.0.1", server.port), timeout=30)


def post(path: str, body: bytes, *more: str) -> bytes:
    head = (f"POST {path} HTTP/1.1", "Host: localhost", "Content-Type: application/json", "Connection: close", *more)
    return "\r\n".join([*head, f"Content-Length: {len(body)}", "", ""]).encode() + body


def status(answer: bytes) -> int:
    """Of an HTTP answer; 0 where the connection was cut."""
    return int(answer.split(b" ", 2)[1]) if answer.startswith(b"HTTP/1.1 ") else 0


def say(server: Running, message: bytes) -> int:
    """The status that it is answered with; the connection may be kept open behind it."""
    with connect(server) as connection:
        try:
            connection.sendall(message)
            return status(connection.recv(1 << 16))
        except ConnectionError:
            return 0


def bodies() -> Iterator[tuple[str, bytes]]:
    """Path, and what no path takes of it."""
    chat, plain = {"messages": [{"role": "user", "content": "a"}]}, {"prompt": "a"}
    odd: list[dict[str, Any]] = [{"n": n} for n in (10**9, -1, 0, 1.5, "1", [1])]
    odd += [{"stop": ["x"] * 10**5}, {"stop": "x" * 10**5}, {"stop": [""]}, {"stop": [1]}, {"stop": {}}]
    odd += [{"max_tokens": n} for n in (10**12, -5, 0, 1e9, 2**31)]
    odd += [{"temperature": x} for x in (-1, 1e300, 10**400, "hot", [], True)]
    odd += [{"top_p": 0}, {"top_p": 2}, {"top_k": -7}, {"min_p": -0.1}, {"repetition_penalty": 0}]
    odd += [{"logit_bias": {str(i): 1 for i in range(301)}}, {"logit_bias": {"-1": 1}}, {"logit_bias": {"5": 1e9}}]
    odd += [{"logit_bias": {"299999999": 1}}, {"seed": 2**70}, {"seed": 1.5}, {"stop_token_ids": [-1] * 3}]
    odd += [
        {"stream_options": {"x": 1}},
        {"stream": "yes"},
        {"unknown": 1},
        {"model": 5},
        {"model": "../../etc/passwd"},
    ]
    schemas: list[Any] = [{"type": "nothing"}, {"type": "string", "pattern": "("}, {"$ref": "#/nowhere"}]
    schemas += [{"enum": []}, {"type": "integer", "minimum": 9, "maximum": 1}, {"anyOf": 5}, {"properties": [1]}, 7]
    schemas += [{"$ref": "https://elsewhere.invalid/schema.json"}]
    schemas += [{"type": "string", "pattern": "(a|b|ab)*" * 300}]  # too much, as is found when it is answered
    odd += [{"response_format": {"type": "json_schema", "json_schema": {"schema": schema}}} for schema in schemas]
    for change in odd:
        yield "/v1/chat/completions", json.dumps(chat | change).encode()
        yield "/v1/completions", json.dumps(plain | change).encode()
    for prompt in ([], [-1], [10**10], [NETWORK.vocab_size], [1] * 5000, "", None, {}, [[]], [[1], "a"], ["a"] * 100):
        yield "/v1/completions", json.dumps({"prompt": prompt}).encode()
    for messages in (
        [],
        None,
        "hi",
        [{"role": "user"}],
        [{"role": "root", "content": "a"}],
        [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}]}],
        [{"role": "user", "content": "a"}] * 5000,
        [{"role": "assistant", "content": "a"}],
        [{"role": "user", "content": "{{ ''.__class__.__mro__ }}" * 5000}],
    ):
        yield "/v1/chat/completions", json.dumps({"messages": messages}).encode()
    for raw in (
        b"",
        b"null",
        b"[]",
        b'"text"',
        b"{",
        b'{"prompt": ' + b"[" * 100_000,
        b'{"prompt": "\xff\xfe"}',
        b'{"prompt": "a", "temperature": NaN}',
        b'{"prompt": "a", "temperature": -Infinity}',
        b'{"prompt": "a", "seed": 1' + b"0" * 5000 + b"}",
        b'{"a":' * 50_000 + b"1" + b"}" * 50_000,
        b"\x00" * 1000,
        b"x" * ((1 << 20) + 1),
    ):
        yield "/v1/completions", raw
        yield "/v1/chat/completions", raw


RAW = [
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\x00" * 500,  # TLS
    b"GET / HTTP/1.1\r\nHost: evil.example\r\n\r\n",
    b"GET /v1/models HTTP/1.1\r\n\r\n",
    b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\nHost: evil.example\r\n\r\n",
    b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: " + b"a" * 100_000 + b"\r\n\r\n",
    b"GET /../../../etc/passwd HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n",
    b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: -1\r\n\r\n",
    b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99999999999\r\n\r\n{",
    b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    b"BREW /v1/models HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n",
    post("/v1/completions", b'{"prompt": "a"}', "Origin: https://evil.example"),
]


def test_harm_is_refused_while_others_are_answered(server):
    """Eight streams go on meanwhile and say what they say when alone; some of those who mean harm say nothing, or half
    of something, and stay, others go as soon as they are answered."""
    slow = [connect(server) for _ in range(8)]
    for i, connection in enumerate(slow):
        connection.sendall(post("/v1/completions", b'{"prompt": "a"}')[: [0, 1, 20, -1][i % 4]])
        if i > 5:
            connection.shutdown(socket.SHUT_WR)
    attempts = [*(post(path, body) for path, body in bodies()), *RAW]
    assert len(attempts) > 100
    with server.client() as client, concurrent.futures.ThreadPoolExecutor(16) as pool:

        def stream(i: int) -> str:
            asked = LONG | {"model": "tiny", "prompt": f"{i}+{i}=", "temperature": 0.8, "seed": i}
            pieces = [*client.completions.create(stream_options={"include_usage": True}, **asked)]
            assert pieces[-1].usage.completion_tokens == LONG["max_tokens"]
            return "".join(piece.choices[0].text for piece in pieces[:-1])

        def leave(_: int) -> None:
            with connect(server) as connection:
                connection.sendall(post("/v1/completions", json.dumps(LONG).encode()))
                assert status(connection.recv(100)) in (200, 429)

        alone = [stream(i) for i in range(8)]
        honest = [pool.submit(stream, i) for i in range(8)]
        left = pool.map(leave, range(8))
        found = [*pool.map(lambda message: say(server, message), attempts)]
        assert [each.result() for each in honest] == alone and [*left]
    taken = [attempt[-200:] for attempt, code in zip(attempts, found, strict=True) if code and not 400 <= code < 500]
    assert not taken
    for connection in slow:
        connection.close()
    server.idle()


@pytest.mark.parametrize("streamed", [True, False])
def test_who_goes_frees_what_it_had(server, streamed):
    before = server.engine.metrics()["tokens"]
    connections = [connect(server) for _ in range(12)]
    for connection in connections:
        connection.sendall(post("/v1/completions", json.dumps(LONG | {"model": "tiny", "stream": streamed}).encode()))
    if streamed:
        assert connections[0].recv(100).startswith(b"HTTP/1.1 200")
    while not server.engine.metrics()["running"]:
        time.sleep(0.01)
    for i, connection in enumerate(connections):
        if i % 2:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")  # an RST
        connection.close()
    server.idle()
    assert server.engine.metrics()["tokens"] - before < 12 * LONG["max_tokens"] / 2


def test_who_comes_to_a_full_queue_is_sent_away(server):
    asked = json.dumps(LONG | {"model": "tiny", "n": 16}).encode()
    with connect(server) as first, connect(server) as second:
        for connection in (first, second):
            connection.sendall(post("/v1/completions", asked))
            assert status(connection.recv(100)) == 200
        with connect(server) as third:  # 48 answers, where there is room for 8 and 24 that wait
            third.sendall(post("/v1/completions", asked))
            answer = third.makefile("rb").read()  # head and body may come apart
    assert status(answer) == 429 and b"retry-after: " in answer.lower() and b"queue_full" in answer
    server.idle()


def test_streams_are_ended_before_the_server_ends(server):
    with server.client() as client:
        stream = client.completions.create(model="tiny", stream_options={"include_usage": True}, **LONG)
        first = next(stream)
        server.stopping.ask()
        while (health := get(f"{server.http.url}/health"))[0] == 200:
            time.sleep(0.01)
        assert health == (503, "draining\n")
        assert get(f"{server.http.url}/v1/models")[0] == 503
        assert say(server, post("/v1/completions", b'{"prompt": "a"}')) == 503
        pieces = [first, *stream]
    assert pieces[-1].usage.completion_tokens == LONG["max_tokens"]
    server.thread.join(20)
    assert not server.thread.is_alive() and server.http.end() == 0
