"""The messages of the control protocol, as protobuf classes (proto/p2pd.proto)."""

from p2pclient_rs.compat.p2pclient._descriptors import namespace as _namespace

globals().update(_namespace("p2pd.proto", __name__))
