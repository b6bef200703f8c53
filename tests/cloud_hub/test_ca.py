"""The authority: certificates that both sides accept, for the right names and uses only."""

import ssl
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
DER = serialization.Encoding.DER


@pytest.fixture
def authority() -> ca.Authority:
    return ca.create(new_key(), name="test", now=NOW)


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
    late = NOW + (ca.ROOT_DAYS - 10) * 86400
    certificate = authority.issue_device(new_key().public_key(), "box-a", days=90, now=late)
    assert certificate.not_valid_after_utc == authority.certificate.not_valid_after_utc


def test_the_revocation_list_holds_the_serials_and_is_the_authoritys(authority: ca.Authority) -> None:
    crl = x509.load_pem_x509_crl(authority.revocation_list([(77, NOW - 5)], days=365, now=NOW))
    assert crl.is_signature_valid(authority.key.public_key())
    assert crl.get_revoked_certificate_by_serial_number(77) is not None
    assert crl.get_revoked_certificate_by_serial_number(78) is None
    assert crl.next_update_utc is not None
    assert crl.next_update_utc > datetime.fromtimestamp(NOW + 364 * 86400, UTC)


def test_openssl_accepts_the_root_as_an_authority(authority: ca.Authority) -> None:
    context = ssl.create_default_context(cadata=authority.pem.decode())
    assert context.cert_store_stats()["x509_ca"] == 1


def test_what_does_not_belong_together_is_refused(authority: ca.Authority, tmp_path: Path) -> None:
    key_path, certificate_path = tmp_path / "ca.key", tmp_path / "ca.pem"
    key_path.write_bytes(key_pem(authority.key))
    certificate_path.write_bytes(authority.pem)
    assert ca.load(key_path, certificate_path, tmp_path / "none").sha256 == authority.sha256
    certificate_path.write_bytes(pem(ca.create(new_key(), name="other", now=NOW).certificate))
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
    key_path.write_bytes(key_pem(authority.key))
    certificate_path.write_bytes(authority.pem)
    assert not ca.is_encrypted(key_path)
    with pytest.raises(SiteError, match="cannot be read"):
        ca.encrypt(key_path, passphrase)
    passphrase.write_text("correct horse\n")
    ca.encrypt(key_path, passphrase)
    assert ca.is_encrypted(key_path)
    assert key_path.stat().st_mode & 0o777 == 0o600
    assert ca.load(key_path, certificate_path, passphrase).key.private_numbers() == authority.key.private_numbers()
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
