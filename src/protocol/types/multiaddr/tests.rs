//! Multiaddrs as text and as bytes.

use super::*;
use crate::types::peer_id::PeerId;
use proptest::prelude::*;
use std::net::{Ipv4Addr, Ipv6Addr};

const PEER: &str = "QmS5QmciTXXnCUCyxud5eWFenUMAmvAWSDa1c7dvdXRMZ7";

fn parse(text: &str) -> Multiaddr {
    text.parse()
        .unwrap_or_else(|error| panic!("{text}: {error}"))
}

fn refusal(text: &str) -> MultiaddrError {
    text.parse::<Multiaddr>().expect_err(text)
}

#[test]
fn unix_path_is_the_rest_of_the_address_with_a_leading_slash() {
    let addr = parse("/unix/tmp/p2pd.sock");
    assert_eq!(addr.as_bytes(), b"\x90\x03\x0e/tmp/p2pd.sock");
    assert_eq!(addr.to_string(), "/unix/tmp/p2pd.sock");
    let parts = addr.components().unwrap();
    assert_eq!(parts[0].value.as_deref(), Some("/tmp/p2pd.sock"));
    // As Go does with an absolute path pasted after "/unix/".
    assert_eq!(parse("/unix//tmp/x").as_bytes(), b"\x90\x03\x07//tmp/x");
    assert_eq!(parse("/unix//tmp/x").to_string(), "/unix//tmp/x");
    let after_tcp = parse("/ip4/1.2.3.4/tcp/80/unix/a/tcp");
    assert_eq!(
        after_tcp.protocols().unwrap(),
        [(4, "ip4"), (6, "tcp"), (400, "unix")]
    );
}

#[test]
fn unix_path_without_leading_slash_is_made_absolute() {
    let relative = Multiaddr::from_bytes(&b"\x04\x01\x02\x03\x04\x90\x03\x03a/b"[..]);
    assert_eq!(relative.to_string(), "/ip4/1.2.3.4/unix/a/b");
    assert_ne!(relative, parse("/ip4/1.2.3.4/unix/a/b"));
    assert_eq!(
        relative.with_absolute_path(),
        parse("/ip4/1.2.3.4/unix/a/b")
    );
    // 0x90 0x03 as part of something else, and nothing there to change.
    for same in ["/ip4/1.2.144.3/tcp/1", "/tcp/36867", "/unix/a"] {
        assert_eq!(parse(same).with_absolute_path(), parse(same));
    }
}

#[test]
fn text_round_trips() {
    for text in [
        "/ip4/127.0.0.1/udp/9/quic-v1",
        "/ip6/::1/tcp/80/ws",
        "/ip6zone/eth0/ip6/fe80::1/tcp/1",
        "/dns4/example.com/tcp/443/tls/sni/example.com/ws",
        "/dnsaddr/bootstrap.libp2p.io/p2p/QmS5QmciTXXnCUCyxud5eWFenUMAmvAWSDa1c7dvdXRMZ7",
        "/p2p/QmS5QmciTXXnCUCyxud5eWFenUMAmvAWSDa1c7dvdXRMZ7/p2p-circuit",
        "/memory/3",
        "/ip4/1.2.3.4/tcp/1/http/http-path/a%2Fb",
        "/onion3/vww6ybal4bd7szmgncyruucpgfkqahzddi37ktceo3ah7ngmcopnpyyd:1234",
    ] {
        assert_eq!(parse(text).to_string(), text);
    }
    assert_eq!(
        parse("/ip4/1.2.3.4/tcp/80/").to_string(),
        "/ip4/1.2.3.4/tcp/80"
    );
    let cid = parse(
        PEER.parse::<PeerId>()
            .map(|p| format!("/p2p/{}", p.to_cid()))
            .as_deref()
            .unwrap(),
    );
    assert_eq!(cid, parse(&format!("/ipfs/{PEER}")));
    assert_eq!(cid.to_string(), format!("/p2p/{PEER}"));
}

#[test]
fn refuses_invalid_text_with_the_reason() {
    use MultiaddrError as E;
    assert_eq!(refusal(""), E::Empty);
    assert_eq!(refusal("//"), E::Empty);
    assert_eq!(refusal("ip4/1.2.3.4"), E::NoLeadingSlash);
    assert_eq!(refusal("/nope/1"), E::UnknownProtocol("nope".into()));
    assert_eq!(
        refusal("/ip4/1.2.3.4//tcp/1"),
        E::UnknownProtocol(String::new())
    );
    assert_eq!(refusal("/unix/"), E::MissingValue("unix".into()));
    assert_eq!(refusal("/ip4/1.2.3.4/tcp"), E::MissingValue("tcp".into()));
    for (text, named) in [
        ("/ip4/1.2.3/tcp/1", "\"1.2.3\" is no value for ip4"),
        (
            "/ip4/1.2.3.4/tcp/65536",
            "\"65536\" is no value for tcp: number too large",
        ),
        ("/ip4/1.2.3.4/tcp/-1", "\"-1\" is no value for tcp"),
        ("/dns//tcp/1", "\"\" is no value for dns"),
        ("/p2p/Qm0", "\"Qm0\" is no value for p2p: it is not base58"),
        ("/p2p/QmS5", "no value for p2p: its multihash declares"),
        ("/certhash/u", "no value for certhash"),
    ] {
        let message = refusal(text).to_string();
        assert!(message.contains(named), "{text}: {message}");
    }
}

#[test]
fn keeps_unknown_protocols_and_refuses_malformed_bytes() {
    let unknown = Multiaddr::from_bytes(&b"\x04\x01\x02\x03\x04\xff\xff\x03abc"[..]);
    assert_eq!(unknown.to_string(), "/ip4/1.2.3.4/unknown/ffff03616263");
    assert_eq!(unknown.protocols(), Err(MultiaddrError::UnknownCode(65535)));
    assert_eq!(unknown.validate(), Ok(()));
    for bad in [
        &b"\x04\x01"[..],
        b"\x90\x03\x05tmp",
        b"\x90\x03\x00",
        b"\x90\x03\x02//",
        b"\x90\x03\x02\xff\xfe",
        b"\x90\x03\x01a\x06\x00\x50",
        b"\x36\x03a/b",
        b"\x80",
        b"",
    ] {
        assert!(Multiaddr::from_bytes(bad).validate().is_err(), "{bad:?}");
    }
}

/// Texts of which many parse: what the daemons use, in any order.
fn text() -> impl Strategy<Value = String> {
    let part = prop_oneof![
        any::<Ipv4Addr>().prop_map(|ip| format!("/ip4/{ip}")),
        any::<Ipv6Addr>().prop_map(|ip| format!("/ip6/{ip}")),
        any::<u16>().prop_map(|port| format!("/tcp/{port}")),
        any::<u16>().prop_map(|port| format!("/udp/{port}")),
        "[a-z.]{0,9}".prop_map(|name| format!("/dns4/{name}")),
        "[a-z%/]{0,9}".prop_map(|path| format!("/http-path/{path}")),
        "[a-z ]{0,9}".prop_map(|path| format!("/x-parity-ws/{path}")),
        prop::sample::select(vec!["/ws", "/quic-v1", "/p2p-circuit", "/ipcidr/24", "/"])
            .prop_map(str::to_owned),
    ];
    (
        prop::collection::vec(part, 0..5),
        prop::option::of("/unix/[a-z/ ]{0,12}"),
    )
        .prop_map(|(parts, unix)| parts.concat() + &unix.unwrap_or_default())
}

proptest! {
    #[test]
    fn parsed_text_round_trips(text in text()) {
        if let Ok(addr) = text.parse::<Multiaddr>() {
            prop_assert_eq!(addr.validate(), Ok(()));
            prop_assert_eq!(&parse(&addr.to_string()), &addr);
            let parts = addr.components().unwrap();
            let bytes: Vec<u8> = parts.iter().flat_map(|part| part.bytes).copied().collect();
            prop_assert_eq!(bytes, addr.as_bytes());
        }
    }

    #[test]
    fn arbitrary_bytes_do_not_panic(
        bytes in prop::collection::vec(any::<u8>(), 0..60),
        code in prop::sample::select(vec![4_u32, 6, 41, 42, 53, 400, 421, 444, 445, 446, 447, 466, 481, 4770]),
    ) {
        let mut prefixed = encode::u32(code, &mut encode::u32_buffer()).to_vec();
        prefixed.extend_from_slice(&bytes);
        for bytes in [bytes, prefixed] {
            let addr = Multiaddr::from_bytes(bytes);
            let readable = addr.components().is_ok();
            prop_assert_eq!(addr.to_string().contains("/unknown/"), !readable);
            let _ = (addr.endpoint(), addr.clone().with_absolute_path());
        }
    }

    #[test]
    fn arbitrary_text_does_not_panic(text in "\\PC{0,60}", value in "[ -~]{0,20}") {
        let _ = text.parse::<Multiaddr>();
        for name in ["ip4", "ip6", "tcp", "p2p", "unix", "certhash", "onion", "garlic64", "memory"] {
            let _ = format!("/{name}/{value}").parse::<Multiaddr>();
        }
    }
}
