//! The tokio client and the Python client, between two real p2pds named by P2PD_PATH, and on the
//! same one. P2PCLIENT_PYTHON names an interpreter with the package installed.
#![cfg(unix)]

use p2pd_client::{Error, UnaryCall};
use p2pd_test_support::{
    echo_streams, echoed, endless, hears, next_message, pair, pattern, required, within, Pair,
};
use std::convert::Infallible;
use std::fmt::Display;
use std::io::{BufRead as _, BufReader, Write as _};
use std::path::Path;
use std::process::{Child, ChildStdin, Command, Stdio};
use tempfile::TempDir;
use tokio::select;
use tokio::sync::mpsc::{self, UnboundedReceiver};

const SIZES: [usize; 4] = [0, 1, 64 << 10, 3 << 20];

/// A process that runs python_peer.py as a client of bob's daemon.
struct Python {
    process: Child,
    commands: ChildStdin,
    lines: UnboundedReceiver<String>,
    sent: usize,
    _directory: TempDir,
}

impl Python {
    /// Starts it and registers its handlers, under protocols that contain `name`.
    async fn serving(pair: &Pair, name: &str) -> Self {
        let hint = "a Python that has the package: .venv/bin/python, once `make wheel` has run";
        let python = required("P2PCLIENT_PYTHON", hint);
        let directory = tempfile::Builder::new().prefix("p2p-").tempdir().unwrap();
        let program = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/python_peer.py");
        let mut process = Command::new(python)
            .arg(program)
            .arg(pair.bob_daemon.control_maddr().to_string())
            .arg(format!("/unix{}/listen.sock", directory.path().display()))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let (sender, lines) = mpsc::unbounded_channel();
        let output = BufReader::new(process.stdout.take().unwrap());
        std::thread::spawn(move || {
            for line in output.lines().map_while(Result::ok) {
                if sender.send(line).is_err() {
                    break;
                }
            }
        });
        let mut python = Self {
            commands: process.stdin.take().unwrap(),
            process,
            lines,
            sent: 0,
            _directory: directory,
        };
        python.does("serve", &[("name", &json(name))], "true").await;
        python
    }

    /// Sends a command; returns its number.
    fn begin(&mut self, what: &str, how: &[(&str, &dyn Display)]) -> usize {
        self.sent += 1;
        let how = how
            .iter()
            .map(|(name, value)| format!(r#", "{name}": {value}"#));
        let how = how.collect::<String>();
        let command = format!(r#"{{"id": {}, "do": "{what}"{how}}}"#, self.sent);
        writeln!(self.commands, "{command}").unwrap();
        self.sent
    }

    /// Waits for this line of output, and fails on any other.
    async fn says(&mut self, line: &str) {
        let said = within(line, self.lines.recv()).await;
        assert_eq!(said.as_deref(), Some(line));
    }

    /// Sends a command and waits for its result.
    async fn does(&mut self, what: &str, how: &[(&str, &dyn Display)], result: &str) {
        let number = self.begin(what, how);
        self.says(&format!("[{number}, {result}]")).await;
    }

    /// Closes its standard input, and waits for its exit.
    fn end(mut self) {
        drop(self.commands);
        let status = self.process.wait().unwrap();
        assert!(status.success(), "{status}");
    }
}

/// Formats a string in JSON. For the strings used here Rust's escapes are the same.
fn json(text: impl Display) -> String {
    format!("{:?}", text.to_string())
}

#[tokio::test]
async fn streams_work_in_both_directions() {
    let pair = pair().await;
    let mut python = Python::serving(&pair, "streams").await;
    for size in SIZES {
        let payload = pattern(size, 3);
        let peer = pair.bob_daemon.peer_id();
        let received = echoed(&pair.alice, peer, "/python/streams", &payload).await;
        assert!(received == payload, "{size}");
    }

    let incoming = pair
        .alice
        .stream_handler("/rust/echo", false)
        .await
        .unwrap();
    let serving = tokio::spawn(echo_streams(incoming));
    let peer = json(pair.alice_daemon.peer_id());
    let protocol = json("/rust/echo");
    for size in SIZES {
        let how: [(_, &dyn Display); 3] =
            [("peer", &peer), ("protocol", &protocol), ("size", &size)];
        python.does("stream", &how, "true").await;
    }
    serving.abort();
    python.end();
}

#[tokio::test]
async fn unary_calls_work_in_both_directions() {
    let pair = pair().await;
    let mut python = Python::serving(&pair, "calls").await;
    let echo = async |call: UnaryCall| Ok::<_, Infallible>(call.payload);
    pair.alice
        .add_unary_handler("rust.echo", false, echo)
        .await
        .unwrap();
    let (peer, handler) = (json(pair.alice_daemon.peer_id()), json("rust.echo"));
    for size in SIZES {
        let payload = pattern(size, 4);
        let bob = pair.bob_daemon.peer_id();
        let call = pair
            .alice
            .call_unary(bob, "unary_echo.calls", payload.clone());
        assert!(
            within("the reply", call).await.unwrap() == payload,
            "{size}"
        );
        let how: [(_, &dyn Display); 3] = [("peer", &peer), ("handler", &handler), ("size", &size)];
        python.does("echo", &how, "true").await;
    }
    python.end();
}

#[tokio::test]
async fn handler_errors_arrive_with_their_message() {
    let pair = pair().await;
    let mut python = Python::serving(&pair, "errors").await;
    let (alice, bob) = (pair.alice_daemon.peer_id(), pair.bob_daemon.peer_id());
    let error = pair.alice.call_unary(bob, "fail.errors", "words").await;
    match error {
        Err(Error::HandlerFailed { message, .. }) => {
            assert_eq!(message, format!("ValueError('words from {alice}')"));
        }
        other => panic!("{other:?}"),
    }

    let fail = async |call: UnaryCall| -> Result<Vec<u8>, String> {
        Err(format!("{:?} from {}", call.payload, call.peer))
    };
    pair.alice
        .add_unary_handler("rust.fail", false, fail)
        .await
        .unwrap();
    let (peer, handler, text) = (json(alice), json("rust.fail"), json("words"));
    let message = json(format!("b\"words\" from {bob}"));
    let how: [(_, &dyn Display); 3] = [("peer", &peer), ("handler", &handler), ("text", &text)];
    let result = format!(r#"["P2PHandlerError", {message}]"#);
    python.does("call", &how, &result).await;
    python.end();
}

#[tokio::test]
async fn dropping_a_call_cancels_its_handler() {
    let pair = pair().await;
    let mut python = Python::serving(&pair, "given-up").await;
    let bob = pair.bob_daemon.peer_id();
    select! {
        _ = pair.alice.call_unary(bob, "endless.given-up", "") => panic!("it has ended"),
        () = python.says(r#""begun""#) => {}
    }
    python.says(r#""cancelled""#).await;

    let (endless, mut events) = endless();
    pair.alice
        .add_unary_handler("rust.endless", false, endless)
        .await
        .unwrap();
    let (peer, handler) = (json(pair.alice_daemon.peer_id()), json("rust.endless"));
    let how: [(_, &dyn Display); 3] = [("peer", &peer), ("handler", &handler), ("text", &"\"\"")];
    let call = python.begin("call", &how);
    assert_eq!(within("the call", events.recv()).await, Some("begun"));
    let cancel = python.begin("cancel", &[("call", &call)]);
    python.says(&format!("[{cancel}, true]")).await;
    python
        .says(&format!(r#"[{call}, ["CancelledError", ""]]"#))
        .await;
    assert_eq!(within("the cancel", events.recv()).await, Some("given up"));
    python.end();
}

#[tokio::test]
async fn rust_and_python_handlers_are_served_round_robin() {
    let pair = pair().await;
    let python = Python::serving(&pair, "turns").await;
    let name = async |_: UnaryCall| Ok::<_, Infallible>("Rust");
    pair.bob
        .add_unary_handler("say_python.turns", true, name)
        .await
        .unwrap();
    let mut names = Vec::new();
    for _ in 0..4 {
        let bob = pair.bob_daemon.peer_id();
        names.push(
            pair.alice
                .call_unary(bob, "say_python.turns", "")
                .await
                .unwrap(),
        );
    }
    names.sort();
    assert_eq!(names, ["Python", "Python", "Rust", "Rust"]);
    python.end();
}

#[tokio::test]
async fn pubsub_messages_arrive_in_both_directions() {
    let pair = pair().await;
    let mut python = Python::serving(&pair, "pubsub").await;
    let topic = json("of two languages");
    let text = json("to Python");
    let hearing = python.begin("hear", &[("topic", &topic), ("text", &text)]);
    python.says(r#""subscribed""#).await;
    // Subscribes on the same daemon, to learn when messages from the other daemon reach it.
    let mut news = pair.bob.pubsub_subscribe("of two languages").await.unwrap();
    hears(&mut news, &pair.alice, "of two languages").await;
    let sent = pair.alice.pubsub_publish("of two languages", "to Python");
    sent.await.unwrap();
    let sender = json(pair.alice_daemon.peer_id());
    python.says(&format!("[{hearing}, {sender}]")).await;

    let mut news = pair
        .alice
        .pubsub_subscribe("of two languages")
        .await
        .unwrap();
    hears(&mut news, &pair.bob, "of two languages").await;
    let text = json("to Rust");
    let how: [(_, &dyn Display); 2] = [("topic", &topic), ("text", &text)];
    python.does("publish", &how, "null").await;
    let message = next_message(&mut news).await;
    assert_eq!(message.data, "to Rust");
    assert_eq!(message.from.as_ref(), Some(pair.bob_daemon.peer_id()));
    python.end();
}
