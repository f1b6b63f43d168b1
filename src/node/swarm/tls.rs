//! TLS 1.3 between peers.
//!
//! Like libp2p-tls, whose certificates it uses, but it prefers the cipher suite that is fastest on this
//! processor, and writes no keys to a file. See <https://github.com/libp2p/specs/blob/master/tls/tls.md>.

use futures::future::BoxFuture;
use futures::{AsyncRead, AsyncWrite, FutureExt};
use futures_rustls::{TlsAcceptor, TlsConnector, TlsStream};
use libp2p::identity::Keypair;
use libp2p::PeerId;
use libp2p_tls::certificate;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::ResolvesClientCert;
use rustls::crypto::aws_lc_rs::cipher_suite::{
    TLS13_AES_128_GCM_SHA256, TLS13_AES_256_GCM_SHA384, TLS13_CHACHA20_POLY1305_SHA256,
};
use rustls::crypto::CryptoProvider;
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::server::{ClientHello, ResolvesServerCert};
use rustls::sign::CertifiedKey;
use rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, DistinguishedName, ServerConfig,
    SignatureScheme, SupportedCipherSuite, SupportedProtocolVersion,
};
use std::io;
use std::net::Ipv4Addr;
use std::sync::Arc;

/// The name of the upgrade.
pub const NAME: &str = "/tls/1.0.0";

const ALPN: &[u8] = b"libp2p";
const VERSIONS: &[&SupportedProtocolVersion] = &[&rustls::version::TLS13];

/// The cipher suites, the fastest one first, for processors with instructions for AES.
const WITH_AES: [SupportedCipherSuite; 3] = [
    TLS13_AES_128_GCM_SHA256,
    TLS13_AES_256_GCM_SHA384,
    TLS13_CHACHA20_POLY1305_SHA256,
];
/// The same for other processors.
const WITHOUT_AES: [SupportedCipherSuite; 3] = [
    TLS13_CHACHA20_POLY1305_SHA256,
    TLS13_AES_128_GCM_SHA256,
    TLS13_AES_256_GCM_SHA384,
];

/// The settings of a node's TLS connections.
#[derive(Clone)]
pub struct Config {
    client: TlsConnector,
    server: TlsAcceptor,
}

impl Config {
    /// Makes a certificate for the identity.
    ///
    /// # Errors
    /// The certificate cannot be made.
    pub fn new(identity: &Keypair) -> io::Result<Self> {
        let (certificate, key) = certificate::generate(identity).map_err(io::Error::other)?;
        let mut provider = rustls::crypto::aws_lc_rs::default_provider();
        provider.cipher_suites = suites().to_vec();
        let provider = Arc::new(provider);
        let key = provider
            .key_provider
            .load_private_key(key)
            .map_err(io::Error::other)?;
        let own = Arc::new(Own(Arc::new(CertifiedKey::new(vec![certificate], key))));
        let verifier = Arc::new(Verifier(provider.clone()));
        let mut client = ClientConfig::builder_with_provider(provider.clone())
            .with_protocol_versions(VERSIONS)
            .map_err(io::Error::other)?
            .dangerous()
            .with_custom_certificate_verifier(verifier.clone())
            .with_client_cert_resolver(own.clone());
        client.alpn_protocols = vec![ALPN.to_vec()];
        // The specification forbids to send a name of the server.
        client.enable_sni = false;
        let mut server = ServerConfig::builder_with_provider(provider)
            .with_protocol_versions(VERSIONS)
            .map_err(io::Error::other)?
            .with_client_cert_verifier(verifier)
            .with_cert_resolver(own);
        server.alpn_protocols = vec![ALPN.to_vec()];
        Ok(Self {
            client: TlsConnector::from(Arc::new(client)),
            server: TlsAcceptor::from(Arc::new(server)),
        })
    }

    /// Secures a connection that the peer has opened.
    pub fn inbound<S>(self, socket: S) -> BoxFuture<'static, io::Result<(PeerId, TlsStream<S>)>>
    where
        S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        async move { identified(self.server.accept(socket).await?.into()) }.boxed()
    }

    /// Secures a connection that this node has opened.
    pub fn outbound<S>(self, socket: S) -> BoxFuture<'static, io::Result<(PeerId, TlsStream<S>)>>
    where
        S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let name = ServerName::IpAddress(Ipv4Addr::UNSPECIFIED.into());
        async move { identified(self.client.connect(name, socket).await?.into()) }.boxed()
    }
}

fn suites() -> [SupportedCipherSuite; 3] {
    if has_aes() {
        WITH_AES
    } else {
        WITHOUT_AES
    }
}

#[cfg(target_arch = "x86_64")]
fn has_aes() -> bool {
    std::arch::is_x86_feature_detected!("aes")
}

#[cfg(target_arch = "aarch64")]
fn has_aes() -> bool {
    std::arch::is_aarch64_feature_detected!("aes")
}

#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
fn has_aes() -> bool {
    false
}

/// Returns the peer that a certificate names.
fn identified<S>(stream: TlsStream<S>) -> io::Result<(PeerId, TlsStream<S>)> {
    let (_, state) = stream.get_ref();
    let Some([certificate]) = state.peer_certificates() else {
        return Err(io::Error::other("the peer must send one certificate"));
    };
    let certificate = certificate::parse(certificate).map_err(io::Error::other)?;
    Ok((certificate.peer_id(), stream))
}

/// The certificate of this node.
#[derive(Debug)]
struct Own(Arc<CertifiedKey>);

impl ResolvesClientCert for Own {
    fn resolve(&self, _: &[&[u8]], _: &[SignatureScheme]) -> Option<Arc<CertifiedKey>> {
        Some(self.0.clone())
    }

    fn has_certs(&self) -> bool {
        true
    }
}

impl ResolvesServerCert for Own {
    fn resolve(&self, _: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(self.0.clone())
    }
}

/// Checks that a peer has one certificate, which its key has signed.
#[derive(Debug)]
struct Verifier(Arc<CryptoProvider>);

impl Verifier {
    fn verify(certificate: &CertificateDer<'_>, others: &[CertificateDer<'_>]) -> Verified<()> {
        if !others.is_empty() {
            return Err(CertificateError::ApplicationVerificationFailure.into());
        }
        certificate::parse(certificate)?;
        Ok(())
    }

    fn verify_signature(
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Verified<HandshakeSignatureValid> {
        let certificate = certificate::parse(certificate)?;
        certificate.verify_signature(signed.scheme, message, signed.signature())?;
        Ok(HandshakeSignatureValid::assertion())
    }

    fn schemes(&self) -> Vec<SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}

type Verified<T> = Result<T, rustls::Error>;

/// TLS 1.2 is not offered.
fn old_version<T>() -> Verified<T> {
    Err(rustls::PeerIncompatible::Tls12NotOfferedOrEnabled.into())
}

impl ServerCertVerifier for Verifier {
    fn verify_server_cert(
        &self,
        certificate: &CertificateDer<'_>,
        others: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Verified<ServerCertVerified> {
        Self::verify(certificate, others)?;
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Verified<HandshakeSignatureValid> {
        old_version()
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Verified<HandshakeSignatureValid> {
        Self::verify_signature(message, certificate, signed)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.schemes()
    }
}

impl ClientCertVerifier for Verifier {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        certificate: &CertificateDer<'_>,
        others: &[CertificateDer<'_>],
        _: UnixTime,
    ) -> Verified<ClientCertVerified> {
        Self::verify(certificate, others)?;
        Ok(ClientCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Verified<HandshakeSignatureValid> {
        old_version()
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Verified<HandshakeSignatureValid> {
        Self::verify_signature(message, certificate, signed)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.schemes()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio_util::compat::TokioAsyncReadCompatExt;

    #[tokio::test]
    async fn two_nodes_agree_on_the_fastest_cipher_suite_and_know_each_other() {
        let [alice, bob] = [(); 2].map(|()| Keypair::generate_ed25519());
        let (a, b) = tokio::io::duplex(4096);
        let dialing = Config::new(&alice).unwrap().outbound(a.compat());
        let listening = Config::new(&bob).unwrap().inbound(b.compat());
        let (dialed, accepted) = futures::try_join!(dialing, listening).unwrap();
        assert_eq!(dialed.0, bob.public().to_peer_id());
        assert_eq!(accepted.0, alice.public().to_peer_id());
        let suite = dialed.1.get_ref().1.negotiated_cipher_suite().unwrap();
        let expected = if has_aes() {
            TLS13_AES_128_GCM_SHA256
        } else {
            TLS13_CHACHA20_POLY1305_SHA256
        };
        assert_eq!(suite.suite(), expected.suite());
    }
}
