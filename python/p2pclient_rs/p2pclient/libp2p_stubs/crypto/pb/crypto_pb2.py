"""Keys as they are serialised, as protobuf classes (proto/crypto.proto)."""

from p2pclient_rs.p2pclient import _descriptors

globals().update(_descriptors.namespace("crypto.proto", __name__))
