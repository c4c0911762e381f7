"""Stand-ins for the ОФД: a sender, and a server for senders that speak HTTP."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from builders import NOON


class Ofd:
    """Answers by the receipt's till, and remembers what it was sent."""

    def __init__(self, default=NOON + 5, **answers):
        self.default = default
        self.answers = answers
        self.received = []

    def __call__(self, receipt):
        self.received.append(receipt.id)
        answer = self.answers.get(receipt.pos_id, self.default)
        if isinstance(answer, BaseException):
            raise answer
        return answer() if callable(answer) else answer


class OfdServer(ThreadingHTTPServer):
    """
    Takes the next of `answers` for each request: a status, a status and headers, or None to break the line.

    Without one it accepts. What it was sent is in `received`.
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.answers = []
        self.received = []

    def __enter__(self):
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.shutdown()
        self.server_close()


class _Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        self.server.received.append(self.rfile.read(int(self.headers["Content-Length"])))
        answer = self.server.answers.pop(0) if self.server.answers else 200
        if answer is None:
            return
        status, headers = answer if isinstance(answer, tuple) else (answer, {})
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(json.dumps({"accepted_at": NOON}).encode())

    def log_message(self, *_):
        pass
