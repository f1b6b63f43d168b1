"""A hundred thousand streams, 64 at a time: a checked frame in each direction, then EOF.

The caller ends every other stream, with ``send_eof``, and reads up to EOF. The handler ends the
rest, once told that the caller has received everything. (The Go daemons can cut off data sent right
before an end.)"""

from __future__ import annotations

from soak.harness import STREAM_FAILURES, Soak

FULL = 100_000
AT_ONCE = 64
PROTOCOL = "/soak/frames"


async def run(soak: Soak) -> None:
    streams = soak.scaled(FULL, 200)
    numbers = iter(range(streams))
    unclean = 0

    async def one(number: int) -> None:
        nonlocal unclean
        async with await soak.open_frames(PROTOCOL) as stream:
            await soak.frame(stream, number)
            if number % 2:
                await stream.send(b"e")
            else:
                await stream.send_eof()
            unclean += bool(await stream.read())
            if number % 2:
                await stream.send_eof()

    async def work(_: int) -> None:
        for number in numbers:
            try:
                await one(number)
            except STREAM_FAILURES as error:
                soak.failed(error)

    async with soak.ready(expected=streams):
        await soak.serve("frames", PROTOCOL)
        await soak.workers(AT_ONCE, work)
        soak.promise_errors(most=0)
        soak.promise(not unclean, f"{unclean} streams had extra bytes")
        soak.promise_deliveries(soak.peers, all_answered=True)
        ended = await soak.count("ended", streams)
        soak.promise(ended == streams, f"the handlers saw {ended} of {streams} streams end")
