"""Three daemons in a row: messages of the first reach the last through the middle one."""

import anyio

from p2pclient_rs import Client, Daemon

TOPIC = "news"


async def wait_for_mesh(client: Client) -> None:
    """Waits until a neighbour is subscribed; earlier messages would be lost."""
    while not await client.pubsub_list_peers(TOPIC):
        await anyio.sleep(0.05)


async def main() -> None:
    async with Daemon(pubsub=True) as a, Daemon(pubsub=True) as b, Daemon(pubsub=True) as c:
        async with a.client() as first, b.client() as middle, c.client() as last:
            await middle.connect(a.peer_id, a.addrs)
            await middle.connect(c.peer_id, c.addrs)
            subscriptions = [
                await client.pubsub_subscribe(TOPIC) for client in (first, middle, last)
            ]
            for client in (first, middle, last):
                await wait_for_mesh(client)
            with anyio.fail_after(30):
                async with anyio.create_task_group() as tasks:
                    tasks.start_soon(publish_until_cancelled, first)
                    async for message in subscriptions[-1]:
                        print(f"{message.data!r} from {message.peer_id} on {message.topic_ids}")
                        break
                    tasks.cancel_scope.cancel()
            for subscription in subscriptions:
                await subscription.aclose()


async def publish_until_cancelled(client: Client) -> None:
    """Publishes repeatedly: gossipsub forwards only once its mesh has formed, after about 1 s."""
    while True:
        await client.pubsub_publish(TOPIC, b"hello, subscribers")
        await anyio.sleep(0.2)


if __name__ == "__main__":
    anyio.run(main)
