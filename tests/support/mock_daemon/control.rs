//! Serves control connections.

use super::input::Input;
use super::limits::{MAX_FRAME, MAX_HANDLERS};
use super::shared::{Failure, Shared};
use super::streams::Service;
use super::unary;
use crate::lock::lock;
use crate::socket::Socket;
use p2pd_protocol::command::{connmgr, control, streams, unary::Upgrade, Command};
use p2pd_protocol::{Error, Limits, ServerExchange};
use std::io::Write as _;

/// Serves a connection until it ends.
pub(super) fn serve(mut socket: &Socket, shared: &Shared) -> Result<(), Failure> {
    use connmgr::Command as ConnManager;
    use control::Command as Control;
    use streams::Command as Streams;
    let mut exchange = ServerExchange::new(Limits::default().with_max_frame(MAX_FRAME));
    let mut input = Input::default();
    loop {
        let command = match exchange.poll() {
            Ok(Some(command)) => command,
            Ok(None) => {
                if input.fill(socket, &mut [])? == 0 {
                    return Ok(());
                }
                exchange.receive(input.take());
                continue;
            }
            Err(error @ Error::UnknownRequest(_)) => {
                socket.write_all(&exchange.refuse(&error.to_string())?)?;
                continue;
            }
            Err(error) => return Err(error.into()),
        };
        let answer = match command {
            Command::Control(Control::Identify(_)) => {
                exchange.replied::<control::Identify>()?;
                shared.identify.clone()
            }
            Command::Control(Control::ListPeers(_)) => {
                exchange.reply::<control::ListPeers>(&shared.peers)?
            }
            Command::Control(Control::Connect(_)) => exchange.reply::<control::Connect>(&())?,
            Command::Control(Control::Disconnect(_)) => {
                exchange.reply::<control::Disconnect>(&())?
            }
            Command::ConnManager(ConnManager::TagPeer(_)) => {
                exchange.reply::<connmgr::TagPeer>(&())?
            }
            Command::ConnManager(ConnManager::UntagPeer(_)) => {
                exchange.reply::<connmgr::UntagPeer>(&())?
            }
            Command::ConnManager(ConnManager::Trim(_)) => exchange.reply::<connmgr::Trim>(&())?,
            Command::Streams(Streams::StreamOpen(open)) => {
                match Service::find(&open.protocols, shared) {
                    Ok((service, info)) => {
                        socket.write_all(&exchange.reply::<streams::StreamOpen>(&info)?)?;
                        return service.run(socket, Input::of(&exchange.into_remainder()));
                    }
                    Err(message) => exchange.refuse(&message)?,
                }
            }
            Command::Streams(Streams::StreamHandler(request)) => {
                let mut handlers = lock(&shared.stream_handlers);
                if handlers.len() + request.protocols.len() > MAX_HANDLERS {
                    exchange.refuse("too many handlers")?
                } else {
                    let names = request.protocols.into_iter();
                    handlers.extend(names.map(|name| (name, request.addr.clone())));
                    exchange.reply::<streams::StreamHandler>(&())?
                }
            }
            Command::Streams(Streams::RemoveStreamHandler(request)) => {
                let mut handlers = lock(&shared.stream_handlers);
                handlers.retain(|name, _| !request.protocols.contains(name));
                exchange.reply::<streams::RemoveStreamHandler>(&())?
            }
            Command::Unary(_) => {
                socket.write_all(&exchange.reply::<Upgrade>(&())?)?;
                let input = Input::of(&exchange.into_remainder());
                return unary::serve(socket.try_clone()?, shared, input);
            }
            other => exchange.refuse(&format!("the mock daemon has no {}", other.name()))?,
        };
        socket.write_all(&answer)?;
    }
}
