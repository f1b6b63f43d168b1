//! Replays the seeds and the committed corpora of the fuzz targets.

#[path = "../fuzz/src/lib.rs"]
mod fuzz;

use std::fs;
use std::panic::catch_unwind;
use std::path::Path;

fn run(target: fuzz::Target, name: &str, input: &[u8]) {
    // Names the input, which the target's panic does not.
    if catch_unwind(|| target(input)).is_err() {
        panic!("{name} fails");
    }
}

#[test]
fn seeds_pass_however_they_are_split() {
    for (name, seeds) in fuzz::seeds() {
        let (_, target) = fuzz::TARGETS[fuzz::TARGETS.partition_point(|(known, _)| *known < name)];
        for (number, seed) in seeds.into_iter().enumerate() {
            run(target, &format!("{name}: seed {number}"), &seed);
            // Every prefix, and every byte changed.
            for at in 0..seed.len() {
                run(
                    target,
                    &format!("{name}: seed {number} up to {at}"),
                    &seed[..at],
                );
                let mut changed = seed.clone();
                for change in [0x01, 0x80, 0xff] {
                    changed[at] = seed[at] ^ change;
                    run(
                        target,
                        &format!("{name}: seed {number}, byte {at} ^ {change}"),
                        &changed,
                    );
                }
            }
        }
    }
}

#[test]
fn the_corpus_holds() {
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus");
    for (name, target) in fuzz::TARGETS {
        let files =
            fs::read_dir(corpus.join(name)).unwrap_or_else(|error| panic!("{name}: {error}"));
        let mut count = 0;
        for file in files {
            let path = file.unwrap().path();
            run(
                target,
                &path.display().to_string(),
                &fs::read(&path).unwrap(),
            );
            count += 1;
        }
        assert!(count > 0, "{name} has no corpus");
    }
}
