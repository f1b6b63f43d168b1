"""Runs the examples in docstrings, unchanged, against real daemons."""

from __future__ import annotations

import ast
import hashlib
import inspect
import textwrap
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anyio
import pytest
from conftest import FULL
from support import BACKENDS, DaemonProcess, eventually

import p2pclient_rs

pytestmark = [pytest.mark.anyio, pytest.mark.daemons("hivemind")]

PACKAGE = Path(p2pclient_rs.__file__).parent
CID = b"\x01\x55\x12\x20" + hashlib.sha256(b"content").digest()


@dataclass(frozen=True)
class Example:
    """An example in a docstring."""

    #: The module and the qualified name of the documented object.
    name: str
    source: str


def examples_of(name: str, docstring: str | None) -> Iterator[Example]:
    """Yields the examples of a docstring: the indented blocks after a line ``Example:``."""
    lines = inspect.cleandoc(docstring or "").splitlines()
    for start, line in enumerate(lines):
        if line == "Example:":
            block = []
            for following in lines[start + 1 :]:
                if following and not following.startswith("    "):
                    break
                block.append(following)
            yield Example(name, textwrap.dedent("\n".join(block)).strip())


def docstrings(module: str, tree: ast.Module) -> Iterator[tuple[str, str | None]]:
    """Yields the names of a module, its classes and functions, with their docstrings."""
    yield module, ast.get_docstring(tree)

    def visit(prefix: str, node: ast.AST) -> Iterator[tuple[str, str | None]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                name = f"{prefix}.{child.name}"
                yield name, ast.get_docstring(child)
                yield from visit(name, child)

    yield from visit(module, tree)


def sources() -> Iterator[tuple[str, ast.Module]]:
    """Yields the package's modules and stubs."""
    for path in sorted(PACKAGE.rglob("*.py*")):
        if path.suffix in (".py", ".pyi") and "compat" not in path.parts:
            parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
            yield ".".join(parts), ast.parse(path.read_text())


DOCSTRINGS = [entry for module, tree in sources() for entry in docstrings(module, tree)]
EXAMPLES = [example for entry in DOCSTRINGS for example in examples_of(*entry)]


@pytest.fixture(scope="module")
def swarm() -> Iterator[tuple[DaemonProcess, DaemonProcess]]:
    with DaemonProcess(*FULL) as near, DaemonProcess(*FULL) as far:
        near.keep()
        far.keep()
        yield near, far


@pytest.fixture(params=[BACKENDS[0], BACKENDS[2]])
def anyio_backend(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.fixture
async def namespace(swarm: tuple[DaemonProcess, DaemonProcess]) -> AsyncIterator[dict[str, Any]]:
    """The names that an example may use: a connected ``client``, and its ``peer_id``."""
    near, far = swarm

    async def echo(info: p2pclient_rs.StreamInfo, stream: p2pclient_rs.Stream) -> None:
        async for chunk in stream:
            await stream.send(chunk)

    async def square(request: bytes, caller: p2pclient_rs.PeerID) -> bytes:
        return b"%d" % (int(request) ** 2)

    async with near.client() as client, far.client() as server, server.listen():
        await server.stream_handler("/echo/1", echo)
        await server.add_unary_handler("square", square)
        await client.connect(far.peer_id, far.addrs)
        await eventually(lambda: client.dht_get_closest_peers(b"anything"))
        await server.dht_provide(CID)
        key = await client.dht_get_public_key(far.peer_id)
        await client.dht_put_value(b"/pk/" + far.peer_id.to_bytes(), key.serialize())
        async with anyio.create_task_group() as tasks:

            async def publish() -> None:
                while True:
                    await client.pubsub_publish("news", b"hello, subscribers")
                    await anyio.sleep(0.05)

            tasks.start_soon(publish)
            yield {
                **{name: getattr(p2pclient_rs, name) for name in p2pclient_rs.__all__},
                "addrs": far.addrs,
                "anyio": anyio,
                "cid": CID,
                "client": client,
                "connector": client.control.daemon_connector,
                "control_maddr": near.control_maddr,
                "echo": echo,
                "p2pclient_rs": p2pclient_rs,
                "peer_id": far.peer_id,
                "square": square,
            }
            tasks.cancel_scope.cancel()


@pytest.mark.parametrize("example", EXAMPLES, ids=[example.name for example in EXAMPLES])
async def test_example_runs(
    example: Example, namespace: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ast.PyCF_ALLOW_TOP_LEVEL_AWAIT
    code = compile(example.source, f"<example of {example.name}>", "exec", flags)
    result = eval(code, namespace)
    if inspect.isawaitable(result):
        await result
    # An example turns it off.
    p2pclient_rs.set_inplace_wake(True)
    client = namespace["client"]
    for proto in list(client.control.handlers):
        await client.remove_stream_handler(proto)


def documented() -> Iterator[tuple[str, object]]:
    """Yields the public names of the package and of its classes."""
    for name in sorted(p2pclient_rs.__all__):
        thing = getattr(p2pclient_rs, name)
        if inspect.isclass(thing) or inspect.isroutine(thing):
            yield name, thing
        for attribute, value in vars(thing).items() if inspect.isclass(thing) else ():
            accessor = isinstance(value, property | classmethod | staticmethod)
            if not attribute.startswith("_") and (inspect.isroutine(value) or accessor):
                yield f"{name}.{attribute}", getattr(thing, attribute)


def test_every_public_name_has_a_docstring() -> None:
    assert [name for name, thing in documented() if not inspect.getdoc(thing)] == []


def test_every_public_class_has_an_example() -> None:
    shown = {part for example in EXAMPLES for part in example.name.split(".")}
    lacking = [
        name
        for name, thing in documented()
        if inspect.isclass(thing)
        and not issubclass(thing, BaseException)
        and thing.__name__ not in shown
        and not thing.__module__.startswith("p2pclient_rs.compat")
    ]
    assert lacking == []
