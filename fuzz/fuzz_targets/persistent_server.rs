#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| p2pclient_rs_fuzz::persistent_server(data));
