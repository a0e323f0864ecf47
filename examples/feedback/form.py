"""Form: feedback from a person at a small web form on this machine."""

import html
import http.server
import queue
import secrets
import threading
import urllib.parse
from collections.abc import Callable, Iterator, Sequence
from http import HTTPStatus
from typing import Any

import rewards
from candidates import Item
from sources import HINTS, Row, parse

from envs.errors import BadInput

LARGEST = 100_000  # bytes of an answer

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Feedback</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
body {{ font: 1rem/1.5 system-ui, sans-serif; max-width: 42rem; margin: 2rem auto; padding: 0 1rem;
  color: #1b1f24; background: #fff; }}
blockquote {{ margin: 1rem 0; padding: .6rem 1rem; border-left: .25rem solid #2a6f97;
  background: #f2f6f9; }}
input {{ font: inherit; width: 100%; box-sizing: border-box; padding: .4rem; }}
button {{ font: inherit; padding: .4rem 1rem; margin: .8rem .6rem 0 0; }}
.error {{ color: #a4161a; }} progress {{ width: 100%; }}
</style></head><body><main>{body}</main></body></html>"""

ASK = """<progress value="{done}" max="{total}"></progress><p>{done} of {total} done</p>
<blockquote>{prompt}</blockquote><ol>{texts}</ol>
<form method="post"><input type="hidden" name="id" value="{id}">
<label for="answer">Give {hint}.</label>
<input id="answer" name="answer" value="{answer}" autofocus autocomplete="off">
<p class="error" role="alert">{error}</p>
<button>Next</button><button name="skip" value="1">Leave out</button></form>"""


class Form:
    """Serves one page on this machine alone, at an address that nobody can guess."""

    def __init__(self, port: int = 0, say: Callable[[str], None] = print) -> None:
        """port: 0 takes a free one. say: is told the address."""
        self._port, self._say = port, say

    def ask(self, items: Sequence[Item], kind: str) -> Iterator[Row]:
        """Ends when each item has been answered or left out."""
        session = _Session(items, kind)
        server = _serve(session, self._port)
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        try:
            self._say(f"Open http://127.0.0.1:{server.server_port}/{session.token} in a browser")
            while (row := session.rows.get()) is not None:
                yield row
        finally:
            server.shutdown()
            server.server_close()


class _Session:
    """What has been answered so far."""

    def __init__(self, items: Sequence[Item], kind: str) -> None:
        self.items, self.kind, self.done = list(items), kind, 0
        self.token = secrets.token_urlsafe(16)
        self.rows: queue.SimpleQueue[Row | None] = queue.SimpleQueue()
        self._lock = threading.Lock()

    def page(self, answer: str = "", error: str = "") -> str:
        """The next item's page, or that there is none."""
        if self.over:
            return PAGE.format(body="<h1>Thank you</h1><p>You can close this page.</p>")
        item = self.items[self.done]
        safe = {
            "prompt": item.prompt, "id": item.id, "hint": HINTS[self.kind], "answer": answer,
            "error": error,
        }  # fmt: skip
        body = ASK.format(
            done=self.done,
            total=len(self.items),
            texts="".join(f"<li>{html.escape(text)}</li>" for text in item.texts),
            **{name: html.escape(value) for name, value in safe.items()},
        )
        return PAGE.format(body=body)

    def answer(self, fields: dict[str, str]) -> str:
        """Takes an answer; returns what is wrong with it as a page, or nothing.

        A page that was sent twice, or was left open, is about another item and is passed over.
        """
        with self._lock:
            if self.over or fields.get("id") != self.items[self.done].id:
                return ""
            item, line = self.items[self.done], fields.get("answer", "").strip()
            if not fields.get("skip"):
                try:
                    given: Any = parse(self.kind, line, len(item.texts))
                    rewards.pairs(self.kind, item.prompt, item.texts, given)
                except BadInput as error:
                    return self.page(line, str(error))
                self.rows.put({"id": item.id, self.kind: given})
            self.done += 1
            return ""

    @property
    def over(self) -> bool:
        """Every item has been answered or left out."""
        return self.done >= len(self.items)


def _serve(session: _Session, port: int) -> http.server.ThreadingHTTPServer:
    class Handler(http.server.BaseHTTPRequestHandler):
        timeout = 10

        def do_GET(self) -> None:
            if self._known():
                self._send(HTTPStatus.OK, session.page())

        def do_POST(self) -> None:
            length = self.headers.get("Content-Length", "")
            if not self._known():
                return
            if not length.isdecimal() or int(length) > LARGEST:
                self.send_error(HTTPStatus.REQUEST_ENTITY_TOO_LARGE)
                return
            body = self.rfile.read(int(length)).decode("utf-8", "replace")
            fields = dict(urllib.parse.parse_qsl(body, keep_blank_values=True, max_num_fields=9))
            again = session.answer(fields)
            if again:
                self._send(HTTPStatus.UNPROCESSABLE_ENTITY, again)
                return
            if session.over:  # the last page goes out before the server ends
                self._send(HTTPStatus.OK, session.page())
                session.rows.put(None)
                return
            self.send_response(HTTPStatus.SEE_OTHER)  # so that "reload" sends nothing again
            self.send_header("Location", f"/{session.token}")
            self.send_header("Content-Length", "0")
            self.end_headers()

        def _known(self) -> bool:
            found = secrets.compare_digest(self.path.encode(), f"/{session.token}".encode())
            if not found:
                self.send_error(HTTPStatus.NOT_FOUND)
            return found

        def _send(self, status: HTTPStatus, page: str) -> None:
            content = page.encode()
            self.send_response(status)
            self.send_header("Content-Type", "text/html; charset=utf-8")
            self.send_header("Content-Length", str(len(content)))
            self.send_header("Cache-Control", "no-store")
            self.send_header("Content-Security-Policy",
                             "default-src 'none'; style-src 'unsafe-inline'; form-action 'self'; "
                             "frame-ancestors 'none'")  # fmt: skip
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            """Nothing is logged."""

    try:
        return http.server.ThreadingHTTPServer(("127.0.0.1", port), Handler)
    except OSError as error:
        raise BadInput(
            f"web: port: {port} cannot be used: {error.strerror or error}; give another, or 0"
        ) from None
