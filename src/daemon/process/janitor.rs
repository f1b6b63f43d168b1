//! A process that outlives this one if need be, to clear up after it.

use super::launch::{Child, Launch};
use std::fs::File;
use std::io::{self, PipeWriter, Write as _};
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;
use std::sync::{Mutex, PoisonError, TryLockError};

/// Reads lines until the process that writes them has gone, the last line being the daemon's
/// process group, or 0 when that has ended. Then ends the daemon and removes its files.
const SCRIPT: &str = r#"
cd /
group=0
while read -r line; do group=$line; done
if [ "$group" -gt 0 ]; then
    kill -s TERM -- "-$group"
    tries=0
    while [ "$tries" -lt 50 ] && kill -s 0 -- "-$group"; do
        sleep 0.1
        tries=$((tries + 1))
    done
    kill -s KILL -- "-$group"
fi
rm -rf -- "$@"
"#;

#[derive(Debug)]
pub(super) struct Janitor {
    child: Child,
    /// Its standard input, which ends when this process does.
    lifeline: Mutex<Option<PipeWriter>>,
}

impl Janitor {
    pub(super) fn start<'a>(files: impl IntoIterator<Item = Option<&'a Path>>) -> io::Result<Self> {
        let (reader, lifeline) = io::pipe()?;
        let mut path = std::env::var_os("PATH").unwrap_or_default();
        path.push(":/bin:/usr/bin");
        let arguments = ["-c", SCRIPT, "p2pd-janitor"].map(str::as_bytes);
        let files = files.into_iter().flatten();
        let files = files.map(|file| file.as_os_str().as_bytes());
        let null = File::options().write(true).open("/dev/null")?;
        let child = Launch::new(
            Path::new("/bin/sh"),
            arguments.into_iter().chain(files),
            [&reader, &null, &null],
        )?
        .environment([("PATH".into(), path)])
        .run()?;
        Ok(Janitor {
            child,
            lifeline: Mutex::new(Some(lifeline)),
        })
    }

    #[cfg(any(feature = "python", test))]
    pub(super) fn id(&self) -> u32 {
        self.child.id()
    }

    /// Has what is launched tell the janitor of itself.
    pub(super) fn announced(&self, launch: Launch) -> io::Result<Launch> {
        let lifeline = self.lifeline.lock().unwrap_or_else(PoisonError::into_inner);
        match lifeline.as_ref() {
            Some(lifeline) => launch.announced_to(lifeline),
            None => Ok(launch),
        }
    }

    /// Tells it the process group to end, or 0.
    pub(super) fn tell(&self, group: u32) {
        let lifeline = self.lifeline.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(mut lifeline) = lifeline.as_ref() {
            // In one write. It fails if somebody killed it.
            let _ = lifeline.write_all(format!("{group}\n").as_bytes());
        }
    }

    /// Ends it, with nothing done.
    pub(super) fn dismiss(&self) {
        self.child.end();
        self.cut_lifeline();
    }

    pub(super) fn cut_lifeline(&self) {
        match self.lifeline.try_lock() {
            Ok(mut lifeline) => *lifeline = None,
            Err(TryLockError::Poisoned(error)) => *error.into_inner() = None,
            // In a forked child, by a thread that is not there. It was writing its last.
            Err(TryLockError::WouldBlock) => {}
        }
    }
}
