"""Who is believed: each part of a certificate made wrong in turn, and the files that hold keys."""

import itertools
import re
import stat
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import ExtendedKeyUsageOID, ObjectIdentifier
from hypothesis import given
from hypothesis import strategies as st

from fleet_link import pki
from fleet_link.errors import SiteError, TrustError
from tests.fleet_link.mosquitto_support import TestAuthority, subject, write_identity

DAY_S = 86_400.0
FOREIGN = x509.UnrecognizedExtension(ObjectIdentifier("1.2.3.4"), b"\x05\x00")


def test_accepts_what_the_ca_issued_and_gives_its_key(authority: TestAuthority) -> None:
    identity = authority.issue("box-1")
    public_key = authority.trust.check(identity.certificate_der, expected_name="box-1", now=time.time())
    assert public_key == identity.private_key.public_key()


def test_accepts_any_of_several_pinned_authorities(authority: TestAuthority) -> None:
    second = TestAuthority("next CA")
    trust = pki.Trust(authority.pem + second.pem)
    for each in (authority, second):
        trust.check(each.issue("box-1").certificate_der, expected_name="box-1", now=time.time())


def test_accepts_the_hub_that_is_also_a_tls_server(authority: TestAuthority) -> None:
    usages = (ExtendedKeyUsageOID.CLIENT_AUTH, ExtendedKeyUsageOID.SERVER_AUTH)
    hub = authority.issue("hub", usages=usages, hosts=("localhost",))
    authority.trust.check(hub.certificate_der, expected_name="hub", now=time.time())


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        ({"to_days": -0.5}, "not valid at validation time"),
        ({"from_days": 1}, "not valid at validation time"),
        ({"is_ca": True}, "certificate authority"),
        ({"usages": ()}, "client authentication"),
        ({"usages": (ExtendedKeyUsageOID.SERVER_AUTH,)}, "client authentication"),
        ({"may_sign": False}, "may not sign"),
        ({"extra": FOREIGN}, "critical"),
        ({"key": ec.generate_private_key(ec.SECP384R1())}, "not ECDSA P-256"),
    ],
)
def test_refuses_each_wrong_part(authority: TestAuthority, wrong: dict[str, object], reason: str) -> None:
    identity = authority.issue("box-1", **wrong)  # type: ignore[arg-type]
    with pytest.raises(TrustError, match=reason):
        authority.trust.check(identity.certificate_der, expected_name="box-1", now=time.time())


@pytest.mark.parametrize("names", [("box-2",), ("box-1", "box-2"), ("box-1", "box-1"), ()])
def test_refuses_any_name_but_the_expected_one(authority: TestAuthority, names: tuple[str, ...]) -> None:
    with pytest.raises(TrustError, match=r"common names|not of 'box-1'"):
        authority.trust.check(authority.issue(*names).certificate_der, expected_name="box-1", now=time.time())


def test_refuses_an_authority_of_the_same_name_with_another_key(authority: TestAuthority) -> None:
    forged = TestAuthority(authority.name).issue("box-1")
    with pytest.raises(TrustError, match="signature does not match"):
        authority.trust.check(forged.certificate_der, expected_name="box-1", now=time.time())


def test_refuses_a_stranger_and_a_self_signed_certificate(authority: TestAuthority) -> None:
    stranger = TestAuthority("other CA")
    for certificate in (stranger.issue("box-1").certificate_der, stranger.certificate.public_bytes(Encoding.DER)):
        with pytest.raises(TrustError):
            authority.trust.check(certificate, expected_name="box-1", now=time.time())


def test_refuses_a_device_that_issues_to_another(authority: TestAuthority) -> None:
    """A device's key signs a certificate in the name of another: the chain is one step long, so it does not count."""
    device = authority.issue("box-1")
    rogue = TestAuthority("box-1")
    rogue.key = device.private_key
    with pytest.raises(TrustError):
        authority.trust.check(rogue.issue("box-2").certificate_der, expected_name="box-2", now=time.time())


def test_refuses_everything_once_the_authority_itself_is_expired(authority: TestAuthority) -> None:
    identity = authority.issue("box-1", to_days=500)
    authority.trust.check(identity.certificate_der, expected_name="box-1", now=time.time() + 399 * DAY_S)
    with pytest.raises(TrustError):
        authority.trust.check(identity.certificate_der, expected_name="box-1", now=time.time() + 401 * DAY_S)


def test_refuses_every_flipped_bit(authority: TestAuthority) -> None:
    """Of a certificate whose signature ends in zero bits: the count of unused bits may not be raised over them."""
    certificate = authority.issue("box-1").certificate_der
    while certificate[-1] & 0b111:
        certificate = authority.issue("box-1").certificate_der
    for position, bit in itertools.product(range(len(certificate)), range(8)):
        changed = bytearray(certificate)
        changed[position] ^= 1 << bit
        with pytest.raises(TrustError):
            authority.trust.check(bytes(changed), expected_name="box-1", now=time.time())


# --- intermediates --------------------------------------------------------------------------------


class Hierarchy:
    """A root, an intermediate of which each part can be made wrong, and what that one signs."""

    def __init__(self, root_path_length: int | None = 1, root: "Hierarchy | None" = None, **wrong: object) -> None:
        self.root_key = root.root_key if root else ec.generate_private_key(ec.SECP256R1())
        self.root = (
            root.root if root else made("root", "root", self.root_key, self.root_key, path_length=root_path_length)
        )
        self.key = ec.generate_private_key(ec.SECP256R1())
        values: dict[str, object] = {"key": self.key, "signed_with": self.root_key} | wrong
        self.intermediate = made("below", "root", **values)  # type: ignore[arg-type]

    @property
    def pem(self) -> bytes:
        return pki.pem([self.root, self.intermediate])

    def issue(self, name: str = "box-1", **changes: object) -> bytes:
        issuer = TestAuthority("below")
        issuer.key = self.key
        return issuer.issue(name, **changes).certificate_der  # type: ignore[arg-type]


def made(
    name: str,
    issuer: str,
    key: ec.EllipticCurvePrivateKey,
    signed_with: ec.EllipticCurvePrivateKey,
    *,
    is_ca: bool = True,
    path_length: int | None = 0,
    may_issue: bool = True,
    days: tuple[float, float] = (-100, 100),
) -> x509.Certificate:
    now = datetime.now(UTC)
    usage = dict.fromkeys(
        (
            "content_commitment",
            "key_encipherment",
            "data_encipherment",
            "key_agreement",
            "encipher_only",
            "decipher_only",
        ),
        False,
    )
    return (
        x509.CertificateBuilder()
        .subject_name(subject(name))
        .issuer_name(subject(issuer))
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now + timedelta(days=days[0]))
        .not_valid_after(now + timedelta(days=days[1]))
        .add_extension(x509.BasicConstraints(is_ca, path_length if is_ca else None), critical=True)
        .add_extension(
            x509.KeyUsage(digital_signature=True, key_cert_sign=may_issue, crl_sign=may_issue, **usage), critical=True
        )
        .sign(signed_with, SHA256())
    )


def test_accepts_what_an_intermediate_of_the_root_issued() -> None:
    fleet = Hierarchy()
    certificate = fleet.issue()
    public_key = pki.Trust(fleet.pem).check(certificate, expected_name="box-1", now=time.time())
    assert public_key == x509.load_der_x509_certificate(certificate).public_key()
    for pem in (pki.pem([fleet.root]), Hierarchy().pem, pki.pem([fleet.root, Hierarchy(root=fleet).intermediate])):
        with pytest.raises(TrustError, match="not accepted"):
            pki.Trust(pem).check(certificate, expected_name="box-1", now=time.time())


@pytest.mark.parametrize(
    "wrong",
    [
        {"is_ca": False},
        {"may_issue": False},
        {"path_length": None},
        {"path_length": 1},
        {"root_path_length": 0},
        {"signed_with": ec.generate_private_key(ec.SECP256R1())},
        {"key": ec.generate_private_key(ec.SECP384R1())},
    ],
)
def test_refuses_an_intermediate_with_a_wrong_part(wrong: dict[str, object]) -> None:
    fleet = Hierarchy(**wrong)  # type: ignore[arg-type]
    with pytest.raises(TrustError, match="not a root and its intermediates"):
        pki.Trust(fleet.pem)
    assert pki.intermediates(fleet.root, [fleet.intermediate]) == []


def test_an_intermediate_counts_between_its_dates_only() -> None:
    fleet = Hierarchy(days=(-10, 10))
    trust, certificate = pki.Trust(fleet.pem), fleet.issue(from_days=-50, to_days=50)
    trust.check(certificate, expected_name="box-1", now=time.time() + 9 * DAY_S)
    for days in (-11, 11):
        with pytest.raises(TrustError, match="not accepted"):
            trust.check(certificate, expected_name="box-1", now=time.time() + days * DAY_S)


def test_nothing_below_an_intermediate_may_issue() -> None:
    """Its path length is 0: an authority that it made counts neither as one of the fleet's nor as a device's."""
    fleet, key = Hierarchy(), ec.generate_private_key(ec.SECP256R1())
    further = made("further", "below", key, fleet.key)
    with pytest.raises(TrustError):
        pki.Trust(pki.pem([fleet.root, fleet.intermediate, further]))
    issuer = TestAuthority("further")
    issuer.key = key
    for certificate in (issuer.issue("box-1").certificate_der, further.public_bytes(Encoding.DER)):
        with pytest.raises(TrustError):
            pki.Trust(fleet.pem).check(certificate, expected_name="box-1", now=time.time())


def test_an_intermediate_alone_is_no_root() -> None:
    with pytest.raises(TrustError, match="not a root"):
        pki.Trust(pki.pem([Hierarchy().intermediate]))


def test_of_what_a_hub_shows_only_the_roots_own_intermediates_are_taken() -> None:
    fleet, stranger = Hierarchy(), Hierarchy()
    younger = Hierarchy(root=fleet, days=(-1, 100)).intermediate
    device = x509.load_der_x509_certificate(fleet.issue())
    shown = [younger, stranger.intermediate, stranger.root, device, fleet.root, fleet.intermediate]
    assert pki.intermediates(fleet.root, shown) == [fleet.intermediate, younger]


def test_a_refreshed_trust_takes_the_next_intermediate_and_keeps_the_former_one_on_nonsense() -> None:
    fleet = Hierarchy()
    following = Hierarchy(root=fleet)
    following.intermediate = made("following", "root", following.key, fleet.root_key)
    issuer = TestAuthority("following")
    issuer.key = following.key
    trust, certificate = pki.Trust(fleet.pem), issuer.issue("box-1").certificate_der
    for nonsense in (b"", Hierarchy(path_length=3).pem):
        with pytest.raises(TrustError):
            trust.refresh(nonsense)
    trust.check(fleet.issue(), expected_name="box-1", now=time.time())
    with pytest.raises(TrustError):
        trust.check(certificate, expected_name="box-1", now=time.time())
    trust.refresh(fleet.pem + pki.pem([following.intermediate]))
    for each in (fleet.issue(), certificate):
        trust.check(each, expected_name="box-1", now=time.time())


def test_a_peer_shows_its_certificate_and_the_intermediate_above_it_without_the_root(authority: TestAuthority) -> None:
    fleet = Hierarchy()
    device = x509.load_der_x509_certificate(fleet.issue())
    assert pki.chain_pem(device, [fleet.root, fleet.intermediate]) == pki.pem([device, fleet.intermediate])
    single = x509.load_der_x509_certificate(authority.issue("box-1").certificate_der)
    assert pki.chain_pem(single, [authority.certificate]) == pki.pem([single])


@pytest.mark.parametrize("name", [b"test CA", b"box-a"], ids=["issuer", "subject"])
def test_a_certificate_whose_names_are_no_text_is_refused_at_once(authority: TestAuthority, name: bytes) -> None:
    der = authority.issue("box-a").certificate_der
    with pytest.raises(TrustError, match="not a certificate"):
        pki.parse_certificate(der.replace(name, b"\xff" * len(name)))


@given(st.binary(max_size=5000))
def test_random_bytes_are_neither_certificate_nor_request(junk: bytes) -> None:
    with pytest.raises(TrustError):
        pki.parse_certificate(junk)
    with pytest.raises(TrustError):
        pki.read_csr(junk)


def test_refuses_a_ca_file_that_is_none() -> None:
    with pytest.raises(TrustError, match="PEM"):
        pki.Trust(b"not a certificate")


def test_request_carries_name_and_key(tmp_path: Path) -> None:
    key = pki.new_private_key(tmp_path / "device.key")
    request = pki.build_csr(key, "box-1")
    assert pki.read_csr(request) == ("box-1", key.public_key())
    der = x509.load_pem_x509_csr(request).public_bytes(Encoding.DER)
    assert pki.read_csr(der) == ("box-1", key.public_key())


def test_refuses_a_request_without_proof_of_its_key(tmp_path: Path) -> None:
    der = bytearray(
        x509.load_pem_x509_csr(pki.build_csr(ec.generate_private_key(ec.SECP256R1()), "box-1")).public_bytes(
            Encoding.DER
        )
    )
    der[-1] ^= 0x01
    with pytest.raises(TrustError, match=r"own key|not a certificate request"):
        pki.read_csr(bytes(der))


def test_refuses_a_request_with_another_curve_or_two_names() -> None:
    builder = x509.CertificateSigningRequestBuilder()
    other_curve = builder.subject_name(subject("box-1")).sign(ec.generate_private_key(ec.SECP384R1()), SHA256())
    two_names = builder.subject_name(subject("box-1", "hub")).sign(ec.generate_private_key(ec.SECP256R1()), SHA256())
    for request, reason in ((other_curve, "P-256"), (two_names, "common names")):
        with pytest.raises(TrustError, match=reason):
            pki.read_csr(request.public_bytes(Encoding.DER))


def test_key_file_is_private_whole_and_never_replaced(tmp_path: Path) -> None:
    path = tmp_path / "device.key"
    key = pki.new_private_key(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert pki.load_private_key(path).private_numbers() == key.private_numbers()
    before = path.read_bytes()
    with pytest.raises(SiteError, match="exists"):
        pki.new_private_key(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]  # no temporary file is left


def test_key_in_a_missing_folder_is_the_sites_matter(tmp_path: Path) -> None:
    with pytest.raises(SiteError, match="cannot be written"):
        pki.new_private_key(tmp_path / "missing" / "device.key")


def test_identity_needs_key_and_certificate_of_one_pair(tmp_path: Path, authority: TestAuthority) -> None:
    identity = authority.issue("box-1")
    write_identity(tmp_path, identity)
    write_identity(tmp_path, authority.issue("box-2"))
    loaded = pki.load_identity(tmp_path / "box-1.key", tmp_path / "box-1.pem")
    assert (loaded.name, loaded.certificate_der) == ("box-1", identity.certificate_der)
    assert re.fullmatch(r"[0-9a-f]{64}", pki.fingerprint(loaded.certificate_der))
    with pytest.raises(SiteError, match="does not belong"):
        pki.load_identity(tmp_path / "box-2.key", tmp_path / "box-1.pem")
    with pytest.raises(SiteError, match="cannot be read"):
        pki.load_identity(tmp_path / "missing.key", tmp_path / "box-1.pem")
    with pytest.raises(SiteError, match="cannot be used"):
        pki.load_identity(tmp_path / "box-1.key", tmp_path / "box-1.key")


def test_a_secret_does_not_show_in_a_log_line(authority: TestAuthority) -> None:
    assert repr(authority.issue("box-1")) == "Identity(name='box-1')"
