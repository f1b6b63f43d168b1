//! The command line, compared with the texts that the Go daemons print.

use super::*;

fn parse(arguments: &[&str]) -> Result<Flags, Refused> {
    let arguments: Vec<_> = arguments.iter().map(|&text| text.to_owned()).collect();
    Flags::parse("p2pd", &arguments)
}

fn refusal(argument: &str) -> String {
    match parse(&[argument]) {
        Err(Refused::Invalid(text)) => text.lines().next().unwrap_or_default().to_owned(),
        other => panic!("{argument}: {other:?}"),
    }
}

#[test]
fn reads_each_form_of_a_flag() {
    for arguments in [
        &["-listen", "/unix/a", "-b"][..],
        &["--listen=/unix/a", "--b=1"],
        &["-listen=/unix/a", "-b=true", "--", "-listen=/unix/b"],
        &["-b", "-listen=/unix/a", "0", "-listen=/unix/b"],
    ] {
        let flags = parse(arguments).unwrap();
        assert_eq!(flags.text("listen"), "/unix/a", "{arguments:?}");
        assert!(flags.is("b"), "{arguments:?}");
    }
}

#[test]
fn has_the_defaults_of_the_go_daemons() {
    let flags = parse(&[]).unwrap();
    assert_eq!(flags.text("listen"), "/unix/tmp/p2pd.sock");
    assert_eq!(flags.number("persistentConnMaxMsgSize"), 4 << 20);
    assert_eq!(flags.number("connGrace"), 120_000_000_000);
    assert!(flags.is("noise") && flags.is("tls") && !flags.is("b"));
}

#[test]
fn refuses_with_the_messages_of_go() {
    for (argument, words) in [
        ("-x", "flag provided but not defined: -x"),
        ("--x=1", "flag provided but not defined: -x"),
        (
            "-dht=7",
            "invalid boolean value \"7\" for -dht: parse error",
        ),
        (
            "-connLo=x",
            "invalid value \"x\" for flag -connLo: parse error",
        ),
        (
            "-connLo=99999999999999999999",
            "invalid value \"99999999999999999999\" for flag -connLo: value out of range",
        ),
        (
            "-connGrace=5",
            "invalid value \"5\" for flag -connGrace: parse error",
        ),
        ("-connLo", "flag needs an argument: -connLo"),
        ("-=x", "bad flag syntax: -=x"),
        ("---x", "bad flag syntax: ---x"),
        (
            "-pprofPort=-1",
            "invalid value \"-1\" for flag -pprofPort: parse error",
        ),
    ] {
        assert_eq!(refusal(argument), words);
    }
}

#[test]
fn explains_all_flags_in_the_layout_of_go() {
    let Err(Refused::Help(usage)) = parse(&["-help"]) else {
        panic!("-help must not start the daemon");
    };
    assert!(usage.starts_with("Usage of p2pd:\n  -announceAddrs string\n    \tcomma separated"));
    assert!(usage.contains("\n  -b\tconnects to bootstrap peers"));
    assert!(usage.contains("(default \"/unix/tmp/p2pd.sock\")"));
    assert!(usage.contains("(default 2m0s)"));
}

#[test]
fn reads_numbers_and_durations_as_go_does() {
    let number = |text: &str| Value::parse(Kind::Int, text);
    for (text, expected) in [
        ("0x10", 16),
        ("1_000", 1000),
        ("-7", -7),
        ("010", 8),
        ("0b11", 3),
    ] {
        assert_eq!(number(text), Ok(Value::Int(expected)), "{text}");
    }
    for text in ["", "-", "1__0", "_1", "1_", "08", "0x", "1.5", "１"] {
        assert!(number(text).is_err(), "{text}");
    }
    let duration = |text: &str| Value::parse(Kind::Duration, text);
    for (text, expected) in [
        ("0", 0),
        ("2m", 120_000_000_000),
        ("1.5h", 5_400_000_000_000),
        ("1h2m3s4ms5us6ns", 3_723_004_005_006),
        (".5s", 500_000_000),
        ("-1ms", -1_000_000),
    ] {
        assert_eq!(duration(text), Ok(Value::Int(expected)), "{text}");
    }
    for text in [
        "",
        "5",
        "s",
        ".s",
        "1d",
        "1h2",
        "9999999999h",
        "1.2.3s",
        "é",
    ] {
        assert!(duration(text).is_err(), "{text}");
    }
}

#[test]
fn names_requested_features_that_are_missing() {
    let flags = parse(&[
        "-dhtServer",
        "-relay=0",
        "-autonat=false",
        "-connLo=256",
        "-quic",
    ]);
    let lines = flags.unwrap().missing_features();
    assert_eq!(
        lines,
        ["-dhtServer has no effect: this daemon has no DHT yet"]
    );
}
