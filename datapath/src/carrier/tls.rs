//! TLS 1.3 with certificates on both sides, judged by whoever owns the carrier.
//!
//! What rustls knows of roots, dates and names is left out: the chain goes to `judge` as it came, once the peer has proved to
//! hold the key, and the handshake goes on only if it agrees. It is asked within the handshake and before anything of the own
//! side is sent that could follow from it, so no byte of a stranger reaches a stream.
//!
//! Invariants:
//! 1. A handshake ends with an alert unless `judge` has accepted the chain. The alert says of what kind the refusal is, no more.
//! 2. No ticket is sent or taken, and no data before the end of the handshake: every connection is judged (case 40).

use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};

use quinn_proto::crypto::rustls::{QuicClientConfig, QuicServerConfig};
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::{ResolvesClientCert, Resumption};
use rustls::crypto::{CryptoProvider, ring, verify_tls13_signature};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::server::{ClientHello, NoServerSessionStorage, ResolvesServerCert};
use rustls::sign::CertifiedKey;
use rustls::{
    CertificateError, CipherSuite, DigitallySignedStruct, DistinguishedName, Error, OtherError,
    SignatureScheme,
};

/// The protocol of links (link/handshake.py).
const ALPN: &[u8] = b"afbus/1";

/// Alerts of TLS by which a certificate is refused (RFC 8446, 6.2).
mod alert {
    pub const UNSUPPORTED_CERTIFICATE: u8 = 43;
    pub const CERTIFICATE_REVOKED: u8 = 44;
    pub const CERTIFICATE_EXPIRED: u8 = 45;
    pub const CERTIFICATE_UNKNOWN: u8 = 46;
    pub const UNKNOWN_CA: u8 = 48;
    pub const ACCESS_DENIED: u8 = 49;
    pub const DECRYPT_ERROR: u8 = 51;
}

/// Who a connection is with, as far as that is known before it is judged.
#[derive(Debug, Clone, Copy)]
pub struct Caller {
    /// Number of the connection.
    pub connection: u64,
    /// Where the peer is.
    pub address: SocketAddr,
    /// Whether the own side has dialed.
    pub is_dialed: bool,
}

/// What a peer has proved.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Proof {
    /// It holds the key of the first certificate.
    Key,
    /// It does not.
    Nothing,
}

/// Decides about a peer by what it presents, its own certificate first: `None`, or the alert that refuses it.
pub type Judge = dyn Fn(Caller, Proof, &[CertificateDer<'static>]) -> Option<u8> + Send + Sync;

/// What the own side presents, and who judges the others.
#[derive(Clone)]
pub struct Trust {
    provider: Arc<CryptoProvider>,
    own: Option<Arc<CertifiedKey>>,
    judge: Arc<Judge>,
}

impl Trust {
    /// Presents a chain (DER, the own certificate first) with its key (PKCS #8). Without a chain it presents nothing.
    ///
    /// # Errors
    /// The key is none that can sign.
    pub fn new(chain: Vec<Vec<u8>>, key: Vec<u8>, judge: Arc<Judge>) -> Result<Self, String> {
        let mut provider = ring::default_provider();
        // Both are strong; this one is a fifth faster.
        provider
            .cipher_suites
            .sort_by_key(|suite| suite.suite() != CipherSuite::TLS13_AES_128_GCM_SHA256);
        let own = if chain.is_empty() {
            None
        } else {
            let key = PrivateKeyDer::Pkcs8(key.into());
            let key = ring::sign::any_supported_type(&key).map_err(|e| e.to_string())?;
            let chain = chain.into_iter().map(CertificateDer::from).collect();
            Some(Arc::new(CertifiedKey::new(chain, key)))
        };
        Ok(Self {
            provider: Arc::new(provider),
            own,
            judge,
        })
    }

    /// The same judge, and other certificates.
    ///
    /// # Errors
    /// As [`Self::new`].
    pub fn renew(&self, chain: Vec<Vec<u8>>, key: Vec<u8>) -> Result<Self, String> {
        Self::new(chain, key, self.judge.clone())
    }

    fn verifier(&self, caller: Caller) -> Arc<Verifier> {
        Arc::new(Verifier {
            provider: self.provider.clone(),
            judge: self.judge.clone(),
            caller,
            chain: Mutex::default(),
        })
    }

    /// What a connection begins with that this side has dialed.
    ///
    /// # Panics
    /// Never: the provider has what QUIC needs.
    #[must_use]
    pub fn client(&self, caller: Caller) -> Arc<QuicClientConfig> {
        let builder = rustls::ClientConfig::builder_with_provider(self.provider.clone())
            .with_protocol_versions(&[&rustls::version::TLS13])
            .expect("the provider has TLS 1.3");
        let mut config = builder
            .dangerous()
            .with_custom_certificate_verifier(self.verifier(caller))
            .with_client_cert_resolver(Arc::new(Own(self.own.clone())));
        config.alpn_protocols = vec![ALPN.to_vec()];
        config.resumption = Resumption::disabled();
        config.enable_sni = false;
        config.enable_early_data = false;
        Arc::new(QuicClientConfig::try_from(config).expect("the provider has AES-128-GCM"))
    }

    /// What a connection begins with that the peer has dialed.
    ///
    /// # Panics
    /// Never, as [`Self::client`].
    #[must_use]
    pub fn server(&self, caller: Caller) -> Arc<QuicServerConfig> {
        let builder = rustls::ServerConfig::builder_with_provider(self.provider.clone())
            .with_protocol_versions(&[&rustls::version::TLS13])
            .expect("the provider has TLS 1.3");
        let mut config = builder
            .with_client_cert_verifier(self.verifier(caller))
            .with_cert_resolver(Arc::new(Own(self.own.clone())));
        config.alpn_protocols = vec![ALPN.to_vec()];
        config.session_storage = Arc::new(NoServerSessionStorage {});
        config.send_tls13_tickets = 0;
        config.max_early_data_size = 0;
        Arc::new(QuicServerConfig::try_from(config).expect("the provider has AES-128-GCM"))
    }
}

#[derive(Debug)]
struct Own(Option<Arc<CertifiedKey>>);

impl ResolvesClientCert for Own {
    fn resolve(&self, _: &[&[u8]], _: &[SignatureScheme]) -> Option<Arc<CertifiedKey>> {
        self.0.clone()
    }

    fn has_certs(&self) -> bool {
        self.0.is_some()
    }
}

impl ResolvesServerCert for Own {
    fn resolve(&self, _: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        self.0.clone()
    }
}

/// Asks the judge about one connection.
struct Verifier {
    provider: Arc<CryptoProvider>,
    judge: Arc<Judge>,
    caller: Caller,
    chain: Mutex<Vec<CertificateDer<'static>>>,
}

impl std::fmt::Debug for Verifier {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Verifier").field(&self.caller).finish()
    }
}

impl Verifier {
    fn keep(&self, own: &CertificateDer<'_>, above: &[CertificateDer<'_>]) {
        let mut chain = self.chain.lock().unwrap_or_else(PoisonError::into_inner);
        *chain = std::iter::once(own)
            .chain(above)
            .map(|c| c.clone().into_owned())
            .collect();
    }

    /// Checks that the peer holds the key, and asks the judge; also where it does not, for the log.
    fn judge(
        &self,
        message: &[u8],
        own: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        let algorithms = &self.provider.signature_verification_algorithms;
        let proved = verify_tls13_signature(message, own, signed, algorithms);
        let is_key_missing = matches!(
            proved,
            Err(Error::InvalidCertificate(CertificateError::BadSignature))
        );
        let proof = if is_key_missing {
            Proof::Nothing
        } else {
            Proof::Key
        };
        let chain = self.chain.lock().unwrap_or_else(PoisonError::into_inner);
        match (self.judge)(self.caller, proof, &chain) {
            None => proved,
            Some(alert) => Err(Error::InvalidCertificate(error_of(alert))),
        }
    }
}

/// What makes rustls send an alert.
fn error_of(alert: u8) -> CertificateError {
    match alert {
        alert::UNSUPPORTED_CERTIFICATE => CertificateError::InvalidPurpose,
        alert::CERTIFICATE_REVOKED => CertificateError::Revoked,
        alert::CERTIFICATE_EXPIRED => CertificateError::Expired,
        alert::CERTIFICATE_UNKNOWN => CertificateError::Other(OtherError(Arc::new(NoName))),
        alert::UNKNOWN_CA => CertificateError::UnknownIssuer,
        alert::ACCESS_DENIED => CertificateError::ApplicationVerificationFailure,
        alert::DECRYPT_ERROR => CertificateError::BadSignature,
        _ => CertificateError::BadEncoding,
    }
}

#[derive(Debug)]
struct NoName;

impl std::fmt::Display for NoName {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("no name")
    }
}

impl std::error::Error for NoName {}

impl ServerCertVerifier for Verifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        self.keep(end_entity, intermediates);
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Err(Error::General("TLS 1.3 alone is spoken".to_owned()))
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.judge(message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        let algorithms = &self.provider.signature_verification_algorithms;
        algorithms.supported_schemes()
    }
}

impl ClientCertVerifier for Verifier {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        self.keep(end_entity, intermediates);
        Ok(ClientCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        ServerCertVerifier::verify_tls12_signature(self, message, cert, dss)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.judge(message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        ServerCertVerifier::supported_verify_schemes(self)
    }
}
