//! Unary calls to peers, over the current session of a client.

use super::reader::Owner;
use super::session::Session;
use crate::error::Error;
use crate::lock;
use crate::pool::Pool;
use bytes::Bytes;
use p2pd_protocol::policy::retry::Attempt;
use p2pd_protocol::{PeerId, UnaryLimits};
use std::sync::{Arc, Mutex};
use tokio::time::Instant;

/// Unary calls of a client.
pub struct UnaryCalls {
    pool: Arc<Pool>,
    limits: UnaryLimits,
    /// The current session. Closing the client replaces it.
    session: Mutex<Arc<Session>>,
}

impl UnaryCalls {
    pub fn new(pool: Arc<Pool>, limits: UnaryLimits) -> Self {
        let session = Session::new(Arc::clone(&pool), limits);
        Self {
            pool,
            limits,
            session: Mutex::new(session),
        }
    }

    pub fn session(&self) -> Arc<Session> {
        Arc::clone(&lock(&self.session))
    }

    pub async fn call(
        &self,
        peer: &PeerId,
        protocol: &str,
        payload: Bytes,
    ) -> Result<Bytes, Error> {
        let session = self.session();
        let mut attempt = Attempt {
            pooled: true,
            repeated: false,
        };
        let call = loop {
            let Some(connection) = session.connection() else {
                session.connect().await?;
                if session.connection().is_none() {
                    if !attempt.may_retry(true) {
                        return Err(Error::lost(
                            "the connection was lost as soon as it was open",
                            true,
                        ));
                    }
                    attempt.repeated = true;
                }
                continue;
            };
            connection.wait_for_room().await;
            let sent = connection.call(&payload, |core, token, head| {
                let (len, now) = (payload.len(), Instant::now().into_std());
                core.call(peer.as_bytes(), protocol, len, token, now, head)
            });
            match sent {
                Ok(call) => break call,
                Err(error) if attempt.may_retry(error.is_unsent()) => {
                    attempt.repeated = true;
                    Arc::clone(&session).lost(&connection, error);
                }
                Err(error) => return Err(error),
            }
        };
        drop((session, payload));
        call.reply().await
    }

    pub async fn close(&self) {
        let next = Session::new(Arc::clone(&self.pool), self.limits);
        let session = std::mem::replace(&mut *lock(&self.session), next);
        session.close().await;
    }
}
