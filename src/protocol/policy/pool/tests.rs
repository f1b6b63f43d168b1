//! Tests of the pool: single decisions, and any sequence of them against a simple model.

use super::*;
use crate::command::{control, dht, Typed};
use proptest::prelude::*;

fn fit(_: &u32) -> Fitness {
    Fitness::Fit
}

fn given_back(count: u32, max_idle: usize) -> Pool<u32> {
    let mut pool = Pool::new(max_idle);
    for connection in 0..count {
        let generation = pool.generation();
        pool.give_back(connection, generation, true);
    }
    pool
}

#[test]
fn slow_requests_have_permits_of_their_own() {
    assert_eq!(Permit::of(&control::Identify.encoded()), Permit::Quick);
    let key = bytes::Bytes::new();
    let query = dht::GetValue { key, timeout: None };
    assert_eq!(Permit::of(&query.encoded()), Permit::Slow);
}

#[test]
fn takes_the_fit_connection_used_last() {
    let mut pool = given_back(4, 8);
    let mut closed = Vec::new();
    let fitness = |connection: &u32| match connection {
        3 => Fitness::Stale,
        2 => Fitness::Elsewhere,
        0 => Fitness::Stale,
        _ => Fitness::Fit,
    };
    assert_eq!(pool.take(fitness, &mut closed), Some(1));
    assert_eq!(closed, [3]);
    assert_eq!(pool.take(fitness, &mut closed), None);
    assert_eq!(closed, [3, 0]);
    assert_eq!(pool.take(fit, &mut closed), Some(2));
}

#[test]
fn closes_the_oldest_connection_over_the_limit() {
    let mut pool = given_back(2, 2);
    let generation = pool.generation();
    assert_eq!(pool.give_back(7, generation, true), Some(0));
    assert_eq!(pool.give_back(8, generation, false), Some(8));
    assert_eq!(pool.connections().collect::<Vec<_>>(), [&1, &7]);
}

#[test]
fn closes_connections_in_use_when_they_come_back() {
    let mut pool = given_back(2, 2);
    let before = pool.generation();
    assert_eq!(pool.close_idle(), [0, 1]);
    assert_eq!(pool.give_back(7, before, true), Some(7));
    let after = pool.generation();
    assert_eq!(pool.give_back(8, after, true), None);
}

#[test]
fn keeps_no_connection_without_a_limit_for_it() {
    let mut pool = Pool::new(0);
    let generation = pool.generation();
    assert_eq!(pool.give_back(1, generation, true), Some(1));
}

#[test]
fn witness_is_the_connection_given_back_last_and_stays() {
    let mut pool = given_back(3, 8);
    let mut closed = Vec::new();
    let witness = pool.choose_witness(|_| true, &mut closed).unwrap();
    assert_eq!(pool.take(fit, &mut closed), Some(1));
    assert_eq!(pool.choose_witness(|_| true, &mut closed), Some(witness));
    assert_eq!(pool.begin_probe(witness), Some(&2));
    // While a request runs on it, input is a reply.
    assert_eq!(pool.choose_witness(|_| false, &mut closed), Some(witness));
    assert_eq!(pool.end_probe(witness, true), None);
    assert_eq!(pool.begin_probe(witness), Some(&2));
    assert_eq!(pool.end_probe(witness, false), Some(2));
    assert_eq!(pool.begin_probe(witness), None);
    assert!(closed.is_empty());
}

#[test]
fn stale_witness_is_replaced_under_another_name() {
    let mut pool = given_back(2, 8);
    let mut closed = Vec::new();
    let first = pool.choose_witness(|_| true, &mut closed).unwrap();
    let second = pool.choose_witness(|&one| one != 1, &mut closed).unwrap();
    assert_eq!(closed, [1]);
    assert_ne!(first, second);
    assert_eq!(pool.begin_probe(first), None);
    assert_eq!(pool.end_probe(first, false), None);
    assert_eq!(pool.begin_probe(second), Some(&0));
}

#[test]
fn witness_goes_with_the_idle_connections() {
    let mut pool = given_back(2, 8);
    let mut closed = Vec::new();
    let witness = pool.choose_witness(|_| true, &mut closed).unwrap();
    assert_eq!(pool.close_idle(), [0, 1]);
    assert_eq!(pool.begin_probe(witness), None);
    assert_eq!(pool.choose_witness(|_| true, &mut closed), None);
}

#[derive(Debug, Clone)]
enum Step {
    Open,
    Take,
    GiveBack { which: usize, reusable: bool },
    GoStale { which: usize },
    ChooseWitness,
    Close,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        3 => Just(Step::Open),
        3 => Just(Step::Take),
        4 => (any::<usize>(), prop::bool::weighted(0.8))
            .prop_map(|(which, reusable)| Step::GiveBack { which, reusable }),
        1 => any::<usize>().prop_map(|which| Step::GoStale { which }),
        1 => Just(Step::ChooseWitness),
        1 => Just(Step::Close),
    ]
}

proptest! {
    /// Each connection is in use, idle or closed; none is lost, or handed out twice or stale.
    #[test]
    fn every_connection_is_in_one_place(
        steps in prop::collection::vec(step(), 1..200),
        max_idle in 0usize..5,
    ) {
        let mut pool = Pool::new(max_idle);
        let (mut opened, mut in_use, mut closed) = (0u32, Vec::new(), Vec::new());
        let mut stale = Vec::new();
        for step in steps {
            match step {
                Step::Open => {
                    in_use.push((opened, pool.generation()));
                    opened += 1;
                }
                Step::Take => {
                    let fitness = |connection: &u32| match stale.contains(connection) {
                        true => Fitness::Stale,
                        false => Fitness::Fit,
                    };
                    if let Some(connection) = pool.take(fitness, &mut closed) {
                        prop_assert!(!stale.contains(&connection));
                        in_use.push((connection, pool.generation()));
                    }
                }
                Step::GiveBack { which, reusable } if !in_use.is_empty() => {
                    let (connection, generation) = in_use.remove(which % in_use.len());
                    closed.extend(pool.give_back(connection, generation, reusable));
                }
                Step::GoStale { which } if opened > 0 => stale.push(which as u32 % opened),
                Step::ChooseWitness => {
                    pool.choose_witness(|one| !stale.contains(one), &mut closed);
                }
                Step::Close => {
                    closed.extend(pool.close_idle());
                    prop_assert_eq!(pool.connections().count(), 0);
                }
                Step::GiveBack { .. } | Step::GoStale { .. } => {}
            }
            // The witness does not count as idle.
            prop_assert!(pool.connections().count() <= max_idle + 1);
            let used = in_use.iter().map(|(connection, _)| connection);
            let mut all: Vec<u32> = pool.connections().chain(used).chain(&closed).copied().collect();
            all.sort_unstable();
            prop_assert_eq!(all, (0..opened).collect::<Vec<_>>());
        }
    }
}
