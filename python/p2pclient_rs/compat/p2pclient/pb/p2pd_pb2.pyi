# The classes that p2pd_pb2.py makes at import; fields have the types given in proto/p2pd.proto.

from typing import Any, ClassVar

from google.protobuf.descriptor import FileDescriptor
from google.protobuf.internal.enum_type_wrapper import EnumTypeWrapper
from google.protobuf.message import Message

DESCRIPTOR: FileDescriptor

class _Message(Message):
    def __init__(self, **fields: Any) -> None: ...
    def __getattr__(self, field: str) -> Any: ...
    def __setattr__(self, field: str, value: Any) -> None: ...

class Request(_Message):
    Type: ClassVar[EnumTypeWrapper]
    IDENTIFY: ClassVar[int]
    CONNECT: ClassVar[int]
    STREAM_OPEN: ClassVar[int]
    STREAM_HANDLER: ClassVar[int]
    DHT: ClassVar[int]
    LIST_PEERS: ClassVar[int]
    CONNMANAGER: ClassVar[int]
    DISCONNECT: ClassVar[int]
    PUBSUB: ClassVar[int]
    PEERSTORE: ClassVar[int]
    REMOVE_STREAM_HANDLER: ClassVar[int]

class Response(_Message):
    Type: ClassVar[EnumTypeWrapper]
    OK: ClassVar[int]
    ERROR: ClassVar[int]

class ErrorResponse(_Message): ...
class IdentifyResponse(_Message): ...
class ConnectRequest(_Message): ...
class DisconnectRequest(_Message): ...
class PeerInfo(_Message): ...
class StreamOpenRequest(_Message): ...
class StreamHandlerRequest(_Message): ...
class RemoveStreamHandlerRequest(_Message): ...
class StreamInfo(_Message): ...

class DHTRequest(_Message):
    Type: ClassVar[EnumTypeWrapper]
    FIND_PEER: ClassVar[int]
    FIND_PEERS_CONNECTED_TO_PEER: ClassVar[int]
    FIND_PROVIDERS: ClassVar[int]
    GET_CLOSEST_PEERS: ClassVar[int]
    GET_PUBLIC_KEY: ClassVar[int]
    GET_VALUE: ClassVar[int]
    SEARCH_VALUE: ClassVar[int]
    PUT_VALUE: ClassVar[int]
    PROVIDE: ClassVar[int]

class DHTResponse(_Message):
    Type: ClassVar[EnumTypeWrapper]
    BEGIN: ClassVar[int]
    VALUE: ClassVar[int]
    END: ClassVar[int]

class ConnManagerRequest(_Message):
    Type: ClassVar[EnumTypeWrapper]
    TAG_PEER: ClassVar[int]
    UNTAG_PEER: ClassVar[int]
    TRIM: ClassVar[int]

class PSRequest(_Message):
    Type: ClassVar[EnumTypeWrapper]
    GET_TOPICS: ClassVar[int]
    LIST_PEERS: ClassVar[int]
    PUBLISH: ClassVar[int]
    SUBSCRIBE: ClassVar[int]

class PSMessage(_Message): ...
class PSResponse(_Message): ...

class PeerstoreRequest(_Message):
    Type: ClassVar[EnumTypeWrapper]
    INVALID: ClassVar[int]
    GET_PROTOCOLS: ClassVar[int]
    GET_PEER_INFO: ClassVar[int]

class PeerstoreResponse(_Message): ...
class PersistentConnectionRequest(_Message): ...
class PersistentConnectionResponse(_Message): ...
class AddUnaryHandlerRequest(_Message): ...
class RemoveUnaryHandlerRequest(_Message): ...
class CallUnaryRequest(_Message): ...
class CallUnaryResponse(_Message): ...
class DaemonError(_Message): ...
class Cancel(_Message): ...
