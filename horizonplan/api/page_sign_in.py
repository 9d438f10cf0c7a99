"""Signing in to the page: the key goes into a cookie, which ``security.require_key`` reads."""

from fastapi import APIRouter, Request, Response

from horizonplan.api import security
from horizonplan.api.page_base import PageRoute, Sent, sign_in_page, to

router = APIRouter(route_class=PageRoute, include_in_schema=False)


@router.post("/sign-in")
def sign_in(request: Request, fields: Sent) -> Response:
    """Keep a key in a cookie that scripts cannot read."""
    key, wanted = (fields.get(name, [""])[0].strip() for name in ("key", "wanted"))
    if not security.is_key(request.app.state.database, key):
        return sign_in_page(request, "This key is not known here.", wanted, {})
    response = to(wanted if _is_here(wanted) else "/")
    secure = request.url.scheme == "https"
    response.set_cookie(security.COOKIE, key, httponly=True, samesite="lax", secure=secure)
    return response


@router.post("/sign-out")
def sign_out() -> Response:
    """Forget the key."""
    response = to("/")
    response.delete_cookie(security.COOKIE)
    return response


def _is_here(address: str) -> bool:
    """Whether an address leads to this service, however a browser reads it."""
    return address.startswith("/") and address[1:2] not in ("/", "\\") and address.isprintable()
