"""Whole programs, as a reader of the guide would paste them. Each runs in its own process."""

from __future__ import annotations

import re
import subprocess
import sys
import textwrap

import pytest

pytestmark = [pytest.mark.daemons("hivemind"), pytest.mark.independent]

#: Title → (program, expected output).
PROGRAMS: dict[str, tuple[str, str]] = {
    "a daemon and its identity": (
        """
        import asyncio
        from p2pclient_rs import Daemon

        async def main():
            daemon = await Daemon().start()
            client = daemon.client()
            peer_id, addrs = await client.identify()
            print(peer_id == daemon.peer_id, len(addrs) > 0)
            await client.close()
            await daemon.stop()

        asyncio.run(main())
        """,
        "True True\n",
    ),
    "an echo server and its client": (
        """
        import asyncio
        from p2pclient_rs import Client, Daemon

        async def echo(stream):
            data = await stream.read(1024)
            await stream.write(data.upper())
            await stream.close()

        async def main():
            server_daemon = await Daemon().start()
            client_daemon = await Daemon().start()

            server = Client(server_daemon.control_maddr)
            await server.listen()
            await server.stream_handler("/echo/1.0.0", echo)

            client = Client(client_daemon.control_maddr)
            await client.connect(server_daemon.peer_id, server_daemon.addrs)
            for peer in await client.list_peers():
                print(peer.id == server_daemon.peer_id)

            stream = await client.stream_open(server_daemon.peer_id, ["/echo/1.0.0"])
            await stream.write(b"hello")
            print(await stream.read(1024))
            await stream.close()

            await client.close()
            await server.close()
            await client_daemon.stop()
            await server_daemon.stop()

        asyncio.run(main())
        """,
        "True\nb'HELLO'\n",
    ),
    "the same with context managers": (
        """
        import asyncio
        from p2pclient_rs import Daemon

        async def shout(info, stream):
            await stream.write((await stream.read(1024)).upper())
            await stream.close()

        async def main():
            async with Daemon() as one, Daemon() as other:
                async with one.client() as server, other.client() as client:
                    async with server.listen():
                        await server.stream_handler("/shout", shout)
                        await client.connect(one.peer_id, one.addrs)
                        info, stream = await client.stream_open(one.peer_id, ["/shout"])
                        print(info.proto)
                        await stream.write(b"hi")
                        print(await stream.read(1024))
                        await stream.close()

        asyncio.run(main())
        """,
        "/shout\nb'HI'\n",
    ),
    "a handler that looks at its caller": (
        """
        import asyncio
        from p2pclient_rs import Daemon

        async def handler(stream):
            await stream.write(str(stream.info.peer_id).encode())
            await stream.close()

        async def main():
            a, b = await Daemon().start(), await Daemon().start()
            server, client = a.client(), b.client()
            await server.listen()
            await server.stream_handler("/whoami", handler)
            await client.connect(a.peer_id, a.addrs)
            stream = await client.stream_open(a.peer_id, ["/whoami"])
            print((await stream.read(1024)).decode() == str(b.peer_id))
            await stream.close()
            await server.close()
            await client.close()
            await a.stop()
            await b.stop()

        asyncio.run(main())
        """,
        "True\n",
    ),
    "the DHT": (
        """
        import asyncio
        from p2pclient_rs import Daemon, DaemonRefused

        async def main():
            a = await Daemon(dht="server").start()
            b = await Daemon(dht="server").start()
            alice, bob = a.client(), b.client()
            await alice.connect(b.peer_id, b.addrs)
            while True:  # until both are in each other's routing table
                try:
                    peer = await alice.dht_find_peer(b.peer_id)
                    await alice.dht_get_closest_peers(b"anything")
                    await bob.dht_get_closest_peers(b"anything")
                    break
                except DaemonRefused:
                    await asyncio.sleep(0.05)
            print(peer.id == b.peer_id)
            cid = b"\\x01\\x55\\x12\\x20" + bytes(32)
            await alice.dht_provide(cid)
            for provider in await bob.dht_find_providers(cid, 10):
                print(provider.id == a.peer_id)
            await alice.close()
            await bob.close()
            await a.stop()
            await b.stop()

        asyncio.run(main())
        """,
        "True\nTrue\n",
    ),
    "pubsub": (
        """
        import asyncio
        from p2pclient_rs import Daemon

        async def main():
            a = await Daemon(pubsub=True).start()
            b = await Daemon(pubsub=True).start()
            alice, bob = a.client(), b.client()
            await alice.connect(b.peer_id, b.addrs)
            subscription = await bob.pubsub_subscribe("news")
            while not await alice.pubsub_list_peers("news"):
                await asyncio.sleep(0.05)
            await alice.pubsub_publish("news", b"hello")
            async for message in subscription:
                print(message.data, message.peer_id == a.peer_id)
                break
            await subscription.close()
            await alice.close()
            await bob.close()
            await a.stop()
            await b.stop()

        asyncio.run(main())
        """,
        "b'hello' True\n",
    ),
    "unary calls": (
        """
        import asyncio
        from p2pclient_rs import Daemon

        async def square(data, caller):
            return str(int(data) ** 2).encode()

        async def main():
            a, b = await Daemon().start(), await Daemon().start()
            server, client = a.client(), b.client()
            await server.add_unary_handler("square", square)
            await client.connect(a.peer_id, a.addrs)
            print(await client.call_unary(a.peer_id, "square", b"12"))
            await client.close()
            await server.close()
            await a.stop()
            await b.stop()

        asyncio.run(main())
        """,
        "b'144'\n",
    ),
    "retrying until the daemon is reachable": (
        """
        import asyncio, tempfile
        from p2pclient_rs import Client, Daemon

        async def main(directory):
            control = f"/unix{directory}/control.sock"
            client = Client(control)
            daemon = None
            while True:
                try:
                    print((await client.identify()).peer_id == daemon.peer_id)
                    break
                except (FileNotFoundError, ConnectionRefusedError) as error:
                    print(type(error).__name__, error.errno)
                    daemon = await Daemon(control_maddr=control).start()
            await client.close()
            await daemon.stop()

        with tempfile.TemporaryDirectory() as directory:
            asyncio.run(main(directory))
        """,
        "DaemonUnreachable 2\nTrue\n",
    ),
    "two clients of one daemon": (
        """
        import asyncio
        from p2pclient_rs import Client, Daemon

        def greeter(name):
            async def handler(stream):
                await stream.write(name)
                await stream.close()
            return handler

        async def main():
            daemon, far = await Daemon().start(), await Daemon().start()
            one, two = Client(daemon.control_maddr), Client(daemon.control_maddr)
            for client, name in ((one, b"one"), (two, b"two")):
                await client.listen()
                await client.stream_handler("/" + name.decode(), greeter(name))
            caller = far.client()
            await caller.connect(daemon.peer_id, daemon.addrs)
            for proto in ("/one", "/two"):
                stream = await caller.stream_open(daemon.peer_id, [proto])
                print(await stream.read(100))
                await stream.close()
            for client in (one, two, caller):
                await client.close()
            await daemon.stop()
            await far.stop()

        asyncio.run(main())
        """,
        "b'one'\nb'two'\n",
    ),
}


def run(program: str, loop: str) -> subprocess.CompletedProcess[str]:
    program = textwrap.dedent(program)
    if loop == "trio":
        program = re.sub(r"asyncio\.run\(main\((.*)\)\)", r"trio.run(main, \1)", program)
        program = program.replace("asyncio", "trio")
    elif loop == "uvloop":
        program = program.replace("asyncio.run", "uvloop.run")
        program = program.replace("import asyncio", "import uvloop, asyncio")
    return subprocess.run(
        [sys.executable, "-X", "dev", "-W", "error", "-c", program],
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.mark.parametrize("loop", ["asyncio", "uvloop", "trio"])
@pytest.mark.parametrize("name", PROGRAMS)
def test_program_runs_unchanged(name: str, loop: str) -> None:
    program, output = PROGRAMS[name]
    ran = run(program, loop)
    assert (ran.stdout, ran.returncode) == (output, 0), ran.stderr
    # asyncio's debug mode warns about slow callbacks, which a loaded machine can cause.
    said = [line for line in ran.stderr.splitlines() if not line.startswith("Executing <")]
    assert said == []
