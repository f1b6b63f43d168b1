//! Tests of the diagnosis of a daemon's output.

use super::*;

fn cause(output: &str, arguments: &[&str]) -> Option<String> {
    let arguments: Vec<_> = arguments
        .iter()
        .map(|argument| argument.to_string())
        .collect();
    diagnose(output, Some(1), &arguments)
}

#[test]
fn reads_the_output_of_a_started_daemon() {
    let output = "Control socket: /unix/tmp/c.sock\nPeer ID: QmA\nPeer Addrs:\n\
                  /ip4/127.0.0.1/tcp/1\n/ip6/::1/tcp/2\nBootstrap peers:\n/ip4/1.2.3.4/tcp/3\n";
    let startup = Startup {
        started: true,
        control_socket: Some("/unix/tmp/c.sock".into()),
        peer_id: Some("QmA".into()),
        peer_addrs: vec!["/ip4/127.0.0.1/tcp/1".into(), "/ip6/::1/tcp/2".into()],
    };
    assert_eq!(Startup::read(output), startup);
}

#[test]
fn ignores_an_incomplete_line() {
    let startup = Startup::read("Control socket: /unix/c.sock\nPeer ID: QmYyQSo1c1Ym7orWx");
    assert_eq!(startup.control_socket.as_deref(), Some("/unix/c.sock"));
    assert_eq!(startup.peer_id, None);
    assert!(!startup.started);
}

#[test]
fn reads_jsp2pds_start_without_a_peer_id() {
    let startup = Startup {
        started: true,
        ..Startup::default()
    };
    assert_eq!(Startup::read("daemon has started\n"), startup);
}

#[test]
fn excerpt_is_the_end_without_the_list_of_flags() {
    assert_eq!(excerpt("a\n\nb\nc  \n", 2), ["b", "c"]);
    assert_eq!(
        excerpt("flag x\nUsage of p2pd:\n  -a\n    \tthe a\n", 20),
        ["flag x"]
    );
    assert!(excerpt("", 20).is_empty());
}

#[test]
fn finds_the_cause_of_each_known_message() {
    let time = "2026/11/21 04:24:53";
    for (line, arguments, expected) in [
        ("listen tcp4 127.0.0.1:39791: bind: address already in use", vec![],
         "127.0.0.1:39791 is already in use"),
        ("failed to listen on any addresses: [listen tcp4 127.0.0.1:39: bind: address already in use]",
         vec![], "127.0.0.1:39 is already in use"),
        ("failed to listen on any addresses: [listen tcp4 8.8.8.8:0: bind: cannot assign requested address]",
         vec![], "8.8.8.8:0 is not an address of this machine"),
        ("listen tcp4 127.0.0.1:1: bind: permission denied", vec![],
         "no permission to listen on 127.0.0.1:1"),
        ("listen unix /no/x.sock: bind: no such file or directory", vec![],
         "the directory of /no/x.sock does not exist"),
        ("listen unix /tmp/long.sock: bind: invalid argument", vec![],
         "/tmp/long.sock is too long for the path of a socket"),
        ("listen tcp4 127.0.0.1:1: bind: no buffer space", vec![],
         "cannot listen on 127.0.0.1:1: no buffer space"),
        ("failed to parse multiaddr \"/foo\": unknown protocol foo", vec![],
         "failed to parse multiaddr \"/foo\": unknown protocol foo"),
        ("failed to connect to bootstrap peers", vec!["-b", "-bootstrapPeers=/a,/b"],
         "no bootstrap peer could be reached: /a,/b"),
        ("failed to connect to bootstrap peers", vec!["-b"],
         "no bootstrap peer could be reached: the built-in list of IPFS's"),
        ("invalid p2p multiaddr", vec!["-bootstrapPeers=/tcp/1/p2p/Qm,/tcp/2"],
         "a bootstrap peer must end in /p2p/<peer id>: /tcp/2"),
        ("open key: permission denied", vec!["-id=key"],
         "cannot read the identity file key: permission denied"),
        ("read key: is a directory", vec!["--id=key"],
         "cannot read the identity file key: is a directory"),
        ("proto: cannot parse invalid wire-format data", vec!["-id=key"],
         "the identity file key holds no private key of libp2p: \
          proto: cannot parse invalid wire-format data"),
        ("can't have autorelay enabled", vec![], "can't have autorelay enabled"),
    ] {
        let output = format!("Something before\n{time} {line}\n");
        assert_eq!(cause(&output, &arguments).as_deref(), Some(expected), "{line}");
    }
}

#[test]
fn finds_causes_without_a_timestamp() {
    let flags = "flag provided but not defined: -nope\nUsage of p2pd:\n  -a string\n";
    assert_eq!(
        cause(flags, &[]).unwrap(),
        "this daemon has no option -nope"
    );
    let value = "invalid value \"5\" for flag -connGrace: parse error";
    assert_eq!(
        cause(&format!("{value}\nUsage of p2pd:\n  -a\n"), &[]).unwrap(),
        value
    );
    let node = "Error: listen EADDRINUSE: address already in use 127.0.0.1:5\n    at Server\n";
    assert_eq!(cause(node, &[]).unwrap(), "127.0.0.1:5 is already in use");
    let node = "Error: listen EACCES: permission denied /no/x.sock\n    at Server\n";
    assert_eq!(
        cause(node, &[]).unwrap(),
        "no permission to listen on /no/x.sock, or its directory does not exist"
    );
    let node =
        "/d.js:4\n  conn.remoteAddr\n\nTypeError: it is null\n    at /d.js:4\n\nNode.js v20\n";
    assert_eq!(cause(node, &[]).unwrap(), "TypeError: it is null");
    let node = "Error: ENOENT: no such file or directory, open 'key'\n    at f {\n  errno: -2\n}";
    let identity = "cannot read the identity file key: no such file or directory";
    assert_eq!(cause(node, &["--id=key"]).unwrap(), identity);
    let panic = "panic: no\n\ngoroutine 1 [running]:\nmain.main()\n";
    assert_eq!(cause(panic, &[]).unwrap(), "panic: no");
    for line in [
        "Exec format error",
        "p2pd: cannot execute binary file: Exec format error",
    ] {
        assert!(cause(line, &[])
            .unwrap()
            .starts_with("the binary is not for this machine ("));
    }
}

#[test]
fn tells_a_cause_from_the_exit_status() {
    assert!(diagnose("", Some(-9), &[])
        .unwrap()
        .starts_with("something killed it"));
    assert_eq!(
        diagnose("", Some(127), &[]).unwrap(),
        "a command was not found"
    );
    assert_eq!(
        diagnose("", Some(126), &[]).unwrap(),
        "the binary cannot be executed"
    );
    let peers = ["-bootstrapPeers=/ip4/192.0.2.1/tcp/1/p2p/Qm".to_string()];
    let waiting = diagnose("", None, &peers).unwrap();
    assert!(
        waiting.ends_with("bootstrap peers: /ip4/192.0.2.1/tcp/1/p2p/Qm"),
        "{waiting}"
    );
}

#[test]
fn gives_a_hint_for_each_cause() {
    let time = "2026/11/21 04:24:53";
    let arguments = ["-bootstrapPeers=/a".to_string(), "-id=key".to_string()];
    for (line, expected) in [
        (
            "listen tcp4 127.0.0.1:39: bind: address already in use",
            "port 0",
        ),
        (
            "listen tcp4 8.8.8.8:0: bind: cannot assign requested address",
            "0.0.0.0",
        ),
        ("listen tcp4 127.0.0.1:1: bind: permission denied", "1024"),
        (
            "listen unix /no/x.sock: bind: no such file or directory",
            "create the directory",
        ),
        (
            "listen unix /tmp/long.sock: bind: invalid argument",
            "shorter",
        ),
        (
            "listen tcp4 127.0.0.1:1: bind: no buffer space",
            "another address",
        ),
        (
            "failed to parse multiaddr \"/foo\": unknown protocol foo",
            "correct that address",
        ),
        ("failed to connect to bootstrap peers", "background"),
        ("invalid p2p multiaddr", "/p2p/"),
        ("open key: permission denied", "permissions"),
        ("proto: cannot parse invalid wire-format data", "protobuf"),
        ("flag provided but not defined: -nope", "newer daemon"),
        (
            "invalid value \"5\" for flag -connGrace: parse error",
            "correct the value",
        ),
        ("Exec format error", "P2PD_PATH"),
        ("panic: no", "bug in the daemon"),
        ("fatal error: no", "bug in the daemon"),
    ] {
        let cause = diagnose(&format!("{time} {line}\n"), Some(1), &arguments).unwrap();
        let hint = hint(&cause).unwrap_or_else(|| panic!("none for {cause}"));
        assert!(
            hint.contains(expected) && !hint.contains('\n'),
            "{cause}: {hint}"
        );
    }
    for status in [-9, 126, 127] {
        assert!(hint(&diagnose("", Some(status), &[]).unwrap()).is_some());
    }
    assert!(hint(&diagnose("", None, &arguments).unwrap()).is_some());
    assert_eq!(hint("can't have autorelay enabled"), None);
}

#[test]
fn gives_the_systems_hint_for_the_systems_errors() {
    let no_thread = |number| {
        format!(
            "runtime: failed to create new OS thread (have 5 already; errno={number})\n\
             runtime: may need to increase max user processes (ulimit -u)\n\
             fatal error: newosproc\n\ngoroutine 1 [running]:\nmain.main()"
        )
    };
    let time = "2026/11/21 04:24:53";
    for (output, expected) in [
        (no_thread(11), "ulimit -u"),
        (no_thread(12), "free some memory"),
        ("fatal error: newosproc".into(), "ulimit -u"),
        (
            "runtime/cgo: pthread_create failed: Resource temporarily unavailable\n\
             SIGABRT: abort\nPC=0x1 m=0 sigcode=0"
                .into(),
            "ulimit -u",
        ),
        ("p2pd: 3: Cannot fork".into(), "ulimit -u"),
        (
            "fatal error: runtime: out of memory".into(),
            "free some memory",
        ),
        (
            "FATAL ERROR: Reached heap limit Allocation failed - JavaScript heap out of memory"
                .into(),
            "free some memory",
        ),
        (
            "fatal error: runtime: cannot allocate memory".into(),
            "free some memory",
        ),
        (
            "panic: write /d/key: no space left on device".into(),
            "free some space",
        ),
        (
            format!("{time} write /d/key: no space left on device"),
            "free some space",
        ),
        (
            format!("{time} listen tcp4 127.0.0.1:1: bind: too many open files"),
            "ulimit -n",
        ),
        (
            format!("{time} failed to listen: [listen tcp4 :0: socket: too many open files]"),
            "ulimit -n",
        ),
        ("panic: pipe: too many open files".into(), "ulimit -n"),
    ] {
        let cause = cause(&format!("before\n{output}\n"), &[]);
        let cause = cause.unwrap_or_else(|| panic!("none for {output}"));
        let hint = hint(&cause).unwrap_or_else(|| panic!("none for {cause}"));
        assert!(hint.contains(expected), "{cause}: {hint}");
    }
    assert_eq!(
        cause(&no_thread(11), &[]).unwrap(),
        "fatal error: newosproc: failed to create new OS thread (have 5 already; errno=11)"
    );
}

#[test]
fn searches_only_the_end_of_a_large_output() {
    let noise = "goroutine 7 [chan receive]:\n".repeat(END / 20);
    let early = format!("this daemon\nflag provided but not defined: -nope\n{noise}");
    assert_eq!(cause(&early, &[]), None);
    let late = format!("{noise}flag provided but not defined: -nope\n");
    assert_eq!(
        cause(&late, &[]).unwrap(),
        "this daemon has no option -nope"
    );
    for (crash, expected) in [
        (
            "fatal error: all goroutines are asleep",
            "fatal error: all goroutines are asleep",
        ),
        ("no panic: here\npanic: this", "panic: this"),
        (
            "runtime: failed to create new OS thread (errno=11)\nfatal error: newosproc",
            "fatal error: newosproc: failed to create new OS thread (errno=11)",
        ),
    ] {
        let output = format!("Peer ID: QmA\n{crash}\n\n{noise}");
        assert_eq!(cause(&output, &[]).unwrap(), expected);
    }
    let letters = format!("a{}", "€".repeat(END));
    assert_eq!(end_of(&letters).chars().count(), END / 3);
}

#[test]
fn makes_no_cause_up() {
    assert_eq!(diagnose("", Some(1), &[]), None);
    assert_eq!(diagnose("", None, &[]), None);
    assert_eq!(diagnose("Peer ID: QmA\n", Some(3), &[]), None);
    assert_eq!(diagnose("2026/11/21 04:24:53 bye", Some(0), &[]), None);
    assert_eq!(cause("open other: permission denied", &["-id=key"]), None);
}
