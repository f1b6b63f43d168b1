//! Tests of the options and the arguments they become.

use super::*;

const PEER: &str = "/ip4/127.0.0.1/tcp/4001/p2p/QmYyQSo1c1Ym7orWxLYvCrM2EmxFTANf8wXmmE7DWjhx5N";

fn everything(flavour: Flavour) -> DaemonOptions {
    DaemonOptions {
        flavour,
        control: Some("/unix/tmp/c.sock".parse().unwrap()),
        identity: Some("key".into()),
        host_addrs: vec!["/ip4/127.0.0.1/tcp/0".into(), "/ip6/::1/tcp/0".into()],
        announce_addrs: vec!["/dns4/example.org/tcp/4001".into()],
        bootstrap_peers: vec![PEER.into()],
        bootstrap: Bootstrap::Required,
        dht: Dht::Server,
        relay: Some(true),
        pubsub: Pubsub::Floodsub,
        connection_manager: ConnectionManager::Limits {
            low: 1,
            high: 2,
            grace: Duration::from_millis(1500),
        },
        extra_args: vec!["-q".into()],
        restart: 0,
    }
}

#[test]
fn default_options_pass_no_argument() {
    for flavour in [Flavour::Go, Flavour::Js] {
        let options = DaemonOptions {
            flavour,
            ..Default::default()
        };
        assert_eq!(options.arguments().unwrap(), [""; 0]);
    }
}

#[test]
fn passes_every_option_to_go() {
    let expected = [
        "-listen=/unix/tmp/c.sock",
        "-id=key",
        "-hostAddrs=/ip4/127.0.0.1/tcp/0,/ip6/::1/tcp/0",
        "-announceAddrs=/dns4/example.org/tcp/4001",
        &format!("-bootstrapPeers={PEER}"),
        "-b",
        "-dhtServer",
        "-relay=true",
        "-pubsub",
        "-pubsubRouter=floodsub",
        "-connManager",
        "-connLo=1",
        "-connHi=2",
        "-connGrace=1.5s",
        "-q",
    ];
    assert_eq!(everything(Flavour::Go).arguments().unwrap(), expected);
}

#[test]
fn passes_every_option_to_js() {
    let expected = [
        "--listen=/unix/tmp/c.sock",
        "--id=key",
        "--hostAddrs=/ip4/127.0.0.1/tcp/0,/ip6/::1/tcp/0",
        "--announceAddrs=/dns4/example.org/tcp/4001",
        &format!("--bootstrapPeers={PEER}"),
        "--bootstrap=true",
        "--dht=true",
        "--pubsub=true",
        "--pubsubRouter=floodsub",
        "--connMgr=true",
        "--connMgrLo=1",
        "--connMgrHi=2",
        "-q",
    ];
    assert_eq!(everything(Flavour::Js).arguments().unwrap(), expected);
}

#[test]
fn does_not_pass_background_peers_to_the_daemon() {
    for flavour in [Flavour::Go, Flavour::Js] {
        let options = DaemonOptions {
            flavour,
            bootstrap_peers: vec![PEER.into()],
            bootstrap: Bootstrap::Background,
            ..Default::default()
        };
        assert_eq!(options.arguments().unwrap(), [""; 0]);
    }
}

#[test]
fn parses_a_bootstrap_peer() {
    let peer = BootstrapPeer::parse(PEER).unwrap();
    assert_eq!(peer.addrs, ["/ip4/127.0.0.1/tcp/4001".parse().unwrap()]);
    assert!(PEER.ends_with(&peer.peer_id.to_string()));
    let relayed = format!("{PEER}/p2p-circuit/p2p/{}", peer.peer_id);
    let through = BootstrapPeer::parse(&relayed).unwrap().addrs;
    assert_eq!(through, [format!("{PEER}/p2p-circuit").parse().unwrap()]);
    let alone = BootstrapPeer::parse(&PEER[23..]).unwrap();
    assert_eq!((alone.peer_id, alone.addrs), (peer.peer_id, vec![]));
}

#[test]
fn names_an_invalid_bootstrap_peer_and_the_reason() {
    for (address, reason) in [
        ("/ip4/127.0.0.1/tcp/4001", "does not end in /p2p/<peer id>"),
        ("/ip4/300.0.0.1/tcp/4001/p2p/QmA", "300.0.0.1"),
        ("/ip4/127.0.0.1/tcp/4001/p2p/QmA", "QmA"),
        ("127.0.0.1:4001", "slash"),
    ] {
        let options = DaemonOptions {
            bootstrap_peers: vec![PEER.into(), address.into()],
            ..Default::default()
        };
        let error = options.validate().unwrap_err().to_string();
        assert!(error.contains(address) && error.contains(reason), "{error}");
        assert!(!error.contains(PEER), "{error}");
    }
}

#[test]
fn refuses_arguments_that_js_would_ignore() {
    let with = |arg: &str| {
        let options = DaemonOptions {
            flavour: Flavour::Js,
            extra_args: vec![arg.into()],
            ..Default::default()
        };
        options.arguments()
    };
    for arg in ["--nonsense", "--nonsense=1", "-muxer=yamux", "-x", "--"] {
        let flag = arg.split('=').next().unwrap();
        let expected = OptionsError::UnknownToJs(flag.into());
        let error = (flag != "--").then_some(expected);
        assert_eq!(with(arg).err(), error);
    }
    for arg in ["--quiet", "-q", "-bq", "--no-nat", "--pubsub=true", "value"] {
        assert_eq!(with(arg).unwrap(), [arg]);
    }
}

#[test]
fn passes_no_default_of_the_daemon() {
    let options = DaemonOptions {
        dht: true.into(),
        pubsub: true.into(),
        connection_manager: true.into(),
        ..Default::default()
    };
    assert_eq!(
        options.arguments().unwrap(),
        ["-dht", "-pubsub", "-connManager"]
    );
}

#[test]
fn passes_relay_off_and_the_dht_client_mode() {
    let options = DaemonOptions {
        dht: Dht::Client,
        relay: Some(false),
        ..Default::default()
    };
    assert_eq!(options.arguments().unwrap(), ["-dhtClient", "-relay=false"]);
}

#[test]
fn refuses_options_that_js_lacks() {
    let js = DaemonOptions {
        flavour: Flavour::Js,
        ..Default::default()
    };
    let client = DaemonOptions {
        dht: Dht::Client,
        ..js.clone()
    };
    assert_eq!(
        client.arguments(),
        Err(OptionsError::NotInJs("a DHT client (-dhtClient)"))
    );
    let relay = DaemonOptions {
        relay: Some(false),
        ..js
    };
    assert_eq!(
        relay.arguments(),
        Err(OptionsError::NotInJs(
            "switching the relay off (-relay=false)"
        ))
    );
}

#[test]
fn refuses_an_empty_address_or_one_with_a_comma() {
    for address in ["/ip4/127.0.0.1/tcp/0,/ip4/0.0.0.0/tcp/0", ""] {
        let options = DaemonOptions {
            host_addrs: vec![address.into()],
            ..Default::default()
        };
        let error = OptionsError::Address {
            option: "host_addrs",
            address: address.into(),
        };
        assert_eq!(options.arguments(), Err(error));
    }
}

#[test]
fn refuses_an_invalid_control_address() {
    let options = DaemonOptions {
        control: Some("/ip4/127.0.0.1/udp/1".parse().unwrap()),
        ..Default::default()
    };
    let error = options.validate().unwrap_err().to_string();
    assert!(
        error.contains("/ip4/127.0.0.1/udp/1 cannot be a control"),
        "{error}"
    );
}

#[test]
fn refuses_a_low_mark_above_the_high_mark() {
    let limits = ConnectionManager::Limits {
        low: 3,
        high: 2,
        grace: Duration::ZERO,
    };
    let options = DaemonOptions {
        connection_manager: limits,
        ..Default::default()
    };
    assert_eq!(
        options.validate(),
        Err(OptionsError::WaterMarks { low: 3, high: 2 })
    );
}

#[test]
#[cfg(unix)]
fn refuses_a_path_that_is_not_utf8() {
    use std::os::unix::ffi::OsStrExt as _;
    let path = Path::new(OsStr::from_bytes(b"key-\xff"));
    let options = DaemonOptions {
        identity: Some(path.into()),
        ..Default::default()
    };
    assert_eq!(
        options.arguments(),
        Err(OptionsError::Identity(path.into()))
    );
}

#[test]
fn refuses_extra_args_that_move_the_control_socket() {
    for arg in ["-listen=/unix/x", "--listen=/unix/x", "-listen"] {
        let options = DaemonOptions {
            extra_args: vec![arg.into()],
            ..Default::default()
        };
        assert_eq!(
            options.validate(),
            Err(OptionsError::ControlInExtraArgs(arg.into()))
        );
    }
    let others = ["-listenWell".to_string(), "listen=1".to_string()];
    let options = DaemonOptions {
        extra_args: others.to_vec(),
        ..Default::default()
    };
    assert_eq!(options.arguments().unwrap(), others);
}

#[test]
fn tells_the_flavour_from_the_binarys_name() {
    assert_eq!(Flavour::of(Path::new("/usr/bin/p2pd")), Flavour::Go);
    assert_eq!(
        Flavour::of(Path::new("node_modules/.bin/jsp2pd")),
        Flavour::Js
    );
    assert_eq!(Flavour::of(Path::new("/opt/jsp2pd/p2pd")), Flavour::Go);
}
