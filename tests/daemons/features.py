"""What each kind of daemon can do, and what it says where it cannot: the one place for it.

``test_compatibility.py`` holds every entry against the daemons, both ways; ``needs`` marks the
tests of a feature; ``python -m daemons.features``, in this folder's parent, prints the table that
is ``docs/compatibility.md``.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

#: The kinds of daemon, by what the tests call them.
DAEMONS = {
    "hivemind": "hivemind's p2pd 0.5 (hivemind 1.1.12)",
    "go": "upstream Go p2pd 0.9.2",
    "js": "jsp2pd 0.10.2",
}


class State(Enum):
    """Whether a daemon has a feature."""

    SUPPORTED = "supported"
    ABSENT = "absent"
    BROKEN = "broken upstream"


@dataclass(frozen=True)
class Entry:
    """One daemon and one feature.

    Attributes:
        state: Whether it has it.
        error: What is raised where it has not: a class of ours, or ``Differs``, with which the
            tests say that there is no error but another outcome.
        words: A pattern that the error matches.
        why: What is behind it, in a line.
        ends: Whether the daemon ends of it; None if it may.
    """

    state: State
    error: str = ""
    words: str = ""
    why: str = ""
    ends: bool | None = False


@dataclass(frozen=True)
class Feature:
    """What a program may want of a daemon."""

    what: str
    hivemind: Entry
    go: Entry
    js: Entry

    def of(self, daemon: str) -> Entry:
        """The entry of a kind of daemon."""
        entry: Entry = getattr(self, daemon)
        return entry


YES = Entry(State.SUPPORTED)


def _absent(error: str, words: str, why: str) -> Entry:
    return Entry(State.ABSENT, error, words, why)


def _broken(error: str, words: str, why: str, *, ends: bool | None = False) -> Entry:
    return Entry(State.BROKEN, error, words, why, ends)


_UNKNOWN_TO_GO = _absent(
    "NotSupported", "closed the connection", "closes the connection on a request it does not know"
)
_UNKNOWN_TO_JS = _absent("NotSupported", "ERR_INVALID_REQUEST_TYPE", "has no such request")
_HALF_CLOSE = _broken(
    "Differs", "the answer did not come", "closes both directions when one of them ends"
)


def _crashes(why: str) -> Entry:
    return _broken("ConnectionLost", "", why, ends=True)


#: What a daemon says that has ended of a race which is its own, and which no test can be held
#: against: jsp2pd of writing to a connection that its client has just closed.
RACES = {"js": "EPIPE|ECONNRESET|ERR_STREAM_DESTROYED"}

#: By the name that ``pytest.mark.needs`` takes.
FEATURES = {
    "manager": Feature("started by `Daemon`", YES, YES, YES),
    # --- peers ---
    "connect": Feature("CONNECT, IDENTIFY", YES, YES, YES),
    "list_peers": Feature("LIST_PEERS", YES, YES, YES),
    "list_peers_always": Feature(
        "LIST_PEERS though a peer could not be connected to",
        YES,
        YES,
        _crashes("crashes when it knows a peer that is not connected"),
    ),
    "disconnect": Feature("DISCONNECT", YES, YES, _UNKNOWN_TO_JS),
    # --- streams ---
    "stream_open": Feature("STREAM_OPEN", YES, YES, YES),
    "stream_handler": Feature("STREAM_HANDLER: an inbound stream", YES, YES, YES),
    "stream_handler_again": Feature(
        "STREAM_HANDLER: every further inbound stream",
        YES,
        YES,
        _broken(
            "Differs",
            "the stream ended",
            "connects to the client once, at the registration, and can hand over one stream on "
            "that: register again for the next",
            ends=None,
        ),
    ),
    "many_streams": Feature(
        "200 streams of a protocol and peer at once",
        YES,
        _broken("Differs", "streams were reset", "serves some 75 at once, and resets the others"),
        _broken("Differs", "streams were reset", "hands over one for each registration", ends=None),
    ),
    "backpressure": Feature(
        "a writer is held back when nobody reads",
        YES,
        YES,
        _broken("Differs", "all was taken", "takes 20 MiB and more into its memory"),
    ),
    "half_close": Feature("reading on after `send_eof`", _HALF_CLOSE, _HALF_CLOSE, _HALF_CLOSE),
    "handler_taken": Feature(
        "a protocol that another client serves is refused",
        YES,
        _absent("Differs", "the other serves it now", "the last registration holds"),
        _absent("Differs", "the other serves it now", "the last registration holds"),
    ),
    "balanced": Feature(
        "`balanced` handlers serve in turn",
        YES,
        _absent("Differs", "one serves alone", "the last registration holds"),
        _absent("Differs", "one serves alone", "the last registration holds"),
    ),
    "remove_stream_handler": Feature(
        "REMOVE_STREAM_HANDLER",
        YES,
        _UNKNOWN_TO_GO,
        _absent("NotSupported", "ERR_INVALID_MESSAGE", "takes its field for a peerstore request"),
    ),
    # --- unary calls ---
    "unary": Feature(
        "unary calls, over a persistent connection",
        YES,
        _UNKNOWN_TO_GO,
        _absent("NotSupported", "ERR_NOT_IMPLEMENTED", "takes it for a peerstore request"),
    ),
    # --- DHT ---
    "dht_off": Feature(
        "a daemon without a DHT refuses queries as not supported",
        YES,
        YES,
        _absent("Differs", "it has a DHT", "always has a DHT"),
    ),
    "dht_find_peer": Feature("DHT FIND_PEER", YES, YES, YES),
    "dht_find_peers_connected_to_peer": Feature(
        "DHT FIND_PEERS_CONNECTED_TO_PEER",
        _absent("NotSupported", "not supported", "its libp2p has given it up"),
        _absent("NotSupported", "not supported", "its libp2p has given it up"),
        _UNKNOWN_TO_JS,
    ),
    "dht_closest_peers": Feature("DHT GET_CLOSEST_PEERS", YES, YES, YES),
    "dht_providers": Feature("DHT PROVIDE, FIND_PROVIDERS", YES, YES, YES),
    "dht_no_providers": Feature(
        "DHT FIND_PROVIDERS of what nobody provides: none",
        YES,
        YES,
        _broken("DaemonRefused", "not found", "answers an error instead"),
    ),
    "dht_values": Feature(
        "DHT PUT_VALUE, GET_VALUE",
        YES,
        YES,
        _broken("DaemonRefused", "Not found", "takes the value, and does not find it again"),
    ),
    "dht_validation": Feature(
        "DHT PUT_VALUE refuses what is no record",
        YES,
        YES,
        _broken("Differs", "it was taken", "takes anything, and does not find it again"),
    ),
    "dht_search_value": Feature("DHT SEARCH_VALUE", YES, YES, _UNKNOWN_TO_JS),
    "dht_public_key": Feature("DHT GET_PUBLIC_KEY", YES, YES, YES),
    "dht_no_public_key": Feature(
        "DHT GET_PUBLIC_KEY of a peer that is not found is refused",
        YES,
        YES,
        _crashes("crashes where there is none"),
    ),
    "dht_bad_cid": Feature(
        "DHT PROVIDE of what is no CID is refused", YES, YES, _crashes("crashes on it")
    ),
    # --- connection manager ---
    "connmgr": Feature("CONNMANAGER TAG_PEER, UNTAG_PEER, TRIM", YES, YES, _UNKNOWN_TO_JS),
    # --- pubsub ---
    "pubsub": Feature("PUBSUB SUBSCRIBE, PUBLISH, GET_TOPICS", YES, YES, YES),
    "pubsub_own": Feature(
        "a subscription has what its own daemon publishes",
        YES,
        YES,
        _broken("Differs", "nothing came", "its router does not emit its own messages"),
    ),
    "pubsub_unsubscribe": Feature(
        "closing a subscription unsubscribes",
        YES,
        YES,
        _broken("Differs", "still subscribed", "does not notice that the connection was closed"),
    ),
    "pubsub_list_peers": Feature("PUBSUB LIST_PEERS", YES, YES, _UNKNOWN_TO_JS),
    "pubsub_off": Feature(
        "a daemon without pubsub refuses it as not supported", YES, YES, _crashes("crashes on it")
    ),
    # --- peerstore ---
    "peerstore_get_protocols": Feature(
        "PEERSTORE GET_PROTOCOLS", _UNKNOWN_TO_GO, _UNKNOWN_TO_GO, YES
    ),
    "peerstore_unknown": Feature(
        "PEERSTORE GET_PROTOCOLS of a peer it has not heard of is refused",
        _UNKNOWN_TO_GO,
        _UNKNOWN_TO_GO,
        _crashes("crashes on it"),
    ),
    "peerstore_get_peer_info": Feature(
        "PEERSTORE GET_PEER_INFO",
        _UNKNOWN_TO_GO,
        _UNKNOWN_TO_GO,
        _absent("NotSupported", "ERR_NOT_IMPLEMENTED", "has not implemented it"),
    ),
}

_NO_MUXER = "one has yamux alone and the other mplex alone"

#: What one kind of daemon can do with a peer of another, as (who asks, the peer): what is not here
#: is as between two of the kind that asks. Upstream Go's p2pd has one muxer at a time: yamux, as
#: hivemind's, or mplex (``-muxer mplex``), as JavaScript's.
PAIRS: dict[tuple[str, str], dict[str, Entry]] = {
    ("hivemind", "js"): {
        "connect": _absent("DaemonRefused", "failed to negotiate stream multiplexer", _NO_MUXER),
    },
    ("js", "go"): {
        "dht_public_key": _crashes("crashes on the record that a Go peer has"),
    },
    ("js", "hivemind"): {
        "connect": _absent("DaemonRefused", "protocol selection failed", _NO_MUXER),
    },
}


def between(asks: str, peer: str, feature: str) -> Entry:
    """The entry of a feature between two kinds of daemon."""
    return PAIRS.get((asks, peer), {}).get(feature) or FEATURES[feature].of(asks)


_TEXT = """\
# Compatibility

<!-- Written by tests/daemons/features.py: change it there. -->

What the daemons can do, through this library. Every line is held against the daemons themselves
by `tests/test_compatibility.py`, both ways: what is supported works, and what is not fails with
the error that is given here, at once, and leaves the client usable. The rest of the test suite runs
on each of them, but for the tests of what a daemon has not.

- **absent**: the daemon does not have it.
- **broken upstream**: the daemon has it, and it does not work.
- *ends*: the daemon's process ends of it. What was asked of it raises `ConnectionLost`, and the
  client works again as soon as the daemon has been started again.

jsp2pd can end at any time of a client that closes a connection to which it is just writing (a
stream that the peer still sends to, a call that was cancelled): it does not handle the error,
`EPIPE` or `ECONNRESET`.

"""

_PAIRS_TEXT = """
## Peers of different kinds

Streams between every two kinds, both ways, are in `tests/test_interop.py`. Two peers must have a
muxer in common: hivemind's daemon has yamux, JavaScript's mplex, upstream Go's the one that
`-muxer` says, which is yamux if it says nothing. As it has one at a time, start it with
`-muxer mplex` to talk to JavaScript's.

"""


def _cell(entry: Entry) -> str:
    if entry.state is State.SUPPORTED:
        return "yes"
    details = []
    if entry.error != "Differs":
        details.append(f"`{entry.error}`" + (f": “{entry.words}”" if entry.words else ""))
    if entry.ends is not False:
        details.append("*ends*" if entry.ends else "can *end*")
    told = f" ({'; '.join(details)})" if details else ""
    return f"**{entry.state.value}**: {entry.why}{told}"


def render() -> str:
    """``docs/compatibility.md``."""
    lines = [_TEXT + "| | " + " | ".join(DAEMONS.values()) + " |", "| --- " * 4 + "|"]
    for feature in FEATURES.values():
        cells = (_cell(feature.of(daemon)) for daemon in DAEMONS)
        lines.append(f"| {feature.what} | {' | '.join(cells)} |")
    lines += [_PAIRS_TEXT + "| who asks | the peer | | |", "| --- " * 4 + "|"]
    for (asks, peer), entries in PAIRS.items():
        for name, entry in entries.items():
            names = f"{DAEMONS[asks]} | {DAEMONS[peer]} | {FEATURES[name].what}"
            lines.append(f"| {names} | {_cell(entry)} |")
    return "\n".join(lines) + "\n"


#: Where it is kept.
DOCUMENT = Path(__file__).parents[2] / "docs" / "compatibility.md"


if __name__ == "__main__":
    if sys.argv[1:] == ["--write"]:
        DOCUMENT.write_text(render())
    else:
        print(render(), end="")
