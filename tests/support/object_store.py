"""An S3 server on this machine (moto), with faults: refused requests, cut uploads, listings that are late."""

import contextlib
import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import s3fs
from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import make_server

BUCKET = "s3://bucket"


class Server:
    """Serves until `close`; `fault` may answer a request in place of the store: given method and path, it returns a
    status, or none to let it pass."""

    def __init__(self) -> None:
        logging.getLogger("werkzeug").setLevel(logging.ERROR)
        self.fault: Callable[[str, str], int | None] = lambda method, path: None
        self.cut: Callable[[str, str], bool] = lambda method, path: False  # take half of an upload, and hang up
        self.late = False  # listings are as they were when this was set
        self.requests: list[tuple[str, str]] = []
        self._listings: dict[str, tuple[str, list[Any], bytes]] = {}
        self._app = DomainDispatcherApplication(create_backend_app)
        self._server = make_server("127.0.0.1", 0, self._answer, threaded=True)
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        self.environment = {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self._server.server_port}",
            "AWS_ACCESS_KEY_ID": "any", "AWS_SECRET_ACCESS_KEY": "any", "AWS_DEFAULT_REGION": "us-east-1",
        }  # fmt: skip

    def close(self) -> None:
        self._server.shutdown()

    def _answer(self, environ: dict[str, Any], start_response: Any) -> Any:
        method, path, query = (environ[name] for name in ("REQUEST_METHOD", "PATH_INFO", "QUERY_STRING"))
        self.requests.append((method, path))
        if (status := self.fault(method, path)) is not None:
            start_response(f"{status} injected", [("Content-Length", "0")])
            return [b""]
        if method == "PUT" and self.cut(method, path):
            environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0) // 2)
            # Else the connection is kept, and the server waits for a next request in the other half.
            environ["werkzeug.socket"].shutdown(socket.SHUT_RDWR)
            raise ConnectionAbortedError
        if method != "GET" or "list-type" not in query:
            return self._app(environ, start_response)
        seen: list[Any] = []

        def note(status: str, headers: list[Any], *error: Any) -> None:
            seen.extend((status, headers))

        body = b"".join(self._app(environ, note))
        if not self.late:
            self._listings[query] = seen[0], seen[1], body
        status_line, headers, body = self._listings.get(query, (*seen, body)) if self.late else (*seen, body)
        start_response(status_line, headers)
        return [body]


@contextlib.contextmanager
def served() -> Iterator[Server]:
    """A server with an empty bucket."""
    server = Server()
    try:
        keys = {"key": "any", "secret": "any", "endpoint_url": server.environment["AWS_ENDPOINT_URL"]}
        s3fs.S3FileSystem(**keys, skip_instance_cache=True).makedirs("bucket", exist_ok=True)
        yield server
    finally:
        server.close()


def wait_for(condition: Callable[[], bool], limit_s: float = 60.0) -> None:
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline, "it did not come to that in time"
        time.sleep(0.02)
