"""Keys and certificates that box and hub both handle: load, request, fingerprint, check.

Reads and writes key and certificate files; keys are made here, 0600, and never leave the machine.
Never issues a certificate: that is cloud_hub.ca alone.
Source: RFC 5280 (X.509), RFC 2986 (PKCS#10); ECDSA P-256 with SHA-256 throughout.
"""

import hashlib
import os
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from cryptography.x509.verification import Criticality, ExtensionPolicy, PolicyBuilder, Store, VerificationError

from fleet_link.errors import SiteError, TrustError
from fleet_link.files import sync_folder

MAX_CERTIFICATE_BYTES = 4096
_ENCRYPTED = b"-----BEGIN ENCRYPTED PRIVATE KEY-----"  # RFC 7468, 11

# What `cryptography` raises on bytes that are not the X.509 structure asked for.
_UNPARSABLE = (
    ValueError,
    TypeError,
    UnsupportedAlgorithm,
    x509.InvalidVersion,
    x509.DuplicateExtension,
    x509.UnsupportedGeneralNameType,
)


@dataclass(frozen=True)
class Identity:
    """Who signs: the name is the certificate's CN, the MQTT client id and the topic segment at once."""

    name: str
    private_key: ec.EllipticCurvePrivateKey = field(repr=False)
    certificate_der: bytes = field(repr=False)

    def sign(self, data: bytes) -> bytes:
        """ECDSA P-256 with SHA-256; the caller prefixes its domain."""
        return self.private_key.sign(data, ec.ECDSA(SHA256()))


class Trust:
    """The pinned roots and their intermediates; a peer's certificate must be issued by one of them.

    Shared by threads: `refresh` puts new authorities in, each check sees the former ones or the new ones whole.
    Raises TrustError if the PEM holds no root, or an intermediate that none of its roots has signed.
    """

    def __init__(self, authorities_pem: bytes) -> None:
        self._pinned = _Pinned(authorities_pem)

    def refresh(self, authorities_pem: bytes) -> None:
        """Raises TrustError as at first; the former ones then stay."""
        self._pinned = _Pinned(authorities_pem)

    def check(self, certificate_der: bytes, *, expected_name: str, now: float) -> ec.EllipticCurvePublicKey:
        """Give the public key of a certificate that this fleet's CA issued to `expected_name`, valid at `now` (unix s).

        Raises TrustError. Revocation is the broker's (CRL) and the registry's matter.
        Source: RFC 5280 chapter 6.1.
        """
        certificate = parse_certificate(certificate_der)
        try:
            # 1. Signed by a pinned root or its intermediate, all valid at `now`, no unknown critical extension.
            pinned = self._pinned
            verifier = pinned.policy.time(datetime.fromtimestamp(now, UTC)).build_client_verifier()
            verifier.verify(certificate, pinned.intermediates)
            # 2. Issued to the one expected.
            name = common_name(certificate.subject)
            # 3. An end entity whose key may sign and identify a TLS client.
            _check_end_entity(certificate)
            public_key = _p256(certificate.public_key())
        except VerificationError as error:
            raise TrustError(
                f"certificate of {expected_name} not accepted: {error}",
                advice="expired: renew or enrol again; unknown issuer: it belongs to another hub, or to an intermediate that a"
                " box asks its hub for within the hour; check the clock",
            ) from error
        except _UNPARSABLE as error:
            raise TrustError(f"certificate of {expected_name} is malformed: {error}") from error
        if name != expected_name:
            raise TrustError(
                f"certificate is of {name!r}, not of {expected_name!r}",
                advice="a device speaks for another: look at the refused messages and revoke it if it goes on",
            )
        return public_key


class _Pinned:
    """What one PEM file pins, checked."""

    def __init__(self, authorities_pem: bytes) -> None:
        authorities = read_authorities(authorities_pem)
        roots = [certificate for certificate in authorities if is_root(certificate)]
        self.intermediates = [certificate for certificate in authorities if certificate not in roots]
        if not roots or any(not _signed_by_one_of(roots, certificate) for certificate in self.intermediates):
            raise TrustError(
                "the pinned CA file is not a root and its intermediates",
                advice="hub: restore ca/ from backup; box: enrol again to fetch the hub's CA",
            )
        authority_policy = ExtensionPolicy.permit_all().require_present(
            x509.BasicConstraints, Criticality.AGNOSTIC, None
        )
        self.policy = (
            PolicyBuilder()
            .store(Store(roots))
            .extension_policies(ca_policy=authority_policy, ee_policy=ExtensionPolicy.permit_all())
        )


def read_authorities(authorities_pem: bytes) -> list[x509.Certificate]:
    """In the file's order. Raises TrustError if the PEM holds no certificate."""
    try:
        return x509.load_pem_x509_certificates(authorities_pem)
    except _UNPARSABLE as error:
        raise TrustError(
            f"the pinned CA file is not a PEM certificate: {error}", advice="enrol again to fetch the hub's CA"
        ) from error


def is_root(certificate: x509.Certificate) -> bool:
    """Self-signed: whoever pins it trusts it by that alone."""
    return _is_issued_by(certificate, certificate)


def intermediates(root: x509.Certificate, shown: Iterable[x509.Certificate]) -> list[x509.Certificate]:
    """Those of `shown` that `root` signed as intermediates, the oldest first; a stranger's among them are left out.

    Their dates are judged whenever they are used. Source: RFC 5280 4.2.1.3 (keyCertSign), 4.2.1.9 (cA, pathLenConstraint).
    """
    found = [certificate for certificate in shown if is_intermediate(root, certificate)]
    return sorted(found, key=lambda certificate: certificate.not_valid_before_utc)


def is_intermediate(root: x509.Certificate, certificate: x509.Certificate) -> bool:
    """May it sign certificates of this root's fleet, and no further authority?"""
    if is_root(certificate) or not _is_issued_by(certificate, root):
        return False
    try:
        above = root.extensions.get_extension_for_class(x509.BasicConstraints).value
        constraints = certificate.extensions.get_extension_for_class(x509.BasicConstraints).value
        usage = certificate.extensions.get_extension_for_class(x509.KeyUsage).value
        _p256(certificate.public_key())
    except (TrustError, x509.ExtensionNotFound, *_UNPARSABLE):
        return False
    root_permits = above.ca and above.path_length != 0
    return root_permits and constraints.ca and constraints.path_length == 0 and usage.key_cert_sign


def pem(certificates: Iterable[x509.Certificate]) -> bytes:
    return b"".join(certificate.public_bytes(Encoding.PEM) for certificate in certificates)


def chain_pem(certificate: x509.Certificate, authorities: Iterable[x509.Certificate]) -> bytes:
    """What a TLS peer shows, so that the other side needs the root only: the certificate and the intermediate above it.

    Source: RFC 8446 4.4.2 (the root is left out).
    """
    above = [one for one in authorities if not is_root(one) and _is_issued_by(certificate, one)]
    return pem([certificate, *above[:1]])


def parse_certificate(certificate_der: bytes) -> x509.Certificate:
    """Raises TrustError on anything that is not one DER certificate of sane size."""
    if len(certificate_der) > MAX_CERTIFICATE_BYTES:
        raise TrustError(f"certificate of {len(certificate_der)} bytes exceeds {MAX_CERTIFICATE_BYTES}")
    try:
        certificate = x509.load_der_x509_certificate(certificate_der)
        signature = certificate.signature
        _ = certificate.subject, certificate.issuer  # parsed when they are read: what is wrong in them shows here
    except _UNPARSABLE as error:
        raise TrustError(f"not a certificate: {error}") from error
    # The signature ends the certificate, after its BIT STRING's count of unused bits. The parser takes 1 to 7 there too
    # where the signature happens to end in zero bits: other bytes for the same certificate.
    if not certificate_der.endswith(b"\x00" + signature):
        raise TrustError("not a certificate: its signature is not whole octets")
    return certificate


def common_name(subject: x509.Name) -> str:
    """The one CN. Raises TrustError if there is none or more than one."""
    names = subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    if len(names) != 1 or not isinstance(names[0].value, str):
        raise TrustError(f"subject has {len(names)} common names, one is needed")
    return names[0].value


def serial_hex(certificate: x509.Certificate) -> str:
    """As the hub's registry keeps it."""
    return f"{certificate.serial_number:x}"


def fingerprint(certificate_der: bytes) -> str:
    """SHA-256 of the DER bytes, as lower-case hex."""
    return hashlib.sha256(certificate_der).hexdigest()


def load_identity(key_path: Path, certificate_path: Path, *, passphrase: bytes | None = None) -> Identity:
    """Raises SiteError if a file is missing, unreadable, or the two do not belong together."""
    key = load_private_key(key_path, passphrase=passphrase)
    try:
        certificate = x509.load_pem_x509_certificate(certificate_path.read_bytes())
        name = common_name(certificate.subject)
    except (OSError, TrustError, *_UNPARSABLE) as error:
        raise SiteError(
            f"certificate {certificate_path.name} cannot be used: {error}", advice="enrol this machine again"
        ) from error
    if certificate.public_key() != key.public_key():
        raise SiteError(
            f"certificate {certificate_path.name} does not belong to key {key_path.name}",
            advice="enrol this machine again",
        )
    return Identity(name, key, certificate.public_bytes(Encoding.DER))


def load_private_key(path: Path, *, passphrase: bytes | None = None) -> ec.EllipticCurvePrivateKey:
    """Raises SiteError if the file is missing or holds anything but a P-256 private key. The passphrase opens an encrypted one."""
    try:
        content = path.read_bytes()
        key = load_pem_private_key(content, password=passphrase if _ENCRYPTED in content else None)
    except (OSError, *_UNPARSABLE) as error:
        raise SiteError(f"key {path.name} cannot be read: {error}", advice="enrol this machine again") from error
    if not isinstance(key, ec.EllipticCurvePrivateKey) or not isinstance(key.curve, ec.SECP256R1):
        raise SiteError(f"key {path.name} is not ECDSA P-256", advice="enrol this machine again")
    return key


def is_encrypted(key_path: Path) -> bool:
    """False too where there is none."""
    try:
        return _ENCRYPTED in key_path.read_bytes()
    except OSError:
        return False


def new_private_key(path: Path, *, passphrase: bytes | None = None) -> ec.EllipticCurvePrivateKey:
    """Make a P-256 key and keep it at `path`, 0600, PKCS#8 PEM. Raises SiteError if the file exists."""
    key = ec.generate_private_key(ec.SECP256R1())
    write_secret(path, private_key_pem(key, passphrase=passphrase))
    return key


def private_key_pem(key: ec.EllipticCurvePrivateKey, *, passphrase: bytes | None = None) -> bytes:
    """PKCS#8, encrypted with the passphrase where one is given (PBES2; AES-256-CBC, RFC 8018)."""
    protection = BestAvailableEncryption(passphrase) if passphrase else NoEncryption()
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, protection)


def build_csr(key: ec.EllipticCurvePrivateKey, common_name: str) -> bytes:
    """PKCS#10 request in PEM, subject CN only: the CA decides everything else."""
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])
    return x509.CertificateSigningRequestBuilder().subject_name(subject).sign(key, SHA256()).public_bytes(Encoding.PEM)


def read_csr(csr: bytes) -> tuple[str, ec.EllipticCurvePublicKey]:
    """Give (CN, public key) of a PKCS#10 request, PEM or DER, whose sender holds the key.

    Raises TrustError on anything else. Extensions asked for are ignored: the CA decides.
    """
    if len(csr) > MAX_CERTIFICATE_BYTES:
        raise TrustError(f"certificate request of {len(csr)} bytes exceeds {MAX_CERTIFICATE_BYTES}")
    try:
        is_pem = csr.lstrip().startswith(b"-----")
        request = x509.load_pem_x509_csr(csr) if is_pem else x509.load_der_x509_csr(csr)
        signed_by_key = request.is_signature_valid
        public_key = _p256(request.public_key())
        name = common_name(request.subject)
    except (InvalidSignature, *_UNPARSABLE) as error:
        raise TrustError(f"not a certificate request: {error}") from error
    if not signed_by_key:
        raise TrustError("certificate request is not signed by its own key")
    return name, public_key


def write_secret(path: Path, secret: bytes) -> None:
    """Keep `secret` at `path` with mode 0600, whole or not at all. Raises SiteError if the file exists or cannot be made.

    A hard link is the exclusive step: after a power cut there is no half-written key.
    """
    try:
        descriptor, temporary = tempfile.mkstemp(
            dir=path.parent, prefix=f".{path.name}-", suffix=".tmp"
        )  # O_EXCL, 0600
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(secret)
                file.flush()
                os.fsync(file.fileno())
            os.link(temporary, path)
        finally:
            os.unlink(temporary)
        sync_folder(path.parent)
    except FileExistsError as error:
        raise SiteError(f"{path.name} exists and is not replaced", advice="move the old key away first") from error
    except OSError as error:
        raise SiteError(f"{path.name} cannot be written: {error}", advice="check the folder and the disk") from error


def _p256(public_key: object) -> ec.EllipticCurvePublicKey:
    if not isinstance(public_key, ec.EllipticCurvePublicKey) or not isinstance(public_key.curve, ec.SECP256R1):
        raise TrustError("public key is not ECDSA P-256")
    return public_key


def _signed_by_one_of(roots: list[x509.Certificate], certificate: x509.Certificate) -> bool:
    return any(is_intermediate(root, certificate) for root in roots)


def _is_issued_by(certificate: x509.Certificate, issuer: x509.Certificate) -> bool:
    """Name and signature only."""
    try:
        certificate.verify_directly_issued_by(issuer)
    except (InvalidSignature, *_UNPARSABLE):
        return False
    return True


def _check_end_entity(certificate: x509.Certificate) -> None:
    """Raises TrustError unless the certificate may sign as a TLS client and may not issue. Source: RFC 5280 4.2.1."""
    extensions = {extension.oid: extension.value for extension in certificate.extensions}
    constraints = extensions.get(x509.BasicConstraints.oid)
    if isinstance(constraints, x509.BasicConstraints) and constraints.ca:
        raise TrustError("certificate of a certificate authority used as a device's")
    key_usage = extensions.get(x509.KeyUsage.oid)
    if isinstance(key_usage, x509.KeyUsage) and not key_usage.digital_signature:
        raise TrustError("certificate's key may not sign")
    extended = extensions.get(x509.ExtendedKeyUsage.oid)
    if not isinstance(extended, x509.ExtendedKeyUsage) or ExtendedKeyUsageOID.CLIENT_AUTH not in extended:
        raise TrustError("certificate is not for client authentication")
