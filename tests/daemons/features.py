"""The features of each kind of daemon, and the errors for missing features.

``test_compatibility.py`` checks every entry against the daemons, in both directions. The marker
``needs`` selects tests by feature. ``python -m daemons.features``, run in ``tests/``, prints
``docs/compatibility.md``.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

#: Kind of daemon, by its name in the tests → title.
DAEMONS = {
    "hivemind": "hivemind's p2pd 0.5 (hivemind 1.1.12)",
    "go": "upstream Go p2pd 0.9.2",
    "js": "jsp2pd 0.10.2",
    "native": "this project's p2pd-rs (not released yet)",
}


class State(Enum):
    """Whether a daemon has a feature."""

    SUPPORTED = "supported"
    ABSENT = "absent"
    BROKEN = "broken upstream"


@dataclass(frozen=True)
class Entry:
    """One feature of one daemon.

    Attributes:
        state: Whether the daemon has the feature.
        error: The exception if it does not; ``Differs`` if the daemon reports no error but behaves
            differently.
        words: A pattern that matches the error's text.
        why: The cause, in one line.
        ends: Whether the daemon's process ends because of the request; None if it may.
    """

    state: State
    error: str = ""
    words: str = ""
    why: str = ""
    ends: bool | None = False


YES = Entry(State.SUPPORTED)


@dataclass(frozen=True)
class Feature:
    """A feature that a program may want from a daemon."""

    what: str
    hivemind: Entry
    go: Entry
    js: Entry
    native: Entry = YES

    def of(self, daemon: str) -> Entry:
        """Returns the entry of a kind of daemon."""
        entry: Entry = getattr(self, daemon)
        return entry


def _absent(error: str, words: str, why: str) -> Entry:
    return Entry(State.ABSENT, error, words, why)


def _broken(error: str, words: str, why: str, *, ends: bool | None = False) -> Entry:
    return Entry(State.BROKEN, error, words, why, ends)


_UNKNOWN_TO_GO = _absent(
    "NotSupported", "closed the connection", "closes the connection on a request it does not know"
)
_UNKNOWN_TO_JS = _absent("NotSupported", "ERR_INVALID_REQUEST_TYPE", "has no such request")
_NO_DHT = _absent("NotSupported", "DHT not enabled", "has no DHT yet")
_NO_PUBSUB = _absent("NotSupported", "PubSub not enabled", "has no pubsub yet")
_NOT_YET = _absent("NotSupported", "not supported", "has no such request yet")
_HALF_CLOSE = _broken(
    "Differs", "the answer did not come", "closes both directions when either of them ends"
)


def _crashes(why: str) -> Entry:
    return _broken("ConnectionLost", "", why, ends=True)


#: The output of daemons that ended because of their own race conditions, which no test causes.
#: jsp2pd ends when it writes to a connection that its client has just closed.
RACES = {"js": "EPIPE|ECONNRESET|ERR_STREAM_DESTROYED"}

#: The output of daemons that crashed because of a known race that a test provokes. hivemind's p2pd
#: crashes when it answers a call that is cancelled at that moment: see docs/defects.md.
PANICS = {"hivemind": r"PersistentConnectionResponse\)\.MarshalToSizedBuffer\(0x0"}

#: Name of a feature, as in ``pytest.mark.needs`` → its entries.
FEATURES = {
    "manager": Feature("started by `Daemon`", YES, YES, YES),
    # --- peers ---
    "connect": Feature("CONNECT, IDENTIFY", YES, YES, YES),
    "list_peers": Feature("LIST_PEERS", YES, YES, YES),
    "list_peers_always": Feature(
        "LIST_PEERS after a failed connection to a peer",
        YES,
        YES,
        _crashes("crashes when it knows a peer that is not connected"),
    ),
    "disconnect": Feature("DISCONNECT", YES, YES, _UNKNOWN_TO_JS),
    # --- streams ---
    "stream_open": Feature("STREAM_OPEN", YES, YES, YES),
    "stream_handler": Feature("STREAM_HANDLER: the first inbound stream", YES, YES, YES),
    "stream_handler_again": Feature(
        "STREAM_HANDLER: further inbound streams",
        YES,
        YES,
        _broken(
            "Differs",
            "the stream ended",
            "connects to the client once, at the registration, and can pass on one stream over "
            "that connection: register again for the next",
            ends=None,
        ),
    ),
    "many_streams": Feature(
        "200 concurrent streams of one protocol to one peer",
        YES,
        _broken("Differs", "streams were reset", "serves about 75 at once and resets the others"),
        _broken("Differs", "streams were reset", "passes on one per registration", ends=None),
    ),
    "backpressure": Feature(
        "back-pressure: a writer waits while its peer does not read",
        YES,
        YES,
        _broken("Differs", "all was taken", "buffers 20 MiB and more"),
    ),
    "half_close": Feature("reading after `send_eof`", _HALF_CLOSE, _HALF_CLOSE, _HALF_CLOSE),
    "handler_taken": Feature(
        "a protocol with another client's handler is refused",
        YES,
        _absent("Differs", "the other serves it now", "the last registration wins"),
        _absent("Differs", "the other serves it now", "the last registration wins"),
    ),
    "balanced": Feature(
        "`balanced` handlers are served round-robin",
        YES,
        _absent("Differs", "one serves alone", "the last registration wins"),
        _absent("Differs", "one serves alone", "the last registration wins"),
    ),
    "remove_stream_handler": Feature(
        "REMOVE_STREAM_HANDLER",
        YES,
        _UNKNOWN_TO_GO,
        _absent("NotSupported", "ERR_INVALID_MESSAGE", "mistakes it for a peerstore request"),
    ),
    # --- unary calls ---
    "unary": Feature(
        "unary calls, over a persistent connection",
        YES,
        _UNKNOWN_TO_GO,
        _absent("NotSupported", "ERR_NOT_IMPLEMENTED", "mistakes it for a peerstore request"),
    ),
    # --- DHT ---
    "dht_off": Feature(
        "a daemon without a DHT refuses queries as not supported",
        YES,
        YES,
        _absent("Differs", "it has a DHT", "always has a DHT"),
    ),
    "dht_find_peer": Feature(
        "DHT FIND_PEER",
        YES,
        YES,
        YES,
        native=_NO_DHT,
    ),
    "dht_find_peers_connected_to_peer": Feature(
        "DHT FIND_PEERS_CONNECTED_TO_PEER",
        _absent("NotSupported", "not supported", "removed from its libp2p"),
        _absent("NotSupported", "not supported", "removed from its libp2p"),
        _UNKNOWN_TO_JS,
        native=_absent("NotSupported", "not supported", "removed from libp2p"),
    ),
    "dht_closest_peers": Feature(
        "DHT GET_CLOSEST_PEERS",
        YES,
        YES,
        YES,
        native=_NO_DHT,
    ),
    "dht_providers": Feature(
        "DHT PROVIDE, FIND_PROVIDERS",
        YES,
        YES,
        YES,
        native=_NO_DHT,
    ),
    "dht_no_providers": Feature(
        "DHT FIND_PROVIDERS without providers returns none",
        YES,
        YES,
        _broken("DaemonRefused", "not found", "replies with an error instead"),
        native=_NO_DHT,
    ),
    "dht_values": Feature(
        "DHT PUT_VALUE, GET_VALUE",
        YES,
        YES,
        _broken("DaemonRefused", "Not found", "accepts the value but does not find it again"),
        native=_NO_DHT,
    ),
    "dht_validation": Feature(
        "DHT PUT_VALUE refuses invalid records",
        YES,
        YES,
        _broken("Differs", "it was taken", "accepts anything but does not find it again"),
        native=_NO_DHT,
    ),
    "dht_search_value": Feature(
        "DHT SEARCH_VALUE",
        YES,
        YES,
        _UNKNOWN_TO_JS,
        native=_NO_DHT,
    ),
    "dht_public_key": Feature(
        "DHT GET_PUBLIC_KEY",
        YES,
        YES,
        YES,
        native=_NO_DHT,
    ),
    "dht_no_public_key": Feature(
        "DHT GET_PUBLIC_KEY of an unknown peer is refused",
        YES,
        YES,
        _crashes("crashes if there is none"),
        native=_NO_DHT,
    ),
    "dht_bad_cid": Feature(
        "DHT PROVIDE of an invalid CID is refused",
        YES,
        YES,
        _crashes("crashes on it"),
        native=_NO_DHT,
    ),
    # --- connection manager ---
    "connmgr": Feature(
        "CONNMANAGER TAG_PEER, UNTAG_PEER, TRIM",
        YES,
        YES,
        _UNKNOWN_TO_JS,
        native=_NOT_YET,
    ),
    # --- pubsub ---
    "pubsub": Feature(
        "PUBSUB SUBSCRIBE, PUBLISH, GET_TOPICS",
        YES,
        YES,
        YES,
        native=_NO_PUBSUB,
    ),
    "pubsub_own": Feature(
        "a subscription receives what its own daemon publishes",
        YES,
        YES,
        _broken("Differs", "nothing came", "its router does not emit its own messages"),
        native=_NO_PUBSUB,
    ),
    "pubsub_unsubscribe": Feature(
        "closing a subscription unsubscribes",
        YES,
        YES,
        _broken("Differs", "still subscribed", "does not notice that the connection was closed"),
        native=_NO_PUBSUB,
    ),
    "pubsub_list_peers": Feature(
        "PUBSUB LIST_PEERS",
        YES,
        YES,
        _UNKNOWN_TO_JS,
        native=_NO_PUBSUB,
    ),
    "pubsub_off": Feature(
        "a daemon without pubsub refuses it as not supported", YES, YES, _crashes("crashes on it")
    ),
    # --- peerstore ---
    "peerstore_get_protocols": Feature(
        "PEERSTORE GET_PROTOCOLS",
        _UNKNOWN_TO_GO,
        _UNKNOWN_TO_GO,
        YES,
        native=_NOT_YET,
    ),
    "peerstore_unknown": Feature(
        "PEERSTORE GET_PROTOCOLS of an unknown peer is refused",
        _UNKNOWN_TO_GO,
        _UNKNOWN_TO_GO,
        _crashes("crashes on it"),
        native=_NOT_YET,
    ),
    "peerstore_get_peer_info": Feature(
        "PEERSTORE GET_PEER_INFO",
        _UNKNOWN_TO_GO,
        _UNKNOWN_TO_GO,
        _absent("NotSupported", "ERR_NOT_IMPLEMENTED", "not implemented"),
        native=_NOT_YET,
    ),
}

_NO_MUXER = "one supports only yamux, the other only mplex"

_NO_MPLEX = "one supports only mplex, which the other does not have yet"
_GO_HALF_CLOSE = _broken("Differs", "the answer did not come", "the Go peer closes both directions")

#: The entries for pairs of different kinds of daemon, (caller, peer), if they differ from those
#: for two daemons of the caller's kind. Upstream Go's p2pd has one muxer at a time: yamux, like
#: hivemind's, or mplex (``-muxer mplex``), like JavaScript's.
PAIRS: dict[tuple[str, str], dict[str, Entry]] = {
    ("hivemind", "js"): {
        "connect": _absent("DaemonRefused", "failed to negotiate stream multiplexer", _NO_MUXER),
    },
    ("js", "go"): {
        "dht_public_key": _crashes("crashes on the record of a Go peer"),
    },
    ("js", "hivemind"): {
        "connect": _absent("DaemonRefused", "protocol selection failed", _NO_MUXER),
    },
    ("js", "native"): {
        "connect": _absent("DaemonRefused", "protocol selection failed", _NO_MPLEX),
    },
    ("native", "js"): {
        "connect": _absent("DaemonRefused", "failed to dial", _NO_MPLEX),
    },
    ("native", "hivemind"): {"half_close": _GO_HALF_CLOSE},
    ("native", "go"): {"half_close": _GO_HALF_CLOSE},
}


def between(asks: str, peer: str, feature: str) -> Entry:
    """Returns the entry of a feature between two kinds of daemon."""
    return PAIRS.get((asks, peer), {}).get(feature) or FEATURES[feature].of(asks)


_TEXT = """\
# Compatibility

<!-- Written by tests/daemons/features.py: change it there. -->

What the daemons can do through this library. `tests/test_compatibility.py` checks every line
against the daemons: a supported feature works; a missing one fails at once with the error given
here, and the client stays usable. The rest of the test suite also runs on each daemon, except for
the tests of missing features.

- **absent**: the daemon does not have the feature.
- **broken upstream**: the daemon has the feature, but it does not work.
- *ends*: the daemon's process ends. The request raises `ConnectionLost`; the client works again
  once the daemon has been restarted.

jsp2pd can end whenever a client closes a connection that it is writing to (a stream that the peer
still sends to, a cancelled call), because it does not handle the error `EPIPE` or `ECONNRESET`.

"""

_PAIRS_TEXT = """
## Peers of different kinds

`tests/test_interop.py` checks streams between every two kinds, in both directions. Two peers need a
common muxer: hivemind's daemon has yamux, JavaScript's mplex, and upstream Go's the one given by
`-muxer`, by default yamux. It has one at a time; start it with `-muxer mplex` to reach JavaScript
peers.

"""


def _cell(entry: Entry) -> str:
    if entry.state is State.SUPPORTED:
        return "yes"
    details = []
    if entry.error != "Differs":
        details.append(f"`{entry.error}`" + (f": “{entry.words}”" if entry.words else ""))
    if entry.ends is not False:
        details.append("*ends*" if entry.ends else "can *end*")
    suffix = f" ({'; '.join(details)})" if details else ""
    return f"**{entry.state.value}**: {entry.why}{suffix}"


def render() -> str:
    """Returns the text of ``docs/compatibility.md``."""
    lines = [_TEXT + "| | " + " | ".join(DAEMONS.values()) + " |", "| --- " * 4 + "|"]
    for feature in FEATURES.values():
        cells = (_cell(feature.of(daemon)) for daemon in DAEMONS)
        lines.append(f"| {feature.what} | {' | '.join(cells)} |")
    lines += [_PAIRS_TEXT + "| caller | peer | | |", "| --- " * 4 + "|"]
    for (asks, peer), entries in PAIRS.items():
        for name, entry in entries.items():
            names = f"{DAEMONS[asks]} | {DAEMONS[peer]} | {FEATURES[name].what}"
            lines.append(f"| {names} | {_cell(entry)} |")
    return "\n".join(lines) + "\n"


#: Where the page is stored.
DOCUMENT = Path(__file__).parents[2] / "docs" / "compatibility.md"


if __name__ == "__main__":
    if sys.argv[1:] == ["--write"]:
        DOCUMENT.write_text(render())
    else:
        print(render(), end="")
