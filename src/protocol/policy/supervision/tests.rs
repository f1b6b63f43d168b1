//! Tests of the supervision state machine: every transition, and what holds for any events.

use super::super::reconnection::INTERVAL;
use super::*;
use proptest::prelude::*;

const SHORT: Duration = Duration::from_secs(1);

fn running(restart_limit: u32, peers: usize) -> Supervision {
    let mut supervision = Supervision::new(restart_limit, peers);
    supervision.handle(Event::Started, Duration::ZERO, 0);
    let mut expected = vec![Action::Watch];
    expected.extend((0..peers).map(Action::Connect));
    assert_eq!(actions(&mut supervision), expected);
    supervision
}

fn actions(supervision: &mut Supervision) -> Vec<Action> {
    std::iter::from_fn(|| supervision.poll()).collect()
}

fn handle(supervision: &mut Supervision, event: Event, now: Duration) -> Vec<Action> {
    supervision.handle(event, now, 0);
    actions(supervision)
}

fn connected(peer: usize) -> Event {
    Event::Connected { peer }
}

fn refused(peer: usize, reason: &str) -> Event {
    Event::ConnectFailed {
        peer,
        reason: reason.into(),
        daemon_lost: false,
    }
}

fn unreachable(peer: usize, reason: &str) -> Vec<Action> {
    vec![Action::Report(Report::PeerUnreachable(peer, reason.into()))]
}

/// Fails a start after the pause, and returns the next pause; none if the daemon is given up.
fn fail_start(supervision: &mut Supervision, now: &mut Duration) -> Option<Duration> {
    *now = supervision.deadline().unwrap();
    assert_eq!(
        handle(supervision, Event::Timeout, *now),
        [Action::Start],
        "a restart was due"
    );
    handle(supervision, Event::StartFailed, *now);
    supervision.deadline().map(|deadline| deadline - *now)
}

#[test]
fn restarts_after_a_death_and_registers_again() {
    let mut supervision = running(3, 1);
    let died = handle(&mut supervision, Event::Died, SHORT);
    let pause = Duration::from_millis(100);
    let restarting = Action::Report(Report::Restarting(pause));
    assert_eq!(died, [Action::Abort, restarting]);
    assert_eq!(supervision.deadline(), Some(SHORT + pause));
    assert_eq!(handle(&mut supervision, Event::Timeout, SHORT), []);
    let now = SHORT + pause;
    let due = handle(&mut supervision, Event::Timeout, now);
    assert_eq!(due, [Action::Start]);
    assert_eq!(supervision.deadline(), None);
    let started = handle(&mut supervision, Event::Started, now);
    let restarted = Action::Report(Report::Restarted);
    let expected = [
        Action::Watch,
        restarted,
        Action::Register,
        Action::Connect(0),
    ];
    assert_eq!(started, expected);
}

#[test]
fn ends_with_the_daemon_if_no_restart_is_wanted() {
    let mut supervision = running(0, 2);
    assert!(!supervision.is_finished());
    let died = handle(&mut supervision, Event::Died, SHORT);
    assert_eq!(died, [Action::Abort]);
    assert!(supervision.is_finished());
    assert_eq!(supervision.deadline(), None);
}

#[test]
fn gives_up_after_quick_deaths_in_a_row() {
    let mut supervision = running(3, 0);
    let mut now = SHORT;
    handle(&mut supervision, Event::Died, now);
    assert_eq!(
        fail_start(&mut supervision, &mut now),
        Some(Duration::from_millis(200))
    );
    now = supervision.deadline().unwrap();
    supervision.handle(Event::Timeout, now, 0);
    supervision.handle(Event::Started, now, 0);
    actions(&mut supervision);
    let died = handle(&mut supervision, Event::Died, now + SHORT);
    assert_eq!(died, [Action::Abort, Action::GiveUp { deaths: 3 }]);
    assert!(supervision.is_finished());
}

#[test]
fn gives_up_at_the_first_death_with_a_limit_of_one() {
    let mut supervision = running(1, 0);
    let died = handle(&mut supervision, Event::Died, SHORT);
    assert_eq!(died, [Action::Abort, Action::GiveUp { deaths: 1 }]);
}

#[test]
fn a_long_life_starts_the_count_and_the_backoff_over() {
    let mut supervision = running(3, 0);
    let mut now = SHORT;
    handle(&mut supervision, Event::Died, now);
    fail_start(&mut supervision, &mut now).unwrap();
    now = supervision.deadline().unwrap();
    supervision.handle(Event::Timeout, now, 0);
    supervision.handle(Event::Started, now, 0);
    actions(&mut supervision);
    now += QUICK_DEATH;
    handle(&mut supervision, Event::Died, now);
    assert_eq!(
        supervision.deadline(),
        Some(now + Duration::from_millis(100))
    );
    assert!(fail_start(&mut supervision, &mut now).is_some());
    assert_eq!(fail_start(&mut supervision, &mut now), None);
}

#[test]
fn a_long_life_is_never_given_up() {
    let mut supervision = running(1, 0);
    handle(&mut supervision, Event::Died, QUICK_DEATH);
    assert!(supervision.deadline().is_some() && !supervision.is_finished());
}

#[test]
fn restart_pauses_grow_to_thirty_seconds() {
    let mut supervision = running(100, 0);
    let mut now = SHORT;
    handle(&mut supervision, Event::Died, now);
    let pauses: Vec<_> = (0..90)
        .map(|_| fail_start(&mut supervision, &mut now).unwrap())
        .collect();
    assert!(pauses.is_sorted());
    assert_eq!(pauses[89], Duration::from_secs(30));
}

#[test]
fn connects_again_after_growing_pauses() {
    let mut supervision = running(0, 1);
    let mut now = SHORT;
    for seconds in [1, 2, 4, 8, 16, 32, 60, 60] {
        supervision.handle(refused(0, "no"), now, 0);
        actions(&mut supervision);
        let next = now + Duration::from_secs(seconds);
        assert_eq!(supervision.deadline(), Some(next));
        assert_eq!(handle(&mut supervision, Event::Timeout, now), []);
        now = next;
        let due = handle(&mut supervision, Event::Timeout, now);
        assert_eq!(due, [Action::Connect(0)]);
        assert_eq!(supervision.deadline(), None);
    }
    supervision.handle(connected(0), now, 0);
    assert_eq!(supervision.deadline(), Some(now + INTERVAL));
    supervision.handle(refused(0, "no"), now, 0);
    assert_eq!(supervision.deadline(), Some(now + SHORT));
}

#[test]
fn connects_to_each_peer_in_its_own_time() {
    let mut supervision = running(0, 3);
    supervision.handle(connected(1), SHORT, 0);
    supervision.handle(refused(2, "no"), SHORT, 0);
    actions(&mut supervision);
    let due = handle(&mut supervision, Event::Timeout, 2 * SHORT);
    assert_eq!(due, [Action::Connect(2)]);
    assert_eq!(supervision.deadline(), Some(SHORT + INTERVAL));
}

#[test]
fn reports_a_peer_only_when_something_changed() {
    let mut supervision = running(0, 1);
    let mut tell = |event| handle(&mut supervision, event, SHORT);
    let first = "connection refused";
    assert_eq!(tell(refused(0, first)), unreachable(0, first));
    assert_eq!(tell(refused(0, first)), []);
    let now_connected = [Action::Report(Report::PeerConnected(0))];
    assert_eq!(tell(connected(0)), now_connected);
    assert_eq!(tell(connected(0)), []);
    assert_eq!(tell(refused(0, first)), unreachable(0, first));
}

#[test]
fn does_not_blame_a_peer_for_a_lost_daemon() {
    let mut supervision = running(0, 1);
    let lost = Event::ConnectFailed {
        peer: 0,
        reason: "connection reset".into(),
        daemon_lost: true,
    };
    assert_eq!(handle(&mut supervision, lost, SHORT), []);
    assert!(supervision.deadline().is_some());
}

#[test]
fn forgets_a_peers_state_at_a_restart() {
    let mut supervision = running(3, 1);
    supervision.handle(connected(0), SHORT, 0);
    supervision.handle(Event::Died, SHORT, 0);
    supervision.handle(Event::Timeout, 2 * SHORT, 0);
    supervision.handle(Event::Started, 2 * SHORT, 0);
    actions(&mut supervision);
    assert_eq!(supervision.deadline(), None);
    let again = handle(&mut supervision, connected(0), 2 * SHORT);
    assert_eq!(again, [Action::Report(Report::PeerConnected(0))]);
}

#[test]
fn drops_connects_that_were_not_polled_before_a_death() {
    let mut supervision = Supervision::new(3, 1);
    supervision.handle(Event::Started, Duration::ZERO, 0);
    let died = handle(&mut supervision, Event::Died, SHORT);
    assert!(!died.contains(&Action::Connect(0)), "{died:?}");
}

#[test]
fn ignores_late_and_impossible_events() {
    let mut supervision = running(3, 1);
    supervision.handle(Event::Started, SHORT, 0);
    supervision.handle(Event::StartFailed, SHORT, 0);
    supervision.handle(connected(7), SHORT, 0);
    supervision.handle(refused(7, "no"), SHORT, 0);
    assert_eq!(actions(&mut supervision), []);
    supervision.handle(Event::Died, SHORT, 0);
    actions(&mut supervision);
    let deadline = supervision.deadline();
    supervision.handle(connected(0), SHORT, 0);
    supervision.handle(Event::Died, SHORT, 0);
    assert_eq!(actions(&mut supervision), []);
    assert_eq!(supervision.deadline(), deadline);
}

#[test]
fn does_nothing_more_once_stopped() {
    for prepare in [
        |_: &mut Supervision| {},
        |supervision: &mut Supervision| supervision.handle(Event::Died, SHORT, 0),
        |supervision: &mut Supervision| {
            supervision.handle(Event::Died, SHORT, 0);
            supervision.handle(Event::Timeout, 2 * SHORT, 0);
        },
    ] {
        let mut supervision = running(3, 1);
        prepare(&mut supervision);
        let stopped = handle(&mut supervision, Event::Stopped, 2 * SHORT);
        assert_eq!(stopped, [Action::Abort]);
        assert!(supervision.is_finished());
        assert_eq!(supervision.deadline(), None);
        assert_eq!(handle(&mut supervision, Event::Timeout, 99 * SHORT), []);
    }
}

fn any_event() -> impl Strategy<Value = Event> {
    let failed = (0usize..3, "[a-c]", any::<bool>());
    prop_oneof![
        5 => Just(Event::Started),
        5 => Just(Event::StartFailed),
        5 => Just(Event::Died),
        3 => (0usize..3).prop_map(|peer| Event::Connected { peer }),
        3 => failed.prop_map(|(peer, reason, daemon_lost)| Event::ConnectFailed {
            peer,
            reason,
            daemon_lost,
        }),
        10 => Just(Event::Timeout),
        1 => Just(Event::Stopped),
    ]
}

proptest! {
    #[test]
    fn starts_only_a_dead_daemon_never_after_stop_and_after_a_bounded_pause(
        limit in 0u32..5,
        events in prop::collection::vec((any_event(), 0u64..40_000, any::<u64>()), 0..200),
    ) {
        let mut supervision = Supervision::new(limit, 2);
        let mut now = Duration::ZERO;
        let (mut alive, mut stopped, mut given_up) = (false, false, false);
        let mut quick_deaths = 0u32;
        for (event, millis, random) in events {
            now += Duration::from_millis(millis);
            let before = supervision.state;
            stopped |= event == Event::Stopped;
            let dies = matches!(
                (&event, before),
                (Event::Died, State::Running { .. }) | (Event::StartFailed, State::Starting)
            );
            if dies {
                let lived = match before {
                    State::Running { since } => now - since,
                    _ => Duration::ZERO,
                };
                quick_deaths = if lived < QUICK_DEATH { quick_deaths + 1 } else { 1 };
                alive = false;
            }
            supervision.handle(event, now, random);
            if let State::Backoff { until } = supervision.state {
                prop_assert!(until.saturating_sub(now) <= Duration::from_secs(30));
            }
            if let (State::Running { .. }, Some(deadline)) = (supervision.state, supervision.deadline()) {
                prop_assert!(deadline.saturating_sub(now) <= Duration::from_secs(60));
            }
            for action in actions(&mut supervision) {
                match action {
                    Action::Start => {
                        prop_assert!(!alive && !stopped && !given_up);
                        prop_assert!(limit > 0 && quick_deaths <= limit);
                    }
                    Action::Watch => {
                        prop_assert!(!alive);
                        alive = true;
                    }
                    Action::Connect(peer) => prop_assert!(alive && peer < 2),
                    Action::Register => prop_assert!(alive),
                    Action::Report(Report::Restarting(pause)) => {
                        prop_assert!(pause <= Duration::from_secs(30));
                        prop_assert_eq!(supervision.deadline(), Some(now + pause));
                    }
                    Action::GiveUp { deaths } => {
                        given_up = true;
                        prop_assert_eq!(deaths, quick_deaths);
                        prop_assert!(deaths >= limit);
                    }
                    Action::Report(_) | Action::Abort => {}
                }
            }
            prop_assert!(!(stopped || given_up) || supervision.is_finished());
        }
    }
}
