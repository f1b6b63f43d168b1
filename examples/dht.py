"""The DHT of two daemons: one provides a content, the other finds it, on asyncio or trio.

Usage: dht.py [asyncio|trio]
"""

import hashlib
import sys

import anyio

from p2pclient_rs import Client, Daemon, DaemonRefused

#: The binary CID of a content: version 1, raw bytes, sha2-256 of 32 bytes.
CID = b"\x01\x55\x12\x20" + hashlib.sha256(b"a file").digest()


async def wait_for_routing_table(client: Client) -> None:
    """Waits until another peer is in the routing table, which takes a moment after connecting."""
    while True:
        try:
            if await client.dht_get_closest_peers(b"any key"):
                return
        except DaemonRefused:
            pass
        await anyio.sleep(0.05)


async def main() -> None:
    # On one machine no peer is publicly reachable, so both daemons must be DHT servers.
    async with Daemon(dht="server") as a, Daemon(dht="server") as b:
        async with a.client() as provider, b.client() as seeker:
            await seeker.connect(a.peer_id, a.addrs)
            await wait_for_routing_table(provider)
            await wait_for_routing_table(seeker)
            await provider.dht_provide(CID)

            async for found in seeker.dht_find_providers(CID, 20, timeout=10):
                print("found the provider:", found.peer_id == a.peer_id)
                break  # ends the query

            peers = await seeker.dht_get_closest_peers(CID)
            print("peers closest to the content:", len(peers))


if __name__ == "__main__":
    anyio.run(main, backend=sys.argv[1] if len(sys.argv) > 1 else "asyncio")
