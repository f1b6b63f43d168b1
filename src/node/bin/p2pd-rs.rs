//! The libp2p daemon `p2pd-rs`.

fn main() {
    std::process::exit(p2pd_node::daemon::main(std::env::args_os().collect()));
}
