use super::*;

#[test]
fn accepts_only_a_record_that_the_peer_itself_signed() {
    let (key, other) = (Keypair::generate_ed25519(), Keypair::generate_ed25519());
    let addrs: Vec<Multiaddr> = vec!["/ip4/10.0.0.1/tcp/1".parse().unwrap()];
    let record = PeerRecord::new_interop(&key, addrs.clone()).unwrap();
    let record = record.into_signed_envelope().into_protobuf_encoding();
    let peer = key.public().to_peer_id();
    assert_eq!(signed_addrs(&record, peer), Some(addrs));
    assert_eq!(signed_addrs(&record, other.public().to_peer_id()), None);
    assert_eq!(signed_addrs(&record[1..], peer), None);
}
