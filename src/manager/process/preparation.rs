//! Chooses what a daemon gets before it is spawned: addresses, ports and identity.

use super::super::options::DaemonOptions;
use p2pd_protocol::endpoint::{Endpoint, Host};
use p2pd_protocol::Multiaddr;
use p2pd_sockets::Failed;
use std::fs::File;
use std::io::{self, Write as _};
use std::net::TcpListener;
use std::ops::Range;
use std::path::Path;

/// The ports to choose from: below the ephemeral port range of every system.
pub(super) const PORTS: Range<u16> = 20_000..32_000;

/// Returns a TCP port that was unused a moment ago, at an address or name of this machine.
///
/// The port is below the ephemeral port range, so the system does not assign it to another program
/// before the caller uses it.
///
/// # Errors
/// The machine has no such address, or all ports are in use.
#[doc(hidden)]
pub fn unused_tcp_port(host: &str) -> io::Result<u16> {
    for attempt in 0..100 {
        let offset = p2pd_sockets::random(attempt) % PORTS.len() as u64;
        let port = PORTS.start + offset as u16;
        match TcpListener::bind((host, port)) {
            Ok(_) => return Ok(port),
            Err(error) if error.kind() == io::ErrorKind::AddrInUse => {}
            Err(error) => return Err(error),
        }
    }
    let message = format!("no port is free at {host}");
    Err(io::Error::new(io::ErrorKind::AddrInUse, message))
}

/// Sets an identity and TCP ports that stay the same across restarts.
pub(super) fn make_repeatable(options: &mut DaemonOptions, directory: &Path) -> Result<(), Failed> {
    for address in &mut options.host_addrs {
        // For transports other than plain TCP, the daemon chooses the port.
        if let Ok(maddr) = address.parse() {
            *address = with_free_port(maddr)?.to_string();
        }
    }
    if options.identity.is_none() {
        let path = directory.join("identity.key");
        new_identity(&path).map_err(Failed::at(|| {
            format!("cannot write the identity file {}", path.display())
        }))?;
        options.identity = Some(path);
    }
    Ok(())
}

/// Writes a new secp256k1 private key in libp2p's encoding. Any 32 random bytes are a valid key,
/// except with a probability of 2^-128.
fn new_identity(path: &Path) -> io::Result<()> {
    let mut key = *b"\x08\x02\x12\x20--------------------------------";
    getrandom::fill(&mut key[4..]).map_err(|error| match error.raw_os_error() {
        Some(number) => io::Error::from_raw_os_error(number as _),
        None => io::Error::other(error.to_string()),
    })?;
    let mut options = File::options();
    options.write(true).create_new(true);
    #[cfg(unix)]
    std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
    options.open(path)?.write_all(&key)
}

/// Replaces TCP port 0 by an unused port, since not every daemon prints the port it was assigned.
pub(super) fn with_free_port(control: Multiaddr) -> Result<Multiaddr, Failed> {
    let host = match control.endpoint() {
        Ok(Endpoint::Tcp { host, port: 0 }) => host,
        _ => return Ok(control),
    };
    let ip = match &host {
        Host::Ip4(ip) => ip.to_string(),
        Host::Ip6(ip) => ip.to_string(),
        Host::Dns(_) | Host::Dns4(_) | Host::Dns6(_) => return Ok(control),
    };
    let port = unused_tcp_port(&ip).map_err(Failed::at(|| {
        format!("cannot find a free TCP port of {ip}")
    }))?;
    Ok((&Endpoint::Tcp { host, port }).into())
}

pub(super) fn default_control(directory: &Path) -> Multiaddr {
    if cfg!(unix) {
        unix_maddr(&directory.join("control.sock"))
    } else {
        loopback()
    }
}

pub(super) fn loopback() -> Multiaddr {
    (&Endpoint::from(std::net::SocketAddr::from(([127, 0, 0, 1], 0)))).into()
}

pub(super) fn unix_maddr(path: &Path) -> Multiaddr {
    (&Endpoint::Unix(path.display().to_string())).into()
}
