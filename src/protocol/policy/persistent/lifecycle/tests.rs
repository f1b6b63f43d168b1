use super::*;
use proptest::prelude::*;
use std::collections::{BTreeMap, BTreeSet, HashMap};

type Machine = Lifecycle<u32, &'static str>;
type Act = Action<u32, &'static str>;

const LOST: &str = "lost";

struct Fixture {
    machine: Machine,
    now: Instant,
}

fn complete(tokens: &[u32], outcome: Result<(), Failure<&'static str>>) -> Act {
    Action::Complete {
        tokens: tokens.to_vec(),
        outcome,
    }
}

fn done(token: u32) -> Act {
    complete(&[token], Ok(()))
}

fn failed(tokens: &[u32], error: &'static str) -> Act {
    complete(tokens, Err(Failure::Driver(error)))
}

fn serve(name: &str, token: u32) -> Act {
    let name = name.to_owned();
    Action::Serve { name, token }
}

fn register(name: &str) -> Act {
    let (name, balanced) = (name.to_owned(), false);
    Action::Register { name, balanced }
}

fn unregister(name: &str) -> Act {
    Action::Unregister(name.to_owned())
}

fn forget(name: &str) -> Act {
    Action::Forget(name.to_owned())
}

impl Fixture {
    fn new() -> Self {
        Fixture {
            machine: Machine::new(Timing::default(), 0),
            now: Instant::now(),
        }
    }

    /// One with an open connection.
    fn open() -> (Self, ConnectionId) {
        let mut fixture = Self::new();
        fixture.machine.connect(1000, fixture.now);
        let id = fixture.opening();
        assert!(fixture.machine.opened(id, fixture.now));
        assert_eq!(fixture.actions(), [Action::Ready, done(1000)]);
        (fixture, id)
    }

    /// One with an open connection that serves these names.
    fn serving(names: &[&str]) -> (Self, ConnectionId) {
        let (mut fixture, id) = Self::open();
        for (token, name) in (2000..).zip(names) {
            fixture.machine.add(token, name, false, fixture.now);
            fixture.registered(id, name, Registration::Accepted);
        }
        fixture.actions();
        (fixture, id)
    }

    fn actions(&mut self) -> Vec<Act> {
        std::iter::from_fn(|| self.machine.poll()).collect()
    }

    /// The attempt that the only action begins.
    fn opening(&mut self) -> ConnectionId {
        match self.actions()[..] {
            [Action::Open(id)] => id,
            ref other => panic!("{other:?}"),
        }
    }

    fn pass(&mut self, time: Duration) {
        self.now += time;
        self.machine.time(self.now);
    }

    /// Lets the time until the deadline pass; returns how long that is.
    fn pass_deadline(&mut self) -> Duration {
        let deadline = self.machine.deadline().expect("there is a deadline");
        let pause = deadline - self.now;
        self.pass(pause);
        pause
    }

    fn registered(&mut self, id: ConnectionId, name: &str, outcome: Registration<&'static str>) {
        self.machine.registered(id, name, outcome, self.now);
    }

    fn lose(&mut self, id: ConnectionId) {
        self.machine.lost(id, LOST, self.now);
    }
}

// --- opening ---

#[test]
fn operations_share_one_attempt_to_open() {
    let mut fixture = Fixture::new();
    fixture.machine.connect(1, fixture.now);
    fixture.machine.connect(2, fixture.now);
    fixture.machine.add(3, "a", false, fixture.now);
    let id = fixture.opening();
    assert_eq!(fixture.machine.opening(), Some(id));
    assert!(fixture.machine.opened(id, fixture.now));
    assert_eq!(
        fixture.actions(),
        [
            Action::Ready,
            complete(&[1, 2], Ok(())),
            serve("a", 3),
            register("a")
        ]
    );
}

#[test]
fn failed_attempt_fails_all_waiting_operations() {
    let mut fixture = Fixture::new();
    fixture.machine.connect(1, fixture.now);
    fixture.machine.add(2, "a", false, fixture.now);
    let id = fixture.opening();
    fixture.machine.open_failed(id, "no daemon", fixture.now);
    assert_eq!(fixture.actions(), [failed(&[1, 2], "no daemon")]);
    assert_eq!(fixture.machine.deadline(), None);
    fixture.machine.connect(3, fixture.now);
    assert_ne!(fixture.opening(), id);
}

#[test]
fn opening_times_out() {
    let mut fixture = Fixture::new();
    fixture.machine.connect(1, fixture.now);
    let id = fixture.opening();
    assert_eq!(fixture.pass_deadline(), Timing::default().open_timeout);
    let timed_out = Err(Failure::TimedOut(Timing::default().open_timeout));
    assert_eq!(
        fixture.actions(),
        [Action::CancelOpen(id), complete(&[1], timed_out)]
    );
    assert!(!fixture.machine.opened(id, fixture.now));
    assert_eq!(fixture.actions(), []);
}

#[test]
fn cancelled_operation_does_not_cancel_the_opening() {
    let mut fixture = Fixture::new();
    fixture.machine.connect(1, fixture.now);
    let id = fixture.opening();
    fixture.machine.cancel(1, fixture.now);
    fixture.machine.connect(2, fixture.now);
    assert!(fixture.machine.opened(id, fixture.now));
    assert_eq!(fixture.actions(), [Action::Ready, done(2)]);
    fixture.machine.connect(3, fixture.now);
    assert_eq!(fixture.actions(), [done(3)]);
}

#[test]
fn connection_lost_while_opening_fails_the_opening() {
    let mut fixture = Fixture::new();
    fixture.machine.connect(1, fixture.now);
    let id = fixture.opening();
    fixture.lose(id);
    assert_eq!(fixture.actions(), [failed(&[1], LOST)]);
    assert!(!fixture.machine.opened(id, fixture.now));
}

// --- adding and removing ---

#[test]
fn refused_handler_is_dropped() {
    let (mut fixture, id) = Fixture::open();
    fixture.machine.add(1, "a", true, fixture.now);
    let (name, balanced) = ("a".to_owned(), true);
    assert_eq!(
        fixture.actions(),
        [serve("a", 1), Action::Register { name, balanced }]
    );
    fixture.registered(id, "a", Registration::Refused("taken"));
    assert_eq!(fixture.actions(), [forget("a"), failed(&[1], "taken")]);
    assert!(!fixture.machine.serves());
}

#[test]
fn second_handler_of_a_name_is_an_error() {
    let (mut fixture, id) = Fixture::open();
    fixture.machine.add(1, "a", false, fixture.now);
    fixture.machine.add(2, "a", false, fixture.now);
    assert_eq!(fixture.actions(), [serve("a", 1), register("a")]);
    fixture.registered(id, "a", Registration::Accepted);
    let twice = complete(&[2], Err(Failure::AlreadyRegistered));
    assert_eq!(fixture.actions(), [done(1), twice]);
    assert_eq!(fixture.machine.handlers().collect::<Vec<_>>(), ["a"]);
}

#[test]
fn failed_addition_lets_the_next_one_of_its_name_begin() {
    let (mut fixture, id) = Fixture::open();
    fixture.machine.add(1, "a", false, fixture.now);
    fixture.machine.add(2, "a", false, fixture.now);
    fixture.actions();
    fixture.registered(id, "a", Registration::Failed("invalid reply"));
    assert_eq!(
        fixture.actions(),
        [
            forget("a"),
            failed(&[1], "invalid reply"),
            serve("a", 2),
            register("a")
        ]
    );
}

#[test]
fn removed_handler_serves_until_the_daemon_acknowledges() {
    let (mut fixture, id) = Fixture::serving(&["a"]);
    fixture.machine.remove(1, "a", fixture.now);
    fixture.machine.add(2, "a", false, fixture.now);
    assert_eq!(fixture.actions(), [unregister("a")]);
    fixture.machine.unregistered(id, "a", fixture.now);
    assert_eq!(
        fixture.actions(),
        [forget("a"), done(1), serve("a", 2), register("a")]
    );
}

#[test]
fn removing_an_unknown_handler_is_an_error() {
    let (mut fixture, _) = Fixture::open();
    fixture.machine.remove(1, "a", fixture.now);
    let missing = complete(&[1], Err(Failure::NotRegistered));
    assert_eq!(fixture.actions(), [missing]);
    assert!(fixture.machine.handlers.names().is_empty());
}

#[test]
fn removal_waits_for_the_addition_of_its_name() {
    let (mut fixture, id) = Fixture::open();
    fixture.machine.add(1, "a", false, fixture.now);
    fixture.machine.remove(2, "a", fixture.now);
    assert_eq!(fixture.actions(), [serve("a", 1), register("a")]);
    fixture.registered(id, "a", Registration::Accepted);
    assert_eq!(fixture.actions(), [done(1), unregister("a")]);
}

#[test]
fn removal_without_a_connection_opens_none() {
    let (mut fixture, id) = Fixture::serving(&["a"]);
    fixture.lose(id);
    fixture.machine.remove(1, "a", fixture.now);
    assert_eq!(fixture.actions(), [forget("a"), done(1)]);
    fixture.pass_deadline();
    assert_eq!(fixture.actions(), []);
    assert_eq!(fixture.machine.deadline(), None);
}

// --- cancelling ---

#[test]
fn addition_cancelled_while_opening_is_not_sent() {
    let mut fixture = Fixture::new();
    fixture.machine.add(1, "a", false, fixture.now);
    let id = fixture.opening();
    fixture.machine.cancel(1, fixture.now);
    assert!(fixture.machine.opened(id, fixture.now));
    assert_eq!(fixture.actions(), [Action::Ready]);
}

#[test]
fn addition_cancelled_in_flight_is_undone() {
    let (mut fixture, id) = Fixture::open();
    fixture.machine.add(1, "a", false, fixture.now);
    fixture.actions();
    fixture.machine.cancel(1, fixture.now);
    fixture.machine.add(2, "a", false, fixture.now);
    assert_eq!(fixture.actions(), [forget("a")]);
    fixture.registered(id, "a", Registration::Accepted);
    assert_eq!(fixture.actions(), [unregister("a")]);
    fixture.machine.unregistered(id, "a", fixture.now);
    assert_eq!(fixture.actions(), [serve("a", 2), register("a")]);
}

#[test]
fn refused_addition_that_was_cancelled_needs_no_undoing() {
    let (mut fixture, id) = Fixture::open();
    fixture.machine.add(1, "a", false, fixture.now);
    fixture.machine.cancel(1, fixture.now);
    fixture.actions();
    fixture.registered(id, "a", Registration::Refused("taken"));
    assert_eq!(fixture.actions(), []);
    assert!(fixture.machine.handlers.names().is_empty());
}

#[test]
fn cancelling_a_complete_addition_undoes_it() {
    let (mut fixture, _) = Fixture::serving(&["a"]);
    fixture.machine.cancel(2000, fixture.now);
    assert_eq!(fixture.actions(), [forget("a"), unregister("a")]);
    fixture.machine.cancel(2000, fixture.now);
    assert_eq!(fixture.actions(), []);
}

#[test]
fn cancelling_an_addition_leaves_the_next_handler_of_its_name() {
    let (mut fixture, id) = Fixture::serving(&["a"]);
    fixture.machine.remove(1, "a", fixture.now);
    fixture.machine.unregistered(id, "a", fixture.now);
    fixture.machine.add(2, "a", false, fixture.now);
    fixture.registered(id, "a", Registration::Accepted);
    fixture.actions();
    fixture.machine.cancel(2000, fixture.now);
    assert_eq!(fixture.actions(), []);
}

#[test]
fn cancelled_removal_is_carried_out() {
    let (mut fixture, id) = Fixture::serving(&["a"]);
    fixture.machine.remove(1, "a", fixture.now);
    fixture.machine.cancel(1, fixture.now);
    assert_eq!(fixture.actions(), [unregister("a"), forget("a")]);
    fixture.machine.unregistered(id, "a", fixture.now);
    assert_eq!(fixture.actions(), []);
    assert!(fixture.machine.handlers.names().is_empty());
}

#[test]
fn cancelling_an_addition_does_not_cancel_its_removal() {
    let (mut fixture, id) = Fixture::serving(&["a"]);
    fixture.machine.remove(1, "a", fixture.now);
    fixture.machine.cancel(2000, fixture.now);
    fixture.machine.unregistered(id, "a", fixture.now);
    assert_eq!(fixture.actions(), [unregister("a"), forget("a"), done(1)]);
}

#[test]
fn withdrawn_handler_is_not_registered_again() {
    let (mut fixture, id) = Fixture::serving(&["a", "b"]);
    fixture.lose(id);
    fixture.machine.withdraw("a", fixture.now);
    assert_eq!(fixture.actions(), [forget("a")]);
    fixture.pass_deadline();
    let id = fixture.opening();
    assert!(fixture.machine.opened(id, fixture.now));
    assert_eq!(fixture.actions(), [register("b")]);
}

// --- a lost connection ---

#[test]
fn connection_is_ready_after_its_handlers_are_registered() {
    let (mut fixture, id) = Fixture::serving(&["a", "b"]);
    fixture.lose(id);
    fixture.machine.connect(1, fixture.now);
    let id = fixture.opening();
    assert!(fixture.machine.opened(id, fixture.now));
    assert_eq!(fixture.actions(), [register("a"), register("b")]);
    fixture.registered(id, "b", Registration::Accepted);
    assert_eq!(fixture.actions(), []);
    fixture.registered(id, "a", Registration::Accepted);
    assert_eq!(fixture.actions(), [Action::Ready, done(1)]);
}

#[test]
fn refused_handler_is_retried_until_the_daemon_must_know_of_the_loss() {
    let (mut fixture, id) = Fixture::serving(&["a"]);
    fixture.lose(id);
    fixture.machine.connect(1, fixture.now);
    let id = fixture.opening();
    assert!(fixture.machine.opened(id, fixture.now));
    let start = fixture.now;
    let mut pauses = Vec::new();
    while fixture.now - start < FORGET_TIMEOUT {
        assert_eq!(fixture.actions(), [register("a")]);
        fixture.registered(id, "a", Registration::Refused("taken"));
        pauses.push(fixture.pass_deadline().as_millis());
    }
    assert_eq!(pauses[..8], [1, 2, 4, 8, 16, 32, 50, 50]);
    fixture.actions();
    fixture.registered(id, "a", Registration::Refused("taken"));
    let (name, error) = ("a".to_owned(), "taken");
    assert_eq!(
        fixture.actions(),
        [
            Action::Report { name, error },
            forget("a"),
            Action::Ready,
            done(1)
        ]
    );
}

#[test]
fn removing_a_refused_handler_makes_the_connection_ready() {
    let (mut fixture, id) = Fixture::serving(&["a"]);
    fixture.lose(id);
    fixture.machine.connect(1, fixture.now);
    let id = fixture.opening();
    assert!(fixture.machine.opened(id, fixture.now));
    fixture.registered(id, "a", Registration::Refused("taken"));
    fixture.actions();
    fixture.machine.remove(2, "a", fixture.now);
    assert_eq!(
        fixture.actions(),
        [forget("a"), done(2), Action::Ready, done(1)]
    );
}

#[test]
fn removal_waits_for_registration_on_the_next_connection() {
    let (mut fixture, id) = Fixture::serving(&["a", "b"]);
    fixture.lose(id);
    fixture.machine.connect(1, fixture.now);
    let id = fixture.opening();
    assert!(fixture.machine.opened(id, fixture.now));
    fixture.machine.remove(2, "a", fixture.now);
    assert_eq!(fixture.actions(), [register("a"), register("b")]);
    fixture.registered(id, "a", Registration::Accepted);
    assert_eq!(fixture.actions(), [unregister("a")]);
    fixture.registered(id, "b", Registration::Accepted);
    assert_eq!(fixture.actions(), [Action::Ready, done(1)]);
}

#[test]
fn failed_registration_fails_the_opening() {
    let (mut fixture, id) = Fixture::serving(&["a"]);
    fixture.lose(id);
    fixture.machine.connect(1, fixture.now);
    let id = fixture.opening();
    assert!(fixture.machine.opened(id, fixture.now));
    fixture.actions();
    fixture.registered(id, "a", Registration::Failed(LOST));
    assert_eq!(fixture.actions(), [Action::Close, failed(&[1], LOST)]);
    assert!(fixture.machine.serves());
    assert!(fixture.machine.deadline().is_some());
}

#[test]
fn registering_again_times_out() {
    let (mut fixture, id) = Fixture::serving(&["a"]);
    fixture.lose(id);
    fixture.machine.connect(1, fixture.now);
    let id = fixture.opening();
    assert!(fixture.machine.opened(id, fixture.now));
    fixture.actions();
    assert_eq!(fixture.pass_deadline(), Timing::default().open_timeout);
    let timed_out = Err(Failure::TimedOut(Timing::default().open_timeout));
    assert_eq!(
        fixture.actions(),
        [Action::Close, complete(&[1], timed_out)]
    );
}

#[test]
fn unsent_registration_is_retried_once() {
    let (mut fixture, id) = Fixture::open();
    fixture.machine.add(1, "a", false, fixture.now);
    fixture.actions();
    fixture.registered(id, "a", Registration::Unsent(LOST));
    let actions = fixture.actions();
    let [ref first @ .., Action::Open(id)] = actions[..] else {
        panic!("{actions:?}");
    };
    assert_eq!(first, [forget("a"), Action::Close]);
    assert!(fixture.machine.opened(id, fixture.now));
    assert_eq!(
        fixture.actions(),
        [Action::Ready, serve("a", 1), register("a")]
    );
    fixture.registered(id, "a", Registration::Unsent(LOST));
    assert_eq!(
        fixture.actions(),
        [Action::Close, forget("a"), failed(&[1], LOST)]
    );
}

#[test]
fn loss_fails_additions_and_completes_removals() {
    let (mut fixture, id) = Fixture::serving(&["removed"]);
    fixture.machine.add(1, "added", false, fixture.now);
    fixture.machine.remove(2, "removed", fixture.now);
    fixture.actions();
    fixture.lose(id);
    assert_eq!(
        fixture.actions(),
        [
            forget("added"),
            forget("removed"),
            done(2),
            failed(&[1], LOST)
        ]
    );
    fixture.lose(id);
    fixture.registered(id, "added", Registration::Accepted);
    fixture.machine.unregistered(id, "removed", fixture.now);
    assert_eq!(fixture.actions(), []);
    assert!(fixture.machine.handlers.names().is_empty());
}

#[test]
fn lost_connection_is_not_replaced_without_handlers() {
    let (mut fixture, id) = Fixture::open();
    fixture.lose(id);
    assert_eq!(fixture.actions(), []);
    assert_eq!(fixture.machine.deadline(), None);
}

#[test]
fn lost_connection_is_replaced_with_backoff() {
    let (mut fixture, id) = Fixture::serving(&["a"]);
    fixture.lose(id);
    let mut longest = Duration::from_millis(50);
    for _ in 0..10 {
        let pause = fixture.pass_deadline();
        assert!(pause <= longest && pause >= longest * 3 / 4, "{pause:?}");
        longest = (2 * longest).min(Duration::from_secs(5));
        let id = fixture.opening();
        fixture.machine.open_failed(id, "no daemon", fixture.now);
        assert_eq!(fixture.actions(), []);
    }
}

#[test]
fn only_a_stable_connection_resets_the_backoff() {
    let (mut fixture, mut id) = Fixture::serving(&["a"]);
    for (lasts, pause) in [(0, 50), (10, 100), (10, 200), (1000, 50), (0, 100)] {
        fixture.pass(Duration::from_millis(lasts));
        fixture.lose(id);
        let (longest, actual) = (Duration::from_millis(pause), fixture.pass_deadline());
        assert!(actual <= longest && actual >= longest * 3 / 4, "{actual:?}");
        id = fixture.opening();
        assert!(fixture.machine.opened(id, fixture.now));
        fixture.registered(id, "a", Registration::Accepted);
        fixture.actions();
    }
}

#[test]
fn operation_neither_waits_for_the_backoff_nor_delays_it() {
    let (mut fixture, id) = Fixture::serving(&["a"]);
    fixture.lose(id);
    let deadline = fixture.machine.deadline();
    fixture.machine.connect(1, fixture.now);
    let id = fixture.opening();
    fixture.machine.open_failed(id, "no daemon", fixture.now);
    assert_eq!(fixture.actions(), [failed(&[1], "no daemon")]);
    assert_eq!(fixture.machine.deadline(), deadline);
}

// --- closing ---

#[test]
fn close_completes_all_operations_and_drops_all_handlers() {
    let (mut fixture, _) = Fixture::serving(&["kept", "removed"]);
    fixture.machine.add(1, "added", false, fixture.now);
    fixture.machine.add(2, "added", false, fixture.now);
    fixture.machine.remove(3, "removed", fixture.now);
    fixture.actions();
    fixture.machine.close();
    assert_eq!(
        fixture.actions(),
        [
            Action::Close,
            forget("added"),
            forget("removed"),
            done(3),
            forget("kept"),
            complete(&[1, 2], Err(Failure::Closed))
        ]
    );
    fixture.machine.connect(4, fixture.now);
    fixture.machine.add(5, "kept", false, fixture.now);
    fixture.machine.remove(6, "kept", fixture.now);
    assert_eq!(
        fixture.actions(),
        [
            complete(&[4], Err(Failure::Closed)),
            complete(&[5], Err(Failure::Closed)),
            complete(&[6], Err(Failure::NotRegistered))
        ]
    );
    fixture.machine.close();
    assert_eq!(fixture.actions(), []);
    assert_eq!(fixture.machine.deadline(), None);
}

#[test]
fn close_cancels_the_opening() {
    let mut fixture = Fixture::new();
    fixture.machine.connect(1, fixture.now);
    let id = fixture.opening();
    fixture.machine.close();
    assert_eq!(
        fixture.actions(),
        [Action::CancelOpen(id), complete(&[1], Err(Failure::Closed))]
    );
    assert!(!fixture.machine.opened(id, fixture.now));
    fixture.machine.open_failed(id, LOST, fixture.now);
    assert_eq!(fixture.actions(), []);
}

// --- any sequence of events ---

#[derive(Debug, Clone)]
enum Step {
    Connect,
    Add(usize),
    Remove(usize),
    /// Of one of the operations so far.
    Cancel(u32),
    Withdraw(usize),
    Opened,
    OpenFailed,
    /// The daemon answers one of the requests in flight.
    Answer(usize, u8),
    Lose,
    Pass(u64),
    Close,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        2 => Just(Step::Connect),
        4 => (0..3usize).prop_map(Step::Add),
        3 => (0..3usize).prop_map(Step::Remove),
        2 => any::<u32>().prop_map(Step::Cancel),
        1 => (0..3usize).prop_map(Step::Withdraw),
        4 => Just(Step::Opened),
        1 => Just(Step::OpenFailed),
        8 => (any::<usize>(), 0..8u8).prop_map(|(which, how)| Step::Answer(which, how)),
        1 => Just(Step::Lose),
        2 => (0..2000u64).prop_map(Step::Pass),
        1 => prop::bool::weighted(0.1).prop_map(|close| if close { Step::Close } else { Step::Lose }),
    ]
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Sent {
    Register,
    Unregister,
}

/// A driver and a daemon. It checks what the machine asks for.
struct Model {
    fixture: Fixture,
    tokens: u32,
    /// Operations that are not complete.
    open: BTreeSet<u32>,
    opening: Option<ConnectionId>,
    connection: Option<ConnectionId>,
    ready: bool,
    closed: bool,
    in_flight: BTreeMap<String, Sent>,
    /// The handlers that the driver has, and those that the daemon knows of.
    served: HashMap<String, u32>,
    known: BTreeSet<String>,
}

impl Model {
    fn new() -> Self {
        Model {
            fixture: Fixture::new(),
            tokens: 0,
            open: BTreeSet::new(),
            opening: None,
            connection: None,
            ready: false,
            closed: false,
            in_flight: BTreeMap::new(),
            served: HashMap::new(),
            known: BTreeSet::new(),
        }
    }

    fn token(&mut self) -> u32 {
        self.tokens += 1;
        self.open.insert(self.tokens);
        self.tokens
    }

    fn disconnect(&mut self) {
        self.connection = None;
        self.ready = false;
        self.in_flight.clear();
        self.known.clear();
    }

    fn send(&mut self, name: &str, sent: Sent) {
        assert!(self.connection.is_some(), "{name} without a connection");
        let before = self.in_flight.insert(name.to_owned(), sent);
        assert_eq!(before, None, "two requests for {name} in flight");
    }

    fn step(&mut self, step: &Step) {
        let now = self.fixture.now;
        let name = |number: &usize| ["a", "b", "c"][*number];
        match step {
            Step::Connect => {
                let token = self.token();
                self.fixture.machine.connect(token, now);
            }
            Step::Add(number) => {
                let token = self.token();
                self.fixture.machine.add(token, name(number), false, now);
            }
            Step::Remove(number) => {
                let token = self.token();
                self.fixture.machine.remove(token, name(number), now);
            }
            Step::Cancel(which) if self.tokens > 0 => {
                let token = which % self.tokens + 1;
                self.open.remove(&token);
                self.fixture.machine.cancel(token, now);
            }
            Step::Withdraw(number) => self.fixture.machine.withdraw(name(number), now),
            Step::Opened => {
                if let Some(id) = self.opening.take() {
                    self.connection = Some(id);
                    assert!(self.fixture.machine.opened(id, now));
                }
            }
            Step::OpenFailed => {
                if let Some(id) = self.opening.take() {
                    self.fixture.machine.open_failed(id, "failed", now);
                }
            }
            Step::Answer(which, how) => self.answer(*which, *how),
            Step::Lose => {
                if let Some(id) = self.connection {
                    self.disconnect();
                    self.fixture.lose(id);
                }
            }
            Step::Pass(millis) => self.fixture.pass(Duration::from_millis(*millis)),
            Step::Close => {
                self.closed = true;
                self.fixture.machine.close();
            }
            Step::Cancel(_) => {}
        }
        self.carry_out();
    }

    fn answer(&mut self, which: usize, how: u8) {
        let Some(id) = self.connection.filter(|_| !self.in_flight.is_empty()) else {
            return;
        };
        let place = which % self.in_flight.len();
        let (name, sent) = self.in_flight.iter().nth(place).unwrap();
        let (name, sent) = (name.clone(), *sent);
        self.in_flight.remove(&name);
        let now = self.fixture.now;
        if sent == Sent::Unregister {
            self.known.remove(&name);
            return self.fixture.machine.unregistered(id, &name, now);
        }
        let outcome = match how {
            0 => Registration::Refused("taken"),
            1 => Registration::Failed("invalid"),
            2 => {
                self.disconnect();
                Registration::Unsent(LOST)
            }
            _ => {
                self.known.insert(name.clone());
                Registration::Accepted
            }
        };
        self.fixture.registered(id, &name, outcome);
        if how == 2 {
            self.fixture.lose(id);
        }
    }

    fn carry_out(&mut self) {
        for action in self.fixture.actions() {
            match action {
                Action::Open(id) => {
                    assert!(!self.closed, "opened after close");
                    assert_eq!(self.opening.replace(id), None, "two openings at once");
                    assert_eq!(self.connection, None, "opened while connected");
                }
                Action::CancelOpen(id) => assert_eq!(self.opening.take(), Some(id)),
                Action::Close => self.disconnect(),
                Action::Ready => {
                    assert!(self.connection.is_some());
                    assert!(!std::mem::replace(&mut self.ready, true));
                }
                Action::Serve { name, token } => {
                    assert_eq!(self.served.insert(name, token), None);
                }
                Action::Forget(name) => assert!(self.served.remove(&name).is_some()),
                Action::Register { name, .. } => {
                    assert!(self.served.contains_key(&name));
                    self.send(&name, Sent::Register);
                }
                Action::Unregister(name) => self.send(&name, Sent::Unregister),
                Action::Report { .. } => {}
                Action::Complete { tokens, .. } => {
                    for token in tokens {
                        assert!(self.open.remove(&token), "{token} is completed twice");
                    }
                }
            }
        }
        if self.closed {
            assert!(self.served.is_empty() && self.open.is_empty());
            assert_eq!(self.fixture.machine.deadline(), None);
        }
        let (mut handlers, mut served): (Vec<_>, Vec<_>) = (
            self.fixture.machine.handlers().collect(),
            self.served.keys().map(String::as_str).collect(),
        );
        handlers.sort_unstable();
        served.sort_unstable();
        assert_eq!(handlers, served);
    }

    /// Answers requests until there are none.
    fn calm(&mut self) {
        for _ in 0..1000 {
            if self.opening.is_some() {
                self.step(&Step::Opened);
            } else if !self.in_flight.is_empty() {
                self.step(&Step::Answer(0, 7));
            } else if let Some(deadline) = self.fixture.machine.deadline() {
                self.fixture.now = deadline;
                self.step(&Step::Pass(0));
            } else {
                return;
            }
        }
        panic!("it never comes to rest");
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 500, ..ProptestConfig::default() })]

    #[test]
    fn any_sequence_of_events_keeps_the_invariants(steps in prop::collection::vec(step(), 0..80)) {
        let mut model = Model::new();
        for step in &steps {
            model.step(step);
        }
        model.calm();
        prop_assert!(model.open.is_empty(), "left open: {:?}", model.open);
        let served: BTreeSet<_> = model.served.keys().cloned().collect();
        prop_assert_eq!(&served, &model.known, "the daemon knows others than are served");
        model.step(&Step::Close);
        model.step(&Step::Connect);
        prop_assert!(model.open.is_empty());
    }
}
