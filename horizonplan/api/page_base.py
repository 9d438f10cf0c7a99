"""What all addresses of the page share: templates, errors that are pages, forms that are sent."""

from collections.abc import Callable, Coroutine, Mapping
from functools import cache
from typing import Annotated, Any
from urllib.parse import parse_qs

from fastapi import Depends, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, RedirectResponse
from fastapi.routing import APIRoute
from jinja2 import Environment, PackageLoader, StrictUndefined
from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from starlette.exceptions import HTTPException

from horizonplan.api import page_view
from horizonplan.api.page_forms import Fields
from horizonplan.api.problems import Problem, of_database

MOST_FIELDS = 1000


class PageRoute(APIRoute):
    """A route whose errors are pages."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """The handler, and what is shown when it fails."""
        handle = super().get_route_handler()

        async def shown(request: Request) -> Response:
            try:
                return await handle(request)
            except HTTPException as error:
                if error.status_code == 401:
                    return sign_in_page(request, "", _wanted(request), dict(error.headers or {}))
                return _error_page(request, error)
            except RequestValidationError:
                return render(request, "error.html", 422, message="This address makes no sense.")
            except (DBAPIError, PoolTimeoutError) as error:
                return _error_page(request, of_database(request, error))

        return shown


async def sent(request: Request) -> Fields:
    """The fields of a form that was sent.

    Raises:
        Problem: it is no form.
    """
    if request.headers.get("content-type", "").partition(";")[0].strip() != "application/x-www-form-urlencoded":
        raise Problem(415, "This address takes the page's forms.")
    try:
        text = (await request.body()).decode()
        return parse_qs(text, keep_blank_values=True, max_num_fields=MOST_FIELDS)
    except ValueError as error:
        raise Problem(400, f"The form cannot be read: {error}.") from error


Sent = Annotated[Fields, Depends(sent)]


def render(request: Request, name: str, status: int = 200, **values: Any) -> Response:
    """A template as an answer."""
    keys = request.app.state.settings.keys_required
    shared = {"keys": keys, "letters": page_view.LETTERS, "path": request.url.path}
    return HTMLResponse(_templates().get_template(name).render(shared | values), status)


def sign_in_page(request: Request, message: str, wanted: str, headers: Mapping[str, str]) -> Response:
    """Asks for a key, and remembers the address that was asked for."""
    response = render(request, "sign_in.html", 401, message=message, wanted=wanted)
    response.headers.update(headers)
    return response


def to(path: str) -> RedirectResponse:
    """Lead on to another address, to be read."""
    return RedirectResponse(path, 303)


def _error_page(request: Request, error: HTTPException) -> Response:
    response = render(request, "error.html", error.status_code, message=str(error.detail))
    response.headers.update(error.headers or {})
    return response


def _wanted(request: Request) -> str:
    """The address of a request, so far as it can be read again."""
    if request.method != "GET":
        return "/"
    return request.url.path + (f"?{request.url.query}" if request.url.query else "")


@cache
def _templates() -> Environment:
    return Environment(
        loader=PackageLoader("horizonplan.api"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
