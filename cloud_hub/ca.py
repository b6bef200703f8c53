"""The hub's certificate authority: one P-256 root that signs the hub's own and the boxes' certificates.

Reads and writes ca.key (0600, encrypted with a passphrase that lies elsewhere) and ca.pem; gives certificates and revocation lists as values.
Never decides who may have a certificate: enrolment does, in the transaction that spends the token.
Source: RFC 5280; RFC 9525 (names in subjectAltName).
"""

import hashlib
import ipaddress
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fleet_link import pki
from fleet_link.errors import SiteError, TrustError
from fleet_link.files import write_durably
from fleet_link.topics import HUB, is_device_id

ROOT_DAYS = 3653
SKEW = timedelta(hours=1)  # a box whose clock is behind must still find its new certificate valid


@dataclass(frozen=True)
class Authority:
    key: ec.EllipticCurvePrivateKey
    certificate: x509.Certificate

    @property
    def pem(self) -> bytes:
        return self.certificate.public_bytes(serialization.Encoding.PEM)

    @property
    def sha256(self) -> str:
        """The pin in an enrolment token: sha256 of the root's DER."""
        return hashlib.sha256(self.certificate.public_bytes(serialization.Encoding.DER)).hexdigest()

    def issue_device(
        self, public_key: ec.EllipticCurvePublicKey, device: str, *, days: int, now: float
    ) -> x509.Certificate:
        """A box's client and signing certificate. Raises TrustError on what cannot be a device's name."""
        if not is_device_id(device):
            raise TrustError(f"{device[:80]!r} cannot be a device's name", advice="fleet devices shows the names")
        return self._issue(public_key, device, [device], days=days, now=now, usage=_CLIENT)

    def issue_hub(self, public_key: ec.EllipticCurvePublicKey, *, days: int, now: float) -> x509.Certificate:
        """The hub's own MQTT and envelope-signing certificate, CN=hub."""
        return self._issue(public_key, HUB, [HUB], days=days, now=now, usage=_CLIENT)

    def issue_server(
        self, public_key: ec.EllipticCurvePublicKey, names: Iterable[str], *, days: int, now: float
    ) -> x509.Certificate:
        """For the broker's and the HTTPS listener; `names` are host names or addresses."""
        unique = list(dict.fromkeys(names))
        return self._issue(public_key, unique[0], unique, days=days, now=now, usage=_SERVER)

    def revocation_list(self, revoked: Iterable[tuple[int, float]], *, days: int, now: float) -> bytes:
        """PEM of a CRL over (serial, revoked_at)."""
        at = _utc(now)
        builder = x509.CertificateRevocationListBuilder().issuer_name(self.certificate.subject)
        builder = builder.last_update(at - SKEW).next_update(at + timedelta(days=days))
        for serial, revoked_at in revoked:
            entry = x509.RevokedCertificateBuilder().serial_number(serial).revocation_date(_utc(revoked_at))
            builder = builder.add_revoked_certificate(entry.build())
        builder = builder.add_extension(x509.CRLNumber(int(now * 1000)), critical=False)
        builder = builder.add_extension(self._authority_key_id(), critical=False)
        return builder.sign(self.key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)

    def _issue(
        self,
        public_key: ec.EllipticCurvePublicKey,
        common_name: str,
        names: list[str],
        *,
        days: int,
        now: float,
        usage: x509.ObjectIdentifier,
    ) -> x509.Certificate:
        at = _utc(now)
        end = min(at + timedelta(days=days), self.certificate.not_valid_after_utc)
        builder = (
            x509.CertificateBuilder()
            .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name[:64])]))
            .issuer_name(self.certificate.subject)
            .public_key(public_key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(at - SKEW)
            .not_valid_after(end)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_key_usage(signs_certificates=False), critical=True)
            .add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
            .add_extension(x509.SubjectAlternativeName([_general_name(name) for name in names]), critical=False)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(public_key), critical=False)
            .add_extension(self._authority_key_id(), critical=False)
        )
        return builder.sign(self.key, hashes.SHA256())

    def _authority_key_id(self) -> x509.AuthorityKeyIdentifier:
        return x509.AuthorityKeyIdentifier.from_issuer_public_key(self.key.public_key())


_CLIENT = ExtendedKeyUsageOID.CLIENT_AUTH
_SERVER = ExtendedKeyUsageOID.SERVER_AUTH


def create(key: ec.EllipticCurvePrivateKey, *, name: str, now: float) -> Authority:
    """A new self-signed root."""
    at = _utc(now)
    subject = x509.Name(
        [x509.NameAttribute(NameOID.ORGANIZATION_NAME, "Wardround"), x509.NameAttribute(NameOID.COMMON_NAME, name)]
    )
    certificate = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(at - SKEW)
        .not_valid_after(at + timedelta(days=ROOT_DAYS))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_key_usage(signs_certificates=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )
    return Authority(key, certificate)


def load(key_path: Path, certificate_path: Path, passphrase_path: Path) -> Authority:
    """The passphrase is read only where the key is encrypted.

    Raises SiteError when a file is missing, unreadable, or they do not belong together.
    """
    passphrase = read_passphrase(passphrase_path) if is_encrypted(key_path) else None
    try:
        key = pki.load_private_key(key_path, passphrase=passphrase)
        certificate = x509.load_pem_x509_certificate(certificate_path.read_bytes())
    except (SiteError, OSError, ValueError) as error:
        advice = f"restore ca/ from backup; is {passphrase_path} the passphrase of this key?" if passphrase else ""
        raise SiteError(f"the hub's CA cannot be read: {error}", advice=advice or "restore ca/ from backup") from error
    if key.public_key() != certificate.public_key():
        raise SiteError("ca.key and ca.pem do not belong together", advice="restore ca/ from one backup")
    return Authority(key, certificate)


def is_encrypted(key_path: Path) -> bool:
    """False too where there is none. Source: RFC 7468, 11."""
    try:
        return b"-----BEGIN ENCRYPTED PRIVATE KEY-----" in key_path.read_bytes()
    except OSError:
        return False


def read_passphrase(path: Path) -> bytes:
    """Its first line. Raises SiteError when it is not there or empty."""
    try:
        passphrase = path.read_bytes().partition(b"\n")[0].strip()
    except OSError as error:
        raise SiteError(
            f"the passphrase of the CA's key cannot be read: {path}: {error.strerror}",
            advice="put it back from where it is kept apart, or set certificates.ca_passphrase to where it is",
        ) from error
    if not passphrase:
        raise SiteError(f"{path} holds no passphrase", advice="put the passphrase of the CA's key there, in one line")
    return passphrase


def encrypt(key_path: Path, passphrase_path: Path) -> None:
    """Put the encrypted key in the place of the plain one, in one step. Raises SiteError."""
    key = pki.load_private_key(key_path)
    write_durably(key_path, pki.private_key_pem(key, passphrase=read_passphrase(passphrase_path)), mode=0o600)


def public_key_sha256(public_key: ec.EllipticCurvePublicKey) -> str:
    der = public_key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    return hashlib.sha256(der).hexdigest()


def _key_usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _general_name(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)


def _utc(unix_s: float) -> datetime:
    return datetime.fromtimestamp(int(unix_s), UTC)
