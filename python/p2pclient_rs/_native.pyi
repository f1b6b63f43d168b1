# Stubs of the extension module. Those of the value types and the daemon's process are separate.

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from contextvars import Context
from typing import (
    Any,
    Generic,
    Literal,
    TypeAlias,
    TypeVar,
    final,
)

from typing_extensions import Buffer, Self

from p2pclient_rs._native_daemon import (
    DaemonOptions as DaemonOptions,
    DaemonProcess as DaemonProcess,
    Reconnection as Reconnection,
    Startup as Startup,
    Supervision as Supervision,
    SupervisionAction as SupervisionAction,
    after_fork_in_child as after_fork_in_child,
    after_fork_in_parent as after_fork_in_parent,
    before_fork as before_fork,
    find_daemon as find_daemon,
    unused_tcp_port as unused_tcp_port,
)
from p2pclient_rs._native_values import (
    Identity as Identity,
    InvalidMultiaddr as InvalidMultiaddr,
    InvalidPeerID as InvalidPeerID,
    Multiaddr as Multiaddr,
    MultiaddrLike,
    PeerID as PeerID,
    PeerIDLike,
    PeerInfo as PeerInfo,
    Protocol as Protocol,
    ProtocolLookupError as ProtocolLookupError,
    PublicKey as PublicKey,
    PubsubMessage as PubsubMessage,
    StreamInfo as StreamInfo,
)

__all__ = [
    "ACCEPT_PAUSE",
    "DEBUG_BUILD",
    "HALF_OPEN_PATIENCE",
    "HEADER_TIMEOUT",
    "MAX_HALF_OPEN",
    "MAX_HEADER",
    "MAX_IDLE",
    "MAX_SLOW_REQUESTS",
    "UNKNOWN_REQUEST",
    "ConnectionPool",
    "ControlConnection",
    "DaemonOptions",
    "DaemonProcess",
    "HalfOpen",
    "Identity",
    "InvalidMultiaddr",
    "InvalidPeerID",
    "Lifecycle",
    "LogThrottle",
    "Multiaddr",
    "PeerID",
    "PeerInfo",
    "PersistentConnection",
    "Pipeline",
    "Protocol",
    "ProtocolLookupError",
    "PublicKey",
    "PubsubMessage",
    "RawListener",
    "RawStream",
    "Readiness",
    "Reconnection",
    "Registering",
    "Request",
    "Startup",
    "StreamInfo",
    "Supervision",
    "SupervisionAction",
    "__version__",
    "_wait_before_finalization",
    "after_fork_in_child",
    "after_fork_in_parent",
    "before_fork",
    "classify_refusal",
    "decode_pubsub_message",
    "decode_stream_info",
    "endpoint",
    "find_daemon",
    "may_retry",
    "p2pd_descriptors",
    "report_first_wake",
    "set_inplace_wake",
    "unused_tcp_port",
]

__version__: str
DEBUG_BUILD: bool
#: The maximum number of idle connections, and of concurrent requests that the daemon answers
#: without asking other peers.
MAX_IDLE: int
#: The maximum number of concurrent requests that make the daemon ask other peers.
MAX_SLOW_REQUESTS: int
#: The largest header of an inbound stream, in bytes, and the time limit for it, in seconds.
MAX_HEADER: int
HEADER_TIMEOUT: float
#: The maximum number of connections without a header, besides one for each handler. If there are
#: more, those that have waited for longer than HALF_OPEN_PATIENCE, in seconds, are closed.
MAX_HALF_OPEN: int
HALF_OPEN_PATIENCE: float
#: The pause after a failed accept, in seconds.
ACCEPT_PAUSE: float
#: The message for a request that the daemon does not know.
UNKNOWN_REQUEST: str

# --- types ---

# The limits of a persistent connection, in this order: the largest message to send, in bytes; the
# largest to receive; the number of incoming calls in progress; the size of their payloads, in
# bytes; how long reading may pause above these two limits, in seconds. None means no limit, except
# for the second, where it means 64 KiB more than the first.
_UnaryLimits: TypeAlias = tuple[int, int | None, int | None, int | None, float | None]

_ReplyT = TypeVar("_ReplyT", covariant=True)
_Action: TypeAlias = Literal[
    "register", "remove", "probe", "registered", "last error", "first error"
]
_ConnectionT = TypeVar("_ConnectionT", bound=tuple[ControlConnection, object])

# --- drivers: the parts of client, connector, control and streams ---

_Address: TypeAlias = str | tuple[str, int]

def endpoint(addr: MultiaddrLike) -> tuple[str, str, int]:
    """Returns the endpoint of a control or listen address: ("unix", path, 0) or
    (kind, host, port)."""

def decode_stream_info(frame: bytes) -> StreamInfo:
    """Decodes the header of an inbound stream."""

def decode_pubsub_message(frame: bytes) -> PubsubMessage:
    """Decodes a message of a subscription."""

@final
class Request(Generic[_ReplyT]):
    """An encoded request, whose reply is of the given type. Timeouts are in seconds."""

    @property
    def is_query(self) -> bool: ...
    @property
    def permit(self) -> int:
        """The limit it counts against: 0 for quick requests, 1 if the daemon asks other peers."""
    @staticmethod
    def identify() -> Request[Identity]: ...
    @staticmethod
    def persistent_conn_upgrade() -> Request[None]: ...
    @staticmethod
    def connect(
        peer: PeerIDLike, addrs: Iterable[MultiaddrLike], timeout: float | None
    ) -> Request[None]: ...
    @staticmethod
    def disconnect(peer: PeerIDLike) -> Request[None]: ...
    @staticmethod
    def list_peers() -> Request[tuple[PeerInfo, ...]]: ...
    @staticmethod
    def stream_open(
        peer: PeerIDLike, protocols: list[str], timeout: float | None
    ) -> Request[StreamInfo]: ...
    @staticmethod
    def stream_handler(addr: MultiaddrLike, proto: str, balanced: bool) -> Request[None]: ...
    @staticmethod
    def remove_stream_handler(addr: MultiaddrLike, proto: str) -> Request[None]: ...
    @staticmethod
    def dht_find_peer(peer: PeerIDLike, timeout: float | None) -> Request[PeerInfo]: ...
    @staticmethod
    def dht_find_peers_connected_to_peer(
        peer: PeerIDLike, timeout: float | None
    ) -> Request[tuple[PeerInfo, ...]]: ...
    @staticmethod
    def dht_find_providers(
        cid: bytes, count: int, timeout: float | None
    ) -> Request[tuple[PeerInfo, ...]]: ...
    @staticmethod
    def dht_get_closest_peers(key: bytes, timeout: float | None) -> Request[tuple[PeerID, ...]]: ...
    @staticmethod
    def dht_get_public_key(peer: PeerIDLike, timeout: float | None) -> Request[bytes]: ...
    @staticmethod
    def dht_get_value(key: bytes, timeout: float | None) -> Request[bytes]: ...
    @staticmethod
    def dht_search_value(key: bytes, timeout: float | None) -> Request[tuple[bytes, ...]]: ...
    @staticmethod
    def dht_put_value(key: bytes, value: bytes, timeout: float | None) -> Request[None]: ...
    @staticmethod
    def dht_provide(cid: bytes, timeout: float | None) -> Request[None]: ...
    @staticmethod
    def connmgr_tag_peer(peer: PeerIDLike, tag: str, weight: int) -> Request[None]: ...
    @staticmethod
    def connmgr_untag_peer(peer: PeerIDLike, tag: str) -> Request[None]: ...
    @staticmethod
    def connmgr_trim() -> Request[None]: ...
    @staticmethod
    def peerstore_probe() -> Request[None]: ...
    @staticmethod
    def peerstore_get_protocols(peer: PeerIDLike) -> Request[tuple[str, ...]]: ...
    @staticmethod
    def peerstore_get_peer_info(peer: PeerIDLike) -> Request[PeerInfo]: ...
    @staticmethod
    def pubsub_get_topics() -> Request[tuple[str, ...]]: ...
    @staticmethod
    def pubsub_list_peers(topic: str) -> Request[tuple[PeerID, ...]]: ...
    @staticmethod
    def pubsub_publish(topic: str, data: bytes) -> Request[None]: ...
    @staticmethod
    def pubsub_subscribe(topic: str) -> Request[None]: ...

@final
class ControlConnection:
    """A connection to the daemon's control socket."""

    @staticmethod
    def connect(address: _Address, max_frame: int | None = None) -> ControlConnection | None:
        """Begins to connect. Returns None if the daemon's accept queue is full."""
    @property
    def connected(self) -> bool: ...
    def finish_connect(self) -> None: ...
    def start(self, request: Request[object]) -> bool: ...
    def flush(self) -> bool: ...
    def step(self) -> tuple[Any] | None:
        """Continues the exchange as far as the socket allows. Returns (reply,) when complete."""
    def next_value(self) -> tuple[Any, ...] | None:
        """Continues a DHT query as far as the socket allows, up to its next value. Returns (value,)
        if the value has arrived, () if the query has ended, and None if it would block."""
    @property
    def reusable(self) -> bool: ...
    @property
    def consumed(self) -> bool: ...
    @property
    def stale(self) -> bool: ...
    def take_stream(self) -> RawStream: ...
    def take_persistent(
        self,
        seed: bytes,
        limits: _UnaryLimits,
        event_loop: object,
        on_readable: Callable[[PersistentConnection], object],
        owner: Callable[[], object],
    ) -> tuple[PersistentConnection, bytes]: ...
    def take_pipeline(
        self, event_loop: object, on_readable: Callable[[Pipeline], object]
    ) -> Pipeline: ...
    def fileno(self) -> int: ...
    def close(self) -> None: ...

@final
class ConnectionPool(Generic[_ConnectionT]):
    """The idle connections of one event loop. A connection is a tuple whose first item is a
    ``ControlConnection``, with a method ``close``."""

    def __new__(cls, max_idle: int) -> ConnectionPool[_ConnectionT]: ...
    def take(self) -> _ConnectionT | None:
        """Takes the most recently used idle connection, and closes stale ones."""
    def give_back(self, connection: _ConnectionT) -> None:
        """Takes a connection back after a request. Closes it if it cannot be used again, or the
        oldest idle one if there are too many."""
    def close(self) -> list[_ConnectionT]:
        """Removes and returns the idle connections and the witness. Afterwards the pool takes no
        connection back."""
    def choose_witness(self) -> int | None:
        """Chooses the connection that is the witness of the latest registration: while it is open,
        the daemon has not been restarted. Returns its number, or None if no connection suits."""
    def begin_probe(self, witness: int) -> _ConnectionT | None:
        """Begins a request on a witness. Returns its connection, or None if it is gone."""
    def end_probe(self, witness: int) -> None:
        """Ends a request on a witness. Closes its connection if it cannot be used again."""

@final
class HalfOpen:
    """The accepted connections that have no complete header yet. Times are in seconds.

    Args:
        max: The maximum number, besides one for each handler.
        patience: How long a connection may be without a header if there are more.
    """

    def __new__(cls, max: int, patience: float) -> HalfOpen: ...
    def enter(self, now: float) -> int:
        """Records a connection accepted at ``now``. Returns its number."""
    def leave(self, number: int) -> None:
        """Removes a connection."""
    def admission(self, handlers: int, now: float) -> float | int | None:
        """Decides whether to accept another connection. Returns None to accept, a float to wait for
        that many seconds, an int to close the connection of that number first."""

@final
class LogThrottle:
    """Allows one log line of a kind in each second, and counts the suppressed ones."""

    def __new__(cls) -> LogThrottle: ...
    def note(self, now: float) -> int | None:
        """Records an event at ``now``, in seconds. Returns the number of suppressed lines since the
        last allowed one, or None if this line is suppressed too."""

@final
class Registering:
    """Decides the steps of a registration of one protocol.

    Args:
        balanced: Whether several clients may serve the protocol in turn.
        former: Whether the former registration is balanced, is the same, and has a witness; None
            if there is no former registration.
        replace: Whether the former registration may be replaced.
    """

    def __new__(
        cls, balanced: bool, former: tuple[bool, bool, bool] | None, replace: bool
    ) -> Registering: ...
    def first(self) -> tuple[_Action, bool]:
        """Returns the first action. For "register" the bool says whether to register as balanced,
        for "remove" whether to remove the former registration."""
    def next(
        self, reply: Literal["done", "taken", "refused", "unreachable", "lost"]
    ) -> tuple[_Action, bool]:
        """Returns the next action, given the outcome of the last one."""
    @property
    def record(self) -> Literal["former", "current", "none"]:
        """Which registration the daemon has, or may have."""

def may_retry(pooled: bool, repeated: bool, unsent: bool) -> bool:
    """Returns whether to send a request again on a new connection.

    Args:
        pooled: Whether the failed attempt used a connection from the pool.
        repeated: Whether that attempt was already a repetition.
        unsent: Whether the daemon cannot have read the whole request.
    """

@final
class Pipeline:
    """A control connection with pipelined queries, for one event loop."""

    def request(self, request: Request[_ReplyT]) -> asyncio.Future[_ReplyT] | None:
        """Sends a query. Returns the future of its reply, or None if it takes no more queries."""
    def read(self, ready: list[_WakeUp]) -> None: ...
    def flush(self, now: bool) -> None: ...
    def retire(self) -> None:
        """Takes no more queries, and closes once all pending ones have replies or are cancelled."""
    def close(self) -> None: ...
    @property
    def in_wake_batch(self) -> bool:
        """Whether the caller is a task that a message over this connection has resumed."""
    @property
    def closed(self) -> bool: ...
    @property
    def retired(self) -> bool: ...
    def _on_writable(self) -> None: ...
    def _uncork(self) -> None: ...

@final
class RawStream:
    """The socket of a stream. Methods that would block return None, or a count of 0, instead."""

    def try_receive(self, max_bytes: int) -> bytes | None: ...
    def try_read_exactly(self, count: int) -> bytes | None: ...
    def try_read_until(self, separator: bytes, limit: int, eager: bool = False) -> bytes | None: ...
    def put_back(self, data: bytes) -> None: ...
    @property
    def read_ahead(self) -> bytes: ...
    def try_read_frame(self, max_bytes: int) -> list[bytes] | None: ...
    def try_send(self, data: Buffer, offset: int) -> int: ...
    def write(self, data: Buffer) -> int: ...
    def cork(self, data: Buffer) -> int: ...
    def flush(self) -> int: ...
    @property
    def buffered(self) -> int: ...
    @property
    def blocked(self) -> bool: ...
    @property
    def at_eof(self) -> bool: ...
    @property
    def closed(self) -> bool: ...
    @property
    def write_ended(self) -> bool: ...
    def shutdown_write(self) -> None: ...
    def look_ahead(self) -> None: ...
    def close(self, abort: bool = False, keep_input: bool = False) -> None: ...
    def fileno(self) -> int: ...
    def duplicate(self) -> int: ...
    @property
    def operations(self) -> int: ...
    @property
    def peer_closed(self) -> bool: ...
    def is_unwatched(self) -> bool: ...
    @property
    def read_ahead_size(self) -> int: ...
    def prefetch(self, limit: int = ...) -> int: ...
    @property
    def family(self) -> str: ...
    @property
    def local_address(self) -> Any: ...
    @property
    def remote_address(self) -> Any: ...

@final
class RawListener:
    """A listening socket."""

    def __new__(cls, address: _Address) -> Self: ...
    def try_accept(self) -> RawStream | None: ...
    def fileno(self) -> int: ...
    @property
    def local_address(self) -> Any: ...
    def close(self) -> None: ...

@final
class Readiness:
    """Waits for one descriptor on one asyncio or uvloop loop."""

    def __new__(
        cls,
        event_loop: asyncio.AbstractEventLoop,
        fd: int,
        on_readable: Callable[[Readiness], None],
        on_writable: Callable[[Readiness], None],
    ) -> Self: ...
    def readable(self) -> asyncio.Future[None]: ...
    def writable(self) -> asyncio.Future[None]: ...
    def flush_later(self, stream: RawStream, owner: object) -> None: ...
    def answer(self, connection: ControlConnection) -> asyncio.Future[Any]: ...
    def drained(self, mark: int) -> asyncio.Future[None]: ...
    def read_ready(self, ready: list[_WakeUp]) -> None: ...
    def write_ready(self, ready: list[_WakeUp]) -> None: ...
    def remove_idle_writer(self) -> None: ...
    def close(self) -> None: ...

# A call to make: with a context and one argument, or without a context and any arguments.
_WakeUp: TypeAlias = tuple[Context | None, Callable[..., object], Any]

@final
class Lifecycle:
    """Decides when to open a persistent connection, and which handlers to register on it.

    The owner reports events, and then carries out the actions that ``poll`` returns until there are
    none. It chooses a token for each operation (``connect``, ``add``, ``remove``). A ``complete``
    or ``fail`` action refers to the operation by its token.
    """

    def __new__(
        cls,
        random: int,
        *,
        open_timeout: float | None = None,
        backoff: tuple[float, float] | None = None,
    ) -> Self:
        """``random`` is a random 64-bit number. ``backoff`` is the first and the longest pause
        between attempts to reconnect. Times are in seconds."""

    def connect(self, token: int) -> None: ...
    def add(self, token: int, name: str, balanced: bool) -> None: ...
    def remove(self, token: int, name: str) -> None: ...
    def cancel(self, token: int) -> None: ...
    def withdraw(self, name: str) -> None:
        """Drops a handler at once, and unregisters it in the background."""
    def close(self) -> None: ...
    def opened(self, connection_id: int) -> bool:
        """Returns whether the connection is still needed. If not, the owner closes it."""
    def open_failed(self, connection_id: int, error: BaseException) -> None: ...
    def lost(self, connection_id: int, error: BaseException) -> None: ...
    def registered(
        self,
        connection_id: int,
        name: str,
        error: BaseException | None = None,
        *,
        unsent: bool = False,
    ) -> None: ...
    def unregistered(self, connection_id: int, name: str) -> None: ...
    def time(self) -> None:
        """Call this when the deadline may have passed."""
    def poll(self) -> tuple[Any, ...] | None:
        """Returns the next action, as its name and arguments, or None."""
    @property
    def deadline(self) -> float | None:
        """When to call ``time``, in seconds from now."""
    @property
    def handlers(self) -> list[str]:
        """The names of the handlers."""

@final
class PersistentConnection:
    """A connection upgraded for unary calls, driven by the event loop. No method blocks."""

    def start(self, input: bytes, ready: list[_WakeUp]) -> None: ...
    def read(self, ready: list[_WakeUp]) -> None: ...
    def flush(self, now: bool) -> None: ...
    def call(
        self, peer: PeerIDLike, protocol: str, data: Buffer
    ) -> tuple[Awaitable[bytes], bytes] | None:
        """Sends a call. Returns the future of its reply and the call's id."""
    def add_handler(self, protocol: str, balanced: bool, token: object) -> None: ...
    def remove_handler(self, protocol: str, token: object) -> None: ...
    def cancel(self, id: bytes) -> None: ...
    def reply(self, id: bytes, data: Buffer) -> None: ...
    def reply_error(self, id: bytes, error: str) -> None: ...
    def set_limits(self, limits: _UnaryLimits) -> None: ...
    def has_room(self, token: object) -> bool: ...
    def pass_on(self, token: object) -> None: ...
    def close(self) -> None: ...
    @property
    def in_wake_batch(self) -> bool:
        """Whether the caller is a task that a message over this connection has resumed."""
    @property
    def closed(self) -> bool: ...
    @property
    def pending(self) -> int: ...
    @property
    def unanswered(self) -> int: ...

# --- interpreter shutdown, waking, refusals ---

def _wait_before_finalization() -> None:
    """Waits until no other thread calls Python from Rust, and blocks those that would do so later.

    During interpreter shutdown, such a call would abort the process."""

def report_first_wake(event_loop: object, resumed: bool) -> None: ...
def set_inplace_wake(enabled: bool) -> None:
    """Turns the in-place waking of asyncio tasks on or off, for all event loops.

    If it is on, as it is by default, a task that awaits a reply is resumed as soon as the reply is
    read. If it is off, the task is resumed one iteration of the loop later, as with any asyncio
    future. The environment variable ``P2PCLIENT_RS_INPLACE_WAKE=0`` turns it off from the start.

    Args:
        enabled: Whether to resume tasks in place, from the next reply on.

    Example:
        p2pclient_rs.set_inplace_wake(False)
    """

_RefusalKind: TypeAlias = Literal[
    "not supported", "timed out", "already registered", "not registered"
]

def classify_refusal(message: str) -> tuple[_RefusalKind | None, str | None]:
    """Returns the kind of refusal that this message of a daemon means, or None if it is unknown,
    and a hint, or None."""

# --- schema ---

def p2pd_descriptors() -> bytes:
    """The descriptors of ``proto/``, as a serialised ``FileDescriptorSet``."""
