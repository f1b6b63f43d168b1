//! Arbitrary requests to a server.

use super::{bounded, pieces};
use bytes::Bytes;
use p2pd_protocol::{Command, Error, Limits, ServerExchange, State};

#[derive(Debug, PartialEq)]
struct Outcome {
    commands: Vec<Result<Command, Error>>,
    state: State,
    rest: Bytes,
}

/// Feeds a server, as a driver that refuses every request.
fn run(limits: Limits, bytes: &[u8], seed: u8) -> Outcome {
    let mut server = ServerExchange::new(limits);
    let mut commands = Vec::new();
    for piece in pieces(bytes, seed) {
        server.receive(piece);
        while let Some(command) = server.poll().transpose() {
            commands.push(command);
            if server.state() == State::Failed {
                break;
            }
            server.refuse("no").expect("it is being served");
        }
    }
    // After an error the remainder is unspecified.
    let failed = server.state() == State::Failed;
    Outcome {
        commands,
        state: server.state(),
        rest: if failed {
            Bytes::new()
        } else {
            server.into_remainder()
        },
    }
}

/// The bytes of a client. The input is a byte for the pieces, one for the limit, then the bytes.
pub fn commands(data: &[u8]) {
    let &[seed, limit, ref bytes @ ..] = data else {
        return;
    };
    let limits = Limits::default().with_max_frame(128 + usize::from(limit) * 64);
    let run = |bytes: &[u8], seed| bounded(bytes.len(), 160, || run(limits, bytes, seed));
    let outcome = run(bytes, 255);
    for seed in [0, seed] {
        assert_eq!(run(bytes, seed), outcome);
    }
    for command in outcome.commands.into_iter().flatten() {
        // Encoded here, the same request may be longer than the client's.
        let again = self::run(Limits::default(), &command.encode(), 255);
        assert_eq!(again.commands, [Ok(command)]);
        assert_eq!(again.state, State::Ready);
    }
}
