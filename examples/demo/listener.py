"""One half of the demo: a daemon and a program that serves the dialer.

Serves two protocols: `/demo/message/1` answers a line, `/demo/bulk/1` counts and hashes its input.
Prints its address as the first line of output. Ends when its input is closed.
"""

import hashlib
import sys

import anyio

from p2pclient_rs import Client, Daemon, PeerID, Stream, StreamInfo


async def main() -> None:
    async with Daemon(dht="server") as daemon, daemon.client() as client, client.listen():

        async def answer(info: StreamInfo, stream: Stream) -> None:
            async with stream:
                line = (await stream.readline()).decode().strip()
                print(f"{line!r} from {info.peer_id}", flush=True)
                await stream.send(f"you said {line!r}\n".encode())

        async def digest(info: StreamInfo, stream: Stream) -> None:
            async with stream:
                size = int(await stream.readline())
                sha256 = hashlib.sha256()
                while size > 0:
                    chunk = await stream.receive(min(size, 1 << 18))
                    sha256.update(chunk)
                    size -= len(chunk)
                await stream.send(f"{sha256.hexdigest()}\n".encode())
                await fetch_record(client, info.peer_id)

        await client.stream_handler("/demo/message/1", answer)
        await client.stream_handler("/demo/bulk/1", digest)
        print(f"{daemon.addrs[0]}/p2p/{daemon.peer_id}", flush=True)
        await anyio.to_thread.run_sync(sys.stdin.read)


async def fetch_record(client: Client, peer_id: PeerID) -> None:
    """Gets the dialer's public key, which the dialer has put into the DHT."""
    record = await client.dht_get_value(b"/pk/" + peer_id.to_bytes(), timeout=10)
    print(f"DHT record /pk/{peer_id}: {len(record)} bytes", flush=True)


if __name__ == "__main__":
    anyio.run(main)
