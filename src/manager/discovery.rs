//! Discovery of the daemon's binary.
//!
//! Searches, in this order: the path that the caller gives, the variable `P2PD_PATH`, the
//! directories of `PATH`, and the package of an installed hivemind. The first two are explicit
//! choices: if one is wrong, that is an error, and no other daemon is used instead.

use std::ffi::OsStr;
use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

/// The name searched for in `PATH`.
pub const BINARY: &str = "p2pd";
/// The variable that names the binary.
pub const VARIABLE: &str = "P2PD_PATH";
/// The path of the binary in hivemind's package directory.
const IN_HIVEMIND: &str = "hivemind_cli/p2pd";

/// The places to search.
#[derive(Debug, Clone, Default)]
pub struct Search<'a> {
    /// The caller's choice: a path, or a bare name to search for in `path`.
    pub explicit: Option<&'a Path>,
    /// The value of `P2PD_PATH`; an empty one counts as unset.
    pub variable: Option<&'a OsStr>,
    /// The value of `PATH`.
    pub path: Option<&'a OsStr>,
    /// The package directories of an installed hivemind.
    pub hivemind: Vec<PathBuf>,
}

/// Why a path was rejected.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Rejection {
    /// It does not exist.
    Missing,
    /// It is a directory, a socket or another special file.
    NotAFile,
    /// The file is not executable.
    NotExecutable,
    /// It cannot be examined.
    Unreadable(io::ErrorKind),
}

impl fmt::Display for Rejection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Rejection::Missing => f.write_str("does not exist"),
            Rejection::NotAFile => f.write_str("is not a file"),
            Rejection::NotExecutable => f.write_str("is not executable"),
            Rejection::Unreadable(kind) => write!(f, "cannot be examined: {kind}"),
        }
    }
}

/// No binary was found.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "no libp2p daemon binary found:{}\n  hint: {}",
    .looked_at.iter().map(|place| format!("\n  {place}")).collect::<String>(),
    .hint
)]
#[non_exhaustive]
pub struct NotFound {
    /// Every place searched, each with the reason why it was rejected.
    pub looked_at: Vec<String>,
    /// A hint for the user, in one line.
    pub hint: &'static str,
}

/// Finds the daemon's binary.
///
/// ```
/// use p2pd_manager::{find, Search};
/// use std::path::Path;
///
/// let search = Search { explicit: Some(Path::new("/no/p2pd")), ..Search::default() };
/// assert_eq!(find(&search).unwrap_err().looked_at, ["argument: /no/p2pd does not exist"]);
/// ```
pub fn find(search: &Search<'_>) -> Result<PathBuf, NotFound> {
    let variable = search
        .variable
        .filter(|value| !value.is_empty())
        .map(Path::new);
    let mut looked_at = Vec::new();
    let found = match (search.explicit, variable) {
        (Some(named), _) => search.find_named("argument", named, &mut looked_at),
        (None, Some(named)) => search.find_named(VARIABLE, named, &mut looked_at),
        (None, None) => {
            looked_at.push(format!("{VARIABLE}: not set"));
            search
                .in_path(Path::new(BINARY), &mut looked_at)
                .or_else(|| search.in_hivemind(&mut looked_at))
        }
    };
    let hint = match (search.explicit, variable) {
        (Some(_), _) => "correct the path of the binary, or omit it to search for one",
        (None, Some(_)) => "set P2PD_PATH to the path of a p2pd, or unset it to search for one",
        (None, None) => {
            "set P2PD_PATH to the path of a p2pd, put one into a directory of PATH, or install \
             hivemind, which brings one (pip install hivemind)"
        }
    };
    found.ok_or(NotFound { looked_at, hint })
}

impl Search<'_> {
    fn find_named(
        &self,
        source: &str,
        named: &Path,
        looked_at: &mut Vec<String>,
    ) -> Option<PathBuf> {
        if named.components().count() == 1 && named.is_relative() && !named.starts_with(".") {
            return self.in_path(named, looked_at);
        }
        try_one(source, named.into(), looked_at)
    }

    fn in_path(&self, name: &Path, looked_at: &mut Vec<String>) -> Option<PathBuf> {
        let directories: Vec<_> = std::env::split_paths(self.path.unwrap_or_default())
            .filter(|directory| !directory.as_os_str().is_empty())
            .collect();
        let mut empty = Vec::new();
        for directory in directories {
            let candidate = directory.join(name);
            match check(&candidate) {
                Ok(()) => return Some(candidate),
                Err(Rejection::Missing) => empty.push(directory.display().to_string()),
                Err(why) => looked_at.push(format!("PATH: {} {why}", candidate.display())),
            }
        }
        let name = name.display();
        looked_at.push(match empty.as_slice() {
            [] => format!("PATH: no {name}"),
            _ => format!("PATH: no {name} in {}", empty.join(", ")),
        });
        None
    }

    fn in_hivemind(&self, looked_at: &mut Vec<String>) -> Option<PathBuf> {
        if self.hivemind.is_empty() {
            looked_at.push("hivemind: not installed".into());
        }
        let candidates = self
            .hivemind
            .iter()
            .map(|package| package.join(IN_HIVEMIND));
        candidates
            .into_iter()
            .find_map(|path| try_one("hivemind", path, looked_at))
    }
}

fn try_one(source: &str, path: PathBuf, looked_at: &mut Vec<String>) -> Option<PathBuf> {
    match check(&path) {
        Ok(()) => Some(path),
        Err(why) => {
            looked_at.push(format!("{source}: {} {why}", path.display()));
            None
        }
    }
}

/// Checks that a path is an executable file.
pub fn check(path: &Path) -> Result<(), Rejection> {
    let metadata = std::fs::metadata(path).map_err(|error| match error.kind() {
        io::ErrorKind::NotFound | io::ErrorKind::NotADirectory => Rejection::Missing,
        kind => Rejection::Unreadable(kind),
    })?;
    if !metadata.is_file() {
        return Err(Rejection::NotAFile);
    }
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt as _;
        if metadata.permissions().mode() & 0o111 == 0 {
            return Err(Rejection::NotExecutable);
        }
    }
    Ok(())
}

#[cfg(all(test, unix))]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt as _;

    /// A directory that is removed at the end of the test.
    struct Dir(PathBuf);

    impl Dir {
        fn new(name: &str) -> Self {
            let unique = format!("p2pclient-rs-{name}-{}", std::process::id());
            let dir = std::env::temp_dir().join(unique);
            std::fs::create_dir_all(&dir).unwrap();
            Dir(dir)
        }

        fn file(&self, path: &str, mode: u32) -> PathBuf {
            let file = self.0.join(path);
            std::fs::create_dir_all(file.parent().unwrap()).unwrap();
            std::fs::write(&file, "").unwrap();
            std::fs::set_permissions(&file, std::fs::Permissions::from_mode(mode)).unwrap();
            file
        }
    }

    impl Drop for Dir {
        fn drop(&mut self) {
            let _ = std::fs::remove_dir_all(&self.0);
        }
    }

    #[test]
    fn prefers_earlier_sources() {
        let dir = Dir::new("order");
        let [argument, variable] = ["argument", "variable"].map(|name| dir.file(name, 0o755));
        let in_path = dir.file("bin/p2pd", 0o755);
        let in_hivemind = dir.file("hivemind/hivemind_cli/p2pd", 0o755);
        let path = std::env::join_paths([dir.0.join("none"), dir.0.join("bin")]).unwrap();

        let mut search = Search {
            explicit: Some(&argument),
            variable: Some(variable.as_os_str()),
            path: Some(&path),
            hivemind: vec![dir.0.join("hivemind")],
        };
        assert_eq!(find(&search).unwrap(), argument);
        search.explicit = None;
        assert_eq!(find(&search).unwrap(), variable);
        search.variable = Some(OsStr::new(""));
        assert_eq!(find(&search).unwrap(), in_path);
        search.path = None;
        assert_eq!(find(&search).unwrap(), in_hivemind);
    }

    #[test]
    fn searches_path_for_a_bare_name() {
        let dir = Dir::new("bare");
        let js = dir.file("jsp2pd", 0o755);
        let search = Search {
            explicit: Some(Path::new("jsp2pd")),
            path: Some(dir.0.as_os_str()),
            ..Default::default()
        };
        assert_eq!(find(&search).unwrap(), js);
    }

    #[test]
    fn does_not_replace_a_wrong_choice_by_another_daemon() {
        let dir = Dir::new("named");
        dir.file("p2pd", 0o755);
        let missing = dir.0.join("missing");
        let path = Some(dir.0.as_os_str());
        let argument = Search {
            explicit: Some(&missing),
            path,
            ..Default::default()
        };
        let variable = Search {
            variable: Some(missing.as_os_str()),
            path,
            ..Default::default()
        };
        for (search, source) in [(argument, "argument"), (variable, VARIABLE)] {
            let NotFound { looked_at, hint } = find(&search).unwrap_err();
            assert!(hint.contains("to search for one"));
            assert_eq!(
                looked_at,
                [format!("{source}: {} does not exist", missing.display())]
            );
        }
    }

    #[test]
    fn error_names_every_place_and_its_problem() {
        let dir = Dir::new("reasons");
        let plain = dir.file("plain/p2pd", 0o644);
        let directory = dir.0.join("directory/p2pd");
        std::fs::create_dir_all(&directory).unwrap();
        let empty = dir.0.join("empty");
        let path =
            std::env::join_paths([dir.0.join("plain"), dir.0.join("directory"), empty.clone()]);
        let search = Search {
            path: Some(&path.unwrap()),
            hivemind: vec![dir.0.join("hivemind")],
            ..Default::default()
        };
        let expected = [
            "P2PD_PATH: not set".to_string(),
            format!("PATH: {} is not executable", plain.display()),
            format!("PATH: {} is not a file", directory.display()),
            format!("PATH: no p2pd in {}", empty.display()),
            format!(
                "hivemind: {}/hivemind/hivemind_cli/p2pd does not exist",
                dir.0.display()
            ),
        ];
        assert_eq!(find(&search).unwrap_err().looked_at, expected);
    }

    #[test]
    fn says_if_there_is_nothing_to_search() {
        let expected = [
            "P2PD_PATH: not set",
            "PATH: no p2pd",
            "hivemind: not installed",
        ];
        let error = find(&Search::default()).unwrap_err();
        assert_eq!(error.looked_at, expected);
        let text = error.to_string();
        assert!(text
            .lines()
            .last()
            .unwrap()
            .starts_with("  hint: set P2PD_PATH"));
    }
}
