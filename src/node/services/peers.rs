//! The known addresses of peers.

use libp2p::multiaddr::Protocol;
use libp2p::{Multiaddr, PeerId};
use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Largest number of peers whose addresses are kept.
const MAX_PEERS: usize = 16 * 1024;
/// Largest number of addresses that are kept for a peer.
const MAX_ADDRS: usize = 64;
/// Time for which an address is kept that a client told.
const TEMPORARY: Duration = Duration::from_secs(2 * 60);
/// Time for which the addresses are kept that a peer told, after its last connection has closed.
const RECENT: Duration = Duration::from_secs(30 * 60);

/// Addresses of peers, from clients' requests and from identify. Old ones expire.
#[derive(Debug, Default)]
pub(crate) struct AddressBook(Mutex<HashMap<PeerId, Vec<Known>>>);

#[derive(Debug)]
struct Known {
    addr: Multiaddr,
    expires: Instant,
    /// Whether the peer itself told the address.
    told: bool,
}

impl AddressBook {
    /// Adds addresses from a client's request.
    pub(crate) fn add(&self, peer: PeerId, addrs: impl IntoIterator<Item = Multiaddr>) {
        let mut peers = self.make_room();
        let known = peers.entry(peer).or_default();
        add(known, peer, addrs, Instant::now() + TEMPORARY, false);
    }

    /// Replaces the addresses that a peer told earlier. The earlier ones expire soon.
    pub(crate) fn told(&self, peer: PeerId, addrs: impl IntoIterator<Item = Multiaddr>) {
        let now = Instant::now();
        let mut peers = self.make_room();
        let known = peers.entry(peer).or_default();
        for old in known.iter_mut().filter(|known| known.told) {
            old.told = false;
            old.expires = old.expires.min(now + TEMPORARY);
        }
        add(known, peer, addrs, now + RECENT, true);
    }

    /// Keeps the addresses that a peer told for some time after its connection has closed.
    pub(crate) fn disconnected(&self, peer: &PeerId) {
        let expires = Instant::now() + RECENT;
        if let Some(known) = self.lock().get_mut(peer) {
            let told = known.iter_mut().filter(|known| known.told);
            told.for_each(|known| known.expires = expires);
        }
    }

    /// Removes an address, which belongs to another peer.
    pub(crate) fn remove(&self, peer: &PeerId, addr: &Multiaddr) {
        if let Some(known) = self.lock().get_mut(peer) {
            known.retain(|known| known.addr != *addr);
        }
    }

    /// The known addresses of a peer, without `/p2p`.
    pub(crate) fn get(&self, peer: &PeerId) -> Vec<Multiaddr> {
        let now = Instant::now();
        let peers = self.lock();
        let known = peers.get(peer).into_iter().flatten();
        let current = known.filter(|known| known.expires > now);
        current.map(|known| known.addr.clone()).collect()
    }

    /// Locks the book, and removes the oldest entries if it is full.
    fn make_room(&self) -> MutexGuard<'_, HashMap<PeerId, Vec<Known>>> {
        let mut peers = self.lock();
        if peers.len() >= MAX_PEERS {
            let newest = |known: &Vec<Known>| known.iter().map(|known| known.expires).max();
            let mut ages: Vec<_> = peers.values().map(newest).collect();
            let (_, limit, _) = ages.select_nth_unstable(MAX_PEERS / 8);
            let limit = *limit;
            peers.retain(|_, known| newest(known) > limit);
        }
        peers
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<PeerId, Vec<Known>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn add(
    known: &mut Vec<Known>,
    peer: PeerId,
    addrs: impl IntoIterator<Item = Multiaddr>,
    expires: Instant,
    told: bool,
) {
    for addr in addrs
        .into_iter()
        .filter_map(|addr| without_peer(addr, &peer))
    {
        if let Some(old) = known.iter_mut().find(|known| known.addr == addr) {
            old.expires = old.expires.max(expires);
            old.told |= told;
            continue;
        }
        if known.len() >= MAX_ADDRS {
            let oldest = known.iter().enumerate().min_by_key(|(_, it)| it.expires);
            if let Some((index, _)) = oldest {
                known.swap_remove(index);
            }
        }
        known.push(Known {
            addr,
            expires,
            told,
        });
    }
}

/// Removes the `/p2p` at the end of an address. `None` if it names another peer, or nothing is left.
fn without_peer(mut addr: Multiaddr, peer: &PeerId) -> Option<Multiaddr> {
    if let Some(Protocol::P2p(named)) = addr.iter().last() {
        if named != *peer {
            return None;
        }
        addr.pop();
    }
    (!addr.is_empty()).then_some(addr)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn addr(port: u16) -> Multiaddr {
        format!("/ip4/10.0.0.1/tcp/{port}").parse().unwrap()
    }

    #[test]
    fn keeps_addresses_without_the_peer_and_drops_those_of_others() {
        let (peer, other) = (PeerId::random(), PeerId::random());
        let book = AddressBook::default();
        let own = addr(1).with(Protocol::P2p(peer));
        let foreign = addr(2).with(Protocol::P2p(other));
        book.add(peer, [own, foreign, addr(1)]);
        assert_eq!(book.get(&peer), [addr(1)]);
        book.remove(&peer, &addr(1));
        assert!(book.get(&peer).is_empty());
        assert!(book.get(&other).is_empty());
    }

    #[test]
    fn number_of_addresses_and_peers_is_bounded() {
        let book = AddressBook::default();
        let peer = PeerId::random();
        book.told(peer, [addr(1)]);
        book.add(peer, (2..200).map(addr));
        let known = book.get(&peer);
        assert_eq!(known.len(), MAX_ADDRS);
        assert!(known.contains(&addr(1)), "the peer itself told it");
        for _ in 0..MAX_PEERS + 10 {
            book.add(PeerId::random(), [addr(1)]);
        }
        assert!(book.lock().len() <= MAX_PEERS);
        assert_eq!(book.get(&peer).len(), MAX_ADDRS);
    }

    #[test]
    fn addresses_that_a_peer_no_longer_tells_expire_soon() {
        let book = AddressBook::default();
        let peer = PeerId::random();
        book.told(peer, [addr(1), addr(2)]);
        book.told(peer, [addr(2)]);
        let peers = book.lock();
        let soon = Instant::now() + TEMPORARY;
        let expires = |port| peers[&peer].iter().find(|it| it.addr == addr(port));
        assert!(expires(1).unwrap().expires <= soon);
        assert!(expires(2).unwrap().expires > soon);
    }
}
