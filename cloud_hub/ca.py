"""The hub's certificate authority: a P-256 root that signs intermediates, and an intermediate that signs all the rest.

Reads ca.pem (the root, then its intermediates) and the intermediates' encrypted keys; gives certificates and revocation lists as values.
Never needs the root's key, and never decides who may have a certificate: enrolment does, in the transaction that spends the token.
Source: RFC 5280; RFC 9525 (names in subjectAltName).
"""

import hashlib
import ipaddress
from collections.abc import Iterable
from dataclasses import dataclass, field
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

ROOT_DAYS = 7305
SINGLE_CA_DAYS = 3653
INTERMEDIATE_DAYS = 1826
INTERMEDIATE_ALARM = timedelta(days=366)
# A new intermediate is shown for so long before it signs: every box that is on has asked for it by then.
LEAD = timedelta(days=7)
SKEW = timedelta(hours=1)  # a box whose clock is behind must still find its new certificate valid


@dataclass(frozen=True)
class Issuer:
    """A CA certificate and its key."""

    key: ec.EllipticCurvePrivateKey = field(repr=False)
    certificate: x509.Certificate

    @property
    def key_id(self) -> x509.AuthorityKeyIdentifier:
        return x509.AuthorityKeyIdentifier.from_issuer_public_key(self.key.public_key())

    @property
    def signs_from(self) -> datetime:
        """When every box has had the time to learn of it."""
        return self.certificate.not_valid_before_utc + SKEW + LEAD


class Authority:
    """The root that the boxes pin, and who signs in its name: its intermediates, or itself in a hub of before.

    Shared by threads: `take_up` puts further intermediates in, each call sees the former ones or the new ones whole.
    """

    def __init__(self, root: x509.Certificate, issuers: tuple[Issuer, ...]) -> None:
        self.root = root
        self._issuers = issuers  # the oldest first
        self.trust = pki.Trust(self.pem)

    def take_up(self, other: "Authority") -> None:
        self.trust.refresh(other.pem)
        self._issuers = other.issuers

    @property
    def issuers(self) -> tuple[Issuer, ...]:
        return self._issuers

    @property
    def is_single(self) -> bool:
        """A hub of before: its root signs by itself, and cannot have an intermediate (its path length is 0)."""
        return self._issuers[0].certificate == self.root

    @property
    def certificates(self) -> list[x509.Certificate]:
        """The root, then its intermediates."""
        return [self.root, *(issuer.certificate for issuer in self._issuers if issuer.certificate != self.root)]

    @property
    def pem(self) -> bytes:
        """ca.pem."""
        return pki.pem(self.certificates)

    @property
    def sha256(self) -> str:
        """The pin in an enrolment token: sha256 of the root's DER."""
        return pki.fingerprint(self.root.public_bytes(serialization.Encoding.DER))

    def chain_pem(self, certificate: x509.Certificate) -> bytes:
        """What the holder of this certificate shows in TLS."""
        return pki.chain_pem(certificate, self.certificates)

    def issuer_at(self, now: float) -> Issuer:
        """The newest of those that are valid and have been shown for long enough. Raises SiteError when all have ended."""
        at, issuers = _utc(now), self._issuers
        valid = [one for one in issuers if at < one.certificate.not_valid_after_utc]
        if not valid:
            raise SiteError(
                "the certificate of the hub's CA has ended", advice="hub new-intermediate, with the root's key"
            )
        shown = [one for one in valid if one is issuers[0] or one.signs_from <= at]
        return (shown or valid)[-1]

    def trouble(self, now: float) -> str:
        """What the operator must know of the last intermediate's end, "" while it is far."""
        end = self.issuers[-1].certificate.not_valid_after_utc
        if self.is_single or _utc(now) < end - INTERMEDIATE_ALARM:
            return ""
        return f"the hub's intermediate certificate ends on {end:%Y-%m-%d}: fetch the root's key, hub new-intermediate"

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

    def revocation_list(self, revoked: Iterable[tuple[x509.Certificate, float]], *, days: int, now: float) -> bytes:
        """PEM of one CRL for each issuer, over (certificate, revoked_at).

        The broker refuses whatever an issuer without a list has signed; the root's own list it does not ask for
        (Mosquitto 2.0.11: X509_V_FLAG_CRL_CHECK, the leaf only).
        """
        listed = list(revoked)
        return b"".join(_revocation_list(issuer, listed, days=days, now=now) for issuer in self._issuers)

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
        at, issuer = _utc(now), self.issuer_at(now)
        end = min(at + timedelta(days=days), issuer.certificate.not_valid_after_utc)
        builder = (
            x509.CertificateBuilder()
            .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name[:64])]))
            .issuer_name(issuer.certificate.subject)
            .public_key(public_key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(at - SKEW)
            .not_valid_after(end)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_key_usage(signs_certificates=False), critical=True)
            .add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
            .add_extension(x509.SubjectAlternativeName([_general_name(name) for name in names]), critical=False)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(public_key), critical=False)
            .add_extension(issuer.key_id, critical=False)
        )
        return builder.sign(issuer.key, hashes.SHA256())


_CLIENT = ExtendedKeyUsageOID.CLIENT_AUTH
_SERVER = ExtendedKeyUsageOID.SERVER_AUTH


def create(key: ec.EllipticCurvePrivateKey, *, name: str, now: float) -> Authority:
    """A CA as hubs of before have it: one self-signed certificate that signs everything."""
    builder = _authority_builder(key.public_key(), name, path_length=0, days=SINGLE_CA_DAYS, now=now)
    issuer = Issuer(key, builder.issuer_name(_subject(name)).sign(key, hashes.SHA256()))
    return Authority(issuer.certificate, (issuer,))


def new_root(key: ec.EllipticCurvePrivateKey, *, name: str, now: float) -> Issuer:
    """Self-signed; of its certificates only intermediates count."""
    builder = _authority_builder(key.public_key(), name, path_length=1, days=ROOT_DAYS, now=now)
    return Issuer(key, builder.issuer_name(_subject(name)).sign(key, hashes.SHA256()))


def new_intermediate(root: Issuer, public_key: ec.EllipticCurvePublicKey, *, name: str, now: float) -> x509.Certificate:
    """Signs leaves only. Its name must be another than those before: a revocation list is found by it."""
    days = min(INTERMEDIATE_DAYS, (root.certificate.not_valid_after_utc - _utc(now)).days)
    builder = _authority_builder(public_key, name, path_length=0, days=days, now=now)
    builder = builder.issuer_name(root.certificate.subject).add_extension(root.key_id, critical=False)
    return builder.sign(root.key, hashes.SHA256())


def _authority_builder(
    public_key: ec.EllipticCurvePublicKey, name: str, *, path_length: int, days: int, now: float
) -> x509.CertificateBuilder:
    at = _utc(now)
    return (
        x509.CertificateBuilder()
        .subject_name(_subject(name))
        .public_key(public_key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(at - SKEW)
        .not_valid_after(at + timedelta(days=days))
        .add_extension(x509.BasicConstraints(ca=True, path_length=path_length), critical=True)
        .add_extension(_key_usage(signs_certificates=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public_key), critical=False)
    )


def _subject(name: str) -> x509.Name:
    return x509.Name(
        [x509.NameAttribute(NameOID.ORGANIZATION_NAME, "Wardround"), x509.NameAttribute(NameOID.COMMON_NAME, name[:64])]
    )


def _revocation_list(issuer: Issuer, revoked: list[tuple[x509.Certificate, float]], *, days: int, now: float) -> bytes:
    at = _utc(now)
    builder = x509.CertificateRevocationListBuilder().issuer_name(issuer.certificate.subject)
    builder = builder.last_update(at - SKEW).next_update(at + timedelta(days=days))
    for certificate, revoked_at in revoked:
        if certificate.issuer == issuer.certificate.subject:
            entry = x509.RevokedCertificateBuilder().serial_number(certificate.serial_number)
            builder = builder.add_revoked_certificate(entry.revocation_date(_utc(revoked_at)).build())
    builder = builder.add_extension(x509.CRLNumber(int(now * 1000)), critical=False)
    builder = builder.add_extension(issuer.key_id, critical=False)
    return builder.sign(issuer.key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


def load(key_path: Path, certificate_path: Path, passphrase_path: Path) -> Authority:
    """`key_path` is the first issuer's. The passphrase is read only where a key is encrypted.

    Raises SiteError when a file is missing, unreadable, or they do not belong together.
    """
    root, *below = read_certificates(certificate_path)
    issuers = (
        Issuer(load_key(successor(key_path, number), passphrase_path), certificate)
        for number, certificate in enumerate(below or [root])
    )
    try:
        authority = Authority(root, tuple(issuers))
    except TrustError as error:
        raise SiteError(f"the hub's CA cannot be read: {error}", advice="restore ca/ from backup") from error
    for issuer in authority.issuers:
        if issuer.key.public_key() != issuer.certificate.public_key():
            raise SiteError("the keys in ca/ and ca.pem do not belong together", advice="restore ca/ from one backup")
    return authority


def read_certificates(path: Path) -> list[x509.Certificate]:
    """The root, then its intermediates. Raises SiteError."""
    try:
        return x509.load_pem_x509_certificates(path.read_bytes())
    except (OSError, ValueError) as error:
        raise SiteError(f"the hub's CA cannot be read: {error}", advice="restore ca/ from backup") from error


def load_key(path: Path, passphrase_path: Path) -> ec.EllipticCurvePrivateKey:
    """Raises SiteError."""
    passphrase = read_passphrase(passphrase_path) if pki.is_encrypted(path) else None
    try:
        return pki.load_private_key(path, passphrase=passphrase)
    except SiteError as error:
        advice = f"restore ca/ from backup; is {passphrase_path} the passphrase of this key?" if passphrase else ""
        raise SiteError(f"the hub's CA cannot be read: {error}", advice=advice or "restore ca/ from backup") from error


def successor(key_path: Path, number: int) -> Path:
    """ca.key, ca-2.key, ca-3.key: of the intermediates in their order in ca.pem."""
    return key_path.with_name(f"{key_path.stem}-{number + 1}{key_path.suffix}") if number else key_path


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
