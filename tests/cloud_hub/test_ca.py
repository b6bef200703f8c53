"""The authority: certificates that both sides accept, for the right names and uses only."""

import ssl
import subprocess
import time
from datetime import UTC, datetime
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization

from cloud_hub import ca
from fleet_link import pki
from fleet_link.errors import SiteError, TrustError
from tests.cloud_hub.hub_support import key_pem, new_key, pem

NOW = time.time()
DAY_S = 86_400.0
DER = serialization.Encoding.DER


@pytest.fixture
def root() -> ca.Issuer:
    return ca.new_root(new_key(), name="test", now=NOW)


@pytest.fixture(params=["intermediate", "single CA"])
def authority(request: pytest.FixtureRequest, root: ca.Issuer) -> ca.Authority:
    """Of a hub made now, and of one made before there were intermediates."""
    if request.param == "single CA":
        return ca.create(new_key(), name="test", now=NOW)
    return below(root, NOW)


def below(root: ca.Issuer, *made_at: float) -> ca.Authority:
    """One intermediate made at each of these times."""
    issuers = []
    for number, at in enumerate(made_at):
        key = new_key()
        issuers.append(ca.Issuer(key, ca.new_intermediate(root, key.public_key(), name=f"test {number}", now=at)))
    return ca.Authority(root.certificate, tuple(issuers))


def test_the_fleet_trusts_a_device_certificate_under_its_own_name_only(authority: ca.Authority) -> None:
    key = new_key()
    certificate = authority.issue_device(key.public_key(), "box-a", days=90, now=NOW).public_bytes(DER)
    trust = pki.Trust(authority.pem)
    assert trust.check(certificate, expected_name="box-a", now=NOW) == key.public_key()
    with pytest.raises(TrustError):
        trust.check(certificate, expected_name="box-b", now=NOW)
    with pytest.raises(TrustError):
        trust.check(certificate, expected_name="box-a", now=NOW + 91 * 86400)
    with pytest.raises(TrustError):
        pki.Trust(ca.create(new_key(), name="other", now=NOW).pem).check(certificate, expected_name="box-a", now=NOW)


def test_the_hub_certificate_names_the_hub_and_no_device_can_have_that_name(authority: ca.Authority) -> None:
    certificate = authority.issue_hub(new_key().public_key(), days=30, now=NOW).public_bytes(DER)
    assert pki.Trust(authority.pem).check(certificate, expected_name="hub", now=NOW)
    for name in ("hub", "", "Box", "a b", "-a", "a" * 64):
        with pytest.raises(TrustError, match="cannot be a device's name"):
            authority.issue_device(new_key().public_key(), name, days=1, now=NOW)


def test_a_server_certificate_is_not_good_for_signing_messages(authority: ca.Authority) -> None:
    certificate = authority.issue_server(new_key().public_key(), ["localhost"], days=30, now=NOW).public_bytes(DER)
    with pytest.raises(TrustError):
        pki.Trust(authority.pem).check(certificate, expected_name="localhost", now=NOW)


def test_server_names_and_addresses_are_told_apart(authority: ca.Authority) -> None:
    names = ["hub.example", "192.0.2.1", "2001:db8::1", "hub.example"]
    certificate = authority.issue_server(new_key().public_key(), names, days=30, now=NOW)
    alternative = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert alternative.get_values_for_type(x509.DNSName) == ["hub.example"]
    assert [str(a) for a in alternative.get_values_for_type(x509.IPAddress)] == ["192.0.2.1", "2001:db8::1"]


def test_no_certificate_outlives_the_authority(authority: ca.Authority) -> None:
    end = authority.issuers[0].certificate.not_valid_after_utc
    late = end.timestamp() - 10 * 86400
    certificate = authority.issue_device(new_key().public_key(), "box-a", days=90, now=late)
    assert certificate.not_valid_after_utc == end
    with pytest.raises(SiteError, match="has ended") as caught:
        authority.issue_device(new_key().public_key(), "box-a", days=90, now=end.timestamp())
    assert "hub new-intermediate" in caught.value.advice


def test_the_revocation_list_holds_the_serials_and_is_the_authoritys(authority: ca.Authority) -> None:
    revoked, other = (authority.issue_device(new_key().public_key(), name, days=9, now=NOW) for name in ("a", "b"))
    crl = x509.load_pem_x509_crl(authority.revocation_list([(revoked, NOW - 5)], days=365, now=NOW))
    assert crl.is_signature_valid(authority.issuers[0].key.public_key())
    assert crl.get_revoked_certificate_by_serial_number(revoked.serial_number) is not None
    assert crl.get_revoked_certificate_by_serial_number(other.serial_number) is None
    assert crl.next_update_utc is not None
    assert crl.next_update_utc > datetime.fromtimestamp(NOW + 364 * 86400, UTC)


def test_openssl_accepts_the_root_as_an_authority(authority: ca.Authority) -> None:
    context = ssl.create_default_context(cadata=pem(authority.root).decode())
    assert context.cert_store_stats()["x509_ca"] == 1


def test_openssl_follows_the_chain_that_a_peer_shows_up_to_the_root(authority: ca.Authority, tmp_path: Path) -> None:
    certificate = authority.issue_device(new_key().public_key(), "box-a", days=90, now=NOW)
    (tmp_path / "root.pem").write_bytes(pem(authority.root))
    (tmp_path / "chain.pem").write_bytes(authority.chain_pem(certificate))
    (tmp_path / "leaf.pem").write_bytes(pem(certificate))
    verify = ["openssl", "verify", "-x509_strict", "-purpose", "sslclient", "-CAfile", str(tmp_path / "root.pem")]
    subprocess.run([*verify, "-untrusted", str(tmp_path / "chain.pem"), str(tmp_path / "leaf.pem")], check=True)


def test_what_does_not_belong_together_is_refused(authority: ca.Authority, tmp_path: Path) -> None:
    key_path, certificate_path = tmp_path / "ca.key", tmp_path / "ca.pem"
    key_path.write_bytes(key_pem(authority.issuers[0].key))
    certificate_path.write_bytes(authority.pem)
    assert ca.load(key_path, certificate_path, tmp_path / "none").sha256 == authority.sha256
    certificate_path.write_bytes(pem(ca.create(new_key(), name="other", now=NOW).root))
    with pytest.raises(SiteError, match="do not belong together"):
        ca.load(key_path, certificate_path, tmp_path / "none")
    certificate_path.write_bytes(b"nothing")
    with pytest.raises(SiteError, match="cannot be read"):
        ca.load(key_path, certificate_path, tmp_path / "none")
    key_path.unlink()
    with pytest.raises(SiteError, match="cannot be read"):
        ca.load(key_path, certificate_path, tmp_path / "none")


def test_an_encrypted_key_needs_its_passphrase(authority: ca.Authority, tmp_path: Path) -> None:
    key_path, certificate_path, passphrase = tmp_path / "ca.key", tmp_path / "ca.pem", tmp_path / "passphrase"
    key = authority.issuers[0].key
    key_path.write_bytes(key_pem(key))
    certificate_path.write_bytes(authority.pem)
    assert not pki.is_encrypted(key_path)
    with pytest.raises(SiteError, match="cannot be read"):
        ca.encrypt(key_path, passphrase)
    passphrase.write_text("correct horse\n")
    ca.encrypt(key_path, passphrase)
    assert pki.is_encrypted(key_path)
    assert key_path.stat().st_mode & 0o777 == 0o600
    assert ca.load(key_path, certificate_path, passphrase).issuers[0].key.private_numbers() == key.private_numbers()
    with pytest.raises(SiteError, match="cannot be read"):
        pki.load_private_key(key_path)
    for wrong, reason in (("other\n", "the hub's CA cannot be read"), ("\n", "holds no passphrase")):
        passphrase.write_text(wrong)
        with pytest.raises(SiteError, match=reason):
            ca.load(key_path, certificate_path, passphrase)
    passphrase.unlink()
    with pytest.raises(SiteError, match="passphrase of the CA's key") as caught:
        ca.load(key_path, certificate_path, passphrase)
    assert "kept apart" in caught.value.advice


# --- intermediates --------------------------------------------------------------------------------


def issued_by(authority: ca.Authority, now: float) -> int:
    """Which of the intermediates signs at `now`."""
    issuer = authority.issue_hub(new_key().public_key(), days=1, now=now).issuer
    return [one.certificate.subject for one in authority.issuers].index(issuer)


def test_the_first_signs_at_once_and_the_next_when_the_boxes_know_it(root: ca.Issuer) -> None:
    second = NOW + 4 * 365 * DAY_S
    authority = below(root, NOW, second)
    first_end, lead = NOW + ca.INTERMEDIATE_DAYS * DAY_S, ca.LEAD.total_seconds()
    cases = [(NOW, 0), (second, 0), (second + lead - 60, 0), (second + lead + 60, 1), (first_end + 60, 1)]
    for now, which in cases:
        assert issued_by(authority, now) == which, (now - NOW) / DAY_S


def test_one_that_comes_too_late_signs_at_once(root: ca.Issuer) -> None:
    end = NOW + ca.INTERMEDIATE_DAYS * DAY_S
    authority = below(root, NOW, end - 2 * DAY_S)
    assert issued_by(authority, end - 60) == 0
    assert issued_by(authority, end + 60) == 1


def test_the_operator_is_told_a_year_before_the_last_intermediate_ends(root: ca.Issuer) -> None:
    end = NOW + ca.INTERMEDIATE_DAYS * DAY_S
    assert below(root, NOW).trouble(end - 367 * DAY_S) == ""
    assert "hub new-intermediate" in below(root, NOW).trouble(end - 365 * DAY_S)
    assert below(root, NOW, end - 366 * DAY_S).trouble(end - 365 * DAY_S) == ""
    assert ca.create(new_key(), name="single", now=NOW).trouble(NOW + ca.SINGLE_CA_DAYS * DAY_S) == ""


def test_an_intermediate_outlives_neither_its_years_nor_the_root(root: ca.Issuer) -> None:
    root_end = root.certificate.not_valid_after_utc
    (late,) = below(root, root_end.timestamp() - 100 * DAY_S).issuers
    assert late.certificate.not_valid_after_utc <= root_end
    (first,) = below(root, NOW).issuers
    assert (first.certificate.not_valid_after_utc - datetime.fromtimestamp(int(NOW), UTC)).days == ca.INTERMEDIATE_DAYS
    limits = [
        one.extensions.get_extension_for_class(x509.BasicConstraints).value.path_length
        for one in (root.certificate, first.certificate)
    ]
    assert limits == [1, 0]


def test_each_intermediate_has_its_own_revocation_list(root: ca.Issuer) -> None:
    authority = below(root, NOW - 30 * DAY_S, NOW - 10 * DAY_S)
    old, new = (authority.issue_device(new_key().public_key(), "a", days=30, now=at) for at in (NOW - 20 * DAY_S, NOW))
    lists = authority.revocation_list([(old, NOW), (new, NOW)], days=9, now=NOW).split(b"-----END X509 CRL-----\n")
    assert lists.pop() == b""
    for issuer, content, mine, others in zip(authority.issuers, lists, (old, new), (new, old), strict=True):
        crl = x509.load_pem_x509_crl(content + b"-----END X509 CRL-----\n")
        assert crl.issuer == issuer.certificate.subject
        assert crl.is_signature_valid(issuer.key.public_key())
        assert crl.get_revoked_certificate_by_serial_number(mine.serial_number) is not None
        assert crl.get_revoked_certificate_by_serial_number(others.serial_number) is None


def test_all_is_read_from_disk_without_the_roots_key(root: ca.Issuer, tmp_path: Path) -> None:
    authority = below(root, NOW, NOW + 60)
    names = ("ca.key", "ca-2.key")
    for name, issuer in zip(names, authority.issuers, strict=True):
        (tmp_path / name).write_bytes(key_pem(issuer.key))
    (tmp_path / "ca.pem").write_bytes(authority.pem)
    found = ca.load(tmp_path / "ca.key", tmp_path / "ca.pem", tmp_path / "none")
    assert (found.sha256, found.certificates) == (authority.sha256, authority.certificates)
    (tmp_path / "ca-2.key").write_bytes((tmp_path / "ca.key").read_bytes())
    with pytest.raises(SiteError, match="do not belong together"):
        ca.load(tmp_path / "ca.key", tmp_path / "ca.pem", tmp_path / "none")
    (tmp_path / "ca-2.key").unlink()
    with pytest.raises(SiteError, match=r"ca-2\.key cannot be read"):
        ca.load(tmp_path / "ca.key", tmp_path / "ca.pem", tmp_path / "none")
    stranger = below(ca.new_root(new_key(), name="test", now=NOW), NOW)
    (tmp_path / "ca.pem").write_bytes(pem(authority.root) + pem(stranger.issuers[0].certificate))
    with pytest.raises(SiteError, match="not a root and its intermediates"):
        ca.load(tmp_path / "ca.key", tmp_path / "ca.pem", tmp_path / "none")


def test_a_secret_does_not_show_in_a_log_line(root: ca.Issuer) -> None:
    assert "key" not in repr(root)
