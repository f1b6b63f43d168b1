//! Writes the seeds to a directory: one folder per target.

use std::{env, fs, path::Path};

fn main() -> std::io::Result<()> {
    let directory = env::args().nth(1).expect("where to write them");
    for (target, seeds) in p2pclient_rs_fuzz::seeds() {
        let folder = Path::new(&directory).join(target);
        fs::create_dir_all(&folder)?;
        for (number, seed) in seeds.iter().enumerate() {
            fs::write(folder.join(format!("seed-{number}")), seed)?;
        }
    }
    Ok(())
}
