"""Streams and peers as the daemon describes them, in the ecosystem's types."""

from p2pclient_rs.compat.p2pclient._multiaddr import Multiaddr
from p2pclient_rs.compat.p2pclient.libp2p_stubs.peer.id import ID
from p2pclient_rs.compat.p2pclient.libp2p_stubs.peer.peerinfo import PeerInfo as PeerInfoLibP2P
from p2pclient_rs.compat.p2pclient.pb import p2pd_pb2

__all__ = ["ID", "PeerInfo", "PeerInfoLibP2P", "StreamInfo"]


class StreamInfo:
    """The remote end of a stream.

    Args:
        peer_id: The remote peer.
        addr: Its address.
        proto: The negotiated protocol.
    """

    peer_id: ID
    addr: Multiaddr
    proto: str

    def __init__(self, peer_id: ID, addr: Multiaddr, proto: str) -> None:
        self.peer_id = peer_id
        self.addr = addr
        self.proto = proto

    def __repr__(self) -> str:
        return f"<StreamInfo peer_id={self.peer_id} addr={self.addr} proto={self.proto}>"

    def to_pb(self) -> p2pd_pb2.StreamInfo:
        """Converts it to a protobuf message."""
        return p2pd_pb2.StreamInfo(
            peer=self.peer_id.to_bytes(), addr=self.addr.to_bytes(), proto=self.proto
        )

    @classmethod
    def from_pb(cls, pb_msg: p2pd_pb2.StreamInfo) -> "StreamInfo":
        """Makes one from a protobuf message."""
        return cls(ID(pb_msg.peer), Multiaddr(pb_msg.addr), pb_msg.proto)


class PeerInfo(PeerInfoLibP2P):
    """Makes p2pclient's ``PeerInfo``, the base class, from protobuf messages."""

    @classmethod
    def from_pb(cls, peer_info_pb: p2pd_pb2.PeerInfo) -> PeerInfoLibP2P:
        """Makes an object of the base class, as p2pclient does, from a protobuf message."""
        return PeerInfoLibP2P(ID(peer_info_pb.id), map(Multiaddr, peer_info_pb.addrs))
