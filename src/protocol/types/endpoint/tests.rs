//! Multiaddrs as endpoints, and back.

use super::*;
use bytes::Bytes;

fn parse(text: &str) -> Multiaddr {
    text.parse()
        .unwrap_or_else(|error| panic!("{text}: {error}"))
}

#[test]
fn endpoints_are_unix_sockets_and_tcp_ports() {
    let endpoint = |text: &str| parse(text).endpoint().unwrap();
    let tcp = |host, port| Endpoint::Tcp { host, port };
    assert_eq!(endpoint("/unix/tmp/x"), Endpoint::Unix("/tmp/x".into()));
    assert_eq!(
        endpoint("/ip4/0.0.0.0/tcp/0"),
        tcp(Host::Ip4(Ipv4Addr::UNSPECIFIED), 0)
    );
    assert_eq!(
        endpoint("/ip6/::1/tcp/65535"),
        tcp(Host::Ip6(Ipv6Addr::LOCALHOST), 65535)
    );
    assert_eq!(endpoint("/dns/h/tcp/1"), tcp(Host::Dns("h".into()), 1));
    for text in [
        "/unix/a/b",
        "/ip4/1.2.3.4/tcp/5",
        "/ip6/::1/tcp/5",
        "/dns/h/tcp/1",
        "/dns4/h/tcp/1",
        "/dns6/h/tcp/1",
    ] {
        assert_eq!(Multiaddr::from(&endpoint(text)), parse(text));
    }
    let bound: SocketAddr = "127.0.0.1:4".parse().unwrap();
    assert_eq!(Endpoint::from(bound), endpoint("/ip4/127.0.0.1/tcp/4"));
}

#[test]
fn refuses_other_addresses_with_the_reason() {
    use NotAnEndpoint as N;
    let reason = |text: &str| parse(text).endpoint().unwrap_err().reason;
    assert_eq!(
        reason("/p2p/QmS5QmciTXXnCUCyxud5eWFenUMAmvAWSDa1c7dvdXRMZ7"),
        N::NoHost("p2p")
    );
    assert_eq!(reason("/tcp/80"), N::NoHost("tcp"));
    assert_eq!(reason("/ip4/1.2.3.4"), N::NoPort);
    assert_eq!(reason("/ip4/1.2.3.4/udp/5"), N::NotTcp("udp"));
    assert_eq!(reason("/ip4/1.2.3.4/tcp/5/ws"), N::Trailing("ws"));
    assert_eq!(reason("/ip4/1.2.3.4/tcp/5/unix/x"), N::Trailing("unix"));
    assert_eq!(reason("/unix/a\0b"), N::NulInPath);
    assert_eq!(
        reason(&format!("/unix/{}", "x".repeat(120))),
        N::PathTooLong(121)
    );
    let empty = Multiaddr::from_bytes(Bytes::new()).endpoint().unwrap_err();
    assert_eq!(empty.reason, N::Multiaddr(MultiaddrError::Empty));
    assert_eq!(
        parse("/ip4/1.2.3.4/udp/5")
            .endpoint()
            .unwrap_err()
            .to_string(),
        "/ip4/1.2.3.4/udp/5 cannot be a control or listen address: its transport is udp \
         rather than tcp (expected /unix/PATH or /ip4|ip6|dns|dns4|dns6/HOST/tcp/PORT)"
    );
}
