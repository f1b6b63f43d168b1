//! Tests of registrations: single paths, and all of them against a model of hivemind's daemon.

use super::*;
use proptest::prelude::*;

const FORMER: Former = Former {
    balanced: false,
    unchanged: true,
    witnessed: true,
};

/// Runs a registration whose actions go as listed, and returns all actions.
fn run(mut registering: Registering, replies: &[Reply]) -> Vec<Action> {
    let mut actions = vec![registering.first()];
    actions.extend(replies.iter().map(|reply| registering.next(*reply)));
    actions
}

const EXCLUSIVE: Action = Action::Register { balanced: false };
const SHARED: Action = Action::Register { balanced: true };
const FORGET: Action = Action::Remove { former: true };

#[test]
fn new_name_that_is_taken_is_an_error() {
    let actions = run(Registering::new(false, None, true), &[Reply::Taken]);
    assert_eq!(actions, [EXCLUSIVE, Action::End(Ending::LastError)]);
}

#[test]
fn name_is_not_replaced_without_leave() {
    let mut registering = Registering::new(false, Some(FORMER), false);
    registering.first();
    let end = registering.next(Reply::Taken);
    assert_eq!(end, Action::End(Ending::LastError));
    assert_eq!(registering.record(), Record::Former);
}

#[test]
fn unchanged_registration_stays_if_the_daemon_was_not_restarted() {
    let registering = Registering::new(false, Some(FORMER), true);
    let actions = run(registering, &[Reply::Taken, Reply::Done]);
    let end = Action::End(Ending::Registered);
    assert_eq!(actions, [EXCLUSIVE, Action::Probe, end]);
}

#[test]
fn name_of_another_client_is_not_removed() {
    let registering = Registering::new(false, Some(FORMER), true);
    let actions = run(registering, &[Reply::Taken, Reply::Refused, Reply::Refused]);
    let end = Action::End(Ending::FirstError);
    assert_eq!(actions, [EXCLUSIVE, Action::Probe, FORGET, end]);
}

#[test]
fn balanced_name_is_removed_first_without_a_witness() {
    let former = Former {
        balanced: true,
        witnessed: false,
        ..FORMER
    };
    let registering = Registering::new(true, Some(former), true);
    let actions = run(registering, &[Reply::Refused, Reply::Done]);
    assert_eq!(actions, [FORGET, SHARED, Action::End(Ending::Registered)]);
}

#[test]
fn second_share_is_removed_if_the_daemon_was_not_restarted() {
    let former = Former {
        balanced: true,
        ..FORMER
    };
    let registering = Registering::new(true, Some(former), true);
    let actions = run(registering, &[Reply::Done, Reply::Done, Reply::Lost]);
    let end = Action::End(Ending::Registered);
    assert_eq!(actions, [SHARED, Action::Probe, FORGET, end]);
}

#[test]
fn remembers_what_the_daemon_may_have_when_a_reply_is_lost() {
    for (reply, record) in [
        (Reply::Lost, Record::Current),
        (Reply::Unreachable, Record::Former),
        (Reply::Refused, Record::Former),
    ] {
        let mut registering = Registering::new(false, Some(FORMER), true);
        registering.first();
        assert_eq!(registering.record(), Record::Current);
        let end = registering.next(reply);
        assert_eq!(end, Action::End(Ending::LastError));
        assert_eq!(registering.record(), record);
    }
}

/// hivemind's daemon, for one protocol: the entries, each of a client, and whether it is balanced.
#[derive(Debug, Clone, Default)]
struct Daemon {
    entries: Vec<(Owner, bool)>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Owner {
    /// This client, with its former or its current address.
    Us,
    UsBefore,
    Other,
}

impl Daemon {
    fn register(&mut self, owner: Owner, balanced: bool) -> Reply {
        let exclusive = self.entries.iter().any(|(_, balanced)| !balanced);
        if exclusive || !balanced && !self.entries.is_empty() {
            return Reply::Taken;
        }
        self.entries.push((owner, balanced));
        Reply::Done
    }

    fn remove(&mut self, owner: Owner) -> Reply {
        match self.entries.iter().position(|(other, _)| *other == owner) {
            None => Reply::Refused,
            Some(place) => {
                self.entries.remove(place);
                Reply::Done
            }
        }
    }

    fn count(&self, owner: Owner) -> usize {
        self.entries.iter().filter(|(one, _)| *one == owner).count()
    }
}

proptest! {
    #[test]
    fn ends_with_one_entry_and_leaves_others_theirs(
        balanced: bool,
        was_balanced: bool,
        moved: bool,
        witnessed: bool,
        restarted: bool,
        others in prop::collection::vec(any::<bool>(), 0..3),
    ) {
        let before = if moved { Owner::UsBefore } else { Owner::Us };
        let mut daemon = Daemon::default();
        if !restarted {
            daemon.register(before, was_balanced);
        }
        for balanced in others {
            daemon.register(Owner::Other, balanced);
        }
        let of_others = daemon.count(Owner::Other);
        let former = Former {
            balanced: was_balanced,
            unchanged: !moved && balanced == was_balanced,
            witnessed,
        };
        let mut registering = Registering::new(balanced, Some(former), true);
        let mut action = registering.first();
        let mut steps = 0;
        let ending = loop {
            steps += 1;
            prop_assert!(steps < 10);
            let reply = match action {
                Action::Register { balanced } => daemon.register(Owner::Us, balanced),
                Action::Remove { former: true } => daemon.remove(before),
                Action::Remove { former: false } => daemon.remove(Owner::Us),
                Action::Probe if restarted => Reply::Refused,
                Action::Probe => Reply::Done,
                Action::End(ending) => break ending,
            };
            action = registering.next(reply);
        };
        prop_assert_eq!(daemon.count(Owner::Other), of_others);
        let ours = daemon.count(Owner::Us) + if moved { daemon.count(Owner::UsBefore) } else { 0 };
        if ending == Ending::Registered {
            prop_assert_eq!(ours, 1);
            prop_assert_eq!(daemon.count(Owner::Us), 1);
        } else {
            prop_assert!(of_others > 0, "refused although nobody else has the name");
        }
        let recorded = match registering.record() {
            Record::Former => daemon.count(before),
            Record::Current => daemon.count(Owner::Us),
            Record::Nothing => 0,
        };
        prop_assert_eq!(recorded, ours);
    }
}
