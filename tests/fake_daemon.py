"""A scripted daemon: one function per connection, each run in a thread."""

from __future__ import annotations

import os
import select
import socket
import struct
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

from support import new_directory

#: Time limit of every wait, in seconds.
PATIENCE = 20.0


def varint(number: int) -> bytes:
    """Encodes an unsigned varint."""
    encoded = bytearray()
    while number > 0x7F:
        encoded.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*encoded, number])


def field(number: int, value: int | bytes) -> bytes:
    """Encodes a field of a protobuf message."""
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    return varint(number << 3 | 2) + varint(len(value)) + value


def frame(message: bytes) -> bytes:
    """Prefixes a message with its length, as sent over the wire."""
    return varint(len(message)) + message


#: Unknown fields of every wire type.
UNKNOWN = (
    field(1000, 7)
    + field(1001, b"new")
    + varint(1002 << 3 | 1)
    + bytes(8)
    + varint(1003 << 3 | 5)
    + bytes(4)
    + (varint(1004 << 3 | 3) + field(1, 1) + varint(1004 << 3 | 4))
)

PEER = b"\x00\x24\x08\x01\x12\x20" + bytes(range(32))
ADDR = b"\x04\x7f\x00\x00\x01\x06\x0f\xa1"  # /ip4/127.0.0.1/tcp/4001

OK = field(1, 0)
ERROR = field(1, 1) + field(2, field(1, b"no such luck"))
IDENTITY = OK + field(4, field(1, PEER) + field(2, ADDR))
#: The unknown request with which the client probes for a peerstore. jsp2pd, which has one, replies
#: NO_SUCH_REQUEST.
PEERSTORE_PROBE = field(1, 2**31 - 1)
NO_SUCH_REQUEST = field(1, 1) + field(2, field(1, b"ERR_INVALID_REQUEST_TYPE"))
STREAM_INFO = field(1, PEER) + field(2, ADDR) + field(3, b"/echo")
STREAM_OPENED = OK + field(3, STREAM_INFO)


def dht(kind: int, **fields: bytes) -> bytes:
    """Encodes a DHTResponse: BEGIN is 0, VALUE 1, END 2."""
    numbers = {"peer": 2, "value": 3}
    return field(1, kind) + b"".join(field(numbers[name], v) for name, v in fields.items())


# --- the persistent connection ---

# The upgrade request. Its extra field keeps jsp2pd from crashing; daemons that know the request
# ignore the field.
UPGRADE = field(1, 9) + field(9, field(1, b"\x78\x00"))


def acknowledgement(call_id: bytes) -> bytes:
    """Encodes a PersistentConnectionResponse that acknowledges adding or removing a handler."""
    return field(1, call_id)


def reply(call_id: bytes, data: bytes) -> bytes:
    """Encodes the result of a call."""
    return field(1, call_id) + field(2, field(1, data))


def handler_error(call_id: bytes, text: bytes) -> bytes:
    """Encodes the error of a remote handler."""
    return field(1, call_id) + field(2, field(2, text))


def incoming(call_id: bytes, proto: str, data: bytes, peer: bytes = PEER) -> bytes:
    """Encodes a call of another peer."""
    call = field(1, peer) + field(2, proto.encode()) + field(3, data)
    return field(1, call_id) + field(3, call)


def daemon_error(call_id: bytes, text: bytes) -> bytes:
    """Encodes an error of the daemon itself."""
    return field(1, call_id) + field(4, field(1, text))


def cancellation(call_id: bytes) -> bytes:
    """Encodes a Cancel message: the caller is gone."""
    return field(1, call_id) + field(5, b"")


@dataclass
class Message:
    """A decoded PersistentConnectionRequest."""

    call_id: bytes
    #: "add", "call", "response", "error", "cancel" or "remove".
    kind: str
    proto: str = ""
    peer: bytes = b""
    data: bytes = b""
    balanced: bool = False

    @classmethod
    def decode(cls, message: bytes) -> Message:
        fields = decode(message)
        call_id = fields.pop(1)
        assert isinstance(call_id, bytes) and len(call_id) == 16
        ((number, content),) = fields.items()  # exactly one
        assert isinstance(content, bytes)
        inner = decode(content)

        def text(number: int) -> bytes:
            value = inner[number]
            assert isinstance(value, bytes)
            return value

        if number == 2:
            return cls(call_id, "add", text(1).decode(), balanced=bool(inner[2]))
        if number == 3:
            return cls(call_id, "call", text(2).decode(), text(1), text(3))
        if number == 4:
            ((result, data),) = inner.items()
            assert isinstance(data, bytes)
            return cls(call_id, {1: "response", 2: "error"}[result], data=data)
        if number == 5:
            assert not inner
            return cls(call_id, "cancel")
        assert number == 6
        return cls(call_id, "remove", text(1).decode())


def decode(message: bytes) -> dict[int, int | bytes]:
    """Decodes a protobuf message in which each field occurs at most once."""
    fields: dict[int, int | bytes] = {}
    position = 0

    def number() -> int:
        nonlocal position
        value, shift = 0, 0
        while True:
            byte = message[position]
            position += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value

    while position < len(message):
        key, wire_type = divmod(number(), 8)
        assert key not in fields and wire_type in (0, 2)
        value: int | bytes = number()
        if wire_type == 2:
            end = position + int(value)
            assert end <= len(message)
            value = message[position:end]
            position = end
        fields[key] = value
    return fields


class Gone(Exception):
    """The client closed the connection."""


class Connection:
    """A client's connection, from the daemon's side."""

    def __init__(self, number: int, sock: socket.socket, requests: list[bytes]) -> None:
        #: 1 for the first connection.
        self.number = number
        self.socket = sock
        self._requests = requests

    def read(self, count: int) -> bytes:
        """Reads exactly ``count`` bytes."""
        data = bytearray()
        while len(data) < count:
            part = self.socket.recv(count - len(data))
            if not part:
                raise Gone
            data += part
        return bytes(data)

    def read_request(self) -> bytes:
        """Reads the next request and records it."""
        length, shift = 0, 0
        while True:
            byte = self.read(1)[0]
            length |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                break
        request = self.read(length)
        self._requests.append(request)
        return request

    def wait_readable(self) -> None:
        """Waits until data has arrived, without reading it."""
        assert select.select([self.socket], [], [], PATIENCE)[0]

    def wait_writable(self) -> None:
        """Waits until the client has read some of the data sent."""
        assert select.select([], [self.socket], [], PATIENCE)[1]

    def send(self, data: bytes) -> None:
        """Sends raw bytes."""
        self.socket.sendall(data)

    def answer(self, message: bytes) -> None:
        """Reads a request and sends ``message`` as the response."""
        self.read_request()
        self.send(frame(message))

    def upgrade(self) -> None:
        """Accepts the upgrade to a persistent connection, which must be the next request."""
        assert self.read_request() in (
            UPGRADE,
            field(1, 9),
        )  # hivemind's bindings send the second form
        self.send(frame(OK))

    def read_message(self) -> Message:
        """Reads the next request on a persistent connection."""
        return Message.decode(self.read_request())

    def drain(self) -> None:
        """Reads what has arrived, without waiting for more."""
        while select.select([self.socket], [], [], 0)[0]:
            if not self.socket.recv(1 << 16):
                raise Gone

    def trickle(self, data: bytes) -> None:
        """Sends bytes one at a time."""
        for byte in data:
            self.send(bytes([byte]))

    def wait_closed(self) -> bytes:
        """Reads until the client closes the connection; returns what it sent."""
        data = b""
        while part := self.socket.recv(1 << 16):
            data += part
        return data

    def reset(self) -> None:
        """Closes the connection in such a way that a TCP client sees a reset."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.socket.close()


Script: TypeAlias = Callable[[Connection], None]


def honest(connection: Connection) -> None:
    """Answers every request as if it were IDENTIFY."""
    while True:
        connection.answer(IDENTITY)


def by_connection(*scripts: Script, then: Script = honest) -> Script:
    """Runs one script per connection, in order, and ``then`` on further connections."""

    def run(connection: Connection) -> None:
        number = connection.number
        (scripts[number - 1] if number <= len(scripts) else then)(connection)

    return run


def unary_echo(connection: Connection) -> None:
    """Accepts the upgrade, and echoes every call."""
    connection.upgrade()
    serve_echo(connection)


def serve_echo(connection: Connection) -> None:
    """Echoes calls and acknowledges handlers on a persistent connection."""
    while True:
        message = connection.read_message()
        if message.kind == "call":
            connection.send(frame(reply(message.call_id, message.data)))
        elif message.kind in ("add", "remove"):
            connection.send(frame(acknowledgement(message.call_id)))


Answer: TypeAlias = Callable[[Connection, bytes], "bool | None"]


class Plan:
    """A script that behaves correctly, except for the next request of one kind.

    The kind of a control request is "request". On a persistent connection it is ``Message.kind``.
    """

    def __init__(self) -> None:
        self._next: tuple[str, Answer] | None = None

    def next(self, kind: str, fault: Answer) -> None:
        """Answers the next request of ``kind`` by calling ``fault`` with the call id, if any.

        If ``fault`` returns None, the connection is closed. Otherwise it continues. After UPGRADE,
        it continues as a persistent connection if the result is true, and as a control connection
        if it is false.
        """
        self._next = (kind, fault)

    @property
    def used(self) -> bool:
        """Whether the planned request has arrived."""
        return self._next is None

    def _planned(self, kind: str) -> Answer | None:
        if self._next is None or self._next[0] != kind:
            return None
        (_, fault), self._next = self._next, None
        return fault

    def __call__(self, connection: Connection) -> None:
        while True:
            request = connection.read_request()
            if request == PEERSTORE_PROBE:
                connection.send(frame(NO_SUCH_REQUEST))
            elif fault := self._planned("request"):
                keep_open = fault(connection, b"")
                if keep_open is None:
                    return
                if keep_open and request == UPGRADE:
                    break
            elif request == UPGRADE:
                connection.send(frame(OK))
                break
            else:
                connection.send(frame(IDENTITY))
        while True:
            message = connection.read_message()
            if fault := self._planned(message.kind):
                if fault(connection, message.call_id) is None:
                    return
            elif message.kind == "call":
                connection.send(frame(reply(message.call_id, message.data)))
            elif message.kind in ("add", "remove"):
                connection.send(frame(acknowledgement(message.call_id)))


class FakeDaemon:
    """Listens until the end of the block, and then raises the exception of a script, if any.

    Args:
        script: Serves one connection, which is closed when the script returns. The script also
            ends if the client closes the connection.
        transport: "unix" or "tcp".
    """

    def __init__(self, script: Script, transport: str = "unix") -> None:
        self._script = script
        self.transport = transport
        #: Requests read so far, on all connections.
        self.requests: list[bytes] = []
        #: Number of connections accepted so far, and of those still open.
        self.accepted = self.open = 0
        self._lock = threading.Lock()
        self._errors: list[BaseException] = []
        self._sockets: set[socket.socket] = set()
        self._threads: list[threading.Thread] = []
        self._stopping = False

    def __enter__(self) -> FakeDaemon:
        if self.transport == "unix":
            path = str(new_directory() / "fake.sock")
            self._listener = socket.socket(socket.AF_UNIX)
            self._listener.bind(path)
            self.control_maddr = f"/unix{path}"
        else:
            self._listener = socket.create_server(("127.0.0.1", 0))
            self.control_maddr = f"/ip4/127.0.0.1/tcp/{self._listener.getsockname()[1]}"
        self._listener.listen(1024)
        self._start(self._accept)
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping = True
        self._listener.shutdown(socket.SHUT_RDWR)
        with self._lock:
            for sock in self._sockets:
                try:
                    sock.shutdown(socket.SHUT_RDWR)
                except OSError:
                    pass  # the client has closed it
        while self._threads:
            self._threads.pop().join(PATIENCE)
        if self.transport == "unix":
            os.unlink(self.control_maddr.removeprefix("/unix"))
        self._listener.close()
        for error in self._errors:
            raise error

    def _start(self, target: Callable[..., None], *args: object) -> None:
        thread = threading.Thread(target=target, args=args, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return
            with self._lock:
                if self._stopping:
                    sock.close()
                    return
                self.accepted += 1
                self.open += 1
                self._sockets.add(sock)
                self._start(self._serve, sock, self.accepted)

    def _serve(self, sock: socket.socket, number: int) -> None:
        sock.settimeout(PATIENCE)
        try:
            self._script(Connection(number, sock, self.requests))
        except (Gone, ConnectionError):
            pass
        except BaseException as error:
            if not self._stopping:
                self._errors.append(error)
        finally:
            sock.close()
            with self._lock:
                self._sockets.discard(sock)
                self.open -= 1
