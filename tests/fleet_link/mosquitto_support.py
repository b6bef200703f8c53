"""A real Mosquitto and a throw-away CA for the tests of the link.

Writes keys, certificates and a broker configuration into the folder it is given; starts and kills the broker.
Never imported by the product: the hub's own CA and broker live in cloud_hub.
Source: mosquitto.conf(5).
"""

import getpass
import signal
import socket
import subprocess
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature, encode_dss_signature
from cryptography.hazmat.primitives.hashes import SHA256, HashAlgorithm
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from benchmarks.processes import free_port
from fleet_link.bus import BusConfig
from fleet_link.pki import Identity, Trust

CONFIGURATION = """\
listener {port} 127.0.0.1
cafile {folder}/ca.pem
certfile {folder}/server.pem
keyfile {folder}/server.key
tls_version tlsv1.3
require_certificate true
use_identity_as_username true
use_username_as_clientid true
allow_anonymous false
acl_file {folder}/acl
set_tcp_nodelay true
message_size_limit 131072
persistence false
user {user}
log_dest file {folder}/mosquitto.log
log_type error
log_type warning
log_type notice
"""
ACCESS = """\
pattern write wr1/up/%u/#
pattern read wr1/down/%u/#

user hub
topic readwrite wr1/#
"""


def subject(*names: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name) for name in names])


class TestAuthority:
    """A CA that also issues what no honest CA would: every part of the certificate can be made wrong."""

    __test__ = False

    def __init__(self, name: str = "test CA") -> None:
        self.name = name
        self.key = ec.generate_private_key(ec.SECP256R1())
        now = datetime.now(UTC)
        self.certificate = (
            x509.CertificateBuilder()
            .subject_name(subject(name))
            .issuer_name(subject(name))
            .public_key(self.key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - timedelta(days=400))
            .not_valid_after(now + timedelta(days=400))
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(_key_usage(sign=False, issue=True), critical=True)
            .sign(self.key, SHA256())
        )
        self.pem = self.certificate.public_bytes(Encoding.PEM)
        self.trust = Trust(self.pem)

    def issue(
        self,
        *names: str,
        key: ec.EllipticCurvePrivateKey | None = None,
        from_days: float = -1,
        to_days: float = 30,
        is_ca: bool = False,
        usages: tuple[x509.ObjectIdentifier, ...] = (ExtendedKeyUsageOID.CLIENT_AUTH,),
        may_sign: bool = True,
        extra: x509.ExtensionType | None = None,
        hosts: tuple[str, ...] = (),
        digest: HashAlgorithm | None = None,
    ) -> Identity:
        key = key or ec.generate_private_key(ec.SECP256R1())
        now = datetime.now(UTC)
        builder = (
            x509.CertificateBuilder()
            .subject_name(subject(*names))
            .issuer_name(subject(self.name))
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now + timedelta(days=from_days))
            .not_valid_after(now + timedelta(days=to_days))
            .add_extension(x509.BasicConstraints(ca=is_ca, path_length=None), critical=True)
            .add_extension(_key_usage(sign=may_sign, issue=is_ca), critical=True)
        )
        if usages:
            builder = builder.add_extension(x509.ExtendedKeyUsage(usages), critical=False)
        if hosts:
            alternatives = x509.SubjectAlternativeName([x509.DNSName(host) for host in hosts])
            builder = builder.add_extension(alternatives, critical=False)
        if extra:
            builder = builder.add_extension(extra, critical=True)
        certificate = builder.sign(self.key, digest or SHA256())
        return Identity(names[0] if names else "", key, certificate.public_bytes(Encoding.DER))


class Mosquitto:
    """Debian's broker: TLS 1.3, client certificates, access by certificate identity, on a free port."""

    def __init__(self, folder: Path, authority: TestAuthority) -> None:
        self.folder = folder
        self.authority = authority
        self.port = free_port()
        self._process: subprocess.Popen[bytes] | None = None
        (folder / "ca.pem").write_bytes(authority.pem)
        (folder / "acl").write_text(ACCESS)
        (folder / "mosquitto.conf").write_text(
            CONFIGURATION.format(port=self.port, folder=folder, user=getpass.getuser())
        )
        server = authority.issue("server", usages=(ExtendedKeyUsageOID.SERVER_AUTH,), hosts=("localhost",))
        write_identity(folder, server)

    def config(self, identity: Identity, **changes: object) -> BusConfig:
        write_identity(self.folder, identity)
        values = {
            "host": "localhost",
            "port": self.port,
            "name": identity.name,
            "ca_path": self.folder / "ca.pem",
            "certificate_path": self.folder / f"{identity.name}.pem",
            "key_path": self.folder / f"{identity.name}.key",
            "keepalive_s": 10,
        }
        return BusConfig(**(values | changes))  # type: ignore[arg-type]

    def set_server(self, identity: Identity) -> None:
        """Give the broker another server certificate; takes effect at the next start."""
        write_identity(self.folder, Identity("server", identity.private_key, identity.certificate_der))

    def start(self) -> None:
        """Return once the broker listens."""
        command = ["mosquitto", "-c", str(self.folder / "mosquitto.conf")]
        self._process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        while not _listens(self.port):
            if self._process.poll() is not None:
                raise RuntimeError((self.folder / "mosquitto.log").read_text())
            time.sleep(0.02)

    def kill(self) -> None:
        """kill -9: what the broker held in memory is gone."""
        self._end(signal.SIGKILL)

    def stop(self) -> None:
        self._end(signal.SIGTERM)

    def send_signal(self, number: signal.Signals) -> None:
        assert self._process is not None
        self._process.send_signal(number)

    def _end(self, number: signal.Signals) -> None:
        if self._process is not None:
            self._process.send_signal(signal.SIGCONT)
            self._process.send_signal(number)
            self._process.wait()
            self._process = None


def write_identity(folder: Path, identity: Identity) -> None:
    certificate = x509.load_der_x509_certificate(identity.certificate_der)
    (folder / f"{identity.name}.pem").write_bytes(certificate.public_bytes(Encoding.PEM))
    (folder / f"{identity.name}.key").write_bytes(
        identity.private_key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    )


def twin_certificate(certificate_der: bytes) -> bytes:
    """The same certificate with the CA's signature in its other form, (r, n - s)."""
    order = 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551  # of P-256
    signature = x509.load_der_x509_certificate(certificate_der).signature
    r, s = decode_dss_signature(signature)
    twin = encode_dss_signature(r, order - s)
    fields = certificate_der[4:].removesuffix(_tlv(b"\x03", b"\x00" + signature))
    return _tlv(b"\x30", fields + _tlv(b"\x03", b"\x00" + twin))


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _tlv(tag: bytes, value: bytes) -> bytes:
    """DER: tag, length, value; up to 65535 bytes."""
    size = len(value)
    if size < 128:
        return tag + bytes([size]) + value
    length = size.to_bytes((size.bit_length() + 7) // 8)
    return tag + bytes([0x80 | len(length)]) + length + value


def _key_usage(*, sign: bool, issue: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=sign,
        content_commitment=False,
        key_encipherment=not (sign or issue),
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=issue,
        crl_sign=issue,
        encipher_only=False,
        decipher_only=False,
    )
