"""Who may ask: the key, the name and the page that a request comes by, and how large it may be.

A page of another site can make a browser on this machine send requests here (cross-site posts), and can have its own
name point here (DNS rebinding). Neither gets past the Origin and Host that browsers send and pages can't change.
"""

import base64
import binascii
import ipaddress
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from urllib.parse import urlsplit

from fastapi import HTTPException
from fastapi.responses import JSONResponse
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from finetune.serving.keys import owner_of
from finetune.serving.requests import Refused

LOOPBACK = "localhost"
PAGES = ("/", "/runs", "/machine")
ANSWER_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
}


@dataclass(frozen=True)
class Rules:
    """keys: clients by the hash of their key, empty where none is needed. names: of this machine. origins: of pages."""

    keys: Mapping[str, str]
    names: frozenset[str]
    origins: frozenset[str]
    max_body_bytes: int


def is_loopback(host: str) -> bool:
    """Whether only programs on this machine reach that address."""
    try:
        return host == LOOPBACK or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class Guard:
    """In front of every route."""

    def __init__(self, app: ASGIApp, rules: Rules) -> None:
        self.app, self.rules = app, rules

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return

        async def answer(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in ANSWER_HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        try:
            if scope["type"] != "http":
                raise Refused(403, "this server speaks plain HTTP alone", code="not_http")
            client = self._check(Headers(scope=scope), scope["method"], scope["path"])
        except Refused as error:
            asks = {"WWW-Authenticate": 'Basic realm="finetune"'} if error.status == 401 else {}
            await JSONResponse(error.body(), error.status, error.headers() | asks)(scope, receive, answer)
            return
        scope.setdefault("state", {})["client"] = client  # `request.state.client`
        await self.app(scope, self._limited(receive), answer)

    def _check(self, headers: Headers, method: str, path: str) -> str:
        """The client's name, empty for all without a key."""
        host = headers.get("host", "")
        if not self._is_own(host):
            raise Refused(
                403,
                f"this server is not called {host[:100]!r}; its owner can allow the name: serve.names=[…]",
                code="host_not_allowed",
            )
        self._check_origin(headers, host, is_visit=method == "GET" and path in PAGES)
        # Browsers ask without a key whether a page may ask; that is answered in front of all routes.
        may_ask = method == "OPTIONS" and "access-control-request-method" in headers
        if may_ask and headers.get("origin") in self.rules.origins:
            return ""
        client = owner_of(_given_key(headers), self.rules.keys) if self.rules.keys else ""
        if client is None:
            raise Refused(401, "this server needs its key: Authorization: Bearer KEY", code="invalid_api_key")
        length = headers.get("content-length", "0")
        if not length.isdecimal() or int(length) > self.rules.max_body_bytes:
            raise Refused(413, self._too_large(), code="request_too_large")
        return client

    def _is_own(self, host: str) -> bool:
        """Names can be made to point here, addresses can't."""
        try:
            name = urlsplit(f"//{host}").hostname or ""
            ipaddress.ip_address(name)
            return True
        except ValueError:
            return host != "" and name in self.rules.names

    def _check_origin(self, headers: Headers, host: str, *, is_visit: bool) -> None:
        """is_visit: somebody opens a page, which a link on any site may lead to."""
        origin = headers.get("origin")
        same = origin in (f"http://{host}", f"https://{host}")
        if origin is not None and not same and origin not in self.rules.origins:
            raise Refused(
                403,
                f"pages of {origin[:100]!r} may not use this server; its owner can allow them: serve.origins=[…]",
                code="origin_not_allowed",
            )
        # Requests for scripts and images have no Origin.
        if origin is None and not is_visit and headers.get("sec-fetch-site") in ("cross-site", "same-site"):
            raise Refused(403, "pages of other sites may not use this server", code="origin_not_allowed")

    def _limited(self, receive: Receive) -> Receive:
        """The body of a request that doesn't say how long it is."""
        read = 0

        async def limited() -> Message:
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if read > self.rules.max_body_bytes:
                raise HTTPException(413, self._too_large())
            return message

        return limited

    def _too_large(self) -> str:
        return f"a request may have {self.rules.max_body_bytes:,} bytes (serve.max_body_kib)"


def _given_key(headers: Headers) -> str:
    """Of `Bearer KEY`, or the password of what a browser asks for; empty without one."""
    scheme, _, text = headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer":
        return text.strip()
    if scheme.lower() == "basic":
        try:
            return base64.b64decode(text, validate=True).decode("utf-8", "replace").partition(":")[2]
        except binascii.Error:
            return ""
    return ""


def names_of(host: str, more: Sequence[str]) -> frozenset[str]:
    """What this machine may be called."""
    return frozenset(name.lower() for name in (LOOPBACK, host, *more))
