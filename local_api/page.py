"""The server's own page at `/`: jobs, files, models and a playground, drawn in the browser from the API's answers.

The files in static/ are the same for everyone and hold no data, so they are served without a key; what the page shows
it asks of the API like any other client, and with a key the reader types that in. The browser is told to load nothing
from elsewhere, to run no script but static/'s, and to refuse any text as markup.
"""

from collections.abc import Callable
from pathlib import Path

from fastapi import FastAPI
from fastapi.responses import FileResponse, HTMLResponse

FOLDER = Path(__file__).parent / "static"  # beside this module, wherever the server is started
# Not left to `mimetypes`, which asks Windows, and that may call a script plain text.
TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
# All that is served, looked up once: no path from a client reaches the file system.
NAMES = [path.relative_to(FOLDER).as_posix() for path in FOLDER.rglob("*") if path.suffix in TYPES]
FILES = {"/" if name == "index.html" else f"/static/{name}": name for name in NAMES}
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-cache",  # a server that was updated shows its new page
}
# At /v1, for whoever types that into a browser.
WELCOME = """<!doctype html><meta charset="utf-8"><title>Local API</title>
<p>This is the base URL of a local API that speaks OpenAI's: give it to a client as OPENAI_BASE_URL.
<p>For people there is <a href="/">the web page</a>: jobs, models, files and a playground.
"""


def add_routes(app: FastAPI) -> None:
    for path in ("/v1", "/v1/"):
        app.add_api_route(path, lambda: HTMLResponse(WELCOME, headers=HEADERS), include_in_schema=False)
    for path, name in FILES.items():
        app.add_api_route(path, serve(FOLDER / name), methods=["GET", "HEAD"], include_in_schema=False)


def serve(file: Path) -> Callable[[], FileResponse]:
    return lambda: FileResponse(file, media_type=TYPES[file.suffix], headers=HEADERS)
