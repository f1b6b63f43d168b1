"""One half of the demo: a daemon and a program that connects to the listener's.

Usage: dialer.py ADDRESS, as printed by the listener: `/ip4/…/tcp/…/p2p/PEER_ID`.
"""

import hashlib
import os
import sys
import time

import anyio

from p2pclient_rs import Client, Daemon, DaemonRefused, PeerID

SIZE = 256 << 20


async def main(address: str) -> None:
    maddr, _, peer = address.rpartition("/p2p/")
    listener = PeerID(peer)
    async with Daemon(dht="server") as daemon, daemon.client() as client:
        await client.connect(listener, [maddr], timeout=10)

        # A record for the listener to get from the DHT: this daemon's public key.
        key = await client.dht_get_public_key(daemon.peer_id)
        with anyio.fail_after(10):
            await put_record(client, b"/pk/" + daemon.peer_id.to_bytes(), key.serialize())

        info, stream = await client.stream_open(listener, ["/demo/message/1"])
        async with stream:
            await stream.send(b"hello\n")
            print((await stream.readline()).decode().strip(), "over", info.addr, flush=True)

        _, stream = await client.stream_open(listener, ["/demo/bulk/1"])
        async with stream:
            data = os.urandom(1 << 20) * (SIZE >> 20)
            begin = time.perf_counter()
            await stream.send(f"{SIZE}\n".encode())
            await stream.send(data)
            digest = (await stream.readline()).decode().strip()
            seconds = time.perf_counter() - begin
            right = digest == hashlib.sha256(data).hexdigest()
            print(
                f"{SIZE >> 20} MiB in {seconds:.2f} s ({SIZE / seconds / 1e6:.0f} MB/s), "
                f"{'the same' if right else 'DIFFERENT'} at the other end",
                flush=True,
            )
            await stream.read()  # waits until the listener has the record and closes
            if not right:
                raise SystemExit(1)


async def put_record(client: Client, key: bytes, value: bytes) -> None:
    """Puts a record as soon as there is a peer in the DHT's routing table."""
    while True:
        try:
            return await client.dht_put_value(key, value)
        except DaemonRefused as error:
            # A peer enters the table a moment after it was connected.
            if error.daemon_message != "failed to find any peer in table":
                raise
            await anyio.sleep(0.05)


if __name__ == "__main__":
    anyio.run(main, sys.argv[1])
