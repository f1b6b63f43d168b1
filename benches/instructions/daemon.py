"""A daemon in lockstep with its client: it waits for its turn, then serves everything that arrived.

Usage: daemon.py DIRECTORY. It listens for control connections on the socket ``control`` in the
directory, and for turns on ``turns``.

Lockstep makes the data of each read, and so the client's instruction count, independent of timing.
The client sends a line to begin each turn, and gets a byte when the daemon is done. A line that is
not empty, ``PROTO COUNT PARALLEL SIZE``, makes the daemon call the client's unary handler COUNT
times.
"""

from __future__ import annotations

import selectors
import socket
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))

import fake_daemon
from fake_daemon import Message, field, frame

#: A message as hivemind frames it: a marker, the length, the body.
FRAMED = b"\0" + (1 << 20).to_bytes(8, "big") + bytes(1 << 20)


def split(buffer: bytearray) -> list[bytes]:
    """Removes the complete messages from ``buffer`` and returns them."""
    messages: list[bytes] = []
    while True:
        length, prefix = 0, 0
        for prefix, byte in enumerate(buffer, 1):
            length |= (byte & 0x7F) << 7 * (prefix - 1)
            if byte < 0x80:
                break
        else:
            return messages
        if len(buffer) < prefix + length:
            return messages
        messages.append(bytes(buffer[prefix : prefix + length]))
        del buffer[: prefix + length]


class Connection:
    """A connection of the client."""

    def __init__(self, daemon: Daemon, sock: socket.socket) -> None:
        self.daemon = daemon
        self.socket = sock
        self.socket.setblocking(False)
        self.input = bytearray()
        self.output = bytearray()
        self.is_source = False
        #: Parses the input; at first, as requests.
        self.take: Callable[[], None] = self._take_requests
        self.calls_left = 0
        self.next_call = b""
        self.serial = 0

    def ready(self, events: int) -> None:
        """Reads, serves and writes as much as possible without waiting."""
        if events & selectors.EVENT_READ:
            try:
                data = self.socket.recv(1 << 20)
            except ConnectionError:
                data = b""
            if not data:
                self.daemon.selector.unregister(self.socket)
                self.socket.close()
                return
            self.input += data
            self.take()
        self.flush()

    def flush(self) -> None:
        try:
            while self.output or self.is_source:
                if not self.output:
                    self.output += FRAMED
                del self.output[: self.socket.send(self.output)]
            events = selectors.EVENT_READ
        except BlockingIOError:
            events = selectors.EVENT_READ | selectors.EVENT_WRITE
        except ConnectionError:
            return  # the next read will find that it is closed
        self.daemon.selector.modify(self.socket, events, self.ready)

    def _take_requests(self) -> None:
        for message in split(self.input):
            request = fake_daemon.decode(message)
            if request[1] == 0:
                self.output += frame(fake_daemon.IDENTITY)
            elif request[1] == 9:
                self.output += frame(fake_daemon.OK)
                self.take = self._take_calls
            else:
                opened = request[3]
                assert request[1] == 2 and isinstance(opened, bytes)
                self.output += frame(fake_daemon.STREAM_OPENED)
                protocol = fake_daemon.decode(opened)[2]
                self.is_source = protocol == b"source"
                self.take = self._echo if protocol == b"echo" else self.input.clear

    def _echo(self) -> None:
        self.output += self.input
        self.input.clear()

    def _take_calls(self) -> None:
        for content in split(self.input):
            message = Message.decode(content)
            if message.kind == "call":
                self.output += frame(fake_daemon.reply(message.call_id, message.data))
            elif message.kind == "add":
                self.daemon.handlers[message.proto] = self
                self.output += frame(fake_daemon.acknowledgement(message.call_id))
            else:
                assert message.kind == "response"
                self.call()

    def call(self) -> None:
        """Calls the client's handler, unless all calls of the order have been made."""
        if self.calls_left:
            self.calls_left -= 1
            self.serial += 1
            call_id = self.serial.to_bytes(16, "big")
            self.output += frame(field(1, call_id) + self.next_call)


class Daemon:
    """Listens, and serves its client in turns."""

    def __init__(self, directory: Path) -> None:
        self.selector = selectors.DefaultSelector()
        self.handlers: dict[str, Connection] = {}
        self.listener = self._listen(directory / "control")
        self.selector.register(self.listener, selectors.EVENT_READ, self._accept)
        self.turns = self._listen(directory / "turns")

    def _listen(self, path: Path) -> socket.socket:
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(path))
        listener.listen()
        return listener

    def _accept(self, _: int) -> None:
        connection = Connection(self, self.listener.accept()[0])
        self.selector.register(connection.socket, selectors.EVENT_READ, connection.ready)

    def run(self) -> None:
        """Takes turns with one client until it has disconnected."""
        turns, _ = self.turns.accept()
        for line in turns.makefile("rb"):
            if line.strip():
                self._order(*line.decode().split())
            while ready := self.selector.select(0):
                for key, events in ready:
                    key.data(events)
            turns.send(b".")

    def _order(self, proto: str, count: str, parallel: str, size: str) -> None:
        handler = self.handlers[proto]
        handler.calls_left = int(count)
        call = fake_daemon.incoming(b"", proto, bytes(int(size)))
        handler.next_call = call[len(field(1, b"")) :]
        for _ in range(int(parallel)):
            handler.call()
        handler.flush()


if __name__ == "__main__":
    daemon = Daemon(Path(sys.argv[1]))
    print("ready", flush=True)
    daemon.run()
