"""
A TCP proxy between a client and PostgreSQL that understands where messages begin.

It counts round trips, and cuts connections at the moment that matters most: when the server has, or may have, committed
and the client has not been told. Which one is cut is said by some bytes that the client will send, such as an id.
"""

import contextlib
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from enum import Enum
from typing import NamedTuple

SSL_REQUEST, GSS_REQUEST = 80877103, 80877104
QUERY, SYNC, READY = b"Q", b"S", b"Z"
UNANSWERED = (b"H", b"X", b"p")  # flush, terminate, a password: the server is not ready after them
IDLE = b"I"


class Cut(Enum):
    """Where a connection is cut, at the end of its transaction."""

    BEFORE = "the request does not reach the server"
    MEANWHILE = "the request reaches the server, and the client does not wait for the answer"
    AFTER = "the server has answered, and the answer does not reach the client"


class _Order(NamedTuple):
    cut: Cut
    meanwhile: Callable[[], object]


class _GoneError(Exception):
    """The connection is over."""


class Proxy:
    """Listens on a loopback port and forwards to the server's, which may be changed for new connections."""

    def __init__(self, server_port: int) -> None:
        self.server_port = server_port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._lock = threading.Lock()
        self._open: set[socket.socket] = set()
        self._orders: dict[bytes, _Order] = {}
        self.cuts = 0  # how many were made
        self.round_trips = 0
        self.ports: set[int] = set()  # of its connections to the server, by which that knows them

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

    def cut(self, mark: str, cut: Cut, meanwhile: Callable[[], object] = lambda: None) -> None:
        """Cut, once, the connection that sends these bytes; `meanwhile` is called before the client learns of it."""
        self._orders[mark.encode()] = _Order(cut, meanwhile)

    def take_order(self, message: bytes) -> _Order | None:
        """The cut that was ordered for the marks in this message, which are forgotten: repetitions are not cut."""
        with self._lock:
            found = [self._orders.pop(mark) for mark in list(self._orders) if mark in message]
        return found[0] if found else None

    def count_round_trip(self) -> None:
        with self._lock:
            self.round_trips += 1

    def count_cut(self) -> None:
        with self._lock:
            self.cuts += 1

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=[client], daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with client:
            try:
                server = socket.create_connection(("127.0.0.1", self.server_port))
            except OSError:
                return
            with server:
                for connection in (client, server):
                    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                self._open |= {client, server}
                self.ports.add(server.getsockname()[1])
                link = _Link(self, client, server)
                answers = threading.Thread(target=link.forward_answers, daemon=True)
                answers.start()
                link.forward_requests()
                answers.join()
                self._open -= {client, server}


class _Link:
    """One connection of a client, and its connection to the server."""

    def __init__(self, proxy: Proxy, client: socket.socket, server: socket.socket) -> None:
        self._proxy = proxy
        self._client = client
        self._server = server
        self._is_idle = True  # no transaction is open
        self._is_asking = False  # something was sent, and the server is not ready again
        self._is_ending = False  # the answer is not to reach the client
        self._is_left = False  # the server works for a client that is gone, and learns of it when it answers
        self._order: _Order | None = None

    def forward_requests(self) -> None:
        try:
            self._forward_startup()
            batch = b""
            while True:
                message = _message(self._client)
                batch += message
                self._order = self._proxy.take_order(message) or self._order
                if message[:1] in (QUERY, SYNC):
                    self._ask(batch)
                elif message[:1] in UNANSWERED:
                    self._server.sendall(batch)
                else:
                    continue
                batch = b""
        except (_GoneError, OSError):
            if not self._is_left:
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
        """Forward messages that are answered together, and cut where this is ordered."""
        ends = self._is_idle or batch.endswith(b"COMMIT\0")
        cut = self._order.cut if self._order and ends else None
        self._is_asking = True
        self._is_ending = cut is Cut.AFTER
        self._is_left = cut is Cut.MEANWHILE
        if cut in (Cut.BEFORE, Cut.MEANWHILE):
            self._cut_off()
        if cut is not Cut.BEFORE:
            self._server.sendall(batch)
        if cut in (Cut.BEFORE, Cut.MEANWHILE):
            raise _GoneError

    def forward_answers(self) -> None:
        try:
            while True:
                message = _message(self._server)
                if message[:1] == READY:
                    self._is_idle = message[5:6] == IDLE
                    if self._is_asking:
                        self._proxy.count_round_trip()
                    self._is_asking = False
                if not self._is_ending:
                    self._client.sendall(message)
                elif message[:1] == READY:
                    self._cut_off()
                    raise _GoneError
        except (_GoneError, OSError):
            _hang_up(self._client)
            _hang_up(self._server)

    def _cut_off(self) -> None:
        if self._order:
            self._order.meanwhile()
        self._proxy.count_cut()
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
