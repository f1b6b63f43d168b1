"""Protobuf classes, made at import from the schema that the native module contains.

The classes are in their own descriptor pool. The default pool refuses a second, different
``p2pd.proto``, and the process may also load p2pclient's or hivemind's.
"""

from typing import Any

from google.protobuf.descriptor_pb2 import FileDescriptorProto, FileDescriptorSet
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.internal.enum_type_wrapper import EnumTypeWrapper
from google.protobuf.message_factory import GetMessageClass

from p2pclient_rs import _native

__all__ = ["namespace"]


def _use_js_flavour(file: FileDescriptorProto) -> None:
    """Gives numbers that differ between flavours the meaning of p2pclient and JavaScript."""
    messages = {message.name: message for message in file.message_type}
    request, js_request = messages["Request"], messages["JsRequest"]
    (kind,) = request.enum_type
    (upgrade,) = (value for value in kind.value if value.name == "PERSISTENT_CONN_UPGRADE")
    (remove,) = (field for field in request.field if field.name == "removeStreamHandler")
    (peer_store,) = (field for field in js_request.field if field.name == "peerStore")
    (balanced,) = (f for f in messages["StreamHandlerRequest"].field if f.name == "balanced")
    kind.value.remove(upgrade)
    kind.options.ClearField("allow_alias")
    remove.CopyFrom(peer_store)
    file.message_type.remove(js_request)
    # Programs written for p2pclient do not know the field, so their messages lack it.
    balanced.label = balanced.LABEL_OPTIONAL


def _load() -> DescriptorPool:
    pool = DescriptorPool()
    for file in FileDescriptorSet.FromString(_native.p2pd_descriptors()).file:
        if file.name == "p2pd.proto":
            _use_js_flavour(file)
        pool.AddSerializedFile(file.SerializeToString())
    return pool


_pool = _load()


def namespace(file_name: str, module: str) -> dict[str, Any]:
    """Returns the names that a module generated from a .proto file would define.

    Args:
        file_name: The file's name, such as ``"p2pd.proto"``.
        module: The name of the module that defines the classes.

    Returns:
        The descriptor, the message classes, the enums and their values, by name.
    """
    descriptor = _pool.FindFileByName(file_name)
    names: dict[str, Any] = {"DESCRIPTOR": descriptor}
    for message in descriptor.message_types_by_name.values():
        names[message.name] = cls = GetMessageClass(message)
        cls.__module__ = module
    for enum in descriptor.enum_types_by_name.values():
        names[enum.name] = EnumTypeWrapper(enum)
        names.update((value.name, value.number) for value in enum.values)
    return names
