//! One persistent connection of a client.
