"""A real HTTP server on loopback that serves objects from memory, by ranges, and can misbehave on demand."""

import hashlib
import re
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class ObjectServer(ThreadingHTTPServer):
    """Serves ``objects``; ``requests`` lists (method, path, range) of all it was asked.

    ``fail_every`` answers every n-th request with 503, ``truncate_every`` cuts every n-th body in half and hangs up,
    ``shorten_every`` serves half of what every n-th range asked for and says so, ``serves_ranges=False`` ignores
    ranges, ``down`` answers everything with 503. ``during`` is called with (method, path) when an answer is made up but
    not yet sent.
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.objects = {}
        self.requests = []
        self.lock = threading.Lock()
        self.fail_every = self.truncate_every = self.shorten_every = 0
        self.during = lambda method, name: None
        self.serves_ranges = True
        self.down = False

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}"

    def put_folder(self, folder):
        """Serve all files of a folder."""
        for file in Path(folder).rglob("*"):
            if file.is_file():
                self.objects[file.relative_to(folder).as_posix()] = file.read_bytes()

    def count(self, method, name):
        """How often an object was asked for."""
        return sum(1 for kind, path, _ in self.requests if (kind, path) == (method, name))


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: ObjectServer

    def do_HEAD(self):
        self._answer(with_body=False)

    def do_GET(self):
        self._answer(with_body=True)

    def log_message(self, *arguments):
        pass

    def _answer(self, *, with_body):
        server, name = self.server, self.path.lstrip("/")
        with server.lock:
            server.requests.append((self.command, name, self.headers.get("Range")))
            number = len(server.requests)
        if server.down or (server.fail_every and number % server.fail_every == 0):
            return self._head(503, 0)
        if name not in server.objects:
            return self._head(404, 0)
        body = whole = server.objects[name]
        wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range") or "") if server.serves_ranges else None
        if wanted:
            start, stop = int(wanted[1]), min(int(wanted[2]) + 1, len(whole))
            if start >= len(whole):
                return self._head(416, 0)
            if server.shorten_every and number % server.shorten_every == 0:
                stop -= (stop - start) // 2
            body = whole[start:stop]
        etag = hashlib.md5(whole).hexdigest()
        extra = {"ETag": f'"{etag}"'} | ({"Accept-Ranges": "bytes"} if server.serves_ranges else {})
        if wanted:
            extra["Content-Range"] = f"bytes {start}-{stop - 1}/{len(whole)}"
        server.during(self.command, name)
        self._head(206 if wanted else 200, len(body), extra)
        if not with_body:
            return None
        if server.truncate_every and number % server.truncate_every == 0:
            body = body[: len(body) // 2]
            self.close_connection = True
        try:
            self.wfile.write(body)
        except (BrokenPipeError, ConnectionResetError):  # fsspec looks at the head of a GET and hangs up
            self.close_connection = True
        return None

    def _head(self, status, length, headers=None):
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(length))
        self.end_headers()


@contextmanager
def object_server():
    """Run a server for the time of a ``with`` block."""
    server = ObjectServer()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join(timeout=10)
