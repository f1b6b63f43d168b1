//! Inbound streams without a handler, and registrations that a daemon refuses: they are counted,
//! logged and reported.
#![cfg(unix)]

use p2pd_client::{Client, Error, IncomingStreams, ListenerStats};
use p2pd_protocol::command::refusal;
use p2pd_protocol::pb::p2pd::request::Type;
use p2pd_protocol::Multiaddr;
use p2pd_test_support::fake_daemon::{ok, stream_info, Connection, FakeDaemon};
use p2pd_test_support::{bare_daemon, eventually, keep, must, pair, within, Limit};
use std::io::ErrorKind;
use std::sync::{Mutex, MutexGuard};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::join;
use tokio::net::UnixStream;

/// Collects log lines; tests that use it run one at a time.
struct Lines;

static LINES: Mutex<Vec<(log::Level, String)>> = Mutex::new(Vec::new());
static TURN: tokio::sync::Mutex<()> = tokio::sync::Mutex::const_new(());

impl log::Log for Lines {
    fn enabled(&self, _: &log::Metadata<'_>) -> bool {
        true
    }

    fn log(&self, record: &log::Record<'_>) {
        if record.target().starts_with("p2pd_") {
            lines().push((record.level(), record.args().to_string()));
        }
    }

    fn flush(&self) {}
}

fn lines() -> MutexGuard<'static, Vec<(log::Level, String)>> {
    LINES.lock().unwrap()
}

/// Starts collecting log lines, until the guard is dropped.
async fn collect_log() -> tokio::sync::MutexGuard<'static, ()> {
    let turn = TURN.lock().await;
    // Another test may have set the logger.
    let _ = log::set_logger(&Lines);
    log::set_max_level(log::LevelFilter::Debug);
    lines().clear();
    turn
}

fn lines_with(text: &str) -> usize {
    let lines = lines();
    lines.iter().filter(|(_, line)| line.contains(text)).count()
}

/// Returns a client that listens for a protocol.
async fn listening(daemon: &FakeDaemon, protocol: &str) -> (Client, IncomingStreams, Connection) {
    let client = daemon.client();
    let (incoming, control) = join!(client.stream_handler(protocol, false), async {
        let mut control = daemon.accept().await;
        let request = control.request().await;
        assert_eq!(request.r#type, Some(Type::StreamHandler as i32));
        control.answer(ok()).await;
        control
    });
    (client, incoming.unwrap(), control)
}

async fn dial(client: &Client) -> UnixStream {
    let listen = client.listen_maddr().unwrap().to_string();
    let path = listen.strip_prefix("/unix").unwrap();
    UnixStream::connect(path).await.unwrap()
}

/// Waits until the statistics match.
async fn stats(client: &Client, expected: impl Fn(&ListenerStats) -> bool) {
    eventually(async || {
        let stats = client.listener_stats();
        must(expected(&stats), &format!("{stats:?}"))
    })
    .await;
}

#[tokio::test]
async fn counts_and_logs_each_refused_stream() {
    let (_limit, _turn) = (Limit::new(), collect_log().await);
    let daemon = FakeDaemon::new();
    let (client, incoming, _control) = listening(&daemon, "/here").await;

    let mut open = Vec::new();
    for _ in 0..3 {
        let mut connection = Connection::new(dial(&client).await);
        connection.answer(stream_info("/elsewhere")).await;
        assert!(connection.is_closed().await);
    }
    let mut garbage = dial(&client).await;
    garbage.write_all(&[3, 255, 255, 255]).await.unwrap();
    // One more than the queue holds.
    for _ in 0..257 {
        let mut connection = Connection::new(dial(&client).await);
        connection.answer(stream_info("/here")).await;
        open.push(connection);
    }
    stats(&client, |stats| {
        stats.queue_full == 1 && stats.bad_header == 1
    })
    .await;
    let stats = client.listener_stats();
    assert_eq!((stats.accepted, stats.no_handler), (261, 3));
    assert_eq!(stats.accept_errors, 0);

    assert_eq!(lines_with("\"/elsewhere\""), 1, "{:?}", lines());
    assert_eq!(lines_with("it has no handler"), 1, "{:?}", lines());
    assert_eq!(lines_with("malformed"), 1, "{:?}", lines());
    assert_eq!(lines_with("256 wait already"), 1, "{:?}", lines());
    drop(incoming);
}

#[tokio::test]
async fn log_line_after_a_second_counts_the_suppressed_ones() {
    let (_limit, _turn) = (Limit::new(), collect_log().await);
    let daemon = FakeDaemon::new();
    let (client, _incoming, _control) = listening(&daemon, "/here").await;
    let refused = async || {
        let mut connection = Connection::new(dial(&client).await);
        connection.answer(stream_info("/elsewhere")).await;
        assert!(connection.is_closed().await);
    };
    let mut sent = 0;
    let begun = std::time::Instant::now();
    // Until the second line is logged, which takes at least a second.
    while lines_with("it has no handler") < 2 {
        refused().await;
        sent += 1;
    }
    assert!(begun.elapsed().as_secs_f64() > 0.9);
    let withheld = format!("(and {} more since the last such line)", sent - 2);
    assert_eq!(lines_with(&withheld), 1, "{sent} were sent: {:?}", lines());
    assert_eq!(client.listener_stats().no_handler, sent);
}

#[tokio::test]
async fn closes_the_oldest_connections_without_a_header_when_there_are_too_many() {
    let (_limit, _turn) = (Limit::new(), collect_log().await);
    let daemon = FakeDaemon::new();
    let (client, mut incoming, _control) = listening(&daemon, "/here").await;
    let mut silent = Vec::new();
    // 256, one for the handler, and two more.
    for _ in 0..259 {
        silent.push(dial(&client).await);
    }
    let mut good = Connection::new(dial(&client).await);
    good.answer(stream_info("/here")).await;
    assert!(within("the stream", incoming.next()).await.is_some());
    let mut byte = [0];
    let end = within("the end", silent[0].read(&mut byte)).await;
    assert_eq!(end.unwrap(), 0);
    let still_open = silent[258].try_read(&mut byte).unwrap_err();
    assert_eq!(still_open.kind(), ErrorKind::WouldBlock);
}

#[tokio::test]
async fn register_again_reports_a_protocol_taken_by_another_client() {
    let (_limit, _turn) = (Limit::new(), collect_log().await);
    let directory = tempfile::Builder::new().prefix("p2p-").tempdir().unwrap();
    let path = directory.path().join("control.sock");
    let control: Multiaddr = format!("/unix{}", path.display()).parse().unwrap();

    let before = bare_daemon().control_maddr(control.clone());
    let before = before.spawn().await.unwrap();
    let client = Client::new(control.clone()).unwrap();
    let _taken = client.stream_handler("/taken", false).await.unwrap();
    let _free = client.stream_handler("/free", false).await.unwrap();
    before.shutdown().await;

    let after = bare_daemon()
        .control_maddr(control.clone())
        .spawn()
        .await
        .unwrap();
    keep(&after);
    let thief = Client::new(control).unwrap();
    let _stolen = thief.stream_handler("/taken", false).await.unwrap();

    let refused = client.register_again().await.unwrap_err();
    assert!(matches!(refused, Error::Refused { .. }), "{refused:?}");
    assert_eq!(
        refused.context().unwrap().protocol.as_deref(),
        Some("/taken")
    );
    assert_eq!(lines_with("lost the handler of \"/taken\""), 1);
    // The other protocol was registered, so the thief is refused.
    let outcome = thief.stream_handler("/free", false).await;
    assert!(matches!(outcome, Err(Error::Refused { .. })), "{outcome:?}");
}

#[tokio::test]
async fn register_again_is_idempotent() {
    let pair = pair().await;
    let peer = pair.bob_daemon.peer_id();
    let mut alone = pair
        .bob
        .stream_handler("/again-alone", false)
        .await
        .unwrap();
    let mut shared = pair
        .bob
        .stream_handler("/again-shared", true)
        .await
        .unwrap();
    pair.bob.register_again().await.unwrap();
    pair.bob.register_again().await.unwrap();
    for (incoming, protocol) in [(&mut alone, "/again-alone"), (&mut shared, "/again-shared")] {
        let opened = pair.alice.stream_open(peer, [protocol]).await.unwrap();
        let stream = within("the stream", incoming.next()).await.unwrap();
        assert_eq!(stream.info().protocol, protocol);
        drop(opened);
    }
    // If the daemon had it twice, one registration would be left.
    shared.close().await.unwrap();
    let other = pair.bob_daemon.client().await.unwrap();
    let _alone = other.stream_handler("/again-shared", false).await.unwrap();
}

#[tokio::test]
async fn refused_removal_keeps_the_first_refusals_message() {
    let (_limit, _turn) = (Limit::new(), collect_log().await);
    let daemon = FakeDaemon::new();
    let (client, _incoming, mut control) = listening(&daemon, "/taken").await;
    let (outcome, ()) = join!(client.register_again(), async {
        let kinds = [Type::StreamHandler, Type::RemoveStreamHandler];
        for (kind, message) in kinds.into_iter().zip(["already set", "does not exist"]) {
            assert_eq!(control.request().await.r#type, Some(kind as i32));
            control.answer(refusal(message)).await;
        }
    });
    assert_eq!(outcome.unwrap_err().daemon_message(), Some("already set"));
}

#[tokio::test]
async fn errors_have_the_kind_of_their_io_error() {
    let _limit = Limit::new();
    let nowhere = Client::new("/unix/tmp/p2p-no-such.sock".parse().unwrap()).unwrap();
    let error = nowhere.identify().await.unwrap_err();
    assert_eq!(error.io_kind(), Some(ErrorKind::NotFound));
    assert!(error.io_error().unwrap().raw_os_error().is_some());
    let source = std::error::Error::source(&error).unwrap();
    assert!(source.to_string().contains("No such file"), "{source}");
    assert_eq!(std::io::Error::from(error).kind(), ErrorKind::NotFound);

    let daemon = FakeDaemon::new();
    let client = daemon.client();
    let (outcome, ()) = join!(client.identify(), async {
        let mut control = daemon.accept().await;
        control.request().await;
    });
    let error = outcome.unwrap_err();
    assert_eq!(error.io_kind(), Some(ErrorKind::UnexpectedEof), "{error:?}");
    assert!(std::error::Error::source(&error).is_some());

    // A unix socket closed with unread data is reset.
    let peer = p2pd_test_support::fake_daemon::peer();
    let (outcome, ()) = join!(client.connect(&peer, &[]), async {
        daemon.accept().await.readable().await;
    });
    assert_eq!(
        outcome.unwrap_err().io_kind(),
        Some(ErrorKind::ConnectionReset)
    );
}
