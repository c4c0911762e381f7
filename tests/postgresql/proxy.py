"""
A TCP proxy between a client and PostgreSQL that understands where messages begin.

It counts round trips, and cuts connections at the moment that matters most: when the server has, or may have, committed
and the client has not been told. The client puts `MARK` into what it sends, for example into a document; a connection
that has sent it is cut at the end of its transaction.
"""

import contextlib
import socket
import struct
import threading
from collections.abc import Iterator
from enum import Enum

MARK = b"cut-me"

SSL_REQUEST, GSS_REQUEST = 80877103, 80877104
QUERY, SYNC, READY = b"Q", b"S", b"Z"
UNANSWERED = (b"H", b"X", b"p")  # flush, terminate, a password: the server is not ready after them
IDLE = b"I"


class Cut(Enum):
    """Where a connection is cut."""

    BEFORE = "the request does not reach the server"
    MEANWHILE = "the request reaches the server, and the client does not wait for the answer"
    AFTER = "the server has answered, and the answer does not reach the client"


class _GoneError(Exception):
    """The connection was cut."""


class Proxy:
    """Listens on a loopback port and forwards to another one; `cuts` are the cuts to make, one for each mark."""

    def __init__(self, to_port: int) -> None:
        self._to_port = to_port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._lock = threading.Lock()
        self._open: set[socket.socket] = set()
        self.port: int = self._listener.getsockname()[1]
        self.cuts: list[Cut] = []
        self.done: list[Cut] = []
        self.round_trips = 0

    @contextlib.contextmanager
    def running(self) -> Iterator["Proxy"]:
        """Forward during the block; its connections are closed after it."""
        acceptor = threading.Thread(target=self._accept)
        acceptor.start()
        try:
            yield self
        finally:
            self._listener.shutdown(socket.SHUT_RDWR)
            acceptor.join()
            self._listener.close()
            for connection in list(self._open):
                _hang_up(connection)

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=[client], daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        server = socket.create_connection(("127.0.0.1", self._to_port))
        for connection in (client, server):
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._open |= {client, server}
        link = _Link(self, client, server)
        answers = threading.Thread(target=link.forward_answers, daemon=True)
        answers.start()
        link.forward_requests()
        answers.join()
        self._open -= {client, server}
        client.close()
        server.close()

    def next_cut(self) -> Cut | None:
        """Take the next cut to make."""
        with self._lock:
            return self.cuts.pop(0) if self.cuts else None

    def count(self, cut: Cut | None = None) -> None:
        """Note a round trip, or a cut that was made."""
        with self._lock:
            if cut is None:
                self.round_trips += 1
            else:
                self.done.append(cut)


class _Link:
    """One connection of a client, and its connection to the server."""

    def __init__(self, proxy: Proxy, client: socket.socket, server: socket.socket) -> None:
        self._proxy = proxy
        self._client = client
        self._server = server
        self._is_idle = True  # no transaction is open
        self._is_asking = False  # something was sent, and the server is not ready again
        self._is_ending = False  # what was sent ends a transaction with a mark
        self._cut: Cut | None = None

    def forward_requests(self) -> None:
        try:
            self._forward_startup()
            batch = b""
            while True:
                message = _message(self._client)
                batch += message
                if MARK in message and self._cut is None:
                    self._cut = self._proxy.next_cut()
                if message[:1] in (QUERY, SYNC):
                    self._ask(batch)
                elif message[:1] in UNANSWERED:
                    self._server.sendall(batch)
                else:
                    continue
                batch = b""
        except (_GoneError, OSError):
            # A server that is still at work learns of it when it answers, as if the client's machine were gone.
            if not (self._cut is Cut.MEANWHILE and self._is_ending):
                _hang_up(self._server)

    def _forward_startup(self) -> None:
        while True:
            head = _exactly(self._client, 8)
            length, code = struct.unpack("!II", head)
            rest = _exactly(self._client, length - 8)
            if code not in (SSL_REQUEST, GSS_REQUEST):
                self._server.sendall(head + rest)
                return
            self._client.sendall(b"N")

    def _ask(self, batch: bytes) -> None:
        """Forward a batch that the server answers; if it ends a transaction with a mark, that is where the connection is cut."""
        self._is_ending = self._cut is not None and (self._is_idle or b"COMMIT" in batch[:64])
        self._is_asking = True
        if self._is_ending and self._cut is not Cut.AFTER:
            self._hang_up_on_client()
        if not (self._is_ending and self._cut is Cut.BEFORE):
            self._server.sendall(batch)
        if self._is_ending and self._cut is not Cut.AFTER:
            raise _GoneError

    def forward_answers(self) -> None:
        try:
            while True:
                message = _message(self._server)
                if message[:1] == READY:
                    self._is_idle = message[5:6] == IDLE
                    if self._is_asking:
                        self._proxy.count()
                    self._is_asking = False
                if not self._is_ending:
                    self._client.sendall(message)
                elif message[:1] == READY:
                    self._hang_up_on_client()
                    raise _GoneError
        except (_GoneError, OSError):
            _hang_up(self._client)
            _hang_up(self._server)

    def _hang_up_on_client(self) -> None:
        if self._cut is not None:
            self._proxy.count(self._cut)
        _hang_up(self._client)


def _message(connection: socket.socket) -> bytes:
    head = _exactly(connection, 5)
    return head + _exactly(connection, struct.unpack("!I", head[1:])[0] - 4)


def _exactly(connection: socket.socket, number: int) -> bytes:
    received = b""
    while len(received) < number:
        piece = connection.recv(number - len(received))
        if not piece:
            raise _GoneError
        received += piece
    return received


def _hang_up(connection: socket.socket) -> None:
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)
