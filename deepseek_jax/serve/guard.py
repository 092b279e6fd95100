"""Who may come in, asked before anything else: ASGI middleware of no framework."""

import asyncio
import hashlib
import hmac
import ipaddress
import json
import re
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from typing import Any

from deepseek_jax.serve.config import ServeConfig

OPEN = ("/", "/health")  # what no key is asked for: the page itself asks for it
BODY_SECONDS = 60.0
_LOCAL = ("localhost",)
_KINDS = {401: "authentication_error", 403: "permission_error"}

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]


class _RefusedError(Exception):
    def __init__(self, status: int, message: str, code: str = "", **headers: str):
        super().__init__(message)
        self.status, self.code, self.headers = status, code, headers


class Guard:
    """Lets requests through to ``app`` that

    * name this machine in their Host: ``localhost``, any address, or one of ``hosts`` ("*": any). A page of elsewhere
      whose name an attacker points at this machine (DNS rebinding) names another;
    * come from no page of elsewhere: their Origin, where they have one, is this very host or one of ``origins``, which
      may then read the answers (CORS; by default nobody may);
    * bring one of ``keys``, if there are any, as ``Authorization: Bearer``; but for OPEN;
    * have a body of at most ``body`` bytes, whether it says its length or comes in chunks, within ``seconds``.

    A body is read whole before ``app`` is called. Others are answered with OpenAI's error object: 400, 401, 403, 408,
    413. Keys are compared by their digests, all of them, in a time that says nothing of where they differ.
    """

    def __init__(
        self,
        app: App,
        *,
        keys: Iterable[str] = (),
        hosts: Iterable[str] = (),
        origins: Iterable[str] = (),
        body: int = 1 << 20,
        seconds: float = BODY_SECONDS,
    ):
        self._app, self._body, self._seconds = app, body, seconds
        self._digests = [_digest(key.encode()) for key in keys]
        self._hosts = {*_LOCAL, *(host.lower().rstrip(".") for host in hosts)}
        self._origins = {origin.lower().rstrip("/") for origin in origins}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            return await self._app(scope, receive, send)
        if scope["type"] != "http":  # nothing here speaks websockets
            return await send({"type": "websocket.close", "code": 1008})
        allowed: dict[str, str] = {}
        try:
            self._check_host(scope)
            allowed = self._check_origin(scope)
            if allowed and scope["method"] == "OPTIONS" and _header(scope, b"access-control-request-method"):
                return await _answer(send, 204, b"", allowed | _preflight(scope))
            self._check_key(scope)
            body = await self._read(scope, receive)
        except _RefusedError as refused:
            kind = _KINDS.get(refused.status, "invalid_request_error")
            error = {"message": str(refused), "type": kind, "param": None, "code": refused.code or None}
            headers = {"content-type": "application/json"} | refused.headers | allowed
            return await _answer(send, refused.status, json.dumps({"error": error}).encode(), headers)
        except ConnectionError:  # it has gone
            return None
        await self._app(scope, _replay(body, receive), _adding(allowed, send) if allowed else send)

    def _check_host(self, scope: Scope) -> None:
        hosts = [value for name, value in scope["headers"] if name == b"host"]
        if len(hosts) != 1:
            raise _RefusedError(400, f"{len(hosts)} Host headers: expected one")
        name = _host_name(hosts[0].decode("latin-1"))
        if "*" not in self._hosts and name not in self._hosts and not _is_address(name):
            raise _RefusedError(403, f"this server is not called {name[:100]!r}: --allowed-hosts names more")

    def _check_origin(self, scope: Scope) -> dict[str, str]:
        """CORS headers of the answer, where its origin is one that was named."""
        origin = _header(scope, b"origin").lower()
        if origin and origin in self._origins:
            return {"access-control-allow-origin": origin, "vary": "origin"}
        if origin and origin.partition("://")[2] != _header(scope, b"host").lower():
            raise _RefusedError(403, f"pages of {origin[:100]} may not use this server: --origins names others")
        return {}

    def _check_key(self, scope: Scope) -> None:
        if not self._digests or scope["path"] in OPEN:
            return
        scheme, _, key = _header(scope, b"authorization").partition(" ")
        given = _digest(key.strip().encode("latin-1")) if scheme.lower() == "bearer" else b""
        found = False
        for digest in self._digests:  # all of them: how long it takes says nothing
            found |= hmac.compare_digest(digest, given)
        if not found:
            said = "this API key is none of this server's" if given else "an API key is needed: Authorization: Bearer"
            raise _RefusedError(401, said, "invalid_api_key", **{"www-authenticate": "Bearer"})

    async def _read(self, scope: Scope, receive: Receive) -> bytes:
        said = _header(scope, b"content-length")
        if said.isdecimal() and int(said[:20]) > self._body:
            raise self._too_large()
        try:
            async with asyncio.timeout(self._seconds):
                return await self._whole(receive)
        except TimeoutError:
            raise _RefusedError(408, f"the body did not come within {self._seconds:g} s", connection="close") from None

    async def _whole(self, receive: Receive) -> bytes:
        parts, size, more = [], 0, True
        while more:
            event = await receive()
            if event["type"] == "http.disconnect":
                raise ConnectionError
            parts.append(event.get("body", b""))
            size, more = size + len(parts[-1]), event.get("more_body", False)
            if size > self._body:
                raise self._too_large()
        return b"".join(parts)

    def _too_large(self) -> _RefusedError:
        return _RefusedError(413, f"the body has more than {self._body} bytes", connection="close")


def guarded(app: App, config: ServeConfig) -> Guard:
    limit = config.limits.body
    return Guard(app, keys=config.keys(), hosts=config.allowed_hosts, origins=config.origins, body=limit)


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


def _header(scope: Scope, name: bytes) -> str:
    return next((value.decode("latin-1").strip() for found, value in scope["headers"] if found == name), "")


def _host_name(host: str) -> str:
    """Without a port: ``a:80``, ``[::1]:80``."""
    host = host.strip().lower()
    name, _, port = host[1:].partition("]") if host.startswith("[") else host.partition(":")
    return name.rstrip(".") if re.fullmatch(r":?[0-9]*", port) else host


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _preflight(scope: Scope) -> dict[str, str]:
    return {
        "access-control-allow-methods": "GET, POST",
        "access-control-allow-headers": _header(scope, b"access-control-request-headers") or "authorization",
        "access-control-max-age": "600",
    }


async def _answer(send: Send, status: int, body: bytes, headers: dict[str, str]) -> None:
    headers = headers if status == 204 else headers | {"content-length": str(len(body))}
    pairs = [(name.encode(), value.encode("latin-1")) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": status, "headers": pairs})
    await send({"type": "http.response.body", "body": body})


def _replay(body: bytes, receive: Receive) -> Receive:
    """First the body that was read, then what comes: that the client has gone."""
    left = [body]

    async def read() -> MutableMapping[str, Any]:
        return {"type": "http.request", "body": left.pop(), "more_body": False} if left else await receive()

    return read


def _adding(headers: dict[str, str], send: Send) -> Send:
    more = [(name.encode(), value.encode("latin-1")) for name, value in headers.items()]

    async def sent(event: MutableMapping[str, Any]) -> None:
        if event["type"] == "http.response.start":
            event = {**event, "headers": [*event["headers"], *more]}
        await send(event)

    return sent
