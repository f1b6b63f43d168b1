//! Refuses to build for a free-threaded Python.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    // PyO3 passes the configuration of the interpreter in hexadecimal.
    let config = std::env::var("DEP_PYO3_PYTHON_PYO3_CONFIG").unwrap_or_default();
    let flag: String = b"Py_GIL_DISABLED"
        .map(|byte| format!("{byte:02x}"))
        .concat();
    if config.contains(&flag) {
        return Err(
            "p2pclient-rs does not support free-threaded Python: build with the GIL".into(),
        );
    }
    Ok(())
}
