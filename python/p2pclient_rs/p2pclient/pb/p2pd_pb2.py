"""The messages of the control protocol, as protobuf classes (proto/p2pd.proto)."""

from p2pclient_rs.p2pclient import _descriptors

globals().update(_descriptors.namespace("p2pd.proto", __name__))
