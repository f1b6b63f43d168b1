//! Two hosts in one process, each with a swarm that serves ping.

use super::*;
use crate::config::Security;
use futures::future::BoxFuture;
use futures::{AsyncReadExt, AsyncWriteExt, FutureExt, StreamExt};
use libp2p::identity::Keypair;
use libp2p::swarm::SwarmEvent;
use libp2p::{ping, Multiaddr, Swarm};
use std::future::Future;
use std::io;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{mpsc, Barrier};
use tokio::task::JoinSet;
use tokio::time::timeout;

const BOTH: [Security; 2] = [Security::Noise, Security::Tls];

async fn within<T>(future: impl Future<Output = T>) -> T {
    timeout(Duration::from_secs(60), future)
        .await
        .expect("in time")
}

/// A host, and the task that drives its swarm.
struct Side {
    host: Host,
    addr: Multiaddr,
    dials: mpsc::UnboundedSender<Multiaddr>,
    /// Receives a message for each reply to a ping.
    pongs: mpsc::UnboundedReceiver<()>,
    swarm: tokio::task::JoinHandle<()>,
}

impl Side {
    async fn start(security: Security) -> Self {
        let keypair = Keypair::generate_ed25519();
        let host = Host::new(keypair.public().to_peer_id());
        host.delegate(ping::PROTOCOL_NAME.as_ref());
        let transport = build(&keypair, &[security], &host).unwrap();
        let pings = ping::Config::new().with_interval(Duration::from_millis(20));
        let mut swarm = Swarm::new(
            transport,
            ping::Behaviour::new(pings),
            host.local(),
            libp2p::swarm::Config::with_tokio_executor()
                .with_idle_connection_timeout(Duration::from_secs(3600)),
        );
        swarm
            .listen_on("/ip4/127.0.0.1/tcp/0".parse().unwrap())
            .unwrap();
        let addr = loop {
            if let SwarmEvent::NewListenAddr { address, .. } = swarm.select_next_some().await {
                break address;
            }
        };
        let (dials, mut to_dial) = mpsc::unbounded_channel();
        let (pong, pongs) = mpsc::unbounded_channel();
        let driver = async move {
            loop {
                tokio::select! {
                    Some(addr) = to_dial.recv() => swarm.dial(addr).unwrap(),
                    event = swarm.select_next_some() => match event {
                        SwarmEvent::Behaviour(ping::Event { result: Ok(_), .. }) => {
                            let _ = pong.send(());
                        }
                        SwarmEvent::Behaviour(ping::Event { result: Err(error), .. }) => {
                            panic!("ping: {error}")
                        }
                        _ => {}
                    }
                }
            }
        };
        Self {
            host,
            addr,
            dials,
            pongs,
            swarm: tokio::spawn(driver),
        }
    }

    /// Connects to another side. Returns both ends of the connection.
    async fn connect(&self, to: &Side) -> (Connection, Connection) {
        let (mut opened, mut accepted) = (self.host.events(), to.host.events());
        self.dials.send(to.addr.clone()).unwrap();
        let both = futures::future::join(opened.recv(), accepted.recv());
        match within(both).await {
            (Ok(HostEvent::Opened(ours)), Ok(HostEvent::Opened(theirs))) => (ours, theirs),
            other => panic!("{other:?}"),
        }
    }
}

impl Drop for Side {
    fn drop(&mut self) {
        self.swarm.abort();
    }
}

async fn pair(security: Security) -> (Side, Side, Connection, Connection) {
    let (alice, bob) = (Side::start(security).await, Side::start(security).await);
    let (ours, theirs) = alice.connect(&bob).await;
    (alice, bob, ours, theirs)
}

/// Serves each stream with a function.
struct Serving<F>(F);

impl<F> Service for Serving<F>
where
    F: Fn(String, Substream) -> BoxFuture<'static, ()> + Send + Sync,
{
    fn inbound(
        &self,
        protocol: String,
        stream: Substream,
        _: Connection,
    ) -> BoxFuture<'static, ()> {
        (self.0)(protocol, stream)
    }
}

/// Sends the protocol's name and then echoes each byte.
fn echo() -> Arc<dyn Service> {
    Arc::new(Serving(|protocol: String, stream: Substream| {
        async move {
            let (mut reader, mut writer) = stream.split();
            writer.write_all(protocol.as_bytes()).await.unwrap();
            futures::io::copy(&mut reader, &mut writer).await.unwrap();
            writer.close().await.unwrap();
        }
        .boxed()
    }))
}

/// Reads, and sends nothing.
fn silent() -> Arc<dyn Service> {
    Arc::new(Serving(|_, mut stream: Substream| {
        async move {
            let _ = futures::io::copy(&mut stream, &mut futures::io::sink()).await;
        }
        .boxed()
    }))
}

/// Sends `message` and returns what the peer sends back until it closes its side.
async fn exchange(stream: &mut Substream, message: &[u8]) -> io::Result<Vec<u8>> {
    stream.write_all(message).await?;
    stream.close().await?;
    let mut reply = Vec::new();
    stream.read_to_end(&mut reply).await?;
    Ok(reply)
}

#[tokio::test]
async fn streams_and_pings_share_a_connection() {
    for security in BOTH {
        let (mut alice, mut bob, ours, theirs) = pair(security).await;
        assert!(ours.is_dialer() && !theirs.is_dialer());
        assert_eq!(
            (ours.peer(), theirs.peer()),
            (bob.host.local(), alice.host.local())
        );
        assert_eq!(ours.remote_addr(), &bob.addr);
        for protocol in ["/with/slash", "Without.slash"] {
            alice.host.serve(protocol, echo());
            bob.host.serve(protocol, echo());
            for connection in [&ours, &theirs] {
                let expected = format!("{protocol}hello").into_bytes();
                let names = ["unknown", "/unknown", protocol].map(str::to_owned);
                let (name, mut stream) = within(connection.open(&names)).await.unwrap();
                assert_eq!(name, protocol);
                let reply = within(exchange(&mut stream, b"hello")).await.unwrap();
                assert_eq!(reply, expected);
                let mut stream = within(connection.open_lazily(protocol)).await.unwrap();
                let reply = within(exchange(&mut stream, b"hello")).await.unwrap();
                assert_eq!(reply, expected);
            }
        }
        for side in [&mut alice, &mut bob] {
            for _ in 0..3 {
                within(side.pongs.recv()).await.unwrap();
            }
        }
    }
}

#[tokio::test]
async fn unsupported_protocols_are_refused() {
    let (_alice, _bob, ours, _theirs) = pair(Security::Tls).await;
    let names = ["a", "/b"].map(str::to_owned);
    match within(ours.open(&names)).await {
        Err(OpenError::Unsupported(refused)) => assert_eq!(refused, names),
        other => panic!("{:?}", other.map(|(name, _)| name)),
    }
    let mut stream = within(ours.open_lazily("a")).await.unwrap();
    let error = within(exchange(&mut stream, b"hello")).await.unwrap_err();
    let refused = error
        .get_ref()
        .and_then(|it| it.downcast_ref::<OpenError>());
    assert!(matches!(refused, Some(OpenError::Unsupported(names)) if names == &["a"]));
}

#[tokio::test]
async fn withdrawn_protocol_is_refused_and_its_streams_go_on() {
    let (_alice, bob, ours, _theirs) = pair(Security::Tls).await;
    bob.host.serve("echo", echo());
    let names = ["echo".to_owned()];
    let (_, mut stream) = within(ours.open(&names)).await.unwrap();
    bob.host.withdraw("echo");
    let refused = within(ours.open(&names)).await;
    assert!(matches!(refused, Err(OpenError::Unsupported(_))));
    let reply = within(exchange(&mut stream, b"hello")).await.unwrap();
    assert_eq!(reply, b"echohello");
}

/// yamux lets 256 streams wait for an acknowledgement.
#[tokio::test]
async fn many_streams_are_open_at_once() {
    const STREAMS: usize = 600;
    let (_alice, bob, ours, _theirs) = pair(Security::Tls).await;
    bob.host.serve("echo", echo());
    let all_open = Arc::new(Barrier::new(STREAMS));
    let mut streams = JoinSet::new();
    for number in 0..STREAMS {
        let (connection, all_open) = (ours.clone(), all_open.clone());
        streams.spawn(async move {
            let message = number.to_string();
            let mut stream = connection.open_lazily("echo").await.unwrap();
            stream.write_all(message.as_bytes()).await.unwrap();
            let mut reply = vec![0; "echo".len() + message.len()];
            stream.read_exact(&mut reply).await.unwrap();
            assert_eq!(reply, format!("echo{message}").into_bytes());
            all_open.wait().await;
            let rest = exchange(&mut stream, b"rest").await.unwrap();
            assert_eq!(rest, b"rest");
        });
    }
    within(async {
        while let Some(done) = streams.join_next().await {
            done.unwrap();
        }
    })
    .await;
}

#[tokio::test]
async fn silent_services_do_not_block_new_streams() {
    let (_alice, bob, ours, _theirs) = pair(Security::Tls).await;
    bob.host.serve("silent", silent());
    bob.host.serve("echo", echo());
    let mut streams = Vec::new();
    for _ in 0..600 {
        let mut stream = within(ours.open_lazily("silent")).await.unwrap();
        within(stream.write_all(b"hello")).await.unwrap();
        streams.push(stream);
    }
    let mut stream = within(ours.open_lazily("echo")).await.unwrap();
    let reply = within(exchange(&mut stream, b"hello")).await.unwrap();
    assert_eq!(reply, b"echohello");
}

#[tokio::test]
async fn large_streams_in_both_directions_arrive_whole() {
    const SIZE: usize = 16 << 20;
    for security in BOTH {
        let (_alice, bob, ours, _theirs) = pair(security).await;
        bob.host.serve("echo", echo());
        let stream = within(ours.open_lazily("echo")).await.unwrap();
        let (mut reader, mut writer) = stream.split();
        let writing = async {
            for chunk in 0..SIZE >> 16 {
                let byte = u8::try_from(chunk % 251).unwrap();
                writer.write_all(&[byte; 1 << 16]).await.unwrap();
            }
            writer.close().await.unwrap();
        };
        let mut received = Vec::new();
        let reading = reader.read_to_end(&mut received);
        let ((), read) = within(futures::future::join(writing, reading)).await;
        read.unwrap();
        assert_eq!(received.len(), "echo".len() + SIZE);
        let chunks = received["echo".len()..].chunks(1 << 16);
        for (chunk, bytes) in chunks.enumerate() {
            let byte = u8::try_from(chunk % 251).unwrap();
            assert!(bytes.iter().all(|it| *it == byte), "chunk {chunk}");
        }
    }
}

#[tokio::test]
async fn closed_connection_ends_its_streams_on_both_sides() {
    for closes in ["dialer", "listener"] {
        let (alice, bob, ours, theirs) = pair(Security::Tls).await;
        bob.host.serve("silent", silent());
        let names = ["silent".to_owned()];
        let (_, mut stream) = within(ours.open(&names)).await.unwrap();
        let (mut our_events, mut their_events) = (alice.host.events(), bob.host.events());
        match closes {
            "dialer" => ours.close(),
            _ => theirs.close(),
        }
        let read = within(stream.read(&mut [0])).await;
        assert!(matches!(read, Ok(0) | Err(_)), "{read:?}");
        for events in [&mut our_events, &mut their_events] {
            let event = within(events.recv()).await;
            assert!(matches!(event, Ok(HostEvent::Closed(_))), "{event:?}");
        }
        for connection in [&ours, &theirs] {
            assert!(!connection.is_open());
            let opened = within(connection.open_lazily("silent")).await;
            assert!(matches!(opened, Err(OpenError::Closed)));
        }
        assert!(alice.host.connections().is_empty());
        assert!(alice.host.newest(&bob.host.local()).is_none());
    }
}
