# The classes that crypto_pb2.py makes at import.

from google.protobuf.descriptor import FileDescriptor
from google.protobuf.internal.enum_type_wrapper import EnumTypeWrapper
from google.protobuf.message import Message

DESCRIPTOR: FileDescriptor
KeyType: EnumTypeWrapper
RSA: int
Ed25519: int
Secp256k1: int
ECDSA: int

class PublicKey(Message):
    key_type: int
    data: bytes
    def __init__(self, *, key_type: int = ..., data: bytes = ...) -> None: ...

class PrivateKey(Message):
    key_type: int
    data: bytes
    def __init__(self, *, key_type: int = ..., data: bytes = ...) -> None: ...
