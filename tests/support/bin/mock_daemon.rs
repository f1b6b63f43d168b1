//! The mock daemon as a program: `mock_daemon CONTROL_MADDR`. It prints its addresses like p2pd.

use p2pd_test_support::mock_daemon::MockDaemon;
use std::error::Error;

fn main() -> Result<(), Box<dyn Error>> {
    let control = std::env::args()
        .nth(1)
        .ok_or("usage: mock_daemon CONTROL_MADDR")?;
    let daemon = MockDaemon::bind(&control.parse()?)?;
    println!("Control socket: {}", daemon.control_maddr());
    println!("Peer ID: {}", daemon.peer_id());
    println!("Peer Addrs: {}", daemon.peer_addr());
    Ok(daemon.run()?)
}
