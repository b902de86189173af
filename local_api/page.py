"""The server's own page at `/`: jobs, files, models and a playground, drawn in the browser from the API's answers.

The files in static/ are the same for everyone and hold no data, so they are served without a key; what the page shows
it asks of the API like any other client, and with a key the reader types that in. The browser is told to load nothing
from elsewhere, to run no script but static/'s, and to refuse any text as markup.
"""

from collections.abc import Callable
from pathlib import Path

from fastapi import FastAPI
from fastapi.responses import FileResponse

FOLDER = Path(__file__).parent / "static"  # beside this module, wherever the server is started
# All that is served: no path from a client reaches the file system.
NAMES = (
    "icon.svg",
    "page.css",
    "page.js",
    "api.js",
    "curve.js",
    "elements.js",
    "playground.js",
    "uplot/uPlot.min.css",
    "uplot/uPlot.iife.min.js",
)
FILES = {"/": "index.html", **{f"/static/{name}": name for name in NAMES}}
# Not left to `mimetypes`, which asks Windows, and that may call a script plain text.
TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-cache",  # a server that was updated shows its new page
}


def add_routes(app: FastAPI) -> None:
    for path, name in FILES.items():
        app.add_api_route(path, serve(FOLDER / name), methods=["GET", "HEAD"], include_in_schema=False)


def serve(file: Path) -> Callable[[], FileResponse]:
    return lambda: FileResponse(file, media_type=TYPES[file.suffix], headers=HEADERS)
