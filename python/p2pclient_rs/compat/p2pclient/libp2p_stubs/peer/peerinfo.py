"""A peer and its addresses."""

from collections.abc import Iterable

from multiaddr import protocols

from p2pclient_rs.compat.p2pclient._multiaddr import Multiaddr
from p2pclient_rs.compat.p2pclient.libp2p_stubs.peer.id import ID

__all__ = ["ID", "InvalidAddrError", "PeerInfo", "info_from_p2p_addr"]


class PeerInfo:
    """A peer and its known addresses.

    Args:
        peer_id: The peer.
        addrs: Its addresses, which are copied into a list.
    """

    peer_id: ID
    addrs: list[Multiaddr]

    def __init__(self, peer_id: ID, addrs: Iterable[Multiaddr]) -> None:
        self.peer_id = peer_id
        self.addrs = list(addrs)

    def __repr__(self) -> str:
        return f"<PeerInfo peer_id={self.peer_id} addrs={[str(addr) for addr in self.addrs]}>"

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, PeerInfo):
            return NotImplemented
        return self.peer_id == other.peer_id and self.addrs == other.addrs


def info_from_p2p_addr(addr: Multiaddr) -> PeerInfo:
    """Splits an address that ends in ``/p2p/<peer id>``.

    Args:
        addr: The address.

    Returns:
        The peer. Its only address is the part before ``/p2p``, or ``addr`` if that part is empty.

    Raises:
        InvalidAddrError: The address is empty or does not end in ``/p2p/<peer id>``.
    """
    parts = addr.split() if addr else []
    if not parts:
        raise InvalidAddrError("an empty address: it should end in /p2p/<peer id>")
    *transport, last = parts
    if last.protocols()[0].code != protocols.P_P2P:
        raise InvalidAddrError(f"{addr} should end in /p2p/<peer id>")
    peer_id = last.value_for_protocol(protocols.P_P2P)
    assert peer_id is not None, "/p2p has a value"
    return PeerInfo(ID.from_base58(peer_id), [Multiaddr.join(*transport) if transport else addr])


class InvalidAddrError(ValueError):
    """The address does not name a peer."""
