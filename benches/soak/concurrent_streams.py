"""Two thousand streams open and in use at once; ten rounds."""

from __future__ import annotations

from p2pclient_rs import Stream
from soak.harness import Soak
from soak.meter import descriptors

FULL = 2_000
ROUNDS = 10
#: Frames on each stream, while all streams are open.
FRAMES = 3
PROTOCOL = "/soak/frames"


async def run(soak: Soak) -> None:
    many = soak.scaled(FULL, 100)

    async with soak.ready(expected=ROUNDS * FRAMES * many):
        await soak.serve("frames", PROTOCOL)
        for turn in range(ROUNDS):
            streams: dict[int, Stream] = {}

            async def start(number: int, streams: dict[int, Stream] = streams) -> None:
                streams[number] = await soak.open_frames(PROTOCOL)

            async def use(
                number: int, streams: dict[int, Stream] = streams, first: int = turn * FRAMES
            ) -> None:
                for frame in range(first, first + FRAMES):
                    await soak.frame(streams[number], frame * many + number)

            async def end(number: int, streams: dict[int, Stream] = streams) -> None:
                async with streams.pop(number) as stream:
                    await stream.send_eof()
                    left = await stream.read()
                    soak.promise(not left, f"{len(left)} extra bytes on a stream")

            await soak.workers(many, start)
            soak.figures["streams open at once"] = len(streams)
            open_here = descriptors()
            soak.promise(open_here >= many, f"{many} streams, but {open_here} descriptors")
            await soak.workers(many, use)
            await soak.workers(many, end)
        ended = await soak.count("ended", ROUNDS * many)
        soak.promise(ended == ROUNDS * many, f"the handlers saw {ended} streams end")
        soak.promise_deliveries(soak.peers, all_answered=True)
