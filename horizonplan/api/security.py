"""Who may ask, and how much at a time: API keys, security headers, limits of bodies, requests from other sites.

A key is 256 random bits. Only its SHA-256 is stored, which is enough: there is nothing to guess about such a key.
"""

import hashlib
import hmac
import ipaddress
import json
import secrets
from collections.abc import Callable, Coroutine
from typing import Annotated, Any

from fastapi import Depends, Request, Response
from fastapi.routing import APIRoute
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from sqlalchemy import delete, func, insert, select
from sqlalchemy.exc import IntegrityError
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from horizonplan.api.database import Database, api_keys, now
from horizonplan.api.problems import LONGEST_NAME, Problem, problem_response
from horizonplan.api.settings import Settings

COOKIE = "horizonplan_key"
PREFIX = "hp_"
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}
_RAW_HEADERS = [(name.lower().encode(), value.encode()) for name, value in HEADERS.items()]
SAFE_METHODS = {"GET", "HEAD", "OPTIONS"}

bearer = HTTPBearer(auto_error=False, description="A key from `horizonplan serve --new-key NAME`.")


def new_key(database: Database, name: str) -> str:
    """Make a key. It is returned here and can never be read again.

    Raises:
        ValueError: there is one of that name, or the name is none.
    """
    if not name.strip() or len(name) > 100:
        raise ValueError(f"name={name!r}: give the key a name of 1 to 100 characters.")
    key = PREFIX + secrets.token_urlsafe(32)
    try:
        with database.write() as connection:
            connection.execute(insert(api_keys).values(name=name, hash=_hash(key), created=now()))
    except IntegrityError as error:
        raise ValueError(f"name={name!r}: there is a key of that name; --drop-key it, or choose another.") from error
    return key


def drop_key(database: Database, name: str) -> None:
    """Forget a key: it is refused from now on.

    Raises:
        ValueError: there is none of that name.
    """
    with database.write() as connection:
        if not connection.execute(delete(api_keys).where(api_keys.c.name == name)).rowcount:
            raise ValueError(f"name={name!r}: there is no key of that name.")


def has_keys(database: Database) -> bool:
    """Whether there is a key at all."""
    with database.read() as connection:
        return bool(connection.scalar(select(func.count()).select_from(api_keys)))


def is_key(database: Database, key: str) -> bool:
    """Whether a key is one of ours."""
    asked = _hash(key)
    with database.read() as connection:
        stored = connection.scalar(select(api_keys.c.hash).where(api_keys.c.hash == asked))
    return hmac.compare_digest(stored or "", asked)


def require_key(request: Request, credentials: Annotated[HTTPAuthorizationCredentials | None, Depends(bearer)]) -> None:
    """Let a request pass that carries a key: as ``Authorization: Bearer``, or in the page's cookie.

    Raises:
        Problem: 401, there is none, or it is not ours.
    """
    key = request.cookies.get(COOKIE) if credentials is None else credentials.credentials
    if key is None or not is_key(request.app.state.database, key):
        detail = "Send a key: `Authorization: Bearer hp_...`." if key is None else "This key is not known here."
        raise Problem(401, detail, headers={"WWW-Authenticate": "Bearer"})


class JsonRoute(APIRoute):
    """A route whose body must be JSON, and is called so."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """The handler, behind a look at the body's type."""
        handle = super().get_route_handler()

        async def checked(request: Request) -> Response:
            request = _JsonRequest(request.scope, request.receive)
            if self.body_field is not None and await request.body():
                kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
                if kind != "application/json":
                    raise Problem(415, f"The body is {kind or 'of no type'}; send application/json.")
            return await handle(request)

        return checked


def named_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object, in which each name is given once."""
    made: dict[str, Any] = {}
    for name, value in pairs:
        if name in made:
            message = "the name is given twice in one object"
            raise Problem(422, f"{name[:LONGEST_NAME]}: {message}", "invalid", [(name[:LONGEST_NAME], message)])
        made[name] = value
    return made


class _JsonRequest(Request):
    """A request whose JSON is refused where Python would give up on it."""

    async def json(self) -> Any:
        """The body's value."""
        try:
            return json.loads(await self.body(), object_pairs_hook=named_once)
        except json.JSONDecodeError as error:
            raise Problem(400, f"The body is no JSON: {error.msg} at character {error.pos}.") from error
        except RecursionError as error:
            raise Problem(400, "The body's JSON is nested too deeply.") from error
        except ValueError as error:  # digits by the thousand, or bytes that are no text
            raise Problem(400, f"The body is no JSON: {error}.") from error


class Guard:
    """What every request passes first: its size, where it comes from; and what every answer carries."""

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self.app, self.settings = app, settings

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or refuse it."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started = False

        async def guarded(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                headers = message.setdefault("headers", [])
                known = {name.lower() for name, _ in headers}
                headers += [header for header in _RAW_HEADERS if header[0] not in known]
            await send(message)

        problem = self._refused(scope)
        if problem is not None:
            await problem_response(Request(scope), problem)(scope, receive, guarded)
            return
        try:
            await self.app(scope, self._limited(receive), guarded)
        except Exception:  # the server logs it
            if not started:
                fault = Problem(500, "The service has a fault; its log says more.")
                await problem_response(Request(scope), fault)(scope, receive, guarded)
            raise

    def _refused(self, scope: Scope) -> Problem | None:
        headers = Headers(scope=scope)
        length = headers.get("content-length", "")
        if length.isdecimal() and (len(length) > 18 or int(length) > self._most):
            return self._too_large()
        host = headers.get("host", "")
        if scope["method"] not in SAFE_METHODS and not _is_own_page(headers, host):
            return Problem(403, "The request comes from another site's page.")
        if not self.settings.keys_required and not _is_ours(host):
            detail = f"Without keys this machine is addressed as localhost, not as {host!r}; or set "
            return Problem(403, detail + "HORIZONPLAN_REQUIRE_KEYS=true and send a key.")
        return None

    def _limited(self, receive: Receive) -> Receive:
        seen = 0

        async def limited() -> Message:
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b""))
            if seen > self._most:
                raise self._too_large()
            return message

        return limited

    @property
    def _most(self) -> int:
        return self.settings.max_body_bytes

    def _too_large(self) -> Problem:
        return Problem(413, f"The body is larger than {self._most} bytes, the most that is taken.")


def _is_own_page(headers: Headers, host: str) -> bool:
    """Whether a request comes from no page at all, or from one of ours.

    Browsers say so in ``Sec-Fetch-Site``, and where the connection is not trusted (plain http beyond this machine), or
    the browser is old, in ``Origin``. Programs send neither.
    """
    site, origin = headers.get("sec-fetch-site"), headers.get("origin")
    if site is not None:
        return site in ("none", "same-origin")
    return origin is None or origin.partition("://")[2] == host


def _is_ours(host: str) -> bool:
    """Whether a Host header names this machine: an address, or a name that no public name server can give away."""
    name = host.rpartition(":")[0] if host.rpartition(":")[2].isdecimal() else host
    try:
        return ipaddress.ip_address(name.strip("[]")).is_loopback
    except ValueError:
        return "." not in name or name.endswith(".localhost")


def _hash(key: str) -> str:
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()
