"""Keys as they are serialised, as protobuf classes (proto/crypto.proto)."""

from p2pclient_rs.compat.p2pclient._descriptors import namespace as _namespace

globals().update(_namespace("crypto.proto", __name__))
