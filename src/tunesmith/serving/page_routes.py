"""The web page at ``/``: three files of the package, which ask for nothing elsewhere.

They are sent without an API key, as they tell nothing; what the page then asks for needs it. The policy lets the
browser run these files alone, so that a text of a model could do nothing even if the page showed it as HTML.
"""

from collections.abc import Awaitable, Callable
from importlib.resources import files

from fastapi import FastAPI
from fastapi.responses import Response

_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; connect-src 'self'; script-src 'self'; style-src 'self'; "
    "img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",  # another version of tunesmith may listen here tomorrow
}
_FILES = {
    "/": ("index.html", "text/html"),
    "/page.css": ("page.css", "text/css"),
    "/page.js": ("page.js", "text/javascript"),
}


def add_page(app: FastAPI) -> None:
    """Serve the page and its two files at ``/``; they are read once, here."""
    for path, (name, media_type) in _FILES.items():
        content = files("tunesmith.serving").joinpath("page", name).read_bytes()
        app.add_api_route(path, _sender(content, media_type), methods=["GET", "HEAD"])


def _sender(content: bytes, media_type: str) -> Callable[[], Awaitable[Response]]:
    async def send() -> Response:
        return Response(content, media_type=media_type, headers=_HEADERS)

    return send
