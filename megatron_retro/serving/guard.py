"""What stands before every route: who may ask, how much, for how long; and what every answer carries."""

import asyncio
import hashlib
import hmac
import json
import sys
import traceback
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from megatron_retro.serving.requests import Refusal

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

_OPEN = ("/", "/health")  # to everybody
_GRACE_SECONDS = 10.0  # for a client that is slow to take an answer
_HEADERS = {
    "cache-control": "no-store",
    "content-security-policy": "default-src 'none'; frame-ancestors 'none'",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}


class _Gone(Exception):
    """The client has left."""


class Guard:
    """An ASGI application around another.

    A page of another origin must not use the browser of somebody who may ask: its origin is refused, and without a
    token so is every name of this host but the known ones, which an attacker's name server could point here.

    Args:
        app: is given requests whose body is complete.
        key: the token; None lets everybody in.
        hosts: names that requests may give this host by; None for any.
        max_body_bytes: of a request.
        deadline_seconds: of a request; a body must have come by then, an answer gone a little later.
        count: is told (path, status) of every request.
    """

    def __init__(
        self,
        app: Callable[[Scope, Receive, Send], Awaitable[None]],
        *,
        key: str | None,
        hosts: set[str] | None,
        max_body_bytes: int,
        deadline_seconds: float,
        count: Callable[[str, int], None],
    ):
        self._app, self._key, self._hosts = app, _digest(key.encode()) if key else None, hosts
        self._max_body_bytes, self._deadline_seconds, self._count = max_body_bytes, deadline_seconds, count

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status = 0

        async def told(message: MutableMapping[str, Any]) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                given = {name for name, _ in message["headers"]}
                more = [(name.encode(), value.encode()) for name, value in _HEADERS.items()]
                message = {
                    **message,
                    "headers": [*message["headers"], *(pair for pair in more if pair[0] not in given)],
                }
            await send(message)

        try:
            await asyncio.wait_for(self._serve(scope, receive, told), self._deadline_seconds + _GRACE_SECONDS)
        except Refusal as refusal:
            if not status:
                await _refuse(told, refusal)
        except _Gone:
            status = 499
        except asyncio.TimeoutError:
            if status:  # the answer was not taken
                status = 408
            else:
                await _refuse(told, Refusal(504, "the deadline passed; what was asked may still be done", "deadline"))
        except Exception:
            traceback.print_exc(file=sys.stderr)
            if not status:
                await _refuse(told, Refusal(500, "the server has failed", "server_error"))
        finally:
            self._count(scope["path"], status)

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = {name.lower(): value for name, value in reversed(scope["headers"])}
        self._check_origin(headers)
        if self._key and scope["path"] not in _OPEN:
            self._check_key(headers.get(b"authorization", b""))
        body = await self._body(headers, receive)
        parts = iter([{"type": "http.request", "body": body, "more_body": False}])

        async def replayed() -> MutableMapping[str, Any]:
            return next(parts, None) or await receive()

        await self._app(scope, replayed, send)

    def _check_origin(self, headers: dict[bytes, bytes]) -> None:
        host = headers.get(b"host", b"").decode("latin-1").lower()
        name = host.rpartition(":")[0] if host.rpartition(":")[2].isdigit() else host
        if self._hosts is not None and host and name not in self._hosts:
            raise Refusal(403, "this host is not known by that name", "unknown_host")
        origin = headers.get(b"origin", b"").decode("latin-1").lower()
        if origin and origin.partition("://")[2] != host:
            raise Refusal(403, "requests from pages of other origins are refused", "foreign_origin")

    def _check_key(self, authorization: bytes) -> None:
        scheme, _, token = authorization.partition(b" ")
        assert self._key
        if scheme.lower() != b"bearer" or not hmac.compare_digest(_digest(token.strip()), self._key):
            raise Refusal(
                401, "the API key is missing or wrong", "invalid_api_key", headers={"www-authenticate": "Bearer"}
            )

    async def _body(self, headers: dict[bytes, bytes], receive: Receive) -> bytes:
        close = {"connection": "close"}
        length, most = headers.get(b"content-length", b""), self._max_body_bytes
        if length.isdigit() and (len(length) > 18 or int(length) > most):
            raise Refusal(413, f"the body is larger than {most} bytes", "body_too_large", headers=close)
        try:
            body = await asyncio.wait_for(_received(receive, most + 1), self._deadline_seconds)
        except asyncio.TimeoutError:
            raise Refusal(408, "the body has not come in time", "body_timeout", headers=close) from None
        if len(body) > most:
            raise Refusal(413, f"the body is larger than {most} bytes", "body_too_large", headers=close)
        return body


async def _received(receive: Receive, enough: int) -> bytes:
    """The body, or its beginning once there is enough of it."""
    body = bytearray()
    while len(body) < enough:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise _Gone
        body += message.get("body", b"")
        if not message.get("more_body"):
            break
    return bytes(body)


def encoded(content: Any) -> bytes:
    return json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode("utf-8", "replace")


async def _refuse(send: Send, refusal: Refusal) -> None:
    body = encoded(refusal.as_json())
    headers = {"content-type": "application/json", "content-length": str(len(body)), **refusal.headers}
    pairs = [(name.encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": refusal.status, "headers": pairs})
    await send({"type": "http.response.body", "body": body})


def _digest(token: bytes) -> bytes:
    return hashlib.sha256(token).digest()
